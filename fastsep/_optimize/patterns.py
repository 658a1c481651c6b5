"""Which nodes of a graph the kernels can compute together, and for the others why not.

A pattern is a function of a Reader and a node: it returns a Match that has the node in it, None where the
node is none of its business, or raises UnfitError with the reason. plans.py tries PATTERNS on each depthwise
convolution, in order, so that one that takes more nodes in goes before those that take less.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import _native
from ..functional import Pads
from ..modules import SeparableConv2d
from .aliases import Memory
from .chains import Convolution, Reader, UnfitError
from .live import LiveStep
from .steps import ExpandedStep, SeparableStep


@dataclass
class Match:
    """Nodes, each the only user of the one before, and a step that computes the last from the first's input.

    `convolution` is the first one's, or behind an `expand` the depthwise one; `kind` is what a report says.
    """

    nodes: list[fx.Node]
    step: Callable[..., Tensor]
    kind: str
    convolution: Convolution | None = None
    expand: Convolution | None = None
    operands: tuple[int, ...] = (0,)  # which of the first node's arguments the step takes

    @property
    def input(self) -> fx.Node:
        (node,) = (arg for arg in self.nodes[0].args[:1] if isinstance(arg, fx.Node))
        return node

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        arguments: list[fx.Node] = []
        fx.node.map_arg(self.nodes[0].args, arguments.append)
        return tuple(arguments[i] for i in self.operands)

    def run(self, reader: Reader, x: Tensor) -> Tensor:
        """What the nodes compute from another input."""
        values: dict[fx.Node, Any] = {self.input: x}

        def value(node: fx.Node) -> Any:
            return values[node] if node in values else reader.constant(node)

        for node in self.nodes:
            args: Any = fx.node.map_arg(node.args, value)
            kwargs: Any = fx.node.map_arg(node.kwargs, value)
            target: Any = reader.module(node) or node.target
            if node.op == "call_method":
                target, args = getattr(args[0], target), args[1:]
            values[node] = target(*args, **kwargs)
        result: Tensor = values[self.nodes[-1]]
        return result


@dataclass
class Tail:
    """A convolution with the norms behind it folded in, and the activation behind those."""

    convolution: Convolution
    activation: str
    nodes: list[fx.Node]

    @property
    def next(self) -> fx.Node | None:
        """The node behind, where it is the only one."""
        users = list(self.nodes[-1].users)
        return users[0] if len(users) == 1 else None


def tail(
    reader: Reader, convolution: Convolution, activation: str = "identity", *, lenient: bool = False
) -> Tail:
    """Takes in what can be folded into a convolution.

    UnfitError for what looks as if it could and cannot; where `lenient` the tail ends before that.
    """
    if activation == "identity":
        activation = convolution.activation
    result = Tail(convolution, activation, [convolution.node])
    while (node := result.next) is not None and reads_only(node, result.nodes[-1]):
        try:
            if reader.is_identity(node):
                pass
            elif result.activation != "identity":
                break
            elif (affine := reader.affine(node)) is not None:
                result.convolution = affine.behind(result.convolution)
            elif (name := reader.activation(node)) is not None:
                result.activation = name
            else:
                break
        except UnfitError:
            if lenient:
                break
            raise
        result.nodes.append(node)
    return result


def reads_only(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node takes another's result as its first argument and no second time."""
    arguments: list[fx.Node] = []
    fx.node.map_arg((node.args[1:], node.kwargs), arguments.append)
    return bool(node.args) and node.args[0] is source and source not in arguments


def separable_pair(reader: Reader, node: fx.Node) -> Match | None:
    """Depthwise -> [norm] -> [activation] -> pointwise -> [norm] -> [activation]."""
    if isinstance(layer := reader.module(node), SeparableConv2d):
        return _separable_layer(reader, node, layer)
    convolution = reader.convolution(node)
    if convolution is None or not convolution.is_depthwise:
        return None
    first = tail(reader, convolution)
    pointwise = _pointwise_behind(reader, first)
    check_native(convolution, pointwise)
    second = tail(reader, pointwise, lenient=True)
    step = SeparableStep(first.convolution, first.activation, second.convolution, second.activation)
    return Match([*first.nodes, *second.nodes], step, "separable", convolution)


# Of the dense convolutions with larger kernels only those on images go before a pair: the product walks the
# patches of others less well than torch's convolution does.
_LARGEST_IMAGE = 4


def expanded_pair(reader: Reader, node: fx.Node) -> Match | None:
    """Pointwise -> [norm] -> [activation] -> a separable pair -> [sum with the input].

    Or a dense convolution on an image in the place of the first.
    """
    expand = _expansion_before(reader, node)
    if expand is None:
        return None
    pair = separable_pair(reader, node)
    if pair is None or not isinstance(pair.step, SeparableStep):
        return None
    halves = pair.step.halves
    depthwise, pointwise = halves[0], halves[2]
    weight = expand.convolution.weight
    if depthwise.weight.shape[0] != weight.shape[0] or weight.dtype != depthwise.weight.dtype:
        return None  # a depth multiplier
    check_native(expand.convolution, depthwise)
    nodes, source = [*expand.nodes, *pair.nodes], expand.nodes[0].args[0]
    residual = None
    if pointwise.weight.shape[0] == weight.shape[1] and all(
        map(_keeps_size, (expand.convolution, depthwise))
    ):
        residual = _sum_behind(reader, nodes, source)
    step = ExpandedStep(expand.convolution, expand.activation, *halves, sum_with_input=residual is not None)
    kind = f"separable behind {expand.convolution.name}"
    if residual is not None:
        nodes.append(residual)
        kind += ", with the sum"
    return Match(nodes, step, kind, depthwise, expand.convolution)


def _expansion_before(reader: Reader, node: fx.Node) -> Tail | None:
    """The dense convolution whose activated result a node alone reads."""
    parts = [node]
    while True:
        before = parts[-1].args[0] if parts[-1].args else None
        if not isinstance(before, fx.Node) or len(before.users) != 1 or not reads_only(parts[-1], before):
            return None
        parts.append(before)
        try:
            convolution = reader.convolution(before)
            if convolution is not None:
                break
            if not reader.is_identity(before) and not reader.activation(before) and not reader.affine(before):
                return None
        except UnfitError:
            return None
    expand = expansion(reader, convolution)
    return expand if expand is not None and expand.nodes[-1] is parts[1] else None


def expansion(reader: Reader, convolution: Convolution | None) -> Tail | None:
    """A convolution with its tail, where a kernel makes rows of its result for a depthwise half behind it."""
    if convolution is None or convolution.groups != 1 or convolution.dilation != (1, 1):
        return None
    if not convolution.is_pointwise and convolution.weight.shape[1] > _LARGEST_IMAGE:
        return None
    expand = tail(reader, convolution, lenient=True)
    return expand if expand.convolution.weight.isfinite().all() else None


def _keeps_size(convolution: Convolution) -> bool:
    """Whether the result of every input is as high and wide as the input."""
    if convolution.stride != (1, 1) or convolution.padding == "same":
        return convolution.stride == (1, 1)
    top, bottom, left, right = cast("Pads", convolution.padding)
    reach = [d * (k - 1) for d, k in zip(convolution.dilation, convolution.weight.shape[2:], strict=True)]
    return [top + bottom, left + right] == reach


def _sum_behind(reader: Reader, nodes: list[fx.Node], source: Any) -> fx.Node | None:
    """The sum of what nodes compute from `source`, which nobody else reads, and `source` itself."""
    node = nodes[-1]
    users = list(node.users)
    if len(users) != 1 or users[0].kwargs or users[0].op != "call_function":
        return None
    target, args = users[0].target, users[0].args
    if target in (operator.add, torch.add, operator.iadd) and args == (node, source):
        pass
    elif target not in (operator.add, torch.add) or args != (source, node):
        return None  # `source += y` writes to what others may read
    # The step reads it where its first node is. It may be another by the sum.
    written = Memory(reader.graph, reader).is_written(source, nodes[0], users[0])
    return None if written else users[0]


def _separable_layer(reader: Reader, node: fx.Node, layer: SeparableConv2d) -> Match:
    """The layer, with a norm and an activation behind it."""
    depthwise, mid, pointwise, activation = reader.separable(node, layer)
    check_native(depthwise, pointwise)
    second = tail(reader, pointwise, activation, lenient=True)
    step = SeparableStep(depthwise, mid, second.convolution, second.activation)
    return Match(second.nodes, step, "separable", depthwise)


def live_pair(reader: Reader, node: fx.Node) -> Match | None:
    """Depthwise -> [activation] -> pointwise -> [activation], with the modules' weights at the time."""
    if isinstance(reader.module(node), SeparableConv2d):
        raise UnfitError("a SeparableConv2d, which is fused as it is")
    convolution = reader.convolution(node)
    if convolution is None or not convolution.is_depthwise:
        return None
    first = tail(reader, convolution)
    pointwise = _pointwise_behind(reader, first)
    check_native(convolution, pointwise)
    for half in (convolution, pointwise):
        if half.module is None:
            raise UnfitError(f"{half.name} is no nn.Conv2d")
    second = tail(reader, pointwise, lenient=True)
    step = LiveStep(convolution, first.activation, pointwise, second.activation)
    return Match([*first.nodes, *second.nodes], step, "separable", convolution)


def _pointwise_behind(reader: Reader, first: Tail) -> Convolution:
    name, last = first.convolution.name, first.nodes[-1]
    if first.next is None:
        if _is_gated(reader, last):
            raise UnfitError("squeeze-and-excite between")
        raise UnfitError(f"what lies behind {name} is used {len(last.users)} times")
    pointwise = reader.convolution(first.next) if reads_only(first.next, last) else None
    if pointwise is None:
        raise UnfitError(f"followed by {describe(reader, first.next)}, not by a pointwise convolution")
    if not pointwise.is_pointwise:
        kh, kw = pointwise.weight.shape[2:]
        raise UnfitError(
            f"{pointwise.name} behind it is a {kh} x {kw} convolution with groups {pointwise.groups}, stride "
            f"{pointwise.stride} and padding {pointwise.padding}, not a pointwise one"
        )
    return pointwise


_POOLS = torch.mean, F.adaptive_avg_pool2d, "mean"


_PRODUCTS = operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"


def _is_gated(reader: Reader, node: fx.Node) -> bool:
    """Whether a node is averaged by one of its users and multiplied by another."""
    modules = [reader.module(user) for user in node.users]
    pooled = any(isinstance(module, nn.AdaptiveAvgPool2d) for module in modules)
    pooled = pooled or any(user.target in _POOLS for user in node.users)
    return pooled and any(user.target in _PRODUCTS for user in node.users)


def check_native(*convolutions: Convolution) -> None:
    """UnfitError where no kernel takes these weights."""
    if _native.core is None:
        raise UnfitError(f"native module missing: {_native.missing}")
    first = convolutions[0].weight
    for convolution in convolutions:
        for weight in (convolution.weight, convolution.bias):
            if weight is None:
                continue
            if weight.device.type != "cpu":
                raise UnfitError(f"no native kernel for {weight.device.type}")
            if weight.dtype not in _native.DTYPES:
                raise UnfitError(f"no native kernel for {weight.dtype}")
            if weight.dtype != first.dtype:
                raise UnfitError(f"weights of {first.dtype} and {weight.dtype}")


Pattern = Callable[[Reader, fx.Node], Match | None]

# With a depthwise convolution among them, so that their reasons are reported.
PATTERNS: Sequence[Pattern] = (expanded_pair, separable_pair)
TRAINING_PATTERNS: Sequence[Pattern] = (live_pair,)


def describe(reader: Reader, node: fx.Node) -> str:
    module = reader.module(node)
    if module is not None:
        return f"{node.target} ({type(module).__name__})"
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
