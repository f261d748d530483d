"""Operands: what stands between an instruction and the machine: registers, constants, addresses, each as a function.

Such a function takes the machine as its first argument, so that a program is decoded once for all of its launches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.arithmetic import DTYPES, bits_of
from ptx.errors import PtxError, UnsetValue
from ptx.program import Address, Instruction, Program

if TYPE_CHECKING:
    from ptx.machine import Machine

CLASSES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
SHARED = "global_smem"  # Triton's name of its shared memory
_SPECIAL = re.compile(r"%(laneid|n?tid\.x|n?ctaid\.[xyz])")
Mask = np.ndarray | None  # bool [threads]; None is all of them
Source = Callable[["Machine", Mask], np.ndarray]  # [threads], or [1] where all threads have the same
Target = Callable[["Machine", np.ndarray, Mask, np.ndarray | None], None]  # value, mask, unset


class Operands:
    """Those of one program; it numbers the registers as it meets them."""

    def __init__(self, program: Program):
        self.program = program
        self.parameter_at = {name: 8 * i for i, (_, name) in enumerate(program.parameters)}  # its address
        self.names: dict[str, int] = {}  # registers

    def register(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names))

    def class_of(self, register: str) -> np.dtype:
        prefix = register[1:].rstrip("0123456789")
        if prefix not in self.program.registers:
            raise PtxError(f"{self.program.name}: no register {register}")
        return np.dtype(CLASSES[self.program.registers[prefix]])

    def constant(self, text: str, dtype) -> np.ndarray:
        dtype = np.dtype(dtype)
        if text.startswith("0f"):
            return np.array([int(text[2:], 16)], np.uint32).view(np.float32).view(dtype)
        number = self.parameter_at.get(text, 0 if text == SHARED else None)
        if number is None:
            number = int(text.removesuffix("U"), 0)
        if dtype == np.bool_:
            return np.array([number != 0])
        width = 8 * dtype.itemsize
        return np.array([number % (1 << width)], np.uint64).astype(bits_of(dtype)).view(dtype)

    def source(self, operand: str, kind: str) -> tuple[Source, int | None]:
        """(what gives the operand as an array of `kind`, its register)"""
        dtype = np.dtype(DTYPES[kind])
        if _SPECIAL.fullmatch(operand):
            return lambda m, mask: m.special[operand].astype(dtype), None
        if operand.startswith("%"):
            register, kept = self.register(operand), self.class_of(operand)
            if kept == dtype:
                return lambda m, mask: m.read(register), register
            if kept.itemsize == dtype.itemsize:
                return lambda m, mask: m.read(register).view(dtype), register
            narrow = bits_of(dtype)
            return lambda m, mask: m.read(register).astype(narrow).view(dtype), register
        constant = self.constant(operand, dtype)
        return lambda m, mask: constant, None

    def sources(self, operands, kind: str) -> tuple[list[Source], list[int | None]]:
        found = [self.source(operand, kind) for operand in operands]
        return [get for get, _ in found], [register for _, register in found]

    def target(self, operand: str, kind: str) -> Target:
        """What writes the operand."""
        if operand == "_":
            return lambda m, value, mask, unset: None
        register, kept = self.register(operand), self.class_of(operand)
        if kept == np.bool_:
            return lambda m, value, mask, unset: m.write(register, value, mask, unset)
        if kept.itemsize == np.dtype(DTYPES[kind]).itemsize:
            return lambda m, value, mask, unset: m.write(register, value.view(kept), mask, unset)
        wider = np.dtype(f"i{kept.itemsize}") if kind[0] == "s" else kept

        def widen(m, value, mask, unset):
            m.write(register, value.astype(wider).view(kept), mask, unset)

        return widen

    def address(
        self, operand: Address, instruction: Instruction
    ) -> Callable[[Machine, np.ndarray], np.ndarray]:
        """What gives the addresses of some threads (their numbers), int64."""
        if not operand.base.startswith("%"):
            start = self.constant(operand.base, np.int64) if operand.base else np.zeros(1, np.int64)
            fixed = start + operand.offset
            return lambda m, threads: np.broadcast_to(fixed, len(threads))
        register, offset = self.register(operand.base), operand.offset

        def addresses(m, threads):
            unset = m.unset[register]
            if unset is not None and m.all_lanes(unset)[threads].any():
                raise UnsetValue(f"an address: {instruction}")
            value = m.all_lanes(m.read(register))[threads].astype(np.int64)
            return value + offset if offset else value

        return addresses
