#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: check_layout.sh INCLUDE_DIR LAYOUT.C
# Compiling layout.c is the check; altered copies of the header must not pass it.
set -u
include=$1
layout=$2
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
count=0
failed=0
mkdir "$tmp/fkv"

compiles() {
    ${CC:-cc} -std=c11 -fsyntax-only -I"$1" "$layout" >"$tmp/log" 2>&1
}

report() {
    count=$((count + 1))
    if [ "$1" -eq 0 ]; then
        echo "ok $count - $2"
    else
        failed=1
        echo "not ok $count - $2"
        grep error "$tmp/log" | sed 's/^/# /'
    fi
}

# refuses WHAT SED_SCRIPT
refuses() {
    sed "$2" "$include/fkv/fkv.h" >"$tmp/fkv/fkv.h"
    ! cmp -s "$include/fkv/fkv.h" "$tmp/fkv/fkv.h" && ! compiles "$tmp"
    report $? "$1 is noticed"
}

compiles "$include"
report $? "layout"
# An altered copy must fail for what was altered, not because copies do not compile.
cp "$include/fkv/fkv.h" "$tmp/fkv/fkv.h"
compiles "$tmp"
report $? "an unaltered copy passes"
refuses "a field of another type" 's/^    int32_t bins;/    int64_t bins;/'
refuses "a field in the middle" 's/^    int64_t period;/    int64_t extra;\n    int64_t period;/'
refuses "a field at the end" 's/^    uint64_t bytes_shared;/    uint64_t bytes_shared;\n    double extra;/'
refuses "another value of a constant" 's/FKV_ERR_BUSY = -14/FKV_ERR_BUSY = -16/'
exit $failed
