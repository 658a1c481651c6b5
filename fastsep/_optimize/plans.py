"""From a traced module to the plan that its forward runs by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import fx, nn

from .chains import Reader, UnfitError
from .forward import Plan, State
from .patterns import PATTERNS, TRAINING_PATTERNS, Match
from .report import Candidate
from .rewrite import drop_rank_checks, rewrite, surroundings
from .trace import Region, inference_tensor, trace
from .verify import match_error, tolerance_of

Mode = Literal["inference", "training"]
Filter = Callable[[nn.Module, str], bool]


class Maker:
    """Makes plans of one module: at first, and whenever its weights have changed."""

    def __init__(self, name: str, mode: Mode) -> None:
        self.name, self.mode = name, mode
        self.left: set[str] = set()  # what filter_fn wanted to be left

    def __call__(self, module: nn.Module) -> Plan:
        inference = self.mode == "inference"
        nothing = Plan(State(module, set(), weights=inference))
        if inference and (any(child.training for child in module.modules()) or inference_tensor(module)):
            return nothing
        try:
            return self.plan(Region(self.name, module, trace(module, gradients=not inference)))[0]
        except (TypeError, ValueError):
            return nothing

    def plan(
        self, region: Region, filter_fn: Filter | None = None, *, verify: bool = False
    ) -> tuple[Plan, list[Candidate]]:
        """The plan, without a graph where there is nothing for a kernel, and every candidate with the reason.

        For inference what is around the candidates is folded, too, and given to kernels.
        """
        inference = self.mode == "inference"
        drop_rank_checks(region)
        reader = Reader(region.module, region.graph, folding=inference)
        matches, candidates, filtered = self._find(reader, filter_fn, verify)
        if inference and candidates:
            taken = filtered.union(*(match.nodes for match in matches))
            matches += surroundings(reader, taken)
        if not any(match.convolution is not None for match in matches):
            return Plan(State(region.module, set(), weights=inference)), candidates
        graph, called, channels_last = rewrite(region, matches, inference=inference)
        return Plan(State(region.module, called, weights=inference), graph, channels_last), candidates

    def _find(
        self, reader: Reader, filter_fn: Filter | None, verify: bool
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
            candidate = Candidate(name, False, "filter_fn")
            candidates.append(candidate)
            if filter_fn is not None and not filter_fn(reader.module(node) or reader.root, name):
                self.left.add(name)
            if name in self.left:
                filtered.add(node)
                continue
            try:
                match = self._match(reader, node, taken)
                if verify:
                    candidate.error = match_error(reader, match)
                    if not candidate.error <= tolerance_of(match):
                        raise UnfitError(f"differs by {candidate.error:.1e} of the largest output")
            except UnfitError as unfit:
                candidate.reason = str(unfit)
            else:
                candidate.fused, candidate.reason = True, match.kind
                matches.append(match)
                taken.update(match.nodes)
        return matches, candidates, filtered

    def _match(self, reader: Reader, node: fx.Node, taken: set[fx.Node]) -> Match:
        for pattern in PATTERNS if self.mode == "inference" else TRAINING_PATTERNS:
            match = pattern(reader, node)
            if match is not None and taken.isdisjoint(match.nodes):
                return match
        raise UnfitError("no pattern fits")
