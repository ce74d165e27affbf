# SPDX-License-Identifier: Apache-2.0
"""Caches of libfkv for models of Hugging Face transformers (docs/transformers.md).

    import fkv.transformers

    fkv.transformers.enable(model, profile='profile.json')
    model.generate(**inputs, max_new_tokens=100)

Keys and values of the model's full-attention layers are then held, and attended to, by libfkv; layers with
a sliding window keep the framework's own cache. Nothing of this is imported by `import fkv`.
"""
from __future__ import annotations

#: Versions of transformers that this was written for: from the first, up to but not including the second.
SUPPORTED = (5, 0), (6, 0)


def _check_version() -> None:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise ImportError('fkv.transformers needs torch and transformers: '
                          f"pip install 'fkv[transformers]' ({error})") from None
    found = tuple(int(part) for part in transformers.__version__.split('.')[:2])
    if not SUPPORTED[0] <= found < SUPPORTED[1]:
        raise ImportError(f'fkv.transformers works with transformers 5.0 and later, before 6.0; '
                          f'this is {transformers.__version__}')


_check_version()

from ._cache import FkvCache  # noqa: E402
from ._enable import CACHE_NAME, disable, enable, enabled  # noqa: E402

__all__ = ['CACHE_NAME', 'FkvCache', 'SUPPORTED', 'disable', 'enable', 'enabled']
