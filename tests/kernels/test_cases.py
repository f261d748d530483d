"""kernels/cases.py says what it claims: complete lists, poison where nothing may be read, bytes that add up."""

import pytest
import torch

from d3rt.kernels import cases, kv_line

TESTED = [
    case
    for op in cases.ALL_OPS
    for case in (*cases.TEST_CASES[op], *cases.INT8_CACHE_CASES.get(op, ()), *cases.LINE_CASES.get(op, ()))
]


def test_every_op_has_cases_in_both_tables_under_names_of_their_own():
    for table in (cases.TEST_CASES, cases.TIMED_CASES, cases.INT8_CACHE_CASES):
        touching_cache = {"norm_qkv_rope", "attention", "kv_fill"}
        assert set(table) == (touching_cache if table is cases.INT8_CACHE_CASES else set(cases.ALL_OPS))
        names = [str(case) for listed in table.values() for case in listed]
        assert len(set(names)) == len(names)
        assert all(case.op == op for op, listed in table.items() for case in listed)


def test_the_awkward_sizes_are_there():
    attention = cases.TEST_CASES["attention"]
    assert {case.H // case.G for case in attention} >= {1, 3, 9, 16}
    assert {case.d for case in attention} >= {2, 6, 64, 80, 128}
    assert {0, 1} <= {case.window for case in attention}
    int8 = [case for listed in cases.INT8_CACHE_CASES.values() for case in listed]
    assert all(case.int8_cache for case in int8) and {case.d for case in int8} >= {1, 2, 6, 7, 67, 128}
    for op in ("norm_qkv_rope", "proj_add", "norm_gate_up", "kv_fill", "norm_logits"):
        listed = cases.TEST_CASES[op]
        inputs = [case.K or case.D for case in listed]
        assert any(n % 16 for n in inputs) and any(n % 8 for n in inputs) and any(n % 4 for n in inputs)
        assert {1, 16} & {case.B for case in listed} and any(case.row_gap for case in listed)
        assert {case.dtype for case in listed} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("case", TESTED, ids=str)
def test_bytes_moved_counts_every_tensor_once(case):
    """By adding up the arguments: whole tensors, but of tables and caches only the rows that are touched."""
    arguments = cases.make(case)
    expected = 0
    for name, tensor in cases.tensors(arguments):
        size = tensor.element_size()
        if name in ("token", "pos", "lines"):
            continue  # a few bytes of index, left out
        if name == "table":
            expected += case.B * case.D * size
        elif name in ("cos", "sin"):
            expected += case.B * case.d // 2 * size
        elif name.endswith("_cache") and case.op == "attention":
            lines = sum(min(p + 1, case.window or p + 1) for p in case.pos)
            expected += lines * case.G * tensor.shape[-1] * size
        elif name == "hidden":
            expected += case.B * case.D * size
        elif name.endswith("_cache"):
            expected += case.B * case.G * tensor.shape[-1] * size
        else:
            twice = case.op == "proj_add" and name == "x"  # read and written
            expected += tensor.numel() * size * (1 + twice)
    assert cases.bytes_moved(case) == expected


def test_the_timed_cases_are_published_models():
    by_name = {shape.name: shape for shape in cases.MODEL_SHAPES}
    small = by_name["SmolLM2-135M"]
    assert (small.D, small.H, small.G, small.d, small.F, small.V) == (576, 9, 3, 64, 1536, 49152)
    gate_up = next(c for c in cases.TIMED_CASES["norm_gate_up"] if c.name == "Llama-2-7B" and c.B == 1)
    assert cases.bytes_moved(gate_up) == 2 * 11008 * 4096 * 4 + 4096 * 4 * 2 + 11008 * 4


def test_the_same_seed_makes_the_same_tensors():
    for case in TESTED[::9]:
        first, again, other = cases.make(case, 3), cases.make(case, 3, slack=2), cases.make(case, 4)
        pairs = zip(cases.tensors(first), cases.tensors(again), strict=True)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for (_, a), (_, b) in pairs)
        pairs = zip(cases.tensors(first), cases.tensors(other), strict=True)
        assert any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for (_, a), (_, b) in pairs)


def test_an_int8_cache_holds_nan_where_nothing_may_be_read():
    sizes = dict(B=2, H=2, G=1, d=7, S=9, pos=(5, 8), window=3, int8_cache=True)
    arguments = cases.make(cases.Case("attention", "direct", torch.float32, **sizes))
    for name in ("k_cache", "v_cache"):
        assert arguments[name].shape == (2, 1, 9, 11) and arguments[name].dtype == torch.int8
        readable = kv_line.decode(arguments[name]).isfinite().all(-1)[:, 0]
        assert readable.nonzero().tolist() == [[0, 3], [0, 4], [0, 5], [1, 6], [1, 7], [1, 8]]


def test_a_case_whose_positions_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 positions in 0..4"):
        cases.Case("attention", "wrong", torch.float32, B=2, H=1, G=1, d=2, S=5, pos=(1,))
    with pytest.raises(ValueError, match="0..4"):
        cases.Case("attention", "wrong", torch.float32, H=1, G=1, d=2, S=5, pos=(5,))
