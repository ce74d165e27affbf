# SPDX-License-Identifier: Apache-2.0
"""What cannot be is refused, with the reason."""
import copy
import sys

import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
import fkv.transformers  # noqa: E402
from fkv.transformers import FkvCache, disable, enable, enabled  # noqa: E402

import hf  # noqa: E402

pytestmark = pytest.mark.torch


def tiny(name, **more):
    """A small model of another architecture."""
    torch.manual_seed(1)
    fields = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1,
                  eos_token_id=2, max_position_embeddings=128)
    fields.update(more)
    config = getattr(transformers, f'{name}Config')(**fields)
    kind = {'T5': 'T5ForConditionalGeneration', 'GPT2': 'GPT2LMHeadModel'}.get(name, f'{name}ForCausalLM')
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize('make, reason', [
    (lambda: tiny('Gemma2'), 'softcapping'),
    (lambda: tiny('DeepseekV3', kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
                  v_head_dim=16, first_k_dense_replace=2, num_key_value_heads=4), r'latents \(MLA\)'),
    (lambda: tiny('GptOss', num_local_experts=2, num_experts_per_tok=1,
                  layer_types=['full_attention'] * 2), 'attention sinks'),
    (lambda: tiny('T5', num_layers=1, d_model=32, d_kv=8, d_ff=32, num_heads=4), 'cross attention'),
    (lambda: tiny('Cohere'), 'not rotated as its configuration says'),
    (lambda: tiny('SmolLM3', no_rope_layers=[1, 0]), 'layer 1 has no RoPE'),
    (lambda: tiny('GPT2', n_embd=32, n_layer=1, n_head=4), 'in a list'),
    (lambda: hf.small('Mistral', sliding_window=32), 'all of its layers have a sliding window'),
    (lambda: hf.small(rope_parameters={'rope_type': 'dynamic', 'factor': 2.0, 'rope_theta': 1e4}), "type 'dynamic'"),
    (lambda: hf.small(head_dim=12), 'head_dim')],
    ids=['gemma2', 'deepseek', 'gpt-oss', 't5', 'cohere', 'smollm3', 'gpt2', 'windows', 'dynamic', 'dim'])
def test_models_without_support(make, reason):
    model = make()
    before = copy.deepcopy(model.config._attn_implementation), len(model._forward_pre_hooks)
    with pytest.raises(fkv.UnsupportedError, match=reason):
        enable(model)
    assert not enabled(model) and before == (model.config._attn_implementation, len(model._forward_pre_hooks))
    assert '_prepare_cache_for_generation' not in vars(model)


@pytest.mark.parametrize('name, more', [('Phi3', dict(partial_rotary_factor=.5)), ('Granite', dict(
    attention_multiplier=.1)), ('Olmo2', {}), ('Mixtral', dict(num_local_experts=2)),
    ('Gemma', {}), ('Qwen3Moe', dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32))])
def test_models_alike_are_supported(name, more):
    """Partial RoPE, other scales, normalised heads, experts: whatever passes the probe."""
    model = tiny(name, initializer_range=.25, **more)
    arguments = dict(input_ids=hf.prompt(30, 2) % 64, max_new_tokens=20, do_sample=False)
    expected = model.generate(**arguments)
    enable(model)
    assert torch.equal(model.generate(**arguments), expected)


@pytest.mark.parametrize('rope', [
    {'rope_type': 'linear', 'factor': 4.0}, {'rope_type': 'yarn', 'factor': 4.0},
    {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
     'original_max_position_embeddings': 512}], ids=lambda rope: rope['rope_type'])
def test_kinds_of_rope(rope):
    model = hf.small(rope_parameters={'rope_theta': 1e4, **rope})
    arguments = dict(input_ids=hf.prompt(100), max_new_tokens=30, do_sample=False)
    expected = model.generate(**arguments)
    enable(model)
    assert torch.equal(model.generate(**arguments), expected)


def test_enable_and_disable():
    model = hf.small()
    before = model.config._attn_implementation
    assert not enabled(model)
    disable(model)
    assert enable(model) is model and enabled(model) and model.config._attn_implementation == 'fkv'
    enable(model, threads=1)  # again, with other settings
    disable(model)
    assert not enabled(model) and model.config._attn_implementation == before
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [h for h in hooks if 'fkv' in getattr(h, '__module__', '')]
    assert '_prepare_cache_for_generation' not in vars(model)
    model.set_attn_implementation('eager')
    enable(model)
    disable(model)
    assert model.config._attn_implementation == 'eager'
    assert 'fkv' in transformers.AttentionInterface().valid_keys()
    assert 'fkv' in transformers.AttentionMaskInterface().valid_keys()


def test_copy_of_an_enabled_model():
    """A copy is a model of the framework's until it is enabled, too."""
    model = enable(hf.small(), prefill='framework')
    arguments = dict(input_ids=hf.prompt(20, 2), max_new_tokens=20, do_sample=False)
    expected = model.generate(**arguments)
    twin = copy.deepcopy(model)
    del model
    assert not enabled(twin) and torch.equal(twin.generate(**arguments), expected)
    enable(twin, prefill='framework')
    assert torch.equal(twin.generate(**arguments), expected)
    out = twin.generate(**arguments, return_dict_in_generate=True)
    assert isinstance(out[hf.cache_name()], FkvCache)


def test_enabling_again_in_vain_leaves_all_as_it_was():
    model = enable(hf.small(), longcache=dict(n_local=64, chunk=32))
    with pytest.raises(fkv.FileError):
        enable(model, '/nowhere.json')
    assert enabled(model) and FkvCache(model).store.select is not None


def test_cache_of_a_model_that_is_not_enabled():
    model = hf.small()
    with pytest.raises(ValueError, match='enable'):
        FkvCache(model)
    enable(model)
    cache = FkvCache(model)
    disable(model)
    with pytest.raises(fkv.Error, match='enable'):
        hf.last_logits(model, hf.prompt(5), cache)


def test_profiles_that_do_not_fit():
    model, other = hf.small(), hf.small(num_key_value_heads=4)
    context = fkv.Context(threads=1)
    for wrong in (fkv.Profile.exact(context, fkv.model_params(other.config)),
                  fkv.Profile.exact(context, fkv.model_params(hf.small(layers=2).config))):
        with pytest.raises(fkv.MismatchError):
            enable(model, wrong)
    assert not enabled(model)
    with pytest.raises(fkv.FileError):
        enable(model, '/nowhere.json')
    with pytest.raises(TypeError, match='profile'):
        enable(model, 12)
    with pytest.raises(ValueError, match='prefill'):
        enable(model, prefill='fast')
    with pytest.raises(TypeError, match='longcache'):
        enable(model, longcache=5)
    with pytest.raises(fkv.UnsupportedError):
        enable(model, fkv.Profile.exact(context, fkv.model_params(model.config)), longcache=True)
    with pytest.raises(TypeError, match='float64'):
        enable(hf.small().double())
    assert not enabled(model)


@pytest.fixture
def ready():
    model = enable(hf.small())
    cache = FkvCache(model)
    batch = hf.padded((10, 6))
    hf.last_logits(model, batch['input_ids'], cache, attention_mask=batch['attention_mask'])
    return model, cache, batch['attention_mask']


def test_wrong_calls(ready):
    model, cache, mask = ready
    ids, ones = hf.prompt(3, 2), torch.ones(2, 3, dtype=torch.long)
    longer = torch.cat((mask, ones), 1)

    def call(ids=ids, no_grad=True, **more):
        with torch.set_grad_enabled(not no_grad):
            model(ids, **{hf.cache_name(): cache}, **more)

    changed = longer.clone()
    changed[0, 2] = 0
    for arguments, text in (  # text: of the message
            (dict(), 'attention_mask is missing'),
            (dict(attention_mask=ones), r'shape \(2, 3\)'),
            (dict(attention_mask=changed), 'differs from that of earlier'),
            (dict(attention_mask=torch.zeros(2, 1, 3, 13)), 'this mask has shape'),
            (dict(attention_mask=longer, ids=hf.prompt(3, 3)), 'index|size|sequences'),
            (dict(attention_mask=longer, output_attentions=True), 'weights'),
            (dict(attention_mask=longer, no_grad=False), 'no_grad')):
        with pytest.raises((ValueError, RuntimeError, IndexError), match=text):
            call(**arguments)
        assert cache.get_seq_length() == 10 and cache.stats().tokens == 16
    call(attention_mask=longer)
    assert cache.get_seq_length() == 13


def test_batch_of_another_size(ready):
    model, _, _ = ready
    cache = FkvCache(model)
    hf.last_logits(model, hf.prompt(4, 2), cache)
    with pytest.raises(ValueError, match='holds 2 sequences, and this input has 3'):
        hf.last_logits(model, hf.prompt(4, 3), cache)


@pytest.mark.parametrize('version, good', [('4.57.1', False), ('5.0.0', True), ('5.24.0.dev0', True),
                                           ('6.0.0', False), ('6.0.0.dev0', False)])
def test_range_of_versions(monkeypatch, version, good):
    monkeypatch.setattr(sys.modules['transformers'], '__version__', version)  # it replaces itself
    if good:
        fkv.transformers._check_version()
    else:
        with pytest.raises(ImportError, match=version):
            fkv.transformers._check_version()


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match=r'fkv\[transformers\]'):
        fkv.transformers._check_version()


def test_importing_fkv_does_not_import_transformers():
    import subprocess
    code = 'import fkv, sys; assert "torch" not in sys.modules and "transformers" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)
