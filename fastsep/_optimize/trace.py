"""From a module to graphs of it, by torch.fx; where a forward cannot be traced, from its children."""

from __future__ import annotations

import copy
import inspect
import operator
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from ..modules import SeparableConv2d
from .randomness import RandomState


def why_opaque(module: nn.Module) -> str:
    """Why a module has to be called as it is, in words; empty where its forward may be taken apart."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "a hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "a backward hook"
    if "forward" in module.__dict__:
        return "a forward of its own"
    if hasattr(module, "parametrizations"):
        return "a parametrization"
    return ""


def inputs_of(forward: Callable[..., Any]) -> list[str]:
    """The arguments of a forward that have no default; ValueError where there are none or keywords.

    What has a default is left at it: `if mask is not None` would be true of any stand-in for a tensor.
    """
    names = []
    for parameter in list(inspect.signature(inspect.unwrap(forward)).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise ValueError(f"its argument {parameter.name} is a keyword without a default")
            names.append(parameter.name)
    if not names:
        raise ValueError("it has no argument without a default")
    return names


class _Careful:
    """A stand-in that refuses what it would answer wrongly, and records `x += y` as what it is: without this
    that would be traced as `x = x + y`."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What isinstance() asks for: torch.fx does, and in a forward nobody knows the answer."""
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return type(self)
        raise TypeError("it asks for the type of what it computes with")

    def __getattr__(self, name: str) -> _Attribute:
        if name.startswith("__") or name == "_fields":
            raise AttributeError(name)
        if not hasattr(Tensor, name):
            raise TypeError(f"it asks for {name}, which a tensor does not have")
        return _Attribute(cast("fx.Proxy", self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise TypeError(f"it sets {name} of a tensor")
        object.__setattr__(self, name, value)


class _Proxy(_Careful, fx.Proxy):
    """A tensor, or what else is computed from the arguments."""


class _Attribute(_Careful, Attribute):
    """An attribute of one."""


def _record(name: str) -> Callable[[fx.Proxy, Any], Any]:
    target = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


IN_PLACE = "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"
for _name in IN_PLACE:
    setattr(_Careful, f"__{_name}__", _record(_name))


class Tracer(fx.Tracer):
    """Stops where a module is torch's own, ours, a kind of convolution, or must be called as it is.

    A graph does not tell under which modes of torch its nodes ran, so all must run under the same. With
    `gradients` whether autograd records is one of them.

    torch.fx has every module of the process come to call_module() and getattr(): what another thread calls
    in the meantime is none of this graph's.
    """

    def __init__(self, *, gradients: bool) -> None:
        super().__init__()
        self.gradients, self.thread = gradients, threading.get_ident()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """torch.fx makes plain ones of all kinds of dictionaries and lists."""
        kind = type(a)
        if kind is OrderedDict:
            a = self.create_proxy("call_function", OrderedDict, (list(a.items()),), {})
        elif issubclass(kind, (dict, list)) and kind not in (dict, list):
            raise TypeError(f"it makes a {kind.__name__}")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_autocast_enabled("cpu"):
            raise TypeError("it uses autocast")
        if self.gradients and not torch.is_grad_enabled():
            raise TypeError("it computes a part without gradients")
        return super().create_node(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        names = inputs_of(root_fn)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, (SeparableConv2d, nn.Conv2d))
            or bool(why_opaque(m))
            or super().is_leaf_module(m, module_qualified_name)
        )


@dataclass
class Region:
    """A module that can be traced, and its graph. `name` is the module's, "" for the model itself."""

    name: str
    module: nn.Module
    graph: fx.Graph


class _ChangedError(ValueError):
    """The forward, or another thread in the meantime, has changed something that does not belong to it."""


class _Unchanged:
    """What tracing must leave alone: a forward that writes to its module means more than its graph says.

    Its attributes, and what the lists, dictionaries and sets among them hold; not what those hold in turn.
    """

    def __init__(self, module: nn.Module) -> None:
        owners = [child.__dict__ for child in module.modules()]
        values = [value for attributes in owners for value in attributes.values()]
        filled = [*owners, *(value for value in values if isinstance(value, (list, dict, set, deque)))]
        self._filled = [(container, _contents(container)) for container in filled]
        tensors = *module.parameters(), *module.buffers(), *(v for v in values if isinstance(v, Tensor))
        self._versions = [(tensor, _version(tensor)) for tensor in tensors]

    def restore(self) -> bool:
        """Puts attributes back; False where there was something to put back, or a tensor was written to."""
        unchanged = all(_version(tensor) == version for tensor, version in self._versions)
        for container, before in self._filled:
            now = _contents(container)
            if len(now) != len(before) or not all(map(operator.is_, now, before)):
                _refill(container, before)
                unchanged = False
        return unchanged


def _contents(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _refill(container: Any, contents: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        count = len(contents) // 2
        container.update(zip(contents[:count], contents[count:], strict=True))
    elif isinstance(container, set):
        container.update(contents)
    else:
        container.extend(contents)


def inference_tensor(module: nn.Module) -> str:
    """The name of a parameter or buffer that was made in torch.inference_mode(), or "".

    A write to one leaves no trace, so what was made of its numbers may be out of date at any time.
    """
    tensors = *module.named_parameters(), *module.named_buffers()
    return next((name for name, tensor in tensors if tensor.is_inference()), "")


def _version(tensor: Any) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


_lock = threading.RLock()  # torch.fx patches nn.Module for the whole process while it traces
_ATTEMPTS = 3


def trace(module: nn.Module, *, gradients: bool) -> fx.Graph:
    """The graph of a module's forward; TypeError or ValueError where there is none that means the same.

    gradients: whether autograd is to watch the graph, as it watches the forward.
    """
    with _lock:
        for _ in range(_ATTEMPTS - 1):
            try:
                return _trace(module, gradients=gradients)
            except _ChangedError:
                continue  # it may have been another thread's doing
        return _trace(module, gradients=gradients)


def _trace(module: nn.Module, *, gradients: bool) -> fx.Graph:
    unchanged, numbers = _Unchanged(module), RandomState()
    try:
        with torch.autocast("cpu", enabled=False):
            with torch.inference_mode(False), torch.enable_grad():
                graph = Tracer(gradients=gradients).trace(module)
            with torch.inference_mode():
                other = Tracer(gradients=False).trace(module)
    except Exception as error:
        unchanged.restore()
        numbers.restore()
        raise TypeError(str(error).strip().split("\n")[0] or type(error).__name__) from error
    drawn, written = not numbers.restore(), not unchanged.restore()
    if drawn or written:
        raise _ChangedError("it draws random numbers" if drawn else "it writes to the module")
    if _nodes_of(graph) != _nodes_of(other):
        raise ValueError("it asks whether gradients are recorded")
    return graph


def _nodes_of(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


@dataclass
class Traced:
    """A graph, and what of its module it was made of; nobody changes it. A pickle of it is empty."""

    graph: fx.Graph | None = None
    modules: list[nn.Module] = field(default_factory=list)
    traits: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module, graph: fx.Graph) -> Traced:
        modules = list(module.modules())
        return cls(graph, modules, _traits(modules))

    def graph_of(self, module: nn.Module) -> fx.Graph | None:
        """The graph, where it is still what the module's forward would be traced as."""
        modules = list(module.modules())
        return self.graph if modules == self.modules and _traits(modules) == self.traits else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        return Traced(self.graph, copy.deepcopy(self.modules, memo), self.traits)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Traced, ()


def _traits(modules: list[nn.Module]) -> list[Any]:
    """What a forward may ask its modules for beside numbers. (Of the first, which it is, no hook counts.)"""
    slots = [slots for module in modules for slots in (module._parameters, module._buffers)]
    return [
        *(module.training for module in modules),
        *(bool(why_opaque(module)) for module in modules[1:]),
        *((name, value is None) for kind in slots for name, value in kind.items()),
        *(name for module in modules for name in module._modules),
    ]


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
                graph = trace(module, gradients=gradients)
            except (TypeError, ValueError) as error:
                reasons[name] = f"could not be traced: {error}"
                inner = list(module.named_children())
            else:
                found.append(Region(name, module, graph))
                called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
                inner = [(target, module.get_submodule(target)) for target in sorted(called)]
        for child_name, child in inner:
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found, reasons
