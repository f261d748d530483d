"""Instructions that touch memory: ld, st, atom, cp.async. Each maker gives what the machine executes, or None where it
does not know the instruction's modifiers. What may be touched, and in which order, the machine says."""

from __future__ import annotations

import numpy as np

from ptx.arithmetic import DTYPES
from ptx.errors import OutOfBounds, UnknownInstruction
from ptx.operands import Operands
from ptx.program import Instruction


def _vector(instruction: Instruction) -> tuple[str, int] | None:
    """(space, elements) of a load or store whose modifiers are known."""
    elements = 1
    for part in instruction.parts[2:-1]:
        if part in ("v2", "v4"):
            elements = int(part[1])
        elif part not in ("cg", "ca", "nc"):
            return None
    space = instruction.parts[1]
    return (space, elements) if space in ("global", "shared") else None


def _load_parameter(operands: Operands, instruction: Instruction):
    target, source = instruction.operands
    put, at = operands.target(target, "b64"), operands.address(source, instruction)

    def execute(m, mask):
        threads = m.threads_of(mask)
        addresses = at(m, threads)
        numbers = addresses // 8
        if (addresses % 8).any() or (addresses < 0).any() or (numbers >= len(m.parameters)).any():
            raise OutOfBounds(f"no parameter is there: {instruction}")
        if (numbers == numbers[0]).all():
            put(m, m.parameters[numbers[:1]], mask, None)
        else:
            put(m, m.spread(m.parameters[numbers], threads), mask, None)

    return execute


def load(operands: Operands, instruction: Instruction):
    if instruction.opcode in ("ld.param.b64", "ld.param.u64"):
        return _load_parameter(operands, instruction)
    found, kind = _vector(instruction), instruction.parts[-1]
    if found is None:
        return None
    space, elements = found
    target, source = instruction.operands
    names = target if isinstance(target, tuple) else (target,)
    puts = [operands.target(name, kind) for name in names]
    dtype = np.dtype(DTYPES[kind])
    size = dtype.itemsize * elements
    at = operands.address(source, instruction)

    def execute(m, mask):
        threads = m.threads_of(mask)
        addresses, unset = at(m, threads), None
        if space == "global":
            m.access_global(threads, addresses, size, "read", instruction)
            found = m.memory.read(addresses, size)
        else:
            offsets = m.in_shared(threads, addresses, size, instruction)
            m.order_shared("read", offsets, size, threads, instruction)
            span = offsets[:, None] + np.arange(size)
            found, known = m.shared_bytes[span], m.shared_set[span]
            if not known.all():
                unset = ~known.reshape(len(threads), elements, -1).all(2)
        values = np.ascontiguousarray(found).view(dtype)
        for k, put in enumerate(puts):
            value, missing = values[:, k], None if unset is None else unset[:, k]
            if mask is not None:
                value, missing = m.spread(value, threads), m.spread(missing, threads)
            put(m, np.ascontiguousarray(value), mask, missing)

    return execute


def store(operands: Operands, instruction: Instruction):
    found, kind = _vector(instruction), instruction.parts[-1]
    if found is None:
        return None
    space, elements = found
    target, source = instruction.operands
    gets, registers = operands.sources(source if isinstance(source, tuple) else (source,), kind)
    size = np.dtype(DTYPES[kind]).itemsize * elements
    at = operands.address(target, instruction)

    def execute(m, mask):
        threads = m.threads_of(mask)
        addresses = at(m, threads)
        values = np.stack([m.all_lanes(get(m, mask))[threads] for get in gets], 1).view(np.uint8)
        if space == "global":
            m.refuse_unset(m.unset_of(registers), mask, instruction)
            m.access_global(threads, addresses, size, "write", instruction)
            m.memory.write(*m.in_turn(addresses, values))
            m.disagreements += not np.array_equal(m.memory.read(addresses, size), values)
            return
        offsets = m.in_shared(threads, addresses, size, instruction)
        m.order_shared("write", offsets, size, threads, instruction)
        span = offsets[:, None] + np.arange(size)
        places, in_turn = m.in_turn(span, values)
        m.shared_bytes[places] = in_turn
        m.disagreements += not np.array_equal(m.shared_bytes[span], values)
        missing = [m.unset_of([register]) for register in registers]
        if all(unset is None for unset in missing):
            m.shared_set[span] = True
        else:
            nothing = np.zeros(1, np.bool_)
            each = [m.all_lanes(nothing if unset is None else unset)[threads] for unset in missing]
            m.shared_set[span] = ~np.repeat(np.stack(each, 1), size // elements, 1)

    return execute


def atomic(operands: Operands, instruction: Instruction):
    """atom.global: one thread after another, those of the wave's first block first."""
    *modifiers, operation, kind = instruction.parts[1:]
    known = {"global", "gpu", "acq_rel", "acquire", "release", "relaxed"}
    if operation != "add" or kind not in ("u32", "s32"):
        return None
    if set(modifiers) - known or "global" not in modifiers:
        return None
    acquires = bool({"acq_rel", "acquire"} & set(modifiers))
    releases = bool({"acq_rel", "release"} & set(modifiers))
    target, where, source = instruction.operands
    put = operands.target(target, kind)
    get, register = operands.source(source, kind)
    at = operands.address(where, instruction)

    def execute(m, mask):
        threads = m.threads_of(mask)
        addresses = at(m, threads)
        m.refuse_unset(m.unset_of([register]), mask, instruction)
        m.access_global(threads, addresses, 4, "atomic", instruction)
        added = m.all_lanes(get(m, mask))[threads]
        before = np.zeros(len(threads), DTYPES[kind])
        for i, address in enumerate(addresses):
            here = addresses[i : i + 1]
            value = m.memory.read(here, 4).view(DTYPES[kind])[0]
            before[i] = value[0]
            m.memory.write(here, (value + added[i]).view(np.uint8).reshape(1, 4))
            if m.clock is not None:
                m.clock.atomic(int(m.block[threads[i]]), int(address), acquires, releases)
        put(m, m.spread(before, threads), mask, None)

    return execute


def copy(operands: Operands, instruction: Instruction):
    """cp.async: the bytes arrive when they are waited for, and until then nobody may touch them."""
    parts = instruction.parts
    if parts[1:] == ["async", "commit_group"]:
        return lambda m, mask: m.commit(mask)
    if parts[1:] == ["async", "wait_group"]:
        pending = int(instruction.operands[0], 0)
        return lambda m, mask: m.wait(mask, pending)
    if parts[1:] not in (["async", "cg", "shared", "global"], ["async", "ca", "shared", "global"]):
        return None
    to, source, size, *given = instruction.operands
    size = int(size, 0)
    get, register = operands.source(given[0] if given else str(size), "u32")
    to_at, source_at = operands.address(to, instruction), operands.address(source, instruction)

    def execute(m, mask):
        threads = m.threads_of(mask)
        m.refuse_unset(m.unset_of([register]), mask, instruction)
        given = m.all_lanes(get(m, mask))[threads].astype(np.int64)
        if not np.isin(given, (0, size)).all():
            raise UnknownInstruction(f"a copy of part of its bytes: {instruction}")
        offsets = m.in_shared(threads, to_at(m, threads), size, instruction)
        m.order_shared("write", offsets, size, threads, instruction, in_flight=True)
        addresses, read = source_at(m, threads), given > 0
        if read.any():
            m.access_global(threads[read], addresses[read], size, "read", instruction)
        m.begin_copy(threads, offsets, addresses, given, size)

    return execute


MAKERS = {"ld": load, "st": store, "atom": atomic, "cp": copy}
