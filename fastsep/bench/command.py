"""python -m fastsep bench: fastsep against torch's own convolutions, on this machine."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from .. import __version__, _native
from .._case import LAYOUTS, Case, format_case
from .arguments import checked, count
from .compare import candidates, verify
from .engine import race
from .layers import load, names
from .report import Report, Row, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--network",
        type=checked(load),
        default="mobilenet_v1",
        help=f"{', '.join(names())} (default: %(default)s), or a file of layers",
    )
    parser.add_argument("--batch", type=count, default=1, help="images (default: %(default)s)")
    parser.add_argument("--threads", type=count, default=1, help="torch's threads (default: %(default)s)")
    parser.add_argument(
        "--layout", choices=list(LAYOUTS), default="nhwc", help="fastsep's (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=25.0, help="to measure for, in all (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 where fastsep and torch disagree or there is nothing to measure."""
    if _native.core is None:
        print(f"fastsep: the native module is missing: {_native.missing}", file=sys.stderr)
        return 1
    batch, threads, layout = arguments.batch, arguments.threads, arguments.layout
    network, layers = arguments.network
    cases = [replace(case, n=batch, layout=layout) for case in layers]
    isa = _native.core.best_isa()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            rows = [
                measure(case, isa, threads, arguments.seconds / len(cases))
                for case in track(cases, "measuring", console=Console(stderr=True), transient=True)
            ]
    except ArithmeticError as error:
        print(f"fastsep: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    versions = {"fastsep": __version__, "torch": torch.__version__}
    report = Report(network, batch, threads, layout, isa, processor(), versions, rows)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = 100
        show(report, console)
    return 0


def measure(case: Case, isa: str, threads: int, seconds: float) -> Row:
    """Checks a layer, then times it; the peak is taken beside it, as clocks change with load and heat."""
    runs = candidates(case)
    verify(case, runs)
    peak = _native.core.fma_peak(isa, case.problem[16], 0.05) * threads
    return Row(format_case(case), race(runs, seconds=seconds), peak)


def processor() -> str:
    """The processor's name, as the operating system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
