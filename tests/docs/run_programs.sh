#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Compiles and runs every C program shown in the documents: run_programs.sh CC LIBDIR DOCUMENT...
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
cc=$1
libdir=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
programs=0
for document in "$@"; do
    awk -v prefix="$work/$(basename "$document" .md)" '
        /^```c$/ { file = prefix "-" ++n ".c"; next }
        /^```/ { file = "" }
        file { print > file }' "$document"
done
for program in "$work"/*.c; do
    $cc -std=c11 -Wall -Wextra -Werror -I"$root/include" "$program" -o "$work/program" \
        -L"$libdir" -lfkv -lm -Wl,-rpath,"$libdir"
    "$work/program"
    programs=$((programs + 1))
done
echo "$programs programs ran"
[ "$programs" -ge "$#" ]
