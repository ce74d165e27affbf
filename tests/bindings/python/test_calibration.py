# SPDX-License-Identifier: Apache-2.0
"""fkv.calibration: the estimate that takes the place of gradients."""
import pytest

torch = pytest.importorskip('torch')

from fkv import calibration  # noqa: E402

pytestmark = pytest.mark.torch

HEADS, GROUP, TOKENS, DIM, HIDDEN, DISTANCE, SCALE = 2, 3, 11, 4, 7, 3, 0.6


def scores(q, k):
    s = torch.einsum('hgtd,hsd->hgts', q * SCALE, k)
    return s.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float('-inf'))


def far_moves(q, k, v, weight, stream):
    """By differentiation: squared moves of the hidden state, through far queries, for each k and v."""
    sums = []
    for which in (0, 1):
        total = torch.zeros_like(k)
        for g in range(GROUP):
            def hidden(x):
                keys, values = (x, v) if which == 0 else (k, x)
                p = scores(q[:, g:g + 1], keys).softmax(-1)
                out = torch.einsum('hgts,hsd->htd', p, values)
                return torch.einsum('htd,hdo->hto', out, weight[:, g])
            # [Hk, T, hidden, Hk, S, D]
            moves = torch.autograd.functional.jacobian(hidden, (k, v)[which]).square().sum(2)
            for h in range(HEADS):
                for t in range(TOKENS):
                    for s in range(max(0, t - DISTANCE + 1)):
                        total[h, s] += moves[h, t, h, s] / stream[t]
        sums.append(total)
    return sums


@pytest.mark.parametrize('chunk', [1, 4, 128])
def test_the_estimate_is_the_derivative(monkeypatch, chunk):
    monkeypatch.setattr(calibration, 'CHUNK', chunk)
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(HEADS, GROUP, TOKENS, DIM), draw(HEADS, TOKENS, DIM), draw(HEADS, TOKENS, DIM)
    weight, stream = draw(HEADS, GROUP, DIM, HIDDEN), draw(TOKENS).square() + 0.1
    out, *moved = calibration._estimating_attention(q, k, v, SCALE, DISTANCE, weight, stream)
    p = scores(q, k).softmax(-1)
    assert torch.allclose(out, torch.einsum('hgts,hsd->hgtd', p, v))
    for got, wanted in zip(moved, far_moves(q, k, v, weight, stream)):
        assert torch.allclose(got.square(), wanted, rtol=1e-9, atol=1e-12)
        assert (got[:, TOKENS - DISTANCE:] == 0).all()


def test_pairs_share_their_mean():
    x = torch.arange(12.).view(1, 2, 6)
    rope = (torch.zeros(2, 4), torch.zeros(2, 4))
    got = calibration._pair_means(x, rope)
    assert torch.allclose(got[0, 0], torch.tensor([2., 5., 2., 5., 8., 5.]).sqrt()
                          .where(torch.arange(6) < 4, x[0, 0]))
