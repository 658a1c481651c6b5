"""The activations: the number each has in the native code, its value and its gradient as torch operators."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten


class Activation(NamedTuple):
    code: int  # in csrc/fastsep.h's enum Activation
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient of the result, argument)


def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return cast("Tensor", aten.silu_backward(g, x))
    s = torch.sigmoid(x)
    return g * s * (1 + x * (1 - s))


# The gradients are torch's own, except for the two of its operators that cannot be differentiated again.
_TABLE: list[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = [
    ("identity", lambda x: x, lambda g, x: g),
    ("relu", torch.relu, lambda g, x: aten.threshold_backward(g, x, 0)),
    ("relu6", F.relu6, lambda g, x: aten.hardtanh_backward(g, x, 0, 6)),
    ("leaky_relu", F.leaky_relu, lambda g, x: aten.leaky_relu_backward(g, x, 0.01, False)),
    ("silu", F.silu, _silu_backward),
    ("hardswish", F.hardswish, aten.hardswish_backward),
    ("hardsigmoid", F.hardsigmoid, lambda g, x: torch.where((x > -3) & (x < 3), g / 6, 0)),
    ("sigmoid", torch.sigmoid, lambda g, x: aten.sigmoid_backward(g, torch.sigmoid(x))),
    ("tanh", torch.tanh, lambda g, x: aten.tanh_backward(g, torch.tanh(x))),
    ("gelu", F.gelu, aten.gelu_backward),
    (
        "gelu_tanh",
        lambda x: F.gelu(x, approximate="tanh"),
        lambda g, x: aten.gelu_backward(g, x, approximate="tanh"),
    ),
]

ACTIVATIONS = {name: Activation(code, f, df) for code, (name, f, df) in enumerate(_TABLE)}

# Those that can overwrite their argument, as a careful user of torch writes them behind a convolution.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "leaky_relu": F.leaky_relu_,
    "silu": partial(F.silu, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
    "hardsigmoid": partial(F.hardsigmoid, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}

_NAMES: dict[str | None, str] = {None: "identity", **{name: name for name in ACTIVATIONS}}


def activation_name(activation: str | None, argument: str) -> str:
    """The operator's spelling of an activation, ``"identity"`` for None; ValueError for one there is not."""
    try:
        return _NAMES[activation]
    except (KeyError, TypeError):
        known = ", ".join(name for name in ACTIVATIONS if name != "identity")
        raise ValueError(f"{argument} must be None or one of {known}, got {activation!r}") from None
