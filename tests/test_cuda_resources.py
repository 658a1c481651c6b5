"""benchmarks/cuda_resources.py, on what compilers have said."""

import sys

import pytest
from commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_resources

GOOD = """\
[3/9] Building CUDA object csrc/cuda/CMakeFiles/fastsep_cuda.dir/f16.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN1a6kernelEv' for 'sm_80'
ptxas info    : Function properties for _ZN1a6kernelEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN1a6kernelEv' for 'sm_90a'
ptxas info    : Function properties for _ZN1a6kernelEv
    24 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""
SPILLS = GOOD.replace(
    "24 bytes stack frame, 0 bytes spill stores, 0", "24 bytes stack frame, 8 bytes spill stores, 16"
)
SERIALISED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline in the function '_ZN1a6kernelEv'\n"
)


def judge(tmp_path, capsys, text, allowed="# nothing\n"):
    for name, content in (("build.txt", text), ("allowed.txt", allowed)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    status = cuda_resources.main([str(tmp_path / "build.txt"), "--allowed", str(tmp_path / "allowed.txt")])
    return status, *capsys.readouterr()


def test_kernels_without_spills_pass(tmp_path, capsys):
    status, out, err = judge(tmp_path, capsys, GOOD)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "sm_80: 1 kernels, at most 96 registers, 0 with a stack, 0 with spills",
        "sm_90a: 1 kernels, at most 128 registers, 1 with a stack, 0 with spills",
    ]


@pytest.mark.parametrize(
    ("allowed", "fault"),
    [
        ("", "for sm_90a spills 24 bytes\n"),
        ("kernel sm_80 24\n", "for sm_90a spills 24 bytes\n"),
        ("kernel sm_90a 16  # too little\n", "for sm_90a spills 24 bytes of 16 allowed\n"),
        ("another sm_90a 24\n", "for sm_90a spills 24 bytes\n"),
    ],
)
def test_a_spill_fails(tmp_path, capsys, allowed, fault):
    status, _, err = judge(tmp_path, capsys, SPILLS, allowed)
    assert status == 1
    assert fault in err


def test_an_allowed_spill_passes(tmp_path, capsys):
    assert judge(tmp_path, capsys, SPILLS, "# why\na::kernel|_ZN1a6kernelEv sm_90a 24  # because\n")[0] == 0


def test_an_allowance_that_is_not_needed_fails(tmp_path, capsys):
    status, _, err = judge(tmp_path, capsys, GOOD, "kernel sm_90a 24\n")
    assert (status, err) == (1, "kernel for sm_90a spills nothing: take it off the list\n")


def test_serialised_wgmma_fails(tmp_path, capsys):
    status, _, err = judge(tmp_path, capsys, GOOD + SERIALISED)
    assert status == 1
    assert err.startswith("wgmma is serialised: ptxas info    : (C7510)")


def test_a_text_of_no_kernels_is_no_check(tmp_path, capsys):
    assert judge(tmp_path, capsys, "ninja: no work to do.\n")[0] == 2


def test_the_list_in_use_can_be_read():
    cuda_resources.allowances(cuda_resources.ALLOWED.read_text(encoding="utf-8"))
