"""What to expect of the NEON kernels on ARM cores, where none is at hand: exact counts, and predictions.

    python benchmarks/arm_analysis.py

The kernels are cross-compiled and run under qemu-user, which writes down every block of instructions that it
executes. From that follow

* instructions per vector FMA for the 13 blocks of MobileNetV1: exact, of a whole layer at batch 1;
* the inner loop of each kernel and its whole calls, which llvm-mca plays on its models of several cores, with
  all data in the first-level cache. The peak is what the model does with independent FMAs of the same kind;
* whether an inner loop touches the stack, as it would if the register tile were too large.

Red is below its target. It exits with 1 where the product misses one: the depthwise tiles, whose clamps and
copies run on the same units as their FMAs, cannot all reach theirs. It needs g++-aarch64-linux-gnu,
qemu-user-static and llvm, best of version 19 or later: earlier ones know the Neoverse cores by name only.
"""

import bisect
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CORES = ["cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1", "apple-m1"]
WIDE = CORES[1:]
PRODUCT, DEPTHWISE = "multiply_tile", ("channels_last_run", "channels_last_two_rows", "planar_rows")
# Of the peak, in the inner loop; and instructions of the product per vector FMA, summed over the network.
PRODUCT_TARGET, DEPTHWISE_TARGET, INSTRUCTIONS_TARGET = 0.90, 0.75, 1.35
# Whose calls are analysed: most of its pixels are away from the border.
ANALYSED = "block3"

Instruction = tuple[str, str]  # its name and operands
Path_ = tuple[int, ...]  # addresses of the blocks that a call went through


@dataclass
class Run:
    """What one layer executed."""

    blocks: dict[int, list[Instruction]] = field(default_factory=dict)
    times: Counter[int] = field(default_factory=Counter)
    calls: dict[str, Counter[Path_]] = field(default_factory=lambda: defaultdict(Counter))
    functions: dict[int, str] = field(default_factory=dict)  # of each block

    def count(self, name: str = "") -> tuple[int, int]:
        """Instructions and vector FMAs in the functions whose names begin like this."""
        total = fmas = 0
        for address, times in self.times.items():
            if self.functions[address] and self.functions[address].startswith(name):
                total += times * len(self.blocks[address])
                fmas += times * fmas_of(self.blocks[address])
        return total, fmas

    def listing(self, path: Path_) -> list[Instruction]:
        return [instruction for address in path for instruction in self.blocks[address]]


def is_fma(instruction: Instruction) -> bool:
    return instruction[0] in ("fmla", "fmls") and bool(re.match(r"v\d+\.(4s|2d)", instruction[1]))


def fmas_of(listing: list[Instruction]) -> int:
    return sum(map(is_fma, listing))


def tool(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        sys.exit(f"{name} was not found: install it (Debian, Ubuntu: apt-get install {package})")
    return path


def find_mca() -> str:
    for version in range(40, 18, -1):
        if path := shutil.which(f"llvm-mca-{version}"):
            return path
    return tool("llvm-mca", "llvm")


def build(folder: Path) -> Path:
    """The program that runs one layer, with the compiler of the aarch64 preset."""
    presets = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))["configurePresets"]
    (preset,) = (preset for preset in presets if preset["name"] == "aarch64")
    variables = {name: value for name, value in preset["cacheVariables"].items() if name.startswith("CMAKE_")}
    tool(variables["CMAKE_CXX_COMPILER"], "g++-aarch64-linux-gnu")
    # Linked statically, so that an address in the file is the address that the emulator sees.
    variables |= {"FASTSEP_SOURCE": str(ROOT), "CMAKE_EXE_LINKER_FLAGS": "-static"}
    configure = ["cmake", "-S", ROOT / "benchmarks" / "instructions", "-B", folder, "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in variables.items()]
    for command in (configure, ["cmake", "--build", folder]):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(result.stdout[-2000:] + result.stderr[-2000:])
    return folder / "fastsep_instructions"


def kernel_functions(program: Path) -> list[tuple[int, str]]:
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


def execute(program: Path, functions: list[tuple[int, str]], layer: str, layout: str) -> Run:
    """Runs a layer and reads the emulator's log: blocks as they are translated, and each one executed."""
    kernels = [address for address, name in functions if name]
    after = next(address for address, _ in functions if address > kernels[-1])
    starts = {address: name for address, name in functions if name}
    command = [
        tool("qemu-aarch64-static", "qemu-user-static"),
        "-d",
        "in_asm,exec,nochain",
        "-D",
        "/dev/stdout",
    ]
    command += ["-dfilter", f"{kernels[0]:#x}..{after - 1:#x}", str(program), layer, "forward", layout]
    run, block, call = Run(), 0, list[int]()
    addresses = [address for address, _ in functions]

    def finish() -> None:
        if call and (name := run.functions[call[0]]).startswith((PRODUCT, *DEPTHWISE)):
            run.calls[name][tuple(call)] += 1
        call.clear()

    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"Trace"):
                address = int(line.split(b"/", 2)[1], 16)
                name = run.functions.get(address)
                if name is None:
                    name = functions[bisect.bisect_right(addresses, address) - 1][1]
                    run.functions[address] = name
                run.times[address] += 1
                if address in starts or (call and name is not run.functions[call[0]]):
                    finish()
                call.append(address)
            elif line.startswith(b"IN:"):
                block = 0
            elif line.startswith(b"0x"):
                where, _, name_, *operands = line.decode().rstrip().split(None, 3)
                block = block or int(where[:-1], 16)
                run.blocks.setdefault(block, []).append((name_, *operands, "")[:2])
    finish()
    if process.returncode != 0:
        sys.exit(f"{program.name} {layer} forward {layout} ended with {process.returncode}")
    return run


def inner_loop(path: Path_) -> Path_:
    """The blocks between two visits of the one that was visited most."""
    most, _ = Counter(path).most_common(1)[0]
    visits = [i for i, address in enumerate(path) if address == most]
    rounds = Counter(path[a:b] for a, b in itertools.pairwise(visits))
    return rounds.most_common(1)[0][0] if rounds else path


def cycles(mca: str, core: str, listing: list[Instruction], rounds: int) -> float:
    """For one round."""
    # Where a branch goes does not matter to llvm-mca, which plays what it is given.
    lines = [
        f"{name} {re.sub('#?0x[0-9a-f]+$', '#-4', operands) if name[0] in 'bct' else operands}"
        for name, operands in listing
    ]
    command = [mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", f"-iterations={rounds}"]
    command += ["-instruction-info=0", "-resource-pressure=0"]
    result = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    total = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    if total is None:
        sys.exit(result.stderr[-2000:])
    return int(total[1]) / rounds


def peak(mca: str, core: str, listing: list[Instruction]) -> float:
    """FMAs per cycle of 24 independent sums, with a factor from a lane if those of the listing have it."""
    by_lane = sum("[" in operands for _, operands in filter(is_fma, listing)) * 2 > fmas_of(listing)
    chains = [("fmla", f"v{i}.4s, v30.4s, v31.{'s[0]' if by_lane else '4s'}") for i in range(24)]
    return len(chains) / cycles(mca, core, chains, 300)


def analysed(run: Run) -> list[tuple[str, Path_]]:
    """Of the product and each kind of depthwise tile the function that does most, and its typical call."""
    found = []
    for kind in (PRODUCT, *DEPTHWISE):
        work = {
            name: {path: fmas_of(run.listing(path)) * times for path, times in paths.items()}
            for name, paths in run.calls.items()
            if name.startswith(kind)
        }
        if work:
            name = max(work, key=lambda name: sum(work[name].values()))
            found.append((name, max(work[name], key=lambda path: (work[name][path], path))))
    return found


def predictions(mca: str, runs: dict[str, Run], console: Console) -> bool:
    """Whether the product's inner loops reach their target, and nothing spills."""
    passed = True
    title = f"Vector FMAs per cycle that {Path(mca).name} predicts, of the core's peak ({ANALYSED})"
    table = Table("kernel", "", *CORES, title=title, show_lines=True)
    for layout, run in runs.items():
        for name, path in analysed(run):
            is_product = name.startswith(PRODUCT)
            target = PRODUCT_TARGET if is_product else DEPTHWISE_TARGET
            for what, part, rounds in (("inner loop", inner_loop(path), 200), ("whole call", path, 1)):
                listing = run.listing(part)
                fmas, is_loop = fmas_of(listing), what == "inner loop"
                cells = []
                for core in CORES:
                    rate, most = fmas / cycles(mca, core, listing, rounds), peak(mca, core, listing)
                    missed = is_loop and core in WIDE and rate < target * most
                    passed &= not (missed and is_product)
                    cells.append(f"{'[red]' if missed else ''}{rate:.2f} of {most:.2f} {rate / most:4.0%}")
                stack = sum("[sp" in operands and "q" in operands for _, operands in listing)
                passed &= not (is_loop and stack)
                note = f"{what}: {len(listing)} instructions, {fmas} FMAs, {stack} vectors on the stack"
                table.add_row(f"{layout} {name}" if is_loop else "", note, *cells)
    console.print(table)
    return passed


def instructions(layers: list[str], runs: dict[tuple[str, str], Run], console: Console) -> bool:
    """Whether the product's sum is within its target in both layouts."""
    heads = [f"{layout} {part}" for layout in ("nhwc", "nchw") for part in ("product", "rest", "all")]
    table = Table("layer", *heads, title="Instructions per vector FMA, batch 1, forward")
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * 4)
    for layer in layers:
        cells = []
        for layout in ("nhwc", "nchw"):
            (part, fmas), (total, total_fmas) = (runs[layer, layout].count(name) for name in (PRODUCT, ""))
            counts = part, fmas, total - part, total_fmas - fmas
            sums[layout] = [a + b for a, b in zip(sums[layout], counts, strict=True)]
            cells += ratios(counts)
        table.add_row(layer, *cells)
    table.add_row("sum", *(cell for layout in ("nhwc", "nchw") for cell in ratios(sums[layout])))
    console.print(table)
    return all(part <= INSTRUCTIONS_TARGET * fmas for part, fmas, _, _ in sums.values())


def ratios(counts: tuple[int, ...] | list[int]) -> list[str]:
    part, fmas, rest, rest_fmas = counts
    return [f"{part / fmas:.3f}", f"{rest / rest_fmas:.2f}", f"{(part + rest) / (fmas + rest_fmas):.3f}"]


def network() -> dict[str, str]:
    """The blocks of MobileNetV1 and their sizes as the program takes them."""
    layers = {}
    for line in (
        (ROOT / "benchmarks" / "shapes" / "mobilenet_v1.txt").read_text(encoding="utf-8").splitlines()
    ):
        if line and not line.startswith("#"):
            f = dict(pair.split("=") for pair in line.partition("#")[0].split())
            layers[f["name"]] = "x".join(f.get(key, "1") for key in ("c", "h", "k", "kh", "sh"))
    return layers


def main() -> int:
    console = Console(width=200)
    mca = find_mca()
    with tempfile.TemporaryDirectory() as name:
        program = build(Path(name))
        functions = kernel_functions(program)
        layers, runs, known = network(), {}, {}
        for layer, sizes in layers.items():
            for layout in ("nhwc", "nchw"):
                if (sizes, layout) not in known:  # some blocks are alike
                    known[sizes, layout] = execute(program, functions, sizes, layout)
                runs[layer, layout] = known[sizes, layout]
    counted = instructions(list(layers), runs, console)
    predicted = predictions(mca, {layout: runs[ANALYSED, layout] for layout in ("nhwc", "nchw")}, console)
    return 0 if counted and predicted else 1


if __name__ == "__main__":
    sys.exit(main())
