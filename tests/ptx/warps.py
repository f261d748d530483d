"""Instructions of threads together: bar, shfl, redux, and what a warp does with matrices (matrices.py)."""

from __future__ import annotations

import re

import numpy as np

from ptx import matrices
from ptx.arithmetic import DTYPES
from ptx.errors import DivergedWarp, PartialBarrier
from ptx.operands import Operands
from ptx.program import Instruction

WARP = 32


def _whole_warps(mask, instruction: Instruction) -> None:
    if mask is not None:
        of_warp = mask.reshape(-1, WARP)
        if (of_warp.any(1) != of_warp.all(1)).any():
            raise DivergedWarp(str(instruction))


def barrier(operands: Operands, instruction: Instruction):
    if instruction.opcode != "bar.sync" or instruction.operands != ("0",):
        return None

    def execute(m, mask):
        blocks = m.wave
        if mask is not None:
            of_block = mask.reshape(len(m.wave), -1)
            if (of_block.any(1) != of_block.all(1)).any():
                raise PartialBarrier(str(instruction))
            blocks = blocks[of_block.all(1)]
        if m.clock is not None:
            m.clock.barrier(blocks)

    return execute


def shuffle(operands: Operands, instruction: Instruction):
    if instruction.parts[1] != "sync" or instruction.parts[3] != "b32" or len(instruction.operands) != 5:
        return None
    mode = instruction.parts[2]
    target, source, by, clamp, members = instruction.operands
    if mode not in ("bfly", "idx", "up", "down") or members not in ("-1", "0xffffffff"):
        return None
    put = operands.target(target, "b32")
    (get, get_by, get_clamp), (register, *_) = operands.sources((source, by, clamp), "b32")

    def execute(m, mask):
        _whole_warps(mask, instruction)
        lane = m.special["%laneid"]
        move, limit = get_by(m, mask).astype(np.int64) & 31, get_clamp(m, mask).astype(np.int64)
        segment, limit = (limit >> 8) & 31, limit & 31
        most = (lane & segment) | (limit & ~segment)
        if mode == "bfly":
            other = lane ^ move
        elif mode == "idx":
            other = (lane & segment) | (move & ~segment)
        else:
            other = lane - move if mode == "up" else lane + move
        inside = other >= most if mode == "up" else other <= most
        index = np.arange(m.count) - lane + np.where(inside, other, lane)
        unset = m.unset_of([register])
        put(m, m.all_lanes(get(m, mask))[index], mask, None if unset is None else m.all_lanes(unset)[index])

    return execute


def reduce(operands: Operands, instruction: Instruction):
    """redux.sync, by all of the warp"""
    operation = {"add": np.add, "min": np.minimum, "max": np.maximum}.get(instruction.parts[2])
    kind = instruction.parts[3]
    if operation is None or kind not in ("s32", "u32"):
        return None
    target, source, members = instruction.operands
    put = operands.target(target, kind)
    get, register = operands.source(source, kind)
    get_members, _ = operands.source(members, "b32")

    def execute(m, mask):
        _whole_warps(mask, instruction)
        if (m.all_lanes(get_members(m, mask))[m.threads_of(mask)] != 0xFFFFFFFF).any():
            raise DivergedWarp(f"not all threads of a warp are members: {instruction}")
        values = operation.reduce(m.all_lanes(get(m, mask)).reshape(-1, WARP), axis=1)
        unset = m.unset_of([register])
        if unset is not None:
            unset = np.repeat(m.all_lanes(unset).reshape(-1, WARP).any(1), WARP)
        put(m, np.repeat(values.astype(DTYPES[kind]), WARP), mask, unset)

    return execute


def _rows_of(m, instruction: Instruction, mask, at, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(threads that give a row's address, offsets [len, 16] of its bytes) of ldmatrix and stmatrix"""
    _whole_warps(mask, instruction)
    threads = m.threads_of(mask)
    threads = threads[threads % WARP < 8 * count]
    return threads, m.in_shared(threads, at(m, threads), 16, instruction)


def _eights(instruction: Instruction) -> tuple[int, bool] | None:
    """(number of 8x8 matrices, whether transposed)"""
    parts = instruction.parts
    if parts[1:4] != ["sync", "aligned", "m8n8"] or parts[-2:] != ["shared", "b16"]:
        return None
    return int(parts[4][1]), "trans" in parts


def matrix_load(operands: Operands, instruction: Instruction):
    if (found := _eights(instruction)) is None:
        return None
    count, transposed = found
    puts = [operands.target(name, "b32") for name in instruction.operands[0]]
    at = operands.address(instruction.operands[1], instruction)

    def execute(m, mask):
        threads, offsets = _rows_of(m, instruction, mask, at, count)
        m.order_shared("read", offsets, 16, threads, instruction)
        span = offsets[:, None] + np.arange(16)
        rows = m.shared_bytes[span].view(np.uint16).reshape(-1, count, 8, 8)
        known = m.shared_set[span].reshape(-1, count, 8, 8, 2).all(-1)
        if transposed:
            rows, known = rows.transpose(0, 1, 3, 2), known.transpose(0, 1, 3, 2)
        lanes, complete = m.threads_of(mask), known.all()
        for k, put in enumerate(puts):
            value = m.spread(matrices.fragments(rows[:, k]).reshape(-1), lanes)
            unset = None
            if not complete:
                unset = matrices.fragments((~known[:, k]).astype(np.uint16)).reshape(-1) != 0
                unset = m.spread(unset, lanes)
            put(m, value, mask, unset)

    return execute


def matrix_store(operands: Operands, instruction: Instruction):
    if (found := _eights(instruction)) is None:
        return None
    count, transposed = found
    gets, registers = operands.sources(instruction.operands[1], "b32")
    at = operands.address(instruction.operands[0], instruction)

    def execute(m, mask):
        threads, offsets = _rows_of(m, instruction, mask, at, count)
        m.order_shared("write", offsets, 16, threads, instruction)
        lanes, nothing = m.threads_of(mask), np.zeros(1, np.bool_)
        span = offsets.reshape(-1, count, 8, 1) + np.arange(16)
        for k, (get, register) in enumerate(zip(gets, registers, strict=True)):
            unset = m.unset_of([register])
            rows = matrices.matrices(m.all_lanes(get(m, mask))[lanes].reshape(-1, WARP))
            missing = m.all_lanes(nothing if unset is None else unset)[lanes].reshape(-1, WARP)
            missing = matrices.matrices(missing * np.uint32(0x00010001))
            if transposed:
                rows, missing = rows.transpose(0, 2, 1), missing.transpose(0, 2, 1)
            m.shared_bytes[span[:, k]] = np.ascontiguousarray(rows).view(np.uint8)
            m.shared_set[span[:, k]] = np.repeat(missing == 0, 2, axis=-1)

    return execute


_MULTIPLY = re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32")


def matrix_multiply(operands: Operands, instruction: Instruction):
    match = _MULTIPLY.fullmatch(instruction.opcode)
    if not match:
        return None
    outs, *ins = instruction.operands
    puts = [operands.target(name, "f32") for name in outs]
    sources, registers = zip(*(operands.sources(names, "b32") for names in ins), strict=True)
    registers = [register for names in registers for register in names]

    def execute(m, mask):
        _whole_warps(mask, instruction)
        m.refuse_unset(m.unset_of(registers), mask, instruction)
        a, b, c = ([m.all_lanes(get(m, mask)).reshape(-1, WARP) for get in gets] for gets in sources)
        for put, value in zip(puts, matrices.multiply_add(a, b, c, match[1]), strict=True):
            put(m, value.reshape(-1), mask, None)

    return execute


MAKERS = {
    **{"bar": barrier, "shfl": shuffle, "redux": reduce},
    **{"ldmatrix": matrix_load, "stmatrix": matrix_store, "mma": matrix_multiply},
}
