"""What the networks are made of."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ..depthwise import DepthwiseConv2d


def conv_norm_activation(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """A dense convolution that keeps the size but for the stride, its norm and its activation."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), activation())


class SeparableBlock(nn.Sequential):
    """Depthwise 3 x 3, norm, activation, pointwise, norm, activation."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        depthwise = DepthwiseConv2d(in_channels, in_channels, 3, stride, 1, bias=False)
        super().__init__(
            OrderedDict(
                depthwise=depthwise,
                depthwise_norm=nn.BatchNorm2d(in_channels),
                depthwise_activation=activation(),
                pointwise=nn.Conv2d(in_channels, out_channels, 1, bias=False),
                pointwise_norm=nn.BatchNorm2d(out_channels),
                pointwise_activation=activation(),
            )
        )


class InvertedResidual(nn.Module):
    """Pointwise to `expansion` times the channels, depthwise, pointwise; the input added where it fits."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        expand = (
            conv_norm_activation(in_channels, inner, 1, activation=nn.ReLU6)
            if expansion > 1
            else nn.Identity()
        )
        self.expand = expand
        self.depthwise = DepthwiseConv2d(inner, inner, 3, stride, 1, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(inner)
        self.depthwise_activation = nn.ReLU6()
        self.pointwise = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise_activation(self.depthwise_norm(self.depthwise(self.expand(x))))
        y = self.pointwise_norm(self.pointwise(y))
        return x + y if self.residual else y  # type: ignore[no-any-return]


class Head(nn.Sequential):
    """The mean of each channel, dropout, and a linear classifier: [N, C, H, W] -> [N, classes]."""

    def __init__(self, channels: int, classes: int, dropout: float = 0.0) -> None:
        layers = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes)
        super().__init__(OrderedDict(zip(("pool", "flatten", "dropout", "linear"), layers, strict=True)))


def scaled(channels: int, multiplier: float) -> int:
    """The nearest multiple of 8, at least 8 and no less than nine tenths of the product."""
    product = channels * multiplier
    result = max(8, int(product + 4) // 8 * 8)
    return result + 8 if result < 0.9 * product else result


def check_positive(**values: float) -> None:
    """ValueError for an argument that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value!r}")
