"""A Dream model for decoding alone, without transformers: importing that takes longer than loading a small model.

For: weights under transformers' names, from which `FastLayers` reads what it needs. Not for: training and the released
arithmetic. `Denoiser.model` makes a transformers model around the same weights when it is first asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffucoder.files import Json

_RELEASED = {
    **{"model_type": "Dream", "hidden_act": "silu", "rope_scaling": None},
    **{"tie_word_embeddings": False, "use_sliding_window": False},
}
_ABSENT = {"head_dim", "layer_types", "partial_rotary_factor", "quantization_config", "rope_parameters"}
_SIZES = (
    *("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "rms_norm_eps", "rope_theta", "vocab_size"),
)


class PlainConfig(SimpleNamespace):
    """The fields of a Dream config.json."""

    is_causal = False

    @classmethod
    def of(cls, described: Json) -> "PlainConfig | None":
        """The config that checked fields describe; None unless it is like the released models'."""
        if {**described, **_RELEASED} != described or _ABSENT & described.keys():
            return None
        if not all(described.get(name) for name in _SIZES):
            return None
        config = cls(**described)
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

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head


def _layer(config: PlainConfig) -> nn.Module:
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
        angles = (positions[..., None].float() * frequencies.to(positions.device)).repeat(1, 1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
