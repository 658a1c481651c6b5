"""benchmarks/gpu_check.sh and its measurements, as far as they run without a GPU."""

import json
import sys

import pytest
import torch
from cases import BY_NAME
from commands import ROOT, run

from fastsep import _plan
from fastsep._check import operands

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_matrix


@pytest.mark.slow
def test_a_dry_run_and_another(tmp_path):
    """The second has nothing left to do, and measures what was cut off in the middle."""
    result = run(f"benchmarks/gpu_check.sh --dry-run '{tmp_path}'")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert found["dry_run"]
    assert found["stages"].keys() == {
        *("build", "tests", "memcheck", "racecheck", "synccheck", "initcheck", "matrix")
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

    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = "".join(lines[:-2]) + lines[-1][:40]
    (tmp_path / "rows.jsonl").write_text(cut, encoding="utf-8")
    (tmp_path / "matrix.stage").unlink()
    result = run(f"benchmarks/gpu_check.sh --dry-run '{tmp_path}'")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "== tests: passed" in result.stdout
    assert ", before" in result.stdout
    again = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["rows"]
    assert again[: len(rows) - 2] == rows[:-2]
    assert {row["key"] for row in again} == {row["key"] for row in rows}


def test_wrong_arguments_are_refused(tmp_path):
    result = run("benchmarks/gpu_check.sh")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    result = run(f"python benchmarks/gpu_matrix.py measure '{tmp_path / 'new'}'")
    assert result.returncode == 2
    assert "torch finds no GPU here" in result.stderr
    assert not (tmp_path / "new").exists()


def test_the_matrix_is_the_whole_one():
    cells = list(gpu_matrix.cells(False))
    assert len({cell.key for cell in cells}) == len(cells)
    layers = {cell.case.name for cell in cells if not cell.kind and cell.case.k}
    assert len(layers) == 9 + 6  # five of MobileNetV1's thirteen are the same
    measured = {(cell.case.n, cell.dtype, cell.phase) for cell in cells if not cell.kind and cell.case.k}
    assert len(measured) == 3 * 4 * 2
    assert {cell.case.dtype for cell in cells if cell.dtype == "tf32"} == {"float32"}
    assert (cells[0].case.n, cells[0].dtype, cells[0].phase) == (128, "bfloat16", "forward")


@pytest.mark.parametrize(
    "name", ["both_biases", "stride_2_tf_same", "multiplier_3", "dilations_unequal", "gelu"]
)
def test_the_naive_contender_computes_the_same(name):
    case = BY_NAME[name]
    tensors = case.tensors()
    x, dw, pw, db, b = operands(tensors)
    geometry = (case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw)
    expected = gpu_matrix._cuda_kernels.compose_in_place((x, dw, pw, db, b), (*geometry, case.mid, case.act))
    torch.testing.assert_close(gpu_matrix.naive(case, x, tensors), expected, rtol=1e-4, atol=1e-4)


def row(key, phase, seconds, case="name=block1 c=32 h=112 w=112 k=64 kh=3 kw=3 n=128 dtype=bfloat16"):
    return {"key": key, "case": case, "dtype": "bfloat16", "phase": phase, "bytes": 4e9, "operations": 1e9,
            "roof": 1e-3, "seconds": {name: [s, s, s] for name, s in seconds.items()}}  # fmt: skip


def test_the_summary_compares_better_layouts():
    rows = [
        row(
            "a forward",
            "forward",
            {"fastsep nhwc": 2e-3, "fastsep nchw": 3e-3, "torch nhwc": 9e-3, "torch nchw": 4e-3},
        ),
        row("b forward", "forward", {"fastsep nhwc": 2e-3, "torch nhwc": 16e-3, "torch nchw": 17e-3}),
        row("c compile", "forward", {"compile": 1e-3}),
    ]
    (group,) = gpu_matrix.summary(rows)
    assert group["speedup"] == pytest.approx(4)
    assert (group["slowest"], group["layers"], group["what"], group["batch"]) == (
        pytest.approx(2),
        2,
        "pair",
        128,
    )
    assert group["terabytes_per_second"] == pytest.approx(2)
    assert group["share_of_roof"] == pytest.approx(0.5)
    assert group["speedup_in_graphs"] is None


def test_the_hopper_kernel_is_compared_with_the_portable_one():
    rows = [
        row("a forward", "forward", {"fused nhwc": 1e-3, "torch nhwc": 2e-3}),
        row("a forward hopper", "forward", {"fused nhwc": 2e-3, "hopper nhwc": 1e-3}),
        row("b forward hopper", "forward", {"fused nhwc": 8e-3, "hopper nhwc": 1e-3}),
    ]
    (group,) = gpu_matrix.hopper_gains(rows)
    assert (group["batch"], group["dtype"], group["layers"]) == (128, "bfloat16", 2)
    assert (group["gain"], group["least"]) == (pytest.approx(4), pytest.approx(2))


def test_factors_are_those_that_the_planner_reads(monkeypatch):
    gpu = _plan.Gpu("test", 100, 4e12, 6e13, 8e14)
    monkeypatch.setattr(_plan.Gpu, "of", lambda device: gpu)
    rows = [
        row("block1 batch 128 bfloat16 forward", "forward", {"fused nhwc": 1e-3, "torch nhwc": 2e-3}),
        row("block1 batch 128 bfloat16 training", "training", {"fused nhwc": 4e-3}),
        row("block1 batch 128 bfloat16 forward hopper", "forward", {"fused nhwc": 9e-3, "hopper nhwc": 5e-4}),
    ]
    found = gpu_matrix.factors(rows)
    assert list(found) == [
        "backward fused bfloat16 nhwc",
        "forward fused bfloat16 nhwc",
        "forward hopper bfloat16 nhwc",
        "forward torch bfloat16 nhwc",
    ]
    problem = gpu_matrix.replace(gpu_matrix.parse_case(rows[0]["case"]), layout="nhwc").problem
    monkeypatch.setattr(_plan, "factors", lambda: {"test": found})
    for phase, path, seconds in (
        ("forward", "fused", 1e-3),
        ("forward", "hopper", 5e-4),
        ("forward", "torch", 2e-3),
        ("backward", "fused", 3e-3),
    ):
        assert _plan.predicted(problem, phase, path, gpu, False) == pytest.approx(seconds, rel=1e-3)
