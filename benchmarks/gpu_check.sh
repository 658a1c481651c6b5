#!/usr/bin/env bash
# All that is to be known on a machine with a GPU, in under nine minutes: builds fastsep in place for the Python that
# is there, without a network; runs `pytest -m cuda`, compute-sanitizer's four tools on small problems, and the
# benchmark matrix; on compute capability 9.0 the kernel for it by itself, too. Each stage has a time limit. Run again,
# it goes on with what is missing.
#
#   benchmarks/gpu_check.sh [--dry-run] FOLDER
#
# FOLDER gets the log of each stage, rows.jsonl, result.json and table.txt, and factors.json, whose contents belong into
# fastsep/cuda_factors.json. --dry-run needs no GPU: it measures tiny layers on the CPU.
set -uo pipefail

dry=()
if [[ ${1:-} == --dry-run ]]; then
  dry=(--dry-run)
  shift
fi
if (($# != 1)); then
  echo "usage: benchmarks/gpu_check.sh [--dry-run] FOLDER" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=$(command -v python || command -v python3)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export FASTSEP_COMMIT=${FASTSEP_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
total=530
reserved=130 # for the matrix and the report, whatever the stages before it take
failed=0

# What was done for another commit says nothing of this one.
if [[ $(cat "$folder/commit" 2>/dev/null) != "$FASTSEP_COMMIT" ]]; then
  rm -f "$folder"/*.stage "$folder"/*.passed "$folder"/rows.jsonl
  echo "$FASTSEP_COMMIT" >"$folder/commit"
fi

# stage NAME SECONDS COMMAND...: within its limit and what is left of the whole. Says in NAME.stage how it went.
stage() {
  local name=$1 limit=$2 begin=$SECONDS status left=$((total - reserved - SECONDS))
  shift 2
  if grep -qs '^passed' "$folder/$name.stage"; then
    echo "== $name: $(cat "$folder/$name.stage"), before"
    return 0
  fi
  ((limit > left)) && limit=$left
  if ((limit < 5)); then
    echo "left out, no time: run again to go on" >"$folder/$name.stage"
  else
    timeout --kill-after=5 "$limit" "$@" >"$folder/$name.log" 2>&1
    status=$?
    case $status in
      0) echo "passed, $((SECONDS - begin)) s" >"$folder/$name.stage" ;;
      3) echo "not finished, $((SECONDS - begin)) s: run again to go on" >"$folder/$name.stage" ;;
      124 | 137) echo "ran out of its $limit s: run again to go on" >"$folder/$name.stage" ;;
      *) echo "FAILED with status $status, $((SECONDS - begin)) s, see $name.log" >"$folder/$name.stage" ;;
    esac
  fi
  echo "== $name: $(cat "$folder/$name.stage")"
  grep -q '^passed' "$folder/$name.stage" || { failed=1 && tail -n 15 "$folder/$name.log" 2>/dev/null; }
}

# What the stages want of the machine, in plain words before any of them fails for the lack of it.
needs() {
  "$python" - <<'EOF'
import importlib.util, shutil, sys
def missing(name, without):
    if importlib.util.find_spec(name) is None:
        print(f"missing for {sys.executable}: {name}, {without}")
missing("torch", "without which nothing here runs")
missing("pytest", "without which the tests are not run")
missing("expecttest", "without which torch.library.opcheck is not run")
missing("rich", "without which the command line is not tested; tables are plain text")
missing("pybind11", "in whose place the build takes the headers that come with torch")
for name, without in (("cmake", "without which nothing is built"), ("nvcc", "without which nothing is built"),
                      ("compute-sanitizer", "without which no sanitizer runs")):
    if shutil.which(name) is None and shutil.which(name, path="/usr/local/cuda/bin") is None:
        print(f"missing: {name}, {without}")
EOF
}

# Straight to CMake: no build environment is made, so nothing is looked for on a network.
build() {
  local folder=build/gpu generator=()
  if ! command -v nvcc >/dev/null && [[ ! -x /usr/local/cuda/bin/nvcc ]]; then
    echo "no nvcc: the modules that lie in fastsep/ are used"
    "$python" -c 'from fastsep import _core, _cuda'
    return
  fi
  command -v ninja >/dev/null && generator=(-G Ninja)
  cmake -S . -B $folder "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DFASTSEP_CUDA=ON \
    -DPython_EXECUTABLE="$python" -DCMAKE_CUDA_FLAGS=-lineinfo &&
    cmake --build $folder --parallel && "$python" -c 'from fastsep import _core, _cuda'
}

sanitizer() {
  local tool=$1
  shift
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" benchmarks/gpu_matrix.py exercise "$@"
}
export -f build sanitizer
export python PATH=$PATH:/usr/local/cuda/bin

# The tests in shares, each of which goes on behind what has passed: those of values, those that compile, the rest.
# tests NAME SECONDS MARKS NAMES FILE...
values="bound or tiling or products or exact or bits or travel or views or no_images or without_kernels or gradients_of"
compiles="compile or opcheck"
tests() {
  local name=$1 limit=$2 marked=$3 chosen=$4 how=(benchmarks/gpu_tests.py "$folder/$1.passed" --maxfail=20)
  shift 4
  ((${#dry[@]})) && how=(-m pytest -q -p no:cacheprovider --collect-only)
  stage "$name" "$limit" "$python" "${how[@]}" -m "$marked" -k "$chosen" "$@"
}

needs
if ((${#dry[@]})); then
  stage build 60 "$python" -c 'from fastsep import _core'
else
  stage build 170 bash -c build
fi
files=(tests/test_cuda.py tests/test_cuda_torch.py tests/test_cuda_errors.py)
tests values 110 "cuda and not slow" "$values" "${files[@]}"
tests behaviour 60 "cuda and not slow" "not ($values) and not ($compiles)" "${files[@]}"
tests compiled 60 "cuda and not slow" "$compiles" "${files[@]}"
tests large 60 "cuda and slow" "" "${files[@]}"
# sanitizers PREFIX SECONDS [--hopper]: each in a stage of its own.
sanitizers() {
  local tool name prefix=$1 limit=$2
  shift 2
  for tool in memcheck racecheck synccheck initcheck; do
    name=$prefix$tool
    if ((${#dry[@]})); then
      stage "$name" 20 "$python" benchmarks/gpu_matrix.py exercise --dry-run "$@"
    elif command -v compute-sanitizer >/dev/null; then
      stage "$name" "$limit" bash -c "sanitizer $tool $*"
    else
      echo "left out, compute-sanitizer was not found" >"$folder/$name.stage"
      echo "== $name: $(cat "$folder/$name.stage")"
      failed=1
    fi
  done
}
sanitizers "" 60

# The kernel for compute capability 9.0 waits on barriers: an error of it may hang, and then ends with an error after 20
# seconds. So it is tested in a process of its own, and measured only where it passed; the planner takes it only where
# it was measured.
if ((${#dry[@]})) || "$python" -c 'import sys, torch; sys.exit(torch.cuda.get_device_capability() != (9, 0))'; then
  tests hopper 60 cuda "" tests/test_cuda_hopper.py
  if grep -qs '^passed' "$folder/hopper.stage"; then
    sanitizers hopper_ 30 --hopper
    stage hopper_matrix 60 "$python" benchmarks/gpu_matrix.py measure --hopper "${dry[@]}" --seconds 45 "$folder"
  fi
else
  echo "left out, the GPU is not of compute capability 9.0" >"$folder/hopper.stage"
  echo "== hopper: $(cat "$folder/hopper.stage")"
fi
# The matrix ends by itself in time, and what it has measured stays. What torch.compile makes takes seconds a cell: it
# comes last, and over several runs.
reserved=10
left=$((total - SECONDS - reserved))
stage matrix "$left" "$python" benchmarks/gpu_matrix.py measure "${dry[@]}" --seconds $((left - 15)) "$folder"
left=$((total - SECONDS - reserved))
stage compare "$left" "$python" benchmarks/gpu_matrix.py measure --compiled "${dry[@]}" --seconds $((left - 25)) "$folder"
"$python" benchmarks/gpu_matrix.py report "${dry[@]}" "$folder" | tee "$folder/table.txt"
exit $failed
