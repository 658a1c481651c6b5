"""From a module to the graph of its forward, by torch.fx."""

from __future__ import annotations

import inspect
import operator
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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


class _ChangedError(ValueError):
    """The forward, or another thread in the meantime, has changed something that does not belong to it."""


class _Unchanged:
    """What tracing must leave alone: a forward that writes to its module means more than its graph says.

    The modules' attributes, and what can be reached from those: the contents of lists, dictionaries and sets,
    and the attributes of plain objects.
    """

    def __init__(self, module: nn.Module) -> None:
        owners = [child.__dict__ for child in module.modules()]
        containers, tensors = _reached(owners)
        self._filled = [(container, _contents(container)) for container in containers]
        # A forward has the parameters as stand-ins; to all other tensors it may write.
        self.tensors = list({id(x): x for x in (*module.parameters(), *tensors)}.values())
        parameters = {id(x) for x in module.parameters()}
        self._values = [
            (x, _version(x), None if id(x) in parameters else x.detach().clone()) for x in self.tensors
        ]

    def restore(self) -> bool:
        """Puts back what was changed; False where there was something."""
        unchanged = True
        for tensor, version, value in self._values:
            if _version(tensor) != version:
                unchanged = False
                if value is not None:
                    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                        tensor.resize_(value.shape).copy_(value)
        for container, before in self._filled:
            now = _contents(container)
            if len(now) != len(before) or not all(map(operator.is_, now, before)):
                _refill(container, before)
                unchanged = False
        return unchanged


_MOST_REACHED = 10_000


def _reached(owners: list[dict[str, Any]]) -> tuple[list[Any], list[Tensor]]:
    """Containers and tensors that can be reached from these, as far as there are not too many."""
    containers, tensors, waiting = [], [], deque[Any](owners)
    seen = {id(owner) for owner in owners}
    while waiting and len(seen) < _MOST_REACHED:
        found = waiting.popleft()
        if isinstance(found, Tensor):
            tensors.append(found)
            continue
        held: Any = ()
        if isinstance(found, (dict, list, set, deque)):
            containers.append(found)
            held = _contents(found)
        elif isinstance(found, (tuple, frozenset)):
            held = found
        elif isinstance(attributes := getattr(found, "__dict__", None), dict):
            held = (attributes,)
        for value in held:
            # Modules are owners, or none of this module's; functions and classes belong to the program.
            if id(value) not in seen and not isinstance(value, _NOT_REACHED):
                seen.add(id(value))
                waiting.append(value)
    return containers, tensors


_NOT_REACHED = (
    *(nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(str, bytes, int, float, complex, type(None), fx.Graph, fx.Node),
)


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


class _Reads(TorchFunctionMode):
    """Collects the tensors that a trace computes with at once, not by a stand-in: what it makes of them is a
    constant in its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        if not any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
            self.tensors += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return func(*args, **(kwargs or {}))


@dataclass
class Trace:
    """A graph, and the tensors of the module whose numbers, or sizes, are constants in it."""

    graph: fx.Graph
    read: list[Tensor]


def trace(module: nn.Module, *, gradients: bool) -> Trace:
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


def _trace(module: nn.Module, *, gradients: bool) -> Trace:
    unchanged, numbers, reads = _Unchanged(module), RandomState(), _Reads()
    try:
        with torch.autocast("cpu", enabled=False), reads:
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
    read = {id(x) for x in reads.tensors}
    return Trace(graph, [x for x in unchanged.tensors if id(x) in read])


def _nodes_of(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]
