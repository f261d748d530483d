"""The PTX interpreter on kernels of a few lines, written by hand: that it computes, and refuses by name what a kernel
must not do. What it says of Triton's kernels: test_ptx_ops.py and test_ptx_mutations.py."""

import pytest
import torch
from ptx import errors
from ptx.machine import Machine
from ptx.memory import Memory
from ptx.program import parse


def kernel(body: str, threads: int = 64) -> str:
    """Of two pointers, %rd1 and %rd2, with thread, block and 4 * thread in %r1, %r2, %r3."""
    return f"""
.version 8.0
.target sm_80
.visible .entry hand(
	.param .u64 .ptr .global .align 1 hand_param_0,
	.param .u64 .ptr .global .align 1 hand_param_1
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<30>;
	.reg .b64 	%rd<30>;
	ld.param.b64 	%rd1, [hand_param_0];
	ld.param.b64 	%rd2, [hand_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	shl.b32 	%r3, %r1, 2;
	{body}
	ret;
}}
"""


def run(
    body: str, source: torch.Tensor, target: torch.Tensor, *, blocks=1, waves=None, shared=256
) -> Machine:
    memory = Memory({"source": source, "target": target})
    addresses = [source.data_ptr(), target.data_ptr()]
    return Machine(parse(kernel(body)), memory, addresses, (blocks, 1, 1), shared).run(waves)


def ints(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int32)


OWN = "mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;"
LOAD, STORE = "ld.global.b32 %r10, [ %rd4 + 0 ];", "st.global.b32 [ %rd5 + 0 ], %r10;"
KEEP, FETCH = "st.shared.b32 [ %r3 + 0 ], %r10;", "ld.shared.b32 %r10, [ %r12 + 0 ];"
REVERSED = "xor.b32 %r12, %r3, 252;"  # 4 * the thread on the other side of the block


def test_each_thread_copies_its_element():
    target = torch.zeros(64, dtype=torch.int32)
    run(f"{OWN} {LOAD} {STORE}", ints(64), target)
    assert torch.equal(target, ints(64))


def test_threads_that_part_meet_again():
    """Odd threads jump over an addition; all then take part in a shuffle."""
    body = f"""{OWN} {LOAD}
	and.b32 	%r11, %r1, 1;
	setp.ne.b32 	%p1, %r11, 0;
	@%p1 bra 	$over;
	add.s32 	%r10, %r10, 100;
$over:
	shfl.sync.bfly.b32 	%r10, %r10, 1, 31, -1;
	{STORE}"""
    target = torch.zeros(64, dtype=torch.int32)
    run(body, ints(64), target)
    assert target.tolist() == [i ^ 1 if i % 2 == 0 else (i ^ 1) + 100 for i in range(64)]


def test_a_block_passes_values_through_shared_memory():
    target = torch.zeros(64, dtype=torch.int32)
    run(f"{OWN} {LOAD} {KEEP} bar.sync 0; {REVERSED} {FETCH} {STORE}", ints(64), target)
    assert torch.equal(target, ints(64).flip(0))


@pytest.mark.parametrize("used, junk", [("%rs2, _", 0), ("_, %rs2", 0x7FFF)], ids=["other half", "that half"])
def test_a_half_that_no_instruction_writes_may_be_packed_but_shows_where_it_is_used(used, junk):
    """As ptxas may be given it: the compiler packs what it knows nobody looks at."""
    body = f"""{OWN}
	mov.b16 	%rs1, 0;
	mov.b32 	%r4, {{%rs1, %rs8}};
	mov.b32 	{{{used}}}, %r4;
	cvt.u32.u16 	%r10, %rs2;
	{STORE}"""
    target = torch.ones(64, dtype=torch.int32)
    run(body, ints(64), target)
    assert target.tolist() == [junk] * 64


@pytest.mark.parametrize(
    "body, error",
    [
        (f"{OWN} {LOAD} {KEEP} {REVERSED} {FETCH} {STORE}", errors.Race),  # no barrier
        (f"{OWN} ld.global.b32 %r10, [ %rd4 + 4 ];", errors.OutOfBounds),
        (f"{OWN} ld.global.b32 %r10, [ %rd4 + -4 ];", errors.OutOfBounds),
        (f"{OWN} {LOAD} st.shared.b32 [ %r3 + 4 ], %r10;", errors.OutOfBounds),
        (f"{OWN} add.s64 %rd4, %rd4, 2; {LOAD}", errors.Misaligned),
        (f"{OWN} ld.global.v4.b32 {{ %r10, %r11, %r12, %r13 }}, [ %rd1 + 4 ];", errors.Misaligned),
        (f"{OWN} ld.shared.b32 %r10, [ %r3 + 0 ]; {STORE}", errors.UnsetValue),
        (f"{OWN} {STORE}", errors.UnsetValue),
        (f"{OWN} ld.shared.b32 %r10, [ %r3 + 0 ]; setp.eq.b32 %p1, %r10, 0; @%p1 {STORE}", errors.UnsetValue),
        ("setp.lt.s32 %p1, %r1, 32; mov.b32 %r10, 0; @%p1 bar.sync 0;", errors.PartialBarrier),
        (
            "setp.lt.s32 %p1, %r1, 16; mov.b32 %r10, 0; @%p1 shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;",
            errors.DivergedWarp,
        ),
        (f"{OWN} {LOAD} st.global.b32 [ %rd2 + 0 ], %r10; ld.global.b32 %r11, [ %rd2 + 0 ];", errors.Race),
        ("sin.approx.f32 %r10, %r11;", errors.UnknownInstruction),
    ],
)
def test_what_a_kernel_must_not_do_is_refused(body, error):
    with pytest.raises(error):
        run(body, ints(64), torch.zeros(64, dtype=torch.int32))


def test_an_endless_loop_ends(monkeypatch):
    monkeypatch.setattr("ptx.machine._MOST_INSTRUCTIONS", 1000)
    with pytest.raises(errors.Endless):
        run("\n$again:\n\tbra $again;", ints(1), ints(1))


def test_a_launch_with_too_few_arguments_is_refused():
    with pytest.raises(errors.WrongArguments, match="1 arguments for 2 parameters"):
        Machine(parse(kernel("")), Memory({}), [0], (1, 1, 1), 0)


# -- between blocks ----------------------------------------------------------------------------------------------------

FIRST = "setp.eq.b32 %p1, %r2, {block};"  # of the blocks


@pytest.mark.parametrize("waves", [[[0, 1]], [[0], [1]], [[1], [0]]], ids=str)
def test_a_block_must_not_read_what_another_writes(waves):
    body = f"{OWN} {LOAD} {FIRST.format(block=0)} @%p1 {STORE} @!%p1 ld.global.b32 %r11, [ %rd5 + 0 ];"
    with pytest.raises(errors.Race):
        run(body, ints(64), torch.zeros(64, dtype=torch.int32), blocks=2, waves=waves)


@pytest.mark.parametrize("waves", [[[0, 1]], [[1, 0]], [[0], [1]]], ids=str)
def test_a_write_after_reads_of_another_block_is_refused_whoever_read_last(waves):
    """Both blocks read the first element; then, after a barrier, which orders only its own reads, block 1 writes it."""
    body = f"{OWN} ld.global.b32 %r10, [ %rd1 + 0 ]; bar.sync 0; {FIRST.format(block=1)}"
    with pytest.raises(errors.Race, match="write after unordered read"):
        run(f"{body} @%p1 st.global.b32 [ %rd1 + 0 ], %r2;", ints(64), ints(64), blocks=2, waves=waves)


@pytest.mark.parametrize("semantics", ["acq_rel", "relaxed"])
def test_an_atomic_hands_over_only_with_release_and_acquire(semantics):
    """Block 0 writes and arrives; block 1 arrives later and reads."""
    arrive = f"setp.eq.b32 %p2, %r1, 0; @%p2 atom.global.gpu.{semantics}.add.u32 %r15, [ %rd1 + 0 ], 1;"
    body = f"""mul.wide.u32 %rd3, %r1, 4; add.s64 %rd5, %rd2, %rd3; mov.b32 %r10, 7;
	{FIRST.format(block=0)} @%p1 {STORE} bar.sync 0; {arrive} bar.sync 0;
	@!%p1 ld.global.b32 %r11, [ %rd5 + 0 ];"""
    counter, target = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    if semantics == "relaxed":
        with pytest.raises(errors.Race):
            run(body, counter, target, blocks=2, waves=[[0], [1]])
    else:
        run(body, counter, target, blocks=2, waves=[[0], [1]])
        assert counter.item() == 2 and target.tolist() == [7] * 64
