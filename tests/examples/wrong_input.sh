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

two_ranks=(${mpiexec:+"$mpiexec" -n 2})
# What each rank finds before it meets the others, and what they find together.
data=(--data "$here/fashion-mnist")
expect 64 "{single,hash,oracle,topk,dselectk,comet,dense,all}" "$train" --gate commet
expect 64 "--gate: value hash is not one of" "$train" --task multi --gate hash
expect 64 "--device: value gpu is not one of {auto,cpu,cuda}" "$train" --device gpu
expect 64 "validation_images=256" "$train" "${data[@]}" --validation-images 256
expect 64 "global_batch_size=129" "$train" "${data[@]}" --task multi --global-batch-size 129
for start in "$train" "${two_ranks[*]} $train"; do
  read -ra command <<<"$start"
  expect 74 "examples/get_data.sh fashion" "${command[@]}" --data /no/such/folder
  expect 65 "that its header announces" "${command[@]}" --data "$work/cut"
  expect 64 "global_batch_size=257" "${command[@]}" "${data[@]}" --global-batch-size 257
done
expect 74 "/no/such/folder/x.json" "${two_ranks[@]}" "$train" "${data[@]}" --train-iters 1 \
  --json /no/such/folder/x.json
# Without a GPU, and where there is one it is hidden.
expect 64 "device=cuda cannot be used: " env CUDA_VISIBLE_DEVICES= "${two_ranks[@]}" "$train" \
  --device cuda
expect 64 "needs --perm-search" "$train" --perm-scope per_gate
expect 64 "per_tree needs gates with trees" "$train" --perm-search swap --perm-scope per_tree
expect 64 "search.held_batches=4" "$train" --data "$here/fashion-mnist" --perm-search swap \
  --global-batch-size 100
expect 64 "ep_size=3" "$train" --data "$here/fashion-mnist" --comm local --local-ranks 4 --ep-size 3
expect 0 "Usage" "$train" --help
exit $failed
