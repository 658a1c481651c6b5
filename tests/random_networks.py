"""Random networks: what optimize() makes of one has to give what the network's own forward gives.

python tests/random_networks.py [--seconds 10] [--seed N] [--trial I]

Each run draws anew. A failure is printed as a program that shows it, with the trial that --trial runs alone.
"""

from __future__ import annotations

import copy
import random
import sys
import textwrap
import traceback
import warnings
from typing import Any

import torch
from network_writer import write
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from trials import run_trials

import fastsep


def made(program: str, seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    names: dict[str, Any] = {}
    exec(compile(program, "<random network>", "exec"), names)
    torch.manual_seed(seed)
    net = names["Net"]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    net.eval()
    names["prepare"](net)
    return net, names["SIZE"]


def same_strides(ours: Tensor, theirs: Tensor) -> bool:
    """Of dimensions with more than one place: torch's operators are not at one about the others'."""
    places = zip(theirs.shape, ours.stride(), theirs.stride(), strict=True)
    return theirs.numel() == 0 or all(size == 1 or m == n for size, m, n in places)


def difference(got: Any, expected: Any, exact: Any, scale: float) -> str:
    """What is wrong with a result, or ""."""
    ours, theirs, values = tree_leaves(got), tree_leaves(expected), tree_leaves(exact)
    if type(got) is not type(expected) or len(ours) != len(theirs):
        wanted = f"{type(expected).__name__} of {len(theirs)}"
        return f"the result is a {type(got).__name__} of {len(ours)}, expected {wanted}"
    for i, (a, b, value) in enumerate(zip(ours, theirs, values, strict=True)):
        if type(a) is not type(b) or a.shape != b.shape or a.dtype != b.dtype:
            wanted = f"{type(b).__name__} {list(b.shape)}"
            return f"result {i} is {type(a).__name__} {list(a.shape)}, expected {wanted}"
        if not same_strides(a, b):
            return f"result {i} of {list(b.shape)} has strides {a.stride()}, expected {b.stride()}"
        largest = max(float(value.abs().max()), 1.0) if value.numel() else 1.0
        if not torch.equal(a.isnan(), b.isnan()):
            return f"result {i} has NaN elsewhere"
        # As far off as torch is, and then some.
        allowed = (
            scale * largest + 10 * float((b.double() - value).abs().nan_to_num().max())
            if value.numel()
            else 0
        )
        error = float((a.double() - value).abs().nan_to_num().max()) if value.numel() else 0
        if error > allowed:
            return f"result {i} is off by {error:.3g} of {largest:.3g}, allowed {allowed:.3g}"
    return ""


def call(net: nn.Module, x: Tensor) -> Any:
    """The result, what became of the input, and the state of the generator; or the error."""
    torch.manual_seed(7)
    x = x.clone(memory_format=torch.preserve_format)
    try:
        with torch.no_grad():
            y = net(x)
        return y, x, torch.get_rng_state()
    except Exception as error:
        return error


def compare(optimized: nn.Module, own: nn.Module, x: Tensor, what: str, calls: int) -> str:
    exact = call(copy.deepcopy(own).double(), x.double())
    for i in range(calls):
        expected, got = call(own, x), call(optimized, x)
        if isinstance(expected, Exception) or isinstance(got, Exception):
            if type(expected) is not type(got):
                trace = "".join(traceback.format_exception(got)) if isinstance(got, Exception) else ""
                wanted = repr(expected) if isinstance(expected, Exception) else "a result"
                return f"{what}, call {i}: expected {wanted}\n{trace}"
            continue
        if isinstance(exact, Exception):
            continue
        for name, ours, theirs, values in zip(("result", "input"), got, expected, exact, strict=False):
            if wrong := difference(ours, theirs, values, 1e-4):
                return f"{what}, call {i}, {name}: {wrong}"
        if not torch.equal(got[2], expected[2]):
            return f"{what}, call {i}: another number of random numbers was drawn"
    return ""


def double_weights(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)


def step_fused(net: nn.Module) -> None:
    parameters = list(net.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if parameters:
        torch.optim.SGD(parameters, lr=0.05, fused=True).step()
    for parameter in parameters:
        parameter.grad = None


def change_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data.add_(0.1)


def change_buffers(net: nn.Module) -> None:
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.25)


CHANGES = [double_weights, step_fused, change_data, change_buffers]


def try_network(program: str, seed: int, source: random.Random) -> str:
    """What is wrong, or ""."""
    own, size = made(program, seed)
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, generator=generator)]
    inputs.append(inputs[0].contiguous(memory_format=torch.channels_last))
    inputs.append(torch.randn((1, *size[1:]), generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimized = fastsep.optimize(own)
        for x, what in zip(inputs, ("NCHW", "channels-last", "one image"), strict=True):
            if wrong := compare(optimized, own, x, what, 2):
                return wrong
        change = source.choice(CHANGES)
        for net in (own, optimized):
            change(net)
        return compare(optimized, own, inputs[source.randint(0, 2)], f"after {change.__name__}", 3)


def attempt(source: random.Random, number: int, again: str) -> str:
    program = write(source)
    try:
        wrong = try_network(program, number, source)
    except Exception:
        wrong = traceback.format_exc()
    return f"{wrong}\n{textwrap.indent(program, '    ')}" if wrong else ""


if __name__ == "__main__":
    sys.exit(run_trials(__doc__, "networks", attempt))
