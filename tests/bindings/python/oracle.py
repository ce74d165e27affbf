# SPDX-License-Identifier: Apache-2.0
"""A small model, and attention in float64 written from the definitions."""
import pathlib

import fkv
import numpy

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent.parent
LAYERS, Q_HEADS, KV_HEADS, DIM = 2, 4, 2, 16
FOURIER = fkv.FourierParams(storage_dtype='f32', coefficient_dtype='f32', bins=8, n_sink=2,
                            n_local=16, period=256)


def frequencies(rope_dim, theta=10000.0):
    return [theta ** (-2.0 * j / rope_dim) for j in range(rope_dim // 2)]


def model(layout='half_split', rope_dim=DIM, **more):
    rope = {} if layout == 'none' else {'rope_dim': rope_dim, 'inv_freq': frequencies(rope_dim)}
    return fkv.ModelParams(**{**dict(n_layers=LAYERS, n_q_heads=Q_HEADS, n_kv_heads=KV_HEADS,
                                     head_dim=DIM, rope_layout=layout), **rope, **more})


def tokens(random, count, q_heads=Q_HEADS, kv_heads=KV_HEADS, dim=DIM, dtype=numpy.float32):
    """q, k, v of that many tokens."""
    return tuple(random.standard_normal((count, heads, dim)).astype(dtype)
                 for heads in (q_heads, kv_heads, kv_heads))


def rotate(x, positions, layout='half_split', rope_dim=DIM, scaling=1.0):
    """RoPE of x [tokens, heads, D]."""
    out = numpy.array(x, numpy.float64)
    if layout == 'none':
        return out
    angle = numpy.outer(positions, frequencies(rope_dim))[:, None, :]
    cos, sin = numpy.cos(angle) * scaling, numpy.sin(angle) * scaling
    half = rope_dim // 2
    first, second = ((slice(0, half), slice(half, rope_dim)) if layout == 'half_split'
                     else (slice(0, rope_dim, 2), slice(1, rope_dim, 2)))
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


def attention(q, k, v, seen, scale=None):
    """Of queries that see the first `seen` tokens each, all rotated before: (out, lse)."""
    q, k, v = (numpy.asarray(x, numpy.float64) for x in (q, k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    out, lse = numpy.zeros(q.shape), numpy.full(q.shape[:2], -numpy.inf)
    for token, count in enumerate(seen):
        for head in range(q.shape[1]) if count else ():
            score = scale * k[:count, head // group] @ q[token, head]
            weight = numpy.exp(score - score.max())
            out[token, head] = weight @ v[:count, head // group] / weight.sum()
            lse[token, head] = score.max() + numpy.log(weight.sum())
    return out, lse


def causal(q, k, v, layout='half_split', rope_dim=DIM, scale=None, positions=None, scaling=1.0):
    """Of a whole prompt."""
    where = numpy.arange(len(q)) if positions is None else positions
    return attention(rotate(q, where, layout, rope_dim, scaling),
                     rotate(k, where, layout, rope_dim, scaling), v,
                     range(1, len(q) + 1), scale)


def fill(cache, sequence, random, count):
    """Appends `count` random tokens to every layer; (q, k, v) of each."""
    given = []
    with cache.plan() as plan:
        plan.update([sequence], count)
        for layer in range(cache.profile.info.n_layers):
            given.append(tokens(random, count))
            plan.append(layer, *given[-1][1:])
    return given
