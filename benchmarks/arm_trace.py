"""What the NEON kernels execute for one layer: cross-compiled, emulated, and read from the emulator's log."""

import bisect
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT, DEPTHWISE = "multiply_tile", ("channels_last_sweep", "planar_sweep")

Instruction = tuple[str, str]  # its name and operands
Path_ = tuple[int, ...]  # the blocks that a call went through, by their numbers
Functions = list[tuple[int, str]]  # where each begins, in order; no name where it is none of the kernels'


@dataclass
class Run:
    """What one layer executed. A block has a number; what was translated another way is another block."""

    blocks: dict[int, list[Instruction]] = field(default_factory=dict)
    times: Counter[int] = field(default_factory=Counter)
    calls: dict[str, Counter[Path_]] = field(default_factory=lambda: defaultdict(Counter))
    functions: dict[int, str] = field(default_factory=dict)  # of each block

    def count(self, name: str = "") -> tuple[int, int]:
        """Instructions and vector FMAs in the functions whose names begin like this."""
        total = fmas = 0
        for block, times in self.times.items():
            if self.functions[block] and self.functions[block].startswith(name):
                total += times * len(self.blocks[block])
                fmas += times * fmas_of(self.blocks[block])
        return total, fmas

    def listing(self, path: Path_) -> list[Instruction]:
        return [instruction for block in path for instruction in self.blocks[block]]


def is_fma(instruction: Instruction) -> bool:
    return instruction[0] in ("fmla", "fmls") and bool(re.match(r"v\d+\.(4s|2d)", instruction[1]))


def fmas_of(listing: list[Instruction]) -> int:
    return sum(map(is_fma, listing))


def inner_loop(path: Path_) -> Path_:
    """The blocks between two visits of the one that was visited most."""
    most, _ = Counter(path).most_common(1)[0]
    visits = [i for i, block in enumerate(path) if block == most]
    rounds = Counter(path[a:b] for a, b in itertools.pairwise(visits))
    return rounds.most_common(1)[0][0] if rounds else path


# Names whose first operand is read.
_WITHOUT_RESULT = re.compile(r"(cmp|cmn|tst|ccmp|ccmn|b|b\..*|bl|br|ret|cbn?z|tbn?z|prfu?m)$")


def _registers(operands: str) -> list[str]:
    """The general ones, by their names of 64 bits."""
    words = re.findall(r"\b(?:sp|[xw]\d+)\b", operands)
    return [word if word == "sp" else f"x{word[1:]}" for word in words]


def stack_accesses(listing: list[Instruction]) -> list[bool]:
    """Whether each instruction loads or stores on the stack: at sp, or at a register that was made of it."""
    # x29 is the frame pointer, until something else is put there, as in functions that have no frame.
    pointers, found = {"sp", "x29"}, []
    for name, operands in listing:
        base = re.search(r"\[(sp|x\d+)", operands)
        is_memory = base is not None and name.startswith(("ld", "st"))
        found.append(is_memory and base is not None and base[1] in pointers)
        if is_memory:
            if name.startswith("ld"):
                pointers.difference_update(_registers(operands.split("[")[0]))
        elif re.match(r"(sp|[xw]\d+)\b", operands) and not _WITHOUT_RESULT.match(name):
            result, *sources = _registers(operands)
            if pointers.intersection(sources):
                pointers.add(result)
            elif result != "sp":
                pointers.discard(result)
    return found


def stack_of_loop(run: Run, path: Path_) -> int:
    """How many instructions of the inner loop load or store on the stack."""
    loop = inner_loop(path)
    begin = next(i for i in range(len(path)) if path[i : i + len(loop)] == loop)
    before = len(run.listing(path[:begin]))
    return sum(stack_accesses(run.listing(path))[before : before + len(run.listing(loop))])


def tool(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        sys.exit(f"{name} was not found: install it (Debian, Ubuntu: apt-get install {package})")
    return path


def execute_or_exit(*command: str | Path) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(result.stdout[-2000:] + result.stderr[-2000:])


def build(folder: Path) -> Path:
    """The program that runs one layer, by the aarch64 preset; what the folder has of it already is taken."""
    presets = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))["configurePresets"]
    (preset,) = (preset for preset in presets if preset["name"] == "aarch64")
    tool(preset["cacheVariables"]["CMAKE_CXX_COMPILER"], "g++-aarch64-linux-gnu")
    execute_or_exit("cmake", "--preset", "aarch64", "-B", folder)
    execute_or_exit("cmake", "--build", folder, "--target", "fastsep_instructions")
    return folder / "fastsep_instructions"


def kernel_functions(program: Path) -> Functions:
    """Where each function of the NEON kernels begins, in order; no name where something else follows."""
    nm = tool("aarch64-linux-gnu-nm", "binutils-aarch64-linux-gnu")
    listing = subprocess.run([nm, "-nC", program], check=True, capture_output=True, text=True).stdout
    functions = []
    for line in listing.splitlines():
        address, kind, name = line.split(" ", 2) if line[0] != " " else ("", "", "")
        if kind not in tuple("tTwW"):
            continue
        # (transpose_any is the packing of weights, before the layer runs.)
        inside = re.search(r"fastsep::neon::\(anonymous namespace\)::(.*)", name)
        if "transpose_any<" in name:
            inside = None
        name = re.sub(r"fastsep::|neon::|\(anonymous namespace\)::", "", inside[1]) if inside else ""
        functions.append((int(address, 16), re.sub(r"^[\w:&<> ]* (?=\w+<)|\(.*", "", name)))
    return functions


def read_log(lines: Iterable[bytes], functions: Functions) -> Run:
    """The emulator's log: a listing of each block when translated (IN:), and a line for each one executed.

    A block may be translated again, shorter or not. The last listing of an address is what runs there.
    """
    run, latest = Run(), dict[int, int]()
    starts = {address for address, name in functions if name}
    addresses = [address for address, _ in functions]
    listing, call = list[tuple[int, Instruction]](), list[int]()

    def translated() -> None:
        if listing:
            address, instructions = listing[0][0], [instruction for _, instruction in listing]
            if address not in latest or run.blocks[latest[address]] != instructions:
                latest[address] = number = len(run.blocks)
                run.blocks[number] = instructions
                run.functions[number] = functions[bisect.bisect_right(addresses, address) - 1][1]
            listing.clear()

    def finish() -> None:
        if call and (name := run.functions[call[0]]).startswith((PRODUCT, *DEPTHWISE)):
            run.calls[name][tuple(call)] += 1
        call.clear()

    for line in lines:
        if line.startswith(b"Trace"):
            translated()
            address = int(line.split(b"/", 2)[1], 16)
            block = latest[address]
            run.times[block] += 1
            if address in starts or (call and run.functions[block] != run.functions[call[0]]):
                finish()
            call.append(block)
        elif line.startswith(b"IN:"):
            translated()
        elif line.startswith(b"0x"):
            where, _, name_, *operands = line.decode().rstrip().split(None, 3)
            listing.append((int(where[:-1], 16), (name_, *operands, "")[:2]))
    finish()
    return run


def execute(program: Path, functions: Functions, layer: str, layout: str) -> Run:
    """Runs a layer, of which the emulator logs the blocks of the kernels."""
    kernels = [address for address, name in functions if name]
    after = next(address for address, _ in functions if address > kernels[-1])
    command = [tool("qemu-aarch64-static", "qemu-user-static"), "-d", "in_asm,exec,nochain"]
    command += ["-D", "/dev/stdout", "-dfilter", f"{kernels[0]:#x}..{after - 1:#x}"]
    with subprocess.Popen([*command, program, layer, "forward", layout], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        run = read_log(process.stdout, functions)
    if process.returncode != 0:
        sys.exit(f"{program.name} {layer} forward {layout} ended with {process.returncode}")
    return run
