"""Xception."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from ..modules import SeparableConv2d
from .blocks import Head, check_positive


class _Block(nn.Module):
    """Separable convolutions with a norm behind and a ReLU before each, and a residual.

    With a stride a pooling ends the block, and a pointwise convolution and its norm are on the residual.
    """

    def __init__(self, channels: list[int], stride: int = 1, *, first_relu: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
            if index or first_relu:
                layers.append(nn.ReLU())
            layers.append(SeparableConv2d(inputs, outputs, 3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(outputs))
        if stride > 1:
            layers.append(nn.MaxPool2d(3, stride, 1))
        self.layers = nn.Sequential(*layers)
        self.skip = nn.Sequential()
        if stride > 1:
            self.skip.append(nn.Conv2d(channels[0], channels[-1], 1, stride, bias=False))
            self.skip.append(nn.BatchNorm2d(channels[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.skip(x)  # type: ignore[no-any-return]


class Xception(nn.Module):
    """Xception: two dense convolutions and 34 separable ones with residuals around them.

    >>> model = Xception()
    >>> model(torch.randn(1, *model.input_size)).shape
    torch.Size([1, 1000])

    input: [N, 3, H, W]. The result is [N, classes].
    classes: of the classifier.
    dropout: before the classifier.

    ValueError for a number of classes that is not above 0.

    F. Chollet, "Xception" (arXiv:1610.02357), figure 5.
    """

    def __init__(self, classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        check_positive(classes=classes)
        self.input_size = 3, 299, 299
        stem = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        self.stem = nn.Sequential(*stem, nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.entry = nn.Sequential(
            _Block([64, 128, 128], 2, first_relu=False),
            _Block([128, 256, 256], 2),
            _Block([256, 728, 728], 2),
        )
        self.middle = nn.Sequential(*(_Block([728] * 4) for _ in range(8)))
        self.exit = nn.Sequential(
            _Block([728, 728, 1024], 2),
            *(SeparableConv2d(1024, 1536, 3, padding=1, bias=False), nn.BatchNorm2d(1536), nn.ReLU()),
            *(SeparableConv2d(1536, 2048, 3, padding=1, bias=False), nn.BatchNorm2d(2048), nn.ReLU()),
        )
        self.head = Head(2048, classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.exit(self.middle(self.entry(self.stem(x)))))  # type: ignore[no-any-return]
