"""Machine: runs a Program over a grid, all threads of a wave of blocks at a time, one numpy array a register.

The instruction with the lowest place in the code goes first, so threads that took different ways meet again by
themselves. Besides computing, it refuses what errors.py lists. Bytes and registers that nobody has written may be
computed with, but must not decide an address, a branch, or what reaches global memory: `unset` masks go along with the
values that were made of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptx.decoding import decode
from ptx.errors import Endless, Misaligned, OutOfBounds, PtxError, UnsetValue, WrongArguments
from ptx.memory import Memory
from ptx.operands import Mask
from ptx.ordering import Accesses, Clock
from ptx.program import Instruction, Program
from ptx.traffic import Traffic
from ptx.warps import WARP

_MOST_INSTRUCTIONS = 20_000_000


@dataclass
class _Copy:
    """An asynchronous copy to shared memory: what of it is still on its way."""

    threads: np.ndarray
    to: np.ndarray  # offset in this wave's shared memory
    source: np.ndarray  # address
    given: np.ndarray  # bytes that are read; the rest are zeros
    size: int
    group: np.ndarray


class Machine:
    """One launch. arguments: an address for each parameter. shared: bytes of shared memory a block. ordered: whether to
    look for races, which takes most of the time. last_wins: of several threads that write to one place in one
    instruction, whose value stays. Which is open on a GPU, and Triton relies on them to be the same; where they are
    not, `disagreements` counts.
    """

    def __init__(
        self,
        program: Program,
        memory: Memory,
        arguments: Sequence[int],
        grid: tuple[int, int, int],
        shared: int,
        *,
        ordered: bool = True,
        last_wins: bool = True,
        traffic: Traffic | None = None,
    ):
        if len(arguments) != len(program.parameters):
            raise WrongArguments(
                f"{program.name}: {len(arguments)} arguments for {len(program.parameters)} parameters"
            )
        for (kind, name), value in zip(program.parameters, arguments, strict=True):
            if kind not in ("u64", "b64") or not 0 <= int(value) < 2**63:
                raise WrongArguments(f"{program.name}: {name} is a {kind}; {value} is no address for it")
        if program.threads % WARP:
            raise WrongArguments(f"{program.name}: {program.threads} threads a block are no whole warps")
        self.program, self.memory, self.grid, self.shared = program, memory, grid, shared
        self.parameters = np.array([int(value) for value in arguments], np.uint64)
        self.blocks = grid[0] * grid[1] * grid[2]
        self.traffic = traffic
        self.warps = program.threads // WARP
        self.ordered, self.clock, self.global_accesses = ordered, None, None
        self.last_wins, self.disagreements = last_wins, 0
        self.steps, self.executed = 0, Counter()  # instructions; by opcode
        self.position = 0  # of the instruction at hand
        self.code = decode(program)

    def run(self, waves: Sequence[Sequence[int]] | None = None) -> Machine:
        """waves: which blocks run at a time, and in which order their atomics come; all in one by default."""
        waves = [range(self.blocks)] if waves is None else waves
        if sorted(block for wave in waves for block in wave) != list(range(self.blocks)):
            raise PtxError("the waves must hold each block of the grid once")
        if self.ordered:
            self.clock = Clock(self.blocks)
            self.global_accesses = Accesses(self.memory.size, self.clock, self.warps, "global")
        with np.errstate(all="ignore"):
            for wave in waves:
                self._begin(np.array(wave))
                self._run_wave()
        self._begin(np.zeros(0, np.int64))  # a machine that is kept for its counts keeps no threads
        self.clock = self.global_accesses = None
        return self

    # -- a wave --------------------------------------------------------------------------------------------------------

    def _begin(self, blocks: np.ndarray) -> None:
        threads, (x, y, _) = self.program.threads, self.grid
        self.wave = blocks
        self.block = np.repeat(blocks, threads)  # of each thread
        self.place = np.repeat(np.arange(len(blocks)), threads)  # of its block in the wave
        thread = np.tile(np.arange(threads), len(blocks))
        self.count = len(thread)
        self.threads = np.arange(self.count)
        self.warp = self.block * self.warps + thread // WARP
        self.special = {
            "%tid.x": thread,
            "%ctaid.x": self.block % x,
            "%ctaid.y": self.block // x % y,
            "%ctaid.z": self.block // (x * y),
            "%laneid": thread % WARP,
            **{f"%nctaid.{axis}": np.full(1, size) for axis, size in zip("xyz", self.grid, strict=True)},
            "%ntid.x": np.full(1, threads),
        }
        self.pitch = -(-self.shared // 16) * 16
        self.shared_base = self.place * self.pitch
        self.shared_bytes = np.zeros(len(blocks) * self.pitch + 16, np.uint8)
        self.shared_set = np.zeros(len(self.shared_bytes), np.bool_)
        self.shared_accesses = (
            Accesses(len(self.shared_bytes), self.clock, self.warps, "shared") if self.clock else None
        )
        self.copies: list[_Copy] = []
        self.groups = np.zeros(self.count, np.int64)  # committed by each thread
        self.values: list[np.ndarray | None] = [None] * len(self.code.names)
        self.unset: list[np.ndarray | None] = [None] * len(self.code.names)

    def _run_wave(self) -> None:
        steps = self.code.steps
        end, position = len(steps), 0
        each: np.ndarray | None = None  # the threads' positions, where they differ
        while True:
            mask: Mask = None
            if each is not None:
                position = int(each.min())
                mask = each == position
                if mask.all():
                    each = mask = None
            if position >= end:
                break
            step, self.position = steps[position], position
            self.steps += 1
            self.executed[step.opcode] += 1
            if self.steps > _MOST_INSTRUCTIONS:
                raise Endless(f"{self.program.name}: more than {_MOST_INSTRUCTIONS} instructions")
            active = mask
            if step.guard is not None:
                condition = self.all_lanes(self.read(step.guard))
                self.refuse_unset(self.unset[step.guard], mask, self.program.code[position])
                active = ~condition if step.negated else condition
                active = active if mask is None else active & mask
                if active.all():
                    active = None
            if step.target is not None:
                if active is None:
                    position = step.target
                elif mask is None and not active.any():
                    position += 1
                else:
                    if each is None:
                        each = np.full(self.count, position)
                    each[slice(None) if mask is None else mask] = position + 1
                    each[active] = step.target
                continue
            if active is None or active.any():
                step.execute(self, active)
            if each is None:
                position += 1
            else:
                each[mask] = position + 1

    # -- registers -----------------------------------------------------------------------------------------------------

    def all_lanes(self, value: np.ndarray) -> np.ndarray:
        return value if len(value) == self.count else np.broadcast_to(value, self.count)

    def threads_of(self, mask: Mask) -> np.ndarray:
        return self.threads if mask is None else np.nonzero(mask)[0]

    def spread(self, values: np.ndarray | None, threads: np.ndarray) -> np.ndarray | None:
        """Values of some threads as those of all."""
        if values is None:
            return None
        out = np.zeros(self.count, values.dtype)
        out[threads] = values
        return out

    def read(self, register: int) -> np.ndarray:
        """Its bits: [threads], or [1] where all threads have the same."""
        value = self.values[register]
        if value is None:
            raise UnsetValue(f"{self.code.names[register]}: {self.program.code[self.position]}")
        return value

    def write(self, register: int, value: np.ndarray, mask: Mask, unset: np.ndarray | None) -> None:
        if mask is not None:
            before, unset_before = self.values[register], self.unset[register]
            if before is None:
                before, unset_before = np.zeros(1, value.dtype), np.ones(1, np.bool_)
            value = np.where(mask, value, before)
            if unset is not None or unset_before is not None:
                nothing = np.zeros(1, np.bool_)
                unset = np.where(
                    mask,
                    nothing if unset is None else unset,
                    nothing if unset_before is None else unset_before,
                )
                unset = unset if unset.any() else None
        self.values[register], self.unset[register] = value, unset

    def unset_of(self, registers: Sequence[int | None]) -> np.ndarray | None:
        """Where any of these is unset; None: nowhere."""
        found = [self.unset[r] for r in registers if r is not None and self.unset[r] is not None]
        if len(found) < 2:
            return found[0] if found else None
        return np.logical_or.reduce([self.all_lanes(unset) for unset in found])

    @staticmethod
    def refuse_unset(unset: np.ndarray | None, mask: Mask, instruction: Instruction) -> None:
        if unset is not None and (unset if mask is None else unset & mask).any():
            raise UnsetValue(str(instruction))

    # -- memory --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _refuse_misaligned(addresses: np.ndarray, size: int, instruction: Instruction) -> None:
        odd = addresses & (size - 1)
        if odd.any():
            raise Misaligned(f"{size} bytes at {int(addresses[np.argmax(odd)]):#x}: {instruction}")

    def access_global(self, threads, addresses, size: int, kind: str, instruction: Instruction) -> None:
        """Checks an access of `size` bytes, and counts it. kind: "read", "write" or "atomic"."""
        self._refuse_misaligned(addresses, size, instruction)
        numbers = self.memory.locate(addresses, size, instruction)
        if self.traffic is not None:
            self.traffic.count(numbers, self.block[threads])
        if self.global_accesses is not None and kind != "atomic":
            getattr(self.global_accesses, kind)(numbers, size, self.warp[threads], instruction)

    def in_shared(self, threads, addresses, size: int, instruction: Instruction) -> np.ndarray:
        """Offsets in the wave's shared memory, checked but for order."""
        self._refuse_misaligned(addresses, size, instruction)
        worst = int(addresses.max()) + size
        if worst > self.shared or (addresses < 0).any():
            raise OutOfBounds(f"shared memory up to {worst} of {self.shared} bytes: {instruction}")
        return addresses + self.shared_base[threads]

    def order_shared(self, kind: str, offsets, size: int, threads, instruction: Instruction, **more) -> None:
        if self.shared_accesses is not None:
            getattr(self.shared_accesses, kind)(offsets, size, self.warp[threads], instruction, **more)

    def in_turn(self, places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places and values in the order in which to write them: of those to one place the last one stays."""
        return (places, values) if self.last_wins else (places[::-1], values[::-1])

    # -- asynchronous copies -------------------------------------------------------------------------------------------

    def begin_copy(self, threads, to, source, given, size: int) -> None:
        self.copies.append(_Copy(threads, to, source, given, size, self.groups[threads]))

    def commit(self, mask: Mask) -> None:
        self.groups[self.threads_of(mask)] += 1

    def wait(self, mask: Mask, pending: int) -> None:
        """Until no more than `pending` of a thread's groups are on their way."""
        waits = np.zeros(self.count, np.bool_)
        waits[self.threads_of(mask)] = True
        left = []
        for copy in self.copies:
            done = waits[copy.threads] & (copy.group < self.groups[copy.threads] - pending)
            if done.any():
                values = np.zeros((int(done.sum()), copy.size), np.uint8)
                read = copy.given[done] > 0
                if read.any():
                    values[read] = self.memory.read(copy.source[done][read], copy.size)
                span = copy.to[done][:, None] + np.arange(copy.size)
                self.shared_bytes[span], self.shared_set[span] = values, True
                if self.shared_accesses is not None:
                    self.shared_accesses.arrive(copy.to[done], copy.size, self.warp[copy.threads[done]])
            if not done.all():
                rest = (part[~done] for part in (copy.threads, copy.to, copy.source, copy.given))
                left.append(_Copy(*rest, copy.size, copy.group[~done]))
        self.copies = left
