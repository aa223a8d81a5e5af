#!/usr/bin/env bash
# nvcc_report.sh COMMAND...: runs a compilation by nvcc, with ccache or without, and keeps ptxas's
# report of registers, shared memory and spills as OBJECT.ptxas, for .ci/check_ptxas. All else that
# the compiler says goes through. CMake calls it, see PerseidOptions.cmake.
set -uo pipefail
object=
previous=
for argument; do
  [ "$previous" != -o ] || object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
"$@" -Xptxas=-v 2>"$log" || status=$?
rm -f "$object.ptxas"
# ptxas indents what follows "Function properties".
awk -v report="$object.ptxas.part" '
  /^ptxas info/ || (is_report && /^ /) { print > report; is_report = 1; next }
  { is_report = 0; print }
' "$log" >&2
if [ $status = 0 ] && [ -e "$object.ptxas.part" ]; then
  mv "$object.ptxas.part" "$object.ptxas"
fi
rm -f "$object.ptxas.part"
exit $status
