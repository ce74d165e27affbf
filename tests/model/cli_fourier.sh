#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# fkv-needle calibrates a Fourier profile and answers with it: cli_fourier.sh PROGRAM MODEL_DIR TEXT_FILE
# PYTHON
set -u
program=$1
model=$2
text=$3
python=$4
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
set -e

run() {
    "$program" --model "$model" --text "$text" --threads 2 --context 1024 --json "$@"
}

run --calibrate "$tmp/profile.json" --calibrate-prompts 2 --bins 16 --local 128 >"$tmp/calibrated"
run --profile "$tmp/profile.json" --items 2 >"$tmp/fourier"
run --items 2 >"$tmp/exact"
"$python" -c '
import json, sys
profile, = map(json.loads, open(sys.argv[1]))
fourier, exact = ([json.loads(line) for line in open(name)][-1] for name in sys.argv[2:])
assert 0 < profile["k_fourier_channels"] < profile["channels"], profile
assert 0 < profile["v_fourier_channels"] < profile["channels"], profile
# Most channels of the middle become 16 of some 800 coefficients.
assert fourier["ratio"] > 1.5 * exact["ratio"], (fourier, exact)
assert fourier["dense_bytes"] == exact["dense_bytes"], (fourier, exact)
assert abs(profile["ratio"] - fourier["ratio"]) < 0.2 * fourier["ratio"], (profile, fourier)
assert fourier["byte_accuracy"] > 0.5, fourier
' "$tmp/calibrated" "$tmp/fourier" "$tmp/exact"

# A profile of this model does not fit another geometry.
mkdir "$tmp/model"
cp "$model"/*.json "$model"/*.safetensors "$tmp/model/"
sed 's/"n_layers": *8/"n_layers": 9/' "$tmp/profile.json" >"$tmp/wrong.json"
status=0
run --profile "$tmp/wrong.json" --items 1 2>"$tmp/err" || status=$?
[ $status -eq 2 ]
grep -qF "$tmp/wrong.json" "$tmp/err"
