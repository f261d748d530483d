# Everything a developer does, one word each; `make` alone lists them. All of it happens in .venv and build/.
#
# PYTHON=python3.12      the Python that .venv is made with (3.10 or later)
# TORCH_INDEX=URL        an extra package index for torch. PyPI's torch for Linux is a CUDA build, several GB
#                        with its libraries; https://download.pytorch.org/whl/cpu has the CPU build of 200 MB.

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
CXX_FILES = $(shell find csrc tests/csrc tests/fake_cuda -name '*.cpp' -o -name '*.h' 2>/dev/null)
BUILD_INPUTS = setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
SANITIZED := build/csrc-sanitized

.DEFAULT_GOAL := help
.PHONY: help venv demo test pytest csrc-test fuzz csrc-sanitized csrc-test-threads bench lint format wheel clean
.PHONY: gpu-interpret gpu-compile gpu-ptx gpu-traffic gpu-dispatch gpu-generate gpu-fake-tensor gpu-check gpu-bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/.built ## make .venv with the pinned packages and build d3rt into it (editable)

.venv/.installed: requirements.txt requirements-nodeps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$$($(PYTHON) -V 2>&1): d3rt needs 3.10 or later; make PYTHON=python3.12"; exit 1; }
	@echo "[1/3] making .venv with $$($(PYTHON) -V)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "[2/3] installing requirements.txt (PyTorch is large: some minutes on a first run)"
	@$(PIP_INSTALL) -r requirements.txt
	@$(PIP_INSTALL) --no-deps -r requirements-nodeps.txt
	@touch $@

# Without build isolation: the tools are in .venv already, and CMake then compiles only what changed.
.venv/.built: .venv/.installed $(BUILD_INPUTS)
	@echo "[3/3] building d3rt._C"
	@$(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

demo: venv ## generate with the embedded model, with and without skipping
	@$(BIN)/d3rt demo

test: pytest csrc-test fuzz ## run every test: Python, C++ under ASan and UBSan, and random conversations there

pytest: venv ## run the Python tests
	$(BIN)/pytest

csrc-test: csrc-sanitized ## run the C++ tests under AddressSanitizer and UBSan
	UBSAN_OPTIONS=print_stacktrace=1 $(SANITIZED)/d3rt_csrc_tests

# Python itself is not sanitized: the sanitizers' library is loaded in front of it, with the C++ library, whose throw it
# looks for when it starts; and what Python leaks is its own. -s: what kills the process would die with pytest's capture.
fuzz: csrc-sanitized ## run random conversations and batches on the native core under AddressSanitizer and UBSan
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 D3RT_EXTENSION="$$(echo $(CURDIR)/$(SANITIZED)/_C.*.so)" \
	  $(BIN)/pytest -s -p no:cacheprovider tests/sessions/test_fuzz.py tests/runtime/test_row_batch.py -k "not reference"

csrc-sanitized: venv
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=Debug -DD3RT_PYTHON=ON -DD3RT_TESTS=ON \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DD3RT_WERROR=ON -DD3RT_SANITIZE=address,undefined
	@$(BIN)/cmake --build $(SANITIZED)

csrc-test-threads: venv ## run the C++ tests under ThreadSanitizer
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/csrc-threads -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=Debug -DD3RT_PYTHON=OFF -DD3RT_TESTS=ON \
	  -DD3RT_WERROR=ON -DD3RT_SANITIZE=thread
	@$(BIN)/cmake --build build/csrc-threads
	build/csrc-threads/d3rt_csrc_tests

# What is proven of the CUDA backend without a GPU; all of it is part of `make pytest`.

gpu-interpret: venv ## run the Triton kernels in Triton's interpreter
	$(BIN)/pytest tests/kernels/test_triton_ops.py

gpu-compile: venv ## compile the Triton kernels for every architecture, against tests/gpu/budgets.json
	$(BIN)/pytest tests/gpu/test_compile_gate.py

gpu-ptx: venv ## run the PTX that Triton emits in tests/ptx, and mutants of it
	$(BIN)/pytest tests/gpu/test_ptx_machine.py tests/gpu/test_ptx_ops.py tests/gpu/test_ptx_mutations.py

gpu-traffic: venv ## count the bytes that each launch moves, and the launches of a step
	$(BIN)/pytest tests/gpu/test_traffic.py tests/gpu/test_nodes.py

gpu-dispatch: csrc-sanitized ## run the tests of the CUDA dispatcher, over a libcuda without a device
	UBSAN_OPTIONS=print_stacktrace=1 $(SANITIZED)/d3rt_csrc_tests cuda_
	$(BIN)/pytest tests/gpu/test_fake_driver.py tests/gpu/test_driver_api.py

gpu-generate: venv ## generate on the cuda backend without a GPU: dispatcher, graphs, PTX
	$(BIN)/pytest tests/gpu/test_generate_fake.py tests/gpu/test_record.py tests/gpu/test_steps.py tests/gpu/test_refusals.py

gpu-fake-tensor: venv ## hold torch's part of the cuda backend against host syncs, without a GPU
	$(BIN)/pytest tests/gpu/test_fake_tensor.py tests/gpu/test_cuda_prefill.py tests/gpu/test_torch_stream.py

bench: venv ## run the benchmarks; results go to out/bench/ as JSON
	@mkdir -p out/bench
	$(BIN)/pytest bench/ --benchmark-only --benchmark-json=out/bench/$$(date -u +%Y%m%dT%H%M%SZ).json

gpu-check: venv ## is d3rt right on this GPU? a verdict and a report in out/gpu/ (5 minutes)
	@$(BIN)/python bench/gpu_check.py

gpu-bench: venv ## time d3rt on this GPU beside others; a report in out/gpu/ (15 minutes)
	@$(BIN)/python bench/gpu.py

lint: .venv/.installed ## check style: ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))

format: .venv/.installed ## rewrite the sources in the style that lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

wheel: .venv/.installed ## build a wheel into dist/ and try it in a clean venv outside the repository
	@rm -rf dist build/lib* build/bdist*  # setuptools would pack modules deleted since
	@$(PIP) wheel -q --no-deps -w dist .
	@TORCH_INDEX="$(TORCH_INDEX)" PYTHON="$(BIN)/python" tests/check_wheel.sh dist/*.whl

clean: ## remove what was built; .venv stays (remove it by hand)
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks .venv/.built
	find d3rt -name '*.so' -delete
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
