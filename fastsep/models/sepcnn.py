"""Two small networks of the kind that tutorials show."""

from __future__ import annotations

import itertools

from torch import nn

from ..modules import SeparableConv2d
from .blocks import Head, check_positive, conv_norm_activation


class SepCNNKeras(nn.Sequential):
    """Six separable convolutions with ReLUs, in the shape of the usual Keras sample.

    >>> SepCNNKeras(classes=10)(torch.randn(8, 3, 64, 64)).shape
    torch.Size([8, 10])

    input: [N, 3, H, W], H and W at least 26. The result is [N, classes], before any softmax.
    classes: of the classifier.

    ValueError for a number of classes that is not above 0.

    F. Chollet, "Deep Learning with Python" (2017), section 7.3.
    """

    def __init__(self, classes: int = 10) -> None:
        check_positive(classes=classes)
        channels = [3, 32, 64, 64, 128, 64, 128]
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
            layers.append(SeparableConv2d(inputs, outputs, 3, activation="relu"))
            if index in (1, 3):
                layers.append(nn.MaxPool2d(2))
        layers += [
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 32),
            nn.ReLU(),
            nn.Linear(32, classes),
        ]
        super().__init__(*layers)
        self.input_size = 3, 64, 64


class SepCNNTorch(nn.Sequential):
    """A dense convolution and three separable ones with norms, in the shape of the usual PyTorch sample.

    >>> SepCNNTorch(classes=10)(torch.randn(8, 3, 32, 32)).shape
    torch.Size([8, 10])

    input: [N, 3, H, W], H and W at least 8. The result is [N, classes].
    classes: of the classifier.

    ValueError for a number of classes that is not above 0.
    """

    def __init__(self, classes: int = 10) -> None:
        check_positive(classes=classes)
        layers: list[nn.Module] = [conv_norm_activation(3, 32, 3)]
        for inputs, outputs in ((32, 64), (64, 128), (128, 256)):
            layers.append(SeparableConv2d(inputs, outputs, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, Head(256, classes))
        self.input_size = 3, 32, 32
