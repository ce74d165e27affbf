# SPDX-License-Identifier: Apache-2.0
"""The model in plain torch, with names and files as Hugging Face's LlamaForCausalLM has them."""
from __future__ import annotations

import dataclasses
import json
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

INDEX = 'model.safetensors.index.json'


@dataclasses.dataclass(frozen=True)
class Config:
    """Named as in config.json."""

    vocab_size: int = 320  # 256 bytes, bos, eos, and room
    hidden_size: int = 384
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1024
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 8:
            raise ValueError('query heads must be a multiple of KV heads, and head_dim of 8')


def rotations(config: Config, count: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [count, head_dim / 2] of RoPE at positions from 0."""
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float64, device=device)
    speed = config.rope_theta ** (-2 * pairs / config.head_dim)
    angle = torch.outer(torch.arange(count, dtype=torch.float64, device=device), speed)
    return angle.cos().float(), angle.sin().float()


def rotate(x: torch.Tensor, rope) -> torch.Tensor:
    """Channel j turns with j + head_dim / 2; x is [.., tokens, head_dim]."""
    cos, sin = rope
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        wide, narrow = (n * config.head_dim
                        for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, rope):
        q, k, v = (self.heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        seen = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True,
                                              enable_gqa=True)
        return self.o_proj(seen.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm, self.self_attn = Norm(config), Attention(config)
        self.post_attention_layernorm, self.mlp = Norm(config), Mlp(config)

    def forward(self, x, rope):
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config)


class Llama(nn.Module):
    """Token ids [batch, tokens] to logits [batch, tokens, vocabulary]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self._initialise()

    def _initialise(self):
        """Matrices keep the size of what they read; what is added to the stream is shared among all adders."""
        adders = 2 * self.config.num_hidden_layers
        for name, weight in self.named_parameters():
            if name.endswith('embed_tokens.weight'):
                nn.init.normal_(weight, std=0.02)
            elif weight.ndim == 2:
                share = adders if name.endswith(('o_proj.weight', 'down_proj.weight')) else 1
                nn.init.normal_(weight, std=(weight.shape[1] * share) ** -0.5)

    def forward(self, ids, rope=None):
        if rope is None:
            rope = rotations(self.config, ids.shape[1], ids.device)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, rope)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def hugging_face_config(config: Config, window: int) -> dict:
    return {**dataclasses.asdict(config), 'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
            'hidden_act': 'silu', 'tie_word_embeddings': True, 'max_position_embeddings': window,
            'attention_bias': False, 'mlp_bias': False, 'torch_dtype': 'bfloat16', 'bos_token_id': 256,
            'eos_token_id': 257, 'initializer_range': 0.02}


def _halves(weights: dict) -> list[dict]:
    """Two files of about the same size, each within what hosts of repositories like."""
    total = sum(weight.numel() for weight in weights.values())
    parts, before = [{}, {}], 0
    for name, weight in weights.items():
        parts[before * 2 >= total][name] = weight
        before += weight.numel()
    return parts


def save(model: Llama, folder: pathlib.Path, window: int) -> None:
    """config.json, the weights in bfloat16 in two files, and which is where. `window`: longest in training."""
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().to('cpu', torch.bfloat16).contiguous()
               for name, weight in model.state_dict().items()}
    parts, where = _halves(weights), {}
    for number, part in enumerate(parts, 1):
        file = f'model-{number:05}-of-{len(parts):05}.safetensors'
        save_file(part, folder / file, metadata={'format': 'pt'})
        where.update(dict.fromkeys(part, file))
    index = {'metadata': {'total_size': sum(2 * weight.numel() for weight in weights.values())},
             'weight_map': where}
    for name, content in ((INDEX, index), ('config.json', hugging_face_config(model.config, window))):
        (folder / name).write_text(json.dumps(content, indent=1), encoding='utf-8')


def load(folder: pathlib.Path, device='cpu') -> tuple[Llama, int]:
    """The model in float32, and the longest window of its training."""
    from safetensors.torch import load_file
    stored = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    model = Llama(Config(**{field.name: stored[field.name] for field in dataclasses.fields(Config)}))
    index = json.loads((folder / INDEX).read_text(encoding='utf-8'))
    weights = {}
    for file in sorted(set(index['weight_map'].values())):
        weights.update(load_file(folder / file))
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.to(device), stored['max_position_embeddings']
