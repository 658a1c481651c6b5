"""python -m fastsep replay: a call again, from the line that FASTSEP_VERBOSE=1 printed for it."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from .. import _native, _ops
from .._case import DTYPES, Case, format_case, parse_case
from .._check import Tensors, error_bound, operands, oracle, relative_error
from ..functional import separable_conv2d, why_composed
from .arguments import checked
from .engine import race
from .layers import operations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "case",
        metavar="line",
        type=checked(parse_output_case),
        help='the line, or a case such as "c=8 h=14 w=14 k=16 kh=3 kw=3 layout=nhwc"',
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="to measure for (default: %(default)s)")


def parse_output_case(line: str) -> Case:
    """parse_case(), ValueError also for a case that has no output."""
    case = parse_case(line)
    if min(case.n, case.oh, case.ow) < 1:
        raise ValueError(f"the case has no output: {format_case(case)}")
    return case


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> int:
    """0, or 1 where the result is farther from the exact one than rounding explains."""
    case: Case = arguments.case
    tensors = case.tensors(arguments.seed)

    def call() -> Tensor:
        return separable_conv2d(**tensors, **case.options)  # type: ignore[arg-type]

    got = call()
    reason = why_composed(*operands(tensors))
    exact, magnitude = exact_result(case, tensors)
    error = relative_error(got, exact, error_bound(case, magnitude))
    difference = (got - exact).abs().max()
    timing = race({"call": call}, seconds=arguments.seconds)["call"]
    median, low, high = (seconds * 1e3 for seconds in (timing.median, timing.low, timing.high))
    speed = operations(case) / timing.median / 1e9

    print(f"case   {format_case(case)}")
    print(f"path   {f'composition | {reason}' if reason else f'native {_native.core.last_isa()}'}")
    print(f"error  {error:.4f} of what rounding may cause; largest difference {difference:.3g}")
    print(f"time   {median:.4f} ms ({low:.4f} to {high:.4f}), {speed:.1f} GFLOP/s")
    return 0 if error <= 1 else 1


def exact_result(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """The result in double precision, and the sum of its terms' magnitudes; by the oracle if it can."""
    if _native.core is not None and DTYPES[case.dtype] in _native.DTYPES:
        return oracle(case, tensors), oracle(case, tensors, magnitude=True)
    dtype = torch.complex128 if DTYPES[case.dtype].is_complex else torch.float64
    wide = {name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}
    sizes = {name: None if tensor is None else tensor.abs() for name, tensor in wide.items()}
    stride, padding, dilation = (case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw)
    return (
        _ops.compose(*operands(wide), stride, padding, dilation, case.mid, case.act),
        _ops.compose(*operands(sizes), stride, padding, dilation, "identity", "identity"),
    )
