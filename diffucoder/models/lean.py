"""The lean body: the layers of a Qwen2, Qwen3 or Llama model in as few calls as torch allows, for decoding alone.

For: forward passes without gradients, over whole canvases or over a window of one with the keys and values of the rest
kept (`CanvasCache`). Not for: training, saving, or what a row of logits means (`denoiser`).

transformers' own layers take about a millisecond each in Python, whatever the width: more than the arithmetic of a
small model, and most of a narrow window's. This body reads the same weights (the projections of a layer side by side,
the model's own parameters being views of them) and gives the same numbers up to rounding; tests hold it to that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffucoder.models.projections import Project, round_rows

Copy = Callable[[Tensor, Tensor | None], Project]  # weight (out, in) and bias (out,) as a projection of its own


@dataclass(frozen=True)
class Layer:
    """One layer's weights; `qkv` and `gate_up` are projections side by side."""

    qkv: Project
    out: Project
    gate_up: Project
    down: Project
    before: Tensor | None  # (H,) norm weights; None where the hidden state has no mean
    between: Tensor | None  # (H,)
    query_norm: Tensor | None  # (D,), Qwen3's
    key_norm: Tensor | None  # (D,)


class Place:
    """A row of a cache, kept for whoever holds this: once nobody does, the row is free."""

    __slots__ = ("__weakref__", "cache", "row")

    def __init__(self, cache: "CanvasCache", row: int) -> None:
        """Made by `CanvasCache.take`."""
        self.cache, self.row = cache, row

    def alone(self, count: int, length: int) -> "Place":
        """A place in a cache of its own, for a canvas of `length` whose first `count` positions are copies of these."""
        keys, values = (
            [layer.new_zeros(1, length + 1, *layer.shape[2:]) for layer in layers]
            for layers in (self.cache.keys, self.cache.values)
        )
        place = CanvasCache(keys, values, [length]).take(length)
        place.copy(self, count)
        return place

    def copy(self, other: "Place", count: int) -> None:
        """Make the first `count` positions what another place's are."""
        for layers, others in ((self.cache.keys, other.cache.keys), (self.cache.values, other.cache.values)):
            for layer, like in zip(layers, others, strict=True):
                layer[self.row, :count] = like[other.row, :count]


class CanvasCache:
    """Keys and values of canvases, layer by layer, into which a pass over windows of them writes its own.

    Slot i of a row is position i of its canvas. The last slot takes what padding of a window writes; nobody sees it.
    Rows are taken and given back one by one (`Place`), and there are more of them when they do not suffice: requests
    come and go, and nobody's keys are moved for it.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], lengths: list[int]) -> None:
        """Keys and values (P, S, heads, D) of each layer; `lengths` of the P canvases, each below S."""
        self.keys, self.values, self.lengths = keys, values, lengths
        self._holders: list[ref[Place] | None] = [None for _ in lengths]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def slots(self) -> int:
        """S: slots of a row."""
        return self.keys[0].shape[1]

    def take(self, length: int) -> Place:
        """A free row for a canvas of `length`: the first pass over it must feed every position."""
        free = (row for row, holder in enumerate(self._holders) if holder is None or holder() is None)
        row = next(free, len(self))
        if row == len(self) or length >= self.slots:
            self._grow(len(self) if row < len(self) else 2 * len(self), max(length + 1, self.slots))
        place = Place(self, row)
        self._holders[row], self.lengths[row] = ref(place), length
        return place

    def _grow(self, rows: int, slots: int) -> None:
        def grown(layer: Tensor) -> Tensor:
            made = layer.new_zeros(rows, slots, *layer.shape[2:])
            made[: layer.shape[0], : layer.shape[1]] = layer
            return made

        # all or nothing: where memory does not hold them, the cache is as it was
        self.keys, self.values = ([grown(layer) for layer in layers] for layers in (self.keys, self.values))
        more = rows - len(self)
        self.lengths += [1] * more
        self._holders += [None] * more


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the N tokens fed, consecutive ones, and the rectangle of A x W queries among which attention has them."""

    tokens: slice
    own: Sequence[int]  # the rows of the whole that they are of
    width: int  # W
    rows: int  # A
    at: Tensor | None = None  # (n,) where they lie, counted through rows; None where they are all of it, in order
    mask: Tensor | None = None  # (A or 1, 1, W or 1, K) bool, True = visible, over the K keys that are attended to
    chosen: Tensor | None = None  # (A,) the cache's rows that are attended to; None for all of them
    seen: int | None = None  # slots of each that are attended to

    def spread(self, flat: Tensor) -> Tensor:
        """(N, ...) -> (A, W, ...), zeros where nothing is fed."""
        flat = flat[self.tokens]
        if self.at is not None:
            flat = flat.new_zeros(self.rows * self.width, *flat.shape[1:]).index_copy_(0, self.at, flat)
        return flat.view(self.rows, self.width, *flat.shape[1:])

    def gather(self, spread: Tensor) -> Tensor:
        """(A, W, ...) -> (n, ...)."""
        flat = spread.flatten(0, 1)
        return flat if self.at is None else flat.index_select(0, self.at)

    def narrowed(self, mask: Tensor) -> "Part":
        """With its share of a mask over the whole, (B or 1, 1, W, W)."""
        each = mask if len(mask) == 1 else mask[list(self.own)]
        return replace(self, mask=each[:, :, -self.width :, -self.width :])

    def kept(self, layer: Tensor) -> Tensor:
        """(P, S, heads, D) -> (A, K, heads, D): what is attended to of a cache's layer."""
        return (layer if self.chosen is None else layer.index_select(0, self.chosen))[:, : self.seen]

    def to(self, device: torch.device) -> "Part":
        """The same where the model is."""
        given = {name: getattr(self, name) for name in ("at", "mask", "chosen")}
        return replace(self, **{name: value.to(device) for name, value in given.items() if value is not None})


@dataclass(frozen=True, eq=False)
class Fed:
    """What a pass feeds of B x W tokens: padding costs nothing but in attention, which alone needs rectangles."""

    tokens: Tensor | None  # (N,) counted through rows; None where they are all of them, in order
    parts: list[Part]
    cache: CanvasCache | None = None
    write: Tensor | None = None  # (N,) where each writes into the cache, counted through its rows and slots

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        valid: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cache: CanvasCache | None = None,
        places: Sequence[int] = (),
        positions: Tensor | None = None,
        packed: bool = False,
        split: bool = False,
    ) -> "Fed":
        """Of `tokens` (B, W), `valid` (B, W) bool being False on left padding, which is left out where `packed`.

        With a `cache`, of which the rows have `places`, `positions` (B, W) say where they write; else `mask`
        (B or 1, 1, W, W) narrows attention. With `split`, rows of about a width are a rectangle of their own.
        Worked out where the arguments are: on the host nobody waits for the device.
        """
        batch, width = tokens.shape
        where, parts = None, [Part(slice(None), range(batch), width, batch)]
        if packed and valid is not None:
            where, parts = _packed(valid, split)
        parts = [part if cache is None else _over(part, cache, places) for part in parts]
        if cache is None:
            return cls(where, [part if mask is None else part.narrowed(mask) for part in parts])
        assert positions is not None, "a cache is read and written at positions"
        slots = positions if valid is None else positions.where(valid, cache.slots - 1)
        write = (torch.tensor(places)[:, None].to(slots.device) * cache.slots + slots).flatten()
        return cls(where, parts, cache, write if where is None else write[where.to(write.device)])

    def to(self, device: torch.device) -> "Fed":
        """The same where the model is."""
        tokens, write = (None if each is None else each.to(device) for each in (self.tokens, self.write))
        return Fed(tokens, [part.to(device) for part in self.parts], self.cache, write)


def _alike(counts: Sequence[int]) -> list[list[int]]:
    """Rows whose `counts` are within a factor of two of each other, together."""
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        groups.setdefault(max(count - 1, _LANES - 1).bit_length(), []).append(row)
    return list(groups.values())


def _packed(valid: Tensor, split: bool) -> tuple[Tensor | None, list[Part]]:
    """The real tokens of `valid` (B, W) and padding up to a round number of them: (N,) and their parts, as in `Fed`."""
    batch, width = valid.shape
    counts = (width - valid.int().argmax(-1)).tolist()  # from the first real one on, which padding behind may follow
    real = int(valid.sum())
    more = round_rows(real) - real
    fed, parts, begun = list[Tensor](), list[Part](), 0
    for rows in _alike(counts) if split else [list(range(batch))]:
        widest = min(width, round_rows(max(counts[row] for row in rows)))
        shown = valid[rows, width - widest :].flatten()
        spare = (~shown).nonzero()[:more, 0]
        shown[spare] = True
        more -= len(spare)
        at = shown.nonzero()[:, 0]  # (n,)
        fed.append(at.new_tensor(rows)[at // widest] * width + width - widest + at % widest)
        parts.append(
            Part(slice(begun, begun + len(at)), rows, widest, len(rows), None if len(at) == len(shown) else at)
        )
        begun += len(at)
    every = begun == batch * width and len(parts) == 1
    return None if every else torch.cat(fed), parts


def _over(part: Part, cache: CanvasCache, places: Sequence[int]) -> Part:
    """`part` over the rows of a cache, which has `places` for those of the whole.

    It goes over the cache as it lies while at least half of it is in use, with the queries put where their keys are,
    and else over a copy of the rows in use.
    """
    used = [places[row] for row in part.own]
    whole = len(cache) <= 2 * len(used)
    rows = list(range(len(cache))) if whole else used
    lengths = [cache.lengths[row] for row in rows]
    seen, at, mask = max(lengths), part.at, None
    if min(lengths) < seen:
        mask = (torch.arange(seen) < torch.tensor(lengths)[:, None])[:, None, None]
    if whole and used != rows:
        at = torch.arange(len(used) * part.width) if at is None else at
        at = torch.tensor(used)[at // part.width] * part.width + at % part.width
    return replace(part, rows=len(rows), at=at, mask=mask, chosen=None if whole else torch.tensor(used), seen=seen)


class Centred:
    """A hidden state without a mean, in a few more dimensions: its norm by root mean square is a layer norm.

    torch makes the one of eight passes over a tensor on CPUs and the other of one. So the state is turned by an
    isometry, which the weights that write it and those that read it take in: x -> V x for V (H', H) with orthonormal
    columns that each add up to 0. V is the identity but for what an entry's share of the sum is taken from.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        """For states of so many dimensions, whose mean square is taken `eps` above what it is."""
        size = _whole(hidden_size + 1)
        # of a reflection that takes the last axis to the diagonal, so that what is left of the others adds up to 0
        self._normal = torch.full((size,), -(size**-0.5), dtype=torch.float64)
        self._normal[-1] += 1
        self._normal /= self._normal.norm()
        self._scale = (hidden_size / size) ** 0.5  # a mean over more entries is smaller
        self.eps = eps * hidden_size / size

    def turned(self, states: Tensor) -> Tensor:
        """V x of each state: (N, H) -> (N, H'), in their dtype."""
        size, normal = states.shape[1], self._normal.to(states.device)
        parts = []
        for start in range(0, len(states), _AT_ONCE):  # a vocabulary's in float64 would be large
            wide = states[start : start + _AT_ONCE].double()
            along = 2 * (wide @ normal[:size])  # (n,)
            turned = F.pad(wide, (0, len(normal) - size)) - along[:, None] * normal
            parts.append(turned.to(states.dtype))
        return torch.cat(parts)

    def writer(self, matrix: Tensor) -> Tensor:
        """(H, ...) -> (H', ...): what gives a state gives the turned one."""
        return self.turned(matrix.reshape(len(matrix), -1).T).T.reshape(-1, *matrix.shape[1:]).contiguous()

    def reader(self, weight: Tensor, norm: Tensor) -> Tensor:
        """(out, H) -> (out, H'): what is given a state normed with weights (H,) gets the turned one, without."""
        parts = []
        for start in range(0, len(weight), _AT_ONCE):
            scaled = weight[start : start + _AT_ONCE].float() * norm.float() * self._scale
            parts.append(self.turned(scaled).to(weight.dtype))
        return torch.cat(parts)


def _whole(size: int) -> int:
    return -(-size // _LANES) * _LANES


_LANES = 16  # entries that a processor adds at once
_AT_ONCE = 4096  # rows


class LeanBody:
    """The layers and the last norm of a transformers model, as one function of tokens and positions."""

    def __init__(
        self, model: Any, dtype: torch.dtype | None, copy: Copy | None, centred: bool
    ) -> None:  # Any: a transformers causal LM
        """Read `model`'s weights; use `LeanBody.of`."""
        config, body = model.config, model.base_model
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim: int = body.layers[0].self_attn.head_dim
        self.eps: float = config.rms_norm_eps
        turn = Centred(config.hidden_size, self.eps) if centred else None
        self.layers = [_layer(layer, dtype, copy, turn) for layer in body.layers]
        self._embed, norm = (each.weight.detach().to(dtype) for each in (body.embed_tokens, body.norm))
        head = model.get_output_embeddings()
        self.vocab_size = len(head.weight)
        self.head = _joined(head, dtype=dtype, copy=copy, turn=turn, norm=norm) if dtype or copy else head
        self._norm: Tensor | None = norm
        if turn is not None:
            self._embed, self._norm, self._centred_eps = turn.turned(self._embed), None, turn.eps
        self._rotary = body.rotary_emb
        self._table: tuple[Tensor, Tensor] | None = None  # cosines and sines of the positions met so far
        self._run = self._layers

    @classmethod
    def of(
        cls, model: Any, *, dtype: torch.dtype | None = None, copy: Copy | None = None, centred: bool = False
    ) -> "LeanBody | None":
        """The lean body of `model`, or None where its layers are not the plain ones that this reads.

        The model's projections become views of the joined weights; with a `dtype` this is a copy, and they stay. So do
        they with a `copy`, `projections`: what is then done to the model's own projections does not show. Such copies
        may be `centred`: one rounding more for the weights, and quicker norms on CPUs.
        """
        config, body = model.config, model.base_model
        plain = all(
            type(module) is nn.Linear
            for layer in body.layers
            for module in (*_projections(layer.self_attn), *_projections(layer.mlp))
        )
        fixed = body.rotary_emb.rope_type not in ("dynamic", "longrope")  # those depend on the length met
        return cls(model, dtype, copy, centred) if plain and fixed and config.hidden_act == "silu" else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        where: torch.device = self._embed.device
        return where

    def compile(self) -> None:
        """Have torch compile the layers, anew for each shape they are fed: half a minute, and captured on CUDA."""
        self._run = compiled(self._layers, self._embed.device)

    def new_cache(self, lengths: Tensor) -> CanvasCache:
        """An empty cache with room for canvases of `lengths` (B,): the first pass must feed every position."""
        shape = (len(lengths), int(lengths.max()) + 1, self.key_heads, self.head_dim)
        keys, values = ([self._embed.new_zeros(shape) for _ in self.layers] for _ in range(2))
        return CanvasCache(keys, values, lengths.tolist())

    def __call__(
        self, tokens: Tensor, *, positions: Tensor | None = None, longest: int | None = None, fed: Fed | None = None
    ) -> Tensor:
        """Hidden states (B, W, H) of `tokens` (B, W) at `positions` (B, W), those of 0 to W - 1 where left out.

        `longest` is above every position. `fed` says which are computed, all of them where left out, and what they
        see; the others come out as zeros.
        """
        batch, width = tokens.shape
        cos, sin = self._turns(max(longest or 0, width))  # (L, D)
        places = torch.arange(width, device=tokens.device).expand(batch, width) if positions is None else positions
        flat, places = tokens.flatten(), places.flatten()
        fed = Fed.of(tokens) if fed is None else fed
        if fed.tokens is not None:
            flat, places = flat[fed.tokens], places[fed.tokens]  # (N,)
        found = self._run(flat, cos[places][:, None], sin[places][:, None], fed)  # (N, H)
        return Part(slice(None), range(batch), width, batch, fed.tokens).spread(found)

    def _layers(self, tokens: Tensor, cos: Tensor, sin: Tensor, fed: Fed) -> Tensor:
        hidden = F.embedding(tokens, self._embed)  # (N, H)
        turned = self.heads + self.key_heads
        for at, layer in enumerate(self.layers):
            qkv = layer.qkv(self._normed(hidden, layer.before)).view(len(hidden), -1, self.head_dim)
            qk, value = qkv[:, :turned], qkv[:, turned:]
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = qk[:, : self.heads], qk[:, self.heads :]
                qk = torch.cat((self._normed(query, layer.query_norm), self._normed(key, layer.key_norm)), 1)
            qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
            query, key = qk[:, : self.heads], qk[:, self.heads :]  # (N, heads, D), (N, key heads, D)
            if fed.cache is not None and fed.write is not None:
                for kept, new in ((fed.cache.keys[at], key), (fed.cache.values[at], value)):
                    kept.flatten(0, 1).index_copy_(0, fed.write, new)
            seen = []
            for part in fed.parts:
                if fed.cache is None:
                    keys, values = part.spread(key), part.spread(value)  # (A, K, key heads, D)
                else:
                    keys, values = part.kept(fed.cache.keys[at]), part.kept(fed.cache.values[at])
                seen.append(part.gather(self._attention(part.spread(query), keys, values, part.mask)))
            hidden = hidden + layer.out(seen[0] if len(seen) == 1 else torch.cat(seen))
            gate, up = layer.gate_up(self._normed(hidden, layer.between)).chunk(2, -1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        return self._normed(hidden, self._norm)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Queries (A, W, heads, D) over keys and values (A, K, key heads, D): (A, W, heads * D).

        Heads that share a key are queries of one: torch would copy keys and values for each of them.
        """
        rows, width = query.shape[:2]
        shared = query.view(rows, width, self.key_heads, -1, self.head_dim).transpose(1, 2).flatten(2, 3)
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat_interleave(self.heads // self.key_heads, 2)
        seen = F.scaled_dot_product_attention(
            shared, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )  # (A, key heads, W * shared, D)
        return seen.view(rows, self.key_heads, width, -1, self.head_dim).transpose(1, 2).flatten(2)

    def _normed(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return F.layer_norm(hidden, (hidden.shape[-1],), eps=self._centred_eps)
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)

    def _turns(self, longest: int) -> tuple[Tensor, Tensor]:
        """Cosines, and sines by which a head's other half is added, of `longest` positions or more: (L, D) each."""
        if self._table is None or len(self._table[0]) < longest:
            places = torch.arange(1 << (longest - 1).bit_length(), device=self._embed.device)[None]
            cos, sin = self._rotary(self._embed, places)
            first, second = sin[0].chunk(2, -1)
            self._table = cos[0], torch.cat((-first, second), -1)
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


def _layer(
    layer: Any, dtype: torch.dtype | None, copy: Copy | None, turn: Centred | None
) -> Layer:  # Any: a decoder layer of transformers
    attention, mlp = layer.self_attn, layer.mlp
    names = ("input_layernorm", "post_attention_layernorm")
    before, between = (getattr(layer, name).weight.detach().to(dtype) for name in names)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (None if norm is None else norm.weight.detach().to(dtype) for norm in norms)
    return Layer(
        qkv=_joined(
            attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype, copy=copy, turn=turn, norm=before
        ),
        out=_joined(attention.o_proj, dtype=dtype, copy=copy, turn=turn),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj, dtype=dtype, copy=copy, turn=turn, norm=between),
        down=_joined(mlp.down_proj, dtype=dtype, copy=copy, turn=turn),
        before=before if turn is None else None,
        between=between if turn is None else None,
        query_norm=query_norm,
        key_norm=key_norm,
    )


@torch.no_grad()
def _joined(
    *projections: nn.Linear,
    dtype: torch.dtype | None,
    copy: Copy | None,
    turn: Centred | None = None,
    norm: Tensor | None = None,
) -> Project:
    """Projections side by side as one: a copy in `dtype`, or what theirs become views of, so that nothing is twice.

    With a `turn` they read turned states, whose `norm` had these weights, or without `norm` write them.
    """
    weight = torch.cat([each.weight for each in projections]).to(dtype)  # (out, in)
    bias = None if projections[0].bias is None else torch.cat([each.bias for each in projections]).to(dtype)
    if turn is not None:
        bias = turn.writer(bias) if bias is not None and norm is None else bias
        weight = turn.writer(weight) if norm is None else turn.reader(weight, norm)
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
