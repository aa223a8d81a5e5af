#!/usr/bin/env bash
# The same run in one process and under mpirun at 1, 2 and 4 ranks, also with a rank without images:
# losses and weights after 50 steps must agree. DSelect-k and COMET at 2 ranks, one of them idle; after
# 10 steps searches over the order of experts, with the orders found, sparse experts with their masks,
# and two tasks with a gate each. Each run starts processes that load LibTorch; ranks as threads of one
# process (train_test.cpp, multi_train_test.cpp) cover the other combinations.
#   mpi_equality.sh TRAIN_FASHION MPIEXEC FOLDER_OF_THIS_TEST WORK_FOLDER
set -euo pipefail
train=$1 mpiexec=$2 here=$3 work=$4
rm -rf "$work"
mkdir -p "$work"

steps=50
run() { # NAME DTYPE COMMAND... : a run that writes NAME.json
  local name=$1 dtype=$2
  shift 2
  "$@" --data "$here/fashion-mnist" --global-batch-size 58 --train-iters "$steps" --dtype "$dtype" \
    --lr 1e-3 --threads 1 --dump "$work/$name.$dtype.json" >"$work/$name.log" 2>&1 || {
    echo "failed: $*" >&2
    cat "$work/$name.log" >&2
    exit 1
  }
}

for dtype in float64 float32; do
  run one "$dtype" "$train"
  run local4 "$dtype" "$train" --comm local --local-ranks 4 --idle-ranks 1
  for ranks in 1 2 4; do run "mpi$ranks" "$dtype" "$mpiexec" -n "$ranks" "$train"; done
  run mpi4replicas "$dtype" "$mpiexec" -n 4 "$train" --idle-ranks 1 --ep-size 2
  tolerance=1e-12 kind=max
  # Replicas of an expert add up partial sums. Adam divides a gradient by its size, so where it is
  # nearly 0 a float32 rounding error becomes a step of that one weight: compare norms.
  [ "$dtype" = float64 ] || tolerance=1e-5 kind=norm
  python3 "$here/compare_dumps.py" max "$tolerance" "$work/one.$dtype.json" \
    "$work"/{local4,mpi1,mpi2,mpi4}."$dtype.json"
  python3 "$here/compare_dumps.py" "$kind" "$tolerance" "$work/one.$dtype.json" \
    "$work/mpi4replicas.$dtype.json"
done

# Gates whose number of experts varies, and a loss of the mean weights of all ranks.
for gate in dselectk comet; do
  run one float64 "$train" --gate "$gate"
  run mpi2idle float64 "$mpiexec" -n 2 "$train" --gate "$gate" --idle-ranks 1
  python3 "$here/compare_dumps.py" max 1e-12 "$work"/{one,mpi2idle}.float64.json
done

# Searches over the order of experts; the orders are part of the dumps.
steps=10
for search in "topk swap shared" "comet swap per_tree" "dselectk sinkhorn shared"; do
  read -r gate kind scope <<<"$search"
  searching=("$train" --gate "$gate" --perm-search "$kind" --perm-scope "$scope" --perm-until 0.5)
  tolerance=1e-12
  # Adam and the temperature of sinkhorn, down to 1e-7, divide gradients that are nearly 0.
  [ "$kind" = swap ] || { searching+=(--adam-eps 1e-4) && tolerance=1e-8; }
  run one float64 "${searching[@]}"
  run mpi2 float64 "$mpiexec" -n 2 "${searching[@]}"
  grep -q permutation_0.expert_map "$work/one.float64.json"
  python3 "$here/compare_dumps.py" max "$tolerance" "$work"/{one,mpi2}.float64.json
done

# Sparse experts; the masks are part of the dumps.
sparse=("$train" --dst rigl --sparsity 0.8 --dst-every 3)
run one float64 "${sparse[@]}"
run mpi2 float64 "$mpiexec" -n 2 "${sparse[@]}"
run mpi2replicas float64 "$mpiexec" -n 2 "${sparse[@]}" --ep-size 1
grep -q "mask of layer 0, expert 7, w1" "$work/one.float64.json"
python3 "$here/compare_dumps.py" max 1e-12 "$work"/{one,mpi2,mpi2replicas}.float64.json

# Two tasks with a gate each.
multi=("$train" --task multi --gate comet)
run multi float64 "${multi[@]}"
run multi.local4 float64 "${multi[@]}" --comm local --local-ranks 4
run multi.mpi2idle float64 "$mpiexec" -n 2 "${multi[@]}" --idle-ranks 1
python3 "$here/compare_dumps.py" max 1e-12 "$work/multi.float64.json" \
  "$work"/multi.{local4,mpi2idle}.float64.json
