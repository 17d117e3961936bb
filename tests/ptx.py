"""The PTX instructions that a thread may execute before it waits for the previous launch, by control-flow analysis."""

from __future__ import annotations

import re

_LABEL = re.compile(r"^(\$\w+):")
_BRANCH = re.compile(r"^(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$\w+);")
_WAIT = "griddepcontrol.wait"


def instructions_of(ptx: str) -> list[str]:
    """The lines of the kernel's body: labels and instructions, one each."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    lines = (re.sub(r"//.*", "", line).strip(" \t{}") for line in body.splitlines())
    return [line for line in lines if line and not line.startswith(".")]


def before_the_wait(ptx: str) -> list[str]:
    """Every instruction that some path from the kernel's entry reaches without passing the wait."""
    lines = instructions_of(ptx)
    labels = {match.group(1): place for place, line in enumerate(lines) if (match := _LABEL.match(line))}
    assert not [line for line in lines if re.match(r"(@!?%p\d+ )?(brx|call)", line)], "unsupported control flow"
    assert not [line for line in lines if _WAIT in line and line.startswith("@")], "a conditional wait"
    reached: set[int] = set()
    ahead = [0]
    while ahead:
        place = ahead.pop()
        if place >= len(lines) or place in reached or _WAIT in lines[place]:
            continue
        reached.add(place)
        branch = _BRANCH.match(lines[place])
        if branch:
            ahead.append(labels[branch.group(2)])
        if not ((branch and not branch.group(1)) or re.match(r"(ret|exit)\b", lines[place])):
            ahead.append(place + 1)
    return [lines[place] for place in sorted(reached)]


def reads_through(instructions: list[str], parameter: int) -> list[str]:
    """The loads from global memory whose address depends on a parameter, by any arithmetic."""
    derived: set[str] = set()
    grew = True
    while grew:
        grew = False
        for instruction in instructions:
            registers = re.findall(r"%\w+", instruction)
            if not registers or "st." in instruction:
                continue
            made, *sources = registers if not instruction.startswith("@") else registers[1:] or [""]
            from_parameter = "ld.param" in instruction and re.search(rf"_param_{parameter}\]", instruction)
            if (from_parameter or derived.intersection(sources)) and made not in derived:
                derived.add(made)
                grew = True
    return [
        instruction
        for instruction in instructions
        if "ld.global" in instruction and derived.intersection(re.findall(r"%\w+", instruction.split("[", 1)[1]))
    ]


def writes(instructions: list[str]) -> list[str]:
    """The writes to global memory: stores, atomics, bulk tensor copies out of shared memory."""
    to_global = r"(?<![a-z])(st|red|atom)\.[\w.:]*global|cp\.async\.bulk\.tensor[\w.:]*\.global\.shared"
    return [instruction for instruction in instructions if re.search(to_global, instruction)]
