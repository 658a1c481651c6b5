"""What can be said of ARM without one: the reading of traces, and the wheels that are to be built."""

import sys

import pytest
from commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import arm_analysis
import arm_trace

LOOP = [("ldr", "q0, [x0], #0x10"), ("fmla", "v1.4s, v0.4s, v2.s[0]"), ("b.ne", "#0x1000")]


def test_only_vector_fmas_count():
    assert arm_trace.fmas_of(LOOP) == 1
    assert arm_trace.fmas_of([("fmla", "v1.2d, v0.2d, v2.2d"), ("fmadd", "s0, s1, s2, s3")]) == 1
    assert arm_trace.fmas_of([("fmul", "v1.4s, v0.4s, v2.4s")]) == 0


@pytest.mark.parametrize(
    ("path", "loop"),
    [
        ((1, 7, 7, 7, 7, 2), (7,)),
        ((1, 7, 8, 7, 8, 7, 9, 7, 8, 2), (7, 8)),
        ((1, 2, 3), (1, 2, 3)),
    ],
)
def test_the_inner_loop_is_between_two_visits_of_one_block(path, loop):
    assert arm_trace.inner_loop(path) == loop


def test_instructions_are_counted_by_function():
    run = arm_trace.Run()
    run.blocks = {0x10: LOOP, 0x20: LOOP[:1], 0x30: LOOP}
    run.functions = {0x10: "multiply_tile<float>", 0x20: "planar_sweep<float>", 0x30: ""}
    run.times.update({0x10: 5, 0x20: 2, 0x30: 100})
    assert run.count("multiply_tile") == (15, 5)
    assert run.count() == (17, 5)


# The program's functions: a kernel, another, and what follows them.
FUNCTIONS = [(0x1000, "multiply_tile<A>"), (0x2000, "planar_sweep<A>"), (0x3000, "")]


def translated(address, *instructions):
    return [
        b"IN: symbol",
        *(
            f"0x{address + 4 * i:08x}:  4f811000  {instruction}".encode()
            for i, instruction in enumerate(instructions)
        ),
        b"",
    ]


def executed(address):
    return f"Trace 0: 0x7f0000000100 [00000000/{address:016x}/00000000/00000000] symbol".encode()


FMLA, LDR = "fmla     v1.4s, v0.4s, v2.s[0]", "ldr      q0, [x0]"


def test_a_log_gives_blocks_and_how_often_they_ran():
    log = [*translated(0x1000, LDR, FMLA), executed(0x1000), executed(0x1000)]
    log += [*translated(0x2000, FMLA, FMLA, "ret      "), executed(0x2000)]
    run = arm_trace.read_log(log, FUNCTIONS)
    assert run.count("multiply_tile") == (4, 2)
    assert run.count("planar_sweep") == (3, 2)
    assert run.blocks[0] == [("ldr", "q0, [x0]"), ("fmla", "v1.4s, v0.4s, v2.s[0]")]
    assert run.calls["multiply_tile<A>"] == {(0,): 2}


@pytest.mark.parametrize(
    ("again", "expected"),
    [
        ([LDR, FMLA], (4, 2)),  # the same: not a listing twice as long
        ([LDR], (3, 1)),  # cut off: what ran before had both
        ([LDR, FMLA, FMLA], (5, 3)),
    ],
)
def test_a_block_that_is_translated_again(again, expected):
    log = [*translated(0x1000, LDR, FMLA), executed(0x1000), *translated(0x1000, *again), executed(0x1000)]
    assert arm_trace.read_log(log, FUNCTIONS).count() == expected


def test_a_translation_that_was_given_up_does_not_count():
    log = [*translated(0x1000, LDR, FMLA, FMLA), *translated(0x1000, LDR), executed(0x1000)]
    assert arm_trace.read_log(log, FUNCTIONS).count() == (1, 0)


@pytest.mark.parametrize(
    ("listing", "accesses"),
    [
        ([("ldr", "q0, [sp, #0x10]")], 1),
        ([("str", "d8, [sp]")], 1),
        ([("stp", "x19, x20, [sp, #-0x50]!")], 1),
        ([("ldr", "w3, [x29, #0x18]")], 1),
        ([("add", "x1, sp, #0x20"), ("ld1", "{v0.4s, v1.4s}, [x1]")], 1),
        ([("add", "x1, sp, #0x20"), ("add", "x2, x1, x3, lsl #2"), ("st1", "{v0.s}[1], [x2], #4")], 1),
        ([("mov", "x9, sp"), ("cmp", "x9, x1"), ("ldrb", "w0, [x9, #1]!"), ("ldr", "x0, [x9]")], 2),
        ([("ldr", "q0, [x0, #0x10]"), ("ld1r", "{v1.4s}, [x1]"), ("fmla", "v1.4s, v0.4s, v2.s[0]")], 0),
        ([("add", "x1, sp, #8"), ("prfm", "pldl1keep, [x1]")], 0),
        # Registers that hold something else by now.
        ([("add", "x1, sp, #8"), ("mov", "x1, x2"), ("ldr", "q0, [x1]")], 0),
        ([("add", "x1, sp, #8"), ("ldr", "x1, [x0]"), ("ldr", "q0, [x1]")], 0),
        ([("add", "x1, sp, #8"), ("mov", "w1, #0"), ("ldr", "q0, [x1]")], 0),
        ([("add", "x29, x0, x1"), ("ldr", "q0, [x29]")], 0),
    ],
)
def test_what_loads_or_stores_on_the_stack(listing, accesses):
    assert sum(arm_trace.stack_accesses(listing)) == accesses


def test_the_stack_of_an_inner_loop_is_told_by_what_ran_before():
    run = arm_trace.Run()
    run.blocks = {
        0: [("stp", "d8, d9, [sp, #-0x10]!"), ("add", "x5, sp, #0x10")],
        1: [("ldr", "q3, [x5]"), ("fmla", "v1.4s, v0.4s, v2.s[0]"), ("b.ne", "#0x1000")],
        2: [("ldp", "d8, d9, [sp], #0x10")],
    }
    assert arm_trace.stack_of_loop(run, (0, 1, 1, 1, 2)) == 1
    run.blocks[1][0] = ("ldr", "q3, [x6]")
    assert arm_trace.stack_of_loop(run, (0, 1, 1, 1, 2)) == 0


def test_a_core_without_a_model_of_its_family_is_not_modelled(monkeypatch):
    """As LLVM 14, which knows the Neoverse cores by name only."""

    def play(mca, core, listing, rounds):
        units = {"cortex-a53": "A53", "apple-m1": "Cy"}.get(core, "A57")
        return f"Total Cycles:      3\n\nResources:\n[0]   - {units}UnitB\n[1.0] - {units}UnitI\n"

    monkeypatch.setattr(arm_analysis, "play", play)
    _, heads, modelled = arm_analysis.headings(sys.executable)
    assert modelled == ["cortex-a53", "cortex-a72", "apple-m1"]
    assert "neoverse-n1\n(by A57)" in heads


def test_each_depthwise_tile_has_a_floor_for_each_core():
    assert set(arm_analysis.FLOORS) == set(arm_trace.DEPTHWISE)
    for kind, floors in arm_analysis.FLOORS.items():
        assert len(floors) == len(arm_analysis.CORES), kind
    assert arm_analysis.least("planar_sweep", "neoverse-n1") == arm_analysis.FLOORS["planar_sweep"][3] / 100
    assert arm_analysis.least("multiply_tile", "neoverse-n1") == 0.9


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
