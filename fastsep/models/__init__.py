"""Networks of the literature, made of this package's layers; their weights are random.

>>> model = fastsep.models.MobileNetV1(width_multiplier=0.5)
>>> model(torch.randn(1, *model.input_size)).shape
torch.Size([1, 1000])

Each has its usual `input_size`, (channels, height, width).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .mobilenet import MobileNetV1, MobileNetV2
from .multimodel import MultiModelBlock
from .sepcnn import SepCNNKeras, SepCNNTorch
from .xception import Xception

# By the names that commands take.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v1_dense": lambda: MobileNetV1(separable=False),
    "mobilenet_v2": MobileNetV2,
    "xception": Xception,
    "multimodel_block": MultiModelBlock,
    "sepcnn_keras": SepCNNKeras,
    "sepcnn_torch": SepCNNTorch,
}

__all__ = [
    "NETWORKS",
    "MobileNetV1",
    "MobileNetV2",
    "MultiModelBlock",
    "SepCNNKeras",
    "SepCNNTorch",
    "Xception",
]
