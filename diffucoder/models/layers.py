"""FastLayers: the layers of a Qwen2, Qwen3 or Llama model in as few calls as torch allows, for decoding alone.

For: forward passes without gradients, over whole canvases or over some positions of them with the keys and values of
the rest in a cache. Not for: training, saving, or what a row of logits means (`denoiser`).

transformers' own layers take about a millisecond each in Python, whatever the width: more than the arithmetic of a
small model. These layers read the same weights (the projections of a layer side by side, the model's own parameters
being views of them) and give the same numbers up to rounding; tests hold them to that.

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
    cache: KVCache | None = None
    cache_rows: Tensor | None = None  # (A,) rows of the cache that are read; None = the first A
    write: Tensor | None = None  # (N,) where each token's key and value go, counted through rows and slots of the cache
    seen: int = 0  # K: slots of each cache row that are read

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
        if self.cache is None:
            return self.spread(key), self.spread(value)
        return self._update(self.cache.keys[layer], key), self._update(self.cache.values[layer], value)

    def _update(self, cached: Tensor, new: Tensor) -> Tensor:
        assert self.write is not None, "a pass over a cache writes what it is fed"
        cached.flatten(0, 1).index_copy_(0, self.write, new)
        rows = cached[: self.rows] if self.cache_rows is None else cached.index_select(0, self.cache_rows)
        return rows[:, : self.seen]


def flat_positions(feed: Tensor, step: int) -> Tensor:
    """The positions `feed` (R, T) bool, counted through the rows: (N,), a multiple of `step`.

    The last one is repeated up to that: it computes the same again, and is written to the same place.
    """
    fed = feed.flatten().nonzero()[:, 0]
    missing = -len(fed) % step
    return torch.cat([fed, fed[-1:].expand(missing)]) if missing else fed


def plan_layout(
    feed: Tensor,
    fed: Tensor,
    positions: Tensor,
    *,
    device: torch.device,
    cache: KVCache | None = None,
    cache_rows: Sequence[int] = (),
    static: bool = False,
) -> Layout:
    """The layout of a pass that is fed the positions `feed` (R, T) bool of R canvases, as listed in `fed` (N,).

    `positions` (R, T) int64 are the places of the tokens in their canvases, which have `cache_rows` in a `cache`.
    `static` rounds sizes up, so that compiled layers meet few of them. All of it is computed on the host: nothing
    waits for the device.
    """
    counts = feed.sum(-1)  # (R,)
    row = fed // feed.shape[1]  # (N,)
    column = (feed.long().cumsum(-1) - 1).flatten()[fed]  # (N,) left-aligned
    width = int(counts.max())
    if static:
        width = round_up(width, STATIC_WIDTH)
    if cache is not None:
        return _layout_over_cache(row, column, width, positions.flatten()[fed], device, cache, cache_rows, static)
    rows = len(feed)
    if static:
        rows = 1 << (rows - 1).bit_length()
        counts = torch.nn.functional.pad(counts, (0, rows - len(counts)), value=1)
    visible = torch.arange(width) < counts[:, None]  # (A, W)
    if len(fed) == rows * width and not static:
        return Layout(rows, width, cells=None, mask=None)
    everything = bool(visible.all()) and not static
    return Layout(
        rows=rows,
        width=width,
        cells=(row * width + column).to(device),
        mask=None if everything else visible[:, None, None].to(device),
    )


def _layout_over_cache(
    row: Tensor,
    column: Tensor,
    width: int,
    position: Tensor,
    device: torch.device,
    cache: KVCache,
    cache_rows: Sequence[int],
    static: bool,
) -> Layout:
    """As `plan_layout`, with a row for each cache row that is read; `row`, `column` and `position` are (N,)."""
    read = list(range(cache.rows if static else max(cache_rows) + 1))
    in_order = static or len(read) <= 2 * len(cache_rows)  # attention over some unused rows is cheaper than a copy
    if not in_order:
        read = sorted(cache_rows)
    place = torch.tensor([read.index(cache_row) for cache_row in cache_rows])  # (R,) of each canvas in the rectangle
    lengths = torch.tensor(cache.lengths(read))
    seen = cache.slots if static else int(lengths.max())
    visible = torch.arange(seen) < lengths[:, None]  # (A, K)
    everything = bool(visible.all()) and not static
    return Layout(
        rows=len(read),
        width=width,
        cells=(place[row] * width + column).to(device),
        mask=None if everything else visible[:, None, None].to(device),
        cache=cache,
        cache_rows=None if in_order else torch.tensor(read, device=device),
        write=(torch.tensor(cache_rows)[row] * cache.slots + position).to(device),
        seen=seen,
    )


def round_up(count: int, step: int) -> int:
    """`count` or the next multiple of `step`."""
    return -(-count // step) * step


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
        self.cache = KVCache(
            len(self.layers),
            self.key_heads,
            self.head_dim,
            dtype=self.embedding.dtype,
            device=self.embedding.device,
        )
        self._rotary = body.rotary_emb
        self._cos = self._sin = self.embedding.new_zeros(0)
        self._run: Callable[[Tensor, Tensor, Tensor, Layout], Tensor] = self._forward

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype | None = None) -> "FastLayers | None":  # Any: a transformers causal LM
        """The fast layers of `model`; None if it has others than the plain ones (adapters, RoPE by length)."""
        body = model.base_model
        for layer in body.layers:
            for module in (*_projections(layer.self_attn), *_projections(layer.mlp)):
                if type(module) is not nn.Linear:
                    return None
        if body.rotary_emb.rope_type in ("dynamic", "longrope") or model.config.hidden_act != "silu":
            return None
        return cls(model, dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def compile(self) -> None:
        """Have torch compile the layers for each shape that they are fed. On CUDA, kernels are captured as graphs."""
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        compiled = torch.compile(self._forward, dynamic=False, mode=mode)

        def run(tokens: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
            with torch._dynamo.config.patch(recompile_limit=256):  # by default it gives up after eight shapes
                hidden: Tensor = compiled(tokens, cos, sin, layout)
                return hidden

        self._run = run

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
        cos, sin = self._rotary(self.embedding, torch.arange(count, device=self.device)[None])
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
    """Projections side by side as one: a copy in `dtype`, or without one, what theirs become views of."""
    weight = torch.cat([projection.weight for projection in projections]).to(dtype)  # (out, in)
    bias = None
    if projections[0].bias is not None:
        bias = torch.cat([projection.bias for projection in projections]).to(dtype)
    if dtype is None:
        _share(projections, weight, bias)
    return lambda hidden: F.linear(hidden, weight, bias)


def _share(projections: Sequence[nn.Linear], weight: Tensor, bias: Tensor | None) -> None:
    """Make the parameters of `projections` views of the joined weight and bias, so that memory holds them once."""
    start = 0
    for projection in projections:
        end = start + projection.out_features
        trained = projection.weight.requires_grad
        projection.weight = nn.Parameter(weight[start:end], requires_grad=trained)
        if bias is not None:
            projection.bias = nn.Parameter(bias[start:end], requires_grad=projection.bias.requires_grad)
        start = end
