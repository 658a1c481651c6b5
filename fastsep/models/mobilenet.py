"""MobileNetV1, its twin of dense convolutions, and MobileNetV2."""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import Head, InvertedResidual, SeparableBlock, check_positive, conv_norm_activation, scaled

# Output channels and stride of the blocks behind the first convolution.
_V1 = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# Expansion, output channels, blocks, stride of the first of them.
_V2 = [
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2)),
    (6, 320, 1, 1),
]


class MobileNetV1(nn.Module):
    """MobileNet of 2017: a dense convolution and 13 separable blocks.

    >>> model = MobileNetV1(width_multiplier=0.5, resolution_multiplier=160 / 224)
    >>> model(torch.randn(1, *model.input_size)).shape
    torch.Size([1, 1000])

    input: [N, 3, H, W]. The result is [N, classes].
    classes: of the classifier.
    width_multiplier: of the channels in every layer; they become multiples of 8.
    resolution_multiplier: of the 224 x 224 pixels of `input_size`. The layers are the same for all.
    separable: False for the dense twin, with 3 x 3 convolutions in the place of the blocks.

    ValueError for a number that is not above 0.

    A. Howard et al., "MobileNets" (arXiv:1704.04861), table 1.
    """

    def __init__(
        self,
        classes: int = 1000,
        width_multiplier: float = 1.0,
        resolution_multiplier: float = 1.0,
        *,
        separable: bool = True,
    ) -> None:
        super().__init__()
        check_positive(
            classes=classes, width_multiplier=width_multiplier, resolution_multiplier=resolution_multiplier
        )
        size = round(224 * resolution_multiplier)
        self.input_size = 3, size, size
        channels = scaled(32, width_multiplier)
        self.stem = conv_norm_activation(3, channels, 3, 2)
        blocks: list[nn.Module] = []
        for base, stride in _V1:
            inputs, channels = channels, scaled(base, width_multiplier)
            if separable:
                blocks.append(SeparableBlock(inputs, channels, stride))
            else:
                blocks.append(conv_norm_activation(inputs, channels, 3, stride))
        self.blocks = nn.Sequential(*blocks)
        self.head = Head(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """MobileNet of 2018: 17 inverted residual blocks between two dense convolutions.

    >>> model = MobileNetV2()
    >>> model(torch.randn(1, *model.input_size)).shape
    torch.Size([1, 1000])

    input: [N, 3, H, W]. The result is [N, classes].
    classes: of the classifier.
    width_multiplier: of the channels in every layer but the last convolution, where it counts above 1 only.
    dropout: before the classifier.

    ValueError for a number of classes or a multiplier that is not above 0.

    M. Sandler et al., "MobileNetV2" (arXiv:1801.04381), table 2.
    """

    def __init__(self, classes: int = 1000, width_multiplier: float = 1.0, dropout: float = 0.2) -> None:
        super().__init__()
        check_positive(classes=classes, width_multiplier=width_multiplier)
        self.input_size = 3, 224, 224
        channels = scaled(32, width_multiplier)
        self.stem = conv_norm_activation(3, channels, 3, 2, activation=nn.ReLU6)
        blocks: list[nn.Module] = []
        for expansion, base, count, first_stride in _V2:
            for index in range(count):
                inputs, channels = channels, scaled(base, width_multiplier)
                blocks.append(InvertedResidual(inputs, channels, 1 if index else first_stride, expansion))
        self.blocks = nn.Sequential(*blocks)
        last = scaled(1280, max(1.0, width_multiplier))
        self.last = conv_norm_activation(channels, last, 1, activation=nn.ReLU6)
        self.head = Head(last, classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))))  # type: ignore[no-any-return]
