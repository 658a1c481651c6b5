"""Random geometry from tensors: layers, training, optimized blocks, each held against torch in float64.

python tests/sweep.py [--seconds 10] [--seed N] [--trial I]

Each run draws anew. A line names each trial before it runs, so that the last one is known also where the
process ends; --seed and --trial run it alone. Between guard pages the kernels are tried by tests/cpp/sweep.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trials import run_trials

import fastsep
from fastsep import SeparableConv2d
from fastsep._activations import ACTIVATIONS
from fastsep._case import DTYPES, LAYOUTS, Case, format_case
from fastsep._check import NAMES, error_bound, gradient_bounds, relative_error

MOST_PRODUCTS = 3e7

# torch's gradient of hardsigmoid has 1/6 in float32, also of float64.
EXACT = {name: activation.forward for name, activation in ACTIVATIONS.items()}
EXACT["hardsigmoid"] = lambda x: (x + 3).clamp(0, 6) / 6


@dataclass(frozen=True)
class Trial:
    kind: str  # of TRIALS
    case: Case
    threads: int
    expand: int = 0  # channels of the block's input
    residual: bool = False
    gated: bool = False  # squeeze-and-excite before the last convolution
    stem: bool = False  # the block's first convolution is 3 x 3 by a stride of 2
    frozen: bool = False
    integers: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {format_case(self.case)} threads={self.threads}" + "".join(
            f" {name}={value}"
            for name in ("expand", "residual", "gated", "stem", "frozen")
            if (value := getattr(self, name))
        )


# ---- what is drawn -----------------------------------------------------------------------------------------


def spread(source: random.Random, low: int, high: int) -> int:
    """Each order of magnitude as often as the others."""
    return min(high, int(low * ((high + 1) / low) ** source.random()))


def draw_case(source: random.Random) -> Case:
    draw = source.randint
    narrow = draw(1, 3) == 1  # in many tiles, whose pixels fill the product's groups badly
    kh, dh = source.choice([1, 2, 3, 3, 3, 5, 7]), source.choice([1, 1, 1, 2, 3])
    kw, dw = source.choice([kh, kh, draw(1, 7)]), source.choice([dh, dh, draw(1, 3)])
    reach_h, reach_w = (kh - 1) * dh, (kw - 1) * dw
    pads = [reach_h // 2, reach_h // 2, reach_w // 2, reach_w // 2]
    if draw(0, 1):
        pads = [draw(0, reach_h), draw(0, reach_h), draw(0, reach_w), draw(0, reach_w)]
    sh = source.choice([1, 1, 1, 2, 2, 3])
    return Case(
        n=source.choice([1, 1, 1, 2, 3, 5]), m=source.choice([1, 1, 1, 2, 3]),
        c=draw(100, 1200) if narrow else spread(source, 1, 1200), k=spread(source, 1, 24 if narrow else 400),
        h=draw(1, 80), w=draw(1, 20) if narrow else draw(1, 80),
        kh=kh, kw=kw, sh=sh, sw=source.choice([sh, sh, draw(1, 3)]), dh=dh, dw=dw,
        pt=pads[0], pb=pads[1], pl=pads[2], pr=pads[3], db=draw(0, 1), b=draw(0, 1),
        mid=source.choice(list(ACTIVATIONS)), act=source.choice(list(ACTIVATIONS)),
        dtype=source.choice(["float32", "float32", "float64"]),
        layout=source.choice(["nchw", "nhwc", "nhwc"]),
    )  # fmt: skip


def products(trial: Trial) -> float:
    case = trial.case
    plane = case.n * case.h * case.w * case.c * trial.expand * (9 if trial.stem else 1)
    return plane + case.n * case.oh * case.ow * case.c * case.m * (case.kh * case.kw + case.k)


def draw_trial(source: random.Random) -> Trial:
    while True:
        kind = source.choice(list(TRIALS))
        trial = Trial(kind, draw_case(source), source.randint(1, 8), frozen=source.random() < 0.5)
        if kind == "block":
            case = trial.case
            # One channel is not told from a dense convolution; nn.Conv2d has one padding for both sides.
            case = replace(case, c=max(case.c, 2), m=1, db=1, b=1, pb=case.pt, pr=case.pl)
            expand = spread(source, 1, 160)
            stem, gated = source.random() < 0.3, source.random() < 0.3
            if stem:
                expand = 3
            reach_h, reach_w = (case.kh - 1) * case.dh, (case.kw - 1) * case.dw
            even = reach_h % 2 == 0 and reach_w % 2 == 0  # else no padding keeps the plane
            residual = even and not stem and source.random() < 0.5
            if residual:
                h, w = reach_h // 2, reach_w // 2
                expand, case = case.k, replace(case, sh=1, sw=1, pt=h, pb=h, pl=w, pr=w)
            trial = replace(trial, case=case, expand=expand, residual=residual, gated=gated, stem=stem)
        if trial.case.oh > 0 and trial.case.ow > 0 and products(trial) < MOST_PRODUCTS:
            return trial


# ---- what is tried -----------------------------------------------------------------------------------------


def composed(case: Case, tensors: dict[str, Tensor | None], *, linear: bool = False) -> Tensor:
    """Two F.conv2d; with `linear` without the activations."""
    x, dw, pw, db, b = (tensors[name] for name in NAMES)
    assert x is not None
    assert dw is not None
    mid, act = (EXACT["identity" if linear else name] for name in (case.mid, case.act))
    x = F.pad(x, (case.pl, case.pr, case.pt, case.pb))
    t = mid(F.conv2d(x, dw, db, (case.sh, case.sw), 0, (case.dh, case.dw), case.c))
    return t if pw is None else act(F.conv2d(t, pw, b))


def layer_of(case: Case, tensors: dict[str, Tensor | None]) -> SeparableConv2d:
    options: dict[str, object] = dict(case.options)
    layer = SeparableConv2d(
        case.c, case.k, (case.kh, case.kw), depth_multiplier=case.m, bias=bool(case.b),
        depthwise_bias=bool(case.db), dtype=DTYPES[case.dtype], **options,
    )  # fmt: skip
    given = {
        "depthwise.weight": tensors["depthwise_weight"], "pointwise.weight": tensors["pointwise_weight"],
        "depthwise.bias": tensors["depthwise_bias"], "pointwise.bias": tensors["bias"],
    }  # fmt: skip
    layer.load_state_dict({name: tensor for name, tensor in given.items() if tensor is not None})
    return layer


def wide(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}


def try_layer(trial: Trial, seed: int) -> float:
    """The error as a share of its bound."""
    case = trial.case
    tensors = case.tensors(seed)
    layer = layer_of(case, tensors).eval()
    if trial.frozen:
        layer.freeze()
    x = tensors["input"]
    assert x is not None
    with torch.no_grad():
        got = layer(x)
        again = layer(x)
    assert torch.equal(got, again), "a second call gives other bits"
    expected = composed(case, wide(tensors))
    sizes = {name: None if tensor is None else tensor.abs() for name, tensor in wide(tensors).items()}
    return relative_error(got, expected, error_bound(case, composed(case, sizes, linear=True)))


def try_training(trial: Trial, seed: int) -> float:
    case = trial.case
    tensors, grad = case.tensors(seed), case.gradient(seed + 1)
    layer = layer_of(case, tensors)
    x = tensors["input"]
    assert x is not None
    x = x.clone().requires_grad_()
    layer(x).backward(grad)
    got = {
        "input": x.grad,
        "depthwise_weight": layer.depthwise.weight.grad,
        "pointwise_weight": layer.pointwise.weight.grad,
        "depthwise_bias": layer.depthwise.bias.grad if case.db else None,
        "bias": layer.pointwise.bias.grad if case.b else None,
    }
    exact = {
        name: None if tensor is None else tensor.requires_grad_() for name, tensor in wide(tensors).items()
    }
    composed(case, exact).backward(grad.double())
    bounds = gradient_bounds(case, tensors, grad)
    errors = []
    for name in NAMES:
        tensor, gradient, bound = exact[name], got[name], bounds[name]
        if tensor is not None and tensor.grad is not None and gradient is not None and bound is not None:
            errors.append(relative_error(gradient, tensor.grad, bound))
    return max(errors)


class Block(nn.Module):
    """An inverted residual, or the first layers of a network."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        case = trial.case
        dense = {"kernel_size": 3, "stride": 2, "padding": 1} if trial.stem else {"kernel_size": 1}
        self.expand = nn.Conv2d(trial.expand, case.c, **dense)
        self.depthwise = nn.Conv2d(
            case.c,
            case.c,
            (case.kh, case.kw),
            (case.sh, case.sw),
            (case.pt, case.pl),
            (case.dh, case.dw),
            case.c,
        )
        self.project = nn.Conv2d(case.c, case.k, 1)
        self.squeeze, self.excite = nn.Conv2d(case.c, 4, 1), nn.Conv2d(4, case.c, 1)
        self.mid, self.residual, self.gated = ACTIVATIONS[case.mid].forward, trial.residual, trial.gated

    def forward(self, x: Tensor) -> Tensor:
        t = self.mid(self.depthwise(F.relu6(self.expand(x))))
        if self.gated:
            t = t * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(t, 1)))))
        y = self.project(t)
        return x + y if self.residual else y


def try_block(trial: Trial, seed: int) -> float:
    case = trial.case
    torch.manual_seed(seed)
    block = Block(trial).to(DTYPES[case.dtype]).eval()
    scale = 2 if trial.stem else 1
    x = torch.randn(case.n, trial.expand, case.h * scale, case.w * scale, dtype=DTYPES[case.dtype])
    x = x.contiguous(memory_format=LAYOUTS[case.layout])
    optimized = fastsep.optimize(block)
    with torch.no_grad():
        results = [optimized(x) for _ in range(3)]
        expected = copy.deepcopy(block).double()(x.double())
        sizes = copy.deepcopy(block).double()
        for parameter in sizes.parameters():
            parameter.abs_()
        sizes.mid = ACTIVATIONS["identity"].forward
        # A gate is less than 1, and errs by as many roundings as what it is made of.
        inner = sizes.depthwise(sizes.expand(x.double().abs()))
        if trial.gated:
            inner = inner * (1 + sizes.excite(sizes.squeeze(inner.mean((2, 3), keepdim=True))))
        magnitude = sizes.project(inner) + x.double().abs().max()
    assert trial.gated or fastsep.report(optimized).fused, "nothing was fused"
    for result in results[1:]:
        assert torch.equal(results[0], result), "a later call gives other bits"
    terms = trial.expand * (9 if trial.stem else 1) + case.kh * case.kw + case.c + 24
    if trial.gated:
        terms += case.c + case.oh * case.ow
    return relative_error(results[0], expected, 2 * terms * torch.finfo(x.dtype).eps * (magnitude + 1))


TRIALS: dict[str, Callable[[Trial, int], float]] = {
    "layer": try_layer,
    "training": try_training,
    "block": try_block,
}


def attempt(source: random.Random, number: int, again: str) -> str:
    trial = draw_trial(source)
    print(f"{again}: {trial}", flush=True)
    torch.set_num_threads(trial.threads)
    error = TRIALS[trial.kind](trial, number)
    return f"{error:.3g} times its bound" if not error <= 1 else ""  # NaN fails


if __name__ == "__main__":
    sys.exit(run_trials(__doc__, "trials", attempt))
