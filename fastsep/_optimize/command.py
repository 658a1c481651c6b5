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
    """0; 1 where the network's result would differ; 2 where there is no such network."""
    try:
        model, size = load(arguments.network)
        print(report(optimize(model, torch.randn(1, *size))))
    except (RuntimeError, ValueError) as error:
        print(f"fastsep: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0
