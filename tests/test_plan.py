"""Which path a call on a GPU takes. Nothing here needs one: GPUs, clocks and calls are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, half
from commands import ROOT

from fastsep import _cuda_model, _plan
from fastsep._cuda_model import BACKWARD, DEPTHWISE, FORWARD, FUSED, PATHS, TORCH, Asked, Gpu
from fastsep.bench.layers import load

# In round numbers.
GPU = Gpu("test", multiprocessors=100, bandwidth=4e12, fma=6e13, matrix=8e14)
LAYER = replace(load("mobilenet_v1").layers[2], n=32, dtype="bfloat16", layout="nhwc")
WHOLE = dict.fromkeys((FUSED, DEPTHWISE, TORCH), lambda: None)
EVERY = dict.fromkeys(PATHS, lambda: None)
HALF = dict.fromkeys((DEPTHWISE, TORCH), lambda: None)


class CurrentDevice:
    """torch.cuda.device, where there is none."""

    now = 0

    def __init__(self, index):
        self.index = index

    def __enter__(self):
        self.before, CurrentDevice.now = CurrentDevice.now, self.index

    def __exit__(self, *_):
        CurrentDevice.now = self.before


@pytest.fixture(autouse=True)
def _unplanned(monkeypatch):
    monkeypatch.setattr(_plan, "_choices", {})
    monkeypatch.setattr(_plan, "calls", {})
    monkeypatch.setattr(torch.cuda, "device", CurrentDevice)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def choose(
    problem=LAYER.problem,
    phase=FORWARD,
    *,
    times=None,
    candidates=WHOLE,
    gpu=GPU,
    device=0,
    tf32=False,
    asked=Asked(),  # noqa: B008
):
    return _plan.choose(
        *(problem, phase, tf32, asked, device, candidates),
        gpu_of=lambda index: gpu,
        seconds_of=lambda found: dict(times) if times else pytest.fail("was measured"),
    )


@pytest.mark.parametrize("phase", [FORWARD, BACKWARD])
@pytest.mark.parametrize("case", [case for case in CASES if case.n], ids=lambda case: case.name)
def test_every_case_has_a_time_on_every_path(case, phase):
    for dtype in ("float32", "float16", "bfloat16"):
        for part, paths in ((case, EVERY), (replace(case, k=0, b=0, act="identity"), HALF)):
            problem = replace(part, dtype=dtype).problem
            for path in paths:
                assert 0 < _cuda_model.modelled(problem, phase, path, GPU, False) < 1


def test_a_model_counts_each_byte_once():
    """By hand: the fused forward pass reads x and the weights and writes y, in one launch."""
    (step,) = _cuda_model.steps(LAYER.problem, FORWARD, FUSED)
    pixels = 32 * 56 * 56
    assert step.bytes == 2 * (2 * pixels * 128 + 128 * (9 + 128))
    assert (step.fma, step.matrix) == (2 * pixels * 128 * 9, 2 * pixels * 128 * 128)
    # torch: x to u; its bias and activation, both in place; u to y; the same again.
    torch_bytes = sum(step.bytes for step in _cuda_model.steps(LAYER.problem, FORWARD, TORCH))
    assert torch_bytes == 2 * (12 * pixels * 128 + 2 * 128 * (9 + 128))
    bare = _cuda_model.steps(LAYER.problem, FORWARD, TORCH, Asked(depthwise_bias=False, bias=False))
    assert sum(step.bytes for step in bare) == torch_bytes - 2 * 4 * pixels * 128


NAMES = ("input", "depthwise_weight", "pointwise_weight", "depthwise_bias", "bias")


def test_the_model_has_a_step_for_each_kernel_that_is_launched():
    """As the tests of the kernels on the host count them."""
    text = (ROOT / "tests" / "cuda_launches.txt").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    held = set()
    for case in (part(case) for case in CASES if case.n for part in (lambda case: case, half)):
        for kind, mid, gradients, count in lines:
            if (kind, mid) == ("pair" if case.k else "half", "flat" if case.mid == "identity" else "mid"):
                needed = tuple(name in gradients.split("+") for name in NAMES)
                launches = _cuda_model.own_backward(case.problem, needed)
                assert len(launches) == int(count), f"{case.name}, gradients of {gradients}"
                held.add((kind, mid, gradients))
    assert len(held) == len(lines) == 20


def test_the_model_counts_what_the_backward_pass_moves():
    """By hand, in passes over x, u and y, which are of one size; weights are little, their parts are not."""
    size = 2 * 32 * 56 * 56 * 128
    needed = (True,) * 5
    launches = _cuda_model.own_backward(LAYER.problem, needed)
    # dv, which is two tensors, for each of two products; x for z and for the weights, and dx; z written and
    # read twice, dt written, read for dx and for the weights.
    parts = 4 * _cuda_model._weight_parts(LAYER.problem) * 128 * (128 + 1)
    passes = 4 + 3 + 6
    assert sum(step.bytes for step in launches) == pytest.approx(passes * size + 2 * parts, rel=1e-3)
    assert sum(step.matrix for step in launches) == 2 * 2 * 32 * 56 * 56 * 128 * 128
    again = _cuda_model.steps(LAYER.problem, BACKWARD, FUSED, Asked(saved=False))
    assert [step.kind for step in again[:2]] == ["fused", "depthwise"]
    assert again[1:] == _cuda_model.steps(LAYER.problem, BACKWARD, FUSED)


@pytest.mark.skipif(find_spec("fastsep._cuda") is None, reason="the module _cuda was not built")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", load("mobilenet_v1").layers, ids=lambda case: case.name)
def test_the_model_knows_the_partial_sums(case, layout):
    """They are what the workspace has beside u."""
    from fastsep import _cuda

    for dtype in ("float32", "bfloat16"):
        sized = replace(case, n=32, dtype=dtype, layout=layout)
        workspace = _cuda.backward_workspace_bytes(sized.problem, False, 0, 0, 0, 1, 0)
        # Each has room for the bias, too; both are rounded to 256 bytes.
        parts = 4 * _cuda_model._weight_parts(sized.problem) * case.k * (case.c + 1)
        assert parts <= workspace - _cuda_model.sizes(sized.problem).u <= parts + 2 * 255


def test_a_product_that_adds_the_bias_saves_a_pass():
    passes = {path: len(_cuda_model.steps(LAYER.problem, FORWARD, path)) for path in PATHS}
    assert passes == {
        "fused": 1,
        "hopper": 1,
        "depthwise": 4,
        "addmm": 3,
        "addmm_relu": 2,
        "cudnn_relu": 2,
        "torch": 6,
    }
    assert choose(candidates={path: None for path in PATHS if path != FUSED}).path == "addmm_relu"


def test_the_depthwise_half_is_computed_again_for_more_output_channels():
    (narrow,) = _cuda_model.steps(LAYER.problem, FORWARD, FUSED)
    (wide,) = _cuda_model.steps(replace(LAYER, k=512).problem, FORWARD, FUSED)
    assert wide.fma == 4 * narrow.fma


def test_uneven_padding_costs_torch_a_copy():
    uneven = replace(LAYER, pt=0, pb=2).problem
    paths = {path: len(_cuda_model.steps(uneven, FORWARD, path)) for path in WHOLE}
    even = {path: len(_cuda_model.steps(LAYER.problem, FORWARD, path)) for path in WHOLE}
    assert paths == even | {TORCH: even[TORCH] + 1}


@pytest.mark.parametrize("case", load("mobilenet_v1").layers[:6], ids=lambda case: case.name)
def test_layers_bound_by_memory_are_fused(case):
    problem = replace(case, n=128, dtype="bfloat16", layout="nhwc").problem
    assert choose(problem, FORWARD).path == FUSED
    assert choose(problem, BACKWARD).path != TORCH


def test_small_layers_are_fused_for_their_launches():
    choice = choose(replace(LAYER, n=1, h=7, w=7).problem)
    assert choice.path == FUSED
    assert choice.why.startswith("by the model: fused ")
    assert not choice.measured


def test_much_recomputation_is_not_fused():
    """31 x 31 taps for 4096 output channels: 32 times the depthwise half is more than a pass over memory."""
    large = replace(LAYER, k=4096, kh=31, kw=31, pt=15, pb=15, pl=15, pr=15)
    assert choose(large.problem).path == DEPTHWISE


def test_a_measured_factor_corrects_the_model(monkeypatch):
    key = _plan.factor_key(LAYER.problem, FORWARD, FUSED, False)
    assert key == "forward fused bfloat16 nhwc"
    monkeypatch.setattr(_plan, "factors", lambda: {"test": {key: 100.0}})
    assert choose().path != FUSED
    assert choose(gpu=replace(GPU, name="another"), device=1).path == FUSED


def test_tf32_has_factors_of_its_own():
    problem = replace(LAYER, dtype="float32", layout="nchw").problem
    assert _plan.factor_key(problem, FORWARD, TORCH, True) == "forward torch tf32 nchw"
    assert _plan.factor_key(problem, FORWARD, TORCH, False) == "forward torch float32 nchw"
    exact, rounded = (_cuda_model.modelled(problem, FORWARD, FUSED, GPU, tf32) for tf32 in (False, True))
    assert rounded < exact


def test_the_shipped_factors_are_measured_ones():
    """Each names a path that there is, of a GPU whose result is in benchmarks/results."""
    for name, found in _plan.factors().items():
        assert name.startswith("NVIDIA ")
        for key, factor in found.items():
            phase, path, dtype, layout = key.split()
            assert phase in (FORWARD, BACKWARD)
            assert path in PATHS
            assert dtype in ("float32", "tf32", "float16", "bfloat16")
            assert layout in ("nchw", "nhwc")
            assert 0.01 < factor < 100


def test_with_cudnn_benchmark_the_fastest_is_taken_and_remembered(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    choice = choose(times={FUSED: 3e-6, DEPTHWISE: 2e-6, TORCH: 9e-6})
    assert choice == (DEPTHWISE, "measured: fused 3.0 us, depthwise 2.0 us, torch 9.0 us", True)
    assert choose() is choice  # and not measured again
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert choose() is choice
    assert choose(device=1).measured is False


def test_of_equals_the_fused_one_is_taken(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert choose(times={FUSED: 2e-6, DEPTHWISE: 2e-6, TORCH: 2e-6}).path == FUSED


def test_what_the_model_chose_is_measured_once_that_is_allowed(monkeypatch):
    assert not choose().measured
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert choose(times={FUSED: 3e-6, DEPTHWISE: 2e-6, TORCH: 1e-6}).path == TORCH


@pytest.mark.parametrize("why", ["a graph", "cuDNN", "torch"])
def test_nothing_is_measured_where_it_must_not(monkeypatch, why):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    if why == "a graph":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif why == "cuDNN":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not choose().measured
    assert not choose().measured  # nor the second time, when something is remembered


def test_problems_phases_and_devices_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    slow_fused = {FUSED: 3e-6, DEPTHWISE: 2e-6, TORCH: 1e-6}
    assert choose(times=slow_fused).path == TORCH
    for other in (
        {"phase": BACKWARD},
        {"device": 1},
        {"tf32": True},
        {"problem": replace(LAYER, n=2).problem},
    ):
        assert choose(**other, times={FUSED: 1e-6, DEPTHWISE: 2e-6, TORCH: 3e-6}).path == FUSED
    assert choose().path == TORCH


def test_paths_are_timed_where_their_tensors_are(monkeypatch):
    """And whether a graph is captured is asked of that device, too."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    asked, timed = [], []
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: asked.append(CurrentDevice.now) or False
    )

    def seconds_of(candidates):
        timed.append(CurrentDevice.now)
        return dict.fromkeys(candidates, 1e-6)

    given = LAYER.problem, FORWARD, False, Asked()
    assert _plan.choose(*given, 1, WHOLE, lambda index: GPU, seconds_of).measured
    assert (asked, timed, CurrentDevice.now) == ([1], [1], 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: CurrentDevice.now == 2)
    assert not _plan.choose(*given, 2, WHOLE, lambda index: GPU, seconds_of).measured
    assert _plan.choose(*given, 3, WHOLE, lambda index: GPU, seconds_of).measured
    assert timed == [1, 3]


def test_a_path_that_is_no_longer_there_is_not_taken():
    """Such as a product in TensorFloat-32, once torch was told not to."""
    slow_fused = {FUSED: 9e-6, DEPTHWISE: 2e-6, "addmm": 1e-6}
    torch.backends.cudnn.benchmark = True  # which the fixture gives back
    assert choose(times=slow_fused, candidates=EVERY).path == "addmm"
    assert choose(times={FUSED: 9e-6, DEPTHWISE: 2e-6}).path == DEPTHWISE


def test_what_is_kept_is_as_good_as_the_choice(monkeypatch):
    paths = {FUSED: "run"}
    _plan.keep(("a",), _plan.Choice(FUSED, "", measured=False), paths)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    _plan.keep(("c",), _plan.Choice(FUSED, "", measured=False), paths)
    _plan.keep(("d",), _plan.Choice(FUSED, "", measured=True), paths)
    assert _plan.calls == {("a",): "run", ("d",): "run"}
    _plan.forget()
    assert _plan.calls == {}


def test_a_path_can_be_forced():
    with _plan.force(TORCH):
        assert choose() == (TORCH, "forced", True)
        with _plan.force(FUSED):
            assert choose(candidates=HALF).path in HALF  # which has no such path
    assert choose().why != "forced"


def test_what_is_remembered_has_an_end(monkeypatch):
    monkeypatch.setattr(_plan, "_MOST_CHOICES", 8)
    for n in range(1, 30):
        choose(replace(LAYER, n=n).problem)
        assert len(_plan._choices) <= 8


def clock_of(seconds):
    """A clock for calls that return the path's name; counts them."""
    counts = {}

    def clock(run, calls):
        name = run()
        counts[name] = counts.get(name, 0) + calls
        return calls * (seconds[name] + 1e-3 / counts[name])  # the first are slow

    return clock, counts


def test_measuring_takes_the_best_of_rounds_in_turn():
    clock, counts = clock_of({FUSED: 3e-6, TORCH: 5e-6})
    times = _plan.measure({path: lambda path=path: path for path in (FUSED, TORCH)}, clock)
    assert list(times) == [FUSED, TORCH]
    assert times[TORCH] - times[FUSED] == pytest.approx(2e-6)
    assert set(counts.values()) == {1 + _plan.ROUNDS * _plan.CALLS}


def test_a_path_without_memory_is_left_out():
    def no_memory():
        raise torch.OutOfMemoryError("none left")

    clock = lambda run, calls: (run(), calls * 1e-6)[1]  # noqa: E731
    assert list(_plan.measure({FUSED: no_memory, TORCH: lambda: None}, clock)) == [TORCH]
    with pytest.raises(torch.OutOfMemoryError):
        _plan.measure({FUSED: no_memory, TORCH: no_memory}, clock)


def test_a_gpu_is_described_by_its_driver():
    found = Gpu.from_properties(
        SimpleNamespace(
            name="NVIDIA A100-SXM4-40GB",
            major=8,
            minor=0,
            multi_processor_count=108,
            clock_rate=1_410_000,
            memory_clock_rate=1_215_000,
            memory_bus_width=5120,
        )
    )
    assert found.bandwidth == pytest.approx(1555e9, rel=0.01)  # what its data sheet says
    assert found.fma == pytest.approx(19.5e12, rel=0.01)
    assert found.matrix == pytest.approx(312e12, rel=0.01)


@pytest.mark.parametrize("capability", [(8, 6), (8, 7), (9, 0), (12, 1), (15, 0)])
def test_a_gpu_of_few_words_is_described_all_the_same(capability):
    major, minor = capability
    found = Gpu.from_properties(
        SimpleNamespace(name="new", major=major, minor=minor, multi_processor_count=60)
    )
    assert 1e11 < found.bandwidth < 1e13
    assert 1e12 < found.fma < found.matrix < 1e16


def test_the_table_of_factors_is_whole():
    path = _plan.Path(_plan.__file__).with_name("cuda_factors.json")
    assert json.loads(path.read_text(encoding="utf-8")).keys() == {"about", "gpus"}
