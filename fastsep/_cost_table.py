"""The table of a Cost, and `python -m fastsep cost`."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from ._cost import MACHINES, Cost, LayerCost, cost
from ._networks import add_network_argument, load


def table(costs: Cost) -> str:
    text = io.StringIO()
    console = Console(file=text, width=200, color_system=None)
    separable = [layer for layer in costs.layers if layer.kind in ("separable", "expanded")]
    size = " x ".join(map(str, costs.input_size))
    console.print(
        f"{costs.model} on {size}: {_millions(costs.multiply_adds)} multiply-adds, "
        f"{costs.parameters:,} parameters",
        soft_wrap=True,
        highlight=False,
    )
    console.print(_rows(costs))
    if separable:
        ratio = costs.multiply_adds / costs.dense_multiply_adds
        console.print(
            f"Dense twin: {_millions(costs.dense_multiply_adds)} multiply-adds; the ratio is {ratio:.4f}. "
            "A separable layer's is 1/N + 1/k^2. "
            f"The twin's layers have {_millions(costs.dense_parameters)} parameters and move "
            f"{costs.dense_bytes / 1e6:.2f} MB{_seconds_of_twin(costs)}.",
            soft_wrap=True,
            highlight=False,
        )
    return text.getvalue().rstrip()


def _rows(costs: Cost) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    rows.add_column("layer", footer="sum", no_wrap=True)
    for title in ("kind", "input", "output"):
        rows.add_column(title, no_wrap=True)
    titles = [
        *("multiply-adds, M", "weights, k", "unfused, MB", "fused, MB", "flop/byte", "dense, M", "ratio"),
        *(["predicted, ms"] if costs.predicted_seconds is not None else []),
        *(["measured, ms"] if costs.measured_seconds is not None else []),
    ]
    footers = _numbers(
        LayerCost(
            *("", "", (), (), costs.multiply_adds, sum(layer.parameters for layer in costs.layers)),
            *(costs.bytes_unfused, costs.bytes_fused, costs.dense_multiply_adds),
            ratio=costs.multiply_adds / costs.dense_multiply_adds if costs.layers else None,
            predicted_seconds=costs.predicted_seconds,
            measured_seconds=costs.measured_seconds,
        )
    )
    for title, footer in zip(titles, footers, strict=True):
        rows.add_column(title, justify="right", footer=footer, no_wrap=True)
    for layer in costs.layers:
        sizes = [" x ".join(map(str, size[1:])) for size in (layer.input_size, layer.output_size)]
        rows.add_row(layer.name or costs.model, layer.kind, *sizes, *_numbers(layer))
    return rows


def _numbers(layer: LayerCost) -> list[str]:
    times = [layer.predicted_seconds, layer.measured_seconds]
    return [
        *(f"{layer.multiply_adds / 1e6:.3f}", f"{layer.parameters / 1e3:.1f}"),
        *(f"{layer.bytes_unfused / 1e6:.2f}", f"{layer.bytes_fused / 1e6:.2f}", f"{layer.intensity:.1f}"),
        *(f"{layer.dense_multiply_adds / 1e6:.1f}", "" if layer.ratio is None else f"{layer.ratio:.4f}"),
        *(f"{seconds * 1e3:.3f}" for seconds in times if seconds is not None),
    ]


def _seconds_of_twin(costs: Cost) -> str:
    seconds = costs.dense_predicted_seconds
    return "" if seconds is None else f", in {seconds * 1e3:.3f} ms on the same machine"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network_argument(parser)
    parser.add_argument(
        "--input", type=_size, metavar="CxHxW", help="size of the input (default: the network's own)"
    )
    parser.add_argument(
        "--machine",
        choices=["measured", *MACHINES],
        help="predict the time on this machine, or on one core of a kind",
    )
    parser.add_argument("--measure", action="store_true", help="time each layer on this machine")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _size(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if not all(part.isdecimal() for part in parts) or len(parts) not in (3, 4):
        raise argparse.ArgumentTypeError(f"must be CxHxW or NxCxHxW, got {text!r}")
    return tuple(map(int, parts))


def run(arguments: argparse.Namespace) -> int:
    """0, or 2 where there is no such network or the input does not fit it."""
    try:
        model, own_size = load(arguments.network)
        costs = cost(model, arguments.input or own_size, machine=arguments.machine, measure=arguments.measure)
    except (RuntimeError, ValueError) as error:
        print(f"fastsep: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        for layer in costs.layers:
            layer.parts = []
        print(json.dumps(dataclasses.asdict(costs), indent=1))
    else:
        print(costs)
    return 0
