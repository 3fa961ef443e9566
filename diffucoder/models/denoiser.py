"""The Denoiser: a transformers causal language model made bidirectional, whose row i scores token i.

For: one forward pass over canvases, with padding, annealed attention, and logits for wanted rows only.
Not for: reading checkpoints (`checkpoint`), corrupting or losses (`diffusion`), choosing tokens (`decoding`).

Two ideas a newcomer needs:

* **Bidirectional.** transformers' own classes attend both ways once `config.is_causal` and each attention module's
  `is_causal` are False; so set they are bit-equal to Dream's released model, and no modelling code is kept here.
* **The shift.** The weights come from next-token models, so the hidden state at i-1 predicts token i. This module moves
  rows so that row i scores token i, and nothing else in the project knows about it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffucoder.errors import CheckpointError
from diffucoder.models.lean import CanvasCache, Fed, LeanBody
from diffucoder.models.projections import Project, int8_projection, packable, packed_projection, round_rows

SUPPORTED_TYPES = ("qwen2", "qwen3", "llama")  # plain softmax attention, logits = lm_head(hidden), nothing in between
CHUNK_ELEMENTS = 3 * 2**23  # logits alive at once under `reduce`: 48 MiB in bf16, 165 rows of Qwen's vocabulary

Reduced = Tensor | tuple[Tensor, ...]
Reduce = Callable[[Tensor, slice], Reduced]
"""`reduce(logits (m, V), chunk)`: one result row for each of the m logit rows; `chunk` says which rows of the whole."""


class Denoiser(nn.Module):
    """A bidirectional language model that scores every position of a canvas from all the others."""

    # Any: transformers is not followed by mypy; `model` is a `PreTrainedModel`, `config` its `PreTrainedConfig`
    def __init__(self, model: Any, *, mask_id: int, shifted: bool = True) -> None:
        """Wrap `model` as it is; `from_causal_lm` prepares one first. `shifted=False` is LLaDA's convention."""
        super().__init__()
        self.model: Any = model
        self.training = model.training  # a new module says True, whatever it wraps
        self.mask_id = mask_id
        self.shifted = shifted
        self._no_split_modules = model._no_split_modules  # what accelerate shards by: the layers
        self.chunk_elements = CHUNK_ELEMENTS
        self._lean: LeanBody | None = None
        self._int8 = self._packed = False  # what the lean body is made of
        self.compiled = False  # decoding keeps to a few shapes, which are compiled
        self.proposable: int = self.vocab_size  # how many leading ids decoding may propose; fewer where some are spare

    @classmethod
    def from_causal_lm(cls, model: Any, *, mask_id: int, shifted: bool = True) -> "Denoiser":
        """Make `model`, a transformers causal LM, bidirectional in place and wrap it.

        `mask_id` is the token that stands for "unknown": an id the tokenizer leaves free. Where the model has no such
        row, its embeddings grow to hold it, the new rows being the mean of the old. CheckpointError where the
        architecture is not one of `SUPPORTED_TYPES` or attends through a sliding window.
        """
        kind = model.config.model_type
        if kind not in SUPPORTED_TYPES:
            raise CheckpointError(
                f"architecture {kind!r} cannot be made bidirectional here; use one of {', '.join(SUPPORTED_TYPES)}"
            )
        if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
            raise CheckpointError(f"{kind!r} with sliding_attention layers cannot see a canvas; use full attention")
        if mask_id < 0:
            raise CheckpointError(f"mask_id={mask_id} is not a token id; use a free id of the tokenizer")
        grow_vocabulary(model, mask_id + 1)
        set_causal(model, False)
        # transformers keeps the gradient of a pad's embedding at zero; here pads are tokens that are learnt
        model.get_input_embeddings().padding_idx = None
        return cls(model, mask_id=mask_id, shifted=shifted)

    @property
    def config(self) -> Any:
        """The transformers config of the wrapped model."""
        return self.model.config

    @property
    def vocab_size(self) -> int:
        """V: the columns of the logits, used or spare."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def max_length(self) -> int:
        """The longest canvas the model was made for."""
        return int(self.config.max_position_embeddings)

    @property
    def first_scorable(self) -> int:
        """The first position that the model can score: a shifted one has nothing to score token 0 from."""
        return 1 if self.shifted else 0

    @property
    def pad_id(self) -> int:
        """What fills slots that `valid` marks False: the config's pad, else its end of text, else the mask."""
        pad = self.config.pad_token_id
        return int(pad) if pad is not None else next(iter(self.eos_ids), self.mask_id)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids the config calls end of text; none where it names none. A chat's terminators are the tokenizer's."""
        eos = self.config.eos_token_id
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where results come out."""
        return next(self.parameters()).device if self._lean is None else self._lean.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of the logits outside autocast."""
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]  # model is Any

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that decoding multiplies weights in: theirs, or int8."""
        return torch.int8 if self._int8 else self.dtype

    def use_lean(self, *, int8: bool = False, packed: bool = False, compiled: bool = False) -> None:
        """Decode by the lean body from now on, where the architecture has one; training goes by transformers' layers.

        The model's projections become views of joined weights. Call it again after putting other modules in place.
        `packed` goes by a copy of them laid out for this CPU, where that is possible and small (`packable`): for
        weights that nothing changes any more. With `int8` it multiplies a copy of them in eight bits: CheckpointError
        where there is no CPU or no lean body to do so. `compiled` has torch compile layers and sampler, for which
        decoding pads what it feeds to a few shapes: CheckpointError where there is no lean body.
        """
        fit = packed and not int8 and not compiled and packable(self.model)
        lean = LeanBody.of(
            self.model, copy=int8_projection if int8 else packed_projection if fit else None, centred=fit
        )
        if int8 and (lean is None or self.device.type != "cpu"):
            what = f"a {self.config.model_type!r} model on {self.device.type}"
            raise CheckpointError(f"{what} cannot be decoded in int8, plain layers on a CPU can; use bfloat16")
        if compiled:
            if lean is None:
                raise CheckpointError(f"a {self.config.model_type!r} model has no lean body to compile; leave it out")
            lean.compile()
        self._lean, self._int8, self._packed, self.compiled = lean, int8, packed, compiled

    @contextmanager
    def lean_snapshot(self, dtype: torch.dtype) -> Iterator[None]:
        """Decode by a lean copy of the weights as they are now, in `dtype`: what a model in training writes with."""
        before, self._lean = self._lean, LeanBody.of(self.model, dtype=dtype)
        try:
            yield
        finally:
            self._lean = before

    def new_cache(self, lengths: Tensor) -> CanvasCache:
        """An empty cache for canvases of `lengths` (B,). CheckpointError for a model without a lean body."""
        if self._lean is None:
            self.use_lean()
        if self._lean is None:
            raise CheckpointError(
                f"this {self.config.model_type!r} model has no cache for its layers; use cache='none'"
            )
        return self._lean.new_cache(lengths)

    def _apply(self, fn: Any, recurse: bool = True) -> "Denoiser":  # Any: as torch has it
        """As ever: weights that are moved or cast take the lean body's place, which is made anew."""
        lean, self._lean = self._lean, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if lean is not None:
            self.use_lean(int8=self._int8, packed=self._packed, compiled=self.compiled)
        return self

    def forward(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        attention: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CanvasCache | None = None,
        places: Sequence[int] | None = None,
        rows: Tensor | None = None,
        reduce: Reduce | None = None,
        released: bool = False,
    ) -> Reduced:
        """Score positions of `tokens` (B, T) int64: row i of the result holds the logits of token i.

        `valid` (B, T) bool is False on left padding; leave it out where nothing is padded, which saves a look at the
        device. What padded positions score means nothing, but is finite. `attention` bool, (T, T) or (B, T, T),
        True where query (row) may see key (column), narrows full attention; a lower triangle is the autoregressive
        model. The first real position has no neighbour to its left and is scored from itself: put a real token there.

        Part of a canvas may be fed alone: `positions` (B, T) int64 are then the places in it, increasing along a row;
        with a `cache` the rest is seen as it was when it was fed last, and `places` are the B rows of it that the
        canvases have, the first ones where left out. Row i scores its token only where position i - 1
        is fed right before it. `released` computes by transformers' own layers, bit for bit as the release does.

        Returns (B, T, V) logits in the model's dtype; with `rows` (M, 2) int64 of (row, position) pairs only those,
        (M, V). With `reduce`, its results instead, one row for each logit row, (B, T, ...) or (M, ...): it is called
        on chunks of at most `chunk_elements` logits, so the whole never exists, in training either.
        """
        # Asked here, where the tensors may still be on the host: nothing below waits for the device
        longest = tokens.shape[1] if positions is None else int(positions.max()) + 1
        if valid is not None and bool(valid.all()):
            valid = None
        narrow = self._packed and self.device.type == "cpu" and len(tokens) == 1
        more = round_rows(tokens.shape[1]) - tokens.shape[1] if narrow else 0
        if more and positions is not None and rows is not None:
            real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
            tokens, positions, valid = (nn.functional.pad(each, (more, 0)) for each in (tokens, positions, real))
            rows = rows + rows.new_tensor([0, more])
        lean = self._lean
        plain = lean is None or torch.is_grad_enabled() or released or self.config.is_causal
        # Nor do real tokens wait for padding; what is compiled keeps to its shapes
        fed = None
        if not plain:
            mask = None if cache is not None else _mask(tokens, valid, attention)[0]
            packed = len(tokens) > 1 and valid is not None and not self.compiled
            fed = Fed.of(
                tokens,
                valid,
                mask=mask,
                cache=cache,
                places=places or range(len(tokens)),
                positions=positions,
                packed=packed,
                split=packed and self.device.type == "cpu",  # where a call costs less than what it leaves out
            ).to(self.device)
        # Where the model is, wherever they come from: no copy where they are there already
        tokens = tokens.to(self.device)
        given = (valid, attention, positions, rows)
        valid, attention, positions, rows = (None if t is None else t.to(self.device) for t in given)
        if lean is None or plain:
            assert cache is None, "new_cache makes a lean body, which decodes"
            head = self.model.get_output_embeddings()
            mask, counted = _mask(tokens, valid, attention)
            body = self.model.base_model  # the layers and final norm, without the head
            hidden = body(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=counted if positions is None else positions,
                use_cache=False,
            ).last_hidden_state  # (B, T, H)
        else:
            head = lean.head
            positions = _counted(valid) if positions is None and valid is not None else positions
            with _without_autocast(self.device):  # it is of one dtype
                hidden = lean(tokens, positions=positions, longest=longest, fed=fed)  # (B, T, H)
        hidden = self._aligned(hidden, valid, rows)  # (B, T, H) or (M, H)
        if reduce is None:
            return head(hidden)  # type: ignore[no-any-return]  # the model is Any
        results = self._reduced(hidden.flatten(0, -2), head, reduce)  # each (B * T, ...) or (M, ...)
        # (M, ...) as they are: FSDP2 warns of views among what it returns
        shaped = results if rows is not None else tuple(r.reshape(*hidden.shape[:-1], *r.shape[1:]) for r in results)
        return shaped if len(shaped) > 1 else shaped[0]

    def _aligned(self, hidden: Tensor, valid: Tensor | None, rows: Tensor | None) -> Tensor:
        """The hidden state that scores each wanted position: (B, T, H) -> (B, T, H), or (M, H) with `rows`."""
        batch, length = hidden.shape[:2]
        if not self.shifted:
            return hidden if rows is None else hidden[rows[:, 0], rows[:, 1]]
        # a row's first real token has no real left neighbour: like token 0, it reads itself, padded or not
        if rows is not None:
            row, position = rows.unbind(-1)  # (M,) each
            left = (position - 1).clamp(min=0)
            return hidden[row, left if valid is None else left.where(valid[row, left], position)]
        source = torch.arange(length, device=hidden.device).expand(batch, length)  # (B, T)
        real = torch.ones_like(source, dtype=torch.bool) if valid is None else valid
        source = source - nn.functional.pad(real[:, :-1], (1, 0)).long()
        return hidden.gather(1, source[..., None].expand_as(hidden))

    def _reduced(self, hidden: Tensor, head: Project, reduce: Reduce) -> tuple[Tensor, ...]:
        """`reduce` over the logits of `hidden` (N, H), chunk by chunk: tensors of N rows each."""
        size = max(1, self.chunk_elements // (self.vocab_size if self._lean is None else self._lean.vocab_size))
        starts = range(0, max(len(hidden), 1), size)  # no rows is still one (empty) chunk: it gives shapes and dtypes

        def part(chunk_hidden: Tensor, chunk: slice) -> Reduced:
            return reduce(head(chunk_hidden), chunk)

        parts = []
        for start in starts:
            chunk = slice(start, min(start + size, len(hidden)))
            # With gradients each chunk's logits would stay alive until backward: compute them again there instead.
            again = torch.is_grad_enabled() and len(starts) > 1
            out = checkpoint(part, hidden[chunk], chunk, use_reentrant=False) if again else part(hidden[chunk], chunk)
            parts.append(out if isinstance(out, tuple) else (out,))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    within = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if within else nullcontext()


def set_causal(model: Any, causal: bool) -> None:
    """Make a transformers model attend left to right only, or both ways, in place."""
    # transformers reads both: the config when it builds masks, the module when there is no mask to build
    model.config.is_causal = causal
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = causal


def _mask(tokens: Tensor, valid: Tensor | None, attention: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Attention mask (B or 1, 1, T, T) bool, True = visible, and position ids (B, T); None where nothing narrows."""
    mask = None if attention is None else attention[None] if attention.ndim == 2 else attention  # (B or 1, T, T)
    positions = None
    if valid is not None:
        # a key is seen where both key and query are real
        positions = _counted(valid)
        both = valid[:, None, :] & valid[:, :, None]  # (B, T, T)
        mask = both if mask is None else mask & both
        # A query that sees nothing is NaN in some attention kernels. Padding sees itself, and nobody sees padding.
        mask = mask | torch.diag_embed(~valid)
    return (None if mask is None else mask[:, None]), positions


def _counted(valid: Tensor) -> Tensor:
    """(B, T) position ids as Dream has them: they count real tokens, padding sits at 1."""
    return (valid.long().cumsum(-1) - 1).masked_fill(~valid, 1)


@torch.no_grad()
def grow_vocabulary(model: Any, rows: int) -> None:
    """Give the embeddings and the head of `model`, in place, at least `rows` rows; new ones are the mean of the old."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)  # its own mean resizing draws from the global generator
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)
