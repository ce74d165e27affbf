# SPDX-License-Identifier: Apache-2.0
"""A PEP 517 backend: meson-python, but in the project's root, where meson.build is."""
import os
import pathlib

os.chdir(pathlib.Path(__file__).resolve().parent.parent.parent)

from mesonpy import *  # noqa: E402,F401,F403 -- the backend's functions work in the current folder
