"""A graph with the steps in it: what is matched, what is folded, and in which layout it runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from .aliases import Memory
from .chains import Reader, UnfitError
from .formats import NO_IMAGE, note_formats
from .layouts import Programs, can_be_channels_last, mark_planar, programs
from .patterns import Match
from .regions import Region
from .series import SeriesStep, gives_image
from .shuffles import take_halves
from .steps import PackedStep, add, add_behind, gather
from .surroundings import SURROUNDINGS


def drop_rank_checks(region: Region) -> None:
    """Takes out assertions that a convolution's result is four-dimensional, which timm writes into its norms.

    A step refuses any other input than a four-dimensional one itself.
    """
    reader = Reader(region.module, region.graph)
    for node in list(region.graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", "") != "_assert" or node.users:
            continue
        parts = [node]
        while parts[-1].args and isinstance(parts[-1].args[0], fx.Node) and len(parts) < 3:
            parts.append(parts[-1].args[0])
        if len(parts) != 3:
            continue
        _, equal, rank = parts
        if equal.target is not operator.eq or equal.args[1] != 4 or rank.target is not getattr:
            continue
        if rank.args[1] != "ndim" or not isinstance(reader.module(rank.args[0]), nn.Conv2d):
            continue
        message = node.args[1] if len(node.args) > 1 else None
        region.graph.erase_node(node)
        for part in (equal, rank, message):
            _erase_unused(region.graph, part)
        # The message of the assertion has parts of its own.
    for node in reversed(list(region.graph.nodes)):
        if node.target is getattr and node.args[1:] == ("ndim",):
            _erase_unused(region.graph, node)


def _erase_unused(graph: fx.Graph, node: Any) -> None:
    if isinstance(node, fx.Node) and not node.users:
        graph.erase_node(node)


def rewrite(region: Region, matches: list[Match], *, inference: bool) -> tuple[Programs, set[nn.Module]]:
    """The programs with the steps in them, and the modules that they still call."""
    graph = region.graph
    reader = Reader(region.module, graph)
    gone = [node for match in matches for node in match.nodes]
    note_formats(reader)
    fresh = {_replace(graph, match) for match in matches}
    channels_last = False
    if inference:
        gone += _drop_identities(graph, reader)
        take_halves(graph, fresh)
        _add_to_steps(graph, reader, fresh)
        channels_last = can_be_channels_last(graph, reader, fresh)
        steps = [getattr(node.target, "step", node.target) for node in graph.nodes if node in fresh]
        gather(step for step in steps if isinstance(step, PackedStep))
        if channels_last:
            mark_planar(graph, fresh)
        _join(graph)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr":
            _erase_unused(graph, node)
    graph.lint()
    # One that is called here and computed by a step there is not called as often as it was.
    called = _modules_of(reader, graph.nodes) - _modules_of(reader, gone)
    return programs(region.module, graph, reader, channels_last=channels_last), called


def _modules_of(reader: Reader, nodes: Iterable[fx.Node]) -> set[nn.Module]:
    modules = [reader.module(node) for node in nodes]
    return {child for module in modules if module is not None for child in module.modules()}


def surroundings(reader: Reader, taken: set[fx.Node]) -> list[Match]:
    """What is not taken, but is for a kernel, too, or has a norm to be folded."""
    matches: list[Match] = []
    taken = set(taken)
    for node in reader.graph.nodes:
        for pattern in SURROUNDINGS if node not in taken else ():
            try:
                match = pattern(reader, node)
            except UnfitError:
                continue
            if match is not None and taken.isdisjoint(match.nodes):
                matches.append(match)
                taken.update(match.nodes)
                break
    return matches


def _replace(graph: fx.Graph, match: Match) -> fx.Node:
    """Computes a match's step where its first node was: there the input is what that node would have read."""
    first, last = match.nodes[0], match.nodes[-1]
    with graph.inserting_before(first):
        node = graph.call_function(match.step, match.inputs)
    node.meta["formats"] = last.meta.get("formats") if gives_image(match.step) else NO_IMAGE
    last.replace_all_uses_with(node)
    for old in reversed(match.nodes):
        graph.erase_node(old)
    return node


def _drop_identities(graph: fx.Graph, reader: Reader) -> list[fx.Node]:
    identities = [node for node in graph.nodes if reader.is_identity(node)]
    for node in identities:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return identities


def _add_to_steps(graph: fx.Graph, reader: Reader, fresh: set[fx.Node]) -> None:
    """Sums of a step's result, which nobody else reads, and something else: by the step itself, where it can
    and the other summand is there in time, else where the result is."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in place:
        if node.target not in (operator.add, operator.iadd, torch.add) or len(node.args) != 2 or node.kwargs:
            continue
        sides = [node.args, node.args[::-1]]
        # `b += a` writes to b, which others may read.
        for a, b in sides[: 1 if node.target is operator.iadd else 2]:
            if not (a in fresh and len(a.users) == 1 and isinstance(b, fx.Node) and b is not a):
                continue
            in_time = place[b] < place[a] and b.op != "get_attr"
            # The step reads it where it is itself. It may be another by the sum. (A summand of another shape
            # is for the step to find.)
            if _can_add(a.target) and in_time and not Memory(graph, reader, fresh).is_written(b, a, node):
                a.target.residual, a.target.residual_first = True, a is node.args[1]
                a.args = *a.args, b
                a.meta["formats"] = node.meta.get("formats")
                node.replace_all_uses_with(a)
                graph.erase_node(node)
            else:
                node.target, node.args = add if a is node.args[0] else add_behind, (a, b)
            break


def _can_add(step: Any) -> bool:
    if not isinstance(step, PackedStep) or step.weights[1] is None:
        return False
    return not (step.residual or getattr(step, "sum_with_input", False))


def _join(graph: fx.Graph) -> None:
    """Makes one step of steps with nothing but such between them. What nobody reads is not computed."""
    for node in reversed(list(graph.nodes)):
        if hasattr(node.target, "link"):
            _erase_unused(graph, node)
    run: list[fx.Node] = []
    for node in list(graph.nodes):
        if hasattr(node.target, "link"):
            run.append(node)
        elif node.op not in ("placeholder", "get_attr"):
            _join_run(graph, run)
            run = []


def _join_run(graph: fx.Graph, run: list[fx.Node]) -> None:
    def arguments(node: fx.Node) -> tuple[Any, ...]:
        return node.args  # all of them nodes

    inside = set(run)
    outputs = [node for node in run if not inside.issuperset(node.users)]
    if len(run) < 2 or not outputs:
        return
    inputs = list(dict.fromkeys(arg for node in run for arg in arguments(node) if arg not in inside))
    number = {node: i for i, node in enumerate([*inputs, *run])}
    operands = [tuple(number[arg] for arg in arguments(node)) for node in run]
    links: list[Any] = [node.target for node in run]
    step = SeriesStep(links, operands, len(inputs), [number[node] for node in outputs])
    with graph.inserting_after(run[-1]):
        joined = graph.call_function(step, tuple(inputs))
    results = [joined]
    if len(outputs) > 1:
        with graph.inserting_after(joined):
            results = [graph.call_function(operator.getitem, (joined, i)) for i in range(len(outputs))]
    for node, result in zip(outputs, results, strict=True):
        result.meta["formats"] = node.meta.get("formats")
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        graph.erase_node(node)
