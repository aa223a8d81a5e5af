#!/usr/bin/env bash
# Gets a data set of the examples into ./data without root and without installing anything.
#   examples/get_data.sh fashion
set -euo pipefail

fail() {
  echo "get_data.sh: $1" >&2
  exit "${2:-1}"
}

fashion() {
  local package=dataset-fashion-mnist target=data/fashion-mnist
  if [ -f "$target/train-images-idx3-ubyte.gz" ]; then
    echo "Fashion-MNIST is there already: $target"
  else
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
      fail "needs apt-get and dpkg-deb (Debian or Ubuntu); elsewhere put the four .gz files of https://github.com/zalandoresearch/fashion-mnist into $target"
    mkdir -p data
    local work
    work=$(mktemp -d "$PWD/data/.get_data.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    # apt drops its rights for a download; the folder must be open for its own user.
    chmod 755 "$work"
    echo "Downloading Debian's package $package (31 MB)"
    (cd "$work" && apt-get download -qq "$package" 2>"$work/apt.log") || {
      cat "$work/apt.log" >&2
      fail "apt-get could not download $package; is the network there, and did \`apt-get update\` run?" 74
    }
    dpkg-deb -x "$work/$package"_*.deb "$work/files"
    mkdir -p "$target"
    mv "$work"/files/usr/share/datasets/fashion-mnist/*.gz "$target/"
    echo "Unpacked into $target"
  fi
  echo "Source:  Zalando Research, https://github.com/zalandoresearch/fashion-mnist (Debian package $package)"
  echo "Licence: MIT, Copyright 2017 Zalando SE"
  echo "SHA-256:"
  (cd "$target" && sha256sum -- *.gz) | sed 's/^/  /'
}

case "${1:-}" in
  fashion) fashion ;;
  *) fail "usage: examples/get_data.sh fashion" 64 ;;
esac
