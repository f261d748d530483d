"""The extension module d3rt._C: the only file that imports it, on first use."""

from __future__ import annotations

from typing import Any

from d3rt.errors import BackendUnavailableError


def native(backend: str = "cpu") -> Any:
    """d3rt._C for that backend; BackendUnavailableError says how to build it when it is missing."""
    try:
        from d3rt import _C
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend {backend!r}: the extension d3rt._C does not load ({error}); build it with 'pip install -e .'; "
            "available here: reference."
        ) from error
    return _C
