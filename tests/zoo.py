"""The networks of timm and torchvision with depthwise convolutions: each as it is and optimized, twice.

python tests/zoo.py [--only TEXT] [--every] [--image 128]

Of each file of timm's models and of each family of torchvision's the smallest network with a depthwise
convolution, with --every all of them; with timm's features_only, too. By hand: it takes half an hour.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Iterator

import torch
from random_networks import same_strides
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastsep
from fastsep._networks import import_library
from fastsep._optimize.verify import largest_error


def depthwise_count(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in model.modules())


def made(library: str, name: str, **options: object) -> nn.Module | None:
    """With random weights; None where there is no such network."""
    try:
        if library == "timm":
            return import_library("timm").create_model(name, **options)  # type: ignore[no-any-return]
        return import_library("torchvision").models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]
    except Exception:
        return None


def candidates(every: bool) -> Iterator[tuple[str, str]]:
    """Libraries and names, the smallest of each family first."""
    timm, torchvision = import_library("timm"), import_library("torchvision")
    families = {("timm", module): timm.list_models(module=module) for module in timm.list_modules()}
    for name in torchvision.models.list_models():
        kind = torchvision.models.get_model_builder(name).__module__
        families.setdefault(("torchvision", kind), []).append(name)
    for (library, _), names in families.items():
        sized = []
        for name in names:
            with torch.device("meta"):
                model = made(library, name)
            if model is not None and depthwise_count(model):
                sized.append((sum(p.numel() for p in model.parameters()), name))
        for _, name in sorted(sized)[: None if every else 1]:
            yield library, name


def options_of(library: str, name: str) -> list[dict[str, object]]:
    if library == "timm":
        return [{}, {"features_only": True}]
    return (
        [{"weights_backbone": None}]
        if any(part in name for part in ("deeplab", "lraspp", "ssd", "rcnn"))
        else [{}]
    )


def try_network(model: nn.Module, image: int) -> str:
    """What is wrong, or a line about what was done. An exception is the library's."""
    torch.manual_seed(0)
    model.eval()
    size = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    fixed = size.get("fixed_input_size", False)
    shape = tuple(size.get("input_size", (3, image, image))) if fixed else (3, image, image)
    x = torch.randn(1, *shape)
    with torch.no_grad():
        try:
            expected = model(x)
        except Exception as error:
            return f"skipped: its own forward: {error!r}"[:150]
        optimized = fastsep.optimize(model)
        fused = len(fastsep.report(optimized).fused)
        for _ in range(2):
            got = optimized(x)
            error = largest_error(got, expected)
            pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
            same = all(same_strides(*pair) for pair in pairs if isinstance(pair[1], Tensor))
            if not error < 1e-3 or not same:
                return f"WRONG: error {error:.1e}, strides {'equal' if same else 'differ'}"
    return f"{fused} of {depthwise_count(model)} fused, error {error:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a part of the names")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--image", type=int, default=128)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = count = 0
    for library, name in candidates(options.every):
        if options.only not in name:
            continue
        for given in options_of(library, name):
            model = made(library, name, **given)
            if model is None:
                continue
            begin = time.monotonic()
            try:
                line = try_network(model, options.image)
            except Exception:
                line = f"FAILED: {traceback.format_exc()}"
            count += not line.startswith("skipped")
            failed += line.startswith(("FAILED", "WRONG"))
            what = " ".join([f"{library}/{name}", *given])
            print(f"{what}: {line}, {time.monotonic() - begin:.1f} s", flush=True)
    print(f"{count} networks, {failed} failed")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
