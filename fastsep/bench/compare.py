"""One layer by fastsep and by torch's own two convolutions: the same numbers in, the same numbers out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .._activations import ACTIVATIONS
from .._case import LAYOUTS, Case, format_case
from .._check import Tensors, error_bound, operands, relative_error
from ..modules import SeparableConv2d

Run = Callable[[], Tensor]

# What a careful user of torch writes: behind a convolution, an activation that needs no memory of its own.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "leaky_relu": F.leaky_relu_,
    "silu": partial(F.silu, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
    "hardsigmoid": partial(F.hardsigmoid, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}


def candidates(case: Case) -> dict[str, Run]:
    """fastsep in the case's layout, frozen and with weights packed at each call; torch in both layouts."""
    tensors = case.tensors()
    x = tensors["input"]
    return {
        "fastsep": partial(layer(case, tensors).freeze(), x),
        "unfrozen": partial(layer(case, tensors), x),
        **{f"torch {layout}": two_convolutions(replace(case, layout=layout), tensors) for layout in LAYOUTS},
    }


def verify(case: Case, runs: dict[str, Run]) -> None:
    """ArithmeticError where a candidate differs from torch by more than the rounding of both allows."""
    sizes = {name: None if tensor is None else tensor.abs() for name, tensor in case.tensors().items()}
    magnitude = two_convolutions(replace(case, mid="identity", act="identity"), sizes)()
    bound = 2 * error_bound(case, magnitude)
    expected = runs["torch nchw"]().double()
    for name, run in runs.items():
        error = relative_error(run(), expected, bound)
        if error > 1:
            line = format_case(case)
            raise ArithmeticError(
                f"{name} differs from torch by {error:.3g} times what rounding allows: {line}"
            )


def layer(case: Case, tensors: Tensors) -> SeparableConv2d:
    """The layer with the case's weights."""
    _, dw, pw, db, b = operands(tensors)
    made = SeparableConv2d(
        *(case.c, case.k, (case.kh, case.kw)),
        depth_multiplier=case.m,
        bias=b is not None,
        depthwise_bias=db is not None,
        dtype=dw.dtype,
        **case.options,  # type: ignore[arg-type]
    )
    weights = {"depthwise.weight": dw, "depthwise.bias": db, "pointwise.weight": pw, "pointwise.bias": b}
    made.load_state_dict({key: weight for key, weight in weights.items() if weight is not None})
    return made.eval()


def two_convolutions(case: Case, tensors: Tensors) -> Run:
    """The case in torch's operators, all tensors in the case's layout."""
    layout = LAYOUTS[case.layout]
    x, dw, pw, db, b = operands(tensors)
    assert pw is not None
    x, dw, pw = (tensor.contiguous(memory_format=layout) for tensor in (x, dw, pw))
    mid, act = (IN_PLACE.get(name, ACTIVATIONS[name].forward) for name in (case.mid, case.act))
    even = case.pt == case.pb and case.pl == case.pr
    padding = (case.pt, case.pl) if even else (0, 0)
    stride, dilation, groups = (case.sh, case.sw), (case.dh, case.dw), case.c

    def run() -> Tensor:
        padded = x if even else F.pad(x, (case.pl, case.pr, case.pt, case.pb))
        return act(F.conv2d(mid(F.conv2d(padded, dw, db, stride, padding, dilation, groups)), pw, b))

    return run
