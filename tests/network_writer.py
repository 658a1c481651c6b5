"""Writes random networks as programs: modules, functions and methods of tensors in every spelling."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsep import DepthwiseConv2d, SeparableConv2d

HEAD = """\
import operator
import torch
import torch.nn.functional as F
from torch import nn
from fastsep import DepthwiseConv2d, SeparableConv2d
"""

MOST_CHANNELS, MOST_NUMBERS = 48, 40_000


class Writer:
    """Writes a network line by line, and runs each line to learn what its result is."""

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.init: list[str] = []
        self.forward: list[str] = []
        self.after: list[str] = []  # what is done to the network when it is made
        self.shell = nn.Module().eval()
        self.names: dict[str, Any] = {
            "operator": operator, "torch": torch, "F": F, "nn": nn, "self": self.shell,
            "SeparableConv2d": SeparableConv2d, "DepthwiseConv2d": DepthwiseConv2d,
        }  # fmt: skip
        self.names["x"] = torch.randn(
            2, source.choice([3, 3, 8]), source.randint(9, 20), source.randint(9, 20)
        )
        self.images = ["x"]
        self.count = 0
        self.modules: list[tuple[str, int]] = []  # with the channels that they take, to be called again

    def choose(self, options: Any) -> Any:
        return self.source.choice(list(options))

    def maybe(self, share: float) -> bool:
        return self.source.random() < share

    def size(self, name: str) -> tuple[int, ...]:
        return tuple(self.names[name].shape)

    def image(self) -> str:
        """Mostly the newest."""
        return self.images[-1] if self.maybe(0.75) else self.choose(self.images)

    def member(self, code: str) -> str:
        """The name of an attribute of the network."""
        name = f"self.m{self.count}"
        self.count += 1
        line = f"{name} = {code}"
        exec(line, self.names)
        self.shell.eval()
        self.init.append(line)
        return name

    def value(self, code: str) -> str:
        """The name of a new value."""
        name = f"y{self.count}"
        self.count += 1
        self.line(f"{name} = {code}")
        result = self.names[name]
        if isinstance(result, Tensor) and result.dim() == 4:
            self.images.append(name)
        return name

    def line(self, code: str) -> None:
        exec(code, self.names)
        self.forward.append(code)

    def part(self, write: Callable[[Writer], Any]) -> None:
        """Some lines; none where they do not fit what is there: a kernel larger than the plane, say."""
        init, forward, images = [*self.init], [*self.forward], [*self.images]
        modules = [*self.modules]
        try:
            write(self)
        except (RuntimeError, ValueError):
            self.init, self.forward, self.images, self.modules = init, forward, images, modules


# ---- parts of networks: each writes some lines -------------------------------------------------------------


def convolution_of(w: Writer, c: int, kind: str) -> tuple[str, int]:
    """The code of a convolution of c channels, and how many it has behind it."""
    bias = w.maybe(0.6)
    if kind == "depthwise":
        k, s = w.choose([3, 3, 3, 5, (3, 1), 1, 2]), w.choose([1, 1, 1, 2, (2, 1)])
        top = max(k) if isinstance(k, tuple) else k
        p = w.choose([top // 2, top // 2, 0, (1, 0)] + (["'same'", "'valid'"] if s == 1 else []))
        m = w.choose([1, 1, 1, 1, 2])
        rest = f", {k}, {s}, {p}, {w.choose([1, 1, 1, 2])}"
        return f"nn.Conv2d({c}, {c * m}{rest}, groups={c}, bias={bias})", c * m
    out = w.choose([4, 7, 8, 16, 16, 24, c])
    if kind == "pointwise":
        return f"nn.Conv2d({c}, {out}, 1, {w.choose([1, 1, 1, 1, 2])}, bias={bias})", out
    if kind == "dense":
        mode = w.choose(["zeros", "zeros", "zeros", "reflect"])
        s = w.choose([1, 1, 2])
        return f"nn.Conv2d({c}, {out}, 3, {s}, 1, bias={bias}, padding_mode='{mode}')", out
    groups = w.choose([g for g in (1, 2, 4) if c % g == 0])
    return f"nn.Conv2d({c}, {groups * 4}, 3, padding=1, groups={groups}, bias={bias})", groups * 4


def norm_of(w: Writer, c: int) -> str:
    """Of a constant plane, batch statistics make rounding errors times eps**-0.5: 10 here, not 316."""
    return w.choose([
        *[f"nn.BatchNorm2d({c})"] * 6,
        f"nn.BatchNorm2d({c}, affine=False)",
        f"nn.BatchNorm2d({c}, eps=0.1, momentum=None)",
        f"nn.BatchNorm2d({c}, eps=0.01, track_running_stats=False)",
        f"nn.GroupNorm(1, {c}, eps=0.01)",
        f"nn.InstanceNorm2d({c}, eps=0.01, affine=True)",
        "nn.Identity()",
    ])  # fmt: skip


ACTIVATION_MODULES = [
    "nn.ReLU()", "nn.ReLU()", "nn.ReLU(True)", "nn.ReLU6()",
    "nn.ReLU6(inplace=True)", "nn.SiLU()", "nn.SiLU(True)",
    "nn.Hardswish()", "nn.GELU()", "nn.GELU('tanh')", "nn.Sigmoid()", "nn.Tanh()", "nn.LeakyReLU()",
    "nn.LeakyReLU(0.2)", "nn.Hardtanh(0, 6)", "nn.Hardtanh()",
    "nn.ELU()", "nn.PReLU()", "nn.Mish()", "nn.Identity()",
    "nn.Dropout(0.3)", "nn.Hardsigmoid()",
]  # fmt: skip

ACTIVATION_CODE = [
    "F.relu({x})", "F.relu({x}, inplace=True)",
    "F.relu({x}, True)", "torch.relu({x})", "{x}.relu()", "{x}.relu_()",
    "torch.relu_({x})", "F.relu6({x})", "{x}.clamp(0, 6)", "F.hardtanh({x}, 0.0, 6.0)", "F.silu({x})",
    "{x} * torch.sigmoid({x})", "{x}.sigmoid()",
    "{x}.tanh()", "F.hardswish({x})", "{x} * F.relu6({x} + 3) / 6",
    "F.leaky_relu({x}, 0.01)", "F.leaky_relu({x}, negative_slope=0.2)", "F.gelu({x}, approximate='tanh')",
    "F.gelu({x})", "torch.clamp_min({x}, 0)", "F.hardsigmoid({x})", "F.dropout({x}, 0.5, self.training)",
    "F.threshold({x}, 0.0, 0.0)", "{x}.tanh_()",
]  # fmt: skip


def write_convolution(w: Writer) -> None:
    x = w.image()
    c = w.size(x)[1]
    code, _ = convolution_of(
        w, c, w.choose(["depthwise", "depthwise", "pointwise", "pointwise", "dense", "grouped"])
    )
    name = w.member(code)
    w.modules.append((name, c))
    w.value(f"{name}({x})")


def write_pair(w: Writer) -> None:
    """What optimize() is for, however it is written."""
    x = w.image()
    for kind in w.choose([("depthwise", "pointwise")] * 3 + [("pointwise", "depthwise", "pointwise")]):
        code, c = convolution_of(w, w.size(x)[1], kind)
        parts = [code] + [norm_of(w, c)] * w.maybe(0.6)
        if w.maybe(0.4):  # all of it as one module
            parts += [w.choose(ACTIVATION_MODULES)] * w.maybe(0.8)
            x = w.value(f"{w.member('nn.Sequential(' + ', '.join(parts) + ')')}({x})")
            continue
        for part in parts:
            x = w.value(f"{w.member(part)}({x})")
        if w.maybe(0.7):
            x = write_activation(w, x)


def write_activation(w: Writer, x: str | None = None) -> str:
    x = x or w.image()
    if w.maybe(0.5):
        return w.value(f"{w.member(w.choose(ACTIVATION_MODULES))}({x})")
    return w.value(w.choose(ACTIVATION_CODE).format(x=x))


def write_norm(w: Writer) -> None:
    x = w.image()
    c = w.size(x)[1]
    if w.maybe(0.3):
        mean, variance = (
            w.member(f"nn.Buffer(torch.rand({c}))"),
            w.member(f"nn.Buffer(torch.rand({c}) + 0.5)"),
        )
        w.value(f"F.batch_norm({x}, {mean}, {variance}, training=self.training)")
    else:
        w.value(f"{w.member(norm_of(w, c))}({x})")


def write_function_convolution(w: Writer) -> None:
    x = w.image()
    c = w.size(x)[1]
    if w.maybe(0.5):
        weight = w.member(f"nn.Parameter(torch.randn({c}, 1, 3, 3))")
        w.value(f"F.conv2d({x}, {weight}, None, padding=1, groups={c})")
    else:
        weight, bias = (
            w.member(f"nn.Parameter(torch.randn(8, {c}, 1, 1))"),
            w.member("nn.Parameter(torch.randn(8))"),
        )
        w.value(f"F.conv2d({x}, {weight}, {bias})")


def write_layer(w: Writer) -> None:
    """One of fastsep's own."""
    x = w.image()
    c = w.size(x)[1]
    pad = w.choose(["'same'", 1, "((0, 1), (2, 1))"])
    if w.maybe(0.5):
        sizes = f"{c}, 8, 3, {w.choose([1, 2])}, {pad}"
        code = f"SeparableConv2d({sizes}, mid_activation='relu', depthwise_bias=True)"
    else:
        code = f"DepthwiseConv2d({c}, {c}, 3, {w.choose([1, 2])}, {pad}, activation='relu6')"
    w.value(f"{w.member(code)}({x})")


def write_gate(w: Writer) -> None:
    x = w.image()
    c = w.size(x)[1]
    squeezed = w.choose([
        f"{x}.mean((2, 3), keepdim=True)", f"F.adaptive_avg_pool2d({x}, 1)",
        f"torch.mean({x}, dim=[2, 3], keepdim=True)",
        f"{x}.mean([-1, -2], True)",
    ])  # fmt: skip
    s = w.value(squeezed)
    w.images.remove(s)
    if w.maybe(0.3):
        first, second = w.member(f"nn.Linear({c}, 4)"), w.member(f"nn.Linear(4, {c})")
        g = w.value(f"{second}(F.relu({first}({s}.flatten(1)))).view(-1, {c}, 1, 1)")
    else:
        first, second = w.member(f"nn.Conv2d({c}, 4, 1)"), w.member(f"nn.Conv2d(4, {c}, 1)")
        g = w.value(f"{second}({w.choose(['F.relu', 'F.silu', 'torch.relu'])}({first}({s})))")
    w.images.remove(g)
    g = w.value(w.choose(["torch.sigmoid({g})", "F.hardsigmoid({g})", "{g}.sigmoid()", "{g}"]).format(g=g))
    w.images.remove(g)
    spelling = w.choose(
        ["{x} * {g}", "{g} * {x}", "torch.mul({x}, {g})", "{x}.mul({g})", "{x}.mul_({g})", None]
    )
    if spelling is None:
        w.line(f"{x} *= {g}")
    else:
        w.value(spelling.format(x=x, g=g))


def write_sum(w: Writer) -> None:
    a = w.image()
    like = [name for name in w.images if w.size(name) == w.size(a)]
    b = w.choose(like)
    spelling = w.choose([
        "{a} + {b}", "{b} + {a}", "torch.add({a}, {b})",
        "{a}.add({b})", "{a}.add_({b})", "operator.add({a}, {b})",
        "torch.add({a}, {b}, alpha=0.5)", "{a} + 0.5 * {b}",
        "{a} - {b}", "torch.stack(({a}, {b})).sum(0)", None,
    ])  # fmt: skip
    if spelling is None:
        w.line(f"{a} += {b}")
    else:
        w.value(spelling.format(a=a, b=b))


def write_shuffle(w: Writer) -> None:
    x = w.image()
    n, c, height, width = w.size(x)
    if c % 2:
        return
    kind = w.choose(["shuffle", "chunk", "split", "cat", "slices"])
    if kind == "shuffle":
        t = w.value(f"{x}.{w.choose(['view', 'reshape'])}({x}.size(0), 2, {c // 2}, {height}, {width})")
        w.value(
            f"{t}.transpose(1, 2).contiguous().view({x}.shape)"
            if w.maybe(0.5)
            else f"{t}.transpose(1, 2).flatten(1, 2)"
        )
    elif kind == "cat":
        like = [name for name in w.images if w.size(name)[2:] == (height, width) and w.size(name)[0] == n]
        other = w.choose(like)
        if c + w.size(other)[1] <= MOST_CHANNELS:
            w.value(f"torch.cat([{x}, {other}], {w.choose(['1', 'dim=1', 'dim=-3'])})")
    elif kind == "slices":
        w.value(f"{x}[:, {w.choose([0, 1])}::2]" if w.maybe(0.5) else f"{x}[:, :{c // 2}]")
    else:
        code = f"{x}.chunk(2, 1)" if kind == "chunk" else f"torch.split({x}, {c // 2}, dim=1)"
        a, b = f"y{w.count}", f"y{w.count + 1}"
        w.count += 2
        w.line(f"{a}, {b} = {code}")
        w.images += [a, b]


def write_pool(w: Writer) -> None:
    x = w.image()
    if min(w.size(x)[2:]) < 3:
        return
    w.value(w.choose([
        "F.max_pool2d({x}, 2)", "F.avg_pool2d({x}, 3, 1, 1)",
        "F.interpolate({x}, scale_factor=2)", "F.pad({x}, (0, 1, 1, 0))",
        "{x}[:, :, 1:, :-1]", "{x}.flip(2)", "{x}.permute(0, 1, 3, 2)", "{x}.contiguous()", "{x}.clone()",
        "F.max_pool2d({x}, 3, stride=1, padding=1)", "{x}.transpose(2, 3)",
        "{x}.detach()", "{x}.permute(0, 2, 3, 1).permute(0, 3, 1, 2)",
    ]).format(x=x))  # fmt: skip


def write_in_place(w: Writer) -> None:
    x = w.image()
    w.line(w.choose([
        "{x}[:, 0] = 0", "{x}[:, :2] *= 2", "{x}.mul_(0.5)",
        "{x} += 1", "{x}.clamp_(-3, 3)", "{x}.view({x}.size(0), -1).mul_(2)",
        "{x}.transpose(1, 2)[0] += 1", "{x}[0].zero_()", "{x}.copy_({x} * 0.5)", "torch.add({x}, 1, out={x})",
        "{x}.detach().add_(1)", "{x}.data.mul_(2)",
    ]).format(x=x))  # fmt: skip


def write_number(w: Writer) -> None:
    x = w.image()
    c = w.size(x)[1]
    kind = w.choose(["scalar", "parameter", "buffer", "size", "item", "random", "attribute"])
    if kind == "scalar":
        w.value(
            w.choose(
                ["{x} * 2", "0.5 * {x}", "{x} / 3", "-{x}", "{x} - 1.5", "1 - {x}", "{x}.abs()", "{x} ** 2"]
            ).format(x=x)
        )
    elif kind == "parameter":
        w.value(f"{x} * {w.member(f'nn.Parameter(torch.rand({c}, 1, 1))')}")
    elif kind == "buffer":
        w.value(f"{x} + {w.member(f'nn.Buffer(torch.rand(1, {c}, 1, 1))')}")
    elif kind == "size":
        w.value(
            w.choose(
                ["{x} / {x}.shape[1] ** 0.5", "{x} * {x}.size(2)", "{x} * ({x}.shape[-1] / {x}.shape[-2])"]
            ).format(x=x)
        )
    elif kind == "item":
        w.value(f"{x} * {w.member('nn.Buffer(torch.tensor(0.5))')}.item()")
    elif kind == "attribute":
        w.value(f"{x} * {w.member('0.25')}")
    elif w.maybe(0.4):
        w.value(
            w.choose(
                ["{x} + torch.rand_like({x})", "F.dropout({x}, 0.3, True)", "{x} * torch.rand(1)"]
            ).format(x=x)
        )


def write_call_again(w: Writer) -> None:
    x = w.image()
    fitting = [name for name, channels in w.modules if channels == w.size(x)[1]]
    if fitting:
        w.value(f"{w.choose(fitting)}({x})")


def write_question(w: Writer) -> None:
    """What a graph cannot have, or may not change."""
    x = w.image()
    w.line(w.choose([
        "{x}.stride()", "{x}.is_contiguous()", "{x}.shape", "{x}.size()", "{x}.dim()", "{x}.numel()",
        "assert {x}.ndim == 4", "self.last = {x}.shape[0]",
    ]).format(x=x))  # fmt: skip


PARTS: list[tuple[Callable[[Writer], Any], int]] = [
    (write_pair, 10), (write_convolution, 6), (write_activation, 4),
    (write_norm, 2), (write_function_convolution, 1),
    (write_layer, 2), (write_gate, 3), (write_sum, 4),
    (write_shuffle, 3), (write_pool, 2), (write_in_place, 2),
    (write_number, 2), (write_call_again, 1), (write_question, 1),
]  # fmt: skip


def write_results(w: Writer) -> str:
    last = w.images[-1]
    results = [last] + [w.choose(w.images) for _ in range(w.choose([0, 0, 0, 1, 2]))]
    if w.maybe(0.3):
        code = w.choose(
            [
                "{x}.mean((2, 3))",
                "{x}.flatten(1)",
                "F.adaptive_avg_pool2d({x}, 1).flatten(1)",
                "{x}.abs().sum()",
            ]
        )
        results[0] = w.value(code.format(x=last))
    if len(results) == 1:
        return results[0]
    names = ", ".join(results)
    mapping = ", ".join(f"'{i}': {name}" for i, name in enumerate(results))
    return w.choose([f"({names})", f"[{names}]", f"{{{mapping}}}", f"({results[0]}, [{names}])"])


HOOKS = [
    "register_forward_hook(lambda module, inputs, output: output * 2)",
    "register_forward_hook(lambda module, inputs, output: None)",
    "register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))",
]


def write(source: random.Random) -> str:
    """The program of a network, a class Net and `prepare`, what is done to it."""
    with torch.no_grad():
        w = Writer(source)
        parts, weights = zip(*PARTS, strict=True)
        for _ in range(source.randint(2, 9)):
            w.part(source.choices(parts, weights)[0])
            big = [
                name
                for name in w.images[1:]
                if w.names[name].numel() > MOST_NUMBERS or not w.names[name].numel()
            ]
            if big or w.size(w.images[-1])[1] > MOST_CHANNELS:
                break
        result = write_results(w)
    members = [name for name, _ in w.modules]
    if members and w.maybe(0.15):
        w.after.append(f"{w.choose(members)}.{w.choose(HOOKS)}")
    size = w.size("x")
    body = [
        HEAD,
        "class Net(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *(f"        {line}" for line in w.init),
        "",
        "    def forward(self, x):",
        *(f"        {line}" for line in w.forward),
        f"        return {result}",
        "",
        "def prepare(self):",
        *(f"    {line}" for line in w.after or ["pass"]),
        "",
        f"SIZE = {size}",
    ]
    return "\n".join(body) + "\n"
