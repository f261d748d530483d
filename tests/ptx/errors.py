"""What a kernel can do wrong, one exception each. All are PtxError."""


class PtxError(Exception):
    """Anything that is wrong with a kernel, or with how it was launched."""


class UnknownInstruction(PtxError):
    """The interpreter does not know it. That may be no fault of the kernel's."""


class WrongArguments(PtxError):
    """A launch does not fit the kernel's parameters."""


class OutOfBounds(PtxError):
    """An access outside every registered buffer, or outside the block's shared memory."""


class Misaligned(PtxError):
    """An address that is no multiple of the access's size."""


class UnsetValue(PtxError):
    """Something that was never written decides an address, a branch, or what is stored to global memory."""


class PartialBarrier(PtxError):
    """A barrier that some threads of a block reach and others do not."""


class DivergedWarp(PtxError):
    """An instruction for a whole warp that only some of its threads reach."""


class Race(PtxError):
    """Two accesses to the same bytes by different warps, one of them a write, with nothing that orders them."""


class Endless(PtxError):
    """More instructions than any launch of the tests needs."""
