"""python -m fastsep: what its commands print, and their exit status."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import reports
import torch
from commands import run

import fastsep
from fastsep import _check, _native
from fastsep.__main__ import main
from fastsep._case import parse_case
from fastsep.bench import baselines, command, machine
from fastsep.bench.report import Report

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")
SMALL = "name=small c=8 h=14 w=15 k=16 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 b=1 mid=relu act=silu"


@needs_native
def test_info_as_text(tmp_path):
    result = run("python -m fastsep info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert f"torch             {torch.__version__}\n" in result.stdout
    passed = [line.split() for line in result.stdout.splitlines() if line.endswith("passed")]
    assert [words[0] for words in passed] == [isa for isa in _native.core.isas() for _ in range(4)]


@needs_native
def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    information = json.loads(capsys.readouterr().out)
    assert information["fastsep"] == fastsep.__version__
    assert information["isa"] == _native.core.best_isa()
    assert information["kernels"] == _native.core.kernels()
    tested = {(r["isa"], r["dtype"], r["layout"]) for r in information["self_test"]}
    assert len(tested) == 4 * len(_native.core.isas())
    assert all(r["passed"] and 0 <= r["error"] <= 1 for r in information["self_test"])
    assert any(r["error"] > 0 for r in information["self_test"])


@needs_native
@pytest.mark.parametrize("isa", _native.core.isas() if _native.core else [])
def test_info_names_the_forced_instruction_set(isa, tmp_path):
    result = run("python -m fastsep info --json", cwd=tmp_path, FASTSEP_ISA=isa)
    assert json.loads(result.stdout)["isa"] == isa


@needs_native
@pytest.mark.parametrize("command", ["info", "bench", f"replay '{SMALL}'"])
def test_unknown_instruction_set_is_one_sentence(command, tmp_path):
    result = run(f"python -m fastsep {command}", cwd=tmp_path, FASTSEP_ISA="sse9")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "FASTSEP_ISA" in result.stderr
    assert "sse9" in result.stderr
    assert result.stderr.count("\n") == 1


@needs_native
def test_a_kernel_that_computes_wrong_fails_the_self_test(monkeypatch, capsys):
    run_native = _check.run_native

    def slightly_off(case, tensors, isa):
        output = run_native(case, tensors, isa)
        if isa == "scalar":
            output[0, 0, 0, 0] += 1e-2
        return output

    monkeypatch.setattr(_check, "run_native", slightly_off)
    assert main(["info"]) == 1
    failed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert set(failed) == {"scalar"}


def test_without_the_native_module(monkeypatch, capsys):
    monkeypatch.setattr(_native, "core", None)
    monkeypatch.setattr(_native, "missing", "No module named '_core'")
    assert main(["info"]) == 1
    assert "No module named '_core'" in capsys.readouterr().out
    assert main(["bench"]) == 1
    assert "No module named '_core'" in capsys.readouterr().err
    assert main(["replay", SMALL, "--seconds", "0"]) == 0
    assert "path   composition" in capsys.readouterr().out


@needs_native
def test_bench_prints_a_table(tmp_path):
    result = run("python -m fastsep bench --seconds 1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if "\u00d7" in line]
    assert [row[0] for row in rows] == [f"block{i}" for i in range(1, 14)]
    assert all(row[4] in ("nchw", "nhwc") and row[-1].endswith("%") for row in rows)
    assert all(0 < float(row[-1].rstrip("%")) < 120 and float(row[-3]) > 0 for row in rows)
    assert "Geometric mean of the speedups" in result.stdout


@needs_native
def test_bench_as_json(tmp_path, capsys):
    (tmp_path / "network.txt").write_text(f"# one layer\n{SMALL}\n")
    arguments = [
        "--network",
        str(tmp_path / "network.txt"),
        "--batch",
        "2",
        "--layout",
        "nchw",
        "--seconds",
        "0",
    ]
    assert main(["bench", "--json", *arguments]) == 0
    report = Report.from_json(json.loads(capsys.readouterr().out))
    assert (report.network, report.batch, report.layout) == ("network", 2, "nchw")
    (row,) = report.rows
    assert row.case == replace(parse_case(SMALL), n=2)
    assert set(row.times) == {"fastsep", "unfrozen", "torch nchw", "torch nhwc"}
    assert report.bandwidth > 0
    assert all(0 < t.low <= t.median <= t.high for t in row.times.values())
    assert 0 < row.share_of_peak() < 1


@needs_native
def test_bench_refuses_to_time_wrong_results(monkeypatch, capsys):
    wrong = {
        "conv2d": lambda *args: torch.nn.functional.conv2d(*args) * 1.001,
        "pad": torch.nn.functional.pad,
    }
    monkeypatch.setattr(baselines, "F", SimpleNamespace(**wrong))
    assert main(["bench", "--seconds", "0"]) == 1
    assert "differs from torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["bench", "--network", "alexnet"],
            "a file of layers or a layer, got 'alexnet'",
        ),
        (["bench", "--batch", "0"], "must be a whole number from 1, got '0'"),
        (["bench", "--layout", "chwn"], "invalid choice: 'chwn'"),
        (["bench", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["bench", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["bench", "--phase", "sideways"], "invalid choice: 'sideways'"),
        (["bench", "--against", "torch,tvm"], "must be some of torch, compile, naive, onnxruntime"),
        (["bench", "--layer", "vgg"], "must be a layer such as"),
        (["bench", "--layer", "c=8 h=5 w=5 k=8 kh=9 kw=3"], "the case has no output: c=8"),
        (["bench", "--layer", "c=8 h=5 w=5 k=8 kh=3 kw=3 sh=0"], "sh must be at least 1, got 0"),
        (
            ["bench", "--layer", f"{SMALL} dtype=bfloat16"],
            "a layer must leave dtype to --dtype",
        ),
        (["bench", "--layer", f"{SMALL} n=1"], "a layer must leave n to --batch, got n=1"),
        (["bench", "--seconds", "nan"], "must be seconds from 0, got 'nan'"),
        (["bench", "--seconds=-3"], "must be seconds from 0, got '-3'"),
        (["bench", "--seconds", "long"], "must be seconds from 0, got 'long'"),
        (["bench", "--json", ""], "must be a file's name, got ''"),
        (["replay", SMALL, "--seconds", "inf"], "must be seconds from 0, got 'inf'"),
        (["bench", "--layer", SMALL, "--network", "other"], "not allowed with argument"),
        (["replay", "c=3"], "missing in 'c=3'"),
        (["replay", "c=3 h=2 w=2 k=1 kh=3 kw=3"], "the case has no output"),
        (["replay", "c=3 h=2 w=2 k=1 kh=3 kw=3 q=1"], "got 'q=1'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@needs_native
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "999"], "threads must be at most the"),
        (
            ["--device", "cpu", "--dtype", "float16"],
            "dtype float16 is measured on cuda, and the device is cpu",
        ),
        (["--whole", "--network", "other"], "network must be one of mobilenet_v1, mobilenet_v2"),
        (["--whole", "--phase", "training"], "a network in one piece is measured in the forward pass"),
        (["--whole", "--layout", "nchw"], "runs in channels-last, layout nhwc, got layout nchw"),
        (["--plot", "result.jpg"], "plot must end in .pdf, .png, .svg, got 'result.jpg'"),
        (
            ["--json", "nowhere/result.json"],
            "nowhere/result.json cannot be written: there is no folder nowhere",
        ),
        (["--json", "--csv"], "json and csv cannot both be written to -"),
        (["--json", "a", "--csv", "./a"], "json and csv cannot both be written to ./a"),
        (["--csv", "a.png", "--plot", "a.png"], "csv and plot cannot both be written to a.png"),
        (["--json", "/"], "/ cannot be written: it is a folder"),
        (["--plot", "x.png", "--json", "/dev/null"], "/dev/null cannot be written: it is no file"),
        (["--json", "/proc/result.json"], "/proc/result.json cannot be written: the folder /proc does not"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message, capsys, tmp_path, monkeypatch):
    """One sentence, before anything is measured or written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "measure", None)
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not list(tmp_path.iterdir())


@needs_native
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "fastsep: device is cuda, but torch finds no GPU here\n"


def test_a_runtime_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(command.peers, "version", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--against", "onnxruntime"])
    assert exit_.value.code == 2
    assert 'which is not installed: pip install ".[peers]"' in capsys.readouterr().err


@needs_native
def test_bench_writes_files(tmp_path, capsys, monkeypatch):
    """All of one measurement; the table is printed beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "measure_bandwidth", lambda device: 1e9)
    files = ["--json", "a.json", "--csv", "a.csv", "--plot", "a.png"]
    assert main(["bench", "--layer", SMALL, "--phase", "training", "--seconds", "0", *files]) == 0
    assert "speedup" in capsys.readouterr().out
    report = Report.from_json(json.loads((tmp_path / "a.json").read_text()))
    assert (report.phase, report.network) == ("training", "small")
    assert (tmp_path / "a.csv").read_text() == report.to_csv()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.csv", "a.png"}


@needs_native
def test_bench_writes_all_or_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "measure", lambda arguments: reports.report())

    def undrawable(*_):
        raise RuntimeError("no font")

    with monkeypatch.context() as context:
        context.setattr(command.plot, "draw", undrawable)
        assert main(["bench", "--json", "a.json", "--plot", "a.png"]) == 1
    assert not list(tmp_path.iterdir())

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as context:
        context.setattr(command, "write_whole", full)
        assert main(["bench", "--csv", "a.csv"]) == 2
    assert capsys.readouterr().err.endswith("fastsep: No space left on device\n")
    (tmp_path / "folder.png").mkdir()
    assert main(["bench", "--json", "a.json", "--plot", "folder.png"]) == 2
    assert "folder.png cannot be written: it is a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@needs_native
@pytest.mark.parametrize("isa", ["", "scalar"])
def test_a_result_tells_its_command(isa, tmp_path):
    typed = f"bench --layer '{SMALL}' --seconds 0"
    result = run(f"python -m fastsep {typed} --json", cwd=tmp_path, FASTSEP_ISA=isa)
    assert result.returncode == 0, result.stderr
    made = Report.from_json(json.loads(result.stdout))
    assert made.command == (f"FASTSEP_ISA={isa} " if isa else "") + f"python -m fastsep {typed}"


@pytest.mark.parametrize(
    "targets",
    [
        ["--json"],
        ["--json", "-"],
        ["--json", "a.json", "--csv", "a.csv", "--plot", "a.png"],
        ["--json=a.json", "--plot=a=b.png"],
        ["--js", "a.json", "--cs=b"],
    ],
)
def test_where_a_result_goes_is_no_part_of_its_command(targets):
    before, after = ["bench", "--network", "other"], ["--phase", "training", "--layer", "c=8 h=5"]
    assert command.without_targets([*before, *targets, *after]) == [*before, *after]
    assert command.without_targets([*before, *after, *targets]) == [*before, *after]


@needs_native
def test_bench_of_a_whole_network(capsys):
    assert main(["bench", "--whole", "--seconds", "0", "--json"]) == 0
    report = Report.from_json(json.loads(capsys.readouterr().out))
    (row,) = report.rows
    assert {"torch nchw", "torch nhwc", "eager"} <= set(row.times)
    assert ("fastsep" in row.times) == hasattr(fastsep, "optimize")
    assert ("fastsep" in row.times) != any("optimize()" in remark for remark in report.remarks)


@needs_native
def test_replay_of_a_verbose_line(tmp_path):
    layer = "fastsep.SeparableConv2d(3, 5, (3, 2), 2, depth_multiplier=2)"
    result = run(
        f"python -c 'import torch, fastsep; {layer}(torch.ones(2, 3, 9, 8))'",
        cwd=tmp_path,
        FASTSEP_VERBOSE="1",
    )
    (line,) = result.stderr.splitlines()
    replayed = subprocess.run(
        [sys.executable, "-m", "fastsep", "replay", line, "--seconds", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert replayed.returncode == 0, replayed.stderr
    printed = dict(text.split(maxsplit=1) for text in replayed.stdout.splitlines())
    assert printed["case"] == line.rpartition("| ")[2]
    assert printed["path"].startswith("native")
    assert 0 < float(printed["error"].split()[0]) <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_replay_of_a_dtype_without_kernels(dtype, capsys):
    line = SMALL.replace("mid=relu act=silu", f"dtype={dtype}")
    assert main(["replay", line, "--seconds", "0"]) == 0
    assert f"path   composition | no native kernel for torch.{dtype}" in capsys.readouterr().out
