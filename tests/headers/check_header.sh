#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The public header must be complete in itself and valid in every language that includes it.
# Usage: check_header.sh INCLUDE_DIR
set -u
include=$1
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
count=0
failed=0

# report RESULT NAME
report() {
    count=$((count + 1))
    if [ "$1" -eq 0 ]; then
        echo "ok $count - $2"
    else
        failed=1
        echo "not ok $count - $2"
        sed 's/^/# /' "$tmp/log"
    fi
}

# compiles COMPILER STANDARD LANGUAGE INCLUDE_DIR: a file with nothing but the header, twice
compiles() {
    printf '#include <fkv/fkv.h>\n#include <fkv/fkv.h>\n' >"$tmp/only.src"
    "$1" "-std=$2" -x "$3" -Wall -Wextra -Wpedantic -Werror -fsyntax-only -I"$4" "$tmp/only.src" \
        >"$tmp/log" 2>&1
}

# A header with an extension in it, to see that the check can fail.
mkdir -p "$tmp/bad/fkv"
{
    cat "$include/fkv/fkv.h"
    echo 'typedef struct fkv_bad { int fkv_none[0]; } fkv_bad;'
} >"$tmp/bad/fkv/fkv.h"

for pair in gcc:g++ clang:clang++; do
    c=${pair%:*}
    cxx=${pair#*:}
    for standard in c99 c11; do
        if ! command -v "$c" >/dev/null; then
            count=$((count + 1))
            echo "ok $count - $c $standard # SKIP no $c"
            continue
        fi
        compiles "$c" "$standard" c "$include"
        report $? "$c $standard"
        ! compiles "$c" "$standard" c "$tmp/bad"
        report $? "$c $standard refuses an extension"
    done
    # clang++ may be installed without a C++ library, then it has no <cstddef> either
    if ! command -v "$cxx" >/dev/null ||
        ! echo '#include <cstddef>' | "$cxx" -x c++ -fsyntax-only - 2>/dev/null; then
        count=$((count + 1))
        echo "ok $count - $cxx c++17 # SKIP no $cxx"
        continue
    fi
    compiles "$cxx" c++17 c++ "$include"
    report $? "$cxx c++17"
    ! compiles "$cxx" c++17 c++ "$tmp/bad"
    report $? "$cxx c++17 refuses an extension"
    # The names must link from C++.
    echo '#include <fkv/fkv.h>
    unsigned use() { return fkv_abi_version(); }' >"$tmp/use.cpp"
    "$cxx" -std=c++17 -c -I"$include" -o "$tmp/use.o" "$tmp/use.cpp" >"$tmp/log" 2>&1 &&
        nm "$tmp/use.o" | grep -q ' U fkv_abi_version$'
    report $? "$cxx names are C names"
done
exit $failed
