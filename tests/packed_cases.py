"""Cases with int8 and int4 weights: what the tests of packed matrices share, natively and on Triton."""

import torch

from d3rt.kernels import cases, reference
from d3rt.kernels.cases import Case
from d3rt.kernels.packing import FORMATS, GROUP, PackedMatrix, pack_codes

F32 = torch.float32
WIDTHS = (*FORMATS, "int4 with minima")
RANGES = {"int8": (-127, 127), "int4": (0, 15)}
CASES = [
    Case("embed", "packed", F32, B=3, D=64, V=131),
    Case("norm_qkv_rope", "packed", F32, B=1, D=64, H=3, G=1, d=20, S=9, pos=(8,), bias=True),
    Case("norm_qkv_rope", "packed", F32, B=5, D=96, H=4, G=2, d=16, S=5, pos=(0, 1, 2, 3, 4), head_norm=True),
    Case("proj_add", "packed", F32, B=1, D=33, K=576, bias=True),
    Case("proj_add", "packed", F32, B=16, D=100, K=32),
    Case("norm_gate_up", "packed", F32, B=1, D=576, F=172),
    Case("norm_gate_up", "packed", F32, B=7, D=64, F=70, bias=True),
    Case("kv_fill", "packed", F32, B=2, D=64, G=3, d=6, S=4, pos=(3, 0), layers=3, bias=True),
    Case("norm_logits", "packed", F32, B=2, D=64, V=131),
]
WEIGHTS = ("table", "wq", "wk", "wv", "w", "w_gate", "w_up")


def random_packed(rows: int, cols: int, format: str) -> PackedMatrix:
    """Any codes, any scales: what a GGUF file may hold."""
    generator = torch.Generator().manual_seed(rows * cols)
    low, high = RANGES[format[:4]]
    codes = torch.randint(low, high + 1, (rows, cols), generator=generator)
    scales = torch.randn(rows, cols // GROUP, generator=generator).half() / cols**0.5
    minima = torch.randn(rows, cols // GROUP, generator=generator).half() if "minima" in format else None
    return pack_codes(format[:4], codes, scales, minima)


def packed_arguments(case: Case, format: str) -> dict:
    """The case's arguments with every weight packed."""

    def swap(name, value):
        return random_packed(*value.shape, format) if name in WEIGHTS else value

    arguments = {name: swap(name, value) for name, value in cases.make(case).items()}
    if "layers" in arguments:
        arguments["layers"] = [
            reference.FillLayer(**{name: swap(name, value) for name, value in layer._asdict().items()})
            for layer in arguments["layers"]
        ]
    return arguments


def parts(value):
    """Every tensor in a (nested) argument."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, PackedMatrix):
        yield from parts([value.data, value.scales, value.minima])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from parts(item)


def outputs(case: Case, arguments: dict) -> dict:
    plain = {
        name: [layer._replace(wk=layer.norm, wv=layer.norm) for layer in value] if name == "layers" else value
        for name, value in arguments.items()
    }
    return cases.outputs(case, plain)
