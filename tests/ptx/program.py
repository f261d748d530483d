"""Program: the text of one PTX kernel, taken apart. What the instructions mean is none of its business."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ptx.errors import PtxError


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is a register, the name of a parameter or of shared memory, or "" """

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]  # a register or number; [..]; {..}


@dataclass(frozen=True)
class Instruction:
    guard: str | None  # the predicate register it depends on
    negated: bool
    opcode: str
    operands: tuple[Operand, ...]
    text: str
    line: int  # in the PTX text, from 1 on

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True, eq=False)
class Program:
    name: str
    parameters: tuple[tuple[str, str], ...]  # (type, name)
    threads: int  # of a block
    registers: dict[str, str]  # prefix of the name, "r" for %r7, to its type: pred, b16, b32, b64
    code: tuple[Instruction, ...]
    labels: dict[str, int]  # to an index in code; len(code) is the end

    @cached_property
    def written(self) -> frozenset[str]:
        """The registers that some instruction writes."""
        targets = [each.operands[0] for each in self.code if each.operands]
        return frozenset(
            name
            for at in targets
            if not isinstance(at, Address)
            for name in (at if isinstance(at, tuple) else (at,))
        )


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text.strip("{}").split(","))
    if text.startswith("["):
        match = re.fullmatch(r"\[\s*([%$A-Za-z_]\w*)?\s*\+?\s*(-?\d\w*)?\s*\]", text)
        if not match:
            raise PtxError(f"no address: {text}")
        return Address(match[1] or "", int(match[2] or "0", 0))
    return text


def _instruction(statement: str, line: int) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
    if not match:
        raise PtxError(f"line {line}: no instruction: {statement}")
    # Braces and brackets hold an operand together.
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{\[][^,{\[]*", match[4])
    return Instruction(
        guard=match[2],
        negated=match[1] == "!",
        opcode=match[3],
        operands=tuple(_operand(text.strip()) for text in operands),
        text=statement,
        line=line,
    )


@lru_cache(maxsize=64)  # of mutants there are many
def parse(text: str) -> Program:
    """The one kernel in a PTX text; the same object for the same text, so that it is decoded once."""
    lines = [re.sub(r"//.*", "", line).strip() for line in text.splitlines()]
    try:
        entry = next(i for i, line in enumerate(lines) if ".entry" in line)
        begin = next(i for i in range(entry, len(lines)) if lines[i] == "{")
        end = next(i for i in range(begin, len(lines)) if lines[i] == "}")
    except StopIteration:
        raise PtxError("no kernel: .entry, then { and } on lines of their own") from None
    head = "\n".join(lines[entry:begin])
    threads = re.search(r"\.reqntid\s+(\d+)(?:, 1, 1)?\s*$", head, re.M)
    if not threads:
        raise PtxError("a kernel must say how many threads a block has, with .reqntid")
    registers, labels, code = {}, {}, []
    for number in range(begin + 1, end):
        line = lines[number]
        if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+%(\w+)<\d+>;", line):
            registers[match[2]] = match[1]
        elif match := re.fullmatch(r"(\$\w+):", line):
            labels[match[1]] = len(code)
        elif not line.startswith((".loc", ".pragma")):
            statements = (statement.strip() for statement in line.split(";"))
            code += [_instruction(statement, number + 1) for statement in statements if statement]
    return Program(
        name=re.search(r"\.entry\s+(\w+)", head)[1],
        parameters=tuple(re.findall(r"\.param\s+\.(\w+)[^,\n]*?(\w+)\s*(?=[,\n])", head)),
        threads=int(threads[1]),
        registers=registers,
        code=tuple(code),
        labels=labels,
    )
