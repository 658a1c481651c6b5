"""The layers of real networks, from the files in shapes/: one case a line, as _case.py reads it.

Batch, dtype and layout are those that are asked for: no line has its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .._case import DTYPES, Case, parse_call

SHAPES = Path(__file__).with_name("shapes")
# What of a layer is measured: the gradients are those that a layer within a network needs, the input's too.
PHASES = {
    "forward": "inference",
    "training": "forward and backward",
    "input-gradient": "backward, for the input alone",
    "weight-gradient": "backward, for weights and biases alone",
}


class Network(NamedTuple):
    name: str
    layers: list[Case]


def names() -> list[str]:
    """Of the networks whose layers come with the package."""
    return sorted(path.stem for path in SHAPES.glob("*.txt"))


def load(network: str) -> Network:
    """One of names(), a file, or a line that is a layer itself; ValueError where it is none of them."""
    if "=" in network:
        layer = _layer(network)
        return Network(layer.name or "layer", [layer])
    path = SHAPES / f"{network}.txt" if network in names() else Path(network)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        known, reason = ", ".join(names()), getattr(error, "strerror", "it is no text")
        raise ValueError(
            f"must be one of {known}, a file of layers or a layer, got {network!r}: {reason}"
        ) from None
    layers = [_layer(line) for line in lines if line.split("#")[0].strip()]
    if not layers:
        raise ValueError(f"{path} holds no layers")
    return Network(path.stem, layers)


def _layer(line: str) -> Case:
    case = parse_call(line)
    for token in line.split("#")[0].rpartition("|")[2].split():
        key = token.partition("=")[0]
        if key in ("n", "dtype", "layout"):
            option = "batch" if key == "n" else key
            raise ValueError(f"a layer must leave {key} to --{option}, got {token} in {line.strip()!r}")
    return case


def distinct(layers: list[Case]) -> list[Case]:
    """The first of each that differ in more than their name, in their order."""
    return list({(case.problem, case.db, case.b): case for case in reversed(layers)}.values())[::-1]


def operations(case: Case) -> int:
    """Multiplications and additions of a case, padding counted as if it were multiplied."""
    return 2 * case.n * case.oh * case.ow * case.c * case.m * (case.kh * case.kw + case.k)


def backward_operations(case: Case) -> int:
    """Those of all gradients: of two for each half, and of the depthwise half's result, computed again."""
    return 2 * case.n * case.oh * case.ow * case.c * case.m * (3 * case.kh * case.kw + 2 * case.k)


def phase_operations(case: Case, phase: str) -> int:
    """What a phase takes, for fastsep, which computes the depthwise half again where it needs it."""
    inner = 2 * case.n * case.oh * case.ow * case.c * case.m
    depthwise, pointwise = inner * case.kh * case.kw, inner * case.k
    if not case.k:  # the depthwise half alone has nothing to compute again
        return depthwise * (3 if phase == "training" else 1)
    return {
        "forward": depthwise + pointwise,
        "training": operations(case) + backward_operations(case),
        "input-gradient": depthwise + pointwise,
        "weight-gradient": 2 * depthwise + 2 * pointwise,
    }[phase]


def sizes(case: Case) -> tuple[int, int, int]:
    """Bytes of the input, of the output, and of weights and biases."""
    inner, item = case.c * case.m, DTYPES[case.dtype].itemsize
    weights = inner * (case.kh * case.kw + case.k + case.db) + case.k * case.b
    elements = case.c * case.h * case.w, (case.k or inner) * case.oh * case.ow
    return item * case.n * elements[0], item * case.n * elements[1], item * weights


def traffic(case: Case, phase: str) -> int:
    """Bytes that a phase moves at least: each tensor that it has been given, or makes, once."""
    x, y, weights = sizes(case)
    return {
        "forward": x + y + weights,
        "training": 3 * x + 2 * y + 3 * weights,
        "input-gradient": 2 * x + y + weights,
        "weight-gradient": x + y + 2 * weights,
    }[phase]
