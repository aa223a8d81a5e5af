#!/usr/bin/env bash
# search_study.py --quick: all its runs, going on after an interruption, the curve's closed form,
# and what a person can do wrong.
#   search_study.sh TRAIN_FASHION SEARCH_STUDY TASK FOLDER_OF_THIS_TEST WORK_FOLDER
set -euo pipefail
train=$1 study=$2 task=$3 here=$4 work=$5
rm -rf "$work"
mkdir -p "$work"
cd "$work"

run() {
  python3 "$study" --task "$task" --quick --program "$train" --data "$here/fashion-mnist" \
    --device cpu --results runs.jsonl -o study.png "$@"
}
fail() {
  echo "FAILED: $*"
  cat "$work"/log*
  exit 1
}

gates="hash topk dselectk comet"
[ "$task" = domains ] || gates="topk dselectk comet"
# shellcheck disable=SC2086
set -- $gates
runs=$(($# * 3 * 2))
run >log1 2>&1 || fail "the study"
[ "$(wc -l <runs.jsonl)" = $runs ] || fail "not $runs runs"
for gate in $gates; do
  for search in sinkhorn swap; do
    grep -q "^\* $gate, $search: " log1 || fail "no sentence for $gate and $search"
  done
done

# Goes on where it was stopped, here in the middle of a line, and ends with the same table.
head -c -30 runs.jsonl >runs.cut && mv runs.cut runs.jsonl
run >log2 2>&1 || fail "going on"
grep -q "^$runs runs, $((runs - 1)) of them in runs.jsonl" log2 || fail "does not go on"
[ "$(wc -l <runs.jsonl)" = $runs ] || fail "not $runs runs after going on"
table() { sed -n '/^best/,/^\*/p' "$1"; }
[ "$(table log1)" = "$(table log2)" ] || fail "another table"

# A file of other settings is not gone on with; a run that fails is shown.
if run --perm-until 0.7 >log3 2>&1 || ! grep -q "until=0.1, not 0.7" log3; then
  fail "takes a file of other settings"
fi
if run --results other.jsonl --data /no/such/folder >log4 2>&1 ||
  ! grep -q "exit status 74" log4; then
  fail "goes on after a failed run"
fi

PYTHONDONTWRITEBYTECODE=1 python3 - "$study" <<'END'
import importlib.util, itertools, sys
spec = importlib.util.spec_from_file_location("study", sys.argv[1])
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)
scores = [.5, .3, .9, .3, .7]
for n in range(1, 6):
    choices = [min(choice) for choice in itertools.combinations(scores, n)]
    assert abs(study.study.expected_best(scores, [-s for s in scores], n) - sum(choices) / len(choices)) < 1e-15, n
first = study.settings_of("domains", "comet", 3, 5)
assert first == study.settings_of("domains", "comet", 3, 5)
assert first.keys() == {"lr", "gamma", "entropy-coeff"}
assert study.settings_of("domains", "topk", 3, 5).keys() == {"lr"}
assert first["lr"] != study.settings_of("domains", "comet", 4, 5)["lr"]
# With search .2 after 2 trials, without .2 after 4: a factor of 2. And the other way round.
fast, slow = [[.4, .2, .2, .1]] * 2, [[.4, .3, .3, .2]] * 2
saved = study.saving("g", "s", fast, slow)
assert "2 trials reach what 4 reach without search, a factor of 2" in saved, saved
lost = study.saving("g", "s", slow, fast)
assert "saves no trials; what 4 trials with it reach, 2 reach without" in lost, lost
assert "higher by 0.1" in lost, lost
assert "saves no trials" in study.saving("g", "s", fast, fast)
END
