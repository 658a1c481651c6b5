"""This checkout against an earlier revision: instructions of three layers, and the times of a network.

    python benchmarks/regression.py [--instructions] [REVISION]

REVISION is by default the merge base with main, or the commit before where that is this one. Instructions
are counted by callgrind, whose counts repeat on the busiest machine: it exits with 1 where they grew by more
than 3 %, and with 2 where they could not be counted, unless the revision has another contract, for which the
program that is counted does not compile. Times are shown beside them, but for --instructions; on a shared
machine they prove nothing.

callgrind knows no AVX-512, so the kernels counted are those for AVX2. It needs valgrind, cmake, ninja and a
compiler.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import compare
from rich.console import Console
from rich.table import Table

from fastsep.bench.engine import Timing
from fastsep.bench.report import Report

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["block5", "block12", "kernel5_14x512"]
RUNS = [("forward", "nhwc"), ("forward", "nchw"), ("backward", "nhwc")]
ALLOWED = 0.03
ISA = "avx2"
# Two passes of each checkout, one after the other, so that a machine that becomes busier slows both.
PASSES, SECONDS = 2, "4"


def git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def default_revision() -> str:
    """Empty where there is none to compare with."""
    head = git("rev-parse", "HEAD")
    for main in ("origin/main", "main"):
        base = git("merge-base", "HEAD", main)
        if base and base != head:
            return base
    return git("rev-parse", "--verify", "HEAD^")


class ContractError(RuntimeError):
    """The program that is counted does not know the contract of a checkout."""


def build(source: Path, folder: Path, *, module: bool) -> Path:
    """The program that runs layers on a checkout's core, and with `module` the checkout's Python module.

    RuntimeError where the checkout does not build.
    """
    configure = ["cmake", "-S", ROOT / "benchmarks" / "instructions", "-B", folder, "-G", "Ninja"]
    configure += [
        f"-DFASTSEP_SOURCE={source}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    # Kernels that callgrind cannot run need not be compiled, unless Python is to be timed with them.
    configure += (
        ["-DFASTSEP_PYTHON=ON", "-DFASTSEP_CUDA=OFF"] if module else ["-DFASTSEP_COMPILES_AVX512=OFF"]
    )
    make = ["cmake", "--build", folder]
    core, program = ([*make, "--target", target] for target in ("fastsep_core", "fastsep_instructions"))
    for command in (configure, core, program, make):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            said = f"{result.stdout[-2000:]}{result.stderr[-2000:]}"
            failed = re.findall(r"^FAILED: .*", result.stdout, re.M)
            if failed and all("fastsep_instructions.dir/main.cpp" in line for line in failed):
                raise ContractError(f"{source} has another contract:\n{said}")
            raise RuntimeError(f"{source} does not build here:\n{said}")
    return folder / "fastsep_instructions"


def count(program: Path, layer: str, phase: str, layout: str) -> int:
    """Instructions of one call."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "callgrind"
        options = ["--tool=callgrind", "--toggle-collect=measured", f"--callgrind-out-file={output}"]
        result = subprocess.run(
            ["valgrind", *options, program, layer, phase, layout],
            env={**os.environ, "FASTSEP_ISA": ISA},
            capture_output=True,
            text=True,
        )
        text = output.read_text(encoding="utf-8") if output.exists() else ""
        counted = re.search(r"^(?:summary|totals): (\d+)", text, re.M)
        if result.returncode != 0 or counted is None:
            raise RuntimeError(f"{layer} {phase} {layout} was not counted: {result.stderr[-2000:]}")
        return int(counted[1])


def instructions(before: Path, now: Path, console: Console) -> bool:
    """Whether none of the layers takes more than it may."""
    table = Table(title=f"Million instructions, {ISA}, batch 1, 1 thread")
    for head in ("layer", "before", "now", "change"):
        table.add_column(head, justify="left" if head == "layer" else "right")
    passed = True
    for layer in LAYERS:
        for phase, layout in RUNS:
            old, new = (count(program, layer, phase, layout) for program in (before, now))
            change = new / old - 1
            passed &= change <= ALLOWED
            colour = "red" if change > ALLOWED else "green" if change < -ALLOWED else "default"
            cells = f"{old / 1e6:.2f}", f"{new / 1e6:.2f}", f"[{colour}]{change:+.2%}[/]"
            table.add_row(f"{layer} {phase} {layout}", *cells)
    console.print(table)
    return passed


def times(source: Path, folder: Path, console: Console) -> None:
    """Of the default network, by each checkout's own command, in turn."""
    results: dict[str, list[Report]] = {"before": [], "now": []}
    for _ in range(PASSES):
        for name, path in (("before", source), ("now", ROOT)):
            command = [sys.executable, "-m", "fastsep", "bench", "--json", "--seconds", SECONDS]
            environment = {**os.environ, "PYTHONPATH": str(path)}
            result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if result.returncode != 0:
                console.print(f"Times are not compared, {name}: {result.stderr[-2000:]}", markup=False)
                return
            file = folder / f"{name}.json"
            file.write_text(result.stdout, encoding="utf-8")
            try:
                results[name].append(compare.read(file))
            except ValueError as error:
                console.print(f"Times are not compared: {error}.", markup=False)
                return
    try:
        compare.show(pooled(results["before"]), pooled(results["now"]), console)
    except ValueError as error:
        console.print(f"Times are not compared: {error}.", markup=False)


def pooled(passes: list[Report]) -> Report:
    """As one result: means of the medians, and the outermost quartiles, between which all passes lie."""
    rows = []
    for same in zip(*(report.rows for report in passes), strict=True):
        found = {name: [row.times[name] for row in same if name in row.times] for name in same[0].times}
        rows.append(replace(same[0], times={name: pooled_timing(times) for name, times in found.items()}))
    return replace(passes[0], rows=rows)


def pooled_timing(times: list[Timing]) -> Timing:
    mean = sum(timing.median for timing in times) / len(times)
    low, high = min(timing.low for timing in times), max(timing.high for timing in times)
    return Timing(mean, low, high, sum(timing.rounds for timing in times))


def main() -> int:
    console = Console(width=100)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", nargs="?", metavar="REVISION")
    parser.add_argument("--instructions", action="store_true", help="only these, and no times")
    options = parser.parse_args()
    revision = options.revision
    if revision is None:
        revision = default_revision()
    if not revision:
        console.print("There is no earlier revision here to compare with.")
        return 0
    full = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    if not full:
        print(f"revision must be a commit of this repository, got {revision!r}", file=sys.stderr)
        return 2
    for tool in ("valgrind", "cmake", "ninja"):
        if shutil.which(tool) is None:
            print(
                f"{tool} was not found: install it (Debian, Ubuntu: apt-get install {tool})", file=sys.stderr
            )
            return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "before"
        source.mkdir()
        archive = subprocess.run(["git", "archive", full], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
        console.print(f"Compared with {git('log', '-1', '--format=%h %s', full)}")
        try:
            now = build(ROOT, folder / "build_now", module=False)
            try:
                before = build(source, folder / "build_before", module=not options.instructions)
            except ContractError as error:
                console.print(f"Not compared: {error}", markup=False)
                return 0
            passed = instructions(before, now, console)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 2
        if not options.instructions:
            times(source, folder, console)
    if not passed:
        console.print(f"Instructions grew by more than {ALLOWED:.0%}.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
