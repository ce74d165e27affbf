# SPDX-License-Identifier: Apache-2.0
"""Calibration of Hugging Face models through the gradients of torch.

    profile = fkv.calibrate(model, texts, tokenizer=tokenizer, target=12)

What a channel is worth is the squared gradient of the model's loss with respect to its values,
through those queries alone that will read them coded: the newest n_local tokens are held exactly, and
what queries do with them says nothing about coding. Such gradients are mostly small beside the whole, so
that taking the whole ranks channels by what never matters (docs/calibration.md).

Needs torch and transformers; neither is needed by the rest of the package.
"""
from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from typing import Any, Iterable, Iterator

import numpy

from ._objects import Context
from ._types import AllocationInfo, AllocationParams, CodecParams, Criterion, ModelParams, Target
from .models import model_params
from .profile import Calibrator, Profile

ATTENTION = 'fkv_calibration'
CHUNK = 128  #: queries of a step of attention: what a step takes grows with it and the context


class _Run:
    """One forward pass: what its attention functions share."""

    def __init__(self, distance: int, gradients: bool):
        self.distance = distance
        self.gradients = gradients
        self.rope = None  # cos and sin of the positions, [tokens, rotated channels]
        self.stream = None  # what the layer at hand adds to: its squared norm, [tokens]
        self.layers: dict[int, Any] = {}


_run: _Run | None = None


def _scores(q, k, first, scale):
    """Causal scores of queries [Hk, G, n, D] from token `first` on with keys [Hk, first + n, D]."""
    import torch
    n = q.shape[2]
    s = torch.einsum('hgtd,hsd->hgts', q * scale, k)
    s[..., first:] += torch.full((n, n), float('-inf'), device=q.device, dtype=q.dtype).triu(1)
    return s


def _far_pairs(tokens, first, distance, device):
    """Which of the keys [first + n] the queries from `first` on, in chunks, are `distance` behind."""
    import torch
    return (torch.arange(first, tokens, device=device)[:, None]
            - torch.arange(tokens, device=device)[None]) >= distance


def _estimating_attention(q, k, v, scale, distance, weight, stream, keep):
    """Causal attention; keeps how much an error in each channel moves what the layer adds.

    A change of v(s) moves a head's output by p(t, s) times it, one of k(s) by p(t, s) q(t) (v(s) - o(t));
    `weight`, [Hk, G, D, hidden], takes that to the hidden state, whose squared norm, `stream`, is the measure
    of what matters to the layers behind. Squares are summed over queries t that are far from s.
    """
    import torch
    out = torch.empty_like(q)
    mean_k, mean_v = torch.zeros_like(k), torch.zeros_like(v)
    gram = weight @ weight.transpose(-1, -2)
    own = gram.diagonal(dim1=-2, dim2=-1)
    value_norm = torch.einsum('hsd,hgde,hse->hgs', v, gram, v)
    for a in range(0, q.shape[2], CHUNK):
        b = min(a + CHUNK, q.shape[2])
        p = _scores(q[:, :, a:b], k[:, :b], a, scale).softmax(-1)
        o = out[:, :, a:b] = torch.einsum('hgts,hsd->hgtd', p, v[:, :b])
        moved = torch.einsum('hgtd,hgde->hgte', o, gram)
        gap = (value_norm[:, :, None, :b] - 2 * torch.einsum('hgte,hse->hgts', moved, v[:, :b])
               + (moved * o).sum(-1)[..., None]).clamp_(min=0)
        p = p.square_() * _far_pairs(b, a, distance, q.device) / stream[a:b, None]
        mean_v[:, :b] += torch.einsum('hgts,hgd->hsd', p, own)
        mean_k[:, :b] += torch.einsum('hgts,hgtd->hsd', p * gap, (q[:, :, a:b] * scale) ** 2)
    keep['grad_k'], keep['grad_v'] = mean_k.sqrt(), mean_v.sqrt()
    return out


def _attention_class():
    """Causal attention with a backward pass that keeps apart what far queries do to keys and values."""
    import torch

    class Attention(torch.autograd.Function):
        """q [Hk, G, T, D], k and v [Hk, T, D], rotated, float32."""

        @staticmethod
        def forward(ctx, q, k, v, scale, distance, keep):
            out = torch.empty_like(q)
            lse = q.new_empty(q.shape[:3])
            for a in range(0, q.shape[2], CHUNK):
                b = min(a + CHUNK, q.shape[2])
                s = _scores(q[:, :, a:b], k[:, :b], a, scale)
                lse[:, :, a:b] = s.logsumexp(-1)
                p = (s - lse[:, :, a:b, None]).exp_()
                out[:, :, a:b] = torch.einsum('hgts,hsd->hgtd', p, v[:, :b])
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.options = scale, distance, keep
            return out

        @staticmethod
        def backward(ctx, grad):
            q, k, v, out, lse = ctx.saved_tensors
            scale, distance, keep = ctx.options
            delta = (grad * out).sum(-1)
            dq = torch.empty_like(q)
            far_k, far_v, near_k, near_v = (torch.zeros_like(k) for _ in range(4))
            for a in range(0, q.shape[2], CHUNK):
                b = min(a + CHUNK, q.shape[2])
                qs, g = q[:, :, a:b] * scale, grad[:, :, a:b]
                p = (_scores(q[:, :, a:b], k[:, :b], a, scale) - lse[:, :, a:b, None]).exp_()
                ds = torch.einsum('hgtd,hsd->hgts', g, v[:, :b])
                ds = ds.sub_(delta[:, :, a:b, None]).mul_(p)
                dq[:, :, a:b] = torch.einsum('hgts,hsd->hgtd', ds, k[:, :b]) * scale
                c = max(0, a - distance + 1)  # before it all pairs of this chunk are far
                near = ~_far_pairs(b, a, distance, q.device)[:, c:]
                near_k[:, c:b] += torch.einsum('hgts,hgtd->hsd', ds[..., c:] * near, qs)
                near_v[:, c:b] += torch.einsum('hgts,hgtd->hsd', p[..., c:] * near, g)
                ds[..., c:] *= ~near
                p[..., c:] *= ~near
                far_k[:, :b] += torch.einsum('hgts,hgtd->hsd', ds, qs)
                far_v[:, :b] += torch.einsum('hgts,hgtd->hsd', p, g)
            keep['grad_k'], keep['grad_v'] = far_k, far_v
            return dq, far_k + near_k, far_v + near_v, None, None, None

    return Attention


def _attention(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None,
               sliding_window=None, **_) -> tuple:
    """What transformers calls instead of its own attention: [B, H, T, D] to [B, T, H, D]."""
    if _run is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise RuntimeError('this attention works for calibration alone, on one sequence without a cache')
    if sliding_window and sliding_window < key.shape[2]:
        raise ValueError(f'windows of {key.shape[2]} tokens are longer than the sliding window of '
                         f'the model, {sliding_window}')
    heads, tokens, dim = query.shape[1:]
    kv_heads = key.shape[1]
    q, k, v = query[0].float(), key[0].float(), value[0].float()
    scale = dim ** -0.5 if scaling is None else scaling
    keep = _run.layers[module.layer_idx] = {'q': q.detach(), 'k': k.detach(), 'v': v.detach()}
    q = q.view(kv_heads, heads // kv_heads, tokens, dim)
    if _run.gradients:
        out = _attention_class().apply(q, k, v, scale, _run.distance, keep)
    else:
        weight = module.o_proj.weight.float().t().view(*q.shape[:2], dim, -1)
        out = _estimating_attention(q, k, v, scale, _run.distance, weight, _run.stream, keep)
    out = out.view(1, heads, tokens, dim).transpose(1, 2)
    return out.to(query.dtype), None


def _unrotate(x, rope, gradient: bool):
    """x before RoPE, or its gradient with respect to what it was before. x [H, T, D]."""
    import torch
    cos, sin = rope
    width = cos.shape[-1]
    y, rest = x[..., :width], x[..., width:]
    half = width // 2
    turned = torch.cat([y[..., half:], -y[..., :half]], -1)
    y = y * cos + turned * sin
    if not gradient:  # cos and sin may have the model's scaling in them
        y = y / (cos[0, 0] ** 2 + sin[0, 0] ** 2)
    return torch.cat([y, rest], -1)


def _pair_means(x, rope):
    """Root mean squares of RoPE pairs: positions turn the channels of a pair into one another."""
    import torch
    width = rope[0].shape[-1]
    a, b, rest = x.split([width // 2, width // 2, x.shape[-1] - width], -1)
    pair = ((a.square() + b.square()) / 2).sqrt()
    return torch.cat([pair, pair, rest], -1)


@contextlib.contextmanager
def calibrating(model) -> Iterator[None]:
    """The model with our attention, its weights without gradients; as it was afterwards."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    rotary = [m for name, m in model.named_modules() if name.split('.')[-1] == 'rotary_emb']
    if len(rotary) != 1:
        raise ValueError(f'the model has {len(rotary)} modules named rotary_emb, expected 1: only '
                         'models built like LLaMA, Mistral, Qwen2 and Qwen3 are known here')

    def keep_rope(module, inputs, output):
        _run.rope = tuple(x[0].detach().float() for x in output)

    def want_gradients(module, inputs, output):
        return output.requires_grad_() if _run.gradients else output

    def keep_stream(module, inputs):
        _run.stream = inputs[0][0].detach().float().square().sum(-1)

    before, training = model.config._attn_implementation, model.training
    wanted = [p.requires_grad for p in model.parameters()]
    hooks = [rotary[0].register_forward_hook(keep_rope),
             model.get_input_embeddings().register_forward_hook(want_gradients)]
    hooks += [m.register_forward_pre_hook(keep_stream) for m in model.modules()
              if hasattr(m, 'self_attn')]
    try:
        model.requires_grad_(False)
        model.eval()
        model.set_attn_implementation(ATTENTION)
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)
        for parameter, wants in zip(model.parameters(), wanted):
            parameter.requires_grad_(wants)
        for hook in hooks:
            hook.remove()


def _loss(logits, ids, weights, labels: str, generator):
    """The summed loss of a window; logits [T, vocabulary] of the tokens that follow."""
    import torch
    import torch.nn.functional as functional
    logits, targets = logits[:-1].float(), ids[1:]
    w = torch.ones(len(targets), device=logits.device) if weights is None else weights[1:]
    loss = logits.new_zeros(())
    if labels in ('text', 'both'):
        loss = loss + (functional.cross_entropy(logits, targets, reduction='none') * w).sum()
    if labels in ('model', 'both'):
        # Squares of these gradients are the Fisher matrix, which is linear in the weight.
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
        loss = loss + (functional.cross_entropy(logits, drawn[:, 0].to(logits.device),
                                                reduction='none') * w.sqrt()).sum()
    return loss


def observe(calibrator: Calibrator, model, ids: Any, weights: Any = None, *, codec: CodecParams,
            labels: str = 'text', gradients: bool = True, generator=None) -> float:
    """Adds one window of token ids to a calibrator; returns the mean loss of its tokens.

    weights: factor on the loss of each token, [tokens]. Call it within calibrating(model).
    """
    import torch
    global _run
    device = model.get_input_embeddings().weight.device
    ids = torch.as_tensor(numpy.asarray(ids), dtype=torch.long, device=device)
    if weights is not None:
        weights = torch.as_tensor(numpy.asarray(weights), dtype=torch.float32, device=device)
    # A token is coded when it is between n_local and n_local + block old.
    distance = codec.n_local + codec.block // 2
    last = len(ids) - distance
    if last <= codec.n_sink:
        raise ValueError(f'a window of {len(ids)} tokens: more than {codec.n_sink + distance} needed')
    _run = _Run(distance, gradients)
    try:
        with torch.set_grad_enabled(gradients):
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            loss = _loss(logits, ids, weights, labels, generator)
            if gradients:
                loss.backward()
        rope = _run.rope
        for layer, keep in sorted(_run.layers.items()):
            part = slice(codec.n_sink, last)
            k, q = (_unrotate(keep[name], rope, False) for name in ('k', 'q'))
            grad_k = (_unrotate(keep['grad_k'], rope, True) if gradients
                      else _pair_means(keep['grad_k'], rope))
            arrays = [x[:, part].transpose(0, 1).contiguous().cpu()
                      for x in (k, keep['v'], grad_k, keep['grad_v'], q)]
            calibrator.observe_gradients(layer, *arrays)
        return loss.item() / (len(ids) - 1)
    finally:
        _run = None


class _Progress:
    """A bar on stderr, if somebody watches."""

    def __init__(self, total: int, show: bool | None):
        self.total, self.start = total, time.monotonic()
        self.show = sys.stderr.isatty() if show is None else show

    def step(self, done: int, loss: float) -> None:
        if not self.show:
            return
        spent = time.monotonic() - self.start
        bar = '#' * (30 * done // self.total)
        left = spent / done * (self.total - done)
        end = '\n' if done == self.total else ''
        print(f'\rcalibrating [{bar:30}] {done}/{self.total}, loss {loss:.3f}, {left:.0f} s left ',
              end=end, file=sys.stderr, flush=True)


def windows_of(texts: Iterable[Any], tokenizer: Any, window: int) -> list[tuple]:
    """(ids, weights or None) of up to `window` tokens. A text is str, token ids, or a pair of ids and
    weights; short texts are joined, what is left over at the end is kept if it is half a window."""
    windows, joined = [], []
    for text in texts:
        if isinstance(text, tuple):
            windows.append(text)
            continue
        if isinstance(text, str):
            if tokenizer is None:
                raise TypeError('texts need a tokenizer; give token ids without one')
            text = tokenizer(text)['input_ids']
        joined.extend(int(x) for x in text)
        while len(joined) >= window:
            windows.append((joined[:window], None))
            joined = joined[window:]
    if len(joined) >= window // 2:
        windows.append((joined, None))
    return windows


def gather(model, texts: Iterable[Any], *, tokenizer: Any = None, context: Context | None = None,
           params: ModelParams | None = None, codec: CodecParams | None = None, window: int = 4096,
           max_windows: int | None = None, labels: str = 'text', gradients: bool = True,
           seed: int = 0, progress: bool | None = None) -> Calibrator:
    """Observes texts; the calibrator can be allocated from more than once, saved and merged.

    window       tokens of a forward and backward pass; as long as the contexts to come, if memory lets
    labels       'text': the gradients of the loss; 'model': of the loss on tokens that the model itself
                 draws (the Fisher matrix, without the text's surprises); 'both': their sum
    gradients    False: no backward pass; instead of the loss, how much an error moves what the layer adds to
                 the hidden state, which is worse (docs/calibration.md)
    """
    import torch
    if labels not in ('text', 'model', 'both'):
        raise ValueError(f"labels: {labels!r} is none of 'text', 'model', 'both'")
    context = context or Context()
    codec = _with_defaults(codec)
    windows = windows_of(texts, tokenizer, window)[:max_windows]
    if len(windows) < 2:
        raise ValueError(f'{len(windows)} windows of {window} tokens: at least two are needed')
    calibrator = Calibrator(context, params or model_params(model.config),
                            criterion=Criterion.SENSITIVITY, codec=codec)
    generator = torch.Generator().manual_seed(seed)
    bar = _Progress(len(windows), progress)
    with calibrating(model):
        for i, (ids, weights) in enumerate(windows):
            loss = observe(calibrator, model, ids, weights, codec=codec, labels=labels,
                           gradients=gradients, generator=generator)
            bar.step(i + 1, loss)
    return calibrator


def _with_defaults(codec: CodecParams | None) -> CodecParams:
    given = dataclasses.asdict(codec or CodecParams())
    defaults = {'group': 128, 'block': 128, 'n_sink': 4, 'n_local': 128}
    return CodecParams(**defaults | {name: x for name, x in given.items() if x is not None})


def calibrate(model, texts: Iterable[Any], target: float = 12.0, *, tokens: int = 8192,
              **options) -> tuple[Profile, AllocationInfo]:
    """A profile for a Hugging Face model that takes 1/target of dense f16 at `tokens` tokens.

    texts: strings (with tokenizer=...), sequences of token ids, or pairs of ids and weights. Other options
    are those of gather().
    """
    with gather(model, texts, **options) as calibrator:
        return calibrator.allocate(AllocationParams(target=Target.RATIO, value=target, tokens=tokens))
