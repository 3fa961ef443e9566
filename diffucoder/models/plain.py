"""A Dream model for decoding alone, without transformers: importing that takes longer than loading a small model.

For: weights under transformers' names, from which `FastLayers` reads what it needs. Not for: training and the released
arithmetic. `Denoiser.model` makes a transformers model around the same weights when it is first asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from diffucoder.files import Json

_FIXED = {"model_type": "Dream", "hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False}
_ABSENT = {"head_dim", "layer_types", "partial_rotary_factor", "quantization_config", "rope_parameters"}


@dataclass(frozen=True)
class PlainConfig:
    """The sizes of a Dream model, by the names of its config.json."""

    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    hidden_act = "silu"
    is_causal = False
    tie_word_embeddings = False

    @classmethod
    def of(cls, described: Json) -> "PlainConfig | None":
        """The config that a config.json describes; None unless it is one like the released models'."""
        fixed = all(name in described and described[name] == value for name, value in _FIXED.items())
        if not fixed or _ABSENT & described.keys() or described.get("use_sliding_window"):
            return None
        sizes: Json = {}
        for field in fields(cls):
            value = described.get(field.name, 0)
            if type(value) not in (int, field.type) or not 0 < value < 2**24:
                return None
            sizes[field.name] = value
        config = cls(**sizes)
        heads = config.num_attention_heads
        if config.hidden_size % (2 * heads) or heads % config.num_key_value_heads:
            return None
        return config


class PlainModel(nn.Module):
    """The weights of a Dream model, not computed with here. They are on the device "meta" until they are loaded."""

    whole: Callable[[], Any]  # returns a transformers model of the same weights; set by what loads them
    _no_split_modules = ()

    def __init__(self, config: PlainConfig) -> None:
        """Make the modules that `config` describes."""
        super().__init__()
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

    def get_input_embeddings(self) -> Any:
        """The embeddings of the tokens."""
        return self.model.get_submodule("embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head


def _layer(config: PlainConfig) -> nn.Module:
    size = config.hidden_size
    head_dim = size // config.num_attention_heads
    keys = head_dim * config.num_key_value_heads
    attention: Any = nn.Module()
    attention.head_dim = head_dim
    attention.q_proj = nn.Linear(size, size)
    attention.k_proj = nn.Linear(size, keys)
    attention.v_proj = nn.Linear(size, keys)
    attention.o_proj = nn.Linear(size, size, bias=False)
    feed_forward = nn.Module()
    feed_forward.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
    feed_forward.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
    feed_forward.down_proj = nn.Linear(config.intermediate_size, size, bias=False)
    layer = nn.Module()
    layer.self_attn = attention
    layer.mlp = feed_forward
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
        angles = positions[..., None].float() * frequencies.to(positions.device)
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
