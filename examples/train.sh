#!/usr/bin/env bash
# Trains a sparse mixture of experts on Fashion-MNIST, on MPI ranks of this machine. Installs and
# builds what is missing first; later calls start at once. Arguments go to train_fashion:
#   bash examples/train.sh                    top-2 gate, 2 ranks
#   bash examples/train.sh --gate all         every gate, one table
#   PERSEID_RANKS=4 bash examples/train.sh    4 ranks
set -euo pipefail
cd "$(dirname "$0")/.."
. cmake/setup.sh

ranks=${PERSEID_RANKS:-2}
[[ $ranks =~ ^[1-9][0-9]*$ ]] ||
  perseid_stop "PERSEID_RANKS=$ranks is no number of ranks; choose 1 or more"
# shellcheck disable=SC2119  # it takes packages, not our arguments
perseid_setup
if [ ! -e build/release/build.ninja ]; then
  perseid_say "configuring build/release"
  cmake --preset "$(perseid_preset)" -B build/release -DPERSEID_BUILD_TESTS=OFF >/dev/null
fi
perseid_build build/release train_fashion
perseid_mpi_environment
exec mpirun -np "$ranks" build/release/examples/train_fashion "$@"
