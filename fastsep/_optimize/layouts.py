"""In which layout a graph runs, and how its results get the strides that the module's forward gives them.

The kernels are faster in channels-last. So a graph runs in it, if that makes no difference, and what is
behind the last of its steps, its tail, in the layout that this has in the module's own forward: a slice that
is returned shows in its strides what it was made of.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._ops import memory_format
from .aliases import Memory, sharing
from .chains import Reader
from .formats import FORMATS
from .program import Program
from .series import SeriesStep
from .steps import DenseStep, ExpandedStep, as_contiguous, row_major
from .trace import why_opaque


@dataclass
class Programs:
    """A graph for inputs of either layout; None where there is none for it."""

    contiguous: Program | None
    channels_last: Program | None
    is_converted: bool = False  # whether the graph runs in channels-last for both

    def of(self, args: tuple[Any, ...]) -> Program | None:
        """The one for these arguments."""
        if self.contiguous is self.channels_last:
            return self.contiguous
        formats = {memory_format(x) for x in args if isinstance(x, Tensor) and x.dim() == 4}
        if len(formats) > 1:
            return None
        return self.channels_last if torch.channels_last in formats else self.contiguous


def programs(root: nn.Module, graph: fx.Graph, reader: Reader, *, channels_last: bool) -> Programs:
    """A graph with steps as programs; `channels_last` where it may run in that."""
    tail = _tail(graph, reader)
    if channels_last:
        for node in graph.nodes:
            if isinstance(node.target, DenseStep):
                node.target.to_channels_last()
        _convert_inputs(graph, tail, reader)
    made = {}
    for start in FORMATS:
        other = copy.deepcopy(graph)
        fits = _restore(other, start, reader, converted=channels_last)
        made[start] = Program(root, other) if fits else None
    return Programs(**made, is_converted=channels_last)


# ---- whether it may ----------------------------------------------------------------------------------------


# What asks for a tensor's place in memory and not for its values.
_LAYOUT_METHODS = {
    *("stride", "as_strided", "is_contiguous", "storage", "untyped_storage", "storage_offset", "data_ptr"),
    *("resize_", "set_", "view_as", "as_strided_"),
}


def can_be_channels_last(graph: fx.Graph, reader: Reader, fresh: set[fx.Node]) -> bool:
    """Whether the graph means the same on channels-last tensors. Views become reshapes, which may copy.

    What a module does that is called as it is nobody knows: it gets what it got before.
    """
    memory = Memory(graph, reader, fresh)
    if memory.copies_show() or any(_draws(reader, node) for node in graph.nodes):
        return False
    tail = _tail(graph, reader)
    for node, readers in _borders(graph, tail, reader):
        inside = node not in tail and node.op != "placeholder"
        if _copy_shows(reader, memory, node, readers) or (inside and _is_unknown(node)):
            return False
    views, opaque = [], []
    for node in graph.nodes:
        module = reader.module(node)
        if module is not None and why_opaque(module):
            given = node.all_input_nodes
            if not all(_is_its_own(reader, argument, fresh) for argument in given) or any(
                map(_is_unknown, given)
            ):
                return False
            opaque.append(node)
        if node.op == "call_method" and node.target in _LAYOUT_METHODS:
            return False
        if node.op == "call_function" and node.target is torch.as_strided:
            return False
        if node.op == "call_method" and node.target == "view":
            if any(isinstance(argument, torch.dtype) for argument in node.args) or node.kwargs:
                return False
            views.append(node)
    for node in views:
        node.target = "reshape"
    for node in opaque:
        for argument in node.all_input_nodes:
            with graph.inserting_before(node):
                node.replace_input_with(argument, graph.call_function(restored, (argument,)))
    return True


# Functions of torch.nn that draw a number for each element, in the order in which those lie in memory.
_DRAWING = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("rrelu", "gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d"),
}


def _draws(reader: Reader, node: fx.Node) -> bool:
    """Whether random numbers are drawn for a tensor."""
    module = reader.module(node)
    if module is not None:
        return module.training and not isinstance(module, nn.Conv2d)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bool(node.all_input_nodes) and (name in _DRAWING or is_seeded(name))


@functools.cache
def is_seeded(name: str) -> bool:
    """Whether the torch operator of this name takes numbers from a generator."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and name[0] != "_" else None
    overloads = () if packet is None else packet.overloads()
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, kind).tags for kind in overloads)


def _is_its_own(reader: Reader, node: fx.Node, fresh: set[fx.Node]) -> bool:
    """Whether a node's one user may as well get a copy of the result, to which it may write."""
    if len(node.users) != 1 or node.op in ("placeholder", "get_attr"):
        return False
    return node in fresh or not sharing(reader, node)[0]


# ---- inputs and results ------------------------------------------------------------------------------------


def restored(x: Any) -> Any:
    """Stands for a conversion to the format that a value has in the module's own forward."""
    return x


def as_channels_last(x: Any) -> Any:
    if isinstance(x, Tensor) and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def as_channels_last_or_planar(x: Any) -> Any:
    """For a step that takes NCHW, too."""
    return x if isinstance(x, Tensor) and x.is_contiguous() else as_channels_last(x)


def mark_planar(graph: fx.Graph, fresh: set[fx.Node]) -> None:
    """Has a step take an input as it lies in NCHW where nothing else reads it."""
    for node in graph.nodes:
        user = next(iter(node.users)) if node.op == "placeholder" and len(node.users) == 1 else None
        if user in fresh and user.args == (node,):
            step = user.target
            if isinstance(step, ExpandedStep) and step.can_be_planar():
                step.planar = True


def _is_planar(user: fx.Node) -> bool:
    step = user.target.links[0] if isinstance(user.target, SeriesStep) else user.target
    return isinstance(step, ExpandedStep) and step.planar


def _is_definite(node: fx.Node, reader: Reader) -> bool:
    """Whether a node's result is dense, and channels-last or not."""
    module = reader.module(node)
    if module is not None:
        return isinstance(module, nn.Conv2d)
    if node.target is restored:
        return True
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        source: Any = node.args[0]
        return isinstance(source.target, SeriesStep) and len(source.target.outputs) > 1
    return hasattr(node.target, "link") or isinstance(node.target, (SeriesStep, DenseStep))


def _tail(graph: fx.Graph, reader: Reader) -> set[fx.Node]:
    """The nodes between the results and what is definite."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    tail: set[fx.Node] = set()
    waiting = [*output.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node in tail or node.op in ("placeholder", "get_attr") or _is_definite(node, reader):
            continue
        tail.add(node)
        waiting += node.all_input_nodes
    return tail


def _borders(graph: fx.Graph, tail: set[fx.Node], reader: Reader) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Values that may be converted between the tail and the rest, and those that read them there."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    borders = []
    for node in graph.nodes:
        outside = node in tail or node.op == "placeholder"
        if not outside and not _is_definite(node, reader):
            continue
        behind = {user for user in node.users if user.op == "output" or user in tail}
        readers = [user for user in node.users if (user in behind) != outside]
        if readers:
            borders.append((node, sorted(readers, key=place.__getitem__)))
    return borders


def _copy_shows(reader: Reader, memory: Memory, node: fx.Node, readers: list[fx.Node]) -> bool:
    """Whether it makes a difference that these get a copy of a value, made where the first of them is."""
    if node.op == "placeholder":  # as copies_show() has asked
        return False
    if memory.is_written(node, readers[0]):
        return True
    return node in reader.written(readers[0]) and len(node.users) > 1


def _convert_inputs(graph: fx.Graph, tail: set[fx.Node], reader: Reader) -> None:
    """Has all but the tail read the inputs, and the tail's values, in channels-last."""
    for node, readers in _borders(graph, tail, reader):
        if node in tail or node.op == "placeholder":
            planar = node.op == "placeholder" and len(readers) == 1 and _is_planar(readers[0])
            _convert(graph, node, readers, as_channels_last_or_planar if planar else as_channels_last)


def _convert(graph: fx.Graph, node: fx.Node, readers: list[fx.Node], conversion: Any) -> None:
    with graph.inserting_before(readers[0]):
        converted = graph.call_function(conversion, (node,))
    for user in readers:
        user.replace_input_with(node, converted)


def _restore(graph: fx.Graph, start: str, reader: Reader, *, converted: bool) -> bool:
    """Has the tail, the caller and modules that are called as they are get values in the format that they
    have in the module's own forward for inputs of the format `start`; False where that is not known.

    A step's result is channels-last where the graph is `converted`. Else it has the format of its input, like
    that of torch's convolutions, unless their weights are channels-last, or it is of one pixel or channel.
    """
    for node in [node for node in graph.nodes if node.target is restored]:
        wanted = _format_of(node.args[0], start)
        if wanted == "unknown":
            return False
        node.target = as_contiguous
        if wanted != "contiguous":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    tail = _tail(graph, reader)
    for node, readers in _borders(graph, tail, reader):
        if node in tail or node.op == "placeholder":
            continue
        wanted = _format_of(node, start)
        if wanted == "unknown" and (converted or start == "channels_last"):
            return False
        if not converted and (start, wanted) == ("contiguous", "channels_last"):
            return False
        if wanted == "contiguous" and (converted or start == "channels_last"):
            _convert(graph, node, readers, row_major)
    return True


def _is_unknown(node: fx.Node) -> bool:
    return _format_of(node, "contiguous") == "unknown"


def _format_of(node: Any, start: str) -> str | None:
    formats = node.meta.get("formats")
    return "unknown" if formats is None else formats[start]
