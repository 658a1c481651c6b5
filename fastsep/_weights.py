"""load_from: the weights of a separable convolution as other libraries name and order them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .modules import SeparableConv2d

# What a half is called: our own, mmcv's, timm's, torchvision's and other people's spellings.
_NAMES = "depthwise", "pointwise"
_DEPTHWISE = (
    *("depthwise", "depthwise_conv.conv", "depthwise_conv", "conv_dw", "dw_conv.conv", "dw_conv", "dwconv"),
    *("conv1", "conv_depth", "dw", "0"),
)
_POINTWISE = (
    *("pointwise", "pointwise_conv.conv", "pointwise_conv", "conv_pw", "conv_pwl", "pw_conv.conv", "pw_conv"),
    *("pwconv", "conv_point", "pw", "1"),
)
# The norms behind each half: mmcv's, detectron2's, timm's.
_NORMS = (
    ("depthwise_conv.bn", "depthwise.norm", "bn1", "bn_dw"),
    ("pointwise_conv.bn", "pointwise.norm", "bn2", "bn_pw"),
)
# Keras' names and those of its checkpoints' variables.
_KERAS = "depthwise_kernel", "pointwise_kernel", "bias"

Arrays = Mapping[str, Any] | Sequence[Any] | nn.Module | str | Path


def load_from(
    layer: SeparableConv2d, source: Arrays, prefix: str = "", *, norm_eps: float | None = None
) -> SeparableConv2d:
    """Fills a layer with weights from elsewhere, and returns it.

    >>> layer = load_from(SeparableConv2d(3, 32, 3), keras_layer.get_weights())
    >>> layer = load_from(SeparableConv2d(32, 64, 3, bias=False), "checkpoint.pt", prefix="blocks.1.0")

    It knows the names of PyTorch (`depthwise`, `pointwise`), timm (`conv_dw`, `conv_pw`), its older Xception
    (`conv1`, `pointwise`), mmcv (`depthwise_conv.conv`, `pointwise_conv.conv`), detectron2 (`depthwise`,
    `pointwise`) and segmentation_models_pytorch (`0`, `1`), and Keras' arrays, which are channels-last.

    A batch normalization behind a half (mmcv's `bn`, detectron2's `norm`, timm's `bn1` and `bn2`) is folded
    into it, as it computes at inference; the layer then needs that half's bias.

    layer: its sizes are those of the weights; it must have the biases that the source has, and no others.
    source: a state dict, an nn.Module, the path of a checkpoint, which is read with weights_only, a mapping
        with Keras' names (`depthwise_kernel` [kh, kw, C, m], `pointwise_kernel` [1, 1, C*m, K], `bias` [K]),
        or the list of these arrays that a Keras layer's get_weights() returns.
    prefix: of the names, which goes up to a dot or a slash, with or without that.
    norm_eps: of the norms; by default the norms' own where the source is an nn.Module, and nn.BatchNorm2d's
        1e-5 where it is a state dict, which does not tell.

    ValueError where names, shapes or biases do not fit, or where there is more under the prefix than this;
    TypeError for another kind of layer or source. The layer is changed only if all fits.
    """
    if not isinstance(layer, SeparableConv2d):
        raise TypeError(f"layer must be a SeparableConv2d, got {type(layer).__name__}")
    under = _under(_named(source), prefix)
    if not under:
        raise ValueError(f"prefix must be that of a name in the source, got {prefix!r}")
    if any(_keras_name(name) == _KERAS[0] for name in under):
        found = _from_keras(under)
    else:
        own = _under(_eps(source), prefix) if norm_eps is None else {}
        found = _halves(under, own, 1e-5 if norm_eps is None else norm_eps)
    expected = layer.state_dict()
    for name in expected:
        if name not in found:
            raise ValueError(f"source must have a {name} for the layer, got {', '.join(found)}")
    for name, value in found.items():
        if name not in expected:
            raise ValueError(f"layer must have a {name} like the source, got one without")
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{name} must be {list(expected[name].shape)} as in the layer, got {list(value.shape)}"
            )
    layer.load_state_dict(found)
    return layer


def _named(source: Any) -> Mapping[str, Any]:
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, (str, Path)):
        return _checkpoint(torch.load(source, map_location="cpu", weights_only=True))
    if isinstance(source, Mapping):
        return _checkpoint(source)
    if isinstance(source, Sequence):
        if len(source) not in (2, 3):
            raise ValueError(f"source must have two or three arrays, as Keras' layer does, got {len(source)}")
        return dict(zip(_KERAS, source, strict=False))
    raise TypeError(
        "source must be a state dict, an nn.Module, the path of a checkpoint or a list of Keras' arrays, "
        f"got {type(source).__name__}"
    )


def _checkpoint(loaded: Any) -> Mapping[str, Any]:
    """The state dict in what a training saved."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise TypeError(f"source must hold a state dict, got {type(loaded).__name__}")
    for name in loaded:
        if not isinstance(name, str):
            raise TypeError(f"source must have names as its keys, got {name!r}")
    return loaded


def _eps(source: Arrays) -> dict[str, float]:
    """Of each norm in a module, by its name; a state dict does not tell."""
    if not isinstance(source, nn.Module):
        return {}
    modules = source.named_modules(remove_duplicate=False)
    return {
        name: module.eps for name, module in modules if isinstance(getattr(module, "eps", None), (int, float))
    }


def _under(source: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What has the prefix, by the rest of its name."""
    starts = (prefix,) if not prefix or prefix[-1] in "./" else (f"{prefix}.", f"{prefix}/")
    return {name[len(starts[0]) :]: value for name, value in source.items() if name.startswith(starts)}


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a tensor or an array of numbers, got {type(value).__name__}"
        ) from error


def _halves(under: Mapping[str, Any], own_eps: Mapping[str, float], norm_eps: float) -> dict[str, Tensor]:
    """The state dict of a SeparableConv2d with these names."""
    found: dict[str, Tensor] = {}
    rest = {name: value for name, value in under.items() if not name.endswith(".num_batches_tracked")}
    for ours, spellings, norms in zip(_NAMES, (_DEPTHWISE, _POINTWISE), _NORMS, strict=True):
        spelled = [name for name in spellings if f"{name}.weight" in under]
        if not spelled:
            raise ValueError(
                f"source must name its {ours} convolution's weights one of {', '.join(spellings)}, "
                f"got {', '.join(under)}"
            )
        for part in ("weight", "bias"):
            if (name := f"{spelled[0]}.{part}") in rest:
                found[f"{ours}.{part}"] = _tensor(name, rest.pop(name))
        for norm in norms:
            if f"{norm}.running_mean" in rest:
                parts = {part: rest.pop(f"{norm}.{part}", None) for part in _NORM_PARTS}
                _fold(found, ours, norm, parts, own_eps.get(norm, norm_eps))
    if rest:
        raise ValueError(
            f"source must hold a separable convolution and its norms only, got {', '.join(rest)}"
        )
    return found


_NORM_PARTS = "running_mean", "running_var", "weight", "bias"


def _fold(found: dict[str, Tensor], half: str, norm: str, parts: Mapping[str, Any], eps: float) -> None:
    """A norm into the weight and the bias of the half before it."""
    if parts["running_var"] is None:
        raise ValueError(
            f"source must have a running_var beside the running_mean behind its {half} convolution"
        )
    kernel = found[f"{half}.weight"]
    values = {name: _tensor(f"{norm}.{name}", value) for name, value in parts.items() if value is not None}
    values["convolution's bias"] = found.get(f"{half}.bias", torch.zeros(kernel.shape[:1]))
    for name, value in values.items():
        if value.shape != kernel.shape[:1]:
            raise ValueError(
                f"{norm}'s {name} must be {list(kernel.shape[:1])} as the {half} convolution's weight is "
                f"{list(kernel.shape)}, got {list(value.shape)}"
            )
    values = {name: value.double() for name, value in values.items()}
    scale = (values["running_var"] + eps).rsqrt() * values.get("weight", 1.0)
    shift = (values["convolution's bias"] - values["running_mean"]) * scale + values.get("bias", 0.0)
    found[f"{half}.weight"] = (kernel.double() * scale.view(-1, 1, 1, 1)).to(kernel.dtype)
    found[f"{half}.bias"] = shift.to(kernel.dtype)


def _keras_name(name: str) -> str:
    """Keras' own, without the path before it and the number behind it."""
    return name.rpartition("/")[2].partition(":")[0]


def _from_keras(under: Mapping[str, Any]) -> dict[str, Tensor]:
    folders = dict.fromkeys(name.rpartition("/")[0] for name in under)
    if len(folders) > 1:
        raise ValueError(f"source must hold one layer under the prefix, got {', '.join(folders)}")
    tensors: dict[str, Tensor] = {}
    for name, value in under.items():
        known = _keras_name(name)
        if known not in _KERAS or known in tensors:
            raise ValueError(
                f"source must have one each of {', '.join(_KERAS)} and no more, got {', '.join(under)}"
            )
        tensors[known] = _tensor(name, value)
    if "pointwise_kernel" not in tensors:
        raise ValueError(f"source must have a pointwise_kernel, got {', '.join(under)}")
    depthwise, pointwise = tensors["depthwise_kernel"], tensors["pointwise_kernel"]
    if depthwise.dim() != 4 or pointwise.dim() != 4:
        raise ValueError(
            "depthwise_kernel and pointwise_kernel must have four dimensions, "
            f"got {list(depthwise.shape)} and {list(pointwise.shape)}"
        )
    kh, kw, channels, multiplier = depthwise.shape
    found = {
        "depthwise.weight": depthwise.permute(2, 3, 0, 1).reshape(channels * multiplier, 1, kh, kw),
        "pointwise.weight": pointwise.permute(3, 2, 0, 1).contiguous(),
    }
    return found | ({"pointwise.bias": tensors["bias"]} if "bias" in tensors else {})
