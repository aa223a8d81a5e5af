# Sourced by examples/train.sh and tests/run.sh: installs what a build needs and this machine lacks.
#   perseid_setup [PACKAGE...]      Debian packages beyond those of every build, such as libgtest-dev
#   perseid_build FOLDER TARGET...  builds with as many jobs as cores and memory allow
#   perseid_mpi_environment         what mpirun needs as root, in containers and on few cores
#   perseid_setup_python            what `import torch` needs beyond LibTorch, for tests of the operations
# It says first what it will install: Debian packages by apt-get, LibTorch into .venv in this folder.
# Nothing else on the machine changes. When all is there it costs nothing; an interrupted
# installation is repaired by the next call. Variables:
#   PERSEID_PYTHON=PATH      the interpreter for .venv, default /usr/bin/python3
#   PERSEID_SKIP_PACKAGES=1  do not look for Debian packages; what they hold is there by other means
# shellcheck shell=bash

perseid_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
perseid_venv=$perseid_root/.venv
perseid_torch=torch==2.11.0
# libtorch_cpu.so of that wheel links these; a CUDA 13 toolkit on the machine has them as well.
perseid_cuda_libraries=(nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85)
# libtorch_cuda.so links these as well, and no toolkit has them: for builds with CUDA.
perseid_gpu_libraries=(nvidia-cusparselt-cu13==0.8.0 nvidia-nvshmem-cu13==3.4.5
  nvidia-cufile==1.15.1.6)
perseid_build_packages=(g++ cmake ninja-build ccache libopenmpi-dev openmpi-bin zlib1g-dev
  libcli11-dev nlohmann-json3-dev dataset-fashion-mnist)

perseid_say() { printf '== %s\n' "$*"; }

perseid_stop() {
  printf 'perseid: %s\n' "$*" >&2
  exit 1
}

perseid_need_disk() { # FOLDER MEGABYTES WHAT
  local free
  free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
  [ "$free" -ge "$2" ] ||
    perseid_stop "$3 takes $2 MB of disk, and $1 has $free MB left; free some and call this again"
}

# ---- Debian packages -----------------------------------------------------------------------------
perseid_missing_packages() { # PACKAGE... : prints those that are not installed
  local installed package
  installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true)
  for package in "$@"; do
    grep -qxF "installed $package" <<<"$installed" || printf '%s\n' "$package"
  done
}

perseid_as_root() {
  local command=(env DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 "$@")
  [ "$(id -u)" = 0 ] || command=(sudo "${command[@]}")
  "${command[@]}"
}

perseid_apt() { perseid_as_root apt-get -q -o DPkg::Lock::Timeout=600 "$@"; }

perseid_apt_failed() { # LOG PACKAGE...
  local log=$1 unknown
  shift
  tail -n 15 "$log" >&2
  unknown=$(sed -n 's/^E: Unable to locate package //p; s/^E: Package .\(.*\). has no installation.*/\1/p' "$log")
  rm -f "$log"
  [ -z "$unknown" ] ||
    perseid_stop "this system offers no package ${unknown//$'\n'/, }; Perseid needs Debian 12 or a system" \
      "like it, and a network that reaches its package archive"
  perseid_stop "apt-get could not install $*; its words stand above. Check the network, then call this" \
    "again: it goes on where it stopped"
}

perseid_install_packages() { # PACKAGE...
  local missing log size
  if ! { command -v apt-get && command -v dpkg-query; } >/dev/null; then
    perseid_stop "this script installs Debian packages, and this system has no apt-get; install by its" \
      "own means what these hold: $*; then call this again with PERSEID_SKIP_PACKAGES=1"
  fi
  mapfile -t missing < <(perseid_missing_packages "$@")
  [ ${#missing[@]} -gt 0 ] || return 0

  perseid_say "missing Debian packages: ${missing[*]}"
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null ||
      perseid_stop "installing packages takes root, and there is no sudo; run as root:" \
        "apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
    perseid_say "installing them with sudo, which may ask for your password"
  fi
  perseid_need_disk /usr 1500 "installing them"
  log=$(mktemp)
  perseid_as_root dpkg --configure -a >"$log" 2>&1 || perseid_apt_failed "$log" "${missing[@]}"
  # Without a network this still succeeds with old lists, or fails below with a better text.
  perseid_apt update >"$log" 2>&1 || cat "$log" >&2
  local install=(install --fix-broken --no-install-recommends "${missing[@]}")
  size=$(perseid_apt "${install[@]}" --assume-no 2>/dev/null |
    sed -n 's/^Need to get \(.*\) of archives.*/\1/p' || true)
  perseid_say "apt-get installs them and what they need: ${size:-an unknown amount} to download, a minute or two"
  perseid_apt "${install[@]}" --assume-yes >"$log" 2>&1 || perseid_apt_failed "$log" "${missing[@]}"
  rm -f "$log"
}

# ---- LibTorch ------------------------------------------------------------------------------------
perseid_torch_library() { # prints the path, or nothing
  local path
  for path in "$perseid_venv"/lib/python3*/site-packages/torch/lib/libtorch_cpu.so; do
    [ -e "$path" ] && printf '%s\n' "$path" && return
  done
}

perseid_torch_lacks() { # [LIBRARY] : prints the libraries that it needs and the loader does not find
  local library
  library=$(perseid_torch_library)
  [ -n "$library" ] || return 0
  env -u LD_LIBRARY_PATH ldd "${library%/*}/${1:-libtorch_cpu.so}" 2>/dev/null |
    awk '/not found/ { print $1 }' | sort -u | xargs
}

# Toolkits are often installed without being on PATH.
if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
  PATH=$PATH:/usr/local/cuda/bin
fi

# A CUDA 13 toolkit with its compiler: the GPU part is built, and needs more of LibTorch.
perseid_has_cuda_toolkit() {
  nvcc --version 2>/dev/null | grep -q 'release 13\.'
}

# The preset of this machine: cuda where the toolkit and LibTorch's GPU part are whole.
perseid_preset() {
  if perseid_has_cuda_toolkit && [ -z "$(perseid_torch_lacks libtorch_cuda.so)" ]; then
    echo cuda
  else
    echo cpu
  fi
}

perseid_has_torch() {
  if perseid_has_cuda_toolkit && [ -n "$(perseid_torch_lacks libtorch_cuda.so)" ] &&
    ! [ -e "$perseid_venv/perseid-no-gpu" ]; then
    return 1
  fi
  [ "$(cat "$perseid_venv/perseid-wheels" 2>/dev/null)" = "$perseid_torch" ] &&
    [ -n "$(perseid_torch_library)" ] && [ -z "$(perseid_torch_lacks)" ]
}

# Python without the user's settings: no user site, PYTHONPATH, conda or active environment.
perseid_python() { # INTERPRETER ARGUMENT...
  env -u PYTHONPATH -u PYTHONHOME -u VIRTUAL_ENV -u CONDA_PREFIX -u PIP_TARGET -u PIP_PREFIX \
    -u PIP_ROOT -u PIP_CONSTRAINT -u PIP_PYTHON -u PIP_REQUIRE_VIRTUALENV PIP_USER=0 \
    TMPDIR="$perseid_venv/tmp" "$1" -I "${@:2}"
}

perseid_make_venv() {
  local python=${PERSEID_PYTHON:-/usr/bin/python3} version
  [ -x "$python" ] ||
    perseid_stop "PERSEID_PYTHON=$python is no program; set it to a python3 of version 3.10 to 3.14"
  version=$("$python" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  case $version in
    3.1[0-4]) ;;
    *) perseid_stop "LibTorch 2.11 has wheels for Python 3.10 to 3.14, and $python is $version; set" \
      "PERSEID_PYTHON to another interpreter" ;;
  esac
  rm -rf "$perseid_venv"
  mkdir -p "$perseid_venv/tmp"
  touch "$perseid_venv/perseid-incomplete"
  perseid_python "$python" -m venv "$perseid_venv" >"$perseid_venv/tmp/log" 2>&1 || {
    cat "$perseid_venv/tmp/log" >&2
    perseid_stop "$python could not make the environment $perseid_venv; if it is not Debian's own," \
      "set PERSEID_PYTHON to one that has the modules venv and ensurepip"
  }
}

perseid_install_torch() {
  local wheels=("$perseid_torch") size=531 quiet=(-q) known lacks
  [ "$(uname -sm)" = "Linux x86_64" ] ||
    perseid_stop "Perseid is built for Linux on x86-64, and this is $(uname -sm); build LibTorch 2.11" \
      "yourself and configure with -DPERSEID_TORCH_DIR=<its folder>"
  known=$(PATH=$PATH:/sbin ldconfig -p)
  if ! { grep -q 'libcudart\.so\.13 ' <<<"$known" && grep -q 'libcupti\.so\.13 ' <<<"$known"; }; then
    wheels+=("${perseid_cuda_libraries[@]}")
    size=544
  fi
  if perseid_has_cuda_toolkit; then
    wheels+=("${perseid_gpu_libraries[@]}")
    size=$((size + 230))
  fi
  perseid_say "LibTorch goes into $perseid_venv: ${wheels[*]}; up to $size MB to download, 1.3 GB on disk"
  perseid_need_disk "$perseid_root" 3000 "LibTorch with its downloads"
  # An environment of ours that was not finished, or one whose interpreter is gone, is made anew.
  if [ -e "$perseid_venv/perseid-incomplete" ] || ! [ -x "$perseid_venv/bin/python" ]; then
    perseid_make_venv
  fi
  mkdir -p "$perseid_venv/tmp"
  [ ! -t 1 ] || quiet=()
  perseid_python "$perseid_venv/bin/python" -m pip "${quiet[@]}" --no-input --disable-pip-version-check \
    install --no-deps --only-binary=:all: "${wheels[@]}" ||
    perseid_stop "pip could not install ${wheels[*]}; its words stand above. Check the network, then" \
      "call this again"
  lacks=$(perseid_torch_lacks)
  [ -z "$lacks" ] ||
    perseid_stop "LibTorch is installed, but the loader does not find: $lacks. Remove $perseid_venv and" \
      "call this again; if that does not help, install the packages that hold them"
  if perseid_has_cuda_toolkit; then
    lacks=$(perseid_torch_lacks libtorch_cuda.so)
    if [ -n "$lacks" ]; then
      perseid_say "LibTorch's GPU part misses $lacks, so Perseid is built without CUDA; install the whole" \
        "CUDA 13 toolkit with cuDNN and NCCL for it"
      touch "$perseid_venv/perseid-no-gpu"
    fi
  fi
  rm -rf "$perseid_venv/tmp" "$perseid_venv/perseid-incomplete"
  printf '%s\n' "$perseid_torch" >"$perseid_venv/perseid-wheels"
}

# ---- Python --------------------------------------------------------------------------------------
perseid_can_import_torch() { perseid_python "$perseid_venv/bin/python" -c 'import torch' 2>/dev/null; }

perseid_wheel_of() { # LIBRARY : prints the wheel that torch 2.11 takes it from
  local part=${1%%.so*}
  case $part in
    libcudnn*) echo nvidia-cudnn-cu13==9.19.0.56 ;;
    libcusparseLt) echo nvidia-cusparselt-cu13==0.8.0 ;;
    libnccl) echo nvidia-nccl-cu13==2.28.9 ;;
    libnvshmem_host) echo nvidia-nvshmem-cu13==3.4.5 ;;
    libcublasLt) echo 'cuda-toolkit[cublas]==13.0.2' ;;
    *) echo "cuda-toolkit[${part#lib}]==13.0.2" ;;
  esac
}

# Little where a CUDA 13 toolkit is on the machine, else up to 2 GB: the wheel of torch links it.
perseid_setup_python() {
  local wheels=(typing-extensions 'sympy>=1.13.3' networkx jinja2 filelock fsspec) lack
  perseid_can_import_torch && return
  for lack in $(perseid_torch_lacks libtorch_python.so); do wheels+=("$(perseid_wheel_of "$lack")"); done
  perseid_say "Python's torch needs in $perseid_venv: ${wheels[*]}"
  perseid_need_disk "$perseid_root" 6000 "what torch needs in Python"
  mkdir -p "$perseid_venv/tmp"
  perseid_python "$perseid_venv/bin/python" -m pip -q --no-input --disable-pip-version-check \
    install --only-binary=:all: "${wheels[@]}" >"$perseid_venv/tmp/log" 2>&1 || {
    cat "$perseid_venv/tmp/log" >&2
    perseid_stop "pip could not install ${wheels[*]}; its words stand above. Check the network, then" \
      "call this again"
  }
  rm -rf "$perseid_venv/tmp"
  perseid_can_import_torch ||
    perseid_stop "$perseid_venv/bin/python cannot import torch after all; call it with -c 'import torch'" \
      "to see why"
}

# ---- What the scripts call -----------------------------------------------------------------------
perseid_setup() { # [PACKAGE...]
  local packages=("${perseid_build_packages[@]}" "$@") start=$SECONDS lock torch=1
  # One set-up at a time in this folder, also when both scripts are started at once.
  exec {lock}<"$perseid_root"
  flock -n "$lock" || { perseid_say "waiting for another set-up in this folder" && flock "$lock"; }
  perseid_has_torch || torch=0
  [ $torch = 1 ] || [ -n "${PERSEID_PYTHON:-}" ] || packages+=(python3-venv)
  [ -n "${PERSEID_SKIP_PACKAGES:-}" ] || perseid_install_packages "${packages[@]}"
  [ $torch = 1 ] || perseid_install_torch
  exec {lock}<&-
  [ $((SECONDS - start)) -lt 3 ] || perseid_say "set-up done in $((SECONDS - start)) s"
}

perseid_build() { # FOLDER TARGET...
  local jobs memory
  # A file with LibTorch's headers takes up to 1.5 GB to compile.
  memory=$(awk '/^MemAvailable/ { print int($2 / 1500000) }' /proc/meminfo)
  jobs=$(nproc)
  [ "$memory" -ge "$jobs" ] || jobs=$((memory > 0 ? memory : 1))
  ninja -C "$1" -j "$jobs" "${@:2}"
}

perseid_mpi_environment() {
  local setting name
  for setting in OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe \
    OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none \
    HWLOC_HIDE_ERRORS=2 OMP_NUM_THREADS=1; do
    name=${setting%%=*}
    [ -n "${!name:-}" ] || export "${setting?}"
  done
}
