#!/usr/bin/env bash
# All that is to be known on a machine with a GPU, in under nine minutes: builds fastsep in place for the Python that
# is there, without a network; runs `pytest -m cuda`, compute-sanitizer's four tools on small problems, and the
# benchmark matrix. Each stage has a time limit. Run again, it goes on with what is missing.
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
failed=0

# What was done for another commit says nothing of this one.
if [[ $(cat "$folder/commit" 2>/dev/null) != "$FASTSEP_COMMIT" ]]; then
  rm -f "$folder"/*.stage "$folder"/rows.jsonl
  echo "$FASTSEP_COMMIT" >"$folder/commit"
fi

# stage NAME SECONDS COMMAND...: within its limit and what is left of the whole. Says in NAME.stage how it went.
stage() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  if grep -qs '^passed' "$folder/$name.stage"; then
    echo "== $name: $(cat "$folder/$name.stage"), before"
    return 0
  fi
  ((limit > total - SECONDS)) && limit=$((total - SECONDS))
  if ((limit < 5)); then
    echo "left out, no time" >"$folder/$name.stage"
  else
    timeout --kill-after=5 "$limit" "$@" >"$folder/$name.log" 2>&1
    status=$?
    case $status in
      0) echo "passed, $((SECONDS - begin)) s" >"$folder/$name.stage" ;;
      3) echo "not finished, $((SECONDS - begin)) s: run again to go on" >"$folder/$name.stage" ;;
      124 | 137) echo "ran out of its $limit s" >"$folder/$name.stage" ;;
      *) echo "FAILED with status $status, $((SECONDS - begin)) s, see $name.log" >"$folder/$name.stage" ;;
    esac
  fi
  echo "== $name: $(cat "$folder/$name.stage")"
  grep -q '^passed' "$folder/$name.stage" || { failed=1 && tail -n 15 "$folder/$name.log" 2>/dev/null; }
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
export python

if ((${#dry[@]})); then
  stage build 60 "$python" -c 'from fastsep import _core'
  stage tests 60 "$python" -m pytest -q -p no:cacheprovider -m cuda --collect-only tests/test_cuda.py
else
  stage build 170 bash -c build
  stage tests 120 "$python" -m pytest -q -p no:cacheprovider --maxfail=20 -m "cuda and not slow" tests/test_cuda.py
fi
for tool in memcheck racecheck synccheck initcheck; do
  if ((${#dry[@]})); then
    stage "$tool" 20 "$python" benchmarks/gpu_matrix.py exercise --dry-run
  elif command -v compute-sanitizer >/dev/null; then
    stage "$tool" 25 bash -c "sanitizer $tool"
  else
    echo "left out, compute-sanitizer was not found" | tee "$folder/$tool.stage"
  fi
done
# The matrix ends by itself in time, and what it has measured stays.
# The kernel for compute capability 9.0 waits on barriers: an error of it may hang. So it is tested in a process of its
# own, and measured only where it passed; the planner takes it only where it was measured.
if ((!${#dry[@]})); then
  stage hopper 60 "$python" -m pytest -q -p no:cacheprovider --maxfail=5 -m cuda tests/test_cuda_hopper.py
  if grep -qs '^passed' "$folder/hopper.stage"; then
    for tool in memcheck racecheck; do
      command -v compute-sanitizer >/dev/null && stage hopper_$tool 25 bash -c "sanitizer $tool --hopper"
    done
    stage hopper_matrix 45 "$python" benchmarks/gpu_matrix.py measure --hopper --seconds 35 "$folder"
  fi
fi
left=$((total - SECONDS - 20))
stage matrix $((left + 5)) "$python" benchmarks/gpu_matrix.py measure "${dry[@]}" --seconds $((left - 10)) "$folder"
"$python" benchmarks/gpu_matrix.py report "${dry[@]}" "$folder" | tee "$folder/table.txt"
exit $failed
