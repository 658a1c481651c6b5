"""Where a graph could tell a copy from a view: by a write to memory that the two would share."""

from __future__ import annotations

import functools
from collections.abc import Container
from typing import Any

import torch
from torch import fx, nn

from .chains import Reader
from .trace import why_opaque

# What gives a view of a contiguous tensor, and of a channels-last one perhaps a copy.
_COPYING = {"view", "reshape", "reshape_as", "flatten", "ravel", "contiguous", "to"}

# Operators that may hand an argument on although their schema does not say so.
_PASSING = {"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "type_as", "einsum"}

# The files of torch.nn whose modules return memory of their own, unless they work in place.
_FRESH_MODULES = {
    f"torch.nn.modules.{name}"
    for name in ("activation", "batchnorm", "conv", "instancenorm", "linear", "normalization", "pooling")
}


class Memory:
    """Which nodes' results may lie on the same memory, and which nodes may write to it.

    `fresh` are nodes whose results are new.
    """

    def __init__(self, graph: fx.Graph, reader: Reader, fresh: Container[fx.Node] = ()) -> None:
        self._other: dict[fx.Node, fx.Node] = {}  # on the same memory, and in the end one for all
        self._places = {node: place for place, node in enumerate(graph.nodes)}
        self._copies: list[fx.Node] = []
        self._writes: list[tuple[int, fx.Node]] = []
        for place, node in enumerate(graph.nodes):
            if node.op == "placeholder":
                self._copies.append(node)
            if node in fresh or node.op in ("placeholder", "get_attr", "output"):
                continue
            shares, copying = sharing(reader, node)
            if copying:
                self._copies.append(node)
            for argument in node.all_input_nodes if shares else ():
                if self._find(argument) is not self._find(node):
                    self._other[self._find(argument)] = self._find(node)
            self._writes += [(place, argument) for argument in reader.written(node)]

    def _find(self, node: fx.Node) -> fx.Node:
        while node in self._other:
            node = self._other[node]
        return node

    def is_written(self, node: fx.Node, first: fx.Node, last: fx.Node | None = None) -> bool:
        """Whether a node's memory may be written to behind the first node and before the last."""
        begin = self._places[first]
        end = len(self._places) if last is None else self._places[last]
        return any(begin < place < end and self._find(x) is self._find(node) for place, x in self._writes)

    def copies_show(self) -> bool:
        """Whether the graph means something else where its inputs and some of its views are copies.

        That is so where something is written to memory that a copy would not share, after it was made: to
        the input of the graph, or to either side of reshape() and its like.
        """
        return any(self.is_written(node, node) for node in self._copies)


def attribute_written(graph: fx.Graph, reader: Reader) -> str:
    """The name of a parameter or another attribute whose memory the graph may write to, or ""."""
    memory = Memory(graph, reader)
    attributes = [node for node in graph.nodes if node.op == "get_attr"]
    return next((str(node.target) for node in attributes if memory.is_written(node, node)), "")


def sharing(reader: Reader, node: fx.Node) -> tuple[bool, bool]:
    """Whether a node's result may be on its arguments' memory, and whether it may also be a copy.

    Of what is not known both are assumed.
    """
    module = reader.module(node)
    if module is not None:
        kind = type(module)
        known = isinstance(module, nn.Conv2d) or kind.__module__ in _FRESH_MODULES
        if known and kind is not nn.Identity and not why_opaque(module):
            return reader.writes(node), False
        return True, True
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if getattr(target, "__module__", "") == "_operator" or target is getattr:
        return name in ("getitem", "getattr") or reader.writes(node), False
    shares = _schema_shares(name)
    if shares is None:
        return True, True
    return shares or "out" in node.kwargs or reader.writes(node), name in _COPYING


@functools.cache
def _schema_shares(name: str) -> bool | None:
    """Whether a torch operator may return a view of an argument; None where there is no such operator."""
    if name in _PASSING:
        return True
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    if not schemas:
        return None
    infos = [result.alias_info for schema in schemas for result in schema.returns]
    # What is written to is an `out`, or the argument of an operator that says so in its name.
    return any(info is not None and not info.is_write for info in infos)
