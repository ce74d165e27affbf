# SPDX-License-Identifier: Apache-2.0
"""Small models of transformers, for the tests that have them."""
import os
import pathlib

import fkv.transformers
import torch
import transformers

# Small models gain nothing from threads, and on a busy machine wait for one another.
torch.set_num_threads(1)
os.environ.setdefault('OMP_NUM_THREADS', '1')  # of the processes that tests start

ROOT = pathlib.Path(__file__).resolve().parents[3]
NEEDLE = ROOT / 'examples/models/needle-13m'
FAMILIES = 'Llama', 'Mistral', 'Qwen2', 'Qwen3'
VOCABULARY, EOS = 97, 96


def small(family='Llama', layers=3, seed=1, **more):
    """A model with random weights, large enough for outputs that are not all alike."""
    torch.manual_seed(seed)
    fields = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=.25,
                  max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=EOS)
    if family == 'Mistral':
        fields['sliding_window'] = None
    fields.update(more)
    config = getattr(transformers, f'{family}Config')(**fields)
    return getattr(transformers, f'{family}ForCausalLM')(config).eval()


def mixed(**more):
    """A Qwen2 whose layers 1 and 3 have a sliding window of 16 tokens."""
    kinds = ['full_attention', 'sliding_attention'] * 2
    return small('Qwen2', layers=4, use_sliding_window=True, sliding_window=16, layer_types=kinds, **more)


def needle(dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(NEEDLE, dtype=dtype).eval()
    model.generation_config.eos_token_id = 319  # never said; 5.0 cannot draft without one
    model.generation_config.pad_token_id = 0
    return model


def prompt(tokens, batch=1, seed=3):
    return torch.randint(1, EOS, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded(lengths, seed=3):
    """A batch of prompts of these lengths, padded at the left, and its attention mask."""
    ids = prompt(max(lengths), len(lengths), seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :max(lengths) - length] = 0
        mask[row, :max(lengths) - length] = 0
    return dict(input_ids=ids, attention_mask=mask)


def cache_name():
    """What the model's calls name a cache: it changed within 5."""
    return fkv.transformers.CACHE_NAME


def last_logits(model, ids, cache=None, **more):
    """Logits of a call of the model itself."""
    with torch.no_grad():
        return model(ids, **({} if cache is None else {cache_name(): cache}), **more).logits
