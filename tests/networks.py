"""torchvision's and timm's networks, with random weights."""

from __future__ import annotations

import torch
from torch import nn

from fastsep._networks import load


def network(name: str) -> nn.Module:
    """ "torchvision/NAME" or "timm/NAME", for inference, with norms that do something."""
    torch.manual_seed(0)
    model, _ = load(name)
    randomize_norms(model)
    return model


def randomize_norms(model: nn.Module) -> None:
    """Statistics and factors such as training leaves behind, instead of zeros and ones."""
    generator = torch.Generator().manual_seed(1)

    def draw(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                draw(module.running_mean, -0.2, 0.2)
                draw(module.running_var, 0.5, 1.5)
                draw(module.weight, 0.5, 1.5)
                draw(module.bias, -0.2, 0.2)
