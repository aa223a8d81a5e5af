#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds, runs the tests, the sanitizers and the benchmarks, and
# writes a report. A step that fails or takes too long is reported, and the next one runs.
#   bash tests/gpu.sh              the first part: tests, memcheck, limits and kernels; under 10 minutes
#   bash tests/gpu.sh --full       also racecheck and synccheck, NCCL on two processes, all shapes
#   bash tests/gpu.sh --out DIR    where report.md, results.jsonl and the logs go (default gpu-report)
#   bash tests/gpu.sh --no-build   takes build/cuda as it is
# Without a GPU it builds, says why nothing can run, writes that into the report and ends with 0.
set -euo pipefail
cd "$(dirname "$0")/.."
. cmake/setup.sh

out=gpu-report
full=0
build=1
while [ $# -gt 0 ]; do
  case $1 in
    --full) full=1 ;;
    --no-build) build=0 ;;
    --out) out=${2:?--out needs a folder} && shift ;;
    -h | --help) sed -n '2,9s/^# //p' "$0" && exit ;;
    *) perseid_stop "tests/gpu.sh does not know $1; see --help" ;;
  esac
  shift
done
tree=build/cuda
mkdir -p "$out"
rm -f "$out"/*.log "$out/report.md" "$out/results.jsonl"
failures=0

report() { printf '%s\n' "$*" >>"$out/report.md"; }

# step NAME SECONDS COMMAND...: one line of the report and one log.
step() {
  local name=$1 limit=$2 log status=0 begin=$SECONDS verdict
  shift 2
  log=$out/${name// /-}.log
  timeout -k 10 "$limit" "$@" >"$log" 2>&1 || status=$?
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="stopped after $limit s" ;;
    *) verdict="failed, status $status" ;;
  esac
  if [ $status = 0 ] && grep -q 'needs a GPU: ' "$log"; then
    verdict="skipped: $(sed -n 's/.*needs a GPU: //p' "$log" | head -n 1)"
  fi
  [ $status = 0 ] || failures=$((failures + 1))
  report "| $name | $verdict | $((SECONDS - begin)) |"
  perseid_say "$name: $verdict"
  [ $status = 0 ] || tail -n 20 "$log"
}

bench() { # NAME SECONDS ARGUMENT...: a benchmark whose rows go to results.jsonl
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$tree/examples/perseid-bench" "$@" --json "$out/$name.jsonl.part"
  cat "$out/$name.jsonl.part" >>"$out/results.jsonl" 2>/dev/null || true
  rm -f "$out/$name.jsonl.part"
}

if [ $build = 1 ]; then
  perseid_has_cuda_toolkit || perseid_stop "no CUDA 13 toolkit was found; put its bin folder on PATH"
  perseid_setup libgtest-dev
  [ -e $tree/build.ninja ] || cmake --preset cuda >/dev/null
  perseid_say "building $tree"
  perseid_build $tree gpu_tests perseid-bench
fi
report "# Perseid on a GPU"
report ""
report "Commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%F)."
report ""
if command -v nvidia-smi >/dev/null && nvidia-smi -L >"$out/machine.log" 2>&1; then
  report "Machine: $(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader |
    head -n 1)."
  has_gpu=1
else
  report "**No GPU on this machine: nothing below ran.** What needs none (the kernels' arithmetic, their"
  report "emulation, their static costs) is tested by tests/run.sh."
  has_gpu=0
fi
report ""
report "| step | result | seconds |"
report "|---|---|---|"

perseid_mpi_environment
gpu_tests=$(cd $tree && ctest -N -L gpu | sed -n 's/.*Test *#[0-9]*: //p')
for test in $gpu_tests; do
  step "$test" 180 ctest --test-dir $tree -R "^$test\$" --output-on-failure --verbose
done
if [ $has_gpu = 1 ]; then
  sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer || true)
  if [ -n "$sanitizer" ]; then
    step memcheck 240 "$sanitizer" --tool memcheck --error-exitcode 9 $tree/tests/kernels/kernels_gpu_test
    if [ $full = 1 ]; then
      for tool in racecheck synccheck initcheck; do
        step $tool 900 "$sanitizer" --tool $tool --error-exitcode 9 $tree/tests/kernels/kernels_gpu_test
      done
    fi
  else
    report "| sanitizer | skipped: compute-sanitizer is not installed | 0 |"
  fi
  suite=gpu
  [ $full = 0 ] || suite=gpu-all
  bench limits 60 limits --device cuda
  bench router $((full ? 240 : 120)) router --device cuda --suite $suite
  bench permute $((full ? 300 : 90)) permute --device cuda --suite $suite
  bench combine $((full ? 300 : 90)) combine --device cuda --suite $suite
  bench layer $((full ? 900 : 240)) layer --device cuda --suite $suite
  if [ $full = 1 ]; then
    # Two processes on one GPU: NCCL takes them for two hosts. Slow, it tests function only.
    step "nccl two processes" 240 env NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 bash -c '
      for rank in 0 1; do
        NCCL_HOSTID=rank$rank RANK=$rank LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29517 \
          "$0" exchange --comm nccl --device cuda -b 64K -e 64K & pids+=($!)
      done
      for pid in "${pids[@]}"; do wait "$pid"; done' $tree/examples/perseid-bench
  fi
fi
report ""
report "Logs lie beside this report, the rows of the benchmarks in results.jsonl."
perseid_say "report: $out/report.md"
[ $failures = 0 ] || perseid_stop "$failures steps failed; their logs are in $out"
