"""What is compared: the files of layers, the contenders, reports, plots and the suite of pytest-benchmark."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from reports import report

from fastsep import _native
from fastsep.__main__ import main
from fastsep._case import parse_case
from fastsep.bench import contenders, layers, machine, networks, peers
from fastsep.bench import task as task_module
from fastsep.bench.machine import Load, Roof
from fastsep.bench.report import FORMAT, Report, write_whole

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")
SMALL = "c=8 h=14 w=15 k=16 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu act=silu"


def test_report():
    made = report()
    assert made.contenders == ["fastsep", "unfrozen", "torch", "onnxruntime"]
    assert made.rows[0].torch_layout == "nchw"
    assert made.total("torch") == 8
    assert made.total("unfrozen") == 4
    assert made.total("ncnn") is None
    assert made.mean_speedup() == pytest.approx(4)
    assert made.mean_speedup("onnxruntime") == pytest.approx(3)
    assert made.share_of_peak == pytest.approx(0.5)
    # The second row's roof is memory's: 80 bytes at 100 a second.
    assert made.share_of_roof == pytest.approx((0.5 + 0.8) / 2)
    assert made.warnings == []


def test_roof():
    roof = Roof(operations=10.0, bytes=2.0)
    assert roof.seconds(100, 1) == 10
    assert roof.seconds(10, 8) == 4


def test_report_as_json():
    made = report()
    values = json.loads(json.dumps(made.to_json()))
    assert values["format"] == FORMAT
    assert Report.from_json(values) == made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": []}, "format 1, this version reads format 3"),
        ({"format": 2, "rows": []}, "format 2, this version reads format 3"),
        ({"network": "x"}, "is no result"),
        ([1], "is no result"),
    ],
)
def test_what_is_no_report(values, message):
    with pytest.raises(ValueError, match=message):
        Report.from_json(values)


def test_report_as_csv():
    rows = list(csv.DictReader(io.StringIO(report().to_csv())))
    assert [(row["layer"], row["contender"]) for row in rows[:2]] == [("one", "fastsep"), ("one", "unfrozen")]
    assert len(rows) == 2 * 5
    assert float(rows[0]["gflops_per_s"]) == pytest.approx(200e-9)
    assert float(rows[5]["share_of_roof"]) == pytest.approx(0.8)
    assert {float(row["gbytes_per_s"]) for row in rows if row["contender"] == "fastsep"} == {
        80e-9
    }  # warm, too
    whole = replace(report().rows[0], line="", bytes=0)
    (row, *_) = csv.DictReader(io.StringIO(report(whole=True, rows=[whole]).to_csv()))
    assert row["gbytes_per_s"] == ""
    assert parse_case(rows[0]["case"]).c == 4


def test_warnings_name_the_worst():
    assert report(spread=0.05).warnings == []
    (warning,) = report(spread=0.2).warnings
    assert "one: fastsep varies by 20%" in warning
    assert "and 5 more" in warning
    (warning,) = report(cores=2.0).warnings
    assert "kept 2.0 cores busy instead of 1" in warning


@needs_native
def test_others_at_work_are_noticed():
    busy = "import time; end = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", busy])
    try:
        time.sleep(0.2)
        with Load() as load:
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
    if not os.path.exists("/proc/stat"):
        assert load.others == 0
    else:
        assert load.others > 0.3
        assert "other programs kept" in load.doubts[0]


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the system does not tell")
def test_own_work_is_not_taken_for_that_of_others():
    """A second of it, in this process and in a child that ends meanwhile, beside what others do."""
    busy = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass"
    shares = []
    for _ in range(3):  # others may begin to work meanwhile
        with Load() as idle:
            time.sleep(0.5)
        with Load() as load:
            exec(busy.format(0.5))
            subprocess.run([sys.executable, "-c", busy.format(0.5)], check=True)
        shares.append(load.others - idle.others)
    assert min(shares) < 0.3


def test_the_last_level_cache_is_plausible():
    assert 64 << 10 <= machine.last_level_cache() <= 4 << 30


def test_threads_are_fixed_and_given_back(threads):
    before = torch.get_num_threads()
    with machine.fixed_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="2 threads in the end, not 1"), machine.fixed_threads(1):
        torch.set_num_threads(2)


def test_layers_of_mobilenet_v1():
    network = layers.load("mobilenet_v1")
    assert len(network.layers) == 13
    # Of the 569 million multiply-adds that the paper counts, what is left without first layer and classifier.
    assert sum(map(layers.operations, network.layers)) / 2 == pytest.approx(557e6, rel=0.01)
    for before, after in zip(network.layers, network.layers[1:], strict=False):
        assert (before.k, before.oh, before.ow) == (after.c, after.h, after.w)
    assert len(layers.distinct(network.layers)) == 9
    assert {(case.kh, case.sh, case.dh, case.m) for case in layers.load("other").layers} == {
        *((5, 1, 1, 1), (7, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 1), (3, 1, 1, 2))
    }


def test_every_file_of_layers_parses():
    assert {"convnext_tiny", "deeplab", "efficientnet_b0", "mobilenet_v3_large", "xception_71"} <= set(
        layers.names()
    )
    for name in layers.names():
        found = layers.load(name).layers
        assert len({case.name for case in found}) == len(found) > 0, name
        assert all(min(case.oh, case.ow) > 0 for case in found), name


def test_operations():
    case = parse_case("n=2 c=3 h=5 w=4 k=7 kh=3 kw=2 m=2")
    assert layers.operations(case) == 2 * 2 * 3 * 3 * 6 * (6 + 7)
    assert layers.backward_operations(case) == 2 * 2 * 3 * 3 * 6 * (18 + 14)
    # Three times the forward pass, and the depthwise half again.
    assert layers.phase_operations(case, "training") == 2 * 2 * 3 * 3 * 6 * (4 * 6 + 3 * 7)
    alone = parse_case("c=3 h=5 w=4 k=0 kh=3 kw=2")
    assert layers.phase_operations(alone, "weight-gradient") == layers.operations(alone)
    assert layers.phase_operations(alone, "training") == 3 * layers.operations(alone)


def test_traffic():
    case = parse_case("n=2 c=3 h=5 w=4 k=7 kh=3 kw=2 b=1 dtype=float64")
    assert layers.sizes(case) == (8 * 2 * 3 * 5 * 4, 8 * 2 * 7 * 3 * 3, 8 * (3 * 6 + 3 * 7 + 7))
    assert layers.traffic(case, "forward") == sum(layers.sizes(case))


def test_files_that_are_no_networks(tmp_path):
    with pytest.raises(ValueError, match=r"must be one of .*mobilenet_v1.*, a file of layers or a layer"):
        layers.load("vgg")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no layers"):
        layers.load(str(tmp_path / "empty.txt"))


@needs_native
@pytest.mark.parametrize("phase", layers.PHASES)
@pytest.mark.parametrize(
    "line", [SMALL, "c=8 h=14 w=15 k=0 kh=5 kw=5 sh=2 sw=2 pt=2 pb=2 pl=2 pr=2 db=1 mid=tanh"]
)
def test_contenders_agree(line, phase):
    case = parse_case(f"{line} layout=nhwc")
    task = contenders.Task.of(case, phase, "cpu", 1)
    with contenders.context(phase), ExitStack() as stack:
        subjects = contenders.build(task, ["torch", "naive"], stack)
        contenders.verify(task, subjects)
        expected = {"fastsep", "torch nchw", "torch nhwc"}
        expected |= {"naive"} if phase in ("forward", "training") else set()
        expected |= {"unfrozen"} if phase == "forward" and case.k else set()
        assert set(subjects) == expected
        sizes = {
            "forward": 1,
            "training": 5 if case.k else 3,
            "input-gradient": 1,
            "weight-gradient": 4 if case.k else 2,
        }
        assert all(len(subject.outputs()) == sizes[phase] for subject in subjects.values())
        assert all(subject.contender.sample(2).seconds > 0 for subject in subjects.values())


@needs_native
@pytest.mark.parametrize("phase", ["forward", "training"])
def test_contenders_that_disagree_are_found(phase, monkeypatch):
    two_convolutions = contenders.two_convolutions

    def slightly_off(case, *weights, phase):
        call = two_convolutions(case, *weights, phase=phase)
        return (lambda x: call(x) * 1.01) if case.layout == "nhwc" and case.mid != "identity" else call

    monkeypatch.setattr(contenders, "two_convolutions", slightly_off)
    task = contenders.Task.of(parse_case(SMALL), phase, "cpu", 1)
    with contenders.context(phase), ExitStack() as stack:
        subjects = contenders.build(task, [], stack)
        with pytest.raises(ArithmeticError, match="torch nhwc differs from torch by"):
            contenders.verify(task, subjects)


def test_the_naive_reference_takes_part_up_to_a_size():
    small, large = parse_case(SMALL), replace(parse_case(SMALL), h=140, w=150, k=512)
    assert contenders.unavailable("naive", small, "training", "cpu") == ""
    assert "million operations" in contenders.unavailable("naive", large, "forward", "cpu")
    between = replace(small, h=100, w=100, c=32, k=64)  # its training takes more than three times as much
    assert contenders.unavailable("naive", between, "forward", "cpu") == ""
    assert "million operations" in contenders.unavailable("naive", between, "training", "cpu")
    assert "in training" in contenders.unavailable("naive", small, "weight-gradient", "cpu")
    assert "on the CPU" in contenders.unavailable("naive", small, "training", "cuda")


@needs_native
def test_torch_compile_takes_part():
    task = contenders.Task.of(parse_case(SMALL), "forward", "cpu", 1)
    with contenders.context("forward"), ExitStack() as stack:
        subjects = contenders.build(task, ["compile"], stack)
        contenders.verify(task, subjects)
    assert "compile" in subjects


def test_inputs_rotate_where_a_network_finds_them_cold(monkeypatch):
    monkeypatch.setattr(task_module, "last_level_cache", lambda device: 64 << 10)
    task = contenders.Task.of(parse_case("c=8 h=32 w=32 k=8 kh=3 kw=3"), "forward", "cpu", 1)
    assert task.is_cold  # 32 KB in, 28 KB out
    assert task.copies == 2 * (64 << 10) // (32 << 10) + 1
    seen = []
    turn, outputs = contenders._phase(task, lambda x: seen.append(x.data_ptr()) or x, [], "nchw")
    outputs()
    for _ in range(2 * task.copies):
        turn()
    assert len(set(seen)) == task.copies
    assert seen[1 : 1 + task.copies] == seen[1 + task.copies :]
    monkeypatch.setattr(task_module, "last_level_cache", lambda device: 1 << 20)
    assert task.copies == 1


@pytest.mark.parametrize("runtime", peers.RUNTIMES)
def test_runtimes(runtime):
    """A layer in each runtime that is installed, in a process of its own."""
    if peers.missing(runtime):
        pytest.skip(peers.missing(runtime))
    task = contenders.Task.of(parse_case(SMALL), "forward", "cpu", 1)
    with contenders.context("forward"), ExitStack() as stack:
        subjects = contenders.build(task, [runtime], stack)
        contenders.verify(task, subjects)
        assert subjects[runtime].contender.pool == runtime
        assert subjects[runtime].contender.sample(3).seconds > 0


def test_a_runtime_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda name: None)
    assert peers.missing("ncnn") == 'ncnn needs ncnn, pnnx, which is not installed: pip install ".[peers]"'
    assert "not installed" in contenders.unavailable("ncnn", parse_case(SMALL), "forward", "cpu")


WORKERS = {
    "dies at once": ("raise SystemExit('no model here')", "ended with status 1: no model here"),
    "dies when asked": (
        "print('{}', flush=True); input(); raise SystemExit('out of memory')",
        "ended with status 1: out of memory",
    ),
    "closes its output": (
        "import os, sys, time; os.close(1); print('bye', file=sys.stderr, flush=True); time.sleep(60)",
        "ended with status -9: bye",
    ),
    "sleeps": ("import time; time.sleep(60)", "gave no answer in 2 seconds: it said nothing"),
    "sleeps when asked": (
        "import time; print('{}', flush=True); input(); time.sleep(60)",
        "gave no answer in 2 seconds: it said nothing",
    ),
}


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_that_does_not_answer(worker, tmp_path, monkeypatch):
    program, message = WORKERS[worker]
    (tmp_path / "worker.py").write_text(program)
    monkeypatch.setattr(peers, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(peers, "EXPORTERS", {"ncnn": lambda module, x, folder: folder})
    monkeypatch.setattr(peers, "DEADLINE", 2.0)
    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", lambda self, timeout=None: wait(self, timeout and 1))
    begin = time.monotonic()
    remote = peers.Remote("ncnn", torch.nn.Identity(), torch.zeros(1), threads=1)
    with pytest.raises(RuntimeError) as error, remote:
        remote.sample(1)
    assert str(error.value) == f"ncnn {message}"
    assert time.monotonic() - begin < 30
    assert remote._process.poll() is not None


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        ("subprocess.run(['sh', '-c', 'echo shape >&2; echo no such layer >&2; exit 3'], check=True, "
         "capture_output=True)", "no such layer"),
        ("subprocess.run(['false'], check=True, capture_output=True)", "CalledProcessError"),
        ("torch.ones(2).view(3)", "shape '[3]' is invalid for input of size 2"),
        ("{}['opset']", "'opset'"),
    ],
)  # fmt: skip
def test_a_model_that_a_runtime_does_not_take(exported, message, monkeypatch, capsys):
    monkeypatch.setattr(peers, "missing", lambda runtime: "")
    monkeypatch.setattr(peers, "EXPORTERS", {"ncnn": lambda *_: eval(exported)})
    assert main(["bench", "--layer", SMALL, "--against", "ncnn", "--seconds", "0"]) == 1
    assert capsys.readouterr().err.strip() == f"fastsep: ncnn does not take the model: {message}"


def test_on_a_gpu_fastsep_takes_no_part_in_whole_networks():
    assert networks.unavailable("fastsep", 1, "cpu") == ""
    assert "optimize() fuses nothing" in networks.unavailable("fastsep", 1, "cuda")


@pytest.mark.parametrize("name", networks.SOURCES)
def test_whole_networks(name):
    """The same operations as the papers count, two a multiply-add, and folding changes nothing."""
    network, size = networks.build(name)
    assert size == (3, 224, 224)
    x = torch.randn(1, 3, networks.SIZE, networks.SIZE)
    assert networks.operations(network, x) == pytest.approx(
        2 * {"mobilenet_v1": 569e6, "mobilenet_v2": 300e6}[name], rel=0.01
    )
    with torch.inference_mode(), ExitStack() as stack:
        subjects, _ = networks.subjects(network, x, [], 1, "cpu", stack)
        networks.verify(subjects)
        assert {"torch nchw", "torch nhwc", "eager"} <= set(subjects)
        wrong = replace(subjects["eager"], outputs=lambda: [torch.zeros(1, 1000)])
        with pytest.raises(ArithmeticError, match="eager differs from torch"):
            networks.verify(subjects | {"eager": wrong})


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("before")

    def full(source, target):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
