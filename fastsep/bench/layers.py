"""The layers of real networks, from the files in shapes/: one case a line, as _case.py reads it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .._case import Case, parse_case

SHAPES = Path(__file__).with_name("shapes")


class Network(NamedTuple):
    name: str
    layers: list[Case]


def names() -> list[str]:
    """Of the networks whose layers come with the package."""
    return sorted(path.stem for path in SHAPES.glob("*.txt"))


def load(network: str) -> Network:
    """One of names(), or a file; ValueError where there is none or a line of it is wrong."""
    path = SHAPES / f"{network}.txt" if network in names() else Path(network)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        known = ", ".join(names())
        raise ValueError(
            f"must be one of {known} or a file of layers, got {network!r}: {error.strerror}"
        ) from None
    layers = [parse_case(line) for line in lines if line.split("#")[0].strip()]
    if not layers:
        raise ValueError(f"{path} holds no layers")
    if any(case.k == 0 for case in layers):
        raise ValueError(f"{path} holds a depthwise half alone, k=0, which is not compared")
    return Network(path.stem, layers)


def operations(case: Case) -> int:
    """Multiplications and additions of a case, padding counted as if it were multiplied."""
    return 2 * case.n * case.oh * case.ow * case.c * case.m * (case.kh * case.kw + case.k)


def backward_operations(case: Case) -> int:
    """Those of all gradients: of two for each half, and of the depthwise half's result, computed again."""
    return 2 * case.n * case.oh * case.ow * case.c * case.m * (3 * case.kh * case.kw + 2 * case.k)
