#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The command line of fkv-needle: cli.sh PROGRAM MODEL_DIR TEXT_FILE PYTHON
set -u
program=$1
model=$2
text=$3
python=$4
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
failed=0

fail() {
    echo "FAILED: $*" >&2
    failed=1
}

# refuse WHAT THE MESSAGE NAMES, then arguments: exit status 2, nothing on stdout.
refuse() {
    named=$1
    shift
    "$program" --text "$text" --threads 1 "$@" >"$tmp/out" 2>"$tmp/err"
    status=$?
    [ $status -eq 2 ] || fail "$*: exit status $status, not 2"
    grep -qF -e "$named" "$tmp/err" || fail "$*: '$named' is not in: $(cat "$tmp/err")"
    [ ! -s "$tmp/out" ] || fail "$*: wrote to standard output"
}

# copy_model: a fresh copy to spoil, in $tmp/model.
copy_model() {
    rm -rf "$tmp/model"
    mkdir "$tmp/model"
    cp "$model"/*.json "$model"/*.safetensors "$tmp/model/"
}

refuse --colour --colour red
refuse -q -q
refuse surplus surplus
refuse --context --context
refuse '--context many' --context many
refuse '--context -1' --context -1
refuse '--context 1e3' --context 1e3
refuse '--context 99999999999999999999' --context 99999999999999999999
refuse '--items 0' --items 0
refuse '--meter 2' --meter 2
refuse '--meter' --meter 0.5 --longcache
refuse 'calibrated' --meter 0.5 --context 512
refuse '--index' --index --context 512
refuse 'uniform:BITS' --profile uniform:4:64:rot
refuse '--depth nan' --depth nan
refuse '--depth 1.5' --depth 1.5
refuse '--threads 0' --threads 0
refuse '--task sing' --task sing
refuse '--storage f64' --storage f64
refuse '--bins' --bins 64
refuse '--depth' --task text --depth 0.5
refuse '--items' --calibrate "$tmp/profile.json" --items 3
refuse 'too short' --context 256
refuse 'too short' --context 1024 --task multikey
refuse "$tmp/none.json" --profile "$tmp/none.json" --context 512
refuse "$tmp/none.txt" --text "$tmp/none.txt"

refuse "$tmp/none/config.json" --model "$tmp/none"
mkdir "$tmp/empty"
refuse "$tmp/empty/config.json" --model "$tmp/empty"

copy_model
sed -i 's/LlamaForCausalLM/GPT2LMHeadModel/' "$tmp/model/config.json"
refuse GPT2LMHeadModel --model "$tmp/model"
refuse "$tmp/model/config.json" --model "$tmp/model"

copy_model
sed -i 's/"hidden_size": 384/"hidden_size": 400/' "$tmp/model/config.json"
refuse 'model.embed_tokens.weight' --model "$tmp/model"

copy_model
head -c 1000000 "$model/model-00002-of-00002.safetensors" \
    >"$tmp/model/model-00002-of-00002.safetensors"
refuse "$tmp/model/model-00002-of-00002.safetensors: truncated" --model "$tmp/model"

copy_model
cp "$text" "$tmp/model/model-00001-of-00002.safetensors"
refuse "$tmp/model/model-00001-of-00002.safetensors" --model "$tmp/model"

copy_model
rm -f "$tmp/model/fourier.json"
refuse "--calibrate $tmp/model/fourier.json" --model "$tmp/model" --profile fourier --context 512

refuse 'one --profile' --profile exact --profile fourier --chunk 512
refuse 'one --profile' --profile exact --profile uniform:4 --longcache
refuse 'without --depth' --together --depth 0.5
refuse '--chunk or --longcache' --same-text
refuse '--chunk or --longcache' --same-text --task copy --chunk 64
refuse 'at most' $(for i in $(seq 33); do echo --profile exact; done)

"$program" --help >"$tmp/out" || fail "--help: exit status $?"
grep -q 'Usage: fkv-needle' "$tmp/out" || fail "--help: no usage"
"$program" --version >"$tmp/out" || fail "--version: exit status $?"
grep -q '^fkv-needle, libfkv [0-9]' "$tmp/out" || fail "--version: $(cat "$tmp/out")"

# answers NAME, then Python conditions on `items` and `end`, then arguments.
answers() {
    condition=$1
    shift
    "$program" --model "$model" --text "$text" --threads 2 --json "$@" >"$tmp/out" 2>"$tmp/err" ||
        fail "$*: exit status $?: $(cat "$tmp/err")"
    "$python" -c '
import json, sys
*items, end = [json.loads(line) for line in open(sys.argv[1])]
for key in ("exact", "items", "ratio", "kv_bytes", "dense_bytes", "prefill_s",
            "decode_ms_per_token", "peak_rss_bytes"):
    assert key in end, key
assert end["items"] == len(items)
assert eval("(" + sys.argv[2] + ")"), sys.argv[2]
' "$tmp/out" "$condition" || fail "$*: $(cat "$tmp/out")"
}

answers 'end["exact"] >= 0.75 and len(items) == 4' --context 1024
answers 'end["exact"] == 1 and items[0]["answer"] == items[0]["expected"] and
         0.5 < end["ratio"] <= 1 and items[0]["depth"] == 0.25' \
    --context 700 --items 1 --depth 0.25 --distractors 2 --chunk 100 --seed 5
answers 'end["byte_accuracy"] > 0.9 and end["bits_per_byte"] < 1 and 0.25 < end["ratio"] <= 0.5' \
    --task copy --context 700 --items 2 --storage f32
answers '[round(i["depth"], 2) for i in items] == [0.17, 0.5, 0.83, 0.17, 0.5] and end["exact"] >= 0.6 and
         len({i["question"] for i in items}) == 5' \
    --context 1500 --together --distractors 2 --items 5

# What lies before a number is read once, in whole steps of the chunk; with one of the whole length, never.
for chunk in 64 2000; do
    answers 'end["exact"] >= 0.75 and [i["depth"] for i in items] == [0.125, 0.375, 0.625, 0.875]' \
        --context 1500 --same-text --chunk $chunk --logits "$tmp/logits-$chunk"
done
cmp "$tmp/logits-64" "$tmp/logits-2000" || fail "--same-text: the answers depend on what is shared"
answers 'end["exact"] >= 0.5' --task multikey --context 6000 --items 2 --same-text --longcache --scope 6144

answers '0.5 < end["bits_per_byte"] < 3 and end["exact"] is None' \
    --task text --context 400 --items 1 --logits "$tmp/logits"
# 511 tokens of 320 logits.
[ "$(wc -c <"$tmp/logits")" -eq $((511 * 320 * 4)) ] || fail "--logits: wrong size"

# The meter adds what it found; 2 bits cost more than 8.
answers 'end["meter"]["fraction"] == 0.5 and len(end["meter"]["layers"]) == 8 and
         sum(l["blocks"] for l in end["meter"]["layers"]) == end["meter"]["blocks"] > 8 and
         end["meter"]["samples"] == 6 * end["meter"]["blocks"] and
         0.2 < end["meter"]["block_error"] < 2 and 0.01 < end["meter"]["output_error"] < 1' \
    --task text --context 1024 --items 1 --profile uniform:2 --meter 0.5
answers 'end["meter"]["block_error"] < 0.02 and end["meter"]["output_error"] < 0.005' \
    --task text --context 1024 --items 1 --profile uniform:8 --meter 1
"$program" --model "$model" --text "$text" --task text --context 1024 --items 1 --profile uniform:8 \
    --meter 1 >"$tmp/out" 2>"$tmp/err" || fail "--meter: exit status $?: $(cat "$tmp/err")"
[ "$(grep -c '^  \([0-7]\|all\) ' "$tmp/out")" -eq 9 ] || fail "--meter: $(cat "$tmp/out")"

# Several profiles share what is read, and each answers as it does by itself.
for profile in exact uniform:8; do
    "$program" --model "$model" --text "$text" --threads 2 --json --task text --context 1024 --items 2 \
        --profile $profile >>"$tmp/single" 2>"$tmp/err" || fail "$profile: $(cat "$tmp/err")"
done
"$program" --model "$model" --text "$text" --threads 2 --json --task text --context 1024 --items 2 \
    --profile exact --profile uniform:8 >"$tmp/out" 2>"$tmp/err" || fail "two profiles: $(cat "$tmp/err")"
"$python" -c '
import json, sys
single, both = ({(x["profile"], x.get("item")): x for x in map(json.loads, open(path))}
                for path in sys.argv[1:])
assert set(single) == set(both) and len(both) == 6, (single, both)
for key, x in both.items():
    assert x["kv_bytes"] == single[key]["kv_bytes"], x
    assert abs(x["bits_per_byte"] - single[key]["bits_per_byte"]) < 1e-3, x
' "$tmp/single" "$tmp/out" || fail "two profiles: $(cat "$tmp/out")"

# A full disk is an error, too.
if [ -w /dev/full ]; then
    "$program" --model "$model" --text "$text" --context 500 --items 1 --json \
        >/dev/full 2>"$tmp/err" && fail "a full disk went unnoticed"
fi

# Ctrl-C: a clean end with the status that shells expect.
"$program" --model "$model" --text "$text" --items 1000 --context 2048 >"$tmp/out" 2>"$tmp/err" &
sleep 1
kill -INT $!
wait $!
status=$?
[ $status -eq 130 ] || fail "interrupt: exit status $status, not 130"
grep -q 'interrupted' "$tmp/err" || fail "interrupt: $(cat "$tmp/err")"
exit $failed
