# SPDX-License-Identifier: Apache-2.0
"""Names of methods, as on the command line."""
from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

KNOWN = ('full, fkv:FILE, int2, int3, int4, int8, fourier[:BINS], fourier-published[:BINS], '
         'streamingllm[:SHARE], snapkv[:SHARE], kivi[:BITS]')
DEFAULTS: dict[str, Any] = {'fourier': 512, 'fourier-published': 512, 'streamingllm': None, 'snapkv': .25, 'kivi': 2}


@dataclasses.dataclass(frozen=True)
class Name:
    kind: str
    value: Any = None
    file: str = ''

    def __str__(self) -> str:
        """The name in tables."""
        if self.kind == 'fkv':
            return pathlib.Path(self.file).stem
        if self.kind == 'int':
            return f'int{self.value}'
        return self.kind if self.value == DEFAULTS.get(self.kind) else f'{self.kind}:{self.value:g}'


def parse(text: str) -> Name:
    """ValueError for what is no method."""
    kind, colon, rest = text.partition(':')
    if kind == 'fkv':
        if not rest:
            raise ValueError('fkv needs a profile: fkv:FILE')
        return Name('fkv', file=rest)
    match = re.fullmatch(r'int([2348])', kind)
    if match and not colon:
        return Name('int', int(match[1]))
    if text == 'full':
        return Name('full')
    if kind not in DEFAULTS or (colon and not rest):
        raise ValueError(f'{text!r} is no method; known are {KNOWN}')
    if not colon:
        return Name(kind, DEFAULTS[kind])
    return Name(kind, _number(text, kind, rest))


def _number(text: str, kind: str, value: str) -> Any:
    try:
        number = float(value) if kind in ('streamingllm', 'snapkv') else int(value)
    except ValueError:
        raise ValueError(f'{text!r}: {value!r} is no number') from None
    if kind in ('streamingllm', 'snapkv') and not 0 < number < 1:
        raise ValueError(f'{text!r}: a share between 0 and 1 is needed')
    if kind == 'kivi' and number not in (1, 2, 3, 4, 8):
        raise ValueError(f'{text!r}: 1, 2, 3, 4 or 8 bits are possible')
    if kind.startswith('fourier') and not 1 <= number <= 65536:
        raise ValueError(f'{text!r}: 1 to 65536 bins are possible')
    return number


def parse_all(texts: list[str]) -> list[Name]:
    """Names that differ in tables, or ValueError."""
    names = [parse(text) for text in texts]
    seen: dict[str, Name] = {}
    for name in names:
        if str(name) in seen and seen[str(name)] != name:
            raise ValueError(f'{seen[str(name)].file} and {name.file} would have the same name, {name}')
        seen[str(name)] = name
    return list(seen.values())
