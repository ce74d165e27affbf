#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: check_header.sh INCLUDE_DIR
# The bindings are those of the header, by two checks: what bindgen makes of it, and what the C compiler
# says of layouts and values. Both must notice an altered header. Environment as for test.sh.
set -u
include=$(cd "$1" && pwd) || exit 1
here=$(cd "$(dirname "$0")" && pwd) || exit 1
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
mkdir "$tmp/fkv"
count=0
failed=0

# report RESULT WHAT
report() {
    count=$((count + 1))
    case $1 in
    0) echo "ok $count - $2" ;;
    77) echo "ok $count - $2 # SKIP there is no bindgen 0.60.1" ;;
    *)
        failed=1
        echo "not ok $count - $2"
        sed 's/^/# /' "$tmp/log"
        ;;
    esac
}

bindgen() {
    sh "$here/regenerate.sh" --check "$1" >"$tmp/log" 2>&1
}

layout() {
    sh "$here/check_layout.sh" "$1" >"$tmp/log" 2>&1
}

# What a check that must fail for an altered header returned: 0 if it did, 77 if it could not tell.
must_fail() {
    case $1 in
    0) return 1 ;;
    77) return 77 ;;
    *) return 0 ;;
    esac
}

# altered WHAT SED_SCRIPT
altered() {
    sed "$2" "$include/fkv/fkv.h" >"$tmp/fkv/fkv.h"
    if cmp -s "$include/fkv/fkv.h" "$tmp/fkv/fkv.h"; then
        echo "the header has no such line" >"$tmp/log"
        report 1 "$1"
        return
    fi
    bindgen "$tmp"
    must_fail $?
    report $? "bindgen notices $1"
    # The test must have run and found a difference; that cargo fails is not enough.
    layout "$tmp"
    must_fail $? && grep -q 'layouts_and_values_are_those_of_the_header' "$tmp/log"
    report $? "the layout test notices $1"
}

bindgen "$include"
report $? "bindgen makes these bindings of the header"
layout "$include"
report $? "the C compiler finds these layouts and values"
# Altered copies must fail for what was altered, not because copies do.
cp "$include/fkv/fkv.h" "$tmp/fkv/fkv.h"
bindgen "$tmp"
report $? "bindgen makes the same of a copy"
layout "$tmp"
report $? "the C compiler finds the same in a copy"
altered "a field of another type" 's/^    int32_t bins;/    int64_t bins;/'
altered "a field in the middle" 's/^    int64_t period;/    int64_t extra;\n    int64_t period;/'
altered "a field at the end" 's/^    double ratio;/    double ratio;\n    double extra;/'
altered "a renamed field" 's/^    int32_t n_sink;/    int32_t n_sinks;/'
altered "another value of a constant" 's/FKV_ERR_BUSY = -14/FKV_ERR_BUSY = -16/'
exit $failed
