"""The kernels on a GPU: the table of cases against float64, and what PyTorch expects of an operator there.

pytest -m cuda
"""

from __future__ import annotations

import copy
import re
import time
from dataclasses import replace

import pytest
import torch
from cases import BY_NAME, CASES, WRONG, good_call, half
from commands import ROOT, run

import fastsep
from fastsep import SeparableConv2d, _backward, _native, _ops, _plan
from fastsep._case import DTYPES, LAYOUTS, Case, format_case, parse_case
from fastsep._check import (
    NAMES,
    call,
    error_bound,
    gradient_bounds,
    largest_error,
    operands,
    relative_error,
)
from fastsep._cuda_model import ADDMM, ADDMM_RELU, CUDNN_RELU, DEPTHWISE, FUSED, HOPPER, PATHS, TORCH

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

# Dtypes with kernels; "tf32" is float32 where torch allows that.
VARIETIES = ["float32", "tf32", "float16", "bfloat16"]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
parts = pytest.mark.parametrize("part", [lambda case: case, half], ids=["separable", "depthwise"])
varieties = pytest.mark.parametrize("variety", VARIETIES)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Float32 as it is, and the model alone to choose a path."""
    assert _native.cuda is not None, _native.cuda_missing
    assert not _native.why_not_on(torch.cuda.current_device())
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    matmul = torch.backends.cuda.matmul.allow_tf32
    cudnn.allow_tf32, cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = False, False, False
    yield
    cudnn.allow_tf32, cudnn.benchmark = before
    torch.backends.cuda.matmul.allow_tf32 = matmul
    _plan.forget()


def in_dtype(case: Case, variety: str) -> Case:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = variety == "tf32"
    return replace(case, dtype="float32" if variety == "tf32" else variety)


def rounded(case: Case, variety: str) -> Case:
    """A case whose eps is that of the products: TF32 has as many bits as float16."""
    return replace(case, dtype="float16") if variety == "tf32" else case


def on_gpu(tensors, device="cuda"):
    """Copies there, in their formats."""
    return {name: None if t is None else t.to(device) for name, t in tensors.items()}


def geometry(case):
    return (case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw)


def exactly(case, tensors):
    """Output and the sum of its terms' absolute values, in float64 on the CPU."""
    wide = [None if t is None else t.double() for t in operands(tensors)]
    sizes = [None if t is None else t.abs() for t in wide]
    exact = _ops.compose(*wide, *geometry(case), case.mid, case.act)
    return exact, _ops.compose(*sizes, *geometry(case), "identity", "identity")


def layer(case, dtype=torch.float32, **options):
    torch.manual_seed(0)
    made = SeparableConv2d(
        *(case.c, case.k, (case.kh, case.kw)),
        depth_multiplier=case.m,
        bias=bool(case.b),
        depthwise_bias=bool(case.db),
        **case.options | options,
    )
    return made.to("cuda", dtype)


LAYER = replace(BY_NAME["fourteen_by_fourteen"], n=4, mid="relu6", act="silu")


def image(case=LAYER, dtype=torch.float32, layout="nhwc", device="cuda", seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=generator)
    return x.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])


# ---- values


@every_case
@parts
@varieties
def test_forward_is_within_the_rounding_bound(case, part, variety):
    case = in_dtype(part(case), variety)
    tensors = case.tensors()
    exact, magnitude = exactly(case, tensors)
    bound = error_bound(rounded(case, variety), magnitude)
    for layout in LAYOUTS:
        varied = replace(case, layout=layout)
        for path in (FUSED, DEPTHWISE) if case.k else (DEPTHWISE,):
            with _plan.force(path):
                got = call(varied, on_gpu(varied.tensors()))
            assert got.dtype is DTYPES[case.dtype]
            error = relative_error(got.cpu(), exact, bound)
            assert error <= 1, f"{error:.3g} times its bound, {path} {variety}: {format_case(varied)}"
            assert got.is_contiguous(memory_format=_ops.memory_format(varied.tensors()["input"]))


@every_case
@parts
@varieties
def test_gradients_are_within_the_rounding_bound(case, part, variety):
    case = in_dtype(part(case), variety)
    tensors, grad = case.tensors(), case.gradient()
    wide = [None if t is None else t.double() for t in operands(tensors)]
    needed = [t is not None for t in wide]
    exact = dict(
        zip(
            NAMES,
            _backward.compose(grad.double(), *wide, *geometry(case), case.mid, case.act, needed),
            strict=True,
        )
    )
    bounds = gradient_bounds(rounded(case, variety), tensors, grad)
    for layout in LAYOUTS:
        varied = replace(case, layout=layout)
        for path in (FUSED, DEPTHWISE) if case.k else (DEPTHWISE,):
            given = on_gpu(varied.tensors())
            inputs = {name: t.requires_grad_() for name, t in given.items() if t is not None}
            with _plan.force(path):
                values = torch.autograd.grad(
                    call(varied, given), list(inputs.values()), varied.gradient().to("cuda")
                )
            got = {name: value.cpu() for name, value in zip(inputs, values, strict=True)}
            error = largest_error(got, exact, bounds)
            assert error <= 1, f"{error:.3g} times its bound, {path} {variety}: {format_case(varied)}"


def tilings():
    """The lines of cuda_tilings.txt: multiprocessors, a tile's pixels and output channels, the case."""
    for line in (ROOT / "tests" / "cuda_tilings.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield pytest.param(
                *map(int, line.split("|")[0].split()), parse_case(line), id=parse_case(line).name
            )


def kernels_of(run):
    """The names of the kernels that a call launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        result = run()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return result, [event.name for event in profiler.events() if event.device_type == device]


@pytest.mark.parametrize(("multiprocessors", "pixels", "channels", "case"), tilings())
@varieties
@layouts
def test_every_tiling(multiprocessors, pixels, channels, case, variety, layout):
    case = replace(in_dtype(case, variety), layout=layout)
    tensors = case.tensors()
    exact, magnitude = exactly(case, tensors)
    given = on_gpu(tensors)
    _native.cuda.pretend_multiprocessors(multiprocessors)
    try:
        with _plan.force(FUSED):
            got, kernels = kernels_of(lambda: call(case, given))
    finally:
        _native.cuda.pretend_multiprocessors(0)
    assert relative_error(got.cpu(), exact, error_bound(rounded(case, variety), magnitude)) <= 1
    tiles = [re.search(r"separable_forward.*Tiling<(\d+), (\d+)", name) for name in kernels]
    assert [(int(t[1]), int(t[2])) for t in tiles if t] == [(pixels, channels)], kernels


@every_case
@layouts
def test_small_integers_are_exact(case, layout):
    keep = {"identity", "relu", "relu6"}
    mid, act = (name if name in keep else "relu" for name in (case.mid, case.act))
    case = replace(case, layout=layout, mid=mid, act=act)
    tensors = case.tensors(integers=2)
    with _plan.force(FUSED):
        got = call(case, on_gpu(tensors))
    assert torch.equal(got.cpu().double(), exactly(case, tensors)[0])


@varieties
@layouts
def test_equal_calls_give_equal_bits(variety, layout):
    for name in ("bands_stride_2", "channels_129_to_257", "multiplier_3"):
        case = replace(in_dtype(BY_NAME[name], variety), layout=layout, n=9)
        given, grad = on_gpu(case.tensors()), case.gradient().to("cuda")
        inputs = [t.requires_grad_() for t in given.values() if t is not None]
        first = None
        for _ in range(5):
            torch.empty(1 << 24, device="cuda").uniform_()  # what a workspace will find in its memory
            with _plan.force(FUSED):
                y = call(case, given)
                found = [y, *torch.autograd.grad(y, inputs, grad)]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("path", [path for path in PATHS if path != HOPPER])
@varieties
@layouts
def test_nan_and_infinity_travel(value, path, variety, layout):
    """By every path; where the two products with relu in them swallow NaN, they do not take part."""
    case = replace(in_dtype(BY_NAME["padded_3x3"], variety), layout=layout, b=1, act="relu")
    torch.backends.cudnn.benchmark = True
    tensors = case.tensors()
    tensors["input"][0, 3, 4, 5] = value
    with _plan.force(path):
        got = call(case, on_gpu(tensors)).cpu()
    assert torch.equal(got.isfinite(), exactly(case, tensors)[0].isfinite())


@varieties
def test_torchs_products_behind_the_depthwise_kernel(variety):
    case = replace(in_dtype(LAYER, variety), layout="nhwc", b=1, act="relu")
    tensors = case.tensors()
    exact, magnitude = exactly(case, tensors)
    bound = error_bound(rounded(case, variety), magnitude)
    torch.backends.cudnn.benchmark = True  # so that those with relu in them may be tried
    for path in (ADDMM, ADDMM_RELU, CUDNN_RELU):
        with _plan.force(path):
            assert relative_error(call(case, on_gpu(tensors)).cpu(), exact, bound) <= 1, path


VIEWS = {
    "odd_offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    "channel_slice": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "column_slice": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "expanded_batch": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "odd_offset_channels_last": lambda x: (
        torch.cat([x.new_zeros(3), x.permute(0, 2, 3, 1).flatten()])[3:]
        .view(x.shape[0], *x.shape[2:], x.shape[1])
        .permute(0, 3, 1, 2)
    ),
}


@pytest.mark.parametrize("view", VIEWS)
@varieties
@layouts
def test_views(view, variety, layout):
    case = replace(in_dtype(BY_NAME["both_biases"], variety), layout=layout, n=3)
    given = on_gpu(case.tensors())
    given["input"] = VIEWS[view](given["input"])
    given = {name: t if t is None or name == "input" else VIEWS["odd_offset"](t) for name, t in given.items()}
    dense = {name: None if t is None else t.clone() for name, t in given.items()}
    with _plan.force(FUSED):
        torch.testing.assert_close(call(case, given), call(case, dense))


def test_no_images():
    case = replace(BY_NAME["no_images"], dtype="bfloat16")
    given = on_gpu(case.tensors())
    inputs = [t.requires_grad_() for t in given.values() if t is not None]
    y = call(case, given)
    assert y.shape == case.output
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_a_dtype_without_kernels_is_composed(dtype):
    case = replace(BY_NAME["both_biases"], dtype=dtype)
    given = on_gpu(case.tensors())
    expected = _ops.compose(*operands(given), *geometry(case), case.mid, case.act)
    torch.testing.assert_close(call(case, given), expected)


def test_gradients_of_gradients():
    case = replace(BY_NAME["both_biases"], mid="silu", act="tanh")
    found = []
    for compute in (call, lambda c, t: _ops.compose(*operands(t), *geometry(c), c.mid, c.act)):
        given = on_gpu(case.tensors())
        inputs = [t.requires_grad_() for t in given.values() if t is not None]
        first = torch.autograd.grad(compute(case, given).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


# ---- what PyTorch expects


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
            *(*geometry(LAYER), LAYER.mid, LAYER.act),
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
        args = x, dw, pw, db, b, None, *geometry(case), case.mid, case.act
        torch.library.opcheck(torch.ops.fastsep.separable_conv2d.default, args)
    else:
        args = x, dw, db, *geometry(case), case.mid
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
    with pytest.raises(RuntimeError, match=r"must be on the input's device, cuda:0, got cuda:1"):
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


# ---- the planner


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_with_cudnn_benchmark_the_paths_are_measured_once(phase, monkeypatch):
    torch.backends.cudnn.benchmark = True
    measured = []
    measure = _plan.measure
    monkeypatch.setattr(_plan, "measure", lambda found: measured.append(list(found)) or measure(found))
    _plan.forget()
    module, x = layer(LAYER, torch.bfloat16), image(dtype=torch.bfloat16).requires_grad_(phase == "backward")
    for _ in range(3):
        y = module(x)
        if phase == "backward":
            torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert (
        measured == [[FUSED, DEPTHWISE, ADDMM, TORCH], [FUSED, DEPTHWISE, TORCH]][: 1 + (phase != "forward")]
    )
    assert all(choice.measured for choice in _plan._choices.values())


def test_the_model_knows_this_gpu():
    gpu = _plan.Gpu.of(0)
    assert gpu.name == torch.cuda.get_device_name(0)
    assert 1e11 < gpu.bandwidth < 2e13
    assert 1e12 < gpu.fma < gpu.matrix < 1e16


# ---- bad input and errors


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_a_wrong_call_is_refused_as_on_the_cpu(wrong):
    arguments = good_call() | wrong.change
    if wrong.name == "size_overflow":
        pytest.skip("more than a GPU holds")
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            arguments[name] = value.cuda()
    with pytest.raises(wrong.error, match=wrong.message):
        fastsep.separable_conv2d(**arguments)
    usable()


def usable():
    """Whether torch and the kernels still work, and no error is left for the next who asks."""
    torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").sum().item() == 3
    case = BY_NAME["both_biases"]
    tensors = case.tensors()
    exact, magnitude = exactly(case, tensors)
    with _plan.force(FUSED):
        assert relative_error(call(case, on_gpu(tensors)).cpu(), exact, error_bound(case, magnitude)) <= 1


def test_an_error_of_cuda_names_the_shape_and_leaves_the_device_usable():
    problem = replace(BY_NAME["plain_3x3"], dtype="float16").problem
    message = r"CUDA error in the forward pass on device 9999, .*input \[2, 8, 9, 10\]"
    with pytest.raises(RuntimeError, match=message):
        _native.cuda.forward(problem, False, *(0,) * 6, 0, 0, 9999, 0)
    usable()


def test_a_lack_of_memory_leaves_the_device_usable():
    x = torch.empty(1, 1, 1, 1, device="cuda", dtype=torch.float16).expand(1 << 12, 64, 1 << 10, 1 << 10)
    shape = r"In the forward pass for the float16 input \[4096, 64, 1024, 1024\], 64 output channels"
    with pytest.raises(torch.OutOfMemoryError, match=shape):
        fastsep.separable_conv2d(
            x,
            torch.randn(64, 1, 3, 3, device="cuda").half(),
            torch.randn(64, 64, 1, 1, device="cuda").half(),
            padding=1,
        )
    usable()


def test_too_small_a_workspace_is_refused():
    case = replace(BY_NAME["both_biases"], dtype="bfloat16")
    asked = (1, 1, 1, 1, 1)
    if _native.cuda.backward_workspace_bytes(case.problem, False, *asked) > 0:
        with pytest.raises(ValueError, match="workspace"):
            _native.cuda.backward(case.problem, False, *(0,) * 6, *asked, 0, 0, 0, 0)
    usable()


def test_verbose_says_path_reason_and_time():
    program = (
        "import torch, fastsep; layer = fastsep.SeparableConv2d(8, 16, 3, padding=1).cuda().half(); "
        "layer(torch.randn(2, 8, 9, 9, device='cuda').half()).sum().backward()"
    )
    result = run(f'python -c "{program}"', FASTSEP_VERBOSE="1")
    assert result.returncode == 0, result.stderr
    first, second = [line for line in result.stderr.splitlines() if line.startswith("fastsep: ")]
    assert first.startswith("fastsep: cuda ")
    assert "by the model: fused " in first
    assert second.startswith("fastsep: backward cuda ")
    assert "ms on the device, waited for" in first
    assert parse_case(first) == parse_case(second)


def test_info_tells_of_the_gpu():
    pytest.importorskip("rich")
    result = run("python -m fastsep info")
    assert result.returncode == 0, result.stderr
    assert torch.cuda.get_device_name(0) in result.stdout
