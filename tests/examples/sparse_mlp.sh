#!/usr/bin/env bash
# sparse_mlp: every method in one table, random search, what a person can do wrong; its study and that of
# sparse experts in train_fashion, going on after an interruption.
#   sparse_mlp.sh SPARSE_MLP TRAIN_FASHION EXAMPLES FOLDER_OF_THIS_TEST WORK_FOLDER
set -euo pipefail
mlp=$1 train=$2 examples=$3 here=$4 work=$5
rm -rf "$work"
mkdir -p "$work"
cd "$work"

fail() {
  echo "FAILED: $*"
  cat "$work"/log*
  exit 1
}
small=(--epochs 2 --train-images 120 --test-images 50 --data "$here/fashion-mnist")

"$mlp" --dst all "${small[@]}" --json all.jsonl >log 2>&1 || fail "all methods"
for method in static set rigl srigl sampled neuron topkast nm_dst srste mdgf_lin mdgf_exp sdgf_step \
  small_dense dense; do
  grep -q "^| $method " log || fail "no row for $method"
done
[ "$(wc -l <all.jsonl)" = 14 ] || fail "not 14 runs in all.jsonl"
# The published numbers of weights.
grep -q "^| set .*81,492" log || fail "not the budget of SET"
grep -q "^| nm_dst .*349,250" log || fail "not 1 of 8"

"$mlp" --dst static --random-masks 3 "${small[@]}" >log2 2>&1 || fail "random search"
grep -q "^random search: 3 static masks in .* is the best on the validation images" log2 ||
  fail "no sentence of the random search"

refused() { # TEXT FLAGS...
  local text=$1
  shift
  if "$mlp" --epochs 1 "$@" >log3 2>&1 || ! grep -qF -- "$text" log3; then fail "$*: $text"; fi
}
data=(--data "$here/fashion-mnist")
refused "random_masks=2 needs --dst static" --train-images 120 --test-images 50 "${data[@]}" \
  --dst set --random-masks 2
refused "--dst: value sett is not one of {static,set," --dst sett
refused "train_images=256 and 256 for validation are more than the 256" --train-images 256 \
  --test-images 50 "${data[@]}"
refused "test_images=9999 is more than the" --train-images 100 --test-images 9999 "${data[@]}"
refused "train_images=39 is less than a batch of 40" --train-images 39 --test-images 50 "${data[@]}"
refused "examples/get_data.sh fashion" --data /no/such/folder

study=(python3 "$examples/sparse_mlp/study.py" --program "$mlp" --methods static set --seeds 2
  --masks 2 "${small[@]}" --results study.jsonl -o study.png)
"${study[@]}" >log4 2>&1 || fail "the study"
head -c -30 study.jsonl >study.cut && mv study.cut study.jsonl
"${study[@]}" >log5 2>&1 || fail "going on with the study"
grep -q "^4 runs, 3 of them in study.jsonl" log5 || fail "the study does not go on"
grep -q "^best of 2 static  81,492" log5 || fail "no row of the random search"
grep -q "^\* set .* static: .* points on all test images" log5 || fail "no comparison with static"

python3 "$examples/train_fashion/sparse_study.py" --part experts --quick --program "$train" \
  --data "$here/fashion-mnist" --results experts.jsonl >log6 2>&1 || fail "the study of experts"
[ "$(wc -l <experts.jsonl)" = 4 ] || fail "not 4 runs in experts.jsonl"
[ "$(grep -c "^8 experts of .*  406,528 " log6)" = 4 ] || fail "not all have the same non-zeros"
