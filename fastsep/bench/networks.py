"""Whole networks in one piece: torch, torch.compile, fastsep, and the dedicated runtimes on the same weights."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastsep

from . import peers
from .baselines import compile_frozen
from .contenders import Subject
from .engine import Local, OnGpu

SIZE = 224
# Module and function that build each network without its weights.
SOURCES: dict[str, tuple[str, str]] = {
    "mobilenet_v1": ("timm.models", "mobilenetv1_100"),
    "mobilenet_v2": ("torchvision.models", "mobilenet_v2"),
}
EXPECTED = "torch nchw"


def build(name: str) -> nn.Module:
    """A network in evaluation mode, its norms with numbers as training leaves them; ValueError where it is not to
    be had."""
    if name not in SOURCES:
        raise ValueError(f"must be one of {', '.join(SOURCES)} to be run in one piece, got {name!r}")
    module, function = SOURCES[name]
    library = module.partition(".")[0]
    try:
        create: Callable[[], nn.Module] = getattr(importlib.import_module(module), function)
    except ImportError:
        raise ValueError(f"{name} in one piece needs {library}: pip install {library}") from None
    torch.manual_seed(0)
    network = create().eval()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                for tensor, low, high in (
                    *((part.running_mean, -0.2, 0.2), (part.running_var, 0.5, 1.5)),
                    *((part.weight, 0.8, 1.2), (part.bias, -0.2, 0.2)),
                ):
                    assert tensor is not None
                    tensor.uniform_(low, high)
    return network.requires_grad_(False)


def operations(network: nn.Module, x: Tensor) -> int:
    """Multiplications and additions of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(x)
    return int(counter.get_total_flops())


def folded(network: nn.Module) -> nn.Module:
    """Its norms folded into the convolutions, as whoever deploys it does."""
    from torch.fx.experimental.optimization import fuse

    with torch.no_grad():
        return fuse(copy.deepcopy(network)).eval()


def unavailable(name: str, batch: int, device: str) -> str:
    """Why a contender cannot take part; empty where it can."""
    if name == "fastsep" and not hasattr(fastsep, "optimize"):
        return "this version of fastsep has no optimize(), which replaces the layers of a network"
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
) -> dict[str, Subject]:
    """All that can take part, on the same weights; ``stack`` ends their processes."""
    plain = folded(network)
    last = x.contiguous(memory_format=torch.channels_last)
    made: dict[str, Subject] = {}

    def local(name: str, call: Callable[[Tensor], Any], given: Tensor) -> None:
        contender: type[Local | OnGpu] = OnGpu if device == "cuda" else Local
        made[name] = Subject(contender(lambda: call(given)), lambda: [call(given)])

    if not unavailable("fastsep", x.shape[0], device):
        optimize: Any = fastsep.optimize  # type: ignore[attr-defined]
        local("fastsep", optimize(copy.deepcopy(network)), last)
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
    return made


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
