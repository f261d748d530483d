"""The exceptions d3rt raises on purpose.

One base class, so that `except D3rtError` catches all of them, and a builtin as second parent, so that a
caller who does not know d3rt catches the kind that fits. What a message says is up to whoever raises it: the
value, the rule it breaks, the way out.
"""


class D3rtError(Exception):
    """Base of every error d3rt raises on purpose."""


class PolicyError(D3rtError, ValueError):
    """A policy, layer set, plan or schedule that cannot be, or that does not fit the model."""


class UnsupportedModelError(D3rtError, ValueError):
    """A model whose architecture or configuration d3rt does not implement."""


class UnsupportedOptionError(D3rtError, ValueError):
    """An option d3rt does not implement, or a value of it that it does not know."""


class BackendUnavailableError(D3rtError, RuntimeError):
    """A backend that this machine or this installation lacks."""


class ModelNotFoundError(D3rtError, OSError):
    """A model that is at no place where it was looked for."""


class SaveError(D3rtError, OSError):
    """A runtime that cannot be written where it was asked to."""


class HoleError(D3rtError, RuntimeError):
    """A K,V hole would be read: attention would run where K,V was never written."""


class ForeignBufferError(D3rtError, ValueError):
    """A step was to be recorded on memory that is not the runtime's own."""


class NotFiniteError(D3rtError, ArithmeticError):
    """Logits with NaN, or without any finite value: there is no token to choose."""


class CudaError(D3rtError, RuntimeError):
    """A call of the CUDA driver failed. After some errors, an illegal address for one, every later call fails too."""
