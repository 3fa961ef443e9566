"""The lean body: the layers of a Qwen2, Qwen3 or Llama model in as few calls as torch allows, for decoding alone.

For: forward passes without gradients, over whole canvases or over a window of one with the keys and values of the rest
kept (`CanvasCache`). Not for: training, saving, or what a row of logits means (`denoiser`).

transformers' own layers take about a millisecond each in Python, whatever the width: more than the arithmetic of a
small model, and most of a narrow window's. This body reads the same weights (the projections of a layer side by side,
the model's own parameters being views of them) and gives the same numbers up to rounding; tests hold it to that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffucoder.models.projections import Project

Copy = Callable[[Tensor, Tensor | None], Project]  # weight (out, in) and bias (out,) as a projection of its own


@dataclass(frozen=True)
class Layer:
    """One layer's weights; `qkv` and `gate_up` are projections side by side."""

    qkv: Project
    out: Project
    gate_up: Project
    down: Project
    before: Tensor  # (H,) norm weights
    between: Tensor  # (H,)
    query_norm: Tensor | None  # (D,), Qwen3's
    key_norm: Tensor | None  # (D,)


class CanvasCache:
    """Keys and values of B canvases, layer by layer, into which a pass over a window of them writes its own.

    Slot i of a row is position i of its canvas. The last slot takes what padding of the window writes; nobody sees it.
    """

    def __init__(self, lengths: Tensor, keys: list[Tensor], values: list[Tensor], *, even: bool = False) -> None:
        """`lengths` (B,) of the canvases; keys and values (B, S, heads, D) of each layer, S one above the longest.

        With `even` all canvases have one length, so that every slot but the last is seen.
        """
        self.lengths, self.keys, self.values = lengths, keys, values
        self.even = even  # known on the host: who has to ask the device waits for it

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def gather(cls, rows: Sequence[tuple["CanvasCache", int]]) -> "CanvasCache":
        """A copy of rows of other caches, which may be named more than once."""
        lengths = torch.stack([cache.lengths[row] for cache, row in rows])
        slots = int(lengths.max()) + 1

        def copied(of: Callable[[CanvasCache], list[Tensor]]) -> list[Tensor]:
            layers = []
            for layer, like in enumerate(of(rows[0][0])):
                made = like.new_zeros(len(rows), slots, *like.shape[2:])
                for at, ((cache, row), length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
                    made[at, :length] = of(cache)[layer][row, :length]
                layers.append(made)
            return layers

        even = len(set(lengths.tolist())) == 1
        return cls(lengths, copied(lambda cache: cache.keys), copied(lambda cache: cache.values), even=even)

    def prefix(self, row: int, count: int, length: int) -> "CanvasCache":
        """A cache for one canvas of `length` whose first `count` positions are copies of a row's."""

        def copied(layers: list[Tensor]) -> list[Tensor]:
            made = [layer.new_zeros(1, length + 1, *layer.shape[2:]) for layer in layers]
            for new, layer in zip(made, layers, strict=True):
                new[0, :count] = layer[row, :count]
            return made

        return CanvasCache(self.lengths.new_tensor([length]), copied(self.keys), copied(self.values), even=True)

    def visible(self) -> Tensor | None:
        """(B, 1, 1, S) bool: the slots that hold positions of a canvas; None where all but the last do."""
        if self.even:
            return None
        slots = torch.arange(self.keys[0].shape[1], device=self.lengths.device)
        return (slots < self.lengths[:, None])[:, None, None]

    def slots(self, positions: Tensor, valid: Tensor) -> Tensor:
        """(B, W) where positions of a window are written; padding goes to the last slot."""
        return positions.where(valid, self.keys[0].shape[1] - 1)


class LeanBody:
    """The layers and the last norm of a transformers model, as one function of tokens and positions."""

    def __init__(
        self, model: Any, dtype: torch.dtype | None, copy: Copy | None
    ) -> None:  # Any: a transformers causal LM
        """Read `model`'s weights; use `LeanBody.of`."""
        config, body = model.config, model.base_model
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim: int = body.layers[0].self_attn.head_dim
        self.eps: float = config.rms_norm_eps
        self.layers = [_layer(layer, dtype, copy) for layer in body.layers]
        self._embed, self._norm = (each.weight.detach().to(dtype) for each in (body.embed_tokens, body.norm))
        head = model.get_output_embeddings()
        self.head = _joined(head, dtype=dtype, copy=copy) if dtype or copy else head
        self._rotary = body.rotary_emb
        self._table: tuple[Tensor, Tensor] | None = None  # cosines and sines of the positions met so far
        self._run = self._layers

    @classmethod
    def of(cls, model: Any, *, dtype: torch.dtype | None = None, copy: Copy | None = None) -> "LeanBody | None":
        """The lean body of `model`, or None where its layers are not the plain ones that this reads.

        The model's projections become views of the joined weights; with a `dtype` this is a copy, and they stay. So do
        they with a `copy`, `projections`: what is then done to the model's own projections does not show.
        """
        config, body = model.config, model.base_model
        plain = all(
            type(module) is nn.Linear
            for layer in body.layers
            for module in (*_projections(layer.self_attn), *_projections(layer.mlp))
        )
        fixed = body.rotary_emb.rope_type not in ("dynamic", "longrope")  # those depend on the length met
        return cls(model, dtype, copy) if plain and fixed and config.hidden_act == "silu" else None

    def compile(self) -> None:
        """Have torch compile the layers, anew for each shape they are fed: half a minute, and captured on CUDA."""
        self._run = compiled(self._layers, self._norm.device)

    def new_cache(self, lengths: Tensor) -> CanvasCache:
        """An empty cache for canvases of `lengths` (B,): the first pass must feed every position."""
        shape = (len(lengths), int(lengths.max()) + 1, self.key_heads, self.head_dim)
        keys, values = ([self._norm.new_zeros(shape) for _ in self.layers] for _ in range(2))
        even = bool((lengths == lengths[0]).all())
        return CanvasCache(lengths.to(self._norm.device), keys, values, even=even)

    def __call__(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        longest: int | None = None,
        mask: Tensor | None = None,
        cache: CanvasCache | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, W, H) of `tokens` (B, W) at `positions` (B, W), those of 0 to W - 1 where left out.

        `longest` is above every position. `mask` (B or 1, 1, W or 1, K) bool, True = visible, over the K keys: those of
        the W fed or, with a `cache`, all that it holds, of which `slots` (B, W) are written before they are read.
        """
        width = tokens.shape[1]
        cos, sin = self._turns(max(longest or 0, width))  # (L, D)
        if positions is None:
            cos, sin = cos[None, :width, None], sin[None, :width, None]  # (1, W, 1, D)
        else:
            cos, sin = cos[positions][:, :, None], sin[positions][:, :, None]  # (B, W, 1, D)
        return self._run(tokens, cos, sin, mask, cache, slots)

    def _layers(
        self,
        tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: CanvasCache | None,
        slots: Tensor | None,
    ) -> Tensor:
        hidden = F.embedding(tokens, self._embed)  # (B, W, H)
        batch, width = tokens.shape
        turned = self.heads + self.key_heads
        if cache is not None:
            assert slots is not None, "a cache is written at slots"
            size = cache.keys[0].shape[1]
            flat = (slots + size * torch.arange(batch, device=slots.device)[:, None]).flatten()  # (B * W,)
        for at, layer in enumerate(self.layers):
            qkv = layer.qkv(self._normed(hidden, layer.before)).view(batch, width, -1, self.head_dim)
            qk, value = qkv[:, :, :turned], qkv[:, :, turned:]
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = qk[:, :, : self.heads], qk[:, :, self.heads :]
                qk = torch.cat((self._normed(query, layer.query_norm), self._normed(key, layer.key_norm)), 2)
            first, second = qk.chunk(2, -1)
            qk = torch.addcmul(qk * cos, torch.cat((-second, first), -1), sin)
            query, key = qk[:, :, : self.heads], qk[:, :, self.heads :]
            if cache is not None:
                for kept, new in ((cache.keys[at], key), (cache.values[at], value)):
                    kept.flatten(0, 1).index_copy_(0, flat, new.flatten(0, 1))
                seen_to = size - 1 if cache.even else size
                key, value = cache.keys[at][:, :seen_to], cache.values[at][:, :seen_to]
            seen = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=mask,
                enable_gqa=self.heads != self.key_heads,
            )  # (B, heads, W, D)
            hidden = hidden + layer.out(seen.transpose(1, 2).reshape(batch, width, -1))
            gate, up = layer.gate_up(self._normed(hidden, layer.between)).chunk(2, -1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        return self._normed(hidden, self._norm)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)

    def _turns(self, longest: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position below `longest`, and maybe of more: (L, D) each."""
        if self._table is None or len(self._table[0]) < longest:
            places = torch.arange(1 << (longest - 1).bit_length(), device=self._norm.device)[None]
            cos, sin = self._rotary(self._norm, places)
            self._table = cos[0], sin[0]
        return self._table


def compiled(work: Callable[..., Any], device: torch.device) -> Callable[..., Any]:  # Any: tensors, as torch types them
    """`work`, compiled for each shape that it meets; on CUDA its kernels are captured and replayed as one graph."""
    mode = "reduce-overhead" if device.type == "cuda" else None
    made = torch.compile(work, dynamic=False, mode=mode)

    def run(*given: Any, **more: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=256):  # by default it gives up after eight shapes
            return made(*given, **more)

    return run


def _projections(module: Any) -> list[nn.Module]:
    """The projections of an attention or feed-forward module, in no order that matters."""
    return [child for name, child in module.named_children() if name.endswith("_proj")]


def _layer(layer: Any, dtype: torch.dtype | None, copy: Copy | None) -> Layer:  # Any: a decoder layer of transformers
    attention, mlp = layer.self_attn, layer.mlp
    names = ("input_layernorm", "post_attention_layernorm")
    before, between = (getattr(layer, name).weight.detach().to(dtype) for name in names)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (None if norm is None else norm.weight.detach().to(dtype) for norm in norms)
    return Layer(
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype, copy=copy),
        out=_joined(attention.o_proj, dtype=dtype, copy=copy),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj, dtype=dtype, copy=copy),
        down=_joined(mlp.down_proj, dtype=dtype, copy=copy),
        before=before,
        between=between,
        query_norm=query_norm,
        key_norm=key_norm,
    )


@torch.no_grad()
def _joined(*projections: nn.Linear, dtype: torch.dtype | None, copy: Copy | None) -> Project:
    """Projections side by side as one: a copy in `dtype`, or what theirs become views of, so that nothing is twice."""
    weight = torch.cat([each.weight for each in projections]).to(dtype)  # (out, in)
    bias = None if projections[0].bias is None else torch.cat([each.bias for each in projections]).to(dtype)
    if copy is not None:
        return copy(weight, bias)
    at = 0
    for each in projections if dtype is None else ():
        end = at + each.out_features
        each.weight = nn.Parameter(weight[at:end], requires_grad=each.weight.requires_grad)
        if bias is not None:
            each.bias = nn.Parameter(bias[at:end], requires_grad=each.bias.requires_grad)
        at = end
    return lambda hidden: F.linear(hidden, weight, bias)
