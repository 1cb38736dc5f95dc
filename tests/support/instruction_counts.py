"""Instructions of a compiled kernel for each element of a row, read off its assembly.

A kernel that walks a row in blocks has loops: what counts is in a loop's body. One that holds its
row has none, and all of it counts. A part that a branch jumps over within a loop is left out: it is
for one block of many. So a count is a little too high, for what a program does once.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

_NVIDIA_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_AMD_SPECIAL = ("v_exp_", "v_log_", "v_rcp_", "v_sqrt_", "v_rsq_")


class Instruction(NamedTuple):
    name: str
    target: int | None = None  # of a branch, an index of an instruction
    is_conditional: bool = False


def of_nvidia(cubin: bytes, tools: Any) -> list[Instruction]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tools / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = [match.groups() for match in _NVIDIA_LINE.finditer(text)]
    places = {int(address, 16): number for number, (address, *_) in enumerate(found)}
    instructions = []
    for _, predicate, name, rest in found:
        target = None
        if name.startswith("BRA"):
            address = re.search(r"0x([0-9a-f]+)", rest)
            target = None if address is None else places.get(int(address[1], 16))
        instructions.append(Instruction(name, target, bool(predicate)))
    return instructions


def of_amd(text: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        label = re.match(r"^(\.LBB\w+):", line)
        instruction = re.match(r"^\t([a-z]\w+)\s*(.*)", line)
        if label:
            labels[label[1]] = len(lines)
        elif instruction and instruction[1][:2] in ("s_", "v_", "ds", "gl", "bu", "fl"):
            lines.append((instruction[1], instruction[2]))
    return [
        Instruction(name, labels.get(rest.split()[0]), name.startswith("s_cbranch"))
        if "branch" in name
        else Instruction(name)
        for name, rest in lines
    ]


def counted(instructions: list[Instruction]) -> list[str]:
    """The names of those that run for each block of a row."""
    loops = [
        range(one.target, number + 1)
        for number, one in enumerate(instructions)
        # The last instruction branches to itself.
        if one.target is not None and one.target < number
    ]
    inside = {number for loop in loops for number in loop}
    for number in sorted(inside):
        one = instructions[number]
        if one.is_conditional and one.target is not None and one.target in inside:
            inside -= set(range(number + 1, one.target))
    places = sorted(inside) if loops else range(len(instructions))
    return [instructions[number].name for number in places]


def per_element(kernel: Any, elements: int, tools: Any) -> tuple[float, float]:
    """All instructions, and special functions among them, by the elements that a thread has."""
    if "cubin" in kernel.asm:
        names = counted(of_nvidia(kernel.asm["cubin"], tools))
        special = sum(name.startswith("MUFU") for name in names)
    else:
        names = counted(of_amd(kernel.asm["amdgcn"]))
        special = sum(name.startswith(_AMD_SPECIAL) for name in names)
    return len(names) / elements, special / elements
