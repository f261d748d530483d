"""What a Tape records and what it refuses: foreign memory, wrong shapes by name, and indices that run out of range."""

import gc
import math
import weakref

import native_ops
import pytest
import torch

from d3rt import _C
from d3rt.errors import ForeignBufferError
from d3rt.kernels import cases, reference

F32, BF16 = torch.float32, torch.bfloat16
BY_OP = {
    "embed": cases.Case("embed", "direct", F32, B=2, D=10, V=7),
    "norm_qkv_rope": cases.Case(
        "norm_qkv_rope",
        "direct",
        F32,
        B=2,
        D=10,
        H=4,
        G=2,
        d=6,
        S=5,
        pos=(4, 0),
        bias=True,
        head_norm=True,
    ),
    "attention": cases.Case("attention", "direct", F32, B=2, H=4, G=2, d=6, S=5, pos=(4, 0)),
    "proj_add": cases.Case("proj_add", "direct", F32, B=2, D=10, K=12, bias=True),
    "norm_gate_up": cases.Case("norm_gate_up", "direct", F32, B=2, D=10, F=14, bias=True),
    "kv_fill": cases.Case(
        "kv_fill", "direct", F32, B=2, D=10, G=2, d=6, S=5, pos=(4, 0), layers=2, bias=True, head_norm=True
    ),
    "norm_logits": cases.Case("norm_logits", "direct", F32, B=2, D=10, V=7),
    "copy_hidden": cases.Case("copy_hidden", "direct", F32, B=2, D=10),
    "hidden_cosine": cases.Case("hidden_cosine", "direct", F32, B=2, D=10),
    "top2_margin": cases.Case("top2_margin", "direct", F32, B=2, V=7),
}
# The name csrc gives to all biases of an op.
SAID = {name: "bias" for name in ("bq", "bk", "bv", "b_gate", "b_up")}


def replaced(arguments, name, tensor):
    """The arguments with another tensor under `name`, which may be "layers[1].wk"."""
    if not name.startswith("layers"):
        return arguments | {name: tensor}
    index, part = int(name[7 : name.index("]")]), name.split(".")[1]
    layers = list(arguments["layers"])
    layers[index] = layers[index]._replace(**{part: tensor})
    return arguments | {"layers": layers}


def every_buffer():
    for op, case in BY_OP.items():
        for name, _ in cases.tensors(cases.make(case)):
            yield pytest.param(op, name, id=f"{op}-{name}")


each_buffer = pytest.mark.parametrize("op, name", list(every_buffer()))


def record(case, arguments, owned=None):
    """Records without a replay. The arena owns the arguments, or only those in `owned`."""
    tensors = [tensor for _, tensor in cases.tensors(arguments)] if owned is None else owned
    tape = native_ops.new_tape(native_ops.arena_of(*tensors))
    cases.call(tape, case, arguments)
    return tape


@each_buffer
def test_memory_that_the_arena_does_not_own_is_refused(op, name):
    case = BY_OP[op]
    arguments = cases.make(case)
    owned = [tensor for other, tensor in cases.tensors(arguments) if other != name]
    part = name.split(".")[-1]
    with pytest.raises(ForeignBufferError, match=rf"{op}: {SAID.get(part, part)} \("):
        record(case, arguments, owned)


@each_buffer
def test_a_wrong_dtype_is_refused(op, name):
    case = BY_OP[op]
    arguments = cases.make(case)
    tensor = dict(cases.tensors(arguments))[name]
    other = torch.int32 if tensor.is_floating_point() else F32
    with pytest.raises(ValueError, match=f"^{op}: .*int32|^{op}: .*float32"):
        record(case, replaced(arguments, name, tensor.to(other)))
    with pytest.raises(ValueError, match="torch.float64"):
        record(case, replaced(arguments, name, tensor.double()))
    with pytest.raises(ValueError, match="torch.int64"):
        record(case, replaced(arguments, name, tensor.nan_to_num().long()))


@each_buffer
def test_a_wrong_shape_is_refused_in_every_dimension(op, name):
    case = BY_OP[op]
    arguments = cases.make(case)
    tensor = dict(cases.tensors(arguments))[name]
    for dim in range(tensor.dim()):
        if (name, dim) in {("cos", 0), ("sin", 0), ("table", 0)}:
            continue  # any number of rows; that sin has as many as cos is tested below
        if (op, name, dim) == ("top2_margin", "logits", 1):
            continue  # any number of tokens
        for longer in (1, -1):
            sizes = list(tensor.shape)
            sizes[dim] += longer
            with pytest.raises(ValueError, match=f"^{op}: "):
                record(case, replaced(arguments, name, tensor.new_zeros(sizes)))
    with pytest.raises(ValueError, match=f"^{op}: |5 dimensions: at most 4"):
        record(case, replaced(arguments, name, tensor.new_zeros(*tensor.shape, 1)))


def test_cos_and_sin_have_as_many_rows_as_each_other_and_may_be_shorter_than_the_cache():
    case = BY_OP["norm_qkv_rope"]
    arguments = cases.make(case)
    shorter = {name: arguments[name][:3].clone() for name in ("cos", "sin")}
    with pytest.raises(ValueError, match=r"sin is float32 \[5, 3\], but must be float32 \[3, 3\]"):
        record(case, arguments | {"cos": shorter["cos"]})
    tape = record(case, arguments | shorter)
    with pytest.raises(ValueError, match=r"pos\[0\] is 4, but must be in 0..2"):
        tape.replay()


@each_buffer
def test_gaps_inside_a_row_are_refused(op, name):
    case = BY_OP[op]
    arguments = cases.make(case)
    tensor = dict(cases.tensors(arguments))[name]
    gapped = tensor.repeat_interleave(2, dim=-1)[..., ::2]
    assert gapped.shape == tensor.shape
    with pytest.raises(ValueError, match=f"^{op}: .*contiguous|^{op}: .*same strides"):
        record(case, replaced(arguments, name, gapped))


@pytest.mark.parametrize("op, name", [("proj_add", "x"), ("norm_logits", "logits"), ("attention", "q")])
def test_gaps_between_rows_of_an_activation_are_refused(op, name):
    case = BY_OP[op]
    arguments = cases.make(case)
    tensor = arguments[name]
    gapped = torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]
    with pytest.raises(ValueError, match=f"{op}: {name} .*must be contiguous"):
        record(case, arguments | {name: gapped})


def test_a_refusal_names_op_buffer_and_both_shapes():
    case = BY_OP["proj_add"]
    arguments = cases.make(case)
    with pytest.raises(
        ValueError, match=r"^proj_add: w is float32 \[12, 10\], but must be float32 \[10, 12\]$"
    ):
        record(case, arguments | {"w": arguments["w"].T.contiguous()})
    with pytest.raises(ValueError, match=r"^proj_add: w is missing"):
        record(case, arguments | {"w": None})


def test_keys_and_values_have_one_dtype_and_layout():
    case = BY_OP["attention"]
    arguments = cases.make(case)
    with pytest.raises(ValueError, match=r"v_cache is bfloat16 \[2, 2, 5, 6\], but must be float32"):
        record(case, arguments | {"v_cache": arguments["v_cache"].bfloat16()})
    transposed = arguments["v_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="must have the same strides"):
        record(case, arguments | {"v_cache": transposed})


def test_a_cache_laid_out_otherwise_is_fine_when_both_are():
    case = BY_OP["attention"]
    arguments = cases.make(case)
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    native_ops.run_native(case, arguments)
    native_ops.assert_close(case, cases.outputs(case, arguments))


@pytest.mark.parametrize("batch", [17, 33])
def test_more_slots_than_the_kernels_take_are_refused(batch):
    assert _C.max_batch == 16
    for op, sizes in {
        "embed": dict(D=4, V=3),
        "norm_qkv_rope": dict(D=4, H=1, G=1, d=2, S=1, pos=(0,) * batch),
        "attention": dict(H=1, G=1, d=2, S=1, pos=(0,) * batch),
        "proj_add": dict(D=4, K=4),
        "norm_gate_up": dict(D=4, F=4),
        "kv_fill": dict(D=4, G=1, d=2, S=1, pos=(0,) * batch, layers=1),
        "norm_logits": dict(D=4, V=3),
        "copy_hidden": dict(D=4),
        "hidden_cosine": dict(D=4),
        "top2_margin": dict(V=3),
    }.items():
        case = cases.Case(op, "direct", F32, B=batch, **sizes)
        with pytest.raises(ValueError, match=f"{op}: batch of {batch} slots; the kernels take 1 to 16"):
            record(case, cases.make(case))


def test_query_heads_must_divide_over_key_value_heads():
    case = cases.Case("attention", "direct", F32, H=3, G=2, d=4, S=2, pos=(0,))
    with pytest.raises(ValueError, match="attention: 3 query heads do not divide over 2 key-value heads"):
        record(case, cases.make(case))


def test_a_negative_window_and_an_odd_head_are_refused():
    case = BY_OP["attention"]
    with pytest.raises(ValueError, match="window=-1"):
        record(case, cases.make(case) | {"window": -1})
    odd = cases.Case("norm_qkv_rope", "direct", F32, D=4, H=1, G=1, d=3, S=2, pos=(0,))
    with pytest.raises(ValueError, match="head_dim 3 must be even"):
        record(odd, cases.make(odd))


def test_a_window_longer_than_the_cache_is_no_window():
    case = BY_OP["attention"]
    arguments = cases.make(case) | {"window": 2**40}
    native_ops.run_native(case, arguments)
    native_ops.assert_close(case, cases.outputs(case, arguments))


def test_kv_fill_of_no_layer_or_of_an_incomplete_one_is_refused():
    case = BY_OP["kv_fill"]
    arguments = cases.make(case)
    with pytest.raises(ValueError, match="no layer"):
        record(case, arguments | {"layers": []})
    short = tuple(arguments["layers"][0])[:7]
    tape = record(case, arguments)
    with pytest.raises(ValueError, match="a layer is"):
        tape.kv_fill(**(arguments | {"layers": [short]}))


def test_a_tensor_that_is_not_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="'meta'"):
        _C.Arena().add(torch.zeros(3, device="meta"))


def test_an_empty_tensor_is_refused():
    with pytest.raises(ValueError, match="empty"):
        _C.Arena().add(torch.zeros(0, 4))


def test_what_was_refused_is_not_recorded():
    case = BY_OP["proj_add"]
    arguments = cases.make(case)
    tape = record(case, arguments)
    for broken in ({"w": torch.zeros(3, 3)}, {"a": None}, {"x": torch.zeros(2, 10)}):
        with pytest.raises((ValueError, ForeignBufferError)):
            cases.call(tape, case, arguments | broken)
    assert tape.ops == ["proj_add"] and len(tape) == 1


# -- replay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", ["replay", "replay_after_torch"])
@pytest.mark.parametrize("op", ["embed", "norm_qkv_rope", "attention", "kv_fill"])
@pytest.mark.parametrize("bad", [-1, "limit", 2**31 - 1, -(2**31)])
def test_an_index_out_of_range_stops_the_replay_before_anything_is_written(op, bad, replay):
    case = BY_OP[op]
    index, limit = ("token", 7) if op == "embed" else ("pos", 5)
    bad = limit if bad == "limit" else bad
    arguments = cases.make(case)
    first = BY_OP["proj_add"]  # an op without a guard stands before: it must not run either
    earlier = cases.make(first)
    arena = native_ops.arena_of(
        *(tensor for made in (arguments, earlier) for _, tensor in cases.tensors(made))
    )
    tape = native_ops.new_tape(arena, threads=2)
    cases.call(tape, first, earlier)
    cases.call(tape, case, arguments)
    for slot in (0, 1):
        good = int(arguments[index][slot])
        arguments[index][slot] = bad
        everything = [tensor for made in (arguments, earlier) for _, tensor in cases.tensors(made)]
        before = [native_ops.storage_bits(tensor) for tensor in everything]
        with pytest.raises(
            ValueError, match=rf"{op}: {index}\[{slot}\] is {bad}, but must be in 0..{limit - 1}"
        ):
            getattr(tape, replay)()
        after = [native_ops.storage_bits(tensor) for tensor in everything]
        assert all(map(torch.equal, before, after))
        arguments[index][slot] = good
    getattr(tape, replay)()
    expected = cases.make(case)
    native_ops.run_native(case, expected)
    for name, tensor in cases.outputs(case, arguments).items():
        assert torch.equal(tensor, cases.outputs(case, expected)[name])


def test_token_and_pos_are_read_at_replay_not_at_record():
    case = cases.Case("attention", "direct", F32, H=2, G=1, d=4, S=9, pos=(8,))
    arguments = cases.make(case)
    tape = record(case, arguments)
    for last in (8, 0, 5):
        arguments["pos"][0] = last
        tape.replay()
        expected = arguments | {"out": torch.empty(1, 2, 4)}
        cases.call(reference, case, expected)
        torch.testing.assert_close(arguments["out"], expected["out"])


def test_a_tape_keeps_its_tensors_pool_and_arena_alive():
    case = cases.Case("norm_gate_up", "direct", BF16, B=3, D=300, F=200, bias=True)
    arguments = cases.make(case)
    h = arguments["h"]
    pool, arena = _C.ThreadPool(2), native_ops.arena_of(*(tensor for _, tensor in cases.tensors(arguments)))
    tape = _C.Tape(pool, arena)
    cases.call(tape, case, arguments)
    del arguments, arena, pool
    gc.collect()
    noise = [torch.full((300, 200), math.nan, dtype=BF16) for _ in range(50)]  # would take freed memory
    tape.replay()
    native_ops.assert_close(case, {"h": h})
    del noise


def test_a_dropped_tape_and_arena_let_the_tensors_go():
    case = BY_OP["proj_add"]
    arguments = cases.make(case)
    alive = weakref.ref(arguments["w"])
    tape = record(case, arguments)
    del arguments
    gc.collect()
    assert alive() is not None
    del tape
    gc.collect()
    assert alive() is None


def test_ops_run_in_the_order_they_were_recorded():
    names = ["embed", "proj_add", "norm_logits", "embed"]
    made = {name: cases.make(BY_OP[name]) for name in names}
    arena = native_ops.arena_of(*(tensor for each in made.values() for _, tensor in cases.tensors(each)))
    tape = native_ops.new_tape(arena)
    for name in names:
        cases.call(tape, BY_OP[name], made[name])
    assert tape.ops == names and len(tape) == 4
    _C.Tape(native_ops.pool(1), arena).replay()  # an empty tape does nothing

    x, one = torch.ones(1, 1), torch.ones(1, 1)
    doubling = native_ops.new_tape(native_ops.arena_of(x, one), threads=2)
    for _ in range(20):
        doubling.proj_add(x=x, a=x, w=one, bias=None)
    doubling.replay()
    assert x.item() == 2.0**20
    doubling.replay_after_torch()
    assert x.item() == 2.0**40


def test_a_part_of_an_owned_tensor_is_owned_and_a_larger_view_is_not():
    whole = torch.zeros(6, 10)
    arena = native_ops.arena_of(whole[1:5])
    assert arena.owns(whole[1:5]) and arena.owns(whole[2]) and arena.owns(whole[1:5, 3:4])
    assert not arena.owns(whole) and not arena.owns(whole[0]) and not arena.owns(whole[5])
    assert not arena.owns(torch.zeros(2))


def test_scratch_is_shared_by_the_tapes_of_an_arena():
    case = BY_OP["attention"]
    arguments = cases.make(case)
    arena = native_ops.arena_of(*(tensor for _, tensor in cases.tensors(arguments)))
    assert arena.scratch_bytes == 0
    for _ in range(3):
        cases.call(native_ops.new_tape(arena), case, arguments)
    assert arena.scratch_bytes == 2 * 4 * 1 * (6 + 2) * 4  # B, H, one chunk, d + 2 floats


@pytest.mark.parametrize("threads", [0, -1])
def test_a_pool_without_threads_is_refused(threads):
    with pytest.raises(ValueError, match=f"threads={threads}"):
        _C.ThreadPool(threads)
