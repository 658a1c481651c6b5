"""The convolutional module of MultiModel."""

from __future__ import annotations

from torch import Tensor, nn

from ..modules import SeparableConv2d
from .blocks import check_positive


class _Step(nn.Module):
    """ReLU, separable convolution, layer norm over the channels of each position."""

    def __init__(self, channels: int, kernel_size: tuple[int, int], dilation: int = 1) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv = SeparableConv2d(channels, channels, kernel_size, padding="same", dilation=(dilation, 1))
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.relu(x))
        return self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class MultiModelBlock(nn.Module):
    """Four separable convolutions with layer norms and two residuals, along the first of the two directions.

    >>> block = MultiModelBlock(64)
    >>> block(torch.randn(2, 64, 100, 1)).shape
    torch.Size([2, 64, 100, 1])

    The first two have kernels of 3 x 1, the others of 15 x 1, the last with a dilation of 8.

    input: [N, C, length, width]. The result has the same shape.
    channels: C.
    dropout: of the result.

    ValueError for a number of channels that is not above 0.

    L. Kaiser et al., "One Model To Learn Them All" (arXiv:1706.05137), section 2.1.
    """

    def __init__(self, channels: int = 512, dropout: float = 0.5) -> None:
        super().__init__()
        check_positive(channels=channels)
        self.input_size = channels, 128, 1
        self.step1, self.step2 = _Step(channels, (3, 1)), _Step(channels, (3, 1))
        self.step3, self.step4 = _Step(channels, (15, 1)), _Step(channels, (15, 1), dilation=8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.step2(self.step1(x))
        return self.dropout(x + self.step4(self.step3(y)))  # type: ignore[no-any-return]
