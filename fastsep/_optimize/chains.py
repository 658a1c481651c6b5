"""What the nodes of a graph are: convolutions, norms and activations, whichever way they were written."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._activations import activation_name
from ..depthwise import DepthwiseConv2d
from ..functional import Pads, parse_padding
from ..modules import SeparableConv2d
from .trace import IN_PLACE, why_opaque


class UnfitError(Exception):
    """A node is of the kind that was asked for, but not one that can be fused; the text says why."""


@dataclass(frozen=True)
class Convolution:
    node: fx.Node
    name: str
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: Pads | str  # "same": TensorFlow's, which depends on the input
    dilation: tuple[int, int]
    groups: int
    module: nn.Conv2d | None = None
    activation: str = "identity"  # of a DepthwiseConv2d

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.weight.shape[1] == 1

    @property
    def is_pointwise(self) -> bool:
        plain = self.groups == 1 and self.stride == (1, 1) and self.padding == (0, 0, 0, 0)
        return plain and self.weight.shape[2:] == (1, 1)


@dataclass(frozen=True)
class Affine:
    """scale * x + shift for each channel, in float64: a batch normalization at inference."""

    scale: Tensor
    shift: Tensor

    def behind(self, convolution: Convolution) -> Convolution:
        """The convolution with this folded into it."""
        weight, bias = convolution.weight.detach(), convolution.bias
        shift = self.shift if bias is None else self.shift + self.scale * bias.detach().double()
        folded = weight.double() * self.scale.view(-1, 1, 1, 1)
        return replace(convolution, weight=folded.to(weight.dtype), bias=shift.to(weight.dtype))


_MODULE_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
_FUNCTION_ACTIVATIONS: dict[Any, str] = {
    name: spelling
    for spelling, names in {
        "relu": (F.relu, torch.relu, torch.relu_, "relu", "relu_"),
        "relu6": (F.relu6,),
        "silu": (F.silu,),
        "hardswish": (F.hardswish,),
        "hardsigmoid": (F.hardsigmoid,),
        "sigmoid": (F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"),
        "tanh": (F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"),
    }.items()
    for name in names
}
# What is an activation all the same, so that a reason can say so.
_OTHER_ACTIVATIONS = (
    *(nn.PReLU, nn.ELU, nn.Mish, nn.SELU, nn.CELU, nn.Softplus, nn.RReLU, nn.GLU, nn.Hardtanh, nn.LeakyReLU),
    *(nn.GELU, nn.Softsign, nn.Tanhshrink, nn.Threshold),
)
_OTHER_NORMS = nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, nn.LocalResponseNorm
_NO_OPERATION = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    nn.FeatureAlphaDropout,
)
# Functions that hand their input on where `training` is False, by module and name: torchvision is optional.
_NO_OPERATION_FUNCTIONS = {
    *(("torch.nn.functional", f"{kind}dropout") for kind in ("", "alpha_", "feature_alpha_")),
    *(("torch.nn.functional", f"dropout{rank}d") for rank in (1, 2, 3)),
    ("torchvision.ops.stochastic_depth", "stochastic_depth"),
}
_CONV2D_ARGUMENTS = "input", "weight", "bias", "stride", "padding", "dilation", "groups"


class Reader:
    """Reads the nodes of one region's graph.

    It has an UnfitError for norms that cannot be folded: those with batch statistics, and without `folding`
    all, for then the weights may change.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, *, folding: bool = True) -> None:
        self.root, self.graph, self.folding = root, graph, folding
        self.modules = dict(root.named_modules(remove_duplicate=False))

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def depthwise_name(self, node: fx.Node) -> str | None:
        """The name of the depthwise convolution that a node is or, as a SeparableConv2d, begins with."""
        module = self.module(node)
        if isinstance(module, SeparableConv2d):
            return f"{node.target}.depthwise"
        if isinstance(module, nn.Conv2d):
            return str(node.target) if 1 < module.groups == module.in_channels else None
        try:
            convolution = self.convolution(node)
        except UnfitError:
            return None
        return convolution.name if convolution is not None and convolution.is_depthwise else None

    def convolution(self, node: fx.Node) -> Convolution | None:
        """None for another kind of node; UnfitError for a convolution that does more than it says."""
        module = self.module(node)
        if isinstance(module, nn.Conv2d):
            return self._module_convolution(node, module, str(node.target))
        if node.op == "call_function" and node.target in (F.conv2d, torch.conv2d):
            return self._function_convolution(node)
        return None

    def _module_convolution(self, node: fx.Node, module: nn.Conv2d, name: str) -> Convolution:
        if why := why_opaque(module):
            raise UnfitError(f"{why} on {name}")
        same = type(module).__module__ == "timm.layers.conv2d_same" and type(module).__name__ == "Conv2dSame"
        kind = DepthwiseConv2d if isinstance(module, DepthwiseConv2d) else nn.Conv2d
        if not same and not _forwards_as(module, kind, "forward", "_conv_forward"):
            raise UnfitError(f"{name} is a {type(module).__name__}, not an nn.Conv2d")
        if module.padding_mode != "zeros":
            raise UnfitError(f"padding_mode of {name} is {module.padding_mode!r}")
        if len(node.args) != 1 or node.kwargs:
            raise UnfitError(f"{name} is called with more than an input")
        padding: Any = "same" if same else module.padding
        activation = "identity"
        if isinstance(module, DepthwiseConv2d):
            activation = activation_name(module.activation, "activation")
        return _checked(
            Convolution(
                *(node, name, module.weight, module.bias, _pair(module.stride)),
                _pads(padding, name),
                _pair(module.dilation),
                module.groups,
                module,
                activation,
            )
        )

    def _function_convolution(self, node: fx.Node) -> Convolution:
        given = dict(zip(_CONV2D_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
        weight, bias = (self.constant(given.get(name)) for name in ("weight", "bias"))
        rest = [given.get(name, 0 if name == "padding" else 1) for name in _CONV2D_ARGUMENTS[3:]]
        known = isinstance(weight, Tensor) and (bias is None) == (given.get("bias") is None)
        if not known or any(isinstance(value, fx.Node) for value in fx.node.map_aggregate(rest, lambda v: v)):
            raise UnfitError(f"the weights of {node.name} are computed")
        stride, padding, dilation, groups = rest
        assert isinstance(weight, Tensor)
        name = str(cast("fx.Node", given["weight"]).target).rpartition(".")[0] or node.name
        pads = _pads(padding, name)
        return _checked(
            Convolution(node, name, weight, bias, _pair(stride), pads, _pair(dilation), cast("int", groups))
        )

    def separable(self, node: fx.Node, layer: SeparableConv2d) -> tuple[Convolution, str, Convolution, str]:
        """The two convolutions of a layer, and the activation behind each."""
        if why := why_opaque(layer):
            raise UnfitError(f"{why} on {node.target}")
        if not _forwards_as(layer, SeparableConv2d, "forward"):
            raise UnfitError(f"{node.target} is a {type(layer).__name__}, not a SeparableConv2d")
        halves = []
        for name in ("depthwise", "pointwise"):
            child = getattr(layer, name)
            if not isinstance(child, nn.Conv2d):
                raise UnfitError(f"{name} of {node.target} is a {type(child).__name__}, not an nn.Conv2d")
            halves.append(self._module_convolution(node, child, f"{node.target}.{name}"))
        depthwise, pointwise = halves
        if layer._padding is not None:  # what nn.Conv2d cannot hold
            depthwise = replace(depthwise, padding=parse_padding(layer._padding))
        if not layer._is_fusable(layer.depthwise, layer.pointwise):
            raise UnfitError(
                f"the children of {node.target} are no plain depthwise and pointwise convolution"
            )
        mid = activation_name(layer.mid_activation, "mid_activation")
        return depthwise, mid, pointwise, activation_name(layer.activation, "activation")

    def constant(self, argument: Any) -> Tensor | None:
        """The parameter or buffer that an argument is."""
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            return None
        value = operator.attrgetter(str(argument.target))(self.root)
        return value if isinstance(value, Tensor) else None

    def affine(self, node: fx.Node) -> Affine | None:
        """A batch normalization with its running statistics; UnfitError for norms of other kinds."""
        module = self.module(node)
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            if why := why_opaque(module):
                raise UnfitError(f"{why} on {node.target}")
            if not any(_forwards_as(module, kind, "forward") for kind in (nn.BatchNorm2d, nn.SyncBatchNorm)):
                raise UnfitError(f"{node.target} is a {type(module).__name__}, not an nn.BatchNorm2d")
            statistics = module.running_mean, module.running_var
            training = module.training
            scales: tuple[Tensor | None, Tensor | None] = module.weight, module.bias
            eps = module.eps
        elif isinstance(module, _OTHER_NORMS):
            raise UnfitError(f"{type(module).__name__} between")
        elif node.op == "call_function" and node.target is F.batch_norm:
            given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
            given.apply_defaults()
            values = given.arguments
            statistics = self.constant(values["running_mean"]), self.constant(values["running_var"])
            scales = self.constant(values["weight"]), self.constant(values["bias"])
            training, eps = values["training"], values["eps"]
            if isinstance(training, fx.Node) or isinstance(eps, fx.Node):
                raise UnfitError("the batch norm between takes its settings from the input")
        else:
            return None
        (mean, variance), (weight, bias) = statistics, scales
        if training or mean is None or variance is None:
            raise UnfitError("batch statistics between")
        if not self.folding:
            raise UnfitError("a norm between, which is folded for inference only")
        scale = (variance.detach().double() + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.detach().double()
        shift = -mean.detach().double() * scale
        return Affine(scale, shift if bias is None else shift + bias.detach().double())

    def activation(self, node: fx.Node) -> str | None:
        """The operator's name of an activation; UnfitError for one that it does not have."""
        module = self.module(node)
        if module is not None:
            name = _MODULE_ACTIVATIONS.get(type(module)) or _parametrised_activation(module)
            if (name or isinstance(module, _OTHER_ACTIVATIONS)) and (why := why_opaque(module)):
                raise UnfitError(f"{why} on {node.target}")
            if name is None and isinstance(module, _OTHER_ACTIVATIONS):
                raise UnfitError(f"no kernel for the activation {module}")
            return name
        if node.op not in ("call_function", "call_method") or len(node.args) < 1:
            return None
        name = _FUNCTION_ACTIVATIONS.get(node.target)
        if name is not None:  # beside the tensor nothing but `inplace`
            settings = *node.args[1:], *node.kwargs.values()
            return name if all(isinstance(value, bool) for value in settings) else None
        if node.target in (F.hardtanh, F.leaky_relu, F.gelu):
            return _function_with_settings(node)
        return None

    def writes(self, node: fx.Node) -> bool:
        """Whether a node may write to its first argument."""
        module = self.module(node)
        if module is not None:
            return bool(getattr(module, "inplace", False)) or bool(why_opaque(module))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name in (*IN_PLACE, "setitem"):
            return True
        if node.op == "call_method":
            return False
        return any(value is True for value in node.args) or node.kwargs.get("inplace", False) is not False

    def written(self, node: fx.Node) -> list[fx.Node]:
        """The arguments that a node may write to."""
        written = node.all_input_nodes[:1] if self.writes(node) else []
        fx.node.map_arg(node.kwargs.get("out"), written.append)
        return written

    def is_identity(self, node: fx.Node) -> bool:
        """Whether a node hands its input on as it is."""
        if node.op == "call_function":
            return _hands_on(node)
        module = self.module(node)
        if module is None or why_opaque(module) or len(node.args) != 1:
            return False
        return type(module) is nn.Identity or (type(module) in _NO_OPERATION and not module.training)


def _forwards_as(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether a module of some subclass does what its base does."""
    methods = (*methods, "__call__", "_call_impl")
    return all(getattr(type(module), name) is getattr(kind, name) for name in methods)


def _hands_on(node: fx.Node) -> bool:
    target: Any = node.target
    if (getattr(target, "__module__", ""), getattr(target, "__name__", "")) not in _NO_OPERATION_FUNCTIONS:
        return False
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    bound = inspect.signature(target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments["training"] is False


def _parametrised_activation(module: nn.Module) -> str | None:
    if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6):
        return "relu6"
    if type(module) is nn.LeakyReLU and module.negative_slope == 0.01:
        return "leaky_relu"
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return None


def _function_with_settings(node: fx.Node) -> str | None:
    settings: list[Any] = list(node.args[1:])
    keys = dict(node.kwargs)
    keys.pop("inplace", None)
    if node.target is F.hardtanh:
        low = settings[0] if settings else keys.get("min_val", -1.0)
        high = settings[1] if len(settings) > 1 else keys.get("max_val", 1.0)
        return "relu6" if (low, high) == (0, 6) else None
    if node.target is F.leaky_relu:
        slope = settings[0] if settings else keys.get("negative_slope", 0.01)
        return "leaky_relu" if slope == 0.01 else None
    approximate = str(keys.get("approximate", "none"))
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


def _checked(convolution: Convolution) -> Convolution:
    for tensor in (convolution.weight, convolution.bias):
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
            raise UnfitError(f"a weight of {convolution.name} is a {type(tensor).__name__}")
        if tensor is not None and tensor.layout is not torch.strided:
            raise UnfitError(f"a weight of {convolution.name} is not dense in memory")
        if tensor is not None and tensor.is_inference():
            raise UnfitError(f"a weight of {convolution.name} was made in torch.inference_mode()")
    return convolution


def _pair(value: Any) -> tuple[int, int]:
    """Both numbers; one alone, in a sequence, too, counts for both."""
    first, *rest = value if isinstance(value, tuple | list) else (value,)
    (second,) = rest or (first,)
    return int(first), int(second)


def _pads(value: Any, name: str) -> Pads | str:
    try:
        return parse_padding(value * 2 if isinstance(value, tuple | list) and len(value) == 1 else value)
    except (RuntimeError, TypeError) as error:
        raise UnfitError(f"padding of {name} is {value!r}") from error
