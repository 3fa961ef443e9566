"""Stage 3: instruction tuning on requests and answers in the chat template (DiffuCoder, appendix B.1).

The answer is noised. At first the request is noised too: over the first steps the share of rows with a clean request
grows from none to all. Rows end in pads, which are seen, noised and scored like any token, so the model learns how long
an answer is.
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffucoder.diffusion import keyed_generator, random_spans
from diffucoder.errors import ConfigError
from diffucoder.models.denoiser import grow_vocabulary
from diffucoder.training.data import TokenStore, epoch_index, prepare
from diffucoder.training.masked import HELD_OUT, Row
from diffucoder.training.processes import first_process
from diffucoder.training.run import check_length, load_start, masked_stage, train_and_export
from diffucoder.training.settings import SftSettings

_ORDER, _SHAPE, _SPARE, _GROUP = 20, 21, 22, 23  # the last number of a key of noise: what is drawn
_GROUPED = 16  # steps whose rows are sorted by length together, if padding is flexible

Array = np.ndarray[Any, Any]  # Any: as numpy's own stubs have it


class ChatRows:
    """Requests and answers, padded (`masked.Rows`). Flexible: rows of 16 steps are sorted by length."""

    def __init__(self, store: TokenStore, settings: SftSettings, *, pad_id: int) -> None:
        """ConfigError if no example fits into `length`."""
        self.store = store
        self.settings = settings
        self.pad_id = pad_id
        self.fitting = np.flatnonzero(store.lengths <= settings.length)  # (E',) examples that are not too long
        if not len(self.fitting):
            raise ConfigError(f"length={settings.length} is shorter than every example; raise it")
        # an epoch has only the examples that fit
        self.steps = settings.steps or max(1, int(settings.epochs * len(self.fitting)) // settings.batch)
        self.group = _GROUPED if settings.padding == "flexible" else 1  # steps whose rows are drawn together
        self._drawn = lru_cache(maxsize=2)(self._draw)  # rows of a group of steps are requested one by one

    def width(self, step: int) -> int:
        """`length`, or the longest row of the step and, in a share of the steps, some more."""
        settings = self.settings
        if settings.padding == "fixed":
            return settings.length
        width = int(self.store.lengths[self._examples(step)].max())
        u, spare = torch.rand(2, generator=keyed_generator(settings.seed, step, _SPARE)).tolist()
        if u < settings.spare_share and step != HELD_OUT:
            width += int(spare * (settings.spare + 1))
        return min(width, settings.length)

    def row(self, step: int, index: int) -> Row:
        """The padded example. What may be hidden is the answer, or everything, or spans of the answer."""
        settings = self.settings
        held_out = step == HELD_OUT
        examples = self._examples(step)
        ids, answer = self.store.example(int(examples[index % len(examples)]))
        tokens = torch.full((self.width(step),), self.pad_id)
        tokens[: len(ids)] = torch.from_numpy(ids)
        maskable = torch.ones(len(tokens), dtype=torch.bool)
        noise = keyed_generator(settings.seed, step, index, _SHAPE)
        u, v = torch.rand(2, generator=noise).tolist()
        ramp = settings.ramp * self.steps  # steps over which the share of clean requests grows from 0 to 1
        if held_out or step >= ramp or u < step / ramp:
            maskable[:answer] = False
        if not held_out and v < settings.infill:
            maskable[:] = False
            maskable[answer : len(ids)] = random_spans(len(ids) - answer, noise)
        return Row(tokens, maskable)

    def _examples(self, step: int) -> Array:
        """The examples of the step's rows, (batch,); all that fit of held-out rows."""
        if step == HELD_OUT:
            return self.fitting
        group, number = divmod(step, self.group)
        examples: Array = self._drawn(group)[number]
        return examples

    def _draw(self, group: int) -> Array:
        """The examples of a group of steps, (steps of the group, batch)."""
        settings = self.settings
        first = group * self.group * settings.batch
        positions = range(first, first + self.group * settings.batch)
        rows = [epoch_index(position, len(self.fitting), (settings.seed, _ORDER)) for position in positions]
        examples = self.fitting[rows]
        if settings.padding == "flexible":
            examples = examples[np.argsort(self.store.lengths[examples], kind="stable")]
        order = torch.randperm(self.group, generator=keyed_generator(settings.seed, group, _GROUP)).numpy()
        steps: Array = examples.reshape(self.group, settings.batch)[order]
        return steps


def sft(settings: SftSettings) -> Path:
    """Run the stage, or resume it, and return the folder of the tuned model."""
    denoiser, tokenizer = load_start(settings)
    tokenizer = tokenizer.with_own_pad()
    grow_vocabulary(denoiser.model, tokenizer.vocab_size)
    denoiser.config.pad_token_id = tokenizer.pad_id
    check_length(denoiser, "length", settings.length)

    def rows_of(name: str, sources: tuple[str, ...]) -> ChatRows:
        store = prepare(sources, tokenizer, settings.cache, kind="chat")
        rows = ChatRows(store, settings, pad_id=tokenizer.pad_id)
        too_long = np.flatnonzero(store.lengths > settings.length)
        if len(too_long) and first_process():
            print(
                f"left out {len(too_long):,} of {len(store):,} examples of {name}, which are longer than "
                f"length={settings.length}; the first is number {too_long[0] + 1}, with "
                f"{store.lengths[too_long[0]]:,} tokens",
                file=sys.stderr,
            )
        return rows

    rows = rows_of("data", settings.data)
    denoiser.trained_length = settings.length
    if settings.padding == "flexible":
        longest = int(rows.store.lengths[rows.fitting].max())
        denoiser.trained_length = min(longest + settings.spare, settings.length)
    settings = settings.model_copy(update={"steps": rows.steps})
    held_out = rows_of("held_out", settings.held_out) if settings.held_out else None
    stage = masked_stage(settings, denoiser, tokenizer, rows, held_out)
    return train_and_export(denoiser, tokenizer, stage, settings)
