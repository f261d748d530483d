"""decode: a Program to what the machine executes. Here are the instructions of one thread alone; loads.py has those
that touch memory, warps.py those of threads together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ptx import loads, warps
from ptx.arithmetic import DTYPES, function
from ptx.errors import UnknownInstruction
from ptx.operands import Mask, Operands
from ptx.program import Instruction, Program

if TYPE_CHECKING:
    from ptx.machine import Machine


@dataclass(frozen=True)
class Step:
    guard: int | None  # the predicate's register
    negated: bool
    opcode: str
    execute: Callable[[Machine, Mask], None] | None
    target: int | None  # of a branch: the index of a step; the end of the code for ret


@dataclass(frozen=True)
class Code:
    steps: tuple[Step, ...]
    names: tuple[str, ...]  # of the registers, by number


def _elementwise(operands: Operands, instruction: Instruction):
    known = function(instruction.parts)
    if known is None or len(instruction.operands) != 1 + len(known[1]):
        return None
    compute, kinds, result = known
    found = [operands.source(name, kind) for name, kind in zip(instruction.operands[1:], kinds, strict=True)]
    gets, registers = [get for get, _ in found], [register for _, register in found]
    put = operands.target(instruction.operands[0], result)

    def execute(m, mask):
        put(m, compute(*[get(m, mask) for get in gets]), mask, m.unset_of(registers))

    return execute


def _or_junk(operands: Operands, name: str, half: str) -> str:
    """A half that no instruction writes is the compiler's undef: it knows that nobody looks at that half. `unset` is of
    whole registers, so a NaN goes there instead, which shows if somebody does."""
    return name if name in operands.program.written or not name.startswith("%") else JUNK[half]


def _move(operands: Operands, instruction: Instruction):
    target, source = instruction.operands
    kind = instruction.parts[-1]
    if not isinstance(target, tuple) and not isinstance(source, tuple):
        get, register = operands.source(source, kind)
        put = operands.target(target, kind)
        return lambda m, mask: put(m, get(m, mask), mask, m.unset_of([register]))
    if kind not in ("b32", "b64"):
        return None
    half = {"b32": "b16", "b64": "b32"}[kind]
    width, part, whole = 8 * np.dtype(DTYPES[half]).itemsize, DTYPES[half], DTYPES[kind]
    if isinstance(target, tuple):
        get, register = operands.source(source, kind)
        low, high = (operands.target(name, half) for name in target)

        def split(m, mask):
            value, unset = get(m, mask), m.unset_of([register])
            low(m, value.astype(part), mask, unset)
            high(m, (value >> width).astype(part), mask, unset)

        return split
    (low, high), registers = operands.sources([_or_junk(operands, name, half) for name in source], half)
    put = operands.target(target, kind)

    def join(m, mask):
        value = low(m, mask).astype(whole) | (high(m, mask).astype(whole) << width)
        put(m, value, mask, m.unset_of(registers))

    return join


JUNK = {"b16": "0x7fff", "b32": "0x7fffffff"}  # NaN in each 16-bit and 32-bit float type
_MAKERS = {"mov": _move, **loads.MAKERS, **warps.MAKERS}


@lru_cache(maxsize=64)  # of mutants there are many
def decode(program: Program) -> Code:
    """UnknownInstruction, if there is one that the interpreter does not know."""
    operands = Operands(program)

    def step(instruction: Instruction) -> Step:
        guard = None if instruction.guard is None else operands.register(instruction.guard)
        head = (guard, instruction.negated, instruction.opcode)
        name = instruction.parts[0]
        if name == "bra":
            return Step(*head, None, program.labels[instruction.operands[0]])
        if name in ("ret", "exit"):
            return Step(*head, None, len(program.code))
        execute = _MAKERS.get(name, _elementwise)(operands, instruction)
        if execute is None:
            raise UnknownInstruction(f"{program.name}, {instruction}")
        return Step(*head, execute, None)

    steps = tuple(map(step, program.code))
    return Code(steps, tuple(operands.names))
