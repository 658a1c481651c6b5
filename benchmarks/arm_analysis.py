"""What to expect of the NEON kernels on ARM cores, where none is at hand: exact counts, and predictions.

    python benchmarks/arm_analysis.py                       all of it
    python benchmarks/arm_analysis.py --counts [LAYER ...]  the counts alone, without llvm-mca
    python benchmarks/arm_analysis.py --tiles               the product with other register tiles

The kernels are cross-compiled and run under qemu-user, which writes down every block of instructions that it
executes (arm_trace.py). From that follow

* instructions per vector FMA for the blocks of MobileNetV1: exact, of a whole layer at batch 1;
* the inner loop of each kernel and its whole calls, which llvm-mca plays on its models of several cores, with
  all data in the first-level cache. The peak is what the model does with independent FMAs of the same kind;
* whether an inner loop touches the stack, as it would if the register tile were too large.

Red is below its target. It exits with 1 where the product misses one, and where a depthwise tile does worse
than is recorded here: clamps run on the same units as its FMAs, so some cores leave little above its target.

It needs g++-aarch64-linux-gnu, qemu-user-static and, but for --counts, llvm, best the newest. Which model
stands for a core is llvm-mca's choice: the table names it, and says "not modelled" where it is another's.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import arm_trace
from arm_trace import DEPTHWISE, PRODUCT, ROOT, Instruction, Path_, Run, fmas_of, is_fma
from rich.console import Console
from rich.table import Table

# The cores, and what begins the names of the units of the model that is to stand for each: Cortex-A57 for the
# A72, Neoverse N1 for the A76, whose form for servers it is, and Cyclone, of 2013, for Apple's.
CORES = {
    "cortex-a53": "A53",
    "cortex-a72": "A57",
    "cortex-a76": "N1",
    "neoverse-n1": "N1",
    "neoverse-v1": "V1",
    "apple-m1": "Cy",
}
WIDE = list(CORES)[1:]
# Of the peak, in the inner loop; and instructions of the product per vector FMA, summed over the network.
PRODUCT_TARGET, DEPTHWISE_TARGET, INSTRUCTIONS_TARGET = 0.90, 0.75, 1.35
# What depthwise tiles reach on each of CORES, in percent of the peak, by LLVM 23 and GCC 12, less 2; on a
# wide core not below the target.
FLOORS = {
    "channels_last_sweep": (42, 88, 75, 75, 80, 93),
    "planar_sweep": (28, 88, 75, 75, 80, 93),
}
# Whose calls are analysed: most of its pixels are away from the border.
ANALYSED = "block3"
# Of the product, rows and vectors of columns: channels-last and, beside each, NCHW.
TILES = [(8, 2, 8, 3), (6, 3, 8, 2), (7, 3, 6, 3), (5, 4, 5, 4), (4, 4, 4, 4)]


def find_mca() -> str:
    for version in range(40, 13, -1):
        if path := shutil.which(f"llvm-mca-{version}"):
            return path
    return arm_trace.tool("llvm-mca", "llvm")


def play(mca: str, core: str, listing: list[Instruction], rounds: int) -> str:
    """What llvm-mca says of some instructions."""
    # Where a branch goes does not matter to llvm-mca, which plays what it is given.
    lines = [
        f"{name} {re.sub('#?0x[0-9a-f]+$', '#-4', operands) if name[0] in 'bct' else operands}"
        for name, operands in listing
    ]
    command = [mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", f"-iterations={rounds}"]
    command += ["-instruction-info=0"]
    result = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(result.stderr[-2000:])
    return result.stdout


def cycles(mca: str, core: str, listing: list[Instruction], rounds: int) -> float:
    """For one round."""
    total = re.search(r"Total Cycles:\s+(\d+)", play(mca, core, listing, rounds))
    assert total is not None
    return int(total[1]) / rounds


def models(mca: str) -> dict[str, str]:
    """What begins the names of each core's units: that of the model which llvm-mca has for it."""
    found = {}
    for core in CORES:
        unit = re.search(r"^\[0(?:\.0)?\]\s+- (\w+?)Unit", play(mca, core, [("nop", "")], 1), re.M)
        found[core] = unit[1] if unit else "none"
    return found


def headings(mca: str) -> tuple[str, list[str], list[str]]:
    """The version, the heads of the columns of the cores, and the cores that have a model."""
    known = models(mca)
    modelled = [core for core in CORES if known[core] == CORES[core]]
    version = subprocess.run([mca, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"LLVM version ([\d.]+)", version)
    return (
        f"LLVM {release[1] if release else '?'}",
        [f"{core}\n(by {known[core]})" for core in CORES],
        modelled,
    )


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


def least(kind: str, core: str) -> float:
    """The share of the peak below which the analysis fails."""
    if kind == PRODUCT:
        return PRODUCT_TARGET if core in WIDE else 0
    return FLOORS[kind][list(CORES).index(core)] / 100


def predictions(mca: str, runs: dict[str, Run], console: Console) -> bool:
    """Whether the inner loops reach what they must, and nothing spills."""
    release, heads, modelled = headings(mca)
    title = f"Vector FMAs per cycle that {release} predicts, of the core's peak ({ANALYSED})"
    table = Table("kernel", "", *heads, title=title, show_lines=True)
    below, faults = list[str](), list[str]()

    def cell(name: str, core: str, listing: list[Instruction], *, is_loop: bool) -> str:
        if core not in modelled:
            return "not modelled"
        rate, most = (
            fmas_of(listing) / cycles(mca, core, listing, 200 if is_loop else 1),
            peak(mca, core, listing),
        )
        target = PRODUCT_TARGET if PRODUCT in name else DEPTHWISE_TARGET
        missed = is_loop and core in WIDE and rate < target * most
        if missed:
            below.append(f"{name} on {core}: {rate / most:.1%} of the peak, not {target:.0%}")
        if is_loop and rate < least(kind_of(name), core) * most:
            faults.append(f"{name} on {core}: {rate / most:.1%} of the peak")
        return f"{'[red]' if missed else ''}{rate:.2f} of {most:.2f} {rate / most:4.0%}"

    for layout, run in runs.items():
        for function, path in analysed(run):
            name = f"{layout} {function}"
            loop, whole = run.listing(arm_trace.inner_loop(path)), run.listing(path)
            stack = arm_trace.stack_of_loop(run, path)
            if stack > 0:
                faults.append(f"{name}: {stack} instructions of the inner loop use the stack")
            for what, listing, used in (
                ("inner loop", loop, stack),
                ("whole call", whole, sum(arm_trace.stack_accesses(whole))),
            ):
                note = f"{what}: {len(listing)} instructions, {fmas_of(listing)} FMAs, {used} use the stack"
                cells = [cell(name, core, listing, is_loop=listing is loop) for core in CORES]
                table.add_row(name if listing is loop else "", note, *cells)
    console.print(table)
    console.print("Below their targets:", *below, sep="\n  ")
    for fault in faults:
        console.print(f"[red]FAILED {fault}")
    return not faults


def kind_of(name: str) -> str:
    return next(kind for kind in (PRODUCT, *DEPTHWISE) if f"{kind}<" in name)


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


def alternative(folder: Path, tile: tuple[int, ...]) -> Path:
    """The program with another register tile: kernels compiled anew, which the linker meets first."""
    source = (ROOT / "csrc" / "cpu" / "neon.cpp").read_text(encoding="utf-8")
    names = ("rows", "columns", "planar_rows", "planar_columns")
    for name, value in zip(names, tile, strict=True):
        source, found = re.subn(rf"\b{name} = \d+", f"{name} = {value}", source)
        assert found == 1, name
    changed = folder / f"neon_{'_'.join(map(str, tile))}.cpp"
    changed.write_text(source, encoding="utf-8")
    commands = json.loads((folder / "compile_commands.json").read_text(encoding="utf-8"))
    command = shlex.split(next(each["command"] for each in commands if each["file"].endswith("cpu/neon.cpp")))
    program = changed.with_suffix("")
    compiled = changed.with_suffix(".o")
    flags = command[1 : command.index("-o")]
    arm_trace.execute_or_exit(command[0], *flags, f"-I{ROOT / 'csrc/cpu'}", "-o", compiled, "-c", changed)
    main = folder / "CMakeFiles/fastsep_instructions.dir/benchmarks/instructions/main.cpp.o"
    arm_trace.execute_or_exit(
        command[0], "-static", "-o", program, main, compiled, folder / "libfastsep_core.a"
    )
    return program


def compare_tiles(mca: str, folder: Path, console: Console) -> None:
    """The inner loop of the product with each of TILES."""
    release, heads, modelled = headings(mca)
    table = Table(
        "layout", "tile", "FMAs", "of", *heads, title=f"FMAs per cycle of the product, by {release}"
    )
    arm_trace.build(folder)
    sizes = network()[ANALYSED]
    for tile in TILES:
        program = alternative(folder, tile)
        functions = arm_trace.kernel_functions(program)
        for layout, shape in (("nhwc", tile[:2]), ("nchw", tile[2:])):
            run = arm_trace.execute(program, functions, sizes, layout)
            listing = run.listing(arm_trace.inner_loop(dict(analysed(run)[:1]).popitem()[1]))
            fmas = fmas_of(listing)
            cells = [
                f"{fmas / cycles(mca, core, listing, 200):.2f}" if core in modelled else "-" for core in CORES
            ]
            table.add_row(layout, f"{shape[0]} x {shape[1]}", str(fmas), str(len(listing)), *cells)
    console.print(table)


def count_all(program: Path, layers: dict[str, str]) -> dict[tuple[str, str], Run]:
    functions = arm_trace.kernel_functions(program)
    runs, known = {}, {}
    for layer, sizes in layers.items():
        for layout in ("nhwc", "nchw"):
            if (sizes, layout) not in known:  # some blocks are alike
                known[sizes, layout] = arm_trace.execute(program, functions, sizes, layout)
            runs[layer, layout] = known[sizes, layout]
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layers", nargs="*", help="with --counts: the blocks to count (default: all)")
    parser.add_argument("--counts", action="store_true", help="count instructions, predict nothing")
    parser.add_argument("--tiles", action="store_true", help="predict the product with other register tiles")
    parser.add_argument(
        "--build", type=Path, help="a build folder of the preset aarch64 (default: a new one)"
    )
    parsed = parser.parse_args()
    layers, console = network(), Console(width=200)
    if unknown := [name for name in parsed.layers if name not in layers]:
        parser.error(f"layers must be among {', '.join(layers)}, got {unknown[0]}")
    if parsed.layers and not parsed.counts:
        parser.error("layers are named for --counts alone")
    with tempfile.TemporaryDirectory() as name:
        folder = parsed.build.resolve() if parsed.build else Path(name)
        if parsed.tiles:
            compare_tiles(find_mca(), folder, console)
            return 0
        mca = None if parsed.counts else find_mca()
        chosen = {name: layers[name] for name in parsed.layers or layers}
        runs = count_all(arm_trace.build(folder), chosen)
    passed = instructions(list(chosen), runs, console)
    if mca is not None:
        passed &= predictions(mca, {layout: runs[ANALYSED, layout] for layout in ("nhwc", "nchw")}, console)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
