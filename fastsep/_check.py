"""Whether the native kernels compute what they should: a call held against the double-precision oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, _ops
from ._activations import ACTIVATIONS
from ._case import DTYPES, LAYOUTS, Case, parse_case
from .functional import depthwise_conv2d, separable_conv2d

# Small, but with a rest behind every vector, a stride, a dilation, uneven padding and several activations.
SELF_TEST = [
    "name=plain n=2 c=19 h=13 w=18 k=35 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu act=relu6",
    "name=strided c=16 h=15 w=17 k=33 kh=5 kw=3 m=2 sh=2 sw=2 pt=2 pb=1 pr=1 b=1 mid=silu",
    "name=depthwise n=2 c=9 h=13 w=18 k=0 m=2 kh=3 kw=3 sh=2 pt=1 pb=1 pl=1 pr=1 db=1 mid=silu",
    "name=dilated c=7 h=11 w=30 k=9 kh=3 kw=7 dh=2 dw=3 pt=2 pb=2 pl=9 pr=9 db=1 mid=hardswish act=gelu",
]


# What Case.tensors() makes, and gradients by the same names.
Tensors = dict[str, Tensor | None]
NAMES = ("input", "depthwise_weight", "pointwise_weight", "depthwise_bias", "bias")


def call(case: Case, tensors: Tensors) -> Tensor:
    """The public function on a case's tensors."""
    x, dw, pw, db, b = operands(tensors)
    options: Any = case.options
    if pw is None:
        return depthwise_conv2d(x, dw, db, **options)
    return separable_conv2d(x, dw, pw, b, depthwise_bias=db, **options)


def operands(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Input, weights and biases in the operator's order."""
    x, dw, pw, db, b = (tensors[name] for name in NAMES)
    assert x is not None
    assert dw is not None
    return x, dw, pw, db, b


def addresses(tensors: Tensors) -> tuple[int, int, int, int, int]:
    """Of the same, in the order of the native functions."""
    x, dw, pw, db, b = (0 if tensor is None else tensor.data_ptr() for tensor in operands(tensors))
    return x, dw, db, pw, b


def _unwritten(shape: tuple[int, ...], case: Case, dtype: torch.dtype | None = None) -> Tensor:
    """NaN in the case's layout."""
    made = torch.full(shape, torch.nan, dtype=dtype or DTYPES[case.dtype])
    return made.contiguous(memory_format=LAYOUTS[case.layout])


def run_native(case: Case, tensors: Tensors, isa: str = "") -> Tensor:
    """The output of the native kernels of one instruction set."""
    output = _unwritten(case.output, case)
    _native.core.forward(case.problem, isa, *addresses(tensors), output.data_ptr())
    return output


def run_native_backward(
    case: Case, tensors: Tensors, grad: Tensor, isa: str = "", needed: tuple[str, ...] = NAMES
) -> Tensors:
    """The gradients by the native kernels of one instruction set, for a dense gradient of the output."""
    act = ACTIVATIONS[case.act].code
    kept = case if _native.core.derivative_from_output(act) else replace(case, act="identity")
    saved = None if case.act == "identity" else run_native(kept, tensors, isa)
    gradients = _like(case, tensors, DTYPES[case.dtype])
    asked = {name: gradient if name in needed else None for name, gradient in gradients.items()}
    _native.core.backward(
        *(case.problem, isa, *addresses(tensors)[:4], 0 if saved is None else saved.data_ptr()),
        *(grad.data_ptr(), *_gradient_addresses(asked)),
    )
    return asked


def _like(case: Case, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    gradients: Tensors = {}
    for name, tensor in tensors.items():
        gradients[name] = None if tensor is None else torch.full(tensor.shape, torch.nan, dtype=dtype)
    gradients["input"] = _unwritten((case.n, case.c, case.h, case.w), case, dtype)
    return gradients


def _gradient_addresses(gradients: Tensors) -> tuple[int, int, int, int, int]:
    x, dw, pw, db, b = (_ops.address(gradients[name]) for name in NAMES)
    return x, dw, db, pw, b


def oracle(case: Case, tensors: Tensors, *, magnitude: bool = False) -> Tensor:
    """The output in float64, or with ``magnitude`` the sum of the absolute values of all terms."""
    output = _unwritten(case.output, case, torch.float64)
    _native.core.reference_forward(case.problem, *addresses(tensors), output.data_ptr(), magnitude)
    return output


def oracle_backward(case: Case, tensors: Tensors, grad: Tensor) -> Tensors:
    """The gradients in float64."""
    gradients = _like(case, tensors, torch.float64)
    # It writes those of biases that are not there, too.
    biases = {"depthwise_bias": case.c * case.m, "bias": case.k}
    room = {name: torch.empty(size, dtype=torch.float64) for name, size in biases.items()}
    written = {
        name: room[name] if gradient is None and name in room else gradient
        for name, gradient in gradients.items()
    }
    _native.core.reference_backward(
        case.problem, *addresses(tensors), grad.data_ptr(), *_gradient_addresses(written), False
    )
    return gradients


def error_bound(case: Case, magnitude: Tensor) -> Tensor:
    """How far rounding may move an output whose terms have this sum of absolute values.

    Each addition and product errs by the dtype's eps of that sum at most; an activation stretches the error
    by less than 2, and rounds values of about 1 itself.
    """
    terms = case.kh * case.kw + case.c * case.m + 8
    return 2 * terms * torch.finfo(DTYPES[case.dtype]).eps * (magnitude.double() + 1)


def gradient_bounds(case: Case, tensors: Tensors, grad: Tensor) -> Tensors:
    """How far rounding may move each gradient.

    The errors of every step, to t, u, v and back, go through the absolute values of what follows. Where an
    argument lies as near to a bend of its activation as it may err, either slope will do.
    """
    eps = torch.finfo(DTYPES[case.dtype]).eps
    wide = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    sizes = {name: None if tensor is None else tensor.abs() for name, tensor in wide.items()}
    (x, dw, pw, db, b), (x_size, dw_size, pw_size, db_size, b_size) = operands(wide), operands(sizes)
    mid, act = ACTIVATIONS[case.mid], ACTIVATIONS[case.act]

    def rounding(terms: int) -> float:
        return 2 * (terms + 8) * eps

    def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        padded = F.pad(x, (case.pl, case.pr, case.pt, case.pb))
        return F.conv2d(padded, weight, bias, (case.sh, case.sw), 0, (case.dh, case.dw), case.c)

    def slope(backward: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda at: backward(torch.ones_like(at), at)

    def sway(function: Callable[[Tensor], Tensor], at: Tensor, error: Tensor) -> Tensor:
        """How far an error of the argument, and the function's own, may move its value."""
        value = function(at)
        above, below = ((function(at + e) - value).abs() for e in (error, -error))
        return torch.maximum(above, below) + 16 * eps * (value.abs() + at.abs() + 1)

    bounds: Tensors = dict.fromkeys(NAMES)
    taps, pixels = case.kh * case.kw, case.n * case.oh * case.ow
    t = depthwise(x, dw, db)
    t_error = rounding(taps) * depthwise(x_size, dw_size, db_size)
    du, du_error = grad.double(), torch.zeros_like(t)
    if pw is not None and pw_size is not None:
        u, u_error = mid.forward(t), sway(mid.forward, t, t_error)
        v = F.conv2d(u, pw, b)
        v_error = F.conv2d(u_error, pw_size) + rounding(case.c * case.m) * F.conv2d(u.abs(), pw_size, b_size)
        dv = du * slope(act.backward)(v)
        dv_error = du.abs() * sway(slope(act.backward), v, v_error)
        du = F.conv2d(dv, pw.transpose(0, 1))
        du_error = F.conv2d(dv_error + rounding(case.k) * dv.abs(), pw_size.transpose(0, 1))
        summed = dv_error + rounding(pixels) * dv.abs()
        products = torch.einsum("nkhw,nihw->ki", summed, u.abs() + u_error)
        bounds["pointwise_weight"] = (products + torch.einsum("nkhw,nihw->ki", dv.abs(), u_error))[
            ..., None, None
        ]
        bounds["bias"] = None if b is None else summed.sum((0, 2, 3))
    rise = slope(mid.backward)
    dt = du * rise(t)
    dt_error = du_error * rise(t).abs() + (du.abs() + du_error) * sway(rise, t, t_error)
    with torch.enable_grad():
        inputs = [x_size.requires_grad_(), dw_size.requires_grad_()]
        reached = depthwise(*inputs)
    summed = dt_error + rounding(pixels) * dt.abs()
    (bounds["input"],) = torch.autograd.grad(
        reached, inputs[:1], dt_error + rounding(taps * case.m) * dt.abs(), retain_graph=True
    )
    (bounds["depthwise_weight"],) = torch.autograd.grad(reached, inputs[1:], summed)
    bounds["depthwise_bias"] = None if db is None else summed.sum((0, 2, 3))
    # What no tap reaches is exactly zero; a share of an error can be taken all the same.
    return {name: None if bound is None else bound + 1e-300 for name, bound in bounds.items()}


def relative_error(got: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest error as a share of its bound: at most 1 if all is well, infinite for a NaN."""
    shares = (got.to(expected.dtype) - expected).abs() / bound
    return shares.nan_to_num(nan=torch.inf).max().item() if shares.numel() else 0.0


def largest_error(got: Tensors, expected: Tensors, bounds: Tensors) -> float:
    """relative_error() of the worst of some gradients."""
    errors = [0.0]
    for name, tensor in got.items():
        exact, bound = expected[name], bounds[name]
        if tensor is not None and exact is not None and bound is not None:
            errors.append(relative_error(tensor, exact, bound))
    return max(errors)


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
                    grad = case.gradient()
                    bounds = gradient_bounds(case, tensors, grad)
                    got = run_native_backward(case, tensors, grad, isa)
                    error = largest_error(got, oracle_backward(case, tensors, grad), bounds)
                    yield Result(isa, dtype, layout, f"{case.name} backward", error)
