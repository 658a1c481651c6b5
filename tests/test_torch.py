"""The layer inside of models, as torch's tools meet it there."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME
from commands import run
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import fastsep
from fastsep import SeparableConv2d

# torch's own, inside its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

op = torch.ops.fastsep.separable_conv2d.default
X = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(1))


def model():
    """Both of its layers are fused: one strided, one behind a normalisation, with a multiplier."""
    torch.manual_seed(0)
    return nn.Sequential(
        SeparableConv2d(4, 6, 3, 2, "same", bias=False, mid_activation="relu6"),
        nn.BatchNorm2d(6),
        nn.Hardswish(),
        SeparableConv2d(6, 5, 3, depth_multiplier=2, padding=((1, 0), (2, 1)), activation="silu"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def test_export_of_a_model():
    module = model().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (X,), dynamic_shapes=({0: batch},))
    assert [node.target for node in program.graph.nodes].count(op) == 2
    for n in (1, 3, 8):
        x = torch.randn(n, *X.shape[1:])
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_training_is_eager_training(layout):
    """Five steps of an optimizer, with a batch that grows, and no graph but the first and the dynamic one."""
    plain, fast = model(), model()
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, backend=graphs, fullgraph=True)
    losses = []
    for module, call in ((plain, plain), (fast, compiled)):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        torch.manual_seed(1)
        steps = []
        for n in (2, 3, 4, 5, 6):
            loss = call(torch.randn(n, 4, 9, 8).contiguous(memory_format=layout)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    assert losses[0][0] != losses[0][-1]
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("name", ["both_biases", "multiplier_3", "stride_2_tf_same", "four_paddings"])
def test_flops_by_the_formula(name):
    case = BY_NAME[name]
    tensors = case.tensors()
    with FlopCounterMode(display=False) as counter:
        y = fastsep.separable_conv2d(**tensors, **case.options)
    n, k, oh, ow = y.shape
    assert counter.get_total_flops() == 2 * n * oh * ow * case.c * case.m * (case.kh * case.kw + k)


@pytest.mark.parametrize("frozen", [False, True])
def test_inference_tensors(frozen):
    """torch refuses to save them for a gradient, and takes them where there is none to compute."""
    with torch.inference_mode():
        x = X.clone()
    layer = SeparableConv2d(4, 6, 3)
    expected = layer(X).detach()
    if frozen:
        torch.testing.assert_close(layer.freeze()(x), expected)
    else:
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            F.conv2d(x, torch.randn(1, 4, 3, 3, requires_grad=True))
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        made = model().eval()
        inside = made(X)
    torch.testing.assert_close(made(X), model().eval()(X).detach())
    torch.testing.assert_close(made(X), inside)


def test_profiler_counts_a_call_each():
    module = model().eval()
    for training in (False, True):
        with torch.set_grad_enabled(training), torch.profiler.profile(record_shapes=True) as profile:
            module(X)
        events = [event for event in profile.events() if event.name == "fastsep::separable_conv2d"]
        assert len(events) == 2
        assert events[0].input_shapes[:2] == [[3, 4, 9, 8], [4, 1, 3, 3]]


class Images(Dataset):
    """Runs the layer in the worker, as a model for preprocessing does."""

    layer = SeparableConv2d(4, 6, 3, padding=1).requires_grad_(False)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.layer(torch.full((4, 32, 32), float(i)))


WORKERS = """
import torch
from torch.utils.data import DataLoader
from test_torch import Images
torch.manual_seed(0)
images = Images()
torch.set_num_threads(2)
before = torch.stack([images[i] for i in range(4)])
loader = DataLoader(images, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=50)
print(torch.equal(torch.cat(list(loader)), before))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_workers_of_a_data_loader():
    """Forked from a process whose threads have worked."""
    here = os.path.dirname(os.path.abspath(__file__))
    result = run(f"timeout 120 {sys.executable} -W ignore -c '{WORKERS}'", PYTHONPATH=here)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr
    assert len(list(DataLoader(Images(), batch_size=2))) == 2


def test_moving_average_and_swa():
    """AveragedModel copies, and writes to the weights in place."""
    module = model()
    averaged = torch.optim.swa_utils.AveragedModel(module, avg_fn=lambda a, p, _n: (a + p) / 2)
    averaged.update_parameters(module)  # the first is a copy
    expected = [p.detach() * 1.5 for p in module.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    averaged.update_parameters(module)
    for got, want in zip(averaged.parameters(), expected, strict=True):
        torch.testing.assert_close(got.detach(), want)
    reference = model()
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(averaged.parameters()).detach(), reference.parameters()
    )
    torch.testing.assert_close(averaged.eval()(X), reference.eval()(X))
