"""The children of the layer: replaced, changed, parametrized or hooked ones are obeyed."""

from __future__ import annotations

import pytest
import torch
from handwritten import HandWritten, X, layer, same
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

# Each entry changes both modules; what they compute has to stay the same.


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Conv2d):
    """Nothing changed: fused as before."""


def _replace(name, make):
    def change(module):
        torch.manual_seed(7)
        setattr(module, name, make())

    return change


def _set(name, attribute, value):
    return lambda module: setattr(getattr(module, name), attribute, value)


def _override_forward(module):
    forward = module.depthwise.forward
    module.depthwise.forward = lambda x: forward(x) + 1


def _own_weight(module):
    """As tools do that compute the weight: no parameter any more, but a plain attribute."""
    weight = module.pointwise.weight
    del module.pointwise.weight
    module.pointwise.weight = weight.detach() * 3


def _double_weight_norm(module):
    parametrizations.weight_norm(module.depthwise)
    module.depthwise.parametrizations.weight.original0.data.mul_(2)


class Times(nn.Module):
    def forward(self, x):
        return 5 * x


OBEYED = {
    "other_convolution": _replace("depthwise", lambda: nn.Conv2d(6, 6, 5, groups=6, padding=1, stride=2)),
    "groups_of_two": _replace("depthwise", lambda: nn.Conv2d(6, 6, 3, groups=3)),
    "dense": _replace("depthwise", lambda: nn.Conv2d(6, 6, 3)),
    "subclass": _replace("depthwise", lambda: Doubled(6, 6, 3, groups=6)),
    "subclass_renamed": _replace("depthwise", lambda: Renamed(6, 6, 3, groups=6)),
    "sequence": _replace("depthwise", lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6))),
    "pointwise_3x3": _replace("pointwise", lambda: nn.Conv2d(6, 4, 3, padding=1)),
    "pointwise_groups": _replace("pointwise", lambda: nn.Conv2d(6, 4, 1, groups=2)),
    "pointwise_padded": _replace("pointwise", lambda: nn.Conv2d(6, 4, 1, padding=1)),
    "identity": _replace("pointwise", nn.Identity),
    "stride": _set("depthwise", "stride", (2, 1)),
    "stride_int": _set("depthwise", "stride", 2),
    "dilation": _set("depthwise", "dilation", (2, 2)),
    "padding": _set("depthwise", "padding", (1, 2)),
    "padding_int": _set("depthwise", "padding", 1),
    "padding_word": _set("depthwise", "padding", "same"),
    "pointwise_stride": _set("pointwise", "stride", (2, 2)),
    "forward_of_one_object": _override_forward,
    "weight_is_no_parameter": _own_weight,
    "no_bias": _set("pointwise", "bias", None),
    "parametrization": lambda m: parametrize.register_parametrization(m.pointwise, "weight", Times()),
    "parametrized_bias": lambda m: parametrize.register_parametrization(m.pointwise, "bias", Times()),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.pointwise.eval()),
    "spectral_norm_hook": lambda m: nn.utils.spectral_norm(m.pointwise.eval()),
    "weight_norm": _double_weight_norm,
    "pruned": lambda m: prune.l1_unstructured(m.depthwise, "weight", 0.5),
    "pruned_for_good": lambda m: prune.remove(prune.l1_unstructured(m.depthwise, "weight", 0.5), "weight"),
    "forward_hook": lambda m: m.depthwise.register_forward_hook(lambda _m, _x, y: y + 1),
    "pre_hook": lambda m: m.pointwise.register_forward_pre_hook(lambda _m, x: (x[0] * 2,)),
}


# What prune.remove() does is a write to the weights by .data, for which a frozen layer wants freeze() again.
@pytest.mark.parametrize(
    ("name", "frozen"),
    [(name, f) for name in OBEYED for f in (False, True) if not (f and name == "pruned_for_good")],
)
@pytest.mark.filterwarnings(
    "ignore:.*spectral_norm:FutureWarning", "ignore:.*spectral_norm:DeprecationWarning"
)
def test_changed_children_are_obeyed(name, frozen):
    ours = layer(6, 6, 3)
    torch.manual_seed(0)
    theirs = HandWritten(6, 6)
    if frozen:
        ours.freeze()
    untouched = theirs(X)
    for module in (ours, theirs):
        torch.manual_seed(5)
        OBEYED[name](module)
    ours.eval()
    theirs.eval()
    expected = theirs(X)
    assert expected.shape != untouched.shape or not torch.allclose(expected, untouched)
    same(ours(X), expected)


@pytest.mark.parametrize("name", ["stride", "spectral_norm", "pruned", "forward_hook", "other_convolution"])
def test_layer_pads_before_a_child_it_has_to_call(name):
    """What nn.Conv2d cannot pad the layer pads, by the child's own stride and kernel."""
    ours = layer(6, 6, 3, padding=((1, 0), (2, 3)), activation="relu")
    torch.manual_seed(0)
    theirs = HandWritten(6, 6, pads=(2, 3, 1, 0), act="relu")
    for module in (ours, theirs):
        torch.manual_seed(5)
        OBEYED[name](module)
    same(ours.eval()(X), theirs.eval()(X))


def test_spectral_norm_in_training():
    """Each call steps the power iteration once, as it does with two convolutions."""
    ours, theirs = layer(6, 6, 3), HandWritten(6, 6)
    theirs.load_state_dict(ours.state_dict())
    for module in (ours, theirs):
        torch.manual_seed(5)
        parametrizations.spectral_norm(module.depthwise)
    for _ in range(3):
        y, z = ours(X), theirs(X)
        same(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
    same(*(m.depthwise.parametrizations.weight.original.grad for m in (ours, theirs)))


@pytest.mark.parametrize("child", ["depthwise", "pointwise"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_a_child_run(child, register):
    hooked, calls = layer(), []
    handle = getattr(getattr(hooked, child), register)(lambda *args: calls.append(args[0]))
    x = X.clone().requires_grad_()
    hooked(x).sum().backward()
    assert calls == [getattr(hooked, child)]
    handle.remove()
    hooked(x).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_hooks_of_all_modules_run(pre, backward):
    direction = "backward" if backward else "forward"
    full = "full_" if backward else ""
    register = getattr(nn.modules.module, f"register_module_{full}{direction}_{'pre_' * pre}hook")
    hooked, calls = layer(), []
    handle = register(lambda module, *_: calls.append(module))
    try:
        hooked(X.clone().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert {id(module) for module in calls} == {id(module) for module in hooked.modules()}


def test_pruned_to_an_odd_number_of_channels(native_calls):
    """What structured pruning leaves: fewer channels, all attributes in step."""
    pruned = layer(8, 9, 3, padding=1)
    for child, size in ((pruned.depthwise, 7), (pruned.pointwise, 5)):
        child.weight = nn.Parameter(child.weight[:size, :7].detach().clone())
    pruned.pointwise.bias = nn.Parameter(pruned.pointwise.bias[:5].detach().clone())
    pruned.depthwise.in_channels = pruned.depthwise.out_channels = pruned.depthwise.groups = 7
    pruned.pointwise.in_channels, pruned.pointwise.out_channels = 7, 5
    x = torch.randn(2, 7, 6, 6)
    with torch.no_grad():
        same(pruned(x), pruned._call_children(x))
    assert len(native_calls) == 1
    assert (pruned.in_channels, pruned.out_channels) == (7, 5)


def test_data_written_past_autograd_is_seen():
    """No cache of weights: what is written by .data counts in the next call."""
    plain = layer()
    before = plain(X)
    plain.pointwise.weight.data.mul_(2)
    plain.depthwise.weight.data = plain.depthwise.weight.data.flip(3)
    assert not torch.allclose(plain(X), before)
    same(plain(X), plain._call_children(X))
