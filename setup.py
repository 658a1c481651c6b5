"""Runs CMake for the native module. All that can be said in pyproject.toml is said there."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
# One folder per interpreter, kept between builds: a changed kernel is compiled again, and nothing else.
BUILD = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def find_compiler() -> str:
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    missing = f"The C++ compiler that CXX names, {named}," if named else "A C++ compiler"
    raise SetupError(
        f"{missing} was not found: install g++ (Debian, Ubuntu: apt-get install g++) or clang++, "
        "and set CXX if it goes by another name."
    )


def find_tool(name: str) -> str:
    """CMake or Ninja of the build environment's packages, or of the system."""
    path = shutil.which(
        name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    )
    if path is None:
        raise SetupError(f"{name} was not found: pip install {name}")
    return path


def find_pybind11() -> list[str]:
    """Nothing where it is not installed: then cmake/BundledPybind11.cmake knows of other headers."""
    try:
        import pybind11
    except ImportError:
        return []
    return [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        find_compiler()
        cmake = find_tool("cmake")
        configure = [cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja"]
        # The tools may lie in an environment that lives for this build only: name them anew each time.
        configure += [f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [*find_pybind11(), *os.environ.get("CMAKE_ARGS", "").split()]
        for command in (
            configure,
            [cmake, "--build", BUILD],
            [cmake, "--install", BUILD, "--prefix", Path(self.build_lib).resolve()],
        ):
            subprocess.run(command, check=True)


class FreshBuildPy(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # what was deleted from the sources must not stay in the package
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("fastsep._core", [])], cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuildPy}
)
