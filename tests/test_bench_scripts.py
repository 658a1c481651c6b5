"""The scripts of benchmarks/ that tell of a regression, time training steps and write the README's tables."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
from commands import ROOT, run
from reports import report, timing
from rich.console import Console

from fastsep import _native

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare
import regression
import training_step

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")
SMALL = "c=8 h=14 w=15 k=16 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu act=relu"


def test_the_ratio_of_two_times_has_a_spread(capsys):
    before, now = timing(1.0, 0.2), timing(1.5, 0.4)
    assert compare.interval(before, now) == "1.091 to 2.000"  # 1.2 / 1.1 and 1.8 / 0.9
    changed = [replace(row, times=row.times | {"fastsep": timing(1.5, 0.4)}) for row in report().rows]
    assert not compare.show(report(spread=0.2), report(rows=changed), Console(width=120))
    assert "1.091 to 2.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("growth", "passed"), [(1.02, True), (1.029, True), (1.04, False), (0.5, True), (1.0, True)]
)
def test_instructions_may_grow_by_three_percent(growth, passed, monkeypatch, capsys):
    """Of one run of all, the last: each counts."""
    last = regression.LAYERS[-1], *regression.RUNS[-1]

    def count(program, *run):
        return round(1e6 * (growth if program == "now" and run == last else 1.0))

    monkeypatch.setattr(regression, "count", count)
    assert regression.instructions("before", "now", Console(width=100)) == passed
    printed = capsys.readouterr().out
    assert printed.count("+0.00%") >= len(regression.LAYERS) * len(regression.RUNS) - 1
    assert f"{growth - 1:+.2%}" in printed


HEADER = "namespace fastsep {}\n"
CHECKOUTS = {
    "another contract": (
        HEADER,
        "int core() { return 0; }\n",
        regression.ContractError,
        "has another contract",
    ),
    "a broken core": (HEADER, "int core( {\n", RuntimeError, "does not build here"),
}


@pytest.mark.parametrize("checkout", CHECKOUTS)
@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("ninja") is None, reason="no cmake or ninja"
)
def test_a_checkout_that_does_not_build(checkout, tmp_path):
    header, core, error, message = CHECKOUTS[checkout]
    (tmp_path / "fastsep.h").write_text(header)
    (tmp_path / "core.cpp").write_text(core)
    (tmp_path / "CMakeLists.txt").write_text(
        "add_library(fastsep_core STATIC core.cpp)\n"
        "target_include_directories(fastsep_core PUBLIC ${CMAKE_CURRENT_SOURCE_DIR})\n"
    )
    with pytest.raises(RuntimeError, match=message) as caught:
        regression.build(tmp_path, tmp_path / "build", module=False)
    assert caught.type is error


@pytest.mark.parametrize(
    ("source_error", "root_error", "status"),
    [
        (regression.ContractError("another"), None, 0),
        (RuntimeError("broken"), None, 2),
        (None, RuntimeError("broken"), 2),
        (None, regression.ContractError("another"), 2),
        (None, None, 1),
    ],
)
def test_exit_status_of_the_regression_script(source_error, root_error, status, monkeypatch, capsys):
    """0 without a comparison where the contract is another, and nowhere else; 1 where instructions grew."""

    def build(source, folder, *, module):
        error = root_error if source == regression.ROOT else source_error
        if error:
            raise error

    monkeypatch.setattr(regression, "build", build)
    monkeypatch.setattr(regression, "instructions", lambda before, now, console: False)
    monkeypatch.setattr(regression, "times", lambda source, folder, console: None)
    monkeypatch.setattr(regression.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(sys, "argv", ["regression.py", "HEAD"])
    assert regression.main() == status
    printed = capsys.readouterr()
    assert ("Not compared: another" in printed.out) == (status == 0)
    assert ("broken" in printed.err or "another" in printed.err) == (status == 2)


def test_two_checkouts_are_timed_in_turn(tmp_path, monkeypatch, capsys):
    """Two passes each; a result lies between the outermost quartiles of both."""
    seconds = {str(tmp_path): iter([1.0, 2.0]), str(regression.ROOT): iter([1.5, 3.0])}
    turns = []

    def bench(command, *, cwd, env, **_):
        turns.append("now" if env["PYTHONPATH"] == str(regression.ROOT) else "before")
        time = timing(next(seconds[env["PYTHONPATH"]]), 0.1)
        rows = [replace(row, times={"fastsep": time}) for row in report().rows]
        text = json.dumps(report(rows=rows).to_json())
        return regression.subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(regression.subprocess, "run", bench)
    regression.times(tmp_path, tmp_path, Console(width=120))
    assert turns == ["before", "now", "before", "now"]
    printed = capsys.readouterr().out
    assert "1500.000" in printed  # the means of both passes
    assert "2250.000" in printed
    assert f"{1.425 / 2.1:.3f} to {3.15 / 0.95:.3f}" in printed
    assert "slower" not in printed


def step(arguments, folder):
    return run(f"python {ROOT}/benchmarks/training_step.py {arguments}", cwd=folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("depthwise", "must be of whole layers, got 'depthwise': 3x3_28 is a depthwise half alone"),
        ("mobilenet_v2", "must be of layers that follow each other, got 'mobilenet_v2': blocks.0.0 gives"),
        ("vgg", "must be one of"),
        ("mobilenet_v1 --threads 999", "threads must be at most"),
        ("mobilenet_v1 --threads 0", "must be a whole number from 1, got '0'"),
        ("mobilenet_v1 --seconds=-1", "must be seconds from 0, got '-1'"),
        ("mobilenet_v1 --jso", "unrecognized arguments: --jso"),
    ],
)
def test_wrong_arguments_of_a_training_step(arguments, message, tmp_path):
    result = step(arguments, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@needs_native
def test_a_training_step_tells_what_it_is(tmp_path):
    (tmp_path / "one.txt").write_text(f"name=a {SMALL}\n")
    result = step("one.txt --batch 2 --seconds 0 --layouts nhwc --json", tmp_path)
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert (values["kind"], values["format"]) == (training_step.KIND, training_step.FORMAT)
    assert values["command"] == (
        "python benchmarks/training_step.py one.txt --batch 2 --seconds 0 --layouts nhwc"
    )
    assert values["machine"]
    assert {"fastsep", "torch"} <= set(values["versions"])


STEP = {
    "kind": training_step.KIND,
    "format": training_step.FORMAT,
    "network": "steps",
    "batch": 2,
    "threads": 1,
    "rows": {
        name: {"seconds": seconds, "spread": 0.2 if name == "torch nchw" else 0.01, "memory": 5e6}
        for name, seconds in (
            *(("fastsep nhwc", 0.1), ("fastsep nchw", 0.2)),
            *(("torch nhwc", 0.3), ("torch nchw", 0.4)),
        )
    },
}
BEGIN, END = "<!-- results: benchmarks/update_readme.py -->\n", "<!-- end of results -->\n"


@pytest.fixture
def project(tmp_path):
    """A README.md, results of one machine, and the scripts."""
    folder = tmp_path / "benchmarks" / "results" / "some-machine"
    folder.mkdir(parents=True)
    for path in (ROOT / "benchmarks").glob("*.py"):
        shutil.copy(path, tmp_path / "benchmarks")
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}old\n{END}after\n", encoding="utf-8")
    (folder / "step.json").write_text(json.dumps(STEP))
    return tmp_path


def put(project, name, made):
    path = project / "benchmarks" / "results" / "some-machine" / f"{name}.json"
    path.write_text(made if isinstance(made, str) else json.dumps(made.to_json()))


def update(project, arguments=""):
    return run(f"python benchmarks/update_readme.py {arguments}", cwd=project, PYTHONPATH=str(ROOT))


def cells(text, begin):
    """Of the lines of a table that begin with a cell."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {begin}")]


def test_the_tables_of_the_readme(project):
    line = "name={} c=4 h=9 w=9 k=0 kh=5 kw=5 dh=2 dw=2"
    for layout in ("nhwc", "nchw"):
        rows = [replace(row, line=line.format(row.name)) for row in report().rows]
        made = report(network="depthwise", phase="weight-gradient", layout=layout, rows=rows)
        put(project, f"depthwise_{layout}", made)
    put(project, "sure", report(spread=0.04, network="sure"))
    put(project, "doubtful", report(spread=0.2, network="doubtful"))
    put(project, "mobilenet_v1", report(network="mobilenet_v1"))
    assert update(project).returncode == 0
    text = (project / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}after\n")
    assert "torch reaches 12% of the peak" in text  # 400 of 400 operations a second take 1 of 8 seconds
    (sure,), (doubtful,) = cells(text, "sure"), cells(text, "doubtful")
    assert sure[6:11] == ["8000.000", "2.0", "2000.000", "2.0", "4000.000"]
    assert (doubtful[0], doubtful[7]) == ("doubtful \u2020", "10.0")
    assert cells(text, "5 x 5, dilation 2; 4 x 9 x 9") == 2 * [
        ["5 x 5, dilation 2; 4 x 9 x 9", "1000.000; 5.00, 4.00", "1000.000; 4.00, 4.00"]
    ]
    assert not cells(text, "depthwise")
    assert [row[0] for row in cells(text, "steps")] == ["steps \u2020", "steps"]
    assert text.count("\u2020 To be measured again") == 1
    assert (project / "benchmarks" / "results" / "some-machine" / "mobilenet_v1.png").exists()
    assert update(project, "--check").returncode == 0
    put(project, "sure", report(spread=0.06, network="sure"))
    result = update(project, "--check")
    assert result.returncode == 1
    assert result.stderr == "README.md is not up to date: python benchmarks/update_readme.py\n"


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        (
            {"old": json.dumps({"format": 1, "rows": []})},
            "",
            "old.json is a result of format 1, this version reads",
        ),
        (
            {"old": json.dumps(STEP | {"format": 0})},
            "",
            "old.json is a training step of format 0, this version",
        ),
        ({"old": "{"}, "", "old.json is no JSON"),
        ({"old": "[]"}, "", "old.json is no result"),
        ({}, "--chekc", "unrecognized arguments: --chekc"),
        ({}, "--che", "unrecognized arguments: --che"),
        ({"README.md": f"{END}{BEGIN}"}, "", "README.md must hold the lines"),
        ({"README.md": BEGIN}, "--check", "README.md must hold the lines"),
        ({"README.md": END}, "", "README.md must hold the lines"),
    ],
)
def test_a_readme_that_cannot_be_written(files, arguments, message, project):
    for name, text in files.items():
        if name == "README.md":
            (project / name).write_text(text)
        else:
            put(project, name, text)
    before = (project / "README.md").read_text(encoding="utf-8")
    result = update(project, arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert (project / "README.md").read_text(encoding="utf-8") == before
