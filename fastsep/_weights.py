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
    layer: SeparableConv2d, source: Arrays, prefix: str = "", *, norm_eps: float = 1e-5
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
    prefix: of the names in a state dict, with or without a dot at its end.
    norm_eps: of the norms, which a state dict does not tell.

    ValueError where names, shapes or biases do not fit, or where there is more under the prefix than this;
    TypeError for another kind of layer or source. The layer is changed only if all fits.
    """
    if not isinstance(layer, SeparableConv2d):
        raise TypeError(f"layer must be a SeparableConv2d, got {type(layer).__name__}")
    found = _halves(_named(source), prefix, norm_eps)
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
    return loaded


def _halves(source: Mapping[str, Any], prefix: str, norm_eps: float) -> dict[str, Tensor]:
    """The state dict of a SeparableConv2d with what is under a prefix."""
    start = prefix if not prefix or prefix.endswith(".") else prefix + "."
    under = {name[len(start) :]: value for name, value in source.items() if name.startswith(start)}
    if not under:
        raise ValueError(f"prefix must be that of a name in the source, got {prefix!r}")
    keras = _keras_names(under)
    if keras:
        return _from_keras(keras)
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
                found[f"{ours}.{part}"] = rest.pop(name).detach()
        for norm in norms:
            if f"{norm}.running_mean" in rest:
                _fold(found, ours, {name: rest.pop(f"{norm}.{name}", None) for name in _NORM_PARTS}, norm_eps)
    if rest:
        raise ValueError(
            f"source must hold a separable convolution and its norms only, got {', '.join(rest)}"
        )
    return found


_NORM_PARTS = "running_mean", "running_var", "weight", "bias"


def _fold(found: dict[str, Tensor], half: str, norm: Mapping[str, Tensor | None], eps: float) -> None:
    mean, variance, weight, bias = (None if (t := norm[n]) is None else t.double() for n in _NORM_PARTS)
    assert mean is not None
    if variance is None:
        raise ValueError(
            f"source must have a running_var beside the running_mean behind its {half} convolution"
        )
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
    kernel = found[f"{half}.weight"]
    before = found.get(f"{half}.bias", torch.zeros_like(mean)).double()
    shift = (before - mean) * scale if bias is None else (before - mean) * scale + bias
    found[f"{half}.weight"] = (kernel.double() * scale.view(-1, 1, 1, 1)).to(kernel.dtype)
    found[f"{half}.bias"] = shift.to(kernel.dtype)


def _keras_names(under: Mapping[str, Any]) -> dict[str, Any]:
    """Keras' arrays by their own names, whatever path and number Keras put around them."""
    found = {}
    for name, value in under.items():
        last = name.rpartition("/")[2].partition(":")[0]
        if last in _KERAS and "." not in name:
            found[last] = value
    return found if "depthwise_kernel" in found else {}


def _from_keras(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    if "pointwise_kernel" not in arrays:
        raise ValueError(f"source must have a pointwise_kernel, got {', '.join(arrays)}")
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
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
