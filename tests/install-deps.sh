# shellcheck shell=sh
# SPDX-License-Identifier: Apache-2.0
# Sourced by tests/run.sh and examples/demo.sh, with names of tools and libraries:
#     install_missing gcc meson jansson
# Installs with apt-get what is missing, if it may; else says what to install and returns 1.

# Debian's package of a tool or library
package_of() {
    case $1 in
    ninja) echo ninja-build ;;
    jansson) echo libjansson-dev ;;
    cmocka) echo libcmocka-dev ;;
    openblas) echo libopenblas-dev ;;
    libc) echo libc6-dev ;;
    python) echo python3 ;;
    python-venv) echo python3-venv ;;
    python-headers) echo python3-dev ;;
    *) echo "$1" ;;
    esac
}

is_there() {
    case $1 in
    jansson | cmocka | openblas) pkg-config --exists "$1" 2>/dev/null ;;
    libc) echo '#include <stdio.h>' | gcc -fsyntax-only -x c - 2>/dev/null ;;
    python) command -v python3 >/dev/null 2>&1 ;;
    python-venv) python3 -c 'import venv, ensurepip' 2>/dev/null ;;
    python-headers)
        python3 -c 'import os, sysconfig
include = sysconfig.get_paths()["include"]
raise SystemExit(not os.path.exists(os.path.join(include, "Python.h")))' 2>/dev/null
        ;;
    *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

# The packages of those arguments that are not there
missing_packages() {
    for thing in "$@"; do
        is_there "$thing" || package_of "$thing"
    done
}

install_missing() {
    packages=$(missing_packages "$@" | tr '\n' ' ')
    packages=${packages% }
    if [ -z "$packages" ]; then
        return 0
    fi
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "Please install: $packages (names of Debian packages)" >&2
        return 1
    fi
    if [ "$(id -u)" -eq 0 ]; then
        as_root=
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    else
        echo "Please run: apt-get install --no-install-recommends $packages" >&2
        return 1
    fi
    echo "Installing: $packages" >&2
    # shellcheck disable=SC2086
    $as_root apt-get update -qq </dev/null >&2 || true
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o Dpkg::Use-Pty=0 $packages </dev/null >&2 || return 1
    packages=$(missing_packages "$@" | tr '\n' ' ')
    if [ -n "$packages" ]; then
        echo "Still missing after installation: $packages" >&2
        return 1
    fi
}
