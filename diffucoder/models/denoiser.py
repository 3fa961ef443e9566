"""The Denoiser: a transformers causal language model made bidirectional, whose row i scores token i.

For: scoring positions of canvases, with padding, annealed attention, and logits for wanted positions only.
Not for: reading checkpoints (`checkpoint`), corrupting or losses (`diffusion`), choosing tokens (`decoding`).

Two ideas a newcomer needs:

* **Bidirectional.** transformers' own classes attend both ways once `config.is_causal` and each attention module's
  `is_causal` are False; so set they are bit-equal to Dream's released model, and no modelling code is kept here.
* **The shift.** The weights come from next-token models, so the hidden state at i-1 predicts token i. This module moves
  rows so that row i scores token i. Code that feeds parts of a canvas asks `needed_for` and `scorable`.

`forward` runs transformers' layers: for training, and for the released arithmetic. `score` runs `FastLayers`, with or
without a cache: for decoding, which needs no transformers (`plain`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffucoder.errors import CheckpointError
from diffucoder.models.attention import FULL, Attention, block_causal_mask, block_numbers, two_stream_mask
from diffucoder.models.cache import KVCache
from diffucoder.models.families import Published
from diffucoder.models.layers import FastLayers, Project, plan_layout
from diffucoder.models.plain import PlainModel

SUPPORTED_TYPES = ("qwen2", "qwen3", "llama")  # plain softmax attention, logits = lm_head(hidden), nothing in between
CHUNK_ELEMENTS = 3 * 2**23  # logits alive at once under `reduce`: 48 MiB in bf16, 165 rows of Qwen's vocabulary
COMPILED_STEP = 64  # compiled layers are fed multiples of so many tokens

Reduced = Tensor | tuple[Tensor, ...]
Reduce = Callable[[Tensor, slice], Reduced]
"""`reduce(logits (m, V), chunk)`: one result row for each of the m logit rows; `chunk` says which rows of the whole."""


class Denoiser(nn.Module):
    """A bidirectional language model that scores every position of a canvas from all the others."""

    # Any: transformers is not followed by mypy; `model` is a `PreTrainedModel`, `config` its `PreTrainedConfig`
    def __init__(self, model: Any, *, mask_id: int, shifted: bool = True, attention: Attention = FULL) -> None:
        """Wrap `model` as it is; `from_causal_lm` prepares one first. `shifted=False` is LLaDA's convention."""
        super().__init__()
        self._modules["model"] = model
        self.training = model.training  # a new module says True, whatever it wraps
        self.mask_id = mask_id
        self.shifted = shifted
        self.attention = attention
        self.published: Published | None = None  # how the checkpoint that it was loaded from is written
        self.trained_length: int | None = None  # tokens of the longest rows it was trained on; None: not known
        self._no_split_modules = model._no_split_modules  # what accelerate shards by: the layers
        self.chunk_elements = CHUNK_ELEMENTS
        self.fast: FastLayers | None = None  # what decoding runs by, if it supports the architecture
        self.compiled = False  # the fast layers are compiled, and fed few shapes

    @classmethod
    def from_causal_lm(
        cls, model: Any, *, mask_id: int, shifted: bool = True, attention: Attention = FULL
    ) -> "Denoiser":
        """Make `model`, a transformers causal LM, bidirectional in place and wrap it.

        If the model has no row for `mask_id`, its embeddings grow to hold it. CheckpointError if the architecture is
        not one of `SUPPORTED_TYPES` or does not attend to all positions. Attention is torch's own from then on,
        whatever the model was loaded with: eager attention would add our masks of truth values as numbers.
        """
        kind = model.config.model_type
        if kind not in SUPPORTED_TYPES:
            raise CheckpointError(
                f"architecture {kind!r} cannot be made bidirectional here; use one of {', '.join(SUPPORTED_TYPES)}"
            )
        narrow = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
        if narrow:
            raise CheckpointError(f"{kind!r} with {min(narrow)} layers cannot see a canvas; use full attention")
        if mask_id < 0:
            raise CheckpointError(f"mask_id={mask_id} is not a token id; use a free id of the tokenizer")
        grow_vocabulary(model, mask_id + 1)
        set_causal(model, False)
        model.set_attn_implementation("sdpa")
        # transformers keeps the gradient of a pad's embedding at zero; here pads are tokens that are learnt
        model.get_input_embeddings().padding_idx = None
        return cls(model, mask_id=mask_id, shifted=shifted, attention=attention)

    @property
    def model(self) -> Any:
        """The transformers model."""
        inner = self._inner
        if isinstance(inner, PlainModel):
            whole = inner.whole()
            whole.load_state_dict(inner.state_dict(), assign=True)  # no second copy of the weights
            self._modules["model"] = whole.train(self.training)
        return self._inner

    @property
    def _inner(self) -> Any:
        """What holds the weights: the transformers model, or until that is needed a `PlainModel`."""
        return self._modules["model"]

    @property
    def config(self) -> Any:
        """The transformers config of the wrapped model."""
        return self.model.config

    @property
    def vocab_size(self) -> int:
        """V: the columns of the logits, used or spare."""
        return int(self._inner.get_output_embeddings().weight.shape[0])

    @property
    def max_length(self) -> int:
        """The longest canvas the model was made for."""
        return int(self._inner.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where results come out."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of the logits outside autocast."""
        return self._inner.get_output_embeddings().weight.dtype  # type: ignore[no-any-return]  # model is Any

    @property
    def first_scorable(self) -> int:
        """The first position of a canvas that the model can score: 1 for shifted models, else 0."""
        return int(self.shifted)

    def needed_for(self, positions: Tensor) -> Tensor:
        """The positions that a pass must be fed to score `positions`, (..., T) bool each."""
        if not self.shifted:
            return positions
        return nn.functional.pad(positions[..., 1:], (0, 1))

    def scorable(self, fed: Tensor) -> Tensor:
        """Those of the positions `fed` that a pass over them can score, (..., T) bool each."""
        if not self.shifted:
            return fed
        return fed & nn.functional.pad(fed[..., :-1], (1, 0))

    @property
    def cache(self) -> KVCache:
        """The cache of the fast layers. CheckpointError for a model without them."""
        if self.fast is None:
            self.use_fast_layers()
        if self.fast is None:
            raise CheckpointError(
                f"this {self.config.model_type!r} model has no cache for its layers (adapters, or RoPE by length); "
                "use cache='none'"
            )
        return self.fast.cache

    def use_fast_layers(self, *, compiled: bool = False) -> None:
        """Decode by `FastLayers` from now on, if they support the architecture. The projections become views.

        `compiled` has torch compile them, for which passes are padded to a few shapes; CheckpointError without support.
        """
        self.fast = FastLayers.of(self._inner)
        if compiled:
            if self.fast is None:
                kind = self.config.model_type
                raise CheckpointError(f"a {kind!r} model has no layers to compile; use compiled=False")
            self.fast.compile()
        self.compiled = compiled

    @contextmanager
    def fast_snapshot(self, dtype: torch.dtype) -> Iterator[None]:
        """Decode by a copy of the weights as they are now, in `dtype`: for a model that is being trained."""
        before = self.fast
        self.fast = FastLayers.of(self._inner, dtype)
        try:
            yield
        finally:
            self.fast = before

    def _apply(self, fn: Any, recurse: bool = True) -> "Denoiser":  # Any: as torch has it
        """Move or cast the weights, then read the fast layers again."""
        fast = self.fast
        self.fast = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if fast is not None:
            self.use_fast_layers(compiled=self.compiled)
        return self

    @torch.no_grad()
    def score(
        self,
        tokens: Tensor,
        *,
        valid: Tensor,
        feed: Tensor,
        wanted: Tensor,
        reduce: Reduce,
        prompt_ends: Tensor | None = None,
        cache_rows: Sequence[int] | None = None,
        reference: bool = False,
    ) -> tuple[Tensor, ...]:
        """Reduce the logits of some positions of canvases, computing only what is fed. For decoding.

        tokens (R, T) int64, `valid` (R, T) bool False on left padding, and `feed` (R, T) bool are on the host. `wanted`
        (M, 2) int64 are (row, position) pairs, each `scorable` from what is fed. With `cache_rows` (one for each
        canvas, acquired from `cache`) positions that are not fed are seen as they were when they were fed last;
        without, everything valid must be fed, by block-causal models up to the end of a block. `prompt_ends` is that of
        `forward`. `reference` computes by transformers' layers, as the released code does.
        Returns what `reduce` gives, (M, ...) each.
        """
        fast = self.fast
        if fast is None or reference or self._inner.config.is_causal:
            assert cache_rows is None, "a cache belongs to fast layers"
            return _as_tuple(self(tokens, valid=valid, prompt_ends=prompt_ends, rows=wanted, reduce=reduce))
        device = self.device
        positions = (valid.long().cumsum(-1) - 1).clamp(min=0)  # (R, T)
        fed, layout = plan_layout(
            feed,
            positions,
            sees=self._sees(positions, valid, prompt_ends),
            queries=fast.heads // fast.key_heads,
            step=self._feed_step(int(feed.sum())),
            static=self.compiled,
            device=device,
            cache=fast.cache,
            cache_rows=cache_rows,
        )
        with _without_autocast(device):  # the layers are of one dtype
            hidden = fast(
                tokens.flatten()[fed].to(device),
                positions.flatten()[fed].to(device),
                layout,
                longest=int(positions.max()) + 1,
            )  # (N, H)
            index_of = torch.zeros(feed.numel(), dtype=torch.long)  # of each fed position among the N
            index_of[fed] = torch.arange(len(fed))
            row, position = self._sources(wanted, valid).unbind(-1)
            source = index_of[row * tokens.shape[1] + position]  # (M,)
            return self._reduced(hidden[source.to(device)], fast.head, reduce)

    def _sees(self, positions: Tensor, valid: Tensor, prompt_ends: Tensor | None) -> Tensor | None:
        """(R, T) int64: how many positions of its canvas each one sees, from the first; None: all of them."""
        if self.attention.block is None:
            return None
        lengths = valid.sum(-1, keepdim=True)  # (R, 1)
        padding = valid.shape[1] - lengths
        origins = self.attention.origins(valid, prompt_ends)[:, None] - padding
        blocks = (positions - origins).div(self.attention.block, rounding_mode="floor")
        return (origins + (blocks + 1) * self.attention.block).clamp(min=origins, max=lengths)

    def _feed_step(self, count: int) -> int:
        """A pass of `count` tokens is fed a multiple of so many.

        Compiled layers are compiled for each size, and for bfloat16 on CPUs oneDNN compiles a kernel for each.
        """
        if self.compiled:
            return COMPILED_STEP
        if self.dtype != torch.bfloat16 or self.device.type != "cpu":
            return 1
        return 8 if count <= 64 else 32

    def forward(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        attention: Tensor | None = None,
        prompt_ends: Tensor | None = None,
        clean: Tensor | None = None,
        rows: Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> Reduced:
        """Score positions of `tokens` (B, T) int64: row i of the result holds the logits of token i.

        `valid` (B, T) bool is False on left padding; without it, a device synchronisation is saved. What padded
        positions score means nothing, but is finite. `attention` bool, (T, T) or (B, T, T), True where query (row) may
        see key (column), narrows the model's own attention; a lower triangle is the autoregressive model. `prompt_ends`
        (B,) int64, the columns after the prompts, matter only to models whose blocks begin there. The first real
        position of a shifted model is scored from itself: put a real token there. `clean` (B, T) int64 is for training
        block-causal models: each block of `tokens` sees itself and the blocks before it in `clean`.

        Returns (B, T, V) logits in the model's dtype; with `rows` (M, 2) int64 of (row, position) pairs only those,
        (M, V). With `reduce`, its results instead, one row for each logit row: it is called on chunks of at most
        `chunk_elements` logits, so the whole never exists, in training either.
        """
        if valid is not None and bool(valid.all()):  # read before it moves: it may still be on the host
            valid = None
        device = self.device
        valid = _moved(valid, device)
        attention = _moved(attention, device)
        rows = _moved(rows, device)
        tokens = tokens.to(device)
        if self.attention.block is None or self.config.is_causal:
            assert clean is None, "only block-causal models are trained with a clean text"
            blocks = None
        else:
            real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
            origins = self.attention.origins(real, _moved(prompt_ends, device))
            blocks = block_numbers(tokens.shape[1], self.attention.block, origins)  # (B, T)
        hidden = self._hidden(tokens, valid, attention, blocks, _moved(clean, device))
        wanted = rows
        if wanted is None:
            batch, length = tokens.shape
            wanted = torch.cartesian_prod(torch.arange(batch), torch.arange(length)).to(device)  # (B * T, 2)
        sources = self._sources(wanted, valid)
        if clean is not None and blocks is not None:
            sources = _in_streams(sources, wanted, blocks)
        hidden = hidden[tuple(sources.T)]  # (M, H)
        head = self.model.get_output_embeddings()
        results = (head(hidden),) if reduce is None else self._reduced(hidden, head, reduce)
        if rows is None:  # other results stay as they are: FSDP2 warns of views among what it returns
            results = tuple(result.view(*tokens.shape, *result.shape[1:]) for result in results)
        return results if len(results) > 1 else results[0]

    def _hidden(
        self,
        tokens: Tensor,
        valid: Tensor | None,
        attention: Tensor | None,
        blocks: Tensor | None,
        clean: Tensor | None,
    ) -> Tensor:
        """The last hidden states (B, T, H), of `forward`'s arguments; (B, 2 T, H) if there is a clean text."""
        if blocks is not None:
            seen = block_causal_mask(blocks)
            attention = seen if attention is None else seen & attention
        mask, positions = _mask_and_positions(valid, attention)
        if clean is not None and blocks is not None and mask is not None:
            mask = two_stream_mask(blocks, mask)
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            positions = positions.repeat(1, 2)
            tokens = torch.cat([tokens, clean], -1)
        body = self.model.base_model  # the layers and final norm, without the head
        hidden: Tensor = body(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, return_dict=True
        ).last_hidden_state
        return hidden

    def _sources(self, wanted: Tensor, valid: Tensor | None) -> Tensor:
        """The (row, position) pairs (M, 2) whose hidden states score the pairs `wanted` (M, 2)."""
        if not self.shifted:
            return wanted
        row, position = wanted.unbind(-1)
        left = (position - 1).clamp(min=0)
        if valid is not None:  # a row's first real token has no real left neighbour: it reads itself, padded or not
            left = left.where(valid[row, left], position)
        return torch.stack([row, left], -1)

    def _reduced(self, hidden: Tensor, head: Project, reduce: Reduce) -> tuple[Tensor, ...]:
        """`reduce` over the logits of `hidden` (N, H), chunk by chunk: tensors of N rows each."""
        size = max(1, self.chunk_elements // self.vocab_size)
        starts = range(0, max(len(hidden), 1), size)  # no rows is still one (empty) chunk: it gives shapes and dtypes

        def part(chunk_hidden: Tensor, chunk: slice) -> Reduced:
            return reduce(head(chunk_hidden), chunk)

        parts = []
        for start in starts:
            chunk = slice(start, min(start + size, len(hidden)))
            if torch.is_grad_enabled() and len(starts) > 1:
                # Each chunk's logits would stay alive until backward: compute them again there instead
                result = checkpoint(part, hidden[chunk], chunk, use_reentrant=False)
            else:
                result = part(hidden[chunk], chunk)
            parts.append(_as_tuple(result))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _in_streams(sources: Tensor, wanted: Tensor, blocks: Tensor) -> Tensor:
    """The pairs `sources` (M, 2) among 2 T columns: where a block begins, a shifted model reads the clean text."""
    row, position = sources.unbind(-1)
    length = blocks.shape[1]
    other = blocks[row, position] != blocks[row, wanted[:, 1]]
    return torch.stack([row, position + length * other], -1)


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _as_tuple(reduced: Reduced) -> tuple[Tensor, ...]:
    return reduced if isinstance(reduced, tuple) else (reduced,)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def set_causal(model: Any, causal: bool) -> None:
    """Make a transformers model attend left to right only, or both ways, in place."""
    # transformers reads both: the config when it builds masks, the module when there is no mask to build
    model.config.is_causal = causal
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = causal


def _mask_and_positions(valid: Tensor | None, attention: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Attention mask (B or 1, 1, T, T) bool, True = visible, and position ids (B, T); None where nothing narrows."""
    mask = attention  # (B or 1, T, T)
    if attention is not None and attention.ndim == 2:
        mask = attention[None]
    positions = None
    if valid is not None:
        # Dream counts real tokens; padding is at position 1
        positions = (valid.long().cumsum(-1) - 1).masked_fill(~valid, 1)
        both = valid[:, None, :] & valid[:, :, None]  # (B, T, T): a key is seen where both key and query are real
        mask = both if mask is None else mask & both
        # A query that sees nothing is NaN in some attention kernels. Padding sees itself, and nobody sees padding.
        mask = mask | torch.diag_embed(~valid)
    return (None if mask is None else mask[:, None]), positions


@torch.no_grad()
def grow_vocabulary(model: Any, rows: int) -> None:
    """Give the embeddings and the head of `model`, in place, at least `rows` rows; new ones are the mean of the old."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)  # its own mean resizing draws from the global generator
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)
