"""What PyTorch expects of an operator on a GPU: streams, memory, graphs, autocast, torch.compile, transforms.

pytest -m cuda
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import pytest
import torch
from cases import BY_NAME
from gpu_cases import GPU, LAYER, geometry, image, in_dtype, layer, layouts, parts, varieties

import fastsep
from fastsep import _backward, _ops, _plan
from fastsep._case import DTYPES, LAYOUTS
from fastsep._check import operands
from fastsep._cuda_model import FUSED, TORCH

pytestmark = GPU


def test_the_current_stream_is_used_and_nothing_waits():
    module, stream = layer(LAYER, torch.bfloat16), torch.cuda.Stream()
    x = image(dtype=torch.bfloat16).requires_grad_()
    later = image(dtype=torch.bfloat16, seed=2)

    def step():
        y = module(x)
        return y, torch.autograd.grad(y.float().square().sum(), x)[0]

    with torch.no_grad():
        kept = x.clone()
        x.copy_(later)
    expected = step()
    with torch.no_grad():
        x.copy_(kept)
    step()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        begin = time.perf_counter()
        torch.cuda._sleep(1_000_000_000)  # about half a second
        with torch.no_grad():
            x.copy_(later)
        found = step()
        queued = time.perf_counter() - begin
    assert not stream.query(), "the device was waited for, or the pause too short"
    stream.synchronize()
    assert queued < time.perf_counter() - begin
    for got, exact in zip(found, expected, strict=True):
        assert torch.equal(got, exact)


def test_memory_comes_from_torch():
    module, x = layer(LAYER, torch.float16), image(dtype=torch.float16).requires_grad_()

    def step():
        torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
        torch.cuda.synchronize()

    for _ in range(3):
        step()
    torch.cuda.empty_cache()
    step()
    before = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    for _ in range(20):
        step()
    assert torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() >= before - (1 << 21)


@varieties
@layouts
@pytest.mark.parametrize("training", [False, True])
def test_graph_capture(variety, layout, training):
    case = in_dtype(LAYER, variety)
    dtype = DTYPES[case.dtype]
    module, x = layer(case, dtype), image(case, dtype, layout).requires_grad_(training)
    grad = torch.ones(case.output, device="cuda", dtype=dtype)
    inputs = [x, *module.parameters()]

    def step():
        with torch.set_grad_enabled(training):
            y = module(x)
            return [y.detach(), *(torch.autograd.grad(y, inputs, grad) if training else ())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (3, 4):
        with torch.no_grad():
            x.copy_(image(case, dtype, layout, seed=seed))
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)


def test_a_graph_is_captured_while_cudnn_benchmark_is_set():
    torch.backends.cudnn.benchmark = True
    module, x = layer(LAYER, torch.bfloat16), image(dtype=torch.bfloat16)
    with torch.no_grad():
        expected = module(x)
        other = image(replace(LAYER, n=2), torch.bfloat16)  # nothing is known of it yet
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, small = module(x), module(other)
        graph.replay()
        assert torch.equal(captured, expected)
        torch.testing.assert_close(small, module(other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_that_of_convolutions(dtype):
    module, x = layer(LAYER), image().requires_grad_()
    inputs = [x, *module.parameters()]
    with torch.autocast("cuda", dtype):
        y = module(x)
        expected = _ops.compose(
            *(
                x,
                module.depthwise.weight,
                module.pointwise.weight,
                module.depthwise.bias,
                module.pointwise.bias,
            ),
            *geometry(LAYER),
        )
    assert y.dtype is expected.dtype is dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=16 * eps, atol=16 * eps)
    grad = torch.ones_like(y)
    for got, exact in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert got.dtype is torch.float32
        assert (got - exact).norm() <= 64 * eps * exact.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_calls_pass_the_dispatcher_by(monkeypatch, autocast):
    calls = []
    for module in (_ops, _backward):
        kernel = module.cuda_kernel
        monkeypatch.setattr(module, "cuda_kernel", lambda *args, k=kernel: calls.append(k) or k(*args))
    made, x = layer(LAYER), image().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = made(x)
        with torch.no_grad():
            assert torch.equal(made(x), y)
    y.sum().backward()
    assert len(calls) == 3


def test_autocast_uses_the_kernels(capfd, monkeypatch):
    monkeypatch.setattr(_ops, "VERBOSE", True)
    module, x = layer(LAYER), image()
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        module(x)
    line = capfd.readouterr().err
    assert "fastsep: cuda " in line
    assert "dtype=bfloat16" in line


@varieties
def test_compile_in_one_graph(variety):
    case = in_dtype(LAYER, variety)
    dtype = DTYPES[case.dtype]
    module, x = layer(case, dtype), image(case, dtype).requires_grad_()
    compiled = torch.compile(module, fullgraph=True)
    grad = torch.ones(case.output, device="cuda", dtype=dtype)
    inputs = [x, *module.parameters()]
    expected, got = module(x), compiled(x)
    assert torch.equal(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert torch.equal(a, b)
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@parts
def test_opcheck(dtype, part):
    pytest.importorskip("expecttest")  # which torch's check imports
    case = part(replace(BY_NAME["both_biases"], dtype=dtype))
    x, dw, pw, db, b = (None if t is None else t.cuda().requires_grad_() for t in operands(case.tensors()))
    if case.k:
        args = x, dw, pw, db, b, None, *geometry(case)
        torch.library.opcheck(torch.ops.fastsep.separable_conv2d.default, args)
    else:
        args = x, dw, db, *geometry(case)[:-1]
        torch.library.opcheck(torch.ops.fastsep.depthwise_conv2d.default, args)


def test_vmap_and_functional_gradients():
    module, x = layer(LAYER), image()
    many = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(module)(many), torch.stack([module(x), module(2 * x)]))
    parameters = dict(module.named_parameters())

    def loss(values):
        return torch.func.functional_call(module, values, x).square().sum()

    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for got, exact in zip(torch.func.grad(loss)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_device_that_is_not_current():
    module = layer(LAYER)
    there = copy.deepcopy(module).to("cuda:1")
    assert torch.cuda.current_device() == 0
    found = []
    for made, device in ((module, "cuda:0"), (there, "cuda:1")):
        x = image(device=device).requires_grad_()
        y = made(x)
        assert y.device == x.device
        found.append([y.cpu(), *(g.cpu() for g in torch.autograd.grad(y.sum(), [x, *made.parameters()]))])
        assert torch.cuda.current_device() == 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_weights_of_another_gpu_are_refused():
    with pytest.raises(RuntimeError, match=r"input must be on the weights' device, cuda:1, got cuda:0"):
        layer(LAYER).to("cuda:1")(image(device="cuda:0"))


def test_a_frozen_layer_and_a_network():
    module, x = layer(LAYER).eval(), image()
    with torch.inference_mode():
        expected = module(x)
        assert torch.equal(module.freeze()(x), expected)
    network = fastsep.models.mobilenet_v1().cuda().eval().to(memory_format=torch.channels_last)
    pixels = torch.randn(2, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), _plan.force(TORCH):
        exact = network(pixels)
    with torch.inference_mode():
        torch.testing.assert_close(network(pixels), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@layouts
def test_more_than_2_to_the_31_elements(layout):
    """The last image of so many is that image alone."""
    case = replace(
        BY_NAME["padded_3x3"], c=32, k=32, h=2048, w=2048, n=17, b=1, dtype="bfloat16", layout=layout
    )
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("takes 40 GB of the GPU's memory")
    module = layer(case, torch.bfloat16)
    x = torch.empty(17, 32, 2048, 2048, device="cuda", dtype=torch.bfloat16, memory_format=LAYOUTS[layout])
    assert x.numel() > 2**31
    for one in x:
        one.normal_()
    x.requires_grad_()
    with _plan.force(FUSED):
        y = module(x)
        last = x.detach()[-1:].clone(memory_format=torch.preserve_format).requires_grad_()
        alone = module(last)
        torch.testing.assert_close(y[-1:], alone, rtol=2**-6, atol=2**-6)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        (grad_alone,) = torch.autograd.grad(alone, last, torch.ones_like(alone))
        torch.testing.assert_close(grad[-1:], grad_alone, rtol=2**-6, atol=2**-6)
