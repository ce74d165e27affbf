#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# On a machine with a GPU: the CUDA tests, the same under compute-sanitizer, and the bench. Prints a report as for
# docs/benchmarks/. Usage: run_gpu.sh DIR, where DIR holds test_cuda, test_module, test_edges, fault-module.so,
# fkv-bench, libfkv.so.0 and libfkv-cuda.so.0; from a build directory: tests/cuda/run_gpu.sh build
set -u
dir=$(cd "${1:-build}" && pwd) || exit 2
pick() {
    for file in "$dir/$1" "$dir/$2"; do
        [ -e "$file" ] && echo "$file" && return
    done
    echo "$1 is not in $dir" >&2
    exit 2
}
test_cuda=$(pick test_cuda tests/cuda/test_cuda) || exit 2
test_module=$(pick test_module tests/cuda/test_module) || exit 2
bench=$(pick fkv-bench examples/bench/fkv-bench) || exit 2
module=$(pick libfkv-cuda.so.0 cuda/libfkv-cuda.so.0) || exit 2
test_edges=$(pick test_edges tests/cuda/test_edges) || exit 2
fault=$(pick fault-module.so tests/cuda/fault-module.so) || exit 2
library=$(pick libfkv.so.0 libfkv/libfkv.so.0) || exit 2
LD_LIBRARY_PATH=$(dirname "$library")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
FKV_CUDA_MODULE=$module
export LD_LIBRARY_PATH FKV_CUDA_MODULE
failed=0

echo "date: $(date -u +%Y-%m-%d)"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 77
echo
"$test_module" "$library" "$module" >/tmp/fkv-cuda-tests.$$ 2>&1 || failed=1
grep -E 'ERROR|PASSED|FAILED' /tmp/fkv-cuda-tests.$$
"$test_cuda" "$module" >/tmp/fkv-cuda-tests.$$ 2>&1 || failed=1
grep -v 'RUN' /tmp/fkv-cuda-tests.$$
"$test_edges" "$module" "$fault" >/tmp/fkv-cuda-tests.$$ 2>&1 || failed=1
grep -v 'RUN' /tmp/fkv-cuda-tests.$$
rm -f /tmp/fkv-cuda-tests.$$
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck synccheck initcheck racecheck; do
        # the short list of cases: instrumented kernels are some hundred times slower
        more=
        [ "$tool" = synccheck ] && more='--num-cuda-barriers 200000'
        FKV_QUICK=1 timeout 300 compute-sanitizer --tool "$tool" $more "$test_cuda" "$module" 2>&1 |
            grep -E '=========|FAILED' | tail -n 12 | sed "s/^/$tool: /"
    done
fi
echo
"$bench" --backend cuda || failed=1
torch_bench=$(dirname "$0")/../../examples/bench/torch_sdpa.py
if [ -e "$torch_bench" ] && python3 -c 'import torch' 2>/dev/null; then
    python3 "$torch_bench" || failed=1
fi
exit $failed
