"""benchmarks/gpu_check.sh and its measurements, as far as they run without a GPU."""

import itertools
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import BY_NAME
from commands import ROOT, run

from fastsep import _cuda_model, _plan
from fastsep._case import Case, format_case, parse_case
from fastsep._check import operands
from fastsep._cuda_paths import compose_in_place
from fastsep.bench.layers import distinct, load

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_exercise
import gpu_matrix
import gpu_report


@pytest.mark.slow
def test_a_dry_run_and_another(tmp_path):
    """The second has nothing left to do, and measures what was cut off in the middle."""
    result = run(f"benchmarks/gpu_check.sh --dry-run '{tmp_path}'")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert found["dry_run"]
    assert found["stages"].keys() == {
        *("build", "values", "behaviour", "compiled", "large", "matrix", "compare"),
        *(tools := ("memcheck", "racecheck", "synccheck", "initcheck")),
        *("hopper", "hopper_matrix", *(f"hopper_{tool}" for tool in tools)),
    }
    assert all(text.startswith("passed") for text in found["stages"].values())
    rows = found["rows"]
    assert {row["key"] for row in rows} == {cell.key for cell in gpu_matrix.cells(True)}
    assert not [row for row in rows if "error" in row]
    assert {group["phase"] for group in found["summary"]} == {
        *("forward", "training", "input-gradient", "weight-gradient")
    }
    forward = next(row for row in rows if row["phase"] == "forward")
    assert {"fastsep nhwc", "fastsep nchw", "torch nhwc", "torch nchw", "naive nchw"} <= set(
        forward["seconds"]
    )
    assert "naive nhwc" in next(row for row in rows if row["phase"] == "training")["seconds"]
    assert "addmm nhwc" in forward["seconds"]
    assert all(target["verdict"] == "not measured" for target in found["targets"])
    table = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert table.startswith("A dry run, ")
    assert "not 3 % slower than torch: " in table
    assert "forward, bfloat16, batch 128: mean speedup" in table

    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = "".join(lines[:-2]) + lines[-1][:40]
    (tmp_path / "rows.jsonl").write_text(cut, encoding="utf-8")
    (tmp_path / "matrix.stage").unlink()
    result = run(f"benchmarks/gpu_check.sh --dry-run '{tmp_path}'")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "== values: passed" in result.stdout
    assert ", before" in result.stdout
    again = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["rows"]
    assert again[: len(rows) - 2] == rows[:-2]
    assert {row["key"] for row in again} == {row["key"] for row in rows}


def test_wrong_arguments_are_refused(tmp_path):
    result = run("benchmarks/gpu_check.sh")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: ")


def test_neither_rich_nor_pybind11_is_needed_to_measure():
    """Of a machine without a network, what lies beside torch is all there is."""
    program = (
        "import sys; sys.path[:0] = ['benchmarks', 'tests']; "
        "sys.modules.update(dict.fromkeys(['rich', 'pybind11', 'expecttest'])); "
        "import conftest, gpu_matrix, test_cuda, test_cuda_torch, test_cuda_errors, test_cuda_hopper"
    )
    result = run(f'python -c "{program}"')
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    result = run(f"python benchmarks/gpu_matrix.py measure '{tmp_path / 'new'}'")
    assert result.returncode == 2
    assert "torch finds no GPU here" in result.stderr
    assert not (tmp_path / "new").exists()


def test_the_matrix_is_the_whole_one():
    cells = gpu_matrix.cells(False)
    assert len({cell.key for cell in cells}) == len(cells)
    layers = {cell.case.name for cell in cells if not cell.kind and cell.case.k}
    assert len(layers) == 9 + 6  # five of MobileNetV1's thirteen are the same
    measured = {(cell.case.n, cell.dtype, cell.phase) for cell in cells if not cell.kind and cell.case.k}
    assert len(measured) == 3 * 4 * 2
    assert {cell.case.dtype for cell in cells if cell.dtype == "tf32"} == {"float32"}
    assert (cells[0].case.n, cells[0].dtype, cells[0].phase) == (128, "bfloat16", "forward")
    first = [(c.case.n, c.dtype, bool(c.case.k)) for c in cells[: 15 * (2 * 2 + 2 * 2)]]
    assert set(first) == {
        *((128, "bfloat16", True), (1, "bfloat16", True), (128, "bfloat16", False), (128, "float32", False))
    }
    compiled = {(c.case.n, c.dtype, c.phase, c.kind) for c in cells if c.kind}
    assert len(compiled) == 3 * 4 * 2 * 2
    assert all(cell.kind for cell in cells[-15 * len(compiled) :])


@pytest.mark.parametrize(
    "name", ["both_biases", "stride_2_tf_same", "multiplier_3", "dilations_unequal", "gelu"]
)
def test_the_naive_contender_computes_the_same(name):
    case = BY_NAME[name]
    tensors = case.tensors()
    x, dw, pw, db, b = operands(tensors)
    geometry = (case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw)
    expected = compose_in_place((x, dw, pw, db, b), (*geometry, case.mid, case.act))
    torch.testing.assert_close(gpu_matrix.naive(case, x, tensors), expected, rtol=1e-4, atol=1e-4)


LINE = "name=block1 c=32 h=112 w=112 k=64 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu act=relu n=128"
BLOCK1 = parse_case(f"{LINE} dtype=bfloat16")
LAYERS = load("mobilenet_v1").layers


def row(case, phase, seconds, dtype="bfloat16", kind="", roof=1e-3):
    cell = gpu_matrix.Cell(case, dtype, phase, kind)
    return {
        "key": cell.key,
        "case": format_case(case),
        "dtype": dtype,
        "phase": phase,
        "bytes": 4e9,
        "operations": 1e9,
        "roof": roof,
        "seconds": {name: [s, s, s] for name, s in seconds.items()},
    }


def sized(case, batch=128, dtype="bfloat16"):
    return replace(case, n=batch, dtype=dtype)


def test_the_summary_compares_better_layouts_and_counts_layers_as_the_network_has_them():
    """block7 is five layers of MobileNetV1, and the sixth of others is apart from them."""
    times = {"fastsep nhwc": 2e-3, "fastsep nchw": 3e-3, "torch nhwc": 9e-3, "torch nchw": 4e-3}
    fast = {"fastsep nhwc": 1e-3, "torch nchw": 32e-3, "torch nhwc": 64e-3, "naive nhwc": 8e-3}
    rows = [
        row(sized(LAYERS[0]), "forward", times),
        row(sized(LAYERS[6]), "forward", fast),
        row(sized(LAYERS[0]), "forward", {"compile nhwc": 6e-3, "compile nchw": 8e-3}, kind="compile nhwc"),
        row(sized(load("gpu").layers[0]), "forward", times),
    ]
    ours, others = gpu_report.summary(rows)
    assert (ours["of"], ours["layers"], others["of"], others["layers"]) == ("mobilenet_v1", 6, "others", 1)
    assert ours["speedup"] == pytest.approx((2 * 32**5) ** (1 / 6))
    assert ours["slowest"] == pytest.approx(2)
    assert ours["over_naive"] == pytest.approx(8)
    assert ours["over_compile"] == pytest.approx(3)
    assert ours["speedup_in_graphs"] is None
    assert ours["share_of_roof"] == pytest.approx(0.5 ** (1 / 6))
    assert others["speedup"] == pytest.approx(2)
    assert others["terabytes_per_second"] == pytest.approx(2)


def test_nothing_measured_meets_no_target():
    assert [target.verdict for target in gpu_report.targets([])] == ["not measured"] * 6
    assert gpu_report.slower([]) == (0, [])


def test_targets_are_met_or_not():
    """Each is met by one of the made-up results and missed by the other."""

    def measured(factor):
        own = {"fastsep nhwc": 1e-3 / factor, "torch nhwc": 2e-3, "torch nchw": 3e-3}
        graphs = {"graph fastsep nhwc": 1e-3 / factor, "graph torch nchw": 2e-3}
        rows = []
        for case in distinct(LAYERS):
            rows += [
                row(sized(case), "forward", own, roof=0.7e-3),
                row(sized(case), "training", own),
                row(sized(case, 1), "forward", own | graphs),
            ]
            for dtype, phase in itertools.product(
                ("bfloat16", "float32"), ("input-gradient", "weight-gradient")
            ):
                rows.append(row(gpu_report.half(sized(case, dtype=dtype)), phase, own, dtype))
        return rows

    rows = measured(2.5)
    assert [target.verdict for target in gpu_report.targets(rows)] == ["met"] * 6
    assert gpu_report.targets(rows)[0].found == pytest.approx(5)
    assert gpu_report.slower(rows) == (27, [])
    slow = measured(0.5)
    assert [target.verdict for target in gpu_report.targets(slow)] == ["NOT MET"] * 6
    assert gpu_report.slower(slow)[0] == 27
    some = [r for r in rows if "block7" not in r["key"]]
    assert gpu_report.targets(some)[0].verdict == "met, on 8 of 13 layers"
    assert gpu_report.targets(some)[1].verdict == "met"


def test_what_is_three_percent_slower_than_torch_is_named():
    rows = [
        row(sized(LAYERS[0]), "forward", {"fastsep nchw": 1.02e-3, "torch nhwc": 1e-3, "torch nchw": 2e-3}),
        row(sized(LAYERS[1]), "forward", {"fastsep nchw": 1.04e-3, "torch nhwc": 1e-3, "torch nchw": 2e-3}),
        row(sized(LAYERS[2]), "training", {"fastsep nhwc": 2e-3, "torch nhwc": 1e-3, "torch nchw": 2e-3}),
        row(gpu_report.half(sized(LAYERS[0])), "weight-gradient", {"fastsep nhwc": 2e-3, "torch nhwc": 1e-3}),
    ]
    held, found = gpu_report.slower(rows)
    assert held == 3
    assert found == [
        (pytest.approx(2), "block3 batch 128 bfloat16 training"),
        (pytest.approx(1.04), "block2 batch 128 bfloat16 forward"),
    ]
    result = {
        "dry_run": False, "device": "a GPU", "versions": {"torch": "3"}, "commit": "abc",
        "stages": {"build": "passed, 1 s"},
        "hopper": [{"batch": 128, "dtype": "float16", "layers": 2, "gain": 1.25, "least": 1.125}],
        "targets": [target.as_json() for target in gpu_report.targets(rows)], "held_against_torch": held,
        "slower_than_torch": found, "summary": gpu_report.summary(rows),
        "rows": [*rows, {"key": "a", "error": "b"}],
    }  # fmt: skip
    text = gpu_report.text(result)
    assert "not 3 % slower than torch: NOT MET, 2 of 3 shapes are slower\n  2.00 times torch: block3" in text
    assert text.startswith("a GPU, torch 3, abc\n\nbuild: passed, 1 s\n\ntarget ")
    gains = (
        "hopper kernel, batch 128, float16, 2 layers: 1.25 times as fast as the portable one, at least 1.12"
    )
    assert text.endswith(f"{gains}\n\nfailed: a: b\n")


def test_the_hopper_kernel_is_compared_with_the_portable_one():
    rows = [
        row(BLOCK1, "forward", {"fused nhwc": 1e-3, "torch nhwc": 2e-3}),
        row(BLOCK1, "forward", {"fused nhwc": 2e-3, "hopper nhwc": 1e-3}, kind="hopper"),
        row(sized(LAYERS[1]), "forward", {"fused nhwc": 8e-3, "hopper nhwc": 1e-3}, kind="hopper"),
    ]
    (group,) = gpu_report.hopper_gains(rows)
    assert (group["batch"], group["dtype"], group["layers"]) == (128, "bfloat16", 2)
    assert (group["gain"], group["least"]) == (pytest.approx(4), pytest.approx(2))


def test_the_hopper_kernel_is_measured_where_the_gpu_has_it(monkeypatch):
    assert torch.cuda.is_available() or gpu_matrix.hopper_cells() == []
    module = SimpleNamespace(has_hopper_kernel=lambda problem, device: problem[8] == 1)
    monkeypatch.setattr(gpu_matrix._native, "cuda", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cells = gpu_matrix.hopper_cells()
    assert len({cell.key for cell in cells}) == len(cells)
    assert {(cell.case.sh, cell.case.layout, cell.kind) for cell in cells} == {(1, "nhwc", "hopper")}
    assert {(cell.case.n, cell.dtype) for cell in cells} == {
        (batch, dtype) for batch in (128, 1, 32) for dtype in ("bfloat16", "float16")
    }


def test_the_hopper_kernels_exercises_are_such_as_it_takes():
    for line in gpu_exercise.HOPPER_EXERCISES:
        case = parse_case(line)
        assert (case.kh, case.sh, case.c % 8, case.k % 8) == (3, 1, 0, 0)
        assert case.act in ("identity", "relu", "relu6", "leaky_relu")


def test_factors_are_those_that_the_planner_reads(monkeypatch):
    gpu = _cuda_model.Gpu("test", 100, 4e12, 6e13, 8e14)
    monkeypatch.setattr(_cuda_model.Gpu, "of", lambda device: gpu)
    rows = [
        row(BLOCK1, "forward", {"fused nhwc": 1e-3, "addmm nhwc": 3e-3, "torch nhwc": 2e-3}),
        row(BLOCK1, "training", {"fused nhwc": 4e-3}),
        row(BLOCK1, "forward", {"fused nhwc": 9e-3, "hopper nhwc": 5e-4}, kind="hopper"),
    ]
    found = gpu_report.factors(rows)
    assert list(found) == [
        "backward fused bfloat16 nhwc",
        "forward addmm bfloat16 nhwc",
        "forward fused bfloat16 nhwc",
        "forward hopper bfloat16 nhwc",
        "forward torch bfloat16 nhwc",
    ]
    problem = replace(BLOCK1, layout="nhwc").problem
    monkeypatch.setattr(_plan, "factors", lambda: {"test": found})
    for phase, path, seconds in (
        ("forward", "fused", 1e-3),
        ("forward", "addmm", 3e-3),
        ("forward", "hopper", 5e-4),
        ("forward", "torch", 2e-3),
        ("backward", "fused", 3e-3),
    ):
        assert _plan.predicted(problem, phase, path, gpu, False) == pytest.approx(seconds, rel=1e-3)


def test_every_tiling_and_every_laid_out_kernel_is_exercised():
    cases = [case for _, case in gpu_exercise.exercises()]
    laid_out = {(c.kh, c.sh, c.dh) for c in cases if c.kh == c.kw and c.sh == c.sw and c.m == 1}
    assert {(3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 1), (7, 1, 1), (3, 1, 2)} <= laid_out
    counts = [count for count, _ in gpu_exercise.exercises() if count]
    assert len(counts) == 8
    assert set(counts) == {1, 2, 100}


def test_a_graph_is_captured_of_what_a_call_does_as_a_whole(monkeypatch):
    """The forward pass whose gradients are taken alone ran on a stream of its own."""
    captured = []

    class Graph(gpu_matrix.Local):
        def __init__(self, run):
            super().__init__(run)
            captured.append(run)

    monkeypatch.setattr(gpu_matrix, "FromGraph", Graph)
    monkeypatch.setattr(gpu_matrix, "OnGpu", gpu_matrix.Local)
    monkeypatch.setattr(gpu_matrix.contenders, "OnGpu", gpu_matrix.Local)
    tiny = replace(BLOCK1, n=1, c=8, h=9, w=9, k=8, dtype="float32")
    real = gpu_matrix.Task
    monkeypatch.setattr(
        gpu_matrix, "Task", lambda case, phase, device, *rest: real(case, phase, "cpu", *rest)
    )
    tensors = Case.tensors
    monkeypatch.setattr(Case, "tensors", lambda self, device="": tensors(self))
    for phase, count in (("forward", 4), ("training", 4), ("input-gradient", 0), ("weight-gradient", 0)):
        captured.clear()
        with ExitStack() as stack:
            made, remarks = gpu_matrix.subjects_of(gpu_matrix.Cell(tiny, "float32", phase), "cuda", stack)
        assert not remarks
        assert len(captured) == count
        assert len([name for name in made if name.startswith("graph ")]) == count


@pytest.mark.parametrize("first", ["one", "two"])
def test_tests_go_on_behind_what_has_passed(tmp_path, monkeypatch, first):
    (tmp_path / "test_some.py").write_text("def test_one(): pass\n\n\ndef test_two(): pass\n")
    command = f"python {ROOT}/benchmarks/gpu_tests.py {tmp_path}/passed"
    result = run(f"{command} {tmp_path}/test_some.py -k {first}")
    assert (result.returncode, "1 passed" in result.stdout) == (0, True)
    result = run(f"{command} {tmp_path}/test_some.py")
    assert "1 passed, 1 deselected" in result.stdout
    result = run(f"{command} {tmp_path}/test_some.py")
    assert (result.returncode, "all 2 passed before" in result.stdout) == (0, True)
    (tmp_path / "test_some.py").write_text("def test_three(): assert False\n")
    for _ in range(2):
        assert run(f"{command} {tmp_path}/test_some.py").returncode == 1
