"""Training through the layers: memory, curves, checkpoints, and torch.compile of whole steps."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, half
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastsep import DepthwiseConv2d, SeparableConv2d, _backward, _native
from fastsep._activations import ACTIVATIONS
from fastsep._check import call

# torch's own, inside its compiler.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*isinstance\\(treespec:FutureWarning"
)

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")
X = torch.randn(6, 4, 9, 8, generator=torch.Generator().manual_seed(1))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        SeparableConv2d(4, 8, 3, padding=1, mid_activation="relu", activation="relu6"),
        SeparableConv2d(8, 6, 3, stride=2, padding="same", depthwise_bias=True, activation="silu"),
        DepthwiseConv2d(6, 6, 3, padding=1, activation="hardswish"),
    )


class Plain(nn.Module):
    """The same network in torch's layers."""

    def __init__(self, fused):
        super().__init__()
        self.first, self.second, self.third = (copy.deepcopy(layer) for layer in fused)

    def forward(self, x):
        x = F.relu6(self.first.pointwise(F.relu(self.first.depthwise(x))))
        x = F.pad(x, (0, 1, 1, 1))  # 9 x 8 at stride 2
        x = F.silu(self.second.pointwise(self.second.depthwise(x)))
        return F.hardswish(F.conv2d(x, self.third.weight, self.third.bias, padding=1, groups=6))


def gradients(module, x=X):
    """Of input and parameters, for some loss."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])


def same(got, expected):
    assert len(got) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_network(native_backward_calls):
    module = network()
    got = gradients(module)
    assert len(native_backward_calls) == 3
    close(got, gradients(Plain(module)))


# What is kept between forward and backward


def saved_by(function):
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = function()
    return y, set(saved)


@needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_input_and_weights_are_saved(activation):
    """What the two halves hand over, by far the largest tensor, is computed again; so is the sum before an
    activation, but where its slope is known from the output, which is there anyway."""
    case = replace(BY_NAME["mobilenet_v2_projection"], act=activation)
    tensors = case.tensors()
    for tensor in tensors.values():
        tensor.requires_grad_()
    y, saved = saved_by(lambda: call(case, tensors))
    expected = {tensor.data_ptr() for tensor in tensors.values()}
    by_output = {"relu", "relu6", "leaky_relu", "sigmoid", "tanh"}
    assert saved == expected | ({y.data_ptr()} if activation in by_output else set())
    y.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_depthwise_half_saves_input_and_weights(activation):
    case = half(replace(BY_NAME["both_biases"], mid=activation))
    tensors = {name: t if t is None else t.requires_grad_() for name, t in case.tensors().items()}
    y, saved = saved_by(lambda: call(case, tensors))
    assert saved == {tensor.data_ptr() for tensor in tensors.values() if tensor is not None}
    y.sum().backward()


HOOKS = {
    "moved": lambda: save_on_cpu(),
    "copied": lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "other_format": lambda: saved_tensors_hooks(
        lambda t: t.clone(), lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    ),
    "strided": lambda: saved_tensors_hooks(
        lambda t: torch.stack([t, t], -1), lambda t: t.select(-1, 0).requires_grad_(t.requires_grad)
    ),
    "bytes": lambda: saved_tensors_hooks(
        lambda t: t.detach().numpy().tobytes() + bytes(t.shape), lambda b: unpacked(b)
    ),
}


def unpacked(packed):
    """From numbers with a shape behind them, of which a weight has 4 sizes and a bias 1."""
    numbers = torch.frombuffer(bytearray(packed[: len(packed) // 4 * 4]), dtype=torch.float32)
    for rank in (4, 1):
        shape, count = tuple(packed[-rank:]), (len(packed) - rank) // 4
        if torch.Size(shape).numel() == count and len(packed) - rank == 4 * count:
            return numbers[:count].view(shape)
    raise AssertionError


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_saved_tensors(name):
    module = network()
    x = X.clone().requires_grad_()
    with HOOKS[name]():
        loss = module(x).square().sum()
    close(torch.autograd.grad(loss, [x, *module.parameters()]), gradients(module))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    module = network()
    x = X.clone().requires_grad_()
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    same([x.grad, *(p.grad for p in module.parameters())], gradients(module))


def test_writing_to_the_output_is_noticed_where_it_was_saved():
    """As it is with torch's relu."""
    layer = SeparableConv2d(4, 5, 3, activation="relu")
    for function in (layer, lambda x: F.relu(layer._call_children(x))):
        y = function(X)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    layer.activation = "silu"
    y = layer(X)
    y.mul_(2)
    y.sum().backward()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_behind_the_layer():
    """None comes back as None, as from torch's convolution."""
    for layer in (SeparableConv2d(4, 5, 3, activation="relu"), nn.Conv2d(4, 5, 3), DepthwiseConv2d(4, 4, 3)):
        x = X.clone().requires_grad_()
        NoGradient.apply(layer(x)).sum().backward()
        assert x.grad is None
        assert all(parameter.grad is None for parameter in layer.parameters())


def test_gradients_add_up():
    module = network()
    expected = [2 * gradient for gradient in gradients(module)[1:]]
    for _ in range(2):
        module(X).square().sum().backward()
    same([p.grad for p in module.parameters()], expected)


def test_frozen_parameters_get_none():
    module = network()
    full = gradients(module)[1:]
    for i, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    module(X).square().sum().backward()
    for i, (parameter, expected) in enumerate(zip(module.parameters(), full, strict=True)):
        assert parameter.grad is None if i % 2 else torch.equal(parameter.grad, expected)


def test_copies_train_alike():
    module = network()
    twin = copy.deepcopy(module)
    for _ in range(3):
        for m in (module, twin):
            m.zero_grad()
            m(X).square().mean().backward()
            with torch.no_grad():
                for parameter in m.parameters():
                    parameter.sub_(parameter.grad)
    same(list(twin.parameters()), list(module.parameters()))


def test_threads_of_python_train_side_by_side():
    modules = [network(seed) for seed in range(4)]
    expected = [gradients(module) for module in modules]
    got = [None] * len(modules)

    def work(i):
        for _ in range(10):
            got[i] = gradients(modules[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(modules))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, expected, strict=True):
        same(a, b)


# Curves


def curve(model, dtype, steps=50):
    """The losses of a small classifier in training."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(4)
    model = nn.Sequential(model, nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 5 * 4, 6)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    patterns, losses = torch.randn(6, 4, 9, 8, generator=generator), []
    for _ in range(steps):
        labels = torch.randint(6, (16,), generator=generator)
        x = patterns[labels] + torch.randn(16, 4, 9, 8, generator=generator) / 4
        loss = F.cross_entropy(model(x.to(dtype)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_curve_is_that_of_two_convolutions(layout, native_backward_calls):
    """Our curve in float32 is as close to torch's in float64 as torch's own in float32 is."""
    exact = curve(Plain(network()), torch.float64)
    assert exact[-5:].mean() < 0.8 * exact[0]
    theirs = (curve(Plain(network()), torch.float32) - exact).abs().max()
    ours = curve(network().to(memory_format=layout), torch.float32)
    assert len(native_backward_calls) == 3 * 50
    assert (ours - exact).abs().max() <= 4 * theirs + 1e-6
    torch.testing.assert_close(curve(network(), torch.float64), exact, rtol=1e-9, atol=1e-9)


# torch.compile


def targets(graphs):
    return [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def recording_backend():
    graphs = []

    def compiler(graph, _inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler), graphs


OPERATORS = [torch.ops.fastsep.separable_conv2d.default] * 2 + [torch.ops.fastsep.depthwise_conv2d.default]
BACKWARD_OPERATORS = [_backward.depthwise_op] + [_backward.op] * 2


@needs_native
def test_compiled_loss():
    """Forward and backward are a graph each, of our operators and no convolution of torch's."""
    module = network()
    backend, graphs = recording_backend()
    loss = torch.compile(lambda x: module(x).square().sum(), backend=backend, fullgraph=True)
    x = X.clone().requires_grad_()
    got = torch.autograd.grad(loss(x), [x, *module.parameters()])
    same(got, gradients(module))
    forward, backward = graphs
    ours = [target for target in targets([forward]) if target in OPERATORS]
    assert ours == OPERATORS
    ours = [target for target in targets([backward]) if target in BACKWARD_OPERATORS]
    assert ours == BACKWARD_OPERATORS
    assert not any("convolution" in str(target) for target in targets(graphs))


@needs_native
def test_compiled_training_step(monkeypatch):
    """Forward, loss, backward and the step of the optimizer in one graph."""
    config = torch._dynamo.config
    if not hasattr(config, "trace_autograd_ops"):
        pytest.skip("this torch cannot compile .backward()")
    monkeypatch.setattr(config, "trace_autograd_ops", True)
    modules = network(), network()
    backend, graphs = recording_backend()

    def step(module, x):
        loss = module(x).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad.zero_()
        return loss.detach()

    for module in modules:
        module(X).sum().backward()
        module.zero_grad(set_to_none=False)
    fast = torch.compile(step, backend=backend, fullgraph=True)
    for _ in range(3):
        close([fast(modules[0], X)], [step(modules[1], X)])
    close(list(modules[0].parameters()), list(modules[1].parameters()))
    assert len(graphs) == 1
    ours = [target for target in targets(graphs) if target in OPERATORS + BACKWARD_OPERATORS]
    assert ours == OPERATORS + BACKWARD_OPERATORS
    assert not any("convolution" in str(target) for target in targets(graphs))


@needs_native
def test_compiled_optimizer():
    """The step as people write it."""
    torch._dynamo.reset()
    modules = network(), network()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in modules]
    loss = torch.compile(lambda x: modules[0](x).square().mean(), fullgraph=True, backend="aot_eager")
    step = torch.compile(optimizers[0].step, backend="aot_eager")
    for _ in range(3):
        loss(X).backward()
        step()
        optimizers[0].zero_grad()
        modules[1](X).square().mean().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    close(list(modules[0].parameters()), list(modules[1].parameters()))


@needs_native
def test_compiled_autograd():
    module = network()
    expected = gradients(module)
    backend, graphs = recording_backend()
    x = X.clone().requires_grad_()
    loss = module(x).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        loss.backward()
    same([x.grad, *(p.grad for p in module.parameters())], expected)
    assert [target for target in targets(graphs) if target in BACKWARD_OPERATORS] == BACKWARD_OPERATORS


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_torch_func(backend):
    """torch.func's transforms take the composition, also below the compiler."""
    torch._dynamo.reset()
    module = network()
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    got = torch.compile(torch.func.grad(loss), backend=backend, fullgraph=True)(parameters, X)
    close(list(got.values()), gradients(module)[1:])
