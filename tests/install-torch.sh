# shellcheck shell=sh
# SPDX-License-Identifier: Apache-2.0
# Sourced by tests/run.sh:
#     install_torch PYTHON FOLDER
# puts torch, transformers and kvpress into FOLDER/newest, and the oldest transformers that is supported into
# FOLDER/oldest, for PYTHONPATH. Returns 1, and says why in $torch_missing, if that cannot be had: too little room on
# the disk, or not there within FKV_TORCH_SECONDS (900).
#
# torch as PyPI has it is made for CUDA, and its libraries must be there to be loaded, GPU or not. What is left out is
# what only a GPU needs while it works: triton, the solver, the bindings. So 4.6 GB are unpacked instead of 5.6.

torch_megabytes=9000 # what is unpacked, and the packages while they are

# What the packages in a folder need, but for those that are there and those that nothing here needs
needed_beside() {
    PYTHONPATH=$2 "$1" - torch accelerate kvpress <<'END'
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {'torch', 'accelerate', 'transformers', 'triton', 'cuda-bindings'}
for package in sys.argv[1:]:
    for text in requires(package) or []:
        needed = Requirement(text)
        if needed.name in LEFT_OUT or needed.marker and not needed.marker.evaluate({'extra': ''}):
            continue
        needed.marker = None
        needed.extras -= {'cusolver', 'nvtx'}
        print(needed)
END
}

# put_packages FOLDER ARGUMENT ..: within what is left of the time
put_packages() {
    into=$1
    shift
    left=$((torch_until - $(date +%s)))
    [ "$left" -gt 0 ] && TMPDIR=$torch_folder/part timeout "$left" "$torch_python" -m pip install -q \
        --no-cache-dir --disable-pip-version-check --no-warn-conflicts --target "$into" "$@" 2>"$torch_folder/pip.log"
}

fetch_torch() {
    newest=$torch_folder/newest
    put_packages "$newest" --no-deps torch 'kvpress == 0.5.2' accelerate &&
        needed_beside "$torch_python" "$newest" >"$torch_folder/needed.txt" &&
        put_packages "$newest" --upgrade -r "$torch_folder/needed.txt" 'transformers >= 5.0, < 6' &&
        put_packages "$torch_folder/oldest" 'transformers == 5.0.*'
}

install_torch() {
    torch_python=$1 torch_folder=$2 torch_missing=
    begin=$(date +%s)
    torch_until=$((begin + ${FKV_TORCH_SECONDS:-900}))
    rm -rf "$torch_folder"
    mkdir -p "$torch_folder/part"
    free=$(($(df -Pk "$torch_folder" | awk 'NR == 2 { print $4 }') / 1024))
    if [ "$free" -lt "$torch_megabytes" ]; then
        torch_missing="$free MB are free, $torch_megabytes are needed"
    elif ! fetch_torch; then
        if [ "$(date +%s)" -ge "$torch_until" ]; then
            torch_missing="not there after ${FKV_TORCH_SECONDS:-900} s"
        else
            torch_missing="pip: $(tail -n 1 "$torch_folder/pip.log")"
        fi
    elif ! PYTHONPATH=$torch_folder/newest "$torch_python" -c 'import torch, transformers, kvpress' \
        2>"$torch_folder/pip.log"; then
        torch_missing="not to be loaded: $(tail -n 1 "$torch_folder/pip.log")"
    fi
    rm -rf "$torch_folder/part"
    if [ -n "$torch_missing" ]; then
        rm -rf "$torch_folder"
        return 1
    fi
    echo "fetching torch and transformers took $(($(date +%s) - begin)) s," \
        "$(du -sm "$torch_folder" | cut -f 1) MB"
}
