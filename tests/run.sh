#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds and runs all tests, then those of the library and of the Python package again under sanitizers.
# The last line is "N passed, N failed". Works in build/ and build-asan/, which it makes anew; installs
# missing Debian packages if it may, and Python's into build/venv.
#     FKV_PYTHON=0    leaves the Python package out
#     FKV_TORCH=0     leaves out the tests that need torch and transformers, which are fetched for them into
#                     build/torch: 5 GB, one to three minutes; the tests, with two versions, ten or more
set -eu
cd "$(dirname "$0")/.."
. tests/install-deps.sh
. tests/install-torch.sh

failed=0
logs=

section() {
    printf '\n== %s\n' "$1"
}

# build_and_test DIR "SETUP OPTIONS" "TEST OPTIONS"
build_and_test() {
    rm -rf "$1"
    # shellcheck disable=SC2086
    if ! meson setup "$1" $2 || ! meson compile -C "$1"; then
        echo "$1: the build failed"
        failed=$((failed + 1))
        return
    fi
    # Old sanitizers do not find their way in some kernels' randomised address spaces.
    fixed=
    if [ "$1" = build-asan ] && setarch "$(uname -m)" -R true 2>/dev/null; then
        fixed="setarch $(uname -m) -R"
    fi
    status=0
    # shellcheck disable=SC2086
    $fixed meson test -C "$1" --no-rebuild --print-errorlogs $3 || status=$?
    if [ -s "$1/meson-logs/testlog.json" ]; then
        logs="$logs $1/meson-logs/testlog.json"
    elif [ "$status" -ne 0 ]; then
        failed=$((failed + 1))
    fi
}

# Where processes may not look into one another, leaks cannot be found; all else still can.
check_leak_detection() {
    probe=$(mktemp -d)
    echo 'int main(void) { return 0; }' >"$probe/probe.c"
    if gcc -fsanitize=address -o "$probe/probe" "$probe/probe.c" &&
        ! "$probe/probe" >/dev/null 2>&1; then
        echo "leaks cannot be detected here"
        ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0
    fi
    rm -rf "$probe"
}

# A clean environment, into which the package is installed as users install it
install_python_package() {
    python3 -m venv build/venv &&
        build/venv/bin/pip install -q --disable-pip-version-check ./bindings/python &&
        (cd / && "$OLDPWD/build/venv/bin/python" -c 'import fkv; print("fkv", fkv.version())') &&
        build/venv/bin/pip install -q --disable-pip-version-check pytest pycparser matplotlib
}

# run_pytest NAME [ARGUMENT ..]
run_pytest() {
    results=$PWD/build/$1.xml
    shift
    build/venv/bin/python -m pytest -q -p no:cacheprovider --junitxml="$results" "$@" \
        tests/bindings || true
    if [ -s "$results" ]; then
        logs="$logs $results"
    else
        failed=$((failed + 1))
    fi
}

# The tests with torch, with the newest transformers and with the oldest that is supported
test_torch() {
    if [ "${FKV_TORCH:-1}" = 0 ]; then
        echo "skipped: the tests that need torch (FKV_TORCH=0)"
        return
    fi
    if ! install_torch "$PWD/build/venv/bin/python" "$PWD/build/torch"; then
        echo "skipped: the tests that need torch: $torch_missing"
        return
    fi
    begin=$(date +%s)
    # On a machine with other work the threads of small models wait for one another.
    export OMP_NUM_THREADS=1
    export PYTHONPATH="$PWD/build/torch/newest"
    run_pytest torch -m torch
    export PYTHONPATH="$PWD/build/torch/oldest:$PYTHONPATH"
    run_pytest transformers-5.0 -m torch
    unset PYTHONPATH OMP_NUM_THREADS
    echo "the tests with torch took $(($(date +%s) - begin)) s"
}

test_python() {
    if ! install_python_package; then
        echo "the Python package cannot be installed"
        failed=$((failed + 1))
        return
    fi
    run_pytest python -m 'not torch'
    test_torch
    build/venv/bin/python tests/bindings/call_cost.py build/tests/bindings/call_cost ||
        failed=$((failed + 1))
}

# The sanitizers' runtime must come first in a process that was not built with it. Leaks are left to the
# C tests: Python itself has some.
test_python_under_sanitizers() {
    [ -x build/venv/bin/pytest ] || return 0
    (
        LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
        LD_LIBRARY_PATH=$PWD/build-asan/libfkv
        ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0
        export LD_PRELOAD LD_LIBRARY_PATH ASAN_OPTIONS
        if ! build/venv/bin/python -c 'import fkv
raise SystemExit("build-asan/libfkv" not in open("/proc/self/maps").read())'; then
            echo "the library with sanitizers was not loaded"
            exit
        fi
        $fixed build/venv/bin/python -m pytest -q -p no:cacheprovider \
            --junitxml="$PWD/build/python-asan.xml" -m 'not torch' tests/bindings/python
    ) || true
    if [ -s build/python-asan.xml ]; then
        logs="$logs build/python-asan.xml"
    else
        failed=$((failed + 1))
    fi
}

check_format() {
    formatter=
    for candidate in clang-format-14 clang-format; do
        if $candidate --version 2>/dev/null | grep -q 'version 14\.'; then
            formatter=$candidate
            break
        fi
    done
    if [ -z "$formatter" ]; then
        echo "skipped: there is no clang-format 14, and other versions format otherwise"
        return
    fi
    unformatted=$(find include libfkv bindings tests examples -name '*.[ch]' | while read -r file; do
        "$formatter" --style=file "$file" | cmp -s - "$file" || echo "$file"
    done)
    if [ -z "$unformatted" ]; then
        echo "ok"
    else
        echo "not as clang-format 14 would have it:"
        echo "$unformatted"
        failed=$((failed + 1))
    fi
}

section "what is needed"
if ! install_missing gcc g++ libc pkg-config meson ninja jansson cmocka openblas python \
    python-venv python-headers; then
    echo "0 passed, 1 failed"
    exit 1
fi
install_missing cargo rustfmt bindgen || echo "tests of the Rust crates that need these are skipped"
echo "ok"

section "release build"
build_and_test build "" ""

if [ "${FKV_PYTHON:-1}" = 1 ]; then
    section "Python package"
    test_python
fi

section "address and undefined-behaviour sanitizers"
# Instrumented code is 10 to 30 times slower, so the tests take smaller shapes. It also makes the
# compiler warn of what cannot happen; the release build is the judge of warnings.
FKV_QUICK=1
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
ASAN_OPTIONS=halt_on_error=1
export FKV_QUICK UBSAN_OPTIONS ASAN_OPTIONS
check_leak_detection
build_and_test build-asan \
    "-Db_sanitize=address,undefined -Doptimization=1 -Dwerror=false -Dexamples=false" \
    "--timeout-multiplier 3 --suite api --suite kern --suite property --suite rust"

if [ "${FKV_PYTHON:-1}" = 1 ]; then
    section "Python package under the sanitizers"
    test_python_under_sanitizers
fi

section "format"
check_format

section "summary"
# shellcheck disable=SC2086
python3 tests/summary.py --failed "$failed" $logs
