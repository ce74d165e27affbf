# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # A model of Hugging Face with caches of libfkv
#
# Cells are marked as editors with notebooks know them (`# %%`); as a program: `python3 examples/hf_notebook.py`.
# It needs the package with its extra, `pip install './bindings/python[transformers]'`.

# %%
import copy
import pathlib
import random
import time

import torch
import transformers

import fkv.transformers

transformers.utils.logging.set_verbosity_error()
HERE = pathlib.Path(__file__).resolve().parent if '__file__' in globals() else pathlib.Path('examples')
MODEL = HERE / 'models/needle-13m'
TOKENS, KEYS, ASKED = 4096, 24, 4

# %% [markdown]
# The small model of this repository: its tokens are bytes, so there is no tokenizer. Yours has one; all else is the same.

# %%
model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
fkv.transformers.enable(model)


def ids(text):
    return torch.tensor([list(text.encode('ascii', 'ignore'))])


# %% [markdown]
# A text with two dozen facts in it, from this repository's own documents.

# %%
dice = random.Random(1)
prose = (HERE.parent / 'docs/codec.md').read_text(encoding='utf-8').encode('ascii', 'ignore').decode()
words = sorted({word for word in prose.split() if word.isalpha() and word.islower() and 4 <= len(word) <= 10})
facts = {f'{dice.choice(words)}-{dice.choice(words)}': f'{dice.randrange(10**7):07}' for _ in range(KEYS)}
step = TOKENS // KEYS - 75
text = ''.join(prose[i * step:(i + 1) * step] + f'\nOne of the special magic numbers for {key} is: {number}.\n'
               for i, (key, number) in enumerate(facts.items()))
print(f'{len(text)} bytes, for instance{text[step:step + 70]!r}')

# %% [markdown]
# The text is read once into a cache. Every question gets a copy of it, which shares its memory. The text is coded before it
# is asked; only the newest 128 tokens and the first 4 are exact.


# %%
def read(profile):
    cache = fkv.transformers.FkvCache(model, profile)
    with torch.no_grad():
        model(ids(text), **{fkv.transformers.CACHE_NAME: cache}, logits_to_keep=1)
    return cache


def ask(cache, key):
    question = text + (f'What is the special magic number for {key} mentioned in the provided text? The special '
                       f'magic number for {key} mentioned in the provided text is')
    out = model.generate(ids(question), max_new_tokens=9, do_sample=False,
                         **{fkv.transformers.CACHE_NAME: copy.deepcopy(cache)})
    return bytes(out[0, -9:].clamp(max=255).tolist()).decode('ascii', 'replace')


print(f'{"held":16}{"bytes":>10}{"ratio":>8}{"right":>7}{"seconds":>9}')
for name in (None, 'calibrated-4x.json', 'calibrated-12x.json', 'calibrated-20x.json'):
    begin = time.perf_counter()
    cache = read(name and MODEL / name)
    right = sum(ask(cache, key) == f' {facts[key]}.' for key in dice.sample(sorted(facts), ASKED))
    stats = cache.stats()
    print(f'{(name or "exactly").removesuffix(".json"):16}{stats.bytes:10}{stats.ratio:8.2f}{right:4}/{ASKED}'
          f'{time.perf_counter() - begin:9.1f}')

# %% [markdown]
# Beams, drafts and sampling work on coded caches as on any.

# %%
fkv.transformers.enable(model, MODEL / 'calibrated-12x.json')
prompt = ids(text + 'The library')
for how in (dict(num_beams=4, do_sample=False), dict(prompt_lookup_num_tokens=8, do_sample=False),
            dict(do_sample=True, top_k=20)):
    torch.manual_seed(2)
    model.generation_config.eos_token_id = 319
    model.generation_config.pad_token_id = 0
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, **how)
    print(repr(bytes(out[0, prompt.shape[1]:].clamp(max=255).tolist()).decode('ascii', 'replace')), how)

# %%
fkv.transformers.disable(model)
