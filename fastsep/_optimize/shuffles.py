"""The channel shuffle of two branches, as ShuffleNet V2 has it behind each of its units."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from .. import _native
from .._native import CPU
from .._ops import memory_format
from .chains import Reader
from .steps import Link


class ShuffleStep:
    """channel_shuffle(cat((a, b), 1), 2), which for two tensors alike are their channels in turn.

    With a `half` of 0 or 1 that of the result alone, so that the shuffled tensor is never whole.
    """

    def __init__(self, name: str, half: int | None = None) -> None:
        self.__name__, self.half = name, half

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        x = torch.cat((a, b), 1)
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return x if self.half is None else x.chunk(2, 1)[self.half]

    def link(self, a: Tensor, b: Tensor) -> Link | None:
        if a.dim() != 4 or a.shape != b.shape or a.dtype is not b.dtype or a.dtype not in _native.DTYPES:
            return None
        layout = torch.channels_last
        if memory_format(a) is not layout or not all(x.is_contiguous(memory_format=layout) for x in (a, b)):
            return None
        n, c, h, w = a.shape
        if not a.numel():
            return None
        begin, end = (0, 2 * c) if self.half is None else (self.half * c, self.half * c + c)
        result = torch.empty((n, end - begin, h, w), dtype=a.dtype, device=CPU, memory_format=layout)
        return Link([((_native.DTYPES[a.dtype], n, c, h * w, begin, end), 0, 0, 0, 1, -1)], result, [])


def channel_shuffle(reader: Reader, node: fx.Node) -> tuple[list[fx.Node], ShuffleStep] | None:
    """cat -> view as two groups of channels -> transpose -> contiguous -> view as it was: the nodes, with the
    sizes that they take, and the step."""
    if _native.core is None or not _concatenates_two(node):
        return None
    sizes = _sizes(node)
    n, c, h, w = ({size for size, index in sizes.items() if index == i} for i in range(4))
    halves = {
        user
        for size in c
        for user in size.users
        if user.target is operator.floordiv and user.args == (size, 2) and not user.kwargs
    }
    chain: list[Any] = [node]
    forms: tuple[tuple[Any, Any], ...] = (
        (("view", "reshape"), (n, {2}, halves, h, w)),
        (("transpose", torch.transpose), ({1}, {2})),
        (("contiguous",), ()),
        (("view", "reshape"), (n, c, h, w)),
    )
    for target, arguments in forms:
        users = [user for user in chain[-1].users if user.target in target]
        if len(users) != 1 or users[0].kwargs or users[0].args[:1] != (chain[-1],):
            return None
        given = users[0].args[1:]
        known = len(given) == len(arguments) and all(isinstance(x, int | fx.Node) for x in given)
        if not known or not all(x in choice for x, choice in zip(given, arguments, strict=True)):
            return None
        chain.append(users[0])
    taken: set[Any] = {
        *chain,
        *sizes,
        *halves,
        *(size.args[0] for size in sizes if size.target is operator.getitem),
    }
    if any(not taken.issuperset(part.users) for part in taken - {chain[-1]}):
        return None
    # It is contiguous as NCHW is even for channels-last branches, which whoever is handed it can see.
    if any(user.op == "output" for user in chain[-1].users):
        return None
    nodes = [part for part in reader.graph.nodes if part in taken]
    return (nodes, ShuffleStep(node.name)) if nodes[-1] is chain[-1] else None


def _concatenates_two(node: fx.Node) -> bool:
    """Whether a node puts the channels of one tensor behind those of another."""
    if node.target is not torch.cat or not node.args:
        return False
    rest: Any = (*node.args[1:], *node.kwargs.items())
    tensors: Any = node.args[0]
    if rest not in ((1,), (("dim", 1),)) or not isinstance(tensors, tuple | list) or len(tensors) != 2:
        return False
    return all(isinstance(x, fx.Node) for x in tensors)


def _sizes(node: fx.Node) -> dict[fx.Node, int]:
    """The nodes that are a size of a tensor, and of which dimension."""
    sizes: dict[fx.Node, int] = {}
    for user in node.users:
        is_size = user.target == "size" and not user.kwargs
        if is_size and len(user.args) == 2:
            sizes[user] = int(user.args[1])  # type: ignore[arg-type]
        elif (is_size and len(user.args) == 1) or (user.target is getattr and user.args == (node, "shape")):
            for item in user.users:
                if item.target is operator.getitem and isinstance(item.args[1], int):
                    sizes[item] = item.args[1]
    return sizes


def take_halves(graph: fx.Graph, fresh: set[fx.Node]) -> None:
    """Makes a step for each half of a shuffled tensor that is read in halves. Both are as fresh as it was."""
    for node in [node for node in fresh if isinstance(node.target, ShuffleStep)]:
        halves = _halves(node)
        if halves is None:
            continue
        (chunk,) = node.users
        for item, half in halves.items():
            with graph.inserting_before(node):
                step = graph.call_function(ShuffleStep(f"{node.name}_{half}", half), node.args)
            step.meta["formats"] = item.meta.get("formats")
            item.replace_all_uses_with(step)
            graph.erase_node(item)
            fresh.add(step)
        fresh.discard(node)
        graph.erase_node(chunk)
        graph.erase_node(node)


def _halves(node: fx.Node) -> dict[fx.Node, int] | None:
    """The halves along the channels that a node is read in, if in nothing else."""
    users = list(node.users)
    if len(users) != 1 or users[0].target not in ("chunk", torch.chunk) or users[0].args[:2] != (node, 2):
        return None
    if (*users[0].args[2:], *users[0].kwargs.items()) not in ((1,), (("dim", 1),)):
        return None
    items = {user: user.args[1] for user in users[0].users if user.target is operator.getitem}
    if len(items) != len(users[0].users) or not all(half in (0, 1) for half in items.values()):
        return None
    return items  # type: ignore[return-value]
