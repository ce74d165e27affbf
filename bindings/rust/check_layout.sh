#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: check_layout.sh INCLUDE_DIR
# Whether sizes, offsets and values in fkv-sys are those that the C compiler finds in INCLUDE_DIR/fkv/fkv.h.
# Environment as for test.sh.
set -eu
FKV_INCLUDE_DIR=$(cd "$1" && pwd)
LD_LIBRARY_PATH=$FKV_LIB_DIR${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/layout
export FKV_INCLUDE_DIR LD_LIBRARY_PATH CARGO_TARGET_DIR
cd "$(dirname "$0")"
exec "${CARGO:-cargo}" test --offline --locked --quiet -p fkv-sys --test layout
