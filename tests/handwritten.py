"""The module that SeparableConv2d replaces, as people write it by hand."""

import torch
import torch.nn.functional as F
from torch import nn

from fastsep import DepthwiseConv2d, SeparableConv2d
from fastsep._activations import ACTIVATIONS

X = torch.randn(2, 6, 11, 10, generator=torch.Generator().manual_seed(1))


class HandWritten(nn.Module):
    """What the layer replaces. `pads` are left, right, top, bottom, for what nn.Conv2d cannot pad."""

    def __init__(
        self,
        cin=6,
        cout=5,
        k=3,
        m=1,
        pads=None,
        mode="constant",
        mid=None,
        act=None,
        b=True,
        db=False,
        **options,
    ):
        super().__init__()
        self.depthwise = nn.Conv2d(cin, cin * m, k, groups=cin, bias=db, **options)
        self.pointwise = nn.Conv2d(cin * m, cout, 1, bias=b)
        self.pads, self.mode = pads, mode
        self.mid, self.act = ACTIVATIONS[mid or "identity"], ACTIVATIONS[act or "identity"]

    def forward(self, x):
        if self.pads is not None:
            x = F.pad(x, self.pads, self.mode)
        return self.act.forward(self.pointwise(self.mid.forward(self.depthwise(x))))


def layer(*args, seed=0, **options):
    torch.manual_seed(seed)
    return SeparableConv2d(*(args or (6, 5, 3)), **options)


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def depthwise(seed=0, **options):
    torch.manual_seed(seed)
    return DepthwiseConv2d(**{"in_channels": 6, "out_channels": 6, "kernel_size": 3} | options)
