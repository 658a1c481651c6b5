"""torch.compile, torch.export, torch.func, and the operator's registration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BY_NAME
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fastsep
from fastsep import SeparableConv2d, _native, _ops
from fastsep._case import LAYOUTS

# torch's own, inside its compiler and its forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

op = torch.ops.fastsep.separable_conv2d.default
X = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(1))
OPTIONS = {"stride": 2, "padding": "same", "mid_activation": "relu6", "activation": "silu"}


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return SeparableConv2d(4, 6, 3, **OPTIONS | options)


def composed(module):
    """The same by torch's own operators, as a function of the parameters and the input."""

    def function(parameters, x):
        dw, pw, b = (parameters[k] for k in ("depthwise.weight", "pointwise.weight", "pointwise.bias"))
        x = x if x.dim() == 4 else x[None]
        h, w = x.shape[2] % 2, x.shape[3] % 2
        return _ops.compose(x, dw, pw, None, b, (2, 2), (h, 1, w, 1), (1, 1), "relu6", "silu")

    parameters = dict(module.named_parameters())
    return lambda x, parameters=parameters: function(parameters, x)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# The operator


def op_arguments(name, dtype, layout, requires_grad):
    case = replace(BY_NAME[name], dtype=str(dtype)[6:], layout=layout)
    tensors = case.tensors()
    order = ("input", "depthwise_weight", "pointwise_weight", "depthwise_bias", "bias")
    values = [None if tensors[k] is None else tensors[k].requires_grad_(requires_grad) for k in order]
    pads = [case.pt, case.pb, case.pl, case.pr]
    return (*values, None, [case.sh, case.sw], pads, [case.dh, case.dw], case.mid, case.act)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["both_biases", "stride_2_tf_same", "gelu_of_stride_and_multiplier", "one_pixel"]
)
def test_opcheck(name, dtype, layout, requires_grad):
    opcheck(op, op_arguments(name, dtype, layout, requires_grad))


@pytest.mark.skipif(_native.core is None, reason="the native module is missing")
def test_opcheck_with_packed_weights():
    args = list(op_arguments("both_biases", torch.float32, "nchw", False))
    x, dw, pw, db, b = args[:5]
    args[5] = _native.pack(x.shape[1], dw, pw, db, b)
    opcheck(op, args)


FORMATS = {
    "nchw": lambda: torch.empty(2, 3, 5, 4),
    "nhwc": lambda: torch.empty(2, 5, 4, 3).permute(0, 3, 1, 2),
    "nhwc_slice": lambda: torch.empty(2, 5, 4, 6).permute(0, 3, 1, 2)[:, 2:5],
    "nchw_slice": lambda: torch.empty(2, 6, 5, 9)[:, ::2, :, 1:5],
    "one_channel": lambda: torch.empty(2, 1, 5, 4),
    "one_channel_nhwc": lambda: torch.empty(2, 5, 4, 1).permute(0, 3, 1, 2),
    "one_pixel": lambda: torch.empty(2, 3, 1, 1),
    "one_pixel_nhwc": lambda: torch.empty(2, 1, 1, 3).permute(0, 3, 1, 2),
    "one_number": lambda: torch.empty(1, 1, 1, 1),
    "one_image_nhwc": lambda: torch.empty(5, 4, 3).permute(2, 0, 1)[None],
    "expanded": lambda: torch.empty(2, 1, 5, 4).expand(2, 3, 5, 4),
    "transposed": lambda: torch.empty(2, 3, 4, 5).transpose(2, 3),
    "chwn": lambda: torch.empty(3, 5, 4, 2).permute(3, 0, 1, 2),
    "empty": lambda: torch.empty(0, 3, 5, 4),
}


@pytest.mark.parametrize("name", FORMATS)
def test_eager_fake_and_composed_results_have_one_format(name):
    """That of the input where it has one; for what could be either, that of torch's convolution."""
    x = FORMATS[name]()
    x.normal_() if name != "expanded" else None
    c = x.shape[1]
    dw, pw = torch.randn(c, 1, 3, 3), torch.randn(4, c, 1, 1)
    args = (dw, pw, None, None, None, [1, 1], [2, 1, 1, 1], [1, 1], "identity", "identity")
    eager = op(x, *args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(
            mode.from_tensor(x), *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        )
    by_torch = fastsep.separable_conv2d(x.bfloat16(), dw.bfloat16(), pw.bfloat16(), padding=((2, 1), (1, 1)))
    assert eager.shape == fake.shape == by_torch.shape
    if "slice" not in name:  # x.bfloat16() is no slice any more
        assert by_torch.stride() == eager.stride()
    assert eager.stride() == fake.stride()
    expected = torch.nn.functional.conv2d(x, torch.randn(4, c, 3, 3), padding=(1, 1)).is_contiguous(
        memory_format=torch.channels_last
    )
    if name not in ("empty", "one_pixel", "one_number", "one_image_nhwc", "chwn"):
        assert eager.is_contiguous(memory_format=torch.channels_last) == expected


def test_flops_are_those_of_two_convolutions():
    module = layer()
    dw, pw = module.depthwise.weight, module.pointwise.weight
    with FlopCounterMode(display=False) as ours:
        fastsep.separable_conv2d(X, dw, pw, stride=2, padding="same")
    assert list(ours.get_flop_counts()["Global"]) == [torch.ops.fastsep.separable_conv2d]
    with FlopCounterMode(display=False) as theirs:
        composed(module)(X)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0
    with FlopCounterMode(display=False) as children:  # it hooks all modules, to count for each
        module(X)
    assert children.get_total_flops() == theirs.get_total_flops()


def test_flops_of_a_kernel_that_is_not_square():
    """2 operations for each tap and each weight of the pointwise half, at every output pixel."""
    dw, pw = torch.randn(8, 1, 5, 2), torch.randn(6, 8, 1, 1)
    with FlopCounterMode(display=False) as counter:
        n, _, oh, ow = fastsep.separable_conv2d(X, dw, pw).shape
    assert counter.get_total_flops() == 2 * n * oh * ow * 8 * (5 * 2 + 6)


def test_profiler_shows_the_operator():
    module = layer()
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(X)
    assert "fastsep::separable_conv2d" in {event.name for event in profile.events()}


# torch.compile


def compiled(module, backend="aot_eager", **options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, backend=counter, fullgraph=True, **options), counter


def operators(counter):
    return [n.target for graph in counter.graphs for n in graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("padding", [1, "same", ((0, 1), (2, 0))], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_compile_does_not_compile_again_for_another_batch(training, padding):
    module = layer(padding=padding)
    fast, counter = compiled(module)
    with torch.set_grad_enabled(training):
        for n in (3, 5, 2, 7):
            x = torch.randn(n, 4, 9, 8, requires_grad=training)
            torch._dynamo.mark_dynamic(x, 0)
            y, z = fast(x), module(x)
            assert torch.equal(y, z)
            if training:
                inputs = [x, *module.parameters()]
                for got, expected in zip(
                    torch.autograd.grad(y.square().sum(), inputs),
                    torch.autograd.grad(z.square().sum(), inputs),
                    strict=True,
                ):
                    close(got, expected)
    assert counter.frame_count == 1
    assert operators(counter).count(op) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_with_every_size_dynamic(layout):
    module = layer()
    fast, counter = compiled(module, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 4, 8, 8), (3, 4, 11, 6), (5, 4, 7, 13)):
            x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
            y, z = fast(x), module(x)
            assert torch.equal(y, z)
            assert y.stride() == z.stride()
    assert counter.frame_count <= 2  # "same" pads the longer side differently from the shorter


def test_compile_by_inductor_between_other_operators():
    model = nn.Sequential(layer(), nn.BatchNorm2d(6).eval(), nn.ReLU(), SeparableConv2d(6, 3, 3))
    fast, counter = compiled(model, "inductor")
    x = X.contiguous(memory_format=torch.channels_last)
    close(fast(x), model(x))
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fast(x).sum().backward()
    for got, want in zip((p.grad for p in model.parameters()), expected, strict=True):
        close(got, want)
    assert operators(counter).count(op) == 2


def test_compile_of_the_function():
    weights = {k.replace(".", "_"): v for k, v in layer().named_parameters()}
    fast, _ = compiled(fastsep.separable_conv2d)
    args = X, weights["depthwise_weight"], weights["pointwise_weight"], weights["pointwise_bias"]
    options = {"stride": (2, 1), "padding": ((1, 0), (2, 1)), "activation": "relu"}
    assert torch.equal(fast(*args, **options), fastsep.separable_conv2d(*args, **options))
    assert torch.equal(fast(X[0], *args[1:]), fastsep.separable_conv2d(X[0], *args[1:]))


@pytest.mark.parametrize("what", ["autocast", "bfloat16", "hook", "frozen", "reflect"])
def test_compile_of_the_other_paths(what):
    module, x = layer(padding=1, padding_mode="reflect" if what == "reflect" else "zeros"), X
    if what == "bfloat16":
        module, x = module.bfloat16(), X.bfloat16()
    if what == "hook":
        module.depthwise.register_forward_hook(lambda _m, _x, y: y + 1)
    if what == "frozen":
        module.freeze()
    fast, counter = compiled(module)
    with torch.autocast("cpu", enabled=what == "autocast"):
        for n in (2, 3):
            y, z = fast(x[:n]), module(x[:n])
            assert y.dtype == z.dtype
            torch.testing.assert_close(y, z)
    assert (op in operators(counter)) == (what in ("frozen", "reflect"))


def test_compiled_errors_are_ours():
    fast, _ = compiled(layer())
    with pytest.raises(RuntimeError, match="input must have 4 channels"):
        fast(X[:, :3])


# torch.export


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, frozen):
    module = layer()
    if frozen:
        module.freeze()
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (X,), dynamic_shapes=({0: batch},), strict=strict)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [op]
    # Packed weights belong to one processor, so they stay behind.
    assert {value.dtype for value in program.state_dict.values()} == {torch.float32}
    assert not program.constants
    for n in (2, 5):
        x = torch.randn(n, 4, 9, 8)
        assert torch.equal(program.module()(x), module(x))
    if not frozen:
        again = program.module()
        again(X).square().sum().backward()
        module(X).square().sum().backward()
        close(again.get_parameter("depthwise.weight").grad, module.depthwise.weight.grad)


def test_exported_program_through_a_file(tmp_path):
    program = torch.export.export(layer(), (X,))
    torch.export.save(program, tmp_path / "layer.pt2")
    assert torch.equal(torch.export.load(tmp_path / "layer.pt2").module()(X), layer()(X))


def test_make_fx_traces_the_operator():
    module = layer()
    traced = torch.fx.experimental.proxy_tensor.make_fx(module)(X)
    assert op in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(X), module(X))


def test_jit_trace():
    module = layer(padding=1)
    traced = torch.jit.trace(module, (X,))
    close(traced(X[:2]), module(X[:2]))


# torch.func


def test_grad_of_a_functional_call():
    module = layer()
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).square().sum()

    got = grad(loss)(parameters, X)
    expected = torch.autograd.grad(composed(module)(X).square().sum(), list(parameters.values()))
    for g, e in zip(got.values(), expected, strict=True):
        close(g, e)


def test_gradients_per_sample():
    module = layer()
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, X)
    for i, x in enumerate(X):
        expected = torch.autograd.grad(composed(module)(x).square().sum(), list(module.parameters()))
        for g, e in zip(got.values(), expected, strict=True):
            close(g[i], e)


@pytest.mark.parametrize("dim", [0, 1, 4])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_over_inputs(dim, requires_grad):
    module = layer().requires_grad_(requires_grad)
    x = torch.randn(5, *X.shape)
    got = vmap(module, in_dims=dim, out_dims=dim)(x.movedim(0, dim))
    close(got.movedim(dim, 0), torch.stack([module(batch) for batch in x]))
    nested = vmap(vmap(module))(x)  # [C, H, W] within
    close(nested, got.movedim(dim, 0))


@pytest.mark.parametrize("inputs", [None, 0])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_over_weights(inputs, requires_grad):
    modules = [layer(seed).requires_grad_(requires_grad) for seed in range(3)]
    parameters, buffers = stack_module_state(modules)
    x = X if inputs is None else torch.randn(3, *X.shape)

    def call(parameters, x):
        return functional_call(modules[0], (parameters, buffers), (x,))

    got = vmap(call, (0, inputs))(parameters, x)
    close(got, torch.stack([module(X if inputs is None else x[i]) for i, module in enumerate(modules)]))


def test_grad_through_vmap():
    module = layer()
    x = X.clone().requires_grad_()
    got = grad(lambda x: vmap(module)(x[:, None]).square().sum())(X)
    (expected,) = torch.autograd.grad(composed(module)(x).square().sum(), x)
    close(got, expected)


def test_jacobians_and_hessian():
    module, x = layer(), X[:1, :, :4, :3]
    function = composed(module)
    tangent = torch.randn(x.shape)
    expected = jacrev(function)(x)
    close(jacrev(module)(x), expected)
    close(jacfwd(module)(x), expected)
    close(torch.autograd.functional.jacobian(module, x, vectorize=True), expected)
    for got, want in zip(jvp(module, (x,), (tangent,)), jvp(function, (x,), (tangent,)), strict=True):
        close(got, want)
    y, pull = vjp(module, x)
    close(pull(torch.ones_like(y))[0], expected.sum((0, 1, 2, 3)))
    close(hessian(lambda x: module(x).square().sum())(x), hessian(lambda x: function(x).square().sum())(x))


def test_forward_mode_of_the_operator():
    """It is not dropped in silence where torch.ops is called with dual numbers."""
    args = op_arguments("both_biases", torch.float64, "nchw", False)
    tangent = torch.randn_like(args[0])
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(args[0], tangent)
        y = torch.autograd.forward_ad.unpack_dual(op(x, *args[1:])).tangent
    without_bias = op(tangent, *args[1:3], None, None, *args[5:])
    torch.testing.assert_close(y, without_bias)
