"""FastLayers: the layers of a Qwen2, Qwen3 or Llama model in as few calls as torch allows, for decoding alone.

For: forward passes without gradients, over whole canvases or over some positions of them with the keys and values of
the rest in a cache. Not for: training, saving, or what a row of logits means (`denoiser`).

They read the same weights as transformers' layers (the projections of a layer side by side, the model's own parameters
being views of them) and give the same numbers up to rounding.

N is the number of tokens that a pass is fed, all rows together. Only attention needs rows: there the N queries are laid
out as a rectangle (A rows, W wide), which `Layout` describes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffucoder.models.cache import KVCache

STATIC_WIDTH = 32  # compiled layers are fed rectangles of multiples of this width
Project = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the N tokens of a pass are among the A x W queries of attention, and which keys those see."""

    rows: int  # A
    width: int  # W
    cells: Tensor | None  # (N,) the query of each token, counted through the rows; None when it is all of them in order
    mask: Tensor | None  # (A, 1, 1, K) bool, True = visible, over the K keys; None when all are
    cache: KVCache
    cache_rows: Tensor | None  # (A,) rows of the cache that are copied to be read; None: the first A are read in place
    write: Tensor | None  # (N,) where keys and values go, counted through rows and slots of the cache; None: nowhere
    seen: int  # K: slots of each cache row that are read

    def spread(self, flat: Tensor) -> Tensor:
        """(N, ...) -> (A, W, ...), zeros where there is no token."""
        if self.cells is not None:
            empty = flat.new_zeros(self.rows * self.width, *flat.shape[1:])
            flat = empty.index_copy_(0, self.cells, flat)
        return flat.view(self.rows, self.width, *flat.shape[1:])

    def gather(self, spread: Tensor) -> Tensor:
        """(A, W, ...) -> (N, ...)."""
        flat = spread.flatten(0, 1)
        return flat if self.cells is None else flat.index_select(0, self.cells)

    def keys_and_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the queries of a layer see, (A, K, heads, D) each, given the N new keys and values (N, heads, D)."""
        if self.write is None:
            return self.spread(key), self.spread(value)
        cached_keys = self._update(self.cache.keys[layer], self.write, key)
        return cached_keys, self._update(self.cache.values[layer], self.write, value)

    def _update(self, cached: Tensor, places: Tensor, new: Tensor) -> Tensor:
        cached.flatten(0, 1).index_copy_(0, places, new)
        rows = cached[: self.rows] if self.cache_rows is None else cached.index_select(0, self.cache_rows)
        return rows[:, : self.seen]


def plan_layout(
    feed: Tensor,
    positions: Tensor,
    *,
    step: int,
    static: bool,
    device: torch.device,
    cache: KVCache,
    cache_rows: Sequence[int] | None,
) -> tuple[Tensor, Layout]:
    """The positions that a pass over R canvases is fed, counted through the rows (N,), and their layout.

    They are those of `feed` (R, T) bool, the last one repeated up to a multiple of `step`: it computes the same again
    and is written to the same place. `positions` (R, T) int64 are the places of the tokens in their canvases, which
    have `cache_rows` in the `cache`; without, nothing is cached. `static` rounds sizes up, so that compiled layers meet
    few of them. All of it is computed on the host: nothing waits for the device.
    """
    fed = feed.flatten().nonzero()[:, 0]
    fed = torch.cat([fed, fed[-1:].expand(-len(fed) % step)])  # (N,)
    row = fed // feed.shape[1]  # (N,) of the rectangle
    column = (feed.long().cumsum(-1) - 1).flatten()[fed]  # (N,) left-aligned
    lengths = feed.sum(-1)  # of what is seen in each row of the rectangle
    width = int(lengths.max())
    if static:
        width += -width % STATIC_WIDTH
    seen = width
    copied = None
    write = None
    if cache_rows is not None:
        read = list(range(cache.rows if static else max(cache_rows) + 1))
        if not static and len(read) > 2 * len(cache_rows):  # attention over fewer unused rows is cheaper than a copy
            read = sorted(cache_rows)
            copied = torch.tensor(read, device=device)
        row = torch.tensor([read.index(cache_row) for cache_row in cache_rows])[row]
        write = (torch.tensor(read)[row] * cache.slots + positions.flatten()[fed]).to(device)
        lengths = torch.tensor(cache.lengths(read))
        seen = cache.slots if static else int(lengths.max())
    elif static:
        rows = 1 << (len(feed) - 1).bit_length()
        lengths = F.pad(lengths, (0, rows - len(feed)), value=1)
    rows = len(lengths)
    cells = row * width + column
    visible = torch.arange(seen) < lengths[:, None]  # (A, K)
    return fed, Layout(
        rows=rows,
        width=width,
        cells=None if not static and cells.equal(torch.arange(rows * width)) else cells.to(device),
        mask=None if not static and visible.all() else visible[:, None, None].to(device),
        cache=cache,
        cache_rows=copied,
        write=write,
        seen=seen,
    )


@dataclass(frozen=True)
class Layer:
    """One layer's weights; `qkv` and `gate_up` are projections side by side."""

    qkv: Project
    out: Project
    gate_up: Project
    down: Project
    attention_norm: Tensor  # (H,)
    feed_forward_norm: Tensor  # (H,)
    query_norm: Tensor | None  # (D,), Qwen3 alone
    key_norm: Tensor | None  # (D,)


class FastLayers:
    """The layers and the last norm of a transformers model, as one function of tokens and positions."""

    def __init__(self, model: Any, dtype: torch.dtype | None = None) -> None:  # Any: a transformers causal LM
        """Read the weights of a model; with a `dtype` they are copied in it. Use `of`."""
        config = model.config
        body = model.base_model
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_dim: int = body.layers[0].self_attn.head_dim
        self.eps: float = config.rms_norm_eps
        self.layers = [_read_layer(layer, dtype) for layer in body.layers]
        self.embedding: Tensor = body.embed_tokens.weight.detach().to(dtype)
        self.norm: Tensor = body.norm.weight.detach().to(dtype)
        head = model.get_output_embeddings()
        self.head: Project = head
        if dtype is not None:
            self.head = _join([head], dtype)
        self.cache = KVCache(len(self.layers), self.key_heads, self.head_dim, like=self.embedding)
        self._rotary = body.rotary_emb
        self._cos = self._sin = self.embedding.new_zeros(0)
        self._run: Callable[[Tensor, Tensor, Tensor, Layout], Tensor] = self._forward

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype | None = None) -> "FastLayers | None":  # Any: a transformers causal LM
        """The fast layers of `model`; None if it has others than the plain ones (adapters, RoPE by length)."""
        body = model.base_model
        if not (isinstance(model.get_output_embeddings(), nn.Linear) and isinstance(body.embed_tokens, nn.Embedding)):
            return None
        for layer in body.layers:
            for module in (*_projections(layer.self_attn), *_projections(layer.mlp)):
                if type(module) is not nn.Linear:
                    return None
        if body.rotary_emb.rope_type in ("dynamic", "longrope") or model.config.hidden_act != "silu":
            return None
        return cls(model, dtype)

    def compile(self) -> None:
        """Have torch compile the layers for each shape that they are fed. On CUDA, kernels are captured as graphs."""
        mode = "reduce-overhead" if self.embedding.device.type == "cuda" else None
        more_shapes = torch._dynamo.config.patch(recompile_limit=256)  # by default it gives up after eight
        self._run = more_shapes(torch.compile(self._forward, dynamic=False, mode=mode))

    def __call__(self, tokens: Tensor, positions: Tensor, layout: Layout, longest: int) -> Tensor:
        """Hidden states (N, H) of `tokens` (N,) at `positions` (N,), all of them below `longest`."""
        if len(self._cos) < longest:
            self._extend_rotation(longest)
        cos = self._cos[positions][:, None]  # (N, 1, D)
        sin = self._sin[positions][:, None]
        return self._run(tokens, cos, sin, layout)

    def _forward(self, tokens: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        hidden = F.embedding(tokens, self.embedding)  # (N, H)
        for index, layer in enumerate(self.layers):
            normed = self._normed(hidden, layer.attention_norm)
            query, key, value = self._query_key_value(layer, normed, cos, sin)
            keys, values = layout.keys_and_values(index, key, value)
            attended = self._attention(layout.spread(query), keys, values, layout.mask)
            hidden = hidden + layer.out(layout.gather(attended))
            gate, up = layer.gate_up(self._normed(hidden, layer.feed_forward_norm)).chunk(2, -1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        return self._normed(hidden, self.norm)

    def _query_key_value(self, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, heads, D), keys and values (N, key heads, D); the first two rotated by their positions (RoPE)."""
        heads = layer.qkv(hidden).view(len(hidden), -1, self.head_dim)
        rotated = heads[:, : self.heads + self.key_heads]
        value = heads[:, self.heads + self.key_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            query = self._normed(rotated[:, : self.heads], layer.query_norm)
            key = self._normed(rotated[:, self.heads :], layer.key_norm)
            rotated = torch.cat((query, key), 1)
        rotated = torch.addcmul(rotated * cos, rotated.roll(self.head_dim // 2, -1), sin)
        return rotated[:, : self.heads], rotated[:, self.heads :], value

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Queries (A, W, heads, D) over keys and values (A, K, key heads, D): (A, W, heads * D).

        Heads that share a key become further queries of that key; torch would copy keys and values for each of them.
        """
        rows, width = query.shape[:2]
        shared = query.view(rows, width, self.key_heads, -1, self.head_dim).transpose(1, 2).flatten(2, 3)
        attended = F.scaled_dot_product_attention(
            shared, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )  # (A, key heads, W * shared, D)
        return attended.view(rows, self.key_heads, width, -1, self.head_dim).transpose(1, 2).flatten(2)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)

    def _extend_rotation(self, longest: int) -> None:
        """Compute cosines and sines (L, D) for positions up to the next power of two."""
        count = 1 << (longest - 1).bit_length()
        cos, sin = self._rotary(self.embedding, torch.arange(count, device=self.embedding.device)[None])
        first, second = sin[0].chunk(2, -1)
        self._cos = cos[0]
        self._sin = torch.cat((-first, second), -1)  # rotate_half's sign, so that `roll` is enough


def _projections(module: Any) -> list[nn.Module]:  # Any: an attention or feed-forward module of transformers
    return [child for name, child in module.named_children() if name.endswith("_proj")]


def _read_layer(layer: Any, dtype: torch.dtype | None) -> Layer:  # Any: a decoder layer of transformers
    attention = layer.self_attn
    return Layer(
        qkv=_join([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
        out=_join([attention.o_proj], dtype),
        gate_up=_join([layer.mlp.gate_proj, layer.mlp.up_proj], dtype),
        down=_join([layer.mlp.down_proj], dtype),
        attention_norm=layer.input_layernorm.weight.detach().to(dtype),
        feed_forward_norm=layer.post_attention_layernorm.weight.detach().to(dtype),
        query_norm=_norm_weight(attention, "q_norm", dtype),
        key_norm=_norm_weight(attention, "k_norm", dtype),
    )


def _norm_weight(attention: Any, name: str, dtype: torch.dtype | None) -> Tensor | None:  # Any: as above
    norm = getattr(attention, name, None)
    return None if norm is None else norm.weight.detach().to(dtype)


@torch.no_grad()
def _join(projections: Sequence[nn.Linear], dtype: torch.dtype | None) -> Project:
    """Projections side by side as one: a copy in `dtype`, or without one, what their parameters become views of."""
    weight = torch.cat([projection.weight for projection in projections]).to(dtype)  # (out, in)
    bias = None
    if projections[0].bias is not None:
        bias = torch.cat([projection.bias for projection in projections]).to(dtype)
    if dtype is None:  # memory holds them once
        start = 0
        for projection in projections:
            part = slice(start, start + projection.out_features)
            projection.weight = nn.Parameter(weight[part], requires_grad=projection.weight.requires_grad)
            if bias is not None:
                projection.bias = nn.Parameter(bias[part], requires_grad=projection.bias.requires_grad)
            start = part.stop
    return lambda hidden: F.linear(hidden, weight, bias)
