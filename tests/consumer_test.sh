#!/usr/bin/env bash
# An installed Perseid serves a project outside the source tree: installs, moves the tree, builds and
# runs examples/consumer against it with no CUDA toolkit in sight, then offers wrong LibTorches.
#   consumer_test.sh SOURCE_FOLDER BUILD_FOLDER TORCH_FOLDER WORK_FOLDER
set -euo pipefail
source=$1 build=$2 torch=$3 work=$4
export PATH=/usr/bin:/bin
unset CUDA_PATH CUDA_HOME CUDACXX CPATH LIBRARY_PATH CMAKE_PREFIX_PATH

fail() {
  printf 'FAILED: %s\n' "$*" >&2
  exit 1
}

rm -rf "$work"
mkdir -p "$work"
cmake --install "$build" --prefix "$work/installed" >"$work/install.log"
mv "$work/installed" "$work/moved"

echo "-- the package names no folder of the build"
for folder in "$source" "$build" "$work/installed" "$torch"; do
  ! grep -rnF "$folder" "$work/moved/lib"*/cmake "$work/moved/include" ||
    fail "the lines above hold $folder"
done

echo "-- each include of an installed header is installed, too"
(cd "$work/moved/include/perseid" && grep -rhoP '^#include "\K[^"]+' . | sort -u) |
  while read -r header; do
    [ -e "$work/moved/include/perseid/$header" ] || fail "$header is included, but not installed"
  done

configure() { # FOLDER ARGUMENT... : configures the consumer, its words in FOLDER.log in one line
  cmake -G Ninja -S "$source/examples/consumer" -B "$work/$1" -DCMAKE_PREFIX_PATH="$work/moved" \
    "${@:2}" >"$work/$1.raw" 2>&1 || return 1
}
words() { tr -s ' \n' ' ' <"$work/$1.raw"; }

echo "-- the consumer builds and runs"
configure consumer -DPERSEID_TORCH_DIR="$torch" || fail "$(cat "$work/consumer.raw")"
ninja -C "$work/consumer"
"$work/consumer/consumer" | tee "$work/consumer.out"
grep -q '^8 tokens through 16 rows of experts, gradient norm ' "$work/consumer.out" ||
  fail "another line was expected"

echo "-- a wrong LibTorch is refused, with both versions and the folder"
wrong=$work/wrong_torch
mkdir -p "$wrong/include/ATen" "$wrong/include/torch/headeronly"
touch "$wrong/include/ATen/ATen.h"
printf '#define TORCH_VERSION_%s\n' "MAJOR 2" "MINOR 10" "PATCH 1" \
  >"$wrong/include/torch/headeronly/version.h"
! configure refused -DPERSEID_TORCH_DIR="$wrong" || fail "LibTorch 2.10.1 was accepted"
words refused | grep -F "Perseid needs LibTorch 2.11, but $wrong is LibTorch 2.10.1; set" ||
  fail "$(cat "$work/refused.raw")"

echo "-- no LibTorch at all"
! configure none || fail "no LibTorch was accepted"
words none | grep -F "Perseid needs LibTorch 2.11 and found none in" ||
  fail "$(cat "$work/none.raw")"
echo "PASSED"
