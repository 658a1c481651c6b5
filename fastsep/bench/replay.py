"""python -m fastsep replay: a call again, from the line that FASTSEP_VERBOSE=1 printed for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from .. import _backward, _native, _ops
from .._case import DTYPES, Case, format_case, parse_call
from .._check import (
    NAMES,
    Tensors,
    call,
    error_bound,
    gradient_bounds,
    largest_error,
    operands,
    oracle,
    oracle_backward,
)
from ..functional import why_composed
from .arguments import checked, duration
from .engine import race
from .layers import backward_operations, operations

# What to run, what it should give, and how far rounding may move that.
Experiment = tuple[Callable[[], Tensors], Tensors, Tensors]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "call",
        metavar="line",
        type=checked(parse_line),
        help='the line, or a case such as "c=8 h=14 w=14 k=16 kh=3 kw=3 layout=nhwc"',
    )
    parser.add_argument("--backward", action="store_true", help="the gradients, as a line of theirs asks for")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    parser.add_argument("--seconds", type=duration, default=1.0, help="to measure for (default: %(default)s)")


def parse_line(line: str) -> tuple[Case, bool]:
    """The case, and whether the line is that of a backward pass; ValueError for a case that has no output."""
    return parse_call(line), "backward" in line.rpartition("|")[0]


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 where the result is farther from the exact one than rounding explains."""
    case, backward = arguments.call
    backward = backward or arguments.backward
    if backward and DTYPES[case.dtype].is_complex:  # of which torch's convolutions have no gradients
        print(f"fastsep: the dtype must be real for gradients, got {case.dtype}", file=sys.stderr)
        return 2
    tensors = case.tensors(arguments.seed)
    reason = why_composed(*operands(tensors))
    with torch.inference_mode(not backward):
        function, exact, bounds = gradients(case, tensors) if backward else result(case, tensors)
        got = function()
        error, difference = largest_error(got, exact, bounds), largest_difference(got, exact)
        timing = race({"call": function}, seconds=arguments.seconds)["call"]
    median, low, high = (seconds * 1e3 for seconds in (timing.median, timing.low, timing.high))
    speed = (backward_operations if backward else operations)(case) / timing.median / 1e9

    path = f"composition | {reason}" if reason else f"native {_native.core.last_isa()}"
    print(f"case   {format_case(case)}")
    print(f"path   {'backward ' * backward}{path}")
    print(f"error  {error:.4f} of what rounding may cause; largest difference {difference:.3g}")
    print(f"time   {median:.4f} ms ({low:.4f} to {high:.4f}), {speed:.1f} GFLOP/s")
    return 0 if error <= 1 else 1


def result(case: Case, tensors: Tensors) -> Experiment:
    """The call; its exact result is the oracle's where that knows the dtype."""
    if _is_native(case):
        exact, magnitude = oracle(case, tensors), oracle(case, tensors, magnitude=True)
    else:
        wide = _widened(case, tensors)
        sizes = {name: None if tensor is None else tensor.abs() for name, tensor in wide.items()}
        exact = _ops.compose(*operands(wide), *_geometry(case), case.mid, case.act)
        magnitude = _ops.compose(*operands(sizes), *_geometry(case), "identity", "identity")
    bounds: Tensors = {"output": error_bound(case, magnitude)}
    return lambda: {"output": call(case, tensors)}, {"output": exact}, bounds


def gradients(case: Case, tensors: Tensors) -> Experiment:
    """The backward pass of the call, for all its gradients."""
    grad = case.gradient()
    with torch.no_grad():
        bounds = gradient_bounds(case, tensors, grad)
        if _is_native(case):
            exact = oracle_backward(case, tensors, grad)
        else:
            given = operands(_widened(case, tensors))
            needed = [tensor is not None for tensor in given]
            args: Any = (grad.double(), *given, *_geometry(case), case.mid, case.act, needed)
            exact = dict(zip(NAMES, _backward.compose(*args), strict=True))
    inputs = {name: tensor.requires_grad_() for name, tensor in tensors.items() if tensor is not None}
    y = call(case, tensors)

    def function() -> Tensors:
        values = torch.autograd.grad(y, list(inputs.values()), grad, retain_graph=True)
        return dict(zip(inputs, values, strict=True))

    return function, exact, bounds


def largest_difference(got: Tensors, exact: Tensors) -> float:
    differences = []
    for name, value in got.items():
        expected = exact[name]
        if value is not None and expected is not None:
            differences.append((value - expected).abs().max().item())
    return max(differences)


def _is_native(case: Case) -> bool:
    return _native.core is not None and DTYPES[case.dtype] in _native.DTYPES


def _widened(case: Case, tensors: Tensors) -> Tensors:
    dtype = torch.complex128 if DTYPES[case.dtype].is_complex else torch.float64
    return {name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}


def _geometry(case: Case) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    return (case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw)
