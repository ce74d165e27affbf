# SPDX-License-Identifier: Apache-2.0
"""Methods of others. StreamingLLM and SnapKV are kvpress's; of KIVI there is a reference here."""
from __future__ import annotations

from typing import Any

import torch

from . import count
from .capture import TAIL, Context, Reader
from .stores import Dense


# ---- kvpress

def presses() -> Any:
    """The module kvpress."""
    try:
        import kvpress
    except ImportError as error:
        raise ImportError('streamingllm and snapkv need kvpress, with a version that takes this transformers: '
                          f"pip install 'fkv[eval]' ({error})") from error
    return kvpress


def pressed(reader: Reader, context: Context, press: Any) -> Dense:
    """What a press of kvpress keeps of a context."""
    store = reader.dense()
    for layer, module in enumerate(reader.attentions):
        keys = store.rope.turn(context.keys[layer], 0)[None]
        hidden = context.hidden[layer]
        rope = _rope_of_tail(store, reader.params, context.tokens, hidden)
        with torch.no_grad():
            k, v = press.compress(module, hidden, keys, context.values[layer][None], None,
                                  {'position_embeddings': rope})
        store.put(layer, k[0], v[0])
        store.account.exact += k.numel() + v.numel()
    store.columns = context.tokens
    return store


def _rope_of_tail(store: Dense, params: Any, tokens: int, hidden) -> tuple:
    """cos and sin of the newest tokens, [1, n, D]: as the layers of the model get them."""
    positions = torch.arange(tokens - hidden.shape[1], tokens, dtype=torch.float64)
    angles = positions[:, None] * store.rope.frequencies
    angles = torch.cat((angles, angles), -1)[None]
    return tuple((part * store.rope.scaling).to(hidden) for part in (angles.cos(), angles.sin()))


def streamingllm(reader: Reader, context: Context, kept: int, sinks: int) -> Dense:
    """The first `sinks` tokens and the newest, `kept` in all. Positions stay those of the text."""
    if kept >= context.tokens:
        raise ValueError(f'streamingllm: {kept} tokens are to be kept of {context.tokens}')
    # half a token more, so that kvpress's rounding down gives `kept`
    press = presses().StreamingLLMPress(compression_ratio=1 - (kept + .5) / context.tokens, n_sink=sinks)
    return pressed(reader, context, press)


def snapkv(reader: Reader, context: Context, share: float) -> Dense:
    """The share of tokens to which the newest 64 attend most, for each KV head by itself."""
    if context.tokens <= TAIL:
        raise ValueError(f'snapkv: a context of {context.tokens} tokens; more than {TAIL} needed')
    return pressed(reader, context, presses().SnapKVPress(compression_ratio=1 - share))


# ---- KIVI: a reference of ours, from the paper (arXiv 2402.02750), not the authors' code.
# What comes back from the codes is held as numbers, and their bytes are counted.

def kivi(reader: Reader, context: Context, bits: int, group: int, sinks: int, local: int) -> Dense:
    """Keys quantised per channel, values per token, `group` elements with one scale; the first `sinks` and the
    newest `local` tokens exact, as for every method here. Keys as the method has them: after RoPE."""
    store = reader.dense()
    middle = slice(min(sinks, context.tokens), max(context.tokens - local, min(sinks, context.tokens)))
    for layer, (keys, values) in enumerate(zip(context.keys, context.values)):
        keys, values = store.rope.turn(keys, 0), values.clone()
        for held, along in ((keys, 1), (values, 2)):
            part = held[:, middle]
            if part.numel():
                held[:, middle], groups = quantized(part, bits, group, along)
                count.coded(store.account, part.numel(), bits, groups)
            store.account.exact += held.numel() - part.numel()
        store.put(layer, keys, values)
    store.columns = context.tokens
    return store


def quantized(x, bits: int, group: int, along: int) -> tuple:
    """(what comes back of x, number of groups): groups of neighbours in dimension `along`, each between its
    least and its largest value; the last one may be shorter."""
    moved = x.movedim(along, -1)
    out, groups = [], 0
    for part in moved.float().split(group, -1):
        low = part.amin(-1, keepdim=True)
        step = (part.amax(-1, keepdim=True) - low) / (2 ** bits - 1)
        low, step = low.half().float(), step.half().float()  # as they are stored
        codes = ((part - low) / step.clamp_min(1e-12)).round().clamp(0, 2 ** bits - 1)
        out.append(codes * step + low)
        groups += low.numel()
    return torch.cat(out, -1).movedim(-1, along).to(x.dtype), groups
