"""The GPUs that the roofline model knows: data sheet figures, and the share of the bandwidth that somebody measured.

Nothing here was measured with d3rt. Bandwidth, multiprocessors and TFLOPS are those of NVIDIA's data sheets (V100:
WP-08608, A100: nvidia-a100-datasheet, H100 SXM: h100-datasheet). Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from d3rt.errors import UnsupportedOptionError


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are per second, sizes in bytes."""

    name: str  # as `d3rt plan --gpu` takes it
    product: str
    arch: int  # 80 for sm_80
    multiprocessors: int
    memory: int
    bandwidth: float  # of the data sheet
    efficiency: float  # the share of it that long reads reach
    float32_flops: float  # of the data sheet, without tensor cores; a multiply-add is two

    @property
    def reached_bandwidth(self) -> float:
        """Bytes a second that a kernel can hope for."""
        return self.bandwidth * self.efficiency

    @property
    def has_bfloat16(self) -> bool:
        return self.arch >= 80


GPUS = {
    gpu.name: gpu
    for gpu in (
        # 790 of 900 GB/s: cudaMemcpy on the PCIe card, whose memory is the same (paranumal.com, "Rough-n-Ready
        # Roofline: NVIDIA V100 edition", 2018).
        Gpu("v100", "V100 SXM2 32GB", 70, 80, 32 * 2**30, 900e9, 0.88, 15.7e12),
        # 1818 of 2039 GB/s (github.com/openfabric-systems/simllm, pull request 109), 1.80 of 2.04 TB/s
        # (forums.developer.nvidia.com/t/339083); both on the 80GB card.
        Gpu("a100-40", "A100 SXM4 40GB", 80, 108, 40 * 2**30, 1555e9, 0.88, 19.5e12),
        Gpu("a100-80", "A100 SXM4 80GB", 80, 108, 80 * 2**30, 2039e9, 0.88, 19.5e12),
        # 2903 of 3350 GB/s, copied within the device (github.com/aigatech/vpbenchmarking).
        Gpu("h100", "H100 SXM5 80GB", 90, 132, 80 * 2**30, 3350e9, 0.867, 67e12),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`; UnsupportedOptionError lists those there are."""
    if name not in GPUS:
        raise UnsupportedOptionError(f"gpu={name!r}: choose one of {', '.join(GPUS)}.")
    return GPUS[name]


def closest(product: str, memory: int, arch: int) -> Gpu | None:
    """The entry for a device as the driver describes it ("NVIDIA A100-SXM4-80GB", bytes of memory, 80); None for one
    that is not in the table. A card of the same chip on PCIe has less bandwidth, and no entry."""
    if "PCIE" in product.upper():
        return None
    for gpu in GPUS.values():
        chip = gpu.product.split()[0]
        # the driver keeps some memory for itself, and 80GB cards have 79.x GiB
        if chip in product and gpu.arch == arch and abs(memory / gpu.memory - 1) < 0.1:
            return gpu
    return None
