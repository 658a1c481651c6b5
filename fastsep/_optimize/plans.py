"""From a traced module to the plan that its forward runs by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from torch import fx, nn

from .. import _native
from .chains import Reader, UnfitError
from .forward import Plan, State
from .patterns import PATTERNS, TRAINING_PATTERNS, Match
from .regions import Region, Traced, region_of
from .report import Candidate
from .rewrite import drop_rank_checks, rewrite, surroundings
from .trace import inference_tensor
from .verify import match_error, tolerance_of

Mode = Literal["inference", "training"]
Filter = Callable[[nn.Module, str], bool]

FILTERED = "filter_fn"


class Maker:
    """Makes plans of one module: at first, and whenever its weights have changed."""

    def __init__(self, name: str, mode: Mode, *, verify: bool = False) -> None:
        self.name, self.mode, self.verify = name, mode, verify
        self.left: dict[str, str] = {}  # what stays so with other weights, and why
        self.traced = Traced()

    def __call__(self, module: nn.Module) -> Plan:
        inference = self.mode == "inference"
        nothing = Plan(State(module, weights=inference))
        if inference and (any(child.training for child in module.modules()) or inference_tensor(module)):
            return nothing
        if not all(map(_native.has_memory, (*module.parameters(), *module.buffers()))):
            return nothing
        try:
            graph = self.traced.graph_of(module)
            if graph is None:
                return self.plan(region_of(self.name, module, gradients=not inference))[0]
            return self.plan(Region(self.name, module, graph))[0]
        except (TypeError, ValueError):
            return nothing

    def plan(self, region: Region, filter_fn: Filter | None = None) -> tuple[Plan, list[Candidate]]:
        """The plan, without programs where there is nothing for a kernel, and all candidates with reasons.

        For inference what is around the candidates is folded, too, and given to kernels.
        """
        inference, module = self.mode == "inference", region.module
        self.traced = Traced.of(region)
        region = replace(region, graph=copy.deepcopy(region.graph))
        attributes = {str(node.target) for node in region.graph.nodes if node.op == "get_attr"}
        state = State(module, attributes, region.read, weights=inference)  # before anything is folded
        drop_rank_checks(region)
        reader = Reader(module, region.graph, folding=inference)
        matches, candidates, filtered = self._find(reader, filter_fn)
        if inference and candidates:
            taken = filtered.union(*(match.nodes for match in matches))
            matches += surroundings(reader, taken)
        if not any(match.convolution is not None for match in matches):
            return Plan(state), candidates
        programs, called = rewrite(region, matches, inference=inference)
        if programs.contiguous is programs.channels_last is None:
            for candidate in candidates:
                if candidate.fused:
                    candidate.fused, candidate.reason = False, "which strides the results have is not known"
            return Plan(state), candidates
        state.release(called)
        return Plan(state, programs), candidates

    def _find(
        self, reader: Reader, filter_fn: Filter | None
    ) -> tuple[list[Match], list[Candidate], set[fx.Node]]:
        """The pairs, all candidates, and the nodes that filter_fn wants to be left."""
        matches: list[Match] = []
        filtered: set[fx.Node] = set()
        candidates: list[Candidate] = []
        taken: set[fx.Node] = set()
        for node in reader.graph.nodes:
            local = reader.depthwise_name(node)
            if local is None or node in taken:
                continue
            name = f"{self.name}.{local}" if self.name else local
            candidate = Candidate(name, False, FILTERED)
            candidates.append(candidate)
            if filter_fn is not None and not filter_fn(reader.module(node) or reader.root, name):
                self.left[name] = FILTERED
            if self.left.get(name) == FILTERED:
                filtered.add(node)
                continue
            try:
                if name in self.left:
                    raise UnfitError(self.left[name])
                match = self._match(reader, node, taken)
                if self.verify:
                    candidate.error = self._compare(reader, match, name)
            except UnfitError as unfit:
                candidate.reason = str(unfit)
            else:
                candidate.fused, candidate.reason = True, match.kind
                matches.append(match)
                taken.update(match.nodes)
        return matches, candidates, filtered

    def _compare(self, reader: Reader, match: Match, name: str) -> float:
        """The error of a match; UnfitError, from now on, where it is too large."""
        try:
            error = match_error(reader, match)
            if error <= tolerance_of(match):
                return error
            reason = f"differs by {error:.1e} of the largest output"
        except Exception as failure:  # in what is called, and that may be anything
            reason = f"could not be compared: {str(failure) or type(failure).__name__}"
        self.left[name] = reason.partition("\n")[0]
        raise UnfitError(self.left[name])

    def _match(self, reader: Reader, node: fx.Node, taken: set[fx.Node]) -> Match:
        for pattern in PATTERNS if self.mode == "inference" else TRAINING_PATTERNS:
            match = pattern(reader, node)
            if match is not None and taken.isdisjoint(match.nodes):
                return match
        raise UnfitError("no pattern fits")
