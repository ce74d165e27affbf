# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, for models with a tokenizer and for models of bytes."""
from __future__ import annotations

from typing import Any, Sequence


class Bytes:
    """A token is a byte. Text that is not ASCII is read as UTF-8."""

    prefix: list[int] = []  #: what a context begins with
    end: frozenset = frozenset()  #: ids that end an answer

    def encode(self, text: str) -> list[int]:
        return list(text.encode('utf-8', 'surrogateescape'))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i if i < 256 else ord('?') for i in ids).decode('utf-8', 'replace')

    def size(self, ids: Sequence[int]) -> int:
        """Bytes of the text of these tokens."""
        return len(ids)

    def begins_word(self, token: int) -> bool:
        return token in b' \n\t'


class Tokenizer:
    """A tokenizer of transformers, without special tokens but those that every text begins with."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        empty = tokenizer('')['input_ids']
        end = tokenizer.eos_token_id
        self.prefix = [i for i in empty if i != end]
        self.end = frozenset() if end is None else frozenset([end])

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)['input_ids'])

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def size(self, ids: Sequence[int]) -> int:
        return len(self.decode(ids).encode())

    def begins_word(self, token: int) -> bool:
        piece = self.tokenizer.convert_ids_to_tokens(int(token))
        # how byte-level and sentence-piece tokenizers write spaces and newlines
        return bool(piece) and piece[0] in ' \n\u2581\u0120\u010a'


def load(kind: str, model: str) -> Any:
    """The tokens of a model: kind 'bytes', or 'tokenizer': the one in the model's folder."""
    if kind == 'bytes':
        return Bytes()
    import transformers
    try:
        tokens = Tokenizer(transformers.AutoTokenizer.from_pretrained(model))
        # transformers 5.0 makes an empty one where there is none
        if 'two' not in tokens.decode(tokens.encode('one two')):
            raise ValueError('what it finds there does not give back a text')
        return tokens
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f'no tokenizer in {model}: {reason} (--tokens bytes, if its tokens are bytes)') from None
