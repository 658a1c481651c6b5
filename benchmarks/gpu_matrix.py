"""The measurements of benchmarks/gpu_check.sh, which see. Where something was measured before, it goes on.

    python benchmarks/gpu_matrix.py exercise          small problems through every kernel, for sanitizers
    python benchmarks/gpu_matrix.py measure FOLDER    a line of FOLDER/rows.jsonl for each cell of the matrix
    python benchmarks/gpu_matrix.py report FOLDER     FOLDER/result.json, factors.json, and a table

A cell is a layer, a batch, a dtype and a phase; in it all contenders take turns, in both layouts: fastsep as
it comes, its paths by themselves, torch's two convolutions, plain loops over the taps, torch.compile. At
batch 1 also from a CUDA graph. --dry-run measures tiny layers on the CPU, to show that all of it runs.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastsep import _cuda_kernels, _native, _plan
from fastsep._activations import ACTIVATIONS
from fastsep._case import DTYPES, LAYOUTS, Case, format_case, parse_case
from fastsep._check import SELF_TEST, operands
from fastsep.bench import contenders, engine, machine
from fastsep.bench.contenders import Subject, Task
from fastsep.bench.engine import Contender, Local, OnGpu, Race, Sample, geometric_mean
from fastsep.bench.layers import distinct, load, phase_operations, traffic

BATCHES = (128, 1, 32)
DTYPES_MEASURED = ("bfloat16", "tf32", "float16", "float32")
PATHS = _plan.FUSED, _plan.DEPTHWISE
GRAPH_CALLS = 16
UNFINISHED = 3  # the exit status where time ran out, known to gpu_check.sh
# Shorter than on a CPU, where interrupts disturb: a cell of ten contenders takes a third of a second.
engine.SAMPLE_SECONDS = 2e-3


@dataclass(frozen=True)
class Cell:
    case: Case  # of float32 where dtype is tf32
    dtype: str
    phase: str
    kind: str = ""  # "" or "compile", which takes seconds to make

    @property
    def key(self) -> str:
        return " ".join([self.case.name, f"batch {self.case.n}", self.dtype, self.phase, self.kind]).strip()


def cells(dry_run: bool) -> Iterator[Cell]:
    """The most telling ones first, for where time runs out."""
    layers = [*distinct(load("mobilenet_v1").layers), *load("gpu").layers]
    batches, dtypes = BATCHES, DTYPES_MEASURED
    if dry_run:
        layers = [replace(case, c=8, k=8, h=9, w=9) for case in (layers[0], layers[-1])]
        batches, dtypes = (2, 1), ("float32", "bfloat16")

    def sized(case: Case, batch: int, dtype: str) -> Case:
        return replace(case, n=batch, dtype="float32" if dtype == "tf32" else dtype)

    for batch in batches:
        for dtype, phase, case in itertools.product(dtypes, ("forward", "training"), layers):
            yield Cell(sized(case, batch, dtype), dtype, phase)
        for dtype, case in itertools.product(dtypes[:2], layers):
            half = replace(sized(case, batch, dtype), k=0, b=0, act="identity", name=f"{case.name}_depthwise")
            for phase in ("input-gradient", "weight-gradient"):
                yield Cell(half, dtype, phase)
    if not dry_run:
        for batch, phase, dtype, case in itertools.product(
            (128, 1), ("forward", "training"), dtypes[:2], layers
        ):
            yield Cell(sized(case, batch, dtype), dtype, phase, "compile")


class FromGraph(Contender):
    """Calls captured in a CUDA graph, timed by events."""

    def __init__(self, run: Callable[[], object]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(GRAPH_CALLS):
                run()
        self.replay = OnGpu(self.graph.replay)

    def sample(self, calls: int) -> Sample:
        replays = -(-calls // GRAPH_CALLS)
        taken = self.replay.sample(replays)
        share = calls / (replays * GRAPH_CALLS)
        return Sample(taken.seconds * share, taken.cpu_seconds * share)


class ByPath(Contender):
    """A contender of which one path is forced."""

    def __init__(self, contender: Contender, path: str) -> None:
        self.contender, self.path = contender, path

    def sample(self, calls: int) -> Sample:
        with _plan.force(self.path):
            return self.contender.sample(calls)


def naive(case: Case, x: Tensor, tensors: dict[str, Tensor | None]) -> Tensor:
    """A product and a sum over the plane for each tap, and a matrix product: torch's simplest operators."""
    _, dw, pw, db, b = operands(tensors)
    padded = F.pad(x, (case.pl, case.pr, case.pt, case.pb))
    if case.m > 1:
        padded = padded.repeat_interleave(case.m, 1)
    rows, columns = (case.oh - 1) * case.sh + 1, (case.ow - 1) * case.sw + 1
    total = 0 if db is None else db[:, None, None]
    for r, s in itertools.product(range(case.kh), range(case.kw)):
        top, left = r * case.dh, s * case.dw
        total = (
            total
            + dw[:, 0, r, s, None, None]
            * padded[:, :, top : top + rows : case.sh, left : left + columns : case.sw]
        )
    u = ACTIVATIONS[case.mid].forward(total)
    if pw is None:
        return u
    y = torch.einsum("nihw,ki->nkhw", u, pw[..., 0, 0])
    return ACTIVATIONS[case.act].forward(y if b is None else y + b[:, None, None])


def subjects_of(cell: Cell, device: str, stack: ExitStack) -> tuple[dict[str, Contender], list[str]]:
    """Who takes part in a cell, checked against each other; and why some do not."""
    made: dict[str, Contender] = {}
    remarks: list[str] = []
    for layout in LAYOUTS:
        task = Task(
            (case := replace(cell.case, layout=layout)), cell.phase, device, 1, case.tensors(device=device)
        )
        if cell.kind == "compile":
            if layout == "nhwc":
                made["compile"] = contenders.build(task, ["compile"], stack)["compile"].contender
            continue
        found = contenders.build(task, [], stack)
        found.pop("unfrozen", None)
        if cell.phase == "forward":
            run = partial(naive, case, task.input, task.tensors)
            kind = OnGpu if device == "cuda" else Local
            found["naive"] = Subject(kind(run), lambda run=run: [run()])
        contenders.verify(task, found)
        for name in ("fastsep", "naive"):
            if name in found:
                made[f"{name} {layout}"] = found[name].contender
        if f"torch {layout}" in found:
            made[f"torch {layout}"] = found[f"torch {layout}"].contender
        for path in PATHS if case.k else PATHS[1:]:
            with _plan.force(path):
                contenders.verify(task, {name: found[name] for name in ("fastsep", "torch nchw")})
            made[f"{path} {layout}"] = ByPath(found["fastsep"].contender, path)
        if cell.case.n == 1 and device == "cuda":
            for name in ("fastsep", f"torch {layout}"):
                try:
                    made[f"graph {name.split()[0]} {layout}"] = FromGraph(found[name].contender.run)
                except RuntimeError as error:
                    remarks.append(f"{name} {layout} in a graph: {error}")
    return made, remarks


def kernel_names(run: Callable[[], object]) -> list[str]:
    """Of the kernels that a call launches, in their order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def planned(cell: Cell, layout: str) -> list[str]:
    """What the model chooses for a cell, in the phases that it has."""
    problem = replace(cell.case, layout=layout).problem
    paths = dict.fromkeys((*PATHS, _plan.TORCH) if cell.case.k else (*PATHS[1:], _plan.TORCH), lambda: None)
    phases = [_plan.FORWARD] * (cell.phase in ("forward", "training"))
    phases += [_plan.BACKWARD] * (cell.phase != "forward")
    gpu = _plan.Gpu.of(0)
    return [_plan.by_model(problem, phase, cell.dtype == "tf32", gpu, paths).path for phase in phases]


def measure_cell(cell: Cell, device: str, seconds: float, bandwidth: float, peak: float) -> dict:
    row: dict = {
        "key": cell.key,
        "case": format_case(cell.case),
        "dtype": cell.dtype,
        "phase": cell.phase,
        "bytes": traffic(cell.case, cell.phase),
        "operations": phase_operations(cell.case, cell.phase),
    }
    row["roof"] = machine.Roof(peak, bandwidth).seconds(row["operations"], row["bytes"])
    with contenders.context(cell.phase), ExitStack() as stack:
        made, row["remarks"] = subjects_of(cell, device, stack)
        times = Race(made).run(seconds)
        if device == "cuda" and cell.kind == "":
            best = min(("torch nchw", "torch nhwc"), key=lambda name: times[name].median)
            row["kernels"] = kernel_names(made[best].run)
            row["planned"] = {layout: planned(cell, layout) for layout in LAYOUTS}
    row["seconds"] = {name: [t.low, t.median, t.high] for name, t in times.items()}
    return row


def set_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def rows_of(folder: Path) -> list[dict]:
    path = folder / "rows.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the time was up while it was written
            continue
    return rows


def measure(arguments: argparse.Namespace) -> int:
    device = "cpu" if arguments.dry_run else "cuda"
    begin, folder = time.monotonic(), arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in rows_of(folder) if "seconds" in row}
    open_cells = [cell for cell in cells(arguments.dry_run) if cell.key not in done]
    if not open_cells:
        return 0
    isa = "" if device == "cuda" else _native.core.best_isa()
    bandwidth = machine.measure_bandwidth(device)
    peaks: dict[str, float] = {}
    failed = 0
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")  # behind what a time limit may have cut off
        for cell in open_cells:
            if time.monotonic() - begin > arguments.seconds:
                break
            set_tf32(cell.dtype == "tf32")
            if cell.dtype not in peaks:
                peaks[cell.dtype] = machine.measure_peak(device, isa, cell.case.dtype, 1)
            try:
                row = measure_cell(cell, device, arguments.seconds_each, bandwidth, peaks[cell.dtype])
                row |= {"bandwidth": bandwidth, "peak": peaks[cell.dtype]}
            except (ArithmeticError, RuntimeError) as error:
                row, failed = {"key": cell.key, "error": str(error)[:2000]}, failed + 1
                print(f"{cell.key}: {error}", file=sys.stderr)
            file.write(json.dumps(row) + "\n")
            file.flush()
            if device == "cuda":
                torch.cuda.empty_cache()
    rows = rows_of(folder)
    left = len(list(cells(arguments.dry_run))) - len({row["key"] for row in rows})
    print(f"{len(rows)} cells measured, {left} left")
    return 1 if failed else (UNFINISHED if left else 0)


# ---- the report


def best(row: dict, name: str) -> float | None:
    """Median of a contender in its better layout."""
    found = [
        row["seconds"][f"{name} {layout}"][1] for layout in LAYOUTS if f"{name} {layout}" in row["seconds"]
    ]
    return min(found, default=None)


def factors(rows: list[dict]) -> dict[str, float]:
    """For fastsep/cuda_factors.json: measured over modelled time, in geometric mean over the layers."""
    gpu = _plan.Gpu.of(0)
    ratios: dict[str, list[float]] = {}
    for row in rows:
        case, tf32 = parse_case(row["case"]), row["dtype"] == "tf32"
        for layout, path in itertools.product(LAYOUTS, (*PATHS, _plan.TORCH)):
            name = f"{path} {layout}"
            if name not in row["seconds"] or row["phase"] not in ("forward", "training"):
                continue
            problem, seconds = replace(case, layout=layout).problem, row["seconds"][name][1]
            phase = _plan.FORWARD
            modelled = _plan.modelled(problem, _plan.FORWARD, path, gpu, tf32)
            if row["phase"] == "training":  # less the forward pass, which was measured too
                forward = next(
                    (r for r in rows if r["key"] == row["key"].replace("training", "forward")), None
                )
                if forward is None or name not in forward["seconds"]:
                    continue
                phase, seconds = _plan.BACKWARD, seconds - forward["seconds"][name][1]
                modelled = _plan.modelled(problem, _plan.BACKWARD, path, gpu, tf32)
            if seconds > 0:
                ratios.setdefault(_plan.factor_key(problem, phase, path, tf32), []).append(seconds / modelled)
    return {key: round(geometric_mean(found), 4) for key, found in sorted(ratios.items())}


def summary(rows: list[dict]) -> list[dict]:
    """By batch, dtype and phase: geometric means over the layers, against torch's better layout."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        fastsep, torch_ = best(row, "fastsep"), best(row, "torch")
        if fastsep and torch_:
            case = parse_case(row["case"])
            whole = "pair" if case.k else "depthwise"
            groups.setdefault((whole, case.n, row["dtype"], row["phase"]), []).append(row)
    found = []
    for (whole, batch, dtype, phase), members in groups.items():
        speedups = [best(row, "torch") / best(row, "fastsep") for row in members]
        graphs = [
            best(row, "graph torch") / best(row, "graph fastsep")
            for row in members
            if best(row, "graph fastsep")
        ]
        found.append(
            {
                "what": whole,
                "batch": batch,
                "dtype": dtype,
                "phase": phase,
                "layers": len(members),
                "speedup": geometric_mean(speedups),
                "slowest": min(speedups),
                "speedup_in_graphs": geometric_mean(graphs) if graphs else None,
                "terabytes_per_second": max(row["bytes"] / best(row, "fastsep") for row in members) / 1e12,
                "share_of_roof": geometric_mean(row["roof"] / best(row, "fastsep") for row in members),
            }
        )
    return found


def commit() -> str:
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    return os.environ.get("FASTSEP_COMMIT") or result.stdout.strip()


def report(arguments: argparse.Namespace) -> int:
    device, folder = "cpu" if arguments.dry_run else "cuda", arguments.folder
    rows = rows_of(folder)
    good = [row for row in rows if "seconds" in row]
    stages = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.stage"))}
    result = {
        "dry_run": arguments.dry_run,
        "device": machine.device_name(device),
        "versions": machine.versions(device),
        "commit": commit(),
        "stages": stages,
        "summary": summary(good),
        "rows": rows,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if device == "cuda" and good:
        found = {"gpus": {torch.cuda.get_device_name(0): factors(good)}}
        (folder / "factors.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console = Console(width=120)
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions(device).items())
    console.print(f"{result['device']}, {versions}, {result['commit']}", highlight=False)
    for name, text in stages.items():
        console.print(f"{name}: {text}", highlight=False)
    table = Table(
        "what", "batch", "dtype", "phase", "layers", "speedup", "slowest", "in graphs", "TB/s", "of roof"
    )
    for group in result["summary"]:
        numbers = [
            "" if group[name] is None else f"{group[name]:.2f}"
            for name in ("speedup", "slowest", "speedup_in_graphs", "terabytes_per_second", "share_of_roof")
        ]
        table.add_row(
            group["what"], str(group["batch"]), group["dtype"], group["phase"], str(group["layers"]), *numbers
        )
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"failed: {row['key']}: {row['error']}", markup=False)
    return 0


# ---- for sanitizers


def exercise(arguments: argparse.Namespace) -> int:
    """Forward and all gradients of small problems, by the native kernels and nothing of torch's."""
    if arguments.dry_run:
        print("exercise: nothing to run without a GPU")
        return 0
    lines = [
        *SELF_TEST,
        "name=wide n=2 c=136 h=9 w=10 k=136 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu6 act=relu",
    ]
    for line, dtype, layout in itertools.product(lines, ("float32", "tf32", "float16", "bfloat16"), LAYOUTS):
        case = replace(parse_case(line), dtype="float32" if dtype == "tf32" else dtype, layout=layout)
        set_tf32(dtype == "tf32")
        tensors = operands({name: None if t is None else t.cuda() for name, t in case.tensors().items()})
        geometry = (
            *((case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw)),
            *(case.mid, case.act),
        )
        needed = [tensor is not None for tensor in tensors]
        for path in PATHS[:1] if case.k else PATHS[1:]:
            with _plan.force(path), torch.no_grad():
                y = _cuda_kernels.forward_kernel(*tensors, None, *geometry)
                _cuda_kernels.backward_kernel(case.gradient().cuda(), *tensors, None, *geometry, needed)
                assert y.dtype is DTYPES[case.dtype]
    torch.cuda.synchronize()
    print("exercised")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for function in (measure, report, exercise):
        command = commands.add_parser(function.__name__)
        command.set_defaults(run=function)
        command.add_argument("--dry-run", action="store_true", help="on the CPU, tiny layers")
        if function is not exercise:
            command.add_argument("folder", type=Path)
        if function is measure:
            command.add_argument(
                "--seconds", type=float, default=200.0, help="to go on for (default: %(default)s)"
            )
            command.add_argument("--seconds-each", type=float, default=0.0, help="for a cell, at least")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu_matrix: torch finds no GPU here; --dry-run runs on the CPU", file=sys.stderr)
        return 2
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
