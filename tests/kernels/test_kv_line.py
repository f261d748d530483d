"""kernels/kv_line.py: what an int8 line of the K,V cache holds. Written out by hand where it can be."""

import struct

import pytest
import torch

from d3rt.kernels import kv_line, reference


def test_a_line_is_codes_and_then_the_bytes_of_the_scale():
    line = kv_line.encode(torch.tensor([127.0, -254.0, 1.0, 3.0, 0.0]))
    # scale 2: 63.5 and 0.5 and 1.5 lie in the middle, and go to the even neighbour
    assert line[:5].tolist() == [64, -127, 0, 2, 0]
    assert bytes(line[5:].view(torch.uint8).tolist()) == struct.pack("<f", 2.0)
    assert kv_line.decode(line).tolist() == [128.0, -254.0, 0.0, 4.0, 0.0]


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 5, 64)])
def test_what_comes_back_is_off_by_half_a_step_at_most(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    lines = kv_line.encode(values)
    assert lines.shape == (*shape[:-1], kv_line.width(shape[-1], torch.int8)) and lines.dtype == torch.int8
    step = values.abs().amax(-1, keepdim=True) / 127
    # 1e-5: roundings of 127 / largest and of the product, at most 127 steps of 2^-23 each
    assert ((kv_line.decode(lines) - values).abs() <= step * (0.5 + 127 * 1e-6)).all()


def test_lines_are_read_wherever_they_lie():
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
    lines = kv_line.encode(values)
    for start in range(4):
        larger = torch.full((start + lines.numel(),), kv_line.POISON, dtype=torch.int8)
        larger[start:] = lines.flatten()
        assert torch.equal(kv_line.decode(larger[start:].view(lines.shape)), kv_line.decode(lines))
    assert torch.equal(kv_line.decode(lines[:, 1:2]), kv_line.decode(lines)[:, 1:2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_own_line_and_no_other(bad):
    values = torch.ones(3, 4)
    values[1, 2] = bad
    lines = kv_line.encode(values)
    assert kv_line.decode(lines)[1].isnan().all() and not lines[1, :4].any()
    assert torch.equal(kv_line.decode(lines)[[0, 2]], torch.ones(2, 4))


def test_zeros_and_what_is_next_to_nothing_are_zero():
    for values in (torch.zeros(2, 6), torch.full((2, 6), 1e-38)):
        assert torch.equal(kv_line.decode(kv_line.encode(values)), torch.zeros(2, 6))


def test_a_poisoned_line_is_nan():
    assert kv_line.decode(torch.full((2, 3, 9), kv_line.POISON, dtype=torch.int8)).isnan().all()


def test_a_cache_of_floats_keeps_its_lines_as_they_are():
    values = torch.randn(2, 6)
    assert kv_line.width(6, torch.bfloat16) == 6
    assert torch.equal(kv_line.kept_as(values, torch.bfloat16), values.bfloat16())
    assert torch.equal(kv_line.read(values.bfloat16()), values.bfloat16().float())


def test_attention_reads_what_the_lines_stand_for():
    generator = torch.Generator().manual_seed(3)
    k, v = (kv_line.encode(torch.randn(2, 2, 9, 7, generator=generator)) for _ in range(2))
    q, pos = torch.randn(2, 4, 7, generator=generator), torch.tensor([8, 3], dtype=torch.int32)
    of_lines, of_floats = torch.empty_like(q), torch.empty_like(q)
    reference.attention(of_lines, q, k, v, pos, 0.4, 5)
    reference.attention(of_floats, q, kv_line.decode(k), kv_line.decode(v), pos, 0.4, 5)
    assert torch.equal(of_lines, of_floats)
