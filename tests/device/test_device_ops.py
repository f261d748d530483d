"""Every Triton kernel on the device, launched one by one, against its definition on the CPU: the shared cases, every
type that the device has, packed weights; and that it writes nothing but what is its own."""

import random
from dataclasses import replace

import native_ops
import packed_cases
import pytest
import torch

from d3rt.backends.reference import choose
from d3rt.errors import NotFiniteError
from d3rt.kernels import cases
from d3rt.kernels.packing import PackedMatrix
from d3rt.kernels.reference import FillLayer
from d3rt.sampling import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
FLOAT32 = [case for op in cases.OPS for case in cases.TEST_CASES[op] if case.dtype == torch.float32]


def moved(value, device: str):
    """The argument on the device: tensors with the whole storage around them, so that slack goes along."""
    if isinstance(value, torch.Tensor):
        whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device, copy=True)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, PackedMatrix):
        parts = (moved(part, device) for part in (value.data, value.scales, value.minima))
        return PackedMatrix(value.format, value.rows, value.cols, *parts)
    if isinstance(value, list):
        return [FillLayer(*(moved(part, device) for part in layer)) for layer in value]
    return value


def run(ops, case, arguments, device) -> dict:
    """The op on the device; its arguments as they are afterwards, on the CPU."""
    there = {name: moved(value, device) for name, value in arguments.items()}
    cases.call(ops, case, there)
    return {name: moved(value, "cpu") for name, value in there.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: f"{case.op}-{case.name}-B{case.B}")
def test_does_what_the_reference_says_and_writes_nothing_else(case, dtype, ops, arch, device):
    from triton_bounds import allowed

    if dtype == torch.bfloat16 and arch < 80:
        pytest.skip(f"sm_{arch} has no bfloat16")
    case = replace(case, dtype=dtype)
    # 8 elements leave tensors aligned for the widest loads, as a model's are; 5 do not, which is another kernel.
    arguments = cases.make(case, slack=5 if dtype == torch.float32 else 8)
    after = run(ops, case, arguments, device)
    outputs = cases.outputs(case, after)
    native_ops.assert_close(case, outputs, allowed=allowed(case, arch))
    before = dict(cases.tensors(arguments))
    for name, tensor in cases.tensors(after):
        changed = native_ops.storage_bits(tensor) != native_ops.storage_bits(before[name])
        if name in outputs:
            changed &= ~native_ops.owned_bits(case, name, tensor)
        assert not changed.any(), f"{name}: {int(changed.sum())} elements changed that are not the op's"


@pytest.mark.parametrize("format", packed_cases.WIDTHS)
@pytest.mark.parametrize("case", packed_cases.CASES, ids=str)
def test_packed_weights_are_multiplied_as_their_dequantised_values(case, format, ops, device):
    from triton_bounds import widened

    arguments = packed_cases.packed_arguments(case, format)
    float_arguments = widened(arguments)
    right = native_ops.exact_of(case, float_arguments)
    bounds = native_ops.bounds_of(case, float_arguments, right)
    after = run(ops, case, arguments, device)
    native_ops.assert_close(case, packed_cases.outputs(case, after), right, bounds)


@pytest.mark.parametrize("seed", range(12))
def test_a_draw_is_the_references(seed, ops, device):
    from d3rt.kernels.cuda.plans import sampling_settings

    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    vocab = rng.choice([7, 300, 5000, 50000])
    params = SamplingParams(
        do_sample=seed > 0,
        temperature=rng.uniform(0.2, 2.0),
        top_k=rng.choice([0, 1, rng.randint(1, 60)]),
        top_p=rng.choice([1.0, rng.uniform(0.01, 0.999)]),
        min_p=rng.choice([0.0, rng.uniform(0.001, 0.7)]),
        seed=rng.getrandbits(64),
    )
    logits = rng.choice([0.3, 2.0, 8.0]) * torch.randn(3, vocab, generator=generator)
    step = rng.getrandbits(20)
    token = torch.full((3,), -7, dtype=torch.int32, device=device)
    ops.sample(
        token,
        logits.to(device),
        sampling_settings(params).to(device),
        torch.tensor([step], dtype=torch.int32, device=device),
        None,
        params.do_sample,
    )
    assert token.tolist() == [choose(row, params, set(), step, slot) for slot, row in enumerate(logits)]


def test_logits_without_an_answer_give_a_token_that_says_so(ops, device):
    from d3rt.kernels.cuda.plans import sampling_settings

    logits = torch.zeros(2, 33)
    logits[1, 20] = torch.nan
    with pytest.raises(NotFiniteError):
        choose(logits[1], SamplingParams(), set(), 0, 1)
    token = torch.full((2,), -7, dtype=torch.int32, device=device)
    step = torch.zeros(1, dtype=torch.int32, device=device)
    ops.sample(token, logits.to(device), sampling_settings(SamplingParams()).to(device), step, None, False)
    assert token.tolist() == [0, -1]
