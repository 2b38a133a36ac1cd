#!/usr/bin/env bash
# gpu.sh PYTHON cuda|cpu FOLDER [flags of benchmarks.gpu]: what `make gpu` runs. The tests
# that say something about a GPU, then its times; a summary of both last.
set -uo pipefail
python=$1 platform=$2 out=$3
shift 3
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=$PWD
if [[ $platform == cuda ]]; then
  export JAX_PLATFORMS=cuda,cpu
  workers=12
else
  export JAX_PLATFORMS=cpu
  workers=2
  set -- --platform=cpu --quick "$@"
fi

tests=()
for name in gpu_way step losses sae grid sparsity matmul optim noise reader fit batches \
  checkpoint lm_decoder lm_families; do
  tests+=("tests/test_$name.py")
done
# pytest-benchmark, where it is installed, warns beside xdist, and warnings are errors.
# Programs of a test run once: the fastest way to a product need not be searched for.
timeout --signal=INT --kill-after=20 170 \
  env XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_autotune_level=0 \
  "$python" -m pytest -q -p no:benchmark --numprocesses=$workers --dist=worksteal \
  --tb=short --durations=15 "${tests[@]}" >"$out/tests.log" 2>&1
tested=$?
"$python" -m benchmarks.gpu --out="$out/gpu.json" "$@" >"$out/gpu.md" 2>"$out/gpu.log"
timed=$?

grep -E '^(FAILED|ERROR)' "$out/tests.log" | cut -c1-160 | head -n 30
tail -n 1 "$out/tests.log"
[[ $timed == 0 ]] || tail -n 5 "$out/gpu.log"
cat "$out/gpu.md"
exit $((tested + timed))
