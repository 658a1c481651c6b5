"""Whether the native kernels compute what they should: a call held against the double-precision oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _native
from ._case import DTYPES, LAYOUTS, Case, parse_case

# Small, but with a rest behind every vector, a stride, a dilation, uneven padding and several activations.
SELF_TEST = [
    "name=plain n=2 c=19 h=13 w=18 k=35 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu act=relu6",
    "name=strided c=16 h=15 w=17 k=33 kh=5 kw=3 m=2 sh=2 sw=2 pt=2 pb=1 pr=1 b=1 mid=silu",
    "name=dilated c=7 h=11 w=30 k=9 kh=3 kw=7 dh=2 dw=3 pt=2 pb=2 pl=9 pr=9 db=1 mid=hardswish act=gelu",
]


Tensors = dict[str, Tensor | None]  # as Case.tensors() makes them


def operands(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Input, weights and biases in the operator's order."""
    x, dw, pw = tensors["input"], tensors["depthwise_weight"], tensors["pointwise_weight"]
    assert x is not None
    assert dw is not None
    assert pw is not None
    return x, dw, pw, tensors["depthwise_bias"], tensors["bias"]


def addresses(tensors: Tensors) -> tuple[int, int, int, int, int]:
    """Of the same, in the order of the native functions."""
    x, dw, pw, db, b = (0 if tensor is None else tensor.data_ptr() for tensor in operands(tensors))
    return x, dw, db, pw, b


def run_native(case: Case, tensors: Tensors, isa: str = "") -> Tensor:
    """The output of the native kernels of one instruction set."""
    output = torch.full((case.n, case.k, case.oh, case.ow), torch.nan, dtype=DTYPES[case.dtype])
    output = output.contiguous(memory_format=LAYOUTS[case.layout])
    _native.core.forward(case.problem, isa, *addresses(tensors), output.data_ptr())
    return output


def oracle(case: Case, tensors: Tensors, *, magnitude: bool = False) -> Tensor:
    """The output in float64, or with ``magnitude`` the sum of the absolute values of all terms."""
    output = torch.empty(
        (case.n, case.k, case.oh, case.ow), dtype=torch.float64, memory_format=LAYOUTS[case.layout]
    )
    _native.core.reference_forward(case.problem, *addresses(tensors), output.data_ptr(), magnitude)
    return output


def error_bound(case: Case, magnitude: Tensor) -> Tensor:
    """How far rounding may move an output whose terms have this sum of absolute values.

    Each addition and product errs by the dtype's eps of that sum at most; an activation stretches the error
    by less than 2, and rounds values of about 1 itself.
    """
    terms = case.kh * case.kw + case.c * case.m + 8
    return 2 * terms * torch.finfo(DTYPES[case.dtype]).eps * (magnitude.double() + 1)


def relative_error(got: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest error as a share of its bound: at most 1 if all is well, infinite for a NaN."""
    shares = (got.to(expected.dtype) - expected).abs() / bound
    return shares.nan_to_num(nan=torch.inf).max().item() if shares.numel() else 0.0


@dataclass(frozen=True)
class Result:
    isa: str
    dtype: str
    layout: str
    case: str
    error: float  # see relative_error()

    @property
    def passed(self) -> bool:
        return self.error <= 1


def self_test() -> Iterator[Result]:
    """Every instruction set that runs here, on every native dtype and layout."""
    for isa in _native.core.isas():
        for dtype in ("float32", "float64"):
            for layout in LAYOUTS:
                for line in SELF_TEST:
                    case = replace(parse_case(line), dtype=dtype, layout=layout)
                    tensors = case.tensors()
                    bound = error_bound(case, oracle(case, tensors, magnitude=True))
                    error = relative_error(run_native(case, tensors, isa), oracle(case, tensors), bound)
                    yield Result(isa, dtype, layout, case.name, error)
