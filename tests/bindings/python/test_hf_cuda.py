# SPDX-License-Identifier: Apache-2.0
"""Models on a CUDA device, with caches there."""
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
import fkv.transformers  # noqa: E402
from fkv.transformers import FkvCache  # noqa: E402

import hf  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')]


@pytest.fixture
def model():
    fields = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, initializer_range=.1)
    model = hf.small(**fields).to('cuda', torch.bfloat16)
    try:
        return fkv.transformers.enable(model)
    except fkv.UnsupportedError as error:
        if 'module' in str(error):
            pytest.skip(str(error))
        raise


def close(a, b, bound=.03):
    a, b = a.float(), b.float()
    return (a - b).square().mean() < bound ** 2 * b.square().mean()


def test_steps(model):
    ids = hf.prompt(300, 2).cuda()
    expected = hf.last_logits(model, ids)
    cache = FkvCache(model)
    got = [hf.last_logits(model, ids[:, a:b], cache) for a, b in ((0, 290), (290, 296), *(
        (i, i + 1) for i in range(296, 300)))]
    assert close(torch.cat(got, 1), expected)


def test_ragged_batch_and_beams(model):
    batch = {name: x.cuda() for name, x in hf.padded((150, 70, 9)).items()}
    out = model.generate(**batch, max_new_tokens=20, num_beams=3, do_sample=False)
    assert out.device.type == 'cuda' and out.shape[0] == 3
    positions = (batch['attention_mask'].cumsum(1) - 1).clamp_min(0)
    expected = hf.last_logits(model, position_ids=positions, ids=batch['input_ids'],
                              attention_mask=batch['attention_mask'])
    cache = FkvCache(model)
    got = [hf.last_logits(model, batch['input_ids'][:, a:b], cache, position_ids=positions[:, a:b],
                          attention_mask=batch['attention_mask'][:, :b]) for a, b in ((0, 148), (148, 149), (149, 150))]
    real = batch['attention_mask'].bool()
    assert close(torch.cat(got, 1)[real], expected[real])


def test_coded(model):
    codec = fkv.CodecParams(group=64, block=64, n_sink=2, n_local=64)
    context = fkv.transformers._enable.settings_of(model).context
    ids = hf.prompt(1000).cuda()
    expected = hf.last_logits(model, ids)
    errors = []
    for bits in (8, 2):
        profile = fkv.Profile.uniform(context, fkv.model_params(model.config), bits, codec)
        cache = FkvCache(model, profile)
        hf.last_logits(model, ids[:, :990], cache)
        got = torch.cat([hf.last_logits(model, ids[:, i:i + 1], cache) for i in range(990, 1000)], 1)
        errors.append((got.float() - expected[:, 990:].float()).square().mean().sqrt().item())
        assert cache.stats().tokens_coded > 800
    assert errors[0] < .1 * expected.float().square().mean().sqrt() and errors[0] < errors[1]


def test_another_stream(model):
    ids = hf.prompt(100).cuda()
    expected = hf.last_logits(model, ids)
    cache = FkvCache(model)
    first = hf.last_logits(model, ids[:, :90], cache)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = hf.last_logits(model, ids[:, 90:], cache)
        torch.cuda.current_stream().synchronize()
    assert close(torch.cat((first, second), 1), expected)


def test_selection_is_refused(model):
    with pytest.raises(fkv.UnsupportedError):
        FkvCache(model, longcache=True)
