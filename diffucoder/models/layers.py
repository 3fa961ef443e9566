"""FastLayers: the layers of a Qwen2, Qwen3 or Llama model in as few calls as torch allows, for decoding alone.

For: forward passes without gradients, over whole canvases or over some positions of them with the keys and values of
the rest in a cache. Not for: training, saving, or what a row of logits means (`denoiser`).

They read the same weights as transformers' layers (the projections of a layer side by side, the model's own parameters
being views of them) and give the same numbers up to rounding.

N is the number of tokens that a pass is fed, all rows together. Only attention needs rows: there the N queries are laid
out as rectangles (A rows, W wide), which `Layout` describes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffucoder.models.cache import KVCache

STATIC_WIDTH = 32  # compiled layers are fed rectangles of multiples of this width
NARROW = 16  # rows up to this width share a rectangle
Project = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # of queries, keys, values and a mask


@dataclass(frozen=True, eq=False)
class Rectangle:
    """Where some of the N tokens of a pass are among A x W queries of attention, and which keys those see."""

    tokens: slice  # which of the N
    rows: int  # A
    width: int  # W
    cells: Tensor | None  # (n,) the query of each token, counted through the rows; None when it is all of them in order
    mask: Tensor | None  # (A, 1, 1 or W * queries of a key, K) bool, True = visible; None when all keys are
    cache_rows: Tensor | None  # (A,) rows of the cache that are copied to be read; None: the first A are read in place
    seen: int  # K: slots of each cache row that are read

    def spread(self, flat: Tensor) -> Tensor:
        """(N, ...) -> (A, W, ...), zeros where there is no token."""
        flat = flat[self.tokens]
        if self.cells is not None:
            empty = flat.new_zeros(self.rows * self.width, *flat.shape[1:])
            flat = empty.index_copy_(0, self.cells, flat)
        return flat.view(self.rows, self.width, *flat.shape[1:])

    def gather(self, spread: Tensor) -> Tensor:
        """(A, W, ...) -> (n, ...)."""
        flat = spread.flatten(0, 1)
        return flat if self.cells is None else flat.index_select(0, self.cells)

    def read(self, cached: Tensor) -> Tensor:
        """What is seen of a layer's cached keys or values (P, S, heads, D): (A, K, heads, D)."""
        rows = cached[: self.rows] if self.cache_rows is None else cached.index_select(0, self.cache_rows)
        return rows[:, : self.seen]


@dataclass(frozen=True, eq=False)
class Layout:
    """How the N tokens of a pass are laid out for attention: a rectangle for the rows of about a width."""

    rectangles: list[Rectangle]  # of consecutive tokens
    cache: KVCache
    write: Tensor | None  # (N,) where keys and values go, counted through rows and slots of the cache; None: nowhere

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
        """(N, heads * D) of a layer, given N queries (N, heads, D), and N new keys and values (N, key heads, D)."""
        if self.write is not None:
            self.cache.keys[layer].flatten(0, 1).index_copy_(0, self.write, key)
            self.cache.values[layer].flatten(0, 1).index_copy_(0, self.write, value)
        parts = []
        for rectangle in self.rectangles:
            if self.write is None:
                keys, values = rectangle.spread(key), rectangle.spread(value)
            else:
                keys = rectangle.read(self.cache.keys[layer])
                values = rectangle.read(self.cache.values[layer])
            parts.append(rectangle.gather(attention(rectangle.spread(query), keys, values, rectangle.mask)))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def plan_layout(
    feed: Tensor,
    positions: Tensor,
    *,
    sees: Tensor | None = None,
    queries: int = 1,
    step: int,
    static: bool,
    device: torch.device,
    cache: KVCache,
    cache_rows: Sequence[int] | None,
) -> tuple[Tensor, Layout]:
    """The positions that a pass over R canvases is fed, counted through the rows (N,), and their layout.

    They are those of `feed` (R, T) bool, rectangle by rectangle, the last one repeated up to a multiple of `step`: it
    computes the same again and is written to the same place. `positions` (R, T) int64 are the places of the tokens in
    their canvases, which have `cache_rows` in the `cache`; without, nothing is cached. Each position sees the first
    `sees` (R, T) int64 of its canvas, by default all; that many `queries` share a key. `static` rounds sizes up, so
    that compiled layers meet few of them. All of it is computed on the host: nothing waits for the device.
    """
    length = feed.shape[1]
    lengths = feed.sum(-1)  # (R,)
    column = feed.long().cumsum(-1) - 1  # (R, T) left-aligned
    missing = -int(lengths.sum()) % step
    groups = [list(range(len(feed)))]
    if device.type == "cpu" and not static:  # elsewhere one call more costs more than the padding
        groups = _alike(lengths.tolist())
    parts: list[Tensor] = []
    rectangles: list[Rectangle] = []
    start = 0
    for rows in groups:
        own = feed[rows].nonzero()  # (n, 2)
        if rows is groups[-1]:
            own = torch.cat([own, own[-1:].expand(missing, 2)])
        row, at = own.unbind(-1)  # of the group
        parts.append(torch.tensor(rows)[row] * length + at)
        tokens = slice(start, start + len(own))
        start = tokens.stop
        cells = (row, column[rows][tuple(own.T)])
        own_cache = None if cache_rows is None else [cache_rows[row] for row in rows]
        own_sees = None if sees is None else sees[rows][tuple(own.T)]
        rectangles.append(_rectangle(tokens, cells, lengths[rows], own_sees, queries, static, device, cache, own_cache))
    fed = torch.cat(parts)  # (N,)
    write = None
    if cache_rows is not None:
        write = (torch.tensor(cache_rows)[fed // length] * cache.slots + positions.flatten()[fed]).to(device)
    return fed, Layout(rectangles, cache, write)


def _alike(widths: Sequence[int]) -> list[list[int]]:
    """The rows whose widths are within a factor of two of each other, together; those without any are left out."""
    groups: dict[int, list[int]] = {}
    for row, width in enumerate(widths):
        if width:
            groups.setdefault((max(width, NARROW) - 1).bit_length(), []).append(row)
    return list(groups.values())


def _rectangle(
    tokens: slice,
    cells: tuple[Tensor, Tensor],
    lengths: Tensor,
    sees: Tensor | None,
    queries: int,
    static: bool,
    device: torch.device,
    cache: KVCache,
    cache_rows: Sequence[int] | None,
) -> Rectangle:
    """The rectangle that has `tokens` in its `cells`, rows (n,) and columns (n,), for rows of `lengths` (A,).

    Each token sees the first `sees` (n,) keys of its row, by default all; that many `queries` share a key.
    """
    row, column = cells
    width = int(lengths.max())
    if static:
        width += -width % STATIC_WIDTH
    seen = width
    copied = None
    if cache_rows is not None:
        read = list(range(cache.rows if static else max(cache_rows) + 1))
        # Attention over a few unused rows is cheaper than a copy of the others
        if not static and 3 * len(read) > 4 * len(cache_rows):
            read = list(cache_rows)
            copied = torch.tensor(read, device=device)
        row = torch.tensor([read.index(cache_row) for cache_row in cache_rows])[row]
        lengths = torch.tensor(cache.lengths(read))
        seen = cache.slots if static else int(lengths.max())
    elif static:
        rows = 1 << (len(lengths) - 1).bit_length()
        lengths = F.pad(lengths, (0, rows - len(lengths)), value=1)
    rows = len(lengths)
    cell = row * width + column  # (n,)
    limits = lengths[:, None]  # (A, 1) how many keys are seen, by all queries of a row or by each of them
    if sees is not None:
        limits = torch.ones(rows * width, dtype=torch.long).index_copy_(0, cell, sees).view(rows, width)
        limits = limits.repeat_interleave(queries, 1)  # (A, W * queries)
    visible = torch.arange(seen) < limits[..., None]  # (A, 1 or W * queries, K)
    return Rectangle(
        tokens=tokens,
        rows=rows,
        width=width,
        cells=None if not static and cell.equal(torch.arange(rows * width)) else cell.to(device),
        mask=None if not static and visible.all() else visible[:, None].to(device),
        cache_rows=copied,
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
            hidden = hidden + layer.out(layout.attend(index, query, key, value, self._attention))
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
