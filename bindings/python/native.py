#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the C source of fkv._native: native.py FKV.CDEF OUTPUT.C"""
import pathlib
import sys

import cffi

declarations, output = sys.argv[1:]
ffi = cffi.FFI()
ffi.cdef(pathlib.Path(declarations).read_text(encoding='utf-8'))
ffi.set_source('fkv._native', '#include <fkv/fkv.h>\n')
ffi.emit_c_code(output)
