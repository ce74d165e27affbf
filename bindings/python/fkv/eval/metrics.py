# SPDX-License-Identifier: Apache-2.0
"""How answers are scored: numbers from 0 to 1, more is better."""
from __future__ import annotations

import collections
import re
import string
from typing import Sequence

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


def match_all(answer: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the answer, in either case: RULER's measure of retrieval."""
    found = answer.lower()
    return sum(reference.lower() in found for reference in references) / len(references)


def match_part(answer: str, references: Sequence[str]) -> float:
    """1 if any of the references occurs in the answer: RULER's measure of question answering."""
    found = answer.lower()
    return float(any(reference.lower() in found for reference in references))


def begins(answer: str, references: Sequence[str]) -> float:
    """1 if the answer begins with one of the references: all of it is right, and what follows is free."""
    return float(any(answer.startswith(reference) for reference in references))


def words_of(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    return _ARTICLES.sub(' ', text.lower().translate(_NO_PUNCTUATION)).split()


def f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 of words with any of the references: LongBench's measure of question answering."""
    return max(_f1(words_of(answer), words_of(reference)) for reference in references)


def _f1(said: list[str], wanted: list[str]) -> float:
    common = sum((collections.Counter(said) & collections.Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


METRICS = {'all': match_all, 'part': match_part, 'begins': begins, 'f1': f1}
