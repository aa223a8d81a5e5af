#!/usr/bin/env bash
# perseid-inspect on what train_fashion writes, and on what a person can do wrong.
#   inspect.sh TRAIN_FASHION PERSEID_INSPECT FOLDER_OF_THIS_TEST WORK_FOLDER
set -euo pipefail
train=$1 inspect=$2 here=$3 work=$4
rm -rf "$work"
mkdir -p "$work"

"$train" --data "$here/fashion-mnist" --gate all --seeds 3 5 --global-batch-size 64 --train-iters 9 \
  --num-experts 5 --plain --json "$work/runs.jsonl" >"$work/log" 2>&1
"$inspect" tree --dot "$work/runs.jsonl" --seed 5 >"$work/tree.dot"
grep -q "seed 5.*2 trees, 5 experts, 64 test images" "$work/tree.dot"
[ "$(grep -c "expert [0-4]</b>" "$work/tree.dot")" = 10 ]

failed=0
expect() { # STATUS TEXT ARGUMENT...
  local status=$1 text=$2 got=0
  shift 2
  "$inspect" "$@" >"$work/out" 2>&1 || got=$?
  if [ "$got" != "$status" ] || ! grep -qF -- "$text" "$work/out"; then
    echo "FAILED: $*: status $got, expected $status and \"$text\" in:"
    cat "$work/out"
    failed=1
  fi
}
expect 0 "--dot RUN" --help
expect 64 "subcommand"
expect 64 "--dot is required" tree
expect 74 "/no/such/file" tree --dot /no/such/file
expect 65 "no COMET run of seed 7" tree --dot "$work/runs.jsonl" --seed 7
head -c 300 "$work/runs.jsonl" >"$work/cut.jsonl"
expect 65 "cut.jsonl:1" tree --dot "$work/cut.jsonl"
exit $failed
