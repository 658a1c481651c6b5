"""The separable layers of real networks, counted from the models: what benchmarks/shapes/ holds.

python tests/shapes.py writes the files anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastsep._case import Case, format_case
from fastsep._networks import import_library

timm = import_library("timm")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "shapes"
ACTIVATIONS = {"ReLU": "relu", "ReLU6": "relu6", "SiLU": "silu", "Hardswish": "hardswish", "GELU": "gelu"}


class Source(NamedTuple):
    """A network of timm, and what of it a file holds."""

    name: str
    model: str
    size: int
    stride: int = 0  # of the output, where the network is that of a segmentation
    dilated_only: bool = False


# File: first line, networks.
FILES = {
    "mobilenet_v2": ("MobileNetV2 at 224 x 224", [Source("", "mobilenetv2_100", 224)]),
    "mobilenet_v3_large": ("MobileNetV3-Large at 224 x 224", [Source("", "mobilenetv3_large_100", 224)]),
    "mobilenet_v3_small": ("MobileNetV3-Small at 224 x 224", [Source("", "mobilenetv3_small_100", 224)]),
    "efficientnet_b0": ("EfficientNet-B0 at 224 x 224", [Source("", "efficientnet_b0", 224)]),
    "convnext_tiny": ("ConvNeXt-T at 224 x 224", [Source("", "convnext_tiny", 224)]),
    "xception": ("Xception at 299 x 299", [Source("", "legacy_xception", 299)]),
    "xception_71": ("Xception at 71 x 71, the smallest that it takes", [Source("", "legacy_xception", 71)]),
    "deeplab": (
        "DeepLabV3+ at 513 x 513, the dilated layers of its backbones, each once: MobileNetV2 with output "
        "stride 16, Xception-65 with 8",
        [
            Source("mobilenet_v2.", "mobilenetv2_100", 513, 16, dilated_only=True),
            Source("xception65.", "xception65", 513, 8, dilated_only=True),
        ],
    ),
}


class Layer(NamedTuple):
    case: Case
    comment: str


class Call(NamedTuple):
    """A module that ran: in this order, of these sizes."""

    name: str
    module: nn.Module
    input: tuple[int, ...]
    output: tuple[int, ...]


def calls(model: nn.Module, size: int) -> list[Call]:
    """Of all modules that have no children, and of norms, which timm gives their activation as a child."""
    found: list[Call] = []

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(
            lambda m, given, result: found.append(Call(name, m, tuple(given[0].shape), tuple(result.shape)))
        )

    for name, module in model.named_modules():
        if not list(module.children()) or is_norm(module):
            watch(name, module)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return found


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d)


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def is_pointwise(call: Call) -> bool:
    """Over the channels of an image, by a convolution or a linear layer; not a gate's, of one pixel."""
    if isinstance(call.module, nn.Linear):
        return len(call.input) == 4
    conv = call.module
    return isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1) and call.input[2:] != (1, 1)


def activation(between: list[Call]) -> str:
    names = [type(call.module).__name__ for call in between]
    return next((ACTIVATIONS[name] for name in names if name in ACTIVATIONS), "identity")


def layers(source: Source) -> Iterator[Layer]:
    """Each depthwise convolution with the pointwise one behind it."""
    options = {"output_stride": source.stride, "features_only": True} if source.stride else {}
    ran = calls(timm.create_model(source.model, **options).eval(), source.size)
    weighted = [i for i, call in enumerate(ran) if isinstance(call.module, (nn.Conv2d, nn.Linear))]
    for i in weighted:
        if not is_depthwise(ran[i].module):
            continue
        j = next(j for j in weighted if j > i and is_pointwise(ran[j]))
        after = next((k for k in weighted if k > j), len(ran))
        yield layer(source, ran[i], ran[i + 1 : j], ran[j], ran[j + 1 : after])


def layer(source: Source, depthwise: Call, between: list[Call], pointwise: Call, behind: list[Call]) -> Layer:
    conv = depthwise.module
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(pointwise.module, (nn.Conv2d, nn.Linear))
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = conv.kernel_size, conv.stride, conv.dilation, conv.padding
    gated = any(call.output[2:] == (1, 1) for call in between)
    normed = any(isinstance(call.module, nn.LayerNorm) for call in between)
    mid = activation([call for call in between if call.input == depthwise.output])
    # Nothing but a norm may lie between a pointwise convolution and its activation, no pooling or addition.
    plain = itertools.takewhile(
        lambda call: is_norm(call.module) or type(call.module).__name__ in {*ACTIVATIONS, "Identity"}, behind
    )
    direct = list(plain)
    case = Case(
        name=source.name + depthwise.name.rpartition(".")[0],
        **dict(zip(("c", "h", "w"), depthwise.input[1:], strict=True)),
        k=pointwise.output[1] if isinstance(pointwise.module, nn.Conv2d) else pointwise.output[-1],
        kh=kh,
        kw=kw,
        sh=sh,
        sw=sw,
        dh=dh,
        dw=dw,
        pt=ph,
        pb=ph,
        pl=pw,
        pr=pw,
        m=conv.out_channels // conv.in_channels,
        db=int(conv.bias is not None or any(is_norm(call.module) for call in between)),
        b=int(pointwise.module.bias is not None or any(is_norm(call.module) for call in direct)),
        mid=mid,
        act=activation(direct),
    )
    lies = "; a gate lies between" if gated else "; a norm over channels lies between" if normed else ""
    return Layer(case, f"{depthwise.name}, {pointwise.name}{lies}")


def text(file: str) -> str:
    """What the file holds."""
    head, sources = FILES[file]
    lines = [f"# {head}; batch normalisation is folded into the biases. Written by tests/shapes.py."]
    seen = set()
    for source in sources:
        for case, comment in layers(source):
            if source.dilated_only and (case.dh == 1 or case.problem in seen):
                continue
            seen.add(case.problem)
            lines.append(f"{format_case(case)}  # {comment}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for file in FILES:
        (FOLDER / f"{file}.txt").write_text(text(file), encoding="utf-8")
