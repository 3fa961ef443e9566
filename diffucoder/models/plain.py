"""A Dream model for decoding alone, without transformers: importing that takes longer than loading the shipped model.

For: weights under transformers' names, from which `FastLayers` reads what it needs. Not for: training and the released
arithmetic. `Denoiser.model` makes a transformers model around the same weights when it is first asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class PlainModel(nn.Module):
    """The weights of a Dream model, not computed with here. They are on the device "meta" until they are loaded."""

    _no_split_modules = ()

    def __init__(self, config: SimpleNamespace, whole: Callable[[], Any]) -> None:
        """`config` has the fields of a config.json. `whole` loads the same model with transformers."""
        super().__init__()
        self.whole = whole
        self.config = config
        size = config.hidden_size
        body: Any = nn.Module()
        with torch.device("meta"):
            embeddings = torch.empty(config.vocab_size, size)  # given, since drawing them imports the compiler
            body.embed_tokens = nn.Embedding(config.vocab_size, size, _weight=embeddings)
            body.layers = nn.ModuleList(_layer(config) for _ in range(config.num_hidden_layers))
            body.norm = nn.RMSNorm(size)
            self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        body.rotary_emb = _Rotation(config.rope_theta, size // config.num_attention_heads)
        self.model = body

    @property
    def base_model(self) -> Any:
        """The layers and the last norm, without the head."""
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head


def _layer(config: SimpleNamespace) -> Any:
    size = config.hidden_size
    layer: Any = nn.Module()
    layer.self_attn = nn.Module()
    layer.self_attn.head_dim = size // config.num_attention_heads
    keys = layer.self_attn.head_dim * config.num_key_value_heads
    for name, out in (("q_proj", size), ("k_proj", keys), ("v_proj", keys)):
        layer.self_attn.add_module(name, nn.Linear(size, out))
    layer.self_attn.o_proj = nn.Linear(size, size, bias=False)
    layer.mlp = nn.Module()
    for name in ("gate_proj", "up_proj"):
        layer.mlp.add_module(name, nn.Linear(size, config.intermediate_size, bias=False))
    layer.mlp.down_proj = nn.Linear(config.intermediate_size, size, bias=False)
    layer.input_layernorm = nn.RMSNorm(size)
    layer.post_attention_layernorm = nn.RMSNorm(size)
    return layer


@dataclass(frozen=True)
class _Rotation:
    """Cosines and sines of RoPE, as transformers computes them."""

    theta: float
    head_dim: int
    rope_type = "default"

    def __call__(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) each for `positions` (...), in the dtype of `like`."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float) / self.head_dim
        frequencies = 1.0 / self.theta**exponents  # on the CPU, as transformers has them
        half = positions[..., None].float() * frequencies.to(positions.device)
        angles = torch.cat([half, half], -1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
