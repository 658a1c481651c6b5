"""python -m fastsep bench: fastsep against torch's own convolutions and other runtimes, on this machine."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from .. import _native
from .._case import DTYPES, LAYOUTS, Case, format_case
from . import contenders, networks, peers, plot
from .arguments import checked, count, duration
from .engine import race
from .layers import PHASES, Network, load, names, phase_operations, traffic
from .machine import Load, cores, device_name, fixed_threads, measure_bandwidth, measure_peak, versions
from .report import Report, Row, write_whole
from .table import show

DEVICES = ["cpu", "cuda"]
TARGETS = ["json", "csv", "plot"]  # options that name files


@checked
def against(text: str) -> list[str]:
    """A list of contenders."""
    named = text.split(",")
    for name in named:
        if name not in contenders.AGAINST:
            raise ValueError(
                f"must be some of {', '.join(contenders.AGAINST)} with commas between, got {name!r}"
            )
        if name in peers.RUNTIMES and (reason := peers.missing(name)):
            raise ValueError(reason)
    return named


@checked
def layer(line: str) -> Network:
    """One layer."""
    if "=" not in line:
        raise ValueError(
            f'must be a layer such as "c=32 h=56 w=56 k=64 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1", got {line!r}'
        )
    return load(line)


@checked
def network(text: str) -> Network:
    """Layers by name or file; of torchvision and timm the whole network alone."""
    if networks.is_of_library(text):
        return Network(text, [])
    try:
        return load(text)
    except ValueError as error:
        if not text.isidentifier():
            raise
        raise ValueError(
            f"{error}; a network of torchvision is measured by --whole --network torchvision/{text}"
        ) from None


@checked
def file(text: str) -> str:
    """A file's name, or - for the standard output."""
    if not text:
        raise ValueError("must be a file's name, got ''")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--network",
        type=network,
        default="mobilenet_v1",
        help=f"{', '.join(names())} (default: %(default)s), or a file of layers; with --whole also "
        "torchvision/NAME and timm/NAME",
    )
    what.add_argument("--layer", type=layer, help="a layer, written as those of benchmarks/shapes are")
    parser.add_argument("--whole", action="store_true", help="the network in one piece, for inference")
    parser.add_argument("--phase", choices=PHASES, default="forward", help=phases())
    parser.add_argument(
        "--against",
        type=against,
        default=["torch"],
        metavar="NAMES",
        help=f"some of {','.join(contenders.AGAINST)}; torch always takes part (default: torch)",
    )
    parser.add_argument("--batch", type=count, default=1, help="images (default: %(default)s)")
    parser.add_argument("--threads", type=count, default=1, help="of each contender (default: %(default)s)")
    parser.add_argument(
        "--layout", choices=list(LAYOUTS), default="nhwc", help="fastsep's (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64", "float16", "bfloat16"],
        default="float32",
        help="(default: %(default)s)",
    )
    parser.add_argument("--device", choices=DEVICES, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--seconds", type=duration, default=25.0, help="to measure for, in all (default: %(default)s)"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", type=file, metavar="FILE", help="write JSON, instead of the table"
    )
    parser.add_argument(
        "--csv", nargs="?", const="-", type=file, metavar="FILE", help="write CSV, instead of the table"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result: .png, .svg or .pdf")


def phases() -> str:
    return "; ".join(f"{name}: {text}" for name, text in PHASES.items()) + " (default: %(default)s)"


def run(arguments: argparse.Namespace) -> int:
    """0; 1 where contenders disagree or nothing can be measured; 2 where the arguments do not go together."""
    if _native.core is None:
        print(f"fastsep: the native module is missing: {_native.missing}", file=sys.stderr)
        return 1
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check(arguments)
        with Load() as load, fixed_threads(arguments.threads):
            report = measure(arguments)
        write(replace(report, remarks=[*report.remarks, *load.doubts]), arguments)
    except (OSError, ValueError) as error:
        print(f"fastsep: {error}", file=sys.stderr)
        return 2
    except (ArithmeticError, RuntimeError) as error:
        print(f"fastsep: {error}", file=sys.stderr)
        return 1
    return 0


def check(arguments: argparse.Namespace) -> None:
    """ValueError, before anything is measured, where something is asked for that cannot be."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU here")
    if arguments.device == "cpu" and DTYPES[arguments.dtype] not in _native.DTYPES:
        raise ValueError(f"dtype {arguments.dtype} is measured on cuda, and the device is cpu")
    if arguments.threads > cores():
        raise ValueError(f"threads must be at most the {cores()} processors here, got {arguments.threads}")
    if arguments.whole:
        if arguments.phase != "forward" or arguments.dtype != "float32":
            raise ValueError("a network in one piece is measured in the forward pass and in float32")
        if arguments.layout != "nhwc":
            raise ValueError(
                f"a network in one piece runs in channels-last, layout nhwc, got layout {arguments.layout}"
            )
        arguments.module, arguments.size = networks.build((arguments.layer or arguments.network).name)
    elif not (arguments.layer or arguments.network).layers:
        raise ValueError(f"network {arguments.network.name} is measured with --whole")
    if arguments.plot:
        plot.check(arguments.plot)
    check_targets({option: getattr(arguments, option) for option in TARGETS})


def without_targets(typed: list[str]) -> list[str]:
    """What was typed but for where the result goes, which is nothing of the measurement."""
    kept, is_target = [], False
    for word in typed:
        if is_target and (word == "-" or not word.startswith("-")):
            is_target = False
            continue
        option, equals, _ = word.partition("=")
        found = len(option) > 2 and any(f"--{target}".startswith(option) for target in TARGETS)
        is_target = found and not equals
        if not found:
            kept.append(word)
    return kept


def check_targets(targets: dict[str, str | Path | None]) -> None:
    """ValueError where a file could not be written, or two results would go to the same."""
    taken: dict[str | Path, str] = {}
    for option, target in targets.items():
        if target is None:
            continue
        place = target if target == "-" else Path(target).resolve()
        if place in taken:
            raise ValueError(f"{taken[place]} and {option} cannot both be written to {target}")
        taken[place] = option
        if target != "-" and (reason := why_not_written(Path(target))):
            raise ValueError(f"{target} cannot be written: {reason}")


def why_not_written(path: Path) -> str:
    """Empty where write_whole() can write it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"there is no folder {path.parent}"
    if path.is_dir():
        return "it is a folder"
    if path.exists() and not path.is_file():
        return "it is no file"
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"the folder {path.parent} does not take files: {error.strerror}"
    return ""


def measure(arguments: argparse.Namespace) -> Report:
    network: Network = arguments.layer or arguments.network
    isa = _native.core.best_isa() if arguments.device == "cpu" else ""
    bandwidth = measure_bandwidth(arguments.device)
    remarks: dict[str, None] = {}
    if arguments.whole:
        rows = [measure_whole(arguments, network.name, isa, remarks)]
    else:
        rows = measure_layers(arguments, network, isa, remarks)
    found = versions(arguments.device)
    found |= {r: str(peers.version(peers.RUNTIMES[r][0])) for r in arguments.against if r in peers.RUNTIMES}
    asked = (
        arguments.phase,
        arguments.batch,
        arguments.threads,
        arguments.layout,
        arguments.dtype,
        arguments.device,
    )
    forced = os.environ.get("FASTSEP_ISA")
    environment = [f"FASTSEP_ISA={forced}"] if forced else []
    command = shlex.join([*environment, "python", "-m", "fastsep", *without_targets(arguments.typed)])
    return Report(
        *(network.name, arguments.whole, *asked, isa, device_name(arguments.device), found, bandwidth, rows),
        command=command,
        remarks=list(remarks),
    )


def measure_layers(
    arguments: argparse.Namespace, network: Network, isa: str, remarks: dict[str, None]
) -> list[Row]:
    cases = [
        replace(case, n=arguments.batch, layout=arguments.layout, dtype=arguments.dtype)
        for case in network.layers
    ]
    seconds = arguments.seconds / len(cases)
    names = [f"layer{index}" for index in range(1, len(cases) + 1)]
    return [
        measure_layer(replace(case, name=case.name or name), arguments, isa, seconds, remarks)
        for case, name in zip(_progress(cases), names, strict=True)
    ]


def measure_layer(
    case: Case, arguments: argparse.Namespace, isa: str, seconds: float, remarks: dict[str, None]
) -> Row:
    """Checks a layer, then times it; the peak is taken beside it, as clocks change with load and heat."""
    phase, device, threads = arguments.phase, arguments.device, arguments.threads
    for name in ["fastsep", *arguments.against]:
        if reason := contenders.unavailable(name, case, phase, device):
            remarks[reason] = None
    with contenders.context(phase), ExitStack() as stack:
        task = contenders.Task.of(case, phase, device, threads)
        subjects = contenders.build(task, arguments.against, stack)
        contenders.verify(task, subjects)
        peak = measure_peak(device, isa, case.dtype, threads)
        times = race({name: subject.contender for name, subject in subjects.items()}, seconds=seconds)
    done = phase_operations(case, phase), traffic(case, phase)
    return Row(case.name, format_case(case), times, *done, peak, task.is_cold)


def measure_whole(arguments: argparse.Namespace, name: str, isa: str, remarks: dict[str, None]) -> Row:
    device, threads = arguments.device, arguments.threads
    for contender in ["fastsep", *arguments.against]:
        if reason := networks.unavailable(contender, arguments.batch, device):
            remarks[reason] = None
    network = arguments.module.to(device)
    x = torch.randn(arguments.batch, *arguments.size, device=device)
    with ExitStack() as stack:
        subjects, found = networks.subjects(network, x, arguments.against, threads, device, stack)
        with torch.inference_mode():
            networks.verify(subjects)
            peak = measure_peak(device, isa, "float32", threads)
            times = race({n: subject.contender for n, subject in subjects.items()}, seconds=arguments.seconds)
    operations = networks.operations(network, x)
    fused = f"{len(found.fused)} of {len(found.candidates)}" if found else ""
    what = fused, found.error if found else None
    return Row(name, "", times, operations, 0, peak, False, *what)


def _progress(cases: list[Case]) -> list[Case]:
    console = Console(stderr=True)
    return track(cases, "measuring", console=console, transient=True)  # type: ignore[return-value]


def write(report: Report, arguments: argparse.Namespace) -> None:
    """The table, or what was asked for instead of it: all is made before the first of it is written."""
    contents: dict[str | Path, str | bytes] = {}
    if arguments.json:
        contents[arguments.json] = json.dumps(report.to_json(), indent=1) + "\n"
    if arguments.csv:
        contents[arguments.csv] = report.to_csv()
    if arguments.plot:
        contents[arguments.plot] = plot.draw(report, arguments.plot.suffix[1:])
    for target, content in contents.items():
        if target == "-":
            print(content, end="")
        else:
            write_whole(Path(target), content)
    if "-" not in (arguments.json, arguments.csv):
        console = Console()
        if not console.is_terminal:
            console.width = 100 + 20 * max(0, len(report.contenders) - 3)
        show(report, console)
