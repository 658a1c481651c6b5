"""What benchmarks/ holds: the suite of pytest-benchmark, and the scripts."""

import argparse
import json
import os
import shlex
import shutil
import textwrap
import time
from dataclasses import replace

import pytest
from commands import ROOT, run
from reports import report, timing

from fastsep import _native
from fastsep.bench import command, layers, networks
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
    assert all(value["extra_info"]["gflops_per_s"] > 0 for value in values)
    assert all(value["extra_info"]["gbytes_per_s"] > 0 for value in values)
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
        ("--quick --networks vgg", "must be one of"),
        ("--device tpu", "device must be cpu or cuda, got 'tpu'"),
        ("--dtype int8", "dtype must be float32"),
        ("--device cpu --dtype float16", "dtype float16 is measured on cuda"),
        ("--phases sideways", "phase must be one of"),
        ("--threads 999", "threads must be 1 to"),
        ("--threads two", "threads must be a whole number from 1, got 'two'"),
        ("--batch 0", "batch must be a whole number from 1, got '0'"),
        ("--seconds nan", "seconds must be seconds from 0, got 'nan'"),
        ("--seconds=-1", "seconds must be seconds from 0, got '-1'"),
    ],
)
def test_wrong_options_of_the_benchmarks(arguments, message):
    result = run(f"pytest benchmarks -p no:cacheprovider {arguments}")
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0


@needs_native
def test_quick_measures_the_networks_that_are_named():
    result = run("pytest benchmarks -p no:cacheprovider --quick --networks other --collect-only -q")
    assert result.returncode == 0, result.stdout
    found = {line.partition("[")[2].partition("-")[0] for line in result.stdout.splitlines() if "[" in line}
    assert found == {"other"}


PLUGIN = """
import warnings
from fastsep.bench import machine, report

peak, fixed = machine.measure_peak, []

def measure_peak(*arguments):
    warnings.warn("news of torch", UserWarning)
    return peak(*arguments)

def measure_bandwidth(device):
    print("bandwidth on", machine.torch.get_num_threads(), "threads", file=open("threads.txt", "w"))
    return 1e10

def busy(load, *_):
    load.others = 0.7

machine.measure_peak, machine.measure_bandwidth = measure_peak, measure_bandwidth
machine.Load.__exit__ = busy
report.doubts = lambda timing, threads: [f"varies by much on {threads} thread"]
"""


@needs_native
def test_doubts_and_warnings_of_the_benchmarks_are_printed(tmp_path):
    """Where pytest captures nothing, and as no error; the bandwidth is that of the threads asked for."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "tiny.txt").write_text(f"name=tiny {SMALL}\n")
    suite = f"pytest {ROOT}/benchmarks -p plugin -p no:cacheprovider --quick --phases forward"
    options = f"--networks {tmp_path}/tiny.txt --benchmark-json={tmp_path}/result.json"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = run(f"{suite} {options}", cwd=tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stdout
    assert "warning: other programs kept 0.7 cores busy meanwhile\n" in result.stdout
    assert "warning: measure again when the machine is idle; tiny tiny, forward: " in result.stdout
    assert "varies by much on 1 thread" in result.stdout
    assert "news of torch" in result.stdout
    assert (tmp_path / "threads.txt").read_text() == "bandwidth on 1 threads\n"
    values = json.loads((tmp_path / "result.json").read_text())["benchmarks"]
    assert all(value["extra_info"]["gbytes_per_s"] > 0 for value in values)


def test_benchmarks_without_the_native_module(tmp_path):
    (tmp_path / "missing.py").write_text("from fastsep import _native\n_native.core = None\n")
    result = run("pytest benchmarks -p missing -p no:cacheprovider", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 2
    assert "the native module is missing" in result.stderr


def compared(tmp_path, *reports, options=""):
    paths = []
    for i, made in enumerate(reports):
        paths.append(tmp_path / f"{i}.json")
        text = json.dumps(made.to_json()) if isinstance(made, Report) else made
        paths[-1].write_bytes(text.encode() if isinstance(text, str) else text)
    return run(f"python {ROOT}/benchmarks/compare.py {paths[0]} {paths[1]} {options}", cwd=tmp_path)


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
        ('{"format": 3, "rows": [{}]}', "is no result"),
        (b"\xff\xfe\x00", "is no JSON"),
        ('{"format": 3, "rows": "xy"}', "is no result"),
        (json.dumps(report().to_json()).replace('"times": {', '"times": [1], "left": {', 1), "is no result"),
        (report(network="other"), "the results differ in network: net, other"),
        (report(whole=True), "the results differ in whole: False, True"),
        (report(layout="nchw"), "the results differ in layout: nhwc, nchw"),
        (report(rows=[replace(row, name=row.name + "x") for row in report().rows]), "of different layers"),
    ],
)
def test_results_that_cannot_be_compared(second, message, tmp_path):
    result = compared(tmp_path, report(), second)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_results_without_rows(tmp_path):
    result = compared(tmp_path, report(rows=[]), report(rows=[]))
    assert (result.returncode, result.stderr) == (2, "compare: the results are of no layers\n")


def test_a_contender_that_took_no_part(tmp_path):
    rows = [replace(row, times={"fastsep": row.times["fastsep"]}) for row in report().rows]
    result = compared(tmp_path, report(rows=rows), report(), options="--contender torch")
    assert (result.returncode, result.stderr) == (2, "compare: torch took no part in one\n")


def test_other_machines_and_kernels_are_told(tmp_path):
    result = compared(tmp_path, report(), report(isa="avx2", machine="other"))
    assert result.returncode == 0, result.stderr
    assert "Not the same isa: scalar, avx2.\nNot the same machine: m, other.\n" in result.stdout
    assert "Not the same" not in compared(tmp_path, report(), report()).stdout


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


def test_the_regression_scripts_help():
    result = run("python benchmarks/regression.py --help")
    assert result.returncode == 0
    assert "usage: regression.py [-h] [--instructions] [REVISION]" in result.stdout


def test_a_regression_script_tells_what_failed(tmp_path):
    """A bench that ends with an error, and a valgrind that counts nothing."""
    (tmp_path / "valgrind").write_text("#!/bin/sh\necho no such instruction >&2\nexit 3\n")
    (tmp_path / "valgrind").chmod(0o755)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "fastsep.py").write_text("raise SystemExit('no bench here')\n")
    program = (
        "import pathlib, regression\n"
        "from rich.console import Console\n"
        "folder = pathlib.Path.cwd()\n"
        "regression.times(folder / 'source', folder, Console())\n"
        "try:\n    regression.count(folder / 'program', 'block5', 'forward', 'nhwc')\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    (tmp_path / "program.py").write_text(program)
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    result = run(f'PATH="{tmp_path}:$PATH" python program.py', cwd=tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "Times are not compared, before: no bench here\n\n"
        "block5 forward nhwc was not counted: no such instruction\n\n"
    )


@needs_native
def test_the_recipe_of_the_readme(tmp_path, monkeypatch):
    """Its commands as a shell runs them, up to what they would measure, and each to a file of its own."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    recipe = text.partition("## Reproducing the README\n")[2].replace("cd benchmarks/results/MACHINE", ":")
    lines = "\n".join(line for line in recipe.splitlines() if line.startswith("    "))
    # A python that prints how it is called; what is redirected to a file is found there.
    stub = 'python() { printf "%s\\n" "$*" | tee -a called.txt; }; cd() { :; }\n'
    (tmp_path / "recipe.sh").write_text(stub + textwrap.dedent(lines))
    result = run("bash -eu recipe.sh", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    called = [shlex.split(line) for line in (tmp_path / "called.txt").read_text().splitlines()]
    benches = [words[3:] for words in called if words[:3] == ["-m", "fastsep", "bench"]]
    scripts = [words[0] for words in called if words[0] != "-m"]
    assert len(benches) + len(scripts) == len(called)
    assert all((tmp_path / script).name in os.listdir(ROOT / "benchmarks") for script in scripts)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command.peers, "missing", lambda name: "")
    monkeypatch.setattr(command, "cores", lambda: 2)
    monkeypatch.setattr(networks, "build", lambda name: (name, (3, 224, 224)))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    files, wholes = [], set()
    for words in benches:
        arguments = parser.parse_args([*words, "--device", "cpu"])
        command.check(arguments)
        files.append(arguments.json)
        if arguments.whole:
            wholes.add(arguments.network.name)
    assert len(set(files)) == len(files) > 20
    assert all(file.endswith(".json") for file in files)
    assert len(wholes) == 8


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
