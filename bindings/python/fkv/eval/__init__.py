# SPDX-License-Identifier: Apache-2.0
"""What a cache coding costs a model, beside other methods: python -m fkv eval (docs/evaluation.md).

Every method gets the same items. A context is read once, exactly; each method makes its cache from the keys
and values of that pass, before the question is known, and then answers. Bytes of all are counted by
fkv.eval.count.

    tasks, files, metrics   items, made here or read from files, and how answers are scored
    capture, stores         the pass over the context, and caches that are held by torch
    methods, baselines      what is compared
    run                     the loop, which can be taken up again
    report, charts          tables and pictures

Needs torch and transformers, for StreamingLLM and SnapKV also kvpress: pip install 'fkv[eval]'. Items, metrics
and tables need none of them.
"""
