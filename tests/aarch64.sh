#!/usr/bin/env bash
# The Python side on 64-bit ARM, under emulation on x86-64 Debian or Ubuntu: tests/aarch64.sh [FOLDER [TEST...]]
#
# Into FOLDER (build/aarch64-python, kept for the next time) go Debian's arm64 Python, the aarch64 wheels of torch and
# of what the tests need, and the wheel of this checkout, cross-compiled. Then pytest runs TESTs, by default those of
# the layer and its operator, and some of its gradients. It fails where the kernels for NEON are not there. It needs
# python3.11, g++-aarch64-linux-gnu and qemu-user-static, and no root.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(realpath -m "${1:-build/aarch64-python}")
tests=("${@:2}")
if ((${#tests[@]} == 0)); then
  gradients=tests/test_backward_operators.py
  tests=(tests/test_forward.py tests/test_module.py $gradients::test_gradient_may_lie_anywhere
    $gradients::test_operator_gives_what_is_needed)
fi
# The newest torch whose aarch64 wheel is for the CPU alone, and all that is needed beside it: left to itself, pip would
# go by this machine's processor and fetch CUDA.
packages=(torch==2.10.0 filelock fsspec jinja2 markupsafe "mpmath<1.4" networkx sympy typing-extensions
  numpy rich markdown-it-py mdurl pygments
  expecttest hypothesis sortedcontainers pytest iniconfig packaging pluggy)

for tool in python3.11 aarch64-linux-gnu-g++ qemu-aarch64-static apt-get dpkg-deb; do
  command -v "$tool" >/dev/null || { echo "$tool was not found" >&2; exit 2; }
done

# An apt of its own: this machine's packages and architectures stay as they are.
unpack_python() {
  local apt=$folder/apt
  mkdir -p "$apt"/{lists/partial,cache/archives/partial} "$folder/sysroot"
  : >"$apt/status"
  cat >"$apt/sources.list" <<'SOURCES'
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main
SOURCES
  cat >"$apt/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures {"arm64";};
APT::Sandbox::User "";
APT::Install-Recommends "false";
Dir::State "$apt";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
CONF
  export APT_CONFIG=$apt/apt.conf
  apt-get update -qq
  apt-get install -qq -y --download-only python3.11 libpython3.11-dev libstdc++6 libgomp1
  unset APT_CONFIG
  for package in "$apt"/cache/archives/*.deb; do dpkg-deb -x "$package" "$folder/sysroot"; done
}

# The versions of the other packages are those of constraints.txt.
constraints() { grep -v '^torch==' constraints.txt; }

wanted() {
  printf '%s\n' "${packages[@]}"
  constraints
}

install_wheels() {
  local platforms=()
  rm -rf "$folder/site"
  constraints >"$folder/constraints.txt"
  for version in 2_28 2_27 2_17 2014; do platforms+=(--platform "manylinux${version/#2_/_2_}_aarch64"); done
  python3.11 -m venv "$folder/host"
  "$folder/host/bin/pip" install -q -c constraints.txt setuptools pybind11 cmake ninja
  "$folder/host/bin/pip" install -q --target "$folder/site" --no-deps --only-binary=:all: \
    -c "$folder/constraints.txt" "${platforms[@]}" \
    --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none "${packages[@]}"
  wanted >"$folder/site/wanted.txt"
}

build_fastsep() {
  local include=$folder/sysroot/usr/include
  rm -rf "$folder/fastsep"
  PATH=$folder/host/bin:$PATH _PYTHON_HOST_PLATFORM=linux-aarch64 CXX=aarch64-linux-gnu-g++ \
    CMAKE_ARGS="-DFASTSEP_CUDA=OFF \
      -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
      -DPython_INCLUDE_DIR=$include/python3.11 -DCMAKE_CXX_FLAGS=-I$include \
      -DPYTHON_MODULE_EXTENSION=.cpython-311-aarch64-linux-gnu.so ${CMAKE_ARGS:-}" \
    "$folder/host/bin/pip" wheel -q --no-build-isolation --no-deps -w "$folder/wheel" .
  python3.11 -m zipfile -e "$folder"/wheel/fastsep-*-linux_aarch64.whl "$folder/fastsep"
}

# Also for the processes that tests start. The processor is one that the emulator has whole: torch's convolutions use
# instructions that its default, all extensions at once, says it has and does not know.
emulated_python() {
  mkdir -p "$folder/bin"
  cat >"$folder/bin/python" <<COMMAND
#!/bin/sh
exec qemu-aarch64-static -cpu neoverse-n1 -L '$folder/sysroot' '$folder/sysroot/usr/bin/python3.11' "\$@"
COMMAND
  chmod +x "$folder/bin/python"
  PATH=$folder/bin:$PATH PYTHONPATH=$folder/fastsep:$folder/site PYTHONDONTWRITEBYTECODE=1 python "$@"
}

begin=$SECONDS
[ -e "$folder/sysroot/usr/bin/python3.11" ] || unpack_python
wanted | cmp -s - "$folder/site/wanted.txt" || install_wheels
echo "Python and its packages: $((SECONDS - begin)) s"
begin=$SECONDS
build_fastsep
echo "fastsep: $((SECONDS - begin)) s"
begin=$SECONDS
emulated_python -c 'import platform, sys, torch, fastsep; from fastsep import _native
print(platform.machine(), "torch", torch.__version__, _native.core.isas())
if "neon" not in _native.core.isas(): sys.exit("the kernels for NEON are missing")'
echo "import: $((SECONDS - begin)) s"
begin=$SECONDS
emulated_python -m pytest -p no:cacheprovider "${tests[@]}"
echo "tests: $((SECONDS - begin)) s"
