#!/usr/bin/env bash
# What a person can do wrong on the command line: exit status, one sentence, and no hanging rank.
#   wrong_input.sh TRAIN_FASHION FOLDER_OF_THIS_TEST WORK_FOLDER [MPIEXEC]
set -euo pipefail
train=$1 here=$2 work=$3 mpiexec=${4:-}
rm -rf "$work"
mkdir -p "$work"
failed=0

expect() { # STATUS TEXT COMMAND...
  local status=$1 text=$2 got=0
  shift 2
  timeout 60 "$@" >"$work/log" 2>&1 || got=$?
  if [ "$got" != "$status" ] || ! grep -qF -- "$text" "$work/log"; then
    echo "FAILED: $*: status $got, expected $status and \"$text\" in:"
    cat "$work/log"
    failed=1
  fi
}

cp -r "$here/fashion-mnist" "$work/cut"
head -c 50000 "$here/fashion-mnist/train-images-idx3-ubyte.gz" >"$work/cut/train-images-idx3-ubyte.gz"

for start in "" "${mpiexec:+$mpiexec -n 2}"; do
  # shellcheck disable=SC2086
  expect 64 "{single,hash,oracle,topk,dselectk,comet,dense,all}" $start "$train" --gate commet
  # shellcheck disable=SC2086
  expect 74 "examples/get_data.sh fashion" $start "$train" --data /no/such/folder
  # shellcheck disable=SC2086
  expect 65 "that its header announces" $start "$train" --data "$work/cut"
  # shellcheck disable=SC2086
  expect 64 "global_batch_size=257" $start "$train" --data "$here/fashion-mnist" --global-batch-size 257
  # shellcheck disable=SC2086
  expect 64 "validation_images=256" $start "$train" --data "$here/fashion-mnist" \
    --validation-images 256
  # shellcheck disable=SC2086
  expect 64 "--gate: value hash is not one of" $start "$train" --task multi --gate hash
  # shellcheck disable=SC2086
  expect 64 "global_batch_size=129" $start "$train" --task multi --data "$here/fashion-mnist" \
    --global-batch-size 129
  # shellcheck disable=SC2086
  expect 74 "/no/such/folder/x.json" $start "$train" --data "$here/fashion-mnist" --train-iters 1 \
    --json /no/such/folder/x.json
  # shellcheck disable=SC2086
  expect 64 "--device: value gpu is not one of {auto,cpu,cuda}" $start "$train" --device gpu
  # Without a GPU, and where there is one it is hidden.
  # shellcheck disable=SC2086
  expect 64 "device=cuda cannot be used: " env CUDA_VISIBLE_DEVICES= $start "$train" --device cuda
done
expect 64 "needs --perm-search" "$train" --perm-scope per_gate
expect 64 "per_tree needs gates with trees" "$train" --perm-search swap --perm-scope per_tree
expect 64 "search.held_batches=4" "$train" --data "$here/fashion-mnist" --perm-search swap \
  --global-batch-size 100
expect 64 "ep_size=3" "$train" --data "$here/fashion-mnist" --comm local --local-ranks 4 --ep-size 3
expect 0 "Usage" "$train" --help
exit $failed
