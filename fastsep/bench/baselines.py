"""One layer without fastsep: torch's two convolutions, torch.compile, plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._activations import ACTIVATIONS, IN_PLACE
from .._case import LAYOUTS, Case
from .._check import Tensors, oracle, oracle_backward

Call = Callable[[Tensor], Tensor]

# Those of the activations in place that autograd takes: whose derivative can be had from the value.
IN_PLACE_TRAINING = {name: IN_PLACE[name] for name in ("relu", "relu6", "leaky_relu", "sigmoid", "tanh")}
Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def own_parameters(case: Case, tensors: Tensors) -> Weights:
    """Copies of depthwise and pointwise weight, bias and depthwise bias, the weights in the case's layout."""
    dw, pw, b, db = (
        None if (tensor := tensors[key]) is None else tensor.clone()
        for key in ("depthwise_weight", "pointwise_weight", "bias", "depthwise_bias")
    )
    layout = LAYOUTS[case.layout]
    dw, pw = (None if w is None else w.contiguous(memory_format=layout) for w in (dw, pw))
    return dw, pw, b, db


def two_convolutions(
    case: Case, dw: Tensor | None, pw: Tensor | None, b: Tensor | None, db: Tensor | None, *, phase: str
) -> Call:
    """The case in torch's operators; without a pointwise weight the first of them alone."""
    assert dw is not None
    depthwise: Tensor = dw
    in_place = IN_PLACE if phase == "forward" else IN_PLACE_TRAINING
    mid, act = (in_place.get(name, ACTIVATIONS[name].forward) for name in (case.mid, case.act))
    even = case.pt == case.pb and case.pl == case.pr
    padding = (case.pt, case.pl) if even else (0, 0)
    stride, dilation, groups = (case.sh, case.sw), (case.dh, case.dw), case.c

    def call(x: Tensor) -> Tensor:
        padded = x if even else F.pad(x, (case.pl, case.pr, case.pt, case.pb))
        u = mid(F.conv2d(padded, depthwise, db, stride, padding, dilation, groups))
        return u if pw is None else act(F.conv2d(u, pw, b))

    return call


class Act(nn.Module):
    """An activation by its name."""

    def __init__(self, name: str, in_place: bool = False) -> None:
        super().__init__()
        plain = ACTIVATIONS[name].forward
        self.function = IN_PLACE_TRAINING.get(name, plain) if in_place else plain

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def two_modules(case: Case, tensors: Tensors, in_place: bool = False) -> nn.Sequential:
    """The case as a user of torch has it in a model; compilers and exporters want no activations in place."""
    dw, pw = tensors["depthwise_weight"], tensors["pointwise_weight"]
    assert dw is not None
    b, db = tensors["bias"], tensors["depthwise_bias"]
    even = case.pt == case.pb and case.pl == case.pr
    factory: dict[str, Any] = {"device": dw.device, "dtype": dw.dtype}
    padding = (case.pt, case.pl) if even else (0, 0)
    depthwise = nn.Conv2d(
        *(case.c, case.c * case.m, (case.kh, case.kw), (case.sh, case.sw), padding, (case.dh, case.dw)),
        groups=case.c,
        bias=db is not None,
        **factory,
    )
    parts: list[nn.Module] = [] if even else [nn.ZeroPad2d((case.pl, case.pr, case.pt, case.pb))]
    parts += [depthwise] + [Act(case.mid, in_place)] * (case.mid != "identity")
    loads = [(depthwise, dw, db)]
    if pw is not None:
        pointwise = nn.Conv2d(case.c * case.m, case.k, 1, bias=b is not None, **factory)
        parts += [pointwise] + [Act(case.act, in_place)] * (case.act != "identity")
        loads.append((pointwise, pw, b))
    with torch.no_grad():
        for conv, weight, bias in loads:
            conv.weight.copy_(weight)
            if bias is not None and conv.bias is not None:
                conv.bias.copy_(bias)
    return nn.Sequential(*parts)


def compiled(case: Case, tensors: Tensors, phase: str) -> tuple[Call, list[Tensor], str]:
    """torch.compile of two modules, for inference with the weights frozen into the program."""
    torch.compiler.reset()  # layers are compiled one by one, and there is a limit to variants of one function
    module = two_modules(case, tensors).to(memory_format=LAYOUTS[case.layout])  # type: ignore[call-overload]
    convs = [part for part in module if isinstance(part, nn.Conv2d)]
    parameters = [c.weight for c in convs] + [c.bias for c in reversed(convs) if c.bias is not None]
    if phase != "forward":
        trained: Any = torch.compile(module)
        return trained, parameters, case.layout
    x = tensors["input"]
    assert x is not None
    return compile_frozen(module, x.contiguous(memory_format=LAYOUTS[case.layout])), parameters, case.layout


def compile_frozen(module: nn.Module, x: Tensor) -> Call:
    """torch.compile for an input of this shape, with the weights frozen into the program."""
    made: Any = torch.compile(module.eval().requires_grad_(False))
    with torch._inductor.config.patch(freezing=True), torch.inference_mode():
        made(x)
    call: Call = made
    return call


def naive(case: Case, tensors: Tensors, x: Tensor) -> Tensor:
    """Plain loops in C++, in double."""
    return oracle(case, tensors | {"input": x})


def naive_gradients(case: Case, tensors: Tensors, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Those of a forward and a backward pass of the same, in Case.tensors()' order."""
    current: Tensors = tensors | {"input": x}
    oracle(case, current)
    gradients = oracle_backward(case, current, grad)
    return given([gradients[name] for name in tensors])
