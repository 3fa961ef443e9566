"""A transformer in plain torch, written from the descriptions of the families: the oracle of their loading.

It knows nothing of the package. Names of weights are the published ones, mapped by the table of each family.
"""

import torch
from torch import Tensor

QWEN = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
LLADA = {
    "embed": "model.transformer.wte",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}.",
    **{name: name for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")},
    **{"o_proj": "attn_out", "gate": "ff_proj", "up": "up_proj", "down": "ff_out"},
    **{"norm1": "attn_norm", "norm2": "ff_norm"},
}


def logits(weights: dict[str, Tensor], names: dict[str, str], tokens: Tensor, heads: int, **facts: float) -> Tensor:
    """Logits (T, V) of one row of tokens (T,), unshifted. Facts: theta, eps, block (0: attention to all)."""
    head_names = ("embed", "norm", "head")

    def weight(name: str, layer: int | None = None, kind: str = "weight") -> Tensor | None:
        prefix = "" if name in head_names else names["layer"].format(layer)
        return weights.get(f"{prefix}{names[name]}.{kind}")

    def normed(x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + facts["eps"]).sqrt() * scale

    def project(x: Tensor, name: str, layer: int) -> Tensor:
        y = x @ weight(name, layer).T
        bias = weight(name, layer, "bias")
        return y if bias is None else y + bias

    length = len(tokens)
    position = torch.arange(length)
    sees = torch.ones(length, length, dtype=torch.bool)
    if facts["block"]:
        sees = position[None] // facts["block"] <= position[:, None] // facts["block"]
    x = weight("embed")[tokens]
    layer = 0
    while weight("q_proj", layer) is not None:
        h = normed(x, weight("norm1", layer))
        q, k, v = (
            project(h, f"{part}_proj", layer).view(length, -1, weight("q_proj", layer).shape[0] // heads)
            for part in "qkv"
        )
        if weight("q_norm", layer) is not None:
            q, k = normed(q, weight("q_norm", layer)), normed(k, weight("k_norm", layer))
        half = q.shape[-1] // 2
        angle = position[:, None] / facts["theta"] ** (torch.arange(half) / half)  # (T, D / 2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        q, k = (
            torch.cat((y[..., :half] * cos - y[..., half:] * sin, y[..., half:] * cos + y[..., :half] * sin), -1)
            for y in (q, k)
        )
        k, v = (y.repeat_interleave(heads // y.shape[1], 1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / (2 * half) ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)
        x = x + project(mixed.flatten(1), "o_proj", layer)
        h = normed(x, weight("norm2", layer))
        x = x + project(torch.nn.functional.silu(project(h, "gate", layer)) * project(h, "up", layer), "down", layer)
        layer += 1
    head = weight("head") if weight("head") is not None else weight("embed")
    return normed(x, weight("norm")) @ head.T
