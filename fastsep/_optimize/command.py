"""python -m fastsep optimize: what would be fused in a network."""

from __future__ import annotations

import argparse
import sys

import torch

from .._networks import add_network_argument, load
from .api import optimize, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 where there is no such network or its result would differ."""
    try:
        model, size = load(arguments.network)
        print(report(optimize(model, torch.randn(1, *size))))
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"fastsep: {error}", file=sys.stderr)
        return 1
    return 0
