#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds without tests and examples, installs, and lets a foreign program find the library by pkg-config
# alone, shared and static. Usage: install.sh SOURCE_DIR USER.C
set -u
source=$1
user=$2
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
prefix=$tmp/prefix
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

# Whether there is a CUDA module depends on the machine; here the list of files must not.
meson setup "$tmp/build" "$source" --prefix "$prefix" --libdir lib -Dtests=false \
    -Dexamples=false -Dcuda=disabled >"$tmp/log" 2>&1 &&
    meson install -C "$tmp/build" >"$tmp/log" 2>&1
report $? "builds and installs"

(cd "$prefix" && find . ! -type d | sort) >"$tmp/log"
version=$(sed -n 's/^Version: //p' "$prefix/lib/pkgconfig/fkv.pc")
printf '%s\n' ./include/fkv/fkv.h ./lib/libfkv.a ./lib/libfkv.so ./lib/libfkv.so.0 \
    "./lib/libfkv.so.$version" ./lib/pkgconfig/fkv.pc | sort | cmp -s - "$tmp/log"
report $? "installs these files and no others"

export PKG_CONFIG_PATH="$prefix/lib/pkgconfig"
# Quoting is not needed for what pkg-config prints, splitting is.
# shellcheck disable=SC2046
${CC:-cc} -o "$tmp/shared" "$user" $(pkg-config --cflags --libs fkv) -lm >"$tmp/log" 2>&1
report $? "links with pkg-config --cflags --libs"
LD_LIBRARY_PATH=$prefix/lib "$tmp/shared" >"$tmp/version" 2>"$tmp/log" &&
    [ "$(cat "$tmp/version")" = "$version" ]
report $? "runs, with the version of fkv.pc"

# The program in the README, as readers will copy it
sed -n '/^```c$/,/^```$/{/^```/d;p}' "$source/README.md" >"$tmp/readme.c"
# shellcheck disable=SC2046
${CC:-cc} -std=c11 -Wall -Wextra -Werror -o "$tmp/readme" "$tmp/readme.c" \
    $(pkg-config --cflags --libs fkv) >"$tmp/log" 2>&1 &&
    LD_LIBRARY_PATH=$prefix/lib "$tmp/readme" >"$tmp/log" 2>&1 && [ -s "$tmp/log" ]
report $? "the README's program compiles and runs"

# The archive alone, so that the linker has no choice. jansson may exist as a shared library only.
# shellcheck disable=SC2046
${CC:-cc} -o "$tmp/static" $(pkg-config --cflags fkv) "$user" \
    $(pkg-config --static --libs fkv | sed 's/-lfkv\b/-l:libfkv.a/') -lm >"$tmp/log" 2>&1
report $? "links with pkg-config --static --libs"
"$tmp/static" >"$tmp/version" 2>"$tmp/log" && [ "$(cat "$tmp/version")" = "$version" ]
report $? "runs without the shared library"
exit $failed
