"""What is built and shipped: symbols, the wheel, the commands of the documents."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from commands import ROOT, run

from fastsep import _native
from fastsep._networks import import_library

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")
elf_only = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF objects")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the checkout. Its build leaves the object files in the checkout's build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    result = run(f"python -m pip wheel --no-build-isolation --no-deps -w '{folder}' .")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


def objects():
    """The object file of each instruction set's kernels that the build of the wheel left."""
    build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder = build / "CMakeFiles" / "fastsep_core.dir" / "csrc" / "cpu"
    return {isa: folder / f"{isa}.cpp.o" for isa in _native.core.compiled_isas()}


def symbols(path, *options):
    """(type, name) of each symbol that nm lists."""
    listing = subprocess.run(["nm", *options, path], check=True, capture_output=True, text=True).stdout
    return {tuple(line[17:].split(" ", 1)) for line in listing.splitlines()}


@needs_native
@elf_only
def test_kernels_share_nothing_with_the_linker(wheel):
    """Code that was compiled for one instruction set must not end up where all processors run it.

    The linker keeps one copy of an inline function for the whole program, whichever file it comes from. So an
    object of an instruction set defines nothing that is visible outside but its table of kernels.
    """
    for isa, path in objects().items():
        kernels = {name for name in _native.core.kernels() if name.endswith(f"_{isa}")}
        defined = {(kind, name) for kind, name in symbols(path, "--defined-only", "-C") if kind not in "trdb"}
        assert {name for _, name in defined} == {f"fastsep::{name}" for name in kernels}
        assert {kind for kind, _ in defined} <= {"D", "R"}, f"{isa}: {defined}"


@needs_native
@elf_only
def test_kernels_call_no_cpp_from_outside(wheel):
    """Functions of the C library at most, which no header defines inline."""
    for isa, path in objects().items():
        needed = {name for _, name in symbols(path, "--undefined-only")}
        assert not [name for name in needed if name.startswith("_Z")], f"{isa} calls {needed}"


@needs_native
@elf_only
def test_kernels_run_no_code_when_loaded(wheel):
    for isa, path in objects().items():
        sections = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True).stdout
        assert ".text" in sections
        assert not re.search(r"\.(init_array|ctors|preinit_array)", sections), (
            f"{isa} has static initialisers"
        )


def test_the_native_code_knows_nothing_of_torch():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    for path in sources:
        includes = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text(encoding="utf-8"))
        assert not [name for name in includes if re.match(r"(torch|ATen|c10|caffe2)\b", name)], path


def test_setup_never_imports_torch():
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "torch" not in source
    assert len(source.splitlines()) < 80


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        (metadata,) = (name for name in files if name.endswith("METADATA"))
        requirements = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", archive.read(metadata).decode(), re.M)
    assert set(requirements) == {"torch", "numpy", "rich"}
    package = {name for name in files if not name.split("/")[0].endswith(".dist-info")}
    sources = {
        str(path.relative_to(ROOT))
        for folder in (
            ROOT / "fastsep" / name for name in ("", "_optimize", "bench", "bench/shapes", "models")
        )
        for pattern in ("*.py", "*.pyi", "*.txt", "*.json", "py.typed")
        for path in folder.glob(pattern)
    }
    assert "fastsep/bench/shapes/mobilenet_v1.txt" in sources
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    modules = {f"fastsep/_core{suffix}", f"fastsep/_cuda{suffix}"}  # the second where a CUDA compiler is
    assert f"fastsep/_core{suffix}" in package
    assert package - modules == sources
    assert [name for name in files if name.endswith("licenses/LICENSE")]


def test_source_distribution_contents(tmp_path):
    """All that a build needs, the tests as well, and the layers as files instead of a link."""
    result = run(f"python setup.py -q sdist -d '{tmp_path}'")
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "constraints.txt", "LICENSE"} <= files
    assert {str(source.relative_to(ROOT)) for source in (ROOT / "csrc").rglob("*.*")} <= files
    assert {"tests/cases.txt", "fastsep/bench/shapes/other.txt"} <= files
    assert not [name for name in files if name.endswith((".so", ".pyc"))]


@needs_native
def test_the_wheel_runs_by_itself(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    result = run(
        "python -m fastsep bench --network other --seconds 0", cwd=tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    where = run("python -c 'import fastsep; print(fastsep.__file__)'", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert where.stdout.strip() == str(tmp_path / "fastsep" / "__init__.py")


@pytest.mark.parametrize(
    ("environment", "subject"),
    [
        ({"CXX": "/nonexistent/c++"}, "The C++ compiler that CXX names, /nonexistent/c++,"),
        ({}, "A C++ compiler"),
    ],
)
def test_a_missing_compiler_is_one_sentence(environment, subject, tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            tmp_path / "lib",
            "--build-temp",
            tmp_path / "temp",
        ],
        cwd=ROOT,
        env={"PATH": "/nonexistent", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert result.stderr == (
        f"error: {subject} was not found: install g++ (Debian, Ubuntu: apt-get install g++) or clang++, "
        "and set CXX if it goes by another name.\n"
    )


def commands(document):
    """The lines of a Markdown file's shell examples."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("README.md") + commands("benchmarks/README.md"))
def test_each_command_of_the_readme_runs(command):
    runners = [ROOT / ".ci" / "run", ROOT / "tests" / "test_examples.py"]
    if not any(command in path.read_text(encoding="utf-8") for path in runners):
        assert run(command).returncode == 0


def test_the_readme_shows_the_results():
    assert run("python benchmarks/update_readme.py --check").returncode == 0


def test_the_examples_of_the_readme():
    import_library("torchvision")
    examples = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_files_named_in_the_documents_exist():
    text = "".join(
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
    )
    names = set(re.findall(r"`((?:csrc|fastsep|tests|benchmarks|examples|\.ci)/[\w./]+)`", text))
    assert names
    assert [name for name in names if not Path(ROOT, name).exists()] == []
