# SPDX-License-Identifier: Apache-2.0
"""Calibration of Hugging Face models through the gradients of torch.

    profile = fkv.calibrate(model, texts, tokenizer=tokenizer, target=12)

What a channel is worth is the squared gradient of the model's loss with respect to its values,
through those queries alone that will read them coded: the newest n_local tokens are held exactly, and
what queries do with them says nothing about coding. Such gradients are mostly small beside the whole, so
that taking the whole ranks channels by what never matters (docs/calibration.md).

Memory is bounded: what the layers compute is not kept for the backward pass, but computed again, one layer
at a time, and the logits are made for some tokens at a time. A window so takes one layer's part, and the
hidden state before each layer.

Needs torch and transformers; neither is needed by the rest of the package.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
import time
from typing import Any, Callable, Iterable, Iterator

import numpy

from ._calibration_state import State, weights_digest
from ._objects import Context
from ._types import AllocationInfo, AllocationParams, CodecParams, Criterion, ModelParams, Target
from .models import model_params
from .profile import Calibrator, Profile

ATTENTION = 'fkv_calibration'
CHUNK = 128  #: queries of a step of attention: what a step takes grows with it and the context
LOGITS = 1 << 24  #: logits that are made at once


class _Run:
    """One window: what its attention functions share."""

    def __init__(self, distance: int, gradients: bool, recompute: bool, seen: Callable):
        self.distance = distance
        self.gradients = gradients
        self.recompute = recompute
        self.seen = seen  # called once for each layer: layer, q, k, v, gradient of k, of v
        self.rope = None  # cos and sin of the positions, [tokens, rotated channels]
        self.stream = None  # what the layer at hand adds to: its squared norm, [tokens]


_run: _Run | None = None


class _Room:
    """Memory for what each of some queries has for each key, used again for every step of attention.

    The steps grow with the keys they see. Were each to allocate its own, the freed pieces of one would be too
    small for the next, and the process would hold several times what it needs.
    """

    def __init__(self, like, kv_heads: int, rows: int, keys: int):
        self.memory = like.new_empty(kv_heads * rows * keys)

    def products(self, a, b):
        """The products [Hk, G, n, S] of rows a [Hk, G, n, X] and b [Hk, S, X]."""
        import torch
        shape = *a.shape[:3], b.shape[1]
        out = self.memory[:shape[0] * shape[1] * shape[2] * shape[3]].view(shape)
        torch.bmm(a.flatten(1, 2), b.transpose(1, 2), out=out.flatten(1, 2))
        return out


def _sums(weights, rows):
    """Over queries: [Hk, S, X] of weights [Hk, G, n, S] and rows [Hk, G, n, X]."""
    return weights.flatten(1, 2).transpose(1, 2) @ rows.flatten(1, 2)


def _rows(weights, keys):
    """Over keys: [Hk, G, n, X] of weights [Hk, G, n, S] and keys [Hk, S, X]."""
    return (weights.flatten(1, 2) @ keys).view(*weights.shape[:3], -1)


def _scores(q, k, first, scale, room):
    """Causal scores of queries [Hk, G, n, D] from token `first` on with keys [Hk, first + n, D]."""
    import torch
    n = q.shape[2]
    s = room.products(q * scale, k)
    s[..., first:] += torch.full((n, n), float('-inf'), device=q.device, dtype=q.dtype).triu(1)
    return s


def _far_pairs(tokens, first, distance, device):
    """Which of the keys [first + n] the queries from `first` on, in chunks, are `distance` behind."""
    import torch
    return (torch.arange(first, tokens, device=device)[:, None]
            - torch.arange(tokens, device=device)[None]) >= distance


def _estimating_attention(q, k, v, scale, distance, weight, stream):
    """Causal attention; and how much an error in each channel of k and v moves what the layer adds.

    A change of v(s) moves a head's output by p(t, s) times it, one of k(s) by p(t, s) q(t) (v(s) - o(t));
    `weight`, [Hk, G, D, hidden], takes that to the hidden state, whose squared norm, `stream`, is the measure
    of what matters to the layers behind. Squares are summed over queries t that are far from s.
    """
    import torch
    out = torch.empty_like(q)
    mean_k, mean_v = torch.zeros_like(k), torch.zeros_like(v)
    gram = weight @ weight.transpose(-1, -2)
    own = gram.diagonal(dim1=-2, dim2=-1)[:, :, None]
    value_norm = torch.stack([((v @ gram[:, g]) * v).sum(-1) for g in range(q.shape[1])], 1)
    rooms = [_Room(q, len(k), q.shape[1] * CHUNK, k.shape[1]) for _ in 'pg']
    for a in range(0, q.shape[2], CHUNK):
        b = min(a + CHUNK, q.shape[2])
        p = _scores(q[:, :, a:b], k[:, :b], a, scale, rooms[0])
        p.sub_(p.amax(-1, keepdim=True)).exp_()
        p.div_(p.sum(-1, keepdim=True))
        o = out[:, :, a:b] = _rows(p, v[:, :b])
        moved = o @ gram
        gap = rooms[1].products(moved, v[:, :b]).mul_(-2).add_(value_norm[:, :, None, :b])
        gap.add_((moved * o).sum(-1)[..., None]).clamp_(min=0)
        p.square_().mul_(_far_pairs(b, a, distance, q.device)).div_(stream[a:b, None])
        mean_v[:, :b] += _sums(p, own.expand(-1, -1, b - a, -1))
        mean_k[:, :b] += _sums(gap.mul_(p), (q[:, :, a:b] * scale) ** 2)
    return out, mean_k.sqrt(), mean_v.sqrt()


def _attention_class():
    """Causal attention with a backward pass that keeps apart what far queries do to keys and values."""
    import torch

    class Attention(torch.autograd.Function):
        """q [Hk, G, T, D], k and v [Hk, T, D], rotated, float32."""

        @staticmethod
        def forward(ctx, q, k, v, scale, distance, seen):
            out = torch.empty_like(q)
            lse = q.new_empty(q.shape[:3])
            rooms = [_Room(q, len(k), q.shape[1] * CHUNK, k.shape[1])]
            for a in range(0, q.shape[2], CHUNK):
                b = min(a + CHUNK, q.shape[2])
                p = _scores(q[:, :, a:b], k[:, :b], a, scale, rooms[0])
                most = p.amax(-1, keepdim=True)
                p.sub_(most).exp_()
                total = p.sum(-1, keepdim=True)
                lse[:, :, a:b] = (total.log() + most)[..., 0]
                out[:, :, a:b] = _rows(p, v[:, :b]) / total
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.options = scale, distance, seen
            return out

        @staticmethod
        def backward(ctx, grad):
            q, k, v, out, lse = ctx.saved_tensors
            scale, distance, seen = ctx.options
            delta = (grad * out).sum(-1)
            dq = torch.empty_like(q)
            far_k, far_v, near_k, near_v = (torch.zeros_like(k) for _ in range(4))
            rooms = [_Room(q, len(k), q.shape[1] * CHUNK, k.shape[1]) for _ in 'pd']
            for a in range(0, q.shape[2], CHUNK):
                b = min(a + CHUNK, q.shape[2])
                qs, g = q[:, :, a:b] * scale, grad[:, :, a:b]
                p = _scores(q[:, :, a:b], k[:, :b], a, scale, rooms[0])
                p.sub_(lse[:, :, a:b, None]).exp_()
                ds = rooms[1].products(g, v[:, :b]).sub_(delta[:, :, a:b, None]).mul_(p)
                dq[:, :, a:b] = _rows(ds, k[:, :b]) * scale
                c = max(0, a - distance + 1)  # before it all pairs of this chunk are far
                near = ~_far_pairs(b, a, distance, q.device)[:, c:]
                near_k[:, c:b] += _sums(ds[..., c:] * near, qs)
                near_v[:, c:b] += _sums(p[..., c:] * near, g)
                ds[..., c:] *= ~near
                p[..., c:] *= ~near
                far_k[:, :b] += _sums(ds, qs)
                far_v[:, :b] += _sums(p, g)
            seen(q.detach(), k.detach(), v.detach(), far_k, far_v)
            return dq, far_k + near_k, far_v + near_v, None, None, None

    return Attention


def _attention(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None,
               sliding_window=None, softcap=None, s_aux=None, **_) -> tuple:
    """What transformers calls instead of its own attention: [B, H, T, D] to [B, T, H, D]."""
    if _run is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise RuntimeError('this attention works for calibration alone, on one sequence without a cache')
    if sliding_window and sliding_window < key.shape[2]:
        raise ValueError(f'windows of {key.shape[2]} tokens are longer than the sliding window of '
                         f'the model, {sliding_window}')
    if softcap is not None or s_aux is not None:
        raise ValueError('the model caps its attention scores (softcapping)' if softcap is not None
                         else 'the model has attention sinks')
    heads, tokens, dim = query.shape[1:]
    kv_heads = key.shape[1]
    q, k, v = query[0].float(), key[0].float(), value[0].float()
    scale = dim ** -0.5 if scaling is None else scaling
    q = q.view(kv_heads, heads // kv_heads, tokens, dim)
    seen = functools.partial(_run.seen, module.layer_idx)
    if _run.gradients:
        out = _attention_class().apply(q, k, v, scale, _run.distance, seen)
    else:
        weight = module.o_proj.weight.float().t().view(*q.shape[:2], dim, -1)
        out, *moves = _estimating_attention(q, k, v, scale, _run.distance, weight, _run.stream)
        seen(q, k, v, *moves)
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


def _recomputing(forward):
    """A layer's forward() that keeps its input alone, and computes all else again for the backward pass."""
    from torch.utils.checkpoint import checkpoint

    def run(*args, **kwargs):
        if _run is None or not (_run.gradients and _run.recompute):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


@contextlib.contextmanager
def _replaced(module, forward) -> Iterator[None]:
    """The module with another forward(); a module may have one of its own already."""
    before = module.__dict__.get('forward')
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _rotary(model):
    """The module that makes cos and sin of all positions."""
    found = [m for name, m in model.named_modules() if name.split('.')[-1] == 'rotary_emb']
    if len(found) != 1:
        raise ValueError(f'the model has {len(found)} modules named rotary_emb, expected 1: only '
                         'models built like LLaMA, Mistral, Qwen2 and Qwen3 are known here')
    return found[0]


@contextlib.contextmanager
def calibrating(model) -> Iterator[None]:
    """The model with our attention, its weights without gradients; as it was afterwards."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    rotary = _rotary(model)

    def keep_rope(module, inputs, output):
        _run.rope = tuple(x[0].detach().float() for x in output)

    def want_gradients(module, inputs, output):
        return output.requires_grad_() if _run.gradients else output

    def keep_stream(module, inputs):
        _run.stream = inputs[0][0].detach().float().square().sum(-1)

    before, training = model.config._attn_implementation, model.training
    wanted = [p.requires_grad for p in model.parameters()]
    layers = [m for m in model.modules() if hasattr(m, 'self_attn')]
    hooks = [rotary.register_forward_hook(keep_rope),
             model.get_input_embeddings().register_forward_hook(want_gradients)]
    hooks += [layer.register_forward_pre_hook(keep_stream) for layer in layers]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_replaced(layer, _recomputing(layer.forward)))
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


def _loss(logits, targets, weights, labels: str, generator):
    """The summed loss of some tokens of a window; logits [tokens, vocabulary]."""
    import torch
    import torch.nn.functional as functional
    w = torch.ones(len(targets), device=logits.device) if weights is None else weights
    loss = logits.new_zeros(())
    if labels in ('text', 'both'):
        loss = loss + (functional.cross_entropy(logits, targets, reduction='none') * w).sum()
    if labels in ('model', 'both'):
        # Squares of these gradients are the Fisher matrix, which is linear in the weight.
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
        loss = loss + (functional.cross_entropy(logits, drawn[:, 0].to(logits.device),
                                                reduction='none') * w.sqrt()).sum()
    return loss


def _body(model):
    """The part of the model before its logits, or None where the two cannot be told apart."""
    import torch
    body = getattr(model, getattr(model, 'base_model_prefix', None) or ' ', None)
    head = model.get_output_embeddings()
    if (not isinstance(body, torch.nn.Module) or body is model or head is None
            or any(m is head for m in body.modules())):
        return None
    return body


def _pass(model, ids, weights, labels: str, generator) -> float:
    """A window forward, and backward where gradients are on; the summed loss.

    Logits are made of some tokens at a time: of a large vocabulary they would take more than all else.
    """
    import torch
    body = _body(model)
    targets, weights = ids[1:], None if weights is None else weights[1:]

    def loss_of(logits, a):
        logits = logits[:len(targets) - a].float()  # no token follows the last
        part = slice(a, a + len(logits))
        loss = _loss(logits, targets[part], None if weights is None else weights[part], labels, generator)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    if body is None:
        return loss_of(model(input_ids=ids[None], use_cache=False).logits[0], 0)
    outputs = body(input_ids=ids[None], use_cache=False)
    hidden, total = outputs.last_hidden_state, 0.0
    gradient = torch.zeros_like(hidden) if hidden.requires_grad else None
    step = max(16, LOGITS // model.config.get_text_config().vocab_size)
    for a in range(0, len(targets), step):
        part = hidden[:, a:a + step].detach().requires_grad_(hidden.requires_grad)
        some = copy.copy(outputs)
        some['last_hidden_state'] = part
        with _replaced(body, lambda *args, **kwargs: some):
            total += loss_of(model(input_ids=ids[None, a:a + step], use_cache=False).logits[0], a)
        if gradient is not None:
            gradient[:, a:a + step] = part.grad
    if gradient is not None:
        hidden.backward(gradient)
    return total


def observe(calibrator: Calibrator, model, ids: Any, weights: Any = None, *, codec: CodecParams,
            labels: str = 'text', gradients: bool = True, generator=None, recompute: bool = True) -> float:
    """Adds one window of token ids to a calibrator; returns the mean loss of its tokens.

    weights: factor on the loss of each token, [tokens]. Call it within calibrating(model). After an
    exception the calibrator may hold some layers of the window.
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

    def seen(layer, q, k, v, grad_k, grad_v):
        rope, part = _run.rope, slice(codec.n_sink, last)
        k, q = _unrotate(k, rope, False), _unrotate(q.flatten(0, 1), rope, False)
        grad_k = _unrotate(grad_k, rope, True) if gradients else _pair_means(grad_k, rope)
        calibrator.observe_gradients(layer, *(x[:, part].transpose(0, 1).contiguous().cpu()
                                              for x in (k, v, grad_k, grad_v, q)))

    _run = _Run(distance, gradients, recompute, seen)
    try:
        with torch.set_grad_enabled(gradients):
            return _pass(model, ids, weights, labels, generator) / (len(ids) - 1)
    finally:
        _run = None


class _Progress:
    """What is done and how long the rest will take, on stderr: a bar if somebody watches, lines in a log."""

    def __init__(self, done: int, total: int, show: bool | None):
        self.first, self.total = done, total
        self.start = self.shown = time.monotonic()
        self.bar = sys.stderr.isatty()
        self.show = self.bar if show is None else show
        if self.show and done:
            print(f'{done} of {total} windows were done before', file=sys.stderr, flush=True)

    def step(self, done: int, loss: float) -> None:
        now = time.monotonic()
        last = done == self.total
        if not self.show or not (self.bar or last or now - self.shown > 10):
            return
        self.shown = now
        left = (now - self.start) / (done - self.first) * (self.total - done)
        said = f'{done}/{self.total}, loss {loss:.3f}, {_duration(left)} left'
        if last:
            said = f'{done}/{self.total}, loss {loss:.3f}, {_duration(now - self.start)}    '
        if self.bar:
            said = f'\rcalibrating [{"#" * (30 * done // self.total):30}] {said} '
        print(said, end='' if self.bar and not last else '\n', file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes} min' if hours else f'{minutes} min {seconds} s' if minutes else f'{seconds} s'


def windows_of(texts: Iterable[Any], tokenizer: Any, window: int, limit: int | None = None) -> list[tuple]:
    """(ids, weights or None) of up to `window` tokens, as many as there are or `limit`. A text is str, token
    ids, or a pair of ids and weights; short texts are joined, what is left over at the end is kept if it is
    half a window. After `limit` windows no text is read."""
    if isinstance(texts, str):
        raise TypeError('texts: a list of texts is expected, not one text')
    if window < 1:
        raise ValueError(f'window: {window} tokens')
    windows: list[tuple] = []
    joined = numpy.zeros(0, numpy.int64)
    for text in texts:
        if limit is not None and len(windows) >= limit:
            break
        if isinstance(text, tuple):
            windows.append(text)
            continue
        if isinstance(text, str):
            if tokenizer is None:
                raise TypeError('texts need a tokenizer; give token ids without one')
            text = tokenizer(text)['input_ids']
        joined = numpy.concatenate([joined, numpy.asarray(text, numpy.int64)])
        whole = len(joined) // window * window
        windows += [(ids, None) for ids in joined[:whole].reshape(-1, window)]
        joined = joined[whole:]
    if len(joined) >= window // 2:
        windows.append((joined, None))
    return windows[:limit]


def _check_windows(windows: list[tuple], window: int, vocabulary: int) -> None:
    if len(windows) < 2:
        raise ValueError(f'{len(windows)} windows of {window} tokens: at least two are needed, so more text or a '
                         'smaller window')
    largest = max(int(numpy.max(ids)) for ids, _ in windows)
    if largest >= vocabulary:
        raise ValueError(f'token {largest} is in the texts, and the vocabulary of the model has {vocabulary}')


def gather(model, texts: Iterable[Any], *, tokenizer: Any = None, context: Context | None = None,
           params: ModelParams | None = None, codec: CodecParams | None = None, window: int = 4096,
           max_windows: int | None = None, labels: str = 'text', gradients: bool = True,
           seed: int = 0, progress: bool | None = None, recompute: bool = True,
           state: Any = None) -> Calibrator:
    """Observes texts; the calibrator can be allocated from more than once, saved and merged.

    window       tokens of a forward and backward pass; as long as the contexts to come, if memory lets
    labels       'text': the gradients of the loss; 'model': of the loss on tokens that the model itself
                 draws (the Fisher matrix, without the text's surprises); 'both': their sum
    gradients    False: no backward pass; instead of the loss, how much an error moves what the layer adds to
                 the hidden state, which is worse (docs/calibration.md)
    progress     on stderr; by default if it is a terminal
    recompute    False: keeps what all layers have computed for the backward pass, which is faster and takes
                 memory with each layer
    state        a file that is written after every window, and gone on from if it is there: the result is
                 the same. One of another model, other texts or settings is an error, and left as it is
    """
    import torch
    if labels not in ('text', 'model', 'both'):
        raise ValueError(f"labels: {labels!r} is none of 'text', 'model', 'both'")
    _rotary(model)  # or it is none of those that are known
    context = context or Context()
    codec = _with_defaults(codec)
    windows = windows_of(texts, tokenizer, window, max_windows)
    _check_windows(windows, window, model.config.get_text_config().vocab_size)
    params = params or model_params(model.config)
    calibrator = Calibrator(context, params, criterion=Criterion.SENSITIVITY, codec=codec)
    generator = torch.Generator().manual_seed(seed)
    done, file = 0, None
    if state is not None:
        file = State(state, {'labels': labels, 'gradients': gradients, 'seed': seed, 'window': window,
                             'codec': dataclasses.asdict(codec), 'geometry': dataclasses.asdict(params),
                             'weights': weights_digest(model)})
        done, data = file.load(windows, generator)
        if done:
            calibrator.close()
            calibrator = Calibrator.loads(context, data, params)
    bar = _Progress(done, len(windows), progress)
    with calibrating(model):
        for i, (ids, weights) in enumerate(windows[done:], done):
            loss = observe(calibrator, model, ids, weights, codec=codec, labels=labels,
                           gradients=gradients, generator=generator, recompute=recompute)
            if file:
                file.save(ids, weights, generator, calibrator)
            bar.step(i + 1, loss)
    return calibrator


def _with_defaults(codec: CodecParams | None) -> CodecParams:
    given = dataclasses.asdict(codec or CodecParams())
    defaults = {'group': 128, 'block': 128, 'n_sink': 4, 'n_local': 128}
    return CodecParams(**defaults | {name: x for name, x in given.items() if x is not None})


def check_target(context: Context, params: ModelParams, codec: CodecParams | None,
                 target: AllocationParams) -> None:
    """Raises what allocate() will raise if no calibration can reach the target: before the work, not after."""
    random = numpy.random.default_rng(1)
    shape = 8, params.n_kv_heads, params.head_dim
    with Calibrator(context, params, criterion=Criterion.SENSITIVITY, codec=_with_defaults(codec)) as some:
        for layer in 2 * list(range(params.n_layers)):
            some.observe_gradients(layer, *(random.normal(size=shape).astype(numpy.float32) for _ in range(4)))
        some.allocate(target)[0].close()


def calibrate(model, texts: Iterable[Any], target: float = 12.0, *, tokens: int = 8192,
              **options) -> tuple[Profile, AllocationInfo]:
    """A profile for a Hugging Face model that takes 1/target of dense f16 at `tokens` tokens.

    texts: strings (with tokenizer=...), sequences of token ids, or pairs of ids and weights. Other options
    are those of gather().
    """
    _rotary(model)
    options['context'] = options.get('context') or Context()
    options['params'] = options.get('params') or model_params(model.config)
    wanted = AllocationParams(target=Target.RATIO, value=target, tokens=tokens)
    check_target(options['context'], options['params'], options.get('codec'), wanted)
    with gather(model, texts, **options) as calibrator:
        return calibrator.allocate(wanted)
