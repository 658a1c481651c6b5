"""The parts of a model that have a graph; where a forward cannot be traced, its children are tried."""

from __future__ import annotations

import copy
import operator
import sys
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ..modules import SeparableConv2d
from .aliases import attribute_written
from .chains import Reader
from .trace import trace, why_opaque


@dataclass
class Region:
    """A module that can be traced, and its graph. `name` is the module's, "" for the model itself."""

    name: str
    module: nn.Module
    graph: fx.Graph
    read: list[Tensor] = field(default_factory=list)  # as in a Trace


@dataclass
class Traced:
    """A graph, and what of its module it was made of; nobody changes it. A pickle of it is empty."""

    graph: fx.Graph | None = None
    modules: list[nn.Module] = field(default_factory=list)
    traits: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, region: Region) -> Traced:
        if region.read:  # other numbers, another graph
            return cls()
        modules = list(region.module.modules())
        return cls(region.graph, modules, _traits(modules))

    def graph_of(self, module: nn.Module) -> fx.Graph | None:
        """The graph, where it is still what the module's forward would be traced as."""
        modules = list(module.modules())
        if modules != self.modules:
            return None
        now = _traits(modules)
        same = len(now) == len(self.traits) and all(map(operator.is_, now, self.traits))
        return self.graph if same else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        return Traced(self.graph, copy.deepcopy(self.modules, memo), copy.deepcopy(self.traits, memo))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Traced, ()


def _traits(modules: list[nn.Module]) -> list[Any]:
    """What a forward may ask its modules for beside numbers. (Of the first, which it is, no hook counts.)"""
    slots = [slots for module in modules for slots in (module._parameters, module._buffers)]
    # The stand-in for the first one's forward is the first attribute that tracing does not look at.
    attributes = [(name, value) for module in modules for name, value in module.__dict__.items()]
    return [
        *(value for name, value in attributes if name not in _OURS),
        *(bool(why_opaque(module)) for module in modules[1:]),
        *(x for kind in slots for name, value in kind.items() for x in (sys.intern(name), value is None)),
        *(sys.intern(name) for module in modules for name in module._modules),
    ]


# What optimize() puts into a module.
_OURS = "forward", "_apply", "train", "_fastsep"


def region_of(name: str, module: nn.Module, *, gradients: bool) -> Region:
    """The region of a module; TypeError or ValueError where its forward has no graph that means the same."""
    traced = trace(module, gradients=gradients)
    if written := attribute_written(traced.graph, Reader(module, traced.graph)):
        raise ValueError(f"it writes to {written}")
    return Region(name, module, traced.graph, traced.read)


def regions(model: nn.Module, *, gradients: bool) -> tuple[list[Region], dict[str, str]]:
    """Graphs that cover as much of the model as can be, and for modules without one the reason."""
    found: list[Region] = []
    reasons: dict[str, str] = {}
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        if module in seen or not any(isinstance(child, nn.Conv2d) for child in module.modules()):
            return
        seen.add(module)
        if isinstance(module, (SeparableConv2d, nn.Conv2d)):
            return
        inner: list[tuple[str, nn.Module]] = []
        if type(module).forward is nn.Module.forward:  # a list of modules, or the like
            inner = list(module.named_children())
        elif "forward" in module.__dict__:
            reasons[name] = "has a forward of its own"
        else:
            try:
                region = region_of(name, module, gradients=gradients)
            except (TypeError, ValueError) as error:
                reasons[name] = f"could not be traced: {error}"
                inner = list(module.named_children())
            else:
                found.append(region)
                called = {str(node.target) for node in region.graph.nodes if node.op == "call_module"}
                inner = [(target, module.get_submodule(target)) for target in sorted(called)]
        for child_name, child in inner:
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found, reasons
