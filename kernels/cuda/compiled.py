"""compile: a Launch to machine code for an architecture, with no GPU, no driver and no CUDA toolkit: Triton brings its
own ptxas. Triton keeps what it compiled in its cache (TRITON_CACHE_DIR), so a second time costs milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from d3rt.kernels.cuda.launch import ALIGNMENT, Launch


@dataclass(frozen=True)
class Compiled:
    """name: of the entry in ptx and cubin. shared: bytes of shared memory of a block. parameters: names of the pointers
    in order; after them the compiled kernel has hidden ones (Triton's scratch), for which null will do: a kernel that
    wanted any is refused here."""

    name: str
    ptx: str
    cubin: bytes
    shared: int
    warps: int
    parameters: tuple[str, ...]


def compile(launch: Launch, arch: int) -> Compiled:
    """The kernel of `launch` for sm_<arch>."""
    kernel = launch.kernel
    source = ASTSource(
        fn=kernel,
        signature=launch.signature(),
        constexprs={(kernel.arg_names.index(name),): value for name, value in launch.constants.items()},
        attrs={
            (kernel.arg_names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in launch.aligned()
        },
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    wanted = made.metadata.global_scratch_size, made.metadata.profile_scratch_size
    if any(wanted):
        raise ValueError(
            f"{launch.op}: Triton asks for {wanted} bytes of scratch memory, and none is provided."
        )
    return Compiled(
        made.metadata.name,
        made.asm["ptx"],
        made.asm["cubin"],
        made.metadata.shared,
        launch.warps,
        tuple(launch.arguments),
    )
