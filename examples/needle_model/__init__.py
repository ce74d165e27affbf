# SPDX-License-Identifier: Apache-2.0
"""How examples/models/needle-13m is made: texts, tasks, model, training. README.md says how to run it."""
