#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# fkv-bench on shapes so small that its numbers mean nothing: that it runs, that what it times is right
# by its own comparison with float64, and how it answers wrong usage. Usage: bench.sh FKV-BENCH
set -u
bench=$1
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
count=0
failed=0

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

# What holds for every result: two checked variants, and something coded if it was asked for.
sound='
import json, sys
r = json.load(open(sys.argv[1]))
for name in "dense", "asked":
    v = r[name]
    assert v["seconds"] > 0 and v["bytes"] > 0, name
    assert 0 < v["max_output"] and 0 <= v["max_error"] <= v["tolerance"] < v["max_output"], v
assert r["dense"]["tokens_coded"] == 0
assert (r["asked"]["tokens_coded"] > 0) == (r["profile"] != "exact"), r
assert r["profile"] == "exact" or r["asked"]["bytes"] < r["dense"]["bytes"], r
'

# runs NAME OPTION ...
runs() {
    name=$1
    shift
    "$bench" --json --tokens 2600 --hq 4 --hk 2 --dim 32 --repeats 3 --threads 2 "$@" \
        >"$tmp/json" 2>"$tmp/log" && python3 -c "$sound" "$tmp/json" 2>>"$tmp/log"
    report $? "$name"
}

runs "attend, exact" --profile exact
runs "attend, coded" --profile fourier:0.9:32
runs "attend, coded, a batch in bf16" --profile fourier:0.9:32 --batch 3 --storage bf16
runs "attend, calibrated" --profile coded:1
runs "attend, calibrated, a batch in bf16" --profile coded:1.5 --batch 3 --storage bf16
runs "attend, uniform" --profile uniform:3 --cpu reference
runs "append, calibrated" --op append --profile coded:1
runs "append, exact" --op append --profile exact --storage f32
"$bench" --json --op append --index --profile exact --tokens 2600 --hq 4 --hk 2 --dim 32 \
    --repeats 3 --threads 2 >"$tmp/json" 2>"$tmp/log" && python3 -c '
import json, sys
r = json.load(open(sys.argv[1]))
assert r["asked"]["bytes"] > 1.2 * r["dense"]["bytes"], r' "$tmp/json" 2>>"$tmp/log"
report $? "append, exact with an index"
runs "append, coded" --op append --profile fourier:0.9:32 --cpu reference

for wrong in --nothing --tokens "--tokens x" "--hq 3 --hk 2" "--profile fourier:2" \
    "--profile coded:9" "--profile uniform:5" --index "--index --profile exact"; do
    # shellcheck disable=SC2086
    "$bench" $wrong >"$tmp/log" 2>&1
    [ $? -eq 2 ]
    report $? "status 2 for $wrong"
done
"$bench" --profile "$tmp/none" >"$tmp/log" 2>&1
[ $? -eq 1 ] && grep -q "$tmp/none" "$tmp/log"
report $? "a file that is not there is named"
exit $failed
