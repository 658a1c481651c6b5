"""What benchmarks/ holds: the suite of pytest-benchmark, and the scripts."""

import json
import shutil
import time
from dataclasses import replace

import pytest
from commands import ROOT, run
from reports import report, timing

from fastsep import _native
from fastsep.bench import layers
from fastsep.bench.report import Report

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")
SMALL = "c=8 h=14 w=15 k=16 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu act=silu"


@needs_native
@pytest.mark.slow
def test_the_benchmarks_run(tmp_path):
    """The quick set, its JSON and its histogram, and a comparison with an earlier run, in two minutes."""
    begin = time.monotonic()
    suite = f"pytest benchmarks --quick -p no:cacheprovider --benchmark-storage={tmp_path}"
    files = f"--benchmark-json={tmp_path}/now.json --benchmark-histogram={tmp_path}/histogram"
    result = run(f"{suite} {files} --benchmark-autosave")
    assert result.returncode == 0, result.stdout
    assert time.monotonic() - begin < 120
    values = json.loads((tmp_path / "now.json").read_text())["benchmarks"]
    groups = {value["group"] for value in values}
    assert len(groups) == 2 * len(layers.names())
    assert {value["name"] for value in values} == {
        *("fastsep nchw", "fastsep nhwc", "torch nchw", "torch nhwc", "compile", "naive")
    }
    information = values[0]["extra_info"]
    assert information["gflops_per_s"] > 0
    assert 0 < information["share_of_peak"] < 1.1
    assert {"isa", "torch", "fastsep", "threads", "device"} <= set(information)
    assert list(tmp_path.glob("histogram*.svg"))
    result = run(f"{suite} --phases forward -k 'other and torch' --benchmark-compare")
    assert result.returncode == 0, result.stdout
    assert "(0001_" in result.stdout


@needs_native
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--networks vgg", "must be one of"),
        ("--device tpu", "device must be cpu or cuda, got 'tpu'"),
        ("--dtype int8", "dtype must be float32"),
        ("--device cpu --dtype float16", "dtype float16 is measured on cuda"),
        ("--phases sideways", "phase must be one of"),
        ("--threads 999", "threads must be 1 to"),
    ],
)
def test_wrong_options_of_the_benchmarks(arguments, message):
    result = run(f"pytest benchmarks -p no:cacheprovider {arguments}")
    assert result.returncode == 4
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0


def compared(tmp_path, *reports):
    paths = []
    for i, made in enumerate(reports):
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps(made.to_json()) if isinstance(made, Report) else made)
    return run(f"python {ROOT}/benchmarks/compare.py {paths[0]} {paths[1]}", cwd=tmp_path)


def test_comparing_two_results(tmp_path):
    slower = report()
    times = slower.rows[0].times | {"fastsep": timing(1.2)}
    slower = replace(slower, rows=[replace(slower.rows[0], times=times), slower.rows[1]])
    result = compared(tmp_path, report(), slower)
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("slower") == 1
    assert "1.200" in result.stdout
    assert compared(tmp_path, slower, report()).returncode == 0
    # Within the spread of both it is none.
    wide = []
    for seconds in (1.0, 1.2):
        rows = [replace(row, times=row.times | {"fastsep": timing(seconds, 0.5)}) for row in report().rows]
        wide.append(replace(report(), rows=rows))
    assert compared(tmp_path, *wide).returncode == 0


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "is no JSON"),
        ('{"rows": []}', "is a result of format 1"),
        (report(batch=2), "the results differ in batch: 1, 2"),
        (replace(report(), rows=report().rows[:1]), "of different layers"),
        ('{"format": 2, "rows": [{}]}', "is no result"),
    ],
)
def test_results_that_cannot_be_compared(second, message, tmp_path):
    result = compared(tmp_path, report(), second)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@needs_native
def test_a_training_step(tmp_path):
    (tmp_path / "two.txt").write_text(
        f"name=a {SMALL}\nname=b c=16 h=7 w=8 k=8 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1\n".replace("silu", "relu")
    )
    result = run(
        f"python {ROOT}/benchmarks/training_step.py two.txt --batch 2 --seconds 0 --json", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert set(values["rows"]) == {"fastsep nhwc", "fastsep nchw", "torch nhwc", "torch nchw"}
    assert all(row["seconds"] > 0 and row["memory"] >= 0 for row in values["rows"].values())


@needs_native
def test_a_regression_script_without_a_revision():
    result = run("python benchmarks/regression.py no-such-revision")
    assert result.returncode == 2
    assert result.stderr == "revision must be a commit of this repository, got 'no-such-revision'\n"


@needs_native
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_instructions_are_counted(tmp_path):
    """The same for the same program, and more for a larger layer."""
    program = (
        "import regression, pathlib\n"
        f"program = regression.build(regression.ROOT, pathlib.Path('{tmp_path}'), module=False)\n"
        "layers = 'block12', 'block12', 'block5'\n"
        "print(*(regression.count(program, layer, 'forward', 'nhwc') for layer in layers))"
    )
    result = run(f'python -c "{program}"', cwd=ROOT / "benchmarks", PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    first, again, larger = map(int, result.stdout.split())
    assert abs(again / first - 1) < 1e-3
    assert larger > 1.5 * first
