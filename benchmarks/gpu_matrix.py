"""The measurements of benchmarks/gpu_check.sh, which see. Where something was measured before, it goes on.

    python benchmarks/gpu_matrix.py exercise          gpu_exercise.py, which see
    python benchmarks/gpu_matrix.py measure FOLDER    a line of FOLDER/rows.jsonl for each cell of the matrix
    python benchmarks/gpu_matrix.py report FOLDER     FOLDER/result.json, factors.json, and a table

A cell is a layer, a batch, a dtype and a phase; in it all contenders take turns, in both layouts: fastsep as
it comes, its paths by themselves, torch's two convolutions, plain loops over the taps, torch.compile. At
batch 1 also from a CUDA graph. --hopper: the kernel for compute capability 9.0 and the portable one alone,
on a GPU that runs both. --dry-run measures tiny layers on the CPU, to show that all of it runs.
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
from pathlib import Path

import gpu_report
import torch
import torch.nn.functional as F
from gpu_exercise import exercise, set_tf32
from torch import Tensor

from fastsep import _cuda_model, _native, _plan
from fastsep._activations import ACTIVATIONS
from fastsep._case import LAYOUTS, Case, format_case
from fastsep._check import operands
from fastsep._cuda_model import ADDMM, BACKWARD, DEPTHWISE, FORWARD, FUSED, HOPPER, TORCH
from fastsep.bench import contenders, engine, machine
from fastsep.bench.contenders import Subject, Task
from fastsep.bench.engine import Contender, Local, OnGpu, Race, Sample
from fastsep.bench.layers import distinct, load, phase_operations, traffic

BATCHES = (128, 1, 32)
DTYPES_MEASURED = ("bfloat16", "tf32", "float16", "float32")
GRAPH_CALLS = 16
UNFINISHED = 3  # the exit status where time ran out, known to gpu_check.sh
# Shorter than on a CPU, where interrupts disturb: a cell of ten contenders takes a third of a second.
engine.SAMPLE_SECONDS = 2e-3


@dataclass(frozen=True)
class Cell:
    case: Case  # of float32 where dtype is tf32
    dtype: str
    phase: str
    kind: str = ""  # "", "hopper", or "compile" and a layout: a program that takes seconds to make

    @property
    def key(self) -> str:
        return " ".join([self.case.name, f"batch {self.case.n}", self.dtype, self.phase, self.kind]).strip()


def cells(dry_run: bool) -> list[Cell]:
    """For where time runs out, those of a target first, and what torch.compile makes last."""

    def turn(cell: Cell) -> int:
        if cell.case.k:
            of_a_target = cell.dtype == "bfloat16" and cell.case.n in (128, 1)
        else:
            of_a_target = cell.case.n == 128
        return 2 if cell.kind else 0 if of_a_target else 1

    return sorted(_all_cells(dry_run), key=turn)


def _all_cells(dry_run: bool) -> Iterator[Cell]:
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
        for dtype, case in itertools.product(("bfloat16", "float32"), layers):
            for phase in ("input-gradient", "weight-gradient"):
                yield Cell(gpu_report.half(sized(case, batch, dtype)), dtype, phase)
    if not dry_run:
        for layout, batch, dtype, phase, case in itertools.product(
            ("nhwc", "nchw"), batches, dtypes, ("forward", "training"), layers
        ):
            yield Cell(sized(case, batch, dtype), dtype, phase, f"compile {layout}")


def hopper_cells() -> list[Cell]:
    """What the kernel for compute capability 9.0 takes on this machine's GPU: nothing on another."""
    layers = [*distinct(load("mobilenet_v1").layers), *load("gpu").layers]
    found = []
    for batch, dtype, layer in itertools.product(BATCHES, ("bfloat16", "float16"), layers):
        case = replace(layer, n=batch, dtype=dtype, layout="nhwc")
        if torch.cuda.is_available() and _native.cuda.has_hopper_kernel(case.problem, 0):
            found.append(Cell(case, dtype, FORWARD, HOPPER))
    return found


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


def naive_run(task: Task) -> Callable[[], list[Tensor]]:
    """One forward pass by naive(), or one with all gradients."""
    case = task.case
    if task.phase == "forward":
        return lambda: [naive(case, task.input, task.tensors)]
    given = {name: None if t is None else t.clone().requires_grad_() for name, t in task.tensors.items()}
    names = "input", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias"
    leaves = [tensor for name in names if (tensor := given[name]) is not None]
    grad = case.gradient(device=task.device)

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(naive(case, leaves[0], given), leaves, grad))

    return step


def own_paths(case: Case, phase: str) -> list[str]:
    """Those that are measured by themselves; torch's alone is among the contenders anyway."""
    if not case.k:
        return [DEPTHWISE]
    return [FUSED, DEPTHWISE] + [ADDMM] * (case.layout == "nhwc" and phase == "forward")


def forced(task: Task, found: dict[str, Subject], path: str) -> Contender:
    """One path of fastsep's, checked against torch."""
    with _plan.force(path):
        contenders.verify(task, {name: found[name] for name in ("fastsep", "torch nchw")})
    return ByPath(found["fastsep"].contender, path)


def subjects_of(cell: Cell, device: str, stack: ExitStack) -> tuple[dict[str, Contender], list[str]]:
    """Who takes part in a cell, checked against each other; and why some do not."""
    made: dict[str, Contender] = {}
    remarks: list[str] = []
    for layout in LAYOUTS:
        task = Task(
            (case := replace(cell.case, layout=layout)), cell.phase, device, 1, case.tensors(device=device)
        )
        if cell.kind.startswith("compile"):
            if cell.kind == f"compile {layout}":
                made[cell.kind] = contenders.build(task, ["compile"], stack)["compile"].contender
            continue
        if cell.kind == HOPPER and layout != "nhwc":
            continue
        found = contenders.build(task, [], stack)
        found.pop("unfrozen", None)
        if cell.kind == HOPPER:
            made |= {f"{path} {layout}": forced(task, found, path) for path in (FUSED, HOPPER)}
            continue
        if cell.phase in ("forward", "training"):
            run = naive_run(task)
            found["naive"] = Subject((OnGpu if device == "cuda" else Local)(run), run)
        contenders.verify(task, found)
        for name in ("fastsep", "naive"):
            if name in found:
                made[f"{name} {layout}"] = found[name].contender
        if f"torch {layout}" in found:
            made[f"torch {layout}"] = found[f"torch {layout}"].contender
        for path in own_paths(case, cell.phase):
            made[f"{path} {layout}"] = forced(task, found, path)
        # Not the backward pass alone: its forward pass ran on another stream than that of the capture.
        if cell.case.n == 1 and device == "cuda" and cell.phase in ("forward", "training"):
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
    case = replace(cell.case, layout=layout)
    phases = [FORWARD] * (cell.phase in ("forward", "training")) + [BACKWARD] * (cell.phase != "forward")
    gpu, tf32, asked = _cuda_model.Gpu.of(0), cell.dtype == "tf32", gpu_report.asked_of(case)

    def chosen(phase: str) -> str:
        paths = dict.fromkeys([*own_paths(case, phase), TORCH], lambda: None)
        allowed = not _plan.why_not(case.problem, phase, HOPPER, tf32, asked, gpu)
        if allowed and _native.cuda.has_hopper_kernel(case.problem, 0):
            paths[HOPPER] = lambda: None
        return _plan.by_model(case.problem, phase, tf32, gpu, paths, asked).path

    return [chosen(phase) for phase in phases]


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
    if arguments.hopper:
        wanted = hopper_cells()
    else:
        wanted = [cell for cell in cells(arguments.dry_run) if bool(cell.kind) == arguments.compiled]
    open_cells = [cell for cell in wanted if cell.key not in done]
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
    tried = {row["key"] for row in rows_of(folder)}
    left = sum(cell.key not in tried for cell in wanted)
    print(f"{len(wanted) - left} cells measured, {left} left")
    return 1 if failed else (UNFINISHED if left else 0)


# ---- the report


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
    held, offenders = gpu_report.slower(good)
    stages = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.stage"))}
    result = {
        "dry_run": arguments.dry_run,
        "device": machine.device_name(device),
        "versions": machine.versions(device),
        "commit": commit(),
        "stages": stages,
        "targets": [target.as_json() for target in gpu_report.targets(good)],
        "held_against_torch": held,
        "slower_than_torch": offenders,
        "summary": gpu_report.summary(good),
        "hopper": gpu_report.hopper_gains(good),
        "rows": rows,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if device == "cuda" and good:
        found = {"gpus": {torch.cuda.get_device_name(0): gpu_report.factors(good)}}
        (folder / "factors.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(gpu_report.text(result), end="")
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
        if function is not report:
            command.add_argument("--hopper", action="store_true", help="the kernel for 9.0 alone")
        if function is measure:
            command.add_argument(
                "--seconds", type=float, default=200.0, help="to go on for (default: %(default)s)"
            )
            command.add_argument(
                "--compiled", action="store_true", help="torch.compile's cells, not the others"
            )
            command.add_argument("--seconds-each", type=float, default=0.0, help="for a cell, at least")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu_matrix: torch finds no GPU here; --dry-run runs on the CPU", file=sys.stderr)
        return 2
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
