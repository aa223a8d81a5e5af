#!/usr/bin/env bash
# Builds everything and runs every test. Installs what is missing first. Where there is a CUDA toolkit
# the GPU part is built, too, and its kernels are run by the emulator; tests that need a GPU are skipped
# without one.
#   bash tests/run.sh                style checks, build, all tests
#   bash tests/run.sh -R gates       only tests whose name matches; further arguments go to ctest
#   bash tests/run.sh --python       also the tests in Python; installs what torch needs there
#   bash tests/run.sh --asan         tests of kernels, comm and plans under Address- and UBSanitizer
#   bash tests/run.sh --tsan         tests of kernels and comm under ThreadSanitizer
set -euo pipefail
cd "$(dirname "$0")/.."
. cmake/setup.sh

preset=
python=0
case ${1:-} in
  --python) python=1 && shift ;;
  --asan | --tsan) preset=${1#--} && shift ;;
  -h | --help) sed -n '2,9s/^# //p' "$0" && exit ;;
esac

perseid_setup libgtest-dev clang-format
sanitized=$preset
preset=${preset:-$(perseid_preset)}
build=build/$preset
[ $python = 0 ] || perseid_setup_python
style=0
if [ -z "$sanitized" ]; then
  perseid_say "style: include directions and formatting"
  .ci/check_includes || style=1
  .ci/check_format || style=1
fi
if [ ! -e "$build/build.ninja" ]; then
  perseid_say "configuring $build"
  cmake --preset "$preset" >/dev/null
fi
perseid_say "building $build"
perseid_build "$build" all
perseid_say "testing"
jobs=$(nproc)  # before the environment of a test says that a rank has one thread
perseid_mpi_environment
tests=0
ctest --preset "$preset" -j "$jobs" "$@" || tests=$?
[ $style = 0 ] || perseid_say "the style checks failed; their lines stand above the build"
exit $((tests ? tests : style))
