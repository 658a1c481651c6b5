"""What the CUDA kernels take of a GPU, from what the compiler says of them with -Xptxas=-v.

    cmake --preset cuda && cmake --build --preset cuda > build.txt
    python benchmarks/cuda_resources.py build.txt

Exit status 1 where a kernel spills registers, more bytes than benchmarks/cuda_spills.txt allows it, or where
the compiler serialises wgmma instructions; 2 where the text tells of no kernel at all. The build has to be a
whole one: what is not compiled says nothing.
"""

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ALLOWED = Path(__file__).with_name("cuda_spills.txt")

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
# "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..." (C7510 and its like).
_SERIALISED = re.compile(r"wgmma.*serializ", re.IGNORECASE)


@dataclass
class Kernel:
    name: str  # as the linker knows it
    architecture: str
    registers: int = 0
    stack: int = 0  # bytes of a thread: arrays that are indexed, and spills
    spills: int = 0  # bytes stored and loaded


@dataclass(frozen=True)
class Allowance:
    pattern: str  # of the readable name
    architecture: str
    bytes: int


def parse(text: str) -> tuple[list[Kernel], list[str]]:
    """The kernels of a compiler's output, and its lines on serialised wgmma."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            kernels.append(Kernel(match["name"], match["architecture"]))
        elif kernels and (match := _SPILLS.search(line)):
            kernels[-1].stack = int(match[1])
            kernels[-1].spills = int(match[2]) + int(match[3])
        elif kernels and (match := _REGISTERS.search(line)):
            kernels[-1].registers = int(match[1])
    return kernels, [line.strip() for line in text.splitlines() if _SERIALISED.search(line)]


def allowances(text: str) -> list[Allowance]:
    """A line each: a regular expression of the kernel's name, the architecture, bytes; # begins a comment."""
    found = []
    for line in text.splitlines():
        if words := line.split("#")[0].split():
            pattern, architecture, size = words
            found.append(Allowance(pattern, architecture, int(size)))
    return found


def readable(names: list[str]) -> dict[str, str]:
    """The names as they stand in the source, where c++filt is there to tell."""
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    command = ["c++filt", *names]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(zip(names, lines, strict=True))


def faults(kernels: list[Kernel], serialised: list[str], allowed: list[Allowance]) -> list[str]:
    """What must not be, a sentence each; what is allowed for nothing too."""
    names = readable(sorted({kernel.name for kernel in kernels}))
    found = [f"wgmma is serialised: {line}" for line in serialised]
    used = set()
    for kernel in kernels:
        if kernel.spills == 0:
            continue
        name, limit = names[kernel.name], 0
        for allowance in allowed:
            if allowance.architecture == kernel.architecture and re.search(allowance.pattern, name):
                limit = max(limit, allowance.bytes)
                used.add(allowance)
        if kernel.spills > limit:
            room = f" of {limit} allowed" if limit else ""
            found.append(f"{name} for {kernel.architecture} spills {kernel.spills} bytes{room}")
    for allowance in allowed:
        if allowance not in used:
            found.append(
                f"{allowance.pattern} for {allowance.architecture} spills nothing: take it off the list"
            )
    return found


def summary(kernels: list[Kernel]) -> str:
    """A line for each architecture."""
    lines = []
    for architecture in sorted({kernel.architecture for kernel in kernels}):
        own = [kernel for kernel in kernels if kernel.architecture == architecture]
        most = max(own, key=lambda kernel: kernel.registers)
        stacks = sum(kernel.stack > 0 for kernel in own)
        lines.append(
            f"{architecture}: {len(own)} kernels, at most {most.registers} registers, {stacks} with a stack, "
            f"{sum(kernel.spills > 0 for kernel in own)} with spills"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="what the compiler said")
    parser.add_argument("--allowed", type=Path, default=ALLOWED, help="(default: %(default)s)")
    parsed = parser.parse_args(arguments)
    kernels, serialised = parse(parsed.output.read_text(encoding="utf-8", errors="replace"))
    if not kernels:
        print(f"{parsed.output} tells of no kernel: is it a whole build with -Xptxas=-v?", file=sys.stderr)
        return 2
    print(summary(kernels))
    found = faults(kernels, serialised, allowances(parsed.allowed.read_text(encoding="utf-8")))
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
