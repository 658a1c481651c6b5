"""fastsep.cost: what the layers of a model cost, counted without running it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import _native
from ._optimize import optimize
from .modules import SeparableConv2d

Size = tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """One core: what its multiply-add units and its memory can do."""

    name: str
    flops_per_second: float  # float32; a multiply-add counts as two
    bytes_per_second: float

    def seconds(self, multiply_adds: int, moved: int, bytes_per_element: int = 4) -> float:
        """The roofline: the time for the arithmetic or for the bytes, whichever is longer.

        A vector holds half as many float64 as float32. Shorter numbers are computed as float32.
        """
        flops_per_second = self.flops_per_second * 4 / max(4, bytes_per_element)
        return max(2 * multiply_adds / flops_per_second, moved / self.bytes_per_second)


# Two multiply-add units of the vector width at 3 GHz, with 16 GB/s of memory bandwidth for one core.
MACHINES = {
    name: Machine(name, 2 * 2 * lanes * 3e9, 16e9)
    for name, lanes in (("avx512", 16), ("avx2", 8), ("neon", 4))
}


def measured_machine() -> Machine:
    """The machine that this runs on; RuntimeError without the native module."""
    if _native.core is None:
        raise RuntimeError(f"machine must be a named one without the native module: {_native.missing}")
    a, b = torch.ones(1 << 24), torch.empty(1 << 24)
    copying = _median_seconds(lambda: b.copy_(a))
    return Machine("measured", _native.core.fma_peak("", 0, 0.1), 2 * a.numel() * 4 / copying)


@dataclass
class LayerCost:
    """A convolution or linear layer, or a pointwise convolution and the depthwise one directly before it.

    "expanded" is such a pair behind what fastsep.optimize takes in: the expanding 1 x 1 convolution of an
    inverted residual, or the first convolution on an image.
    """

    name: str
    kind: str  # "separable", "expanded", "depthwise", "dense" or "linear"
    input_size: Size  # [N, C, H, W], or [N, C] of a linear layer
    output_size: Size
    multiply_adds: int
    parameters: int
    bytes_unfused: int
    bytes_fused: int
    dense_multiply_adds: int  # of one dense convolution in the place of both halves
    dense_parameters: int = 0
    dense_bytes: int = 0
    ratio: float | None = None  # of a separable one to that: 1/N + 1/k^2
    predicted_seconds: float | None = None
    measured_seconds: float | None = None
    dense_predicted_seconds: float | None = None
    bytes_per_element: int = 4
    parts: list[nn.Module] = field(default_factory=list, repr=False)

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte moved when fused."""
        return 2 * self.multiply_adds / self.bytes_fused if self.bytes_fused else 0.0


@dataclass
class Cost:
    """The layers of a model in the order of their calls. str() of it is the table that print() shows.

    parameters: of the whole model, its norms too.
    """

    model: str
    input_size: Size
    layers: list[LayerCost]
    parameters: int
    machine: Machine | None = None

    def _sum(self, name: str) -> Any:
        values = [getattr(layer, name) for layer in self.layers]
        return None if None in values else sum(values)

    @property
    def multiply_adds(self) -> int:
        return int(self._sum("multiply_adds"))

    @property
    def dense_multiply_adds(self) -> int:
        """Of the dense twin: each separable pair as one dense convolution."""
        return int(self._sum("dense_multiply_adds"))

    @property
    def dense_parameters(self) -> int:
        """Of the twin's layers, without norms."""
        return int(self._sum("dense_parameters"))

    @property
    def dense_bytes(self) -> int:
        return int(self._sum("dense_bytes"))

    @property
    def bytes_unfused(self) -> int:
        return int(self._sum("bytes_unfused"))

    @property
    def bytes_fused(self) -> int:
        return int(self._sum("bytes_fused"))

    @property
    def predicted_seconds(self) -> float | None:
        seconds: float | None = self._sum("predicted_seconds") if self.layers else None
        return seconds

    @property
    def dense_predicted_seconds(self) -> float | None:
        seconds: float | None = self._sum("dense_predicted_seconds") if self.layers else None
        return seconds

    @property
    def measured_seconds(self) -> float | None:
        seconds: float | None = self._sum("measured_seconds") if self.layers else None
        return seconds

    def __str__(self) -> str:
        from ._cost_table import table

        return table(self)


def cost(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    machine: Machine | str | None = None,
    measure: bool = False,
) -> Cost:
    """Multiply-adds, parameters and memory traffic of each convolution and linear layer, and of all.

    >>> layer = cost(SeparableConv2d(3, 256, 5, padding=2), (3, 8, 8)).layers[0]
    >>> layer.multiply_adds, layer.dense_multiply_adds, round(layer.ratio, 4)
    (53952, 1228800, 0.0439)

    Bytes are those of the layer's input, output and weights; fused, what lies between the halves of a
    separable convolution, or before it where it is "expanded", is not among them. Nothing runs: the layers
    are called without data.

    model: an nn.Module, a network or one layer. A pointwise convolution that is called next after a depthwise
        one, on as many channels and pixels as that one makes, counts as a separable convolution with it.
    input_size: (C, H, W) of one image, or (N, C, H, W); by default the model's own input_size.
    machine: predicts the time of each layer, on one thread: a Machine, "measured" for this one, or "avx512",
        "avx2" or "neon" for a core with two units of that width at 3 GHz.
    measure: time each layer by itself on this machine, on one thread, without norms and activations.

    ValueError for sizes out of range and unknown machines, TypeError for something that is no nn.Module or no
    machine, RuntimeError where the model does not take the input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    size = _batch_size(getattr(model, "input_size", None) if input_size is None else input_size)
    if isinstance(machine, str):
        if machine != "measured" and machine not in MACHINES:
            known = ", ".join(("measured", *MACHINES))
            raise ValueError(f"machine must be one of {known}, or a Machine, got {machine!r}")
        machine = measured_machine() if machine == "measured" else MACHINES[machine]
    if machine is not None and not isinstance(machine, Machine):
        raise TypeError(f"machine must be a Machine or the name of one, got {type(machine).__name__}")
    layers = _pair_up(_calls(model, size))
    for layer in layers:
        if machine is not None:
            size_of = layer.bytes_per_element
            layer.predicted_seconds = machine.seconds(layer.multiply_adds, layer.bytes_fused, size_of)
            layer.dense_predicted_seconds = machine.seconds(
                layer.dense_multiply_adds, layer.dense_bytes, size_of
            )
        if measure:
            layer.measured_seconds = _measure(layer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(type(model).__name__, size, layers, parameters, machine)


def _batch_size(size: Any) -> Size:
    if size is None:
        raise ValueError("input_size must be given where the model has none of its own: (C, H, W), got None")
    good = isinstance(size, Sequence) and all(isinstance(n, int) and n > 0 for n in size)
    if not good or len(size) not in (3, 4):
        raise ValueError(f"input_size must be (C, H, W) or (N, C, H, W), all at least 1, got {size!r}")
    return (1, *size) if len(size) == 3 else tuple(size)


def _calls(model: nn.Module, size: Size) -> list[LayerCost]:
    """Every call of a convolution or a linear layer, on tensors that have sizes only."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    shell = copy.deepcopy(model).to("meta").eval()
    calls: list[LayerCost] = []

    def watch(name: str, layer: Any) -> Callable[..., None]:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            calls.append(_cost_of(name, layer, inputs[0], output))

        return hook

    inside: set[nn.Module] = set()
    hooks = []
    for name, module in shell.named_modules():
        if isinstance(module, SeparableConv2d):
            inside.update(module.children())
        elif not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        if module not in inside:
            hooks.append(module.register_forward_hook(watch(name, module)))
    try:
        with torch.no_grad():
            shell(torch.empty(size, dtype=dtype, device="meta"))
    except RuntimeError as error:
        raise RuntimeError(f"model must take an input of {' x '.join(map(str, size))}: {error}") from error
    for hook in hooks:  # the layers may be measured
        hook.remove()
    return calls


def _cost_of(name: str, layer: Any, x: Tensor, y: Tensor) -> LayerCost:
    weights = sum(parameter.numel() for parameter in layer.parameters())
    if isinstance(layer, nn.Linear):
        kind, macs = "linear", y.numel() * layer.in_features
    elif isinstance(layer, nn.Conv2d):
        macs = y.numel() * layer.weight[0].numel()
        kind = "depthwise" if 1 < layer.groups == layer.in_channels else "dense"
    else:
        pair = _cost_of_pair(name, layer.depthwise, layer.pointwise, x, y)
        pair.parts = [layer]  # which has a padding of its own
        return pair
    size = x.element_size()
    moved = (x.numel() + y.numel() + weights) * size
    sizes = tuple(x.shape), tuple(y.shape)
    return LayerCost(
        *(name, kind, *sizes, macs, weights, moved, moved, macs, weights, moved),
        bytes_per_element=size,
        parts=[layer],
    )


def _cost_of_pair(name: str, depthwise: Any, pointwise: Any, x: Tensor, y: Tensor) -> LayerCost:
    inner, pixels = pointwise.in_channels, y.numel() // y.shape[1]
    taps, outputs = depthwise.weight[0].numel(), pointwise.out_channels
    weights = sum(p.numel() for half in (depthwise, pointwise) for p in half.parameters())
    dense = depthwise.in_channels * taps * outputs + (0 if pointwise.bias is None else outputs)
    fused = (x.numel() + y.numel() + weights) * x.element_size()
    return LayerCost(
        *(name, "separable", tuple(x.shape), tuple(y.shape), pixels * inner * (taps + outputs), weights),
        bytes_unfused=fused + 2 * pixels * inner * x.element_size(),
        bytes_fused=fused,
        dense_multiply_adds=pixels * depthwise.in_channels * taps * outputs,
        dense_parameters=dense,
        dense_bytes=(x.numel() + y.numel() + dense) * x.element_size(),
        ratio=separable_ratio(taps, outputs, inner // depthwise.in_channels),
        bytes_per_element=x.element_size(),
        parts=[depthwise, pointwise],
    )


def separable_ratio(taps: int, out_channels: int, multiplier: int = 1) -> float:
    """Multiply-adds of a separable convolution for each of a dense one: m * (1/N + 1/k^2)."""
    return multiplier * (1 / out_channels + 1 / taps)


def _pair_up(calls: list[LayerCost]) -> list[LayerCost]:
    layers: list[LayerCost] = []
    for call in calls:
        before = layers[-1] if layers else None
        if before is not None and before.kind == "depthwise" and _is_pointwise_behind(before, call):
            dtype: Any = call.parts[0].weight.dtype
            sizes = before.input_size, call.output_size
            x, y = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
            layers[-1] = _cost_of_pair(before.name, before.parts[0], call.parts[0], x, y)
        else:
            layers.append(call)
        if len(layers) > 1 and _is_expansion_before(*layers[-2:]):
            layers[-2:] = [_behind(*layers[-2:])]
    return layers


# Of the dense convolutions with larger kernels only those on images go before a pair, as in fastsep.optimize.
_LARGEST_IMAGE = 4


def _is_expansion_before(before: LayerCost, pair: LayerCost) -> bool:
    conv: Any = before.parts[0]
    if before.kind != "dense" or pair.kind != "separable" or before.output_size != pair.input_size:
        return False
    depthwise = getattr(pair.parts[0], "depthwise", pair.parts[0])
    plain = conv.groups == 1 and conv.padding_mode == "zeros" and conv.dilation == (1, 1)
    if not plain or depthwise.out_channels != depthwise.in_channels:
        return False
    pointwise = conv.kernel_size == (1, 1) and before.input_size[2:] == before.output_size[2:]
    return pointwise or conv.in_channels <= _LARGEST_IMAGE


def _behind(expand: LayerCost, pair: LayerCost) -> LayerCost:
    """A pair and what goes before it as one layer: fused, what is between is neither written nor read."""
    between = 2 * math.prod(pair.input_size) * pair.bytes_per_element
    macs = expand.multiply_adds + pair.multiply_adds
    dense = expand.dense_multiply_adds + pair.dense_multiply_adds
    return LayerCost(
        *(expand.name, "expanded", expand.input_size, pair.output_size, macs),
        parameters=expand.parameters + pair.parameters,
        bytes_unfused=expand.bytes_unfused + pair.bytes_unfused,
        bytes_fused=expand.bytes_fused + pair.bytes_fused - between,
        dense_multiply_adds=dense,
        dense_parameters=expand.dense_parameters + pair.dense_parameters,
        dense_bytes=expand.dense_bytes + pair.dense_bytes,
        ratio=macs / dense,
        bytes_per_element=pair.bytes_per_element,
        parts=[*expand.parts, *pair.parts],
    )


def _is_pointwise_behind(before: LayerCost, call: LayerCost) -> bool:
    layer = call.parts[0]
    if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or layer.groups != 1:
        return False
    return call.input_size == before.output_size and call.output_size[2:] == call.input_size[2:]


def _measure(layer: LayerCost) -> float:
    """Seconds of a layer with random weights, its norms and activations left out."""
    module: Any
    parts: list[Any] = [copy.deepcopy(part).to_empty(device="cpu") for part in layer.parts]
    if layer.kind == "expanded":
        for part in parts:
            part.reset_parameters()
        module = optimize(nn.Sequential(*parts).eval(), verify=False)
    elif len(parts) == 2:
        first, second = parts
        module = SeparableConv2d(
            *(first.in_channels, second.out_channels, first.kernel_size, first.stride, first.padding),
            dilation=first.dilation,
            depth_multiplier=first.out_channels // first.in_channels,
            bias=second.bias is not None,
            padding_mode=first.padding_mode,
            depthwise_bias=first.bias is not None,
            dtype=first.weight.dtype,
        )
    else:
        (module,) = parts
        module.reset_parameters()
    if isinstance(module, SeparableConv2d):
        module.mid_activation = module.activation = None
        module.freeze()
    x = torch.randn(layer.input_size, dtype=next(module.parameters()).dtype)
    if x.dim() == 4:
        x, module = x.to(memory_format=torch.channels_last), module.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return _median_seconds(lambda: module(x))


def _median_seconds(call: Callable[[], Any], at_least: float = 0.03) -> float:
    """The median time of a call, on one thread."""
    times: list[float] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(2):
            call()
        while sum(times) < at_least or len(times) < 5:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return sorted(times)[len(times) // 2]
