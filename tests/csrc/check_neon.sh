#!/usr/bin/env bash
# Builds the C++ tests for aarch64 and runs them under QEMU, so that the NEON kernels are tested on any machine:
# on a processor without dot products and on one with them. Needs Debian's g++-aarch64-linux-gnu and
# qemu-user-static; exits with 77 when one of them is missing. The first argument, if any, names the tests to run,
# as for d3rt_csrc_tests.
#
# By hand rather than by CMake: no toolchain file, and the few flags are the ones of CMakeLists.txt.
set -euo pipefail

CXX=${AARCH64_CXX:-aarch64-linux-gnu-g++}
QEMU=${AARCH64_QEMU:-qemu-aarch64-static}
for tool in "$CXX" "$QEMU"; do
  if ! command -v "$tool" > /dev/null; then
    echo "skipped: no $tool (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)"
    exit 77
  fi
done

cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

objects=()
compile() { # compile OUTPUT SOURCE [FLAG...], in the background; without its object the link fails
  while [ "$(jobs -r | wc -l)" -ge "$(nproc)" ]; do wait -n || true; done
  "$CXX" -std=c++17 -O1 -Wall -Wextra -Werror -ffp-contract=fast -pthread -Icsrc -c "$2" -o "$build/$1.o" "${@:3}" &
  objects+=("$build/$1.o")
}
compile_isa() { # compile_isa NAME [FLAG...]
  compile "kernels_$1" csrc/cpu/kernels.cpp "-DD3RT_ISA=$1" "-DD3RT_ISA_$1" "${@:2}"
}
compile_isa scalar
compile_isa neon
compile_isa neon_dotprod -march=armv8.2-a+dotprod
for source in csrc/*.cpp csrc/cpu/isa.cpp csrc/cpu/empty.cpp tests/csrc/*.cpp; do
  [ "$source" = csrc/pack.cpp ] && contract=off || contract=fast  # as CMakeLists.txt has it
  case "$source" in
    csrc/bindings*.cpp | tests/csrc/test_cuda_*.cpp) ;;  # Python; the same on every processor
    *) compile "$(basename "$source" .cpp)" "$source" "-ffp-contract=$contract" ;;
  esac
done
wait
"$CXX" -static -pthread "${objects[@]}" -o "$build/d3rt_csrc_tests"

run() { # run PROCESSOR ISAS [TEST]: the tests run every ISA that they find, so these must be the ones found
  echo "$1"
  "$QEMU" -cpu "$1" "$build/d3rt_csrc_tests" "${@:3}" | tee "$build/output"
  if ! grep -qx "ISAs: $2" "$build/output"; then
    echo "$1: expected the ISAs $2"
    exit 1
  fi
}
run cortex-a53 "scalar neon" "$@"
run max "scalar neon neon_dotprod" "$@"
