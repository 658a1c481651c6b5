"""Whole networks in one piece: torch, torch.compile, fastsep and other runtimes on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastsep

from .. import _networks
from . import peers
from .baselines import compile_frozen
from .contenders import Subject
from .engine import Local, OnGpu

SIZE = 224
EXPECTED = "torch nchw"


def _convolution(
    c: int, k: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> list[nn.Module]:
    conv = nn.Conv2d(c, k, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(k), *([nn.ReLU6(inplace=True)] if act else [])]


def _separable(c: int, k: int, stride: int, act: bool) -> list[nn.Module]:
    return [*_convolution(c, c, 3, stride, groups=c), *_convolution(c, k, 1, act=act)]


class InvertedResidual(nn.Module):
    """The block of MobileNetV2 (arXiv:1801.04381): expanded, filtered, projected."""

    def __init__(self, c: int, k: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual = stride == 1 and c == k
        expand = _convolution(c, c * expansion, 1) if expansion > 1 else []
        self.layers = nn.Sequential(*expand, *_separable(c * expansion, k, stride, act=False))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def mobilenet_v1() -> nn.Module:
    """MobileNet (arXiv:1704.04861) in plain torch modules."""
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    layers, c = _convolution(3, 32, 3, 2), 32
    for k, stride in plan:
        layers += _separable(c, k, stride, act=True)
        c = k
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1000))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 (arXiv:1801.04381) in plain torch modules."""
    # Table 2 there: expansion, channels, blocks, stride.
    plan = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    layers, c = _convolution(3, 32, 3, 2), 32
    for expansion, k, blocks, stride in plan:
        for i in range(blocks):
            layers.append(InvertedResidual(c, k, 1 if i else stride, expansion))
            c = k
    layers += _convolution(c, 1280, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


SOURCES: dict[str, Callable[[], nn.Module]] = {"mobilenet_v1": mobilenet_v1, "mobilenet_v2": mobilenet_v2}


def is_of_library(name: str) -> bool:
    """Whether a name is one of torchvision's or timm's."""
    return name.partition("/")[0] in _networks.LIBRARIES


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network for inference, its norms with numbers as training leaves them, and the size of an image.

    ValueError for an unknown one, and where its library is not installed.
    """
    if name not in SOURCES and not is_of_library(name):
        known = f"one of {', '.join(SOURCES)}, torchvision/NAME or timm/NAME"
        raise ValueError(f"network must be {known} to be run in one piece, got {name!r}")
    torch.manual_seed(0)
    size = 3, SIZE, SIZE
    if name in SOURCES:
        network = SOURCES[name]().eval()
    else:
        network, size = _networks.load(name)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                for tensor, low, high in (
                    *((part.running_mean, -0.2, 0.2), (part.running_var, 0.5, 1.5)),
                    *((part.weight, 0.8, 1.2), (part.bias, -0.2, 0.2)),
                ):
                    assert tensor is not None
                    tensor.uniform_(low, high)
    return network.requires_grad_(False), size


def operations(network: nn.Module, x: Tensor) -> int:
    """Multiplications and additions of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(x)
    return int(counter.get_total_flops())


def folded(network: nn.Module) -> nn.Module:
    """Its norms folded into the convolutions, as whoever deploys it does, unless torch.fx cannot trace it."""
    from torch.fx.experimental.optimization import fuse

    try:
        with torch.no_grad():
            return fuse(copy.deepcopy(network)).eval()
    except (TypeError, torch.fx.proxy.TraceError):
        return copy.deepcopy(network)


def unavailable(name: str, batch: int, device: str) -> str:
    """Why a contender cannot take part; empty where it can."""
    if name == "fastsep" and not hasattr(fastsep, "optimize"):
        return "this version of fastsep has no optimize(), which replaces the layers of a network"
    if name == "fastsep" and device != "cpu":
        return "fastsep takes part in whole networks on the CPU: optimize() fuses nothing elsewhere"
    if name == "naive":
        return "naive takes part in single layers"
    if name in peers.RUNTIMES:
        if device != "cpu":
            return f"{name} takes part on the CPU"
        if name == "ncnn" and batch > 1:
            return "ncnn takes part at batch 1, it knows no larger one"
        return peers.missing(name)
    return ""


def subjects(
    network: nn.Module, x: Tensor, against: Sequence[str], threads: int, device: str, stack: ExitStack
) -> tuple[dict[str, Subject], fastsep.Report | None]:
    """All that can take part, on the same weights, and what optimize() did; ``stack`` ends processes."""
    plain = folded(network)
    last = x.contiguous(memory_format=torch.channels_last)
    made: dict[str, Subject] = {}
    found: fastsep.Report | None = None

    def local(name: str, call: Callable[[Tensor], Any], given: Tensor) -> None:
        contender: type[Local | OnGpu] = OnGpu if device == "cuda" else Local
        made[name] = Subject(contender(lambda: call(given)), lambda: [call(given)])

    if not unavailable("fastsep", x.shape[0], device):
        optimized = fastsep.optimize(network, last)
        found = fastsep.report(optimized)
        local("fastsep", optimized, last)
    local("torch nchw", plain, x)
    local("torch nhwc", copy.deepcopy(plain).to(memory_format=torch.channels_last), last)  # type: ignore[call-overload]
    local("eager", network, x)
    for name in against:
        if name == "compile":
            torch.compiler.reset()
            local("compile", compile_frozen(copy.deepcopy(network), last), last)
        elif name in peers.RUNTIMES and not unavailable(name, x.shape[0], device):
            remote = stack.enter_context(peers.Remote(name, copy.deepcopy(network), x, threads))
            made[name] = Subject(remote, lambda remote=remote: [remote.output()])  # type: ignore[misc]
    return made, found


def verify(subjects: dict[str, Subject]) -> None:
    """ArithmeticError where two of them differ by more than the rounding of a whole network."""
    (expected,) = (tensor.double() for tensor in subjects[EXPECTED].outputs())
    for name, subject in subjects.items():
        (got,) = subject.outputs()
        difference = torch.linalg.vector_norm(got.to(expected) - expected) / torch.linalg.vector_norm(
            expected
        )
        if not difference < 1e-3:
            raise ArithmeticError(f"{name} differs from torch by {difference:.2g} of the result's norm")
