"""What can be said of ARM without one: the reading of traces, and the wheels that are to be built."""

import sys

import pytest
from commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import arm_analysis

LOOP = [("ldr", "q0, [x0], #0x10"), ("fmla", "v1.4s, v0.4s, v2.s[0]"), ("b.ne", "#0x1000")]


def test_only_vector_fmas_count():
    assert arm_analysis.fmas_of(LOOP) == 1
    assert arm_analysis.fmas_of([("fmla", "v1.2d, v0.2d, v2.2d"), ("fmadd", "s0, s1, s2, s3")]) == 1
    assert arm_analysis.fmas_of([("fmul", "v1.4s, v0.4s, v2.4s")]) == 0


@pytest.mark.parametrize(
    ("path", "loop"),
    [
        ((1, 7, 7, 7, 7, 2), (7,)),
        ((1, 7, 8, 7, 8, 7, 9, 7, 8, 2), (7, 8)),
        ((1, 2, 3), (1, 2, 3)),
    ],
)
def test_the_inner_loop_is_between_two_visits_of_one_block(path, loop):
    assert arm_analysis.inner_loop(path) == loop


def test_instructions_are_counted_by_function():
    run = arm_analysis.Run()
    run.blocks = {0x10: LOOP, 0x20: LOOP[:1], 0x30: LOOP}
    run.functions = {0x10: "multiply_tile<float>", 0x20: "planar_rows<float>", 0x30: ""}
    run.times.update({0x10: 5, 0x20: 2, 0x30: 100})
    assert run.count("multiply_tile") == (15, 5)
    assert run.count() == (17, 5)


def test_layers_as_the_counting_program_takes_them():
    layers = arm_analysis.network()
    assert len(layers) == 13
    assert layers["block1"] == "32x112x64x3x1"
    assert layers["block12"] == "512x14x1024x3x2"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_a_wheel_for_each_python_and_platform():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheels = project["tool"]["cibuildwheel"]
    assert wheels["build"] == [f"cp3{minor}-*" for minor in range(10, 15)]
    assert project["project"]["requires-python"] == ">=3.10"
    assert wheels["linux"]["archs"] == ["auto64"]
    assert wheels["macos"]["archs"] == ["arm64"]
    tested = [word for word in wheels["test-command"].split() if word.startswith("{project}/")]
    assert tested
    assert all((ROOT / word.removeprefix("{project}/")).exists() for word in tested)
