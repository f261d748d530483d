"""What the tests on a real GPU share: which device, and why there is none.

Without a GPU every test here is skipped with the backend's own reason. D3RT_REHEARSE=1 runs them all the same, with the
cpu backend and Triton's interpreter in the GPU's place: so the tests themselves are tested where there is no GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from d3rt.backends import availability

HERE = Path(__file__).parent
REHEARSAL = os.environ.get("D3RT_REHEARSE") == "1"


def pytest_collection_modifyitems(items):
    mine = [item for item in items if HERE in item.path.parents]
    reason = None if REHEARSAL or not mine else availability()["cuda"].get("unavailable")
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def backend() -> str:
    return "cpu" if REHEARSAL else "cuda"


@pytest.fixture(scope="session")
def arch() -> int:
    """80 for sm_80."""
    if REHEARSAL:
        return 80
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@pytest.fixture(scope="session")
def ops(arch):
    """The Triton kernels, launched one by one on the device."""
    pytest.importorskip("triton", reason="triton is not installed")
    if REHEARSAL:
        from triton_interpreter import Interpreted

        return Interpreted(arch)
    from d3rt.kernels.cuda.eager import Eager

    return Eager(arch)


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if REHEARSAL else "cuda"
