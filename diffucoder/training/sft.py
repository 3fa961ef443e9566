"""Stage 3: instruction tuning on requests and answers in the chat template (DiffuCoder, appendix B.1).

The answer is noised and the request comes to be left clean: over the first steps the share of rows with a clean request
grows from none to all, which carries a model over from unconditional training. Rows end in pads, which are noised and
scored like any token, so the model learns how long an answer is; nothing hides them from attention.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from diffucoder.diffusion import keyed_generator, random_spans
from diffucoder.errors import ConfigError
from diffucoder.models.denoiser import grow_vocabulary
from diffucoder.training.data import TokenStore, epoch_index, prepare
from diffucoder.training.masked import HELD_OUT, MaskedStage, Row
from diffucoder.training.processes import first_process
from diffucoder.training.run import check_length, load_start, objective, train_and_export
from diffucoder.training.settings import SftSettings

_ORDER, _SHAPE, _SPARE, _GROUP = 20, 21, 22, 23  # the last number of a key of noise: what is drawn
_GROUPED = 16  # steps whose rows are sorted by length together, where padding is flexible


class ChatRows:
    """Requests and answers, padded (`masked.Rows`).

    With flexible padding the rows of 16 steps are sorted by length and dealt out in stretches, the steps then shuffled:
    rows of one step are about as long as each other, and little of it is padding.
    """

    def __init__(self, store: TokenStore, settings: SftSettings, *, pad_id: int) -> None:
        """ConfigError where no example fits into `length`."""
        self.store, self.settings, self.pad_id = store, settings, pad_id
        self.fitting = np.flatnonzero(store.lengths <= settings.length)  # (E',) examples that are not too long
        if not len(self.fitting):
            raise ConfigError(f"length={settings.length} is shorter than every example; raise it")
        # what is left out is no part of an epoch
        self.steps = settings.steps or max(1, int(settings.epochs * len(self.fitting)) // settings.batch)
        self._dealt = lru_cache(maxsize=2)(self._deal)  # the rows of a group of steps are asked for one by one

    def width(self, step: int) -> int:
        """`length`, or the longest row of the step and, in a share of the steps, some more."""
        settings = self.settings
        if settings.padding == "fixed":
            return settings.length
        if step == HELD_OUT:
            return int(self.store.lengths[self.fitting].max())
        width = int(self.store.lengths[self._examples(step)].max())
        u, spare = torch.rand(2, generator=keyed_generator(settings.seed, step, _SPARE)).tolist()
        if u < settings.spare_share:
            width += int(spare * (settings.spare + 1))
        return min(width, settings.length)

    def row(self, step: int, index: int) -> Row:
        """The padded example; what may be hidden is the answer, or everything, or spans of the answer."""
        settings = self.settings
        if step == HELD_OUT:
            ids, answer = self.store.example(int(self.fitting[index % len(self.fitting)]))
        else:
            ids, answer = self.store.example(int(self._examples(step)[index]))
        tokens = torch.full((self.width(step),), self.pad_id)
        tokens[: len(ids)] = torch.from_numpy(ids)
        maskable = torch.ones(len(tokens), dtype=torch.bool)
        noise = keyed_generator(settings.seed, step, index, _SHAPE)
        u, v = torch.rand(2, generator=noise).tolist()
        if step == HELD_OUT or u < self._clean_share(step):
            maskable[:answer] = False
        if step != HELD_OUT and v < settings.infill:
            maskable[:answer] = maskable[len(ids) :] = False
            maskable[answer : len(ids)] = random_spans(len(ids) - answer, noise)
        return Row(tokens, maskable)

    def _clean_share(self, step: int) -> float:
        """Share of rows whose request stays clean: from 0 to 1 over the first `ramp` of the steps."""
        ramp = self.settings.ramp * self.steps
        return min(1.0, step / ramp) if ramp else 1.0

    def _examples(self, step: int) -> np.ndarray[Any, Any]:
        """The examples of the step's rows, (batch,)."""
        group = _GROUPED if self.settings.padding == "flexible" else 1
        dealt: np.ndarray[Any, Any] = self._dealt(step // group)[step % group]
        return dealt

    def _deal(self, group: int) -> np.ndarray[Any, Any]:
        """Examples of a group of steps, (steps of the group, batch)."""
        settings = self.settings
        steps = _GROUPED if settings.padding == "flexible" else 1
        first = group * steps * settings.batch
        positions = range(first, first + steps * settings.batch)
        drawn = [epoch_index(p, len(self.fitting), (settings.seed, _ORDER)) for p in positions]
        examples = self.fitting[drawn]
        if settings.padding == "flexible":
            examples = examples[np.argsort(self.store.lengths[examples], kind="stable")]
        order = torch.randperm(steps, generator=keyed_generator(settings.seed, group, _GROUP)).numpy()
        dealt: np.ndarray[Any, Any] = examples.reshape(steps, settings.batch)[order]
        return dealt


def sft(settings: SftSettings) -> Path:
    """Run the stage, or go on with it, and return the folder of the tuned model."""
    denoiser, tokenizer = load_start(settings)
    tokenizer = tokenizer.with_own_pad()
    grow_vocabulary(denoiser.model, tokenizer.vocab_size)
    denoiser.config.pad_token_id = tokenizer.pad_id
    check_length(denoiser, "length", settings.length)
    store = prepare(settings.data, tokenizer, settings.cache, kind="chat")
    rows = ChatRows(store, settings, pad_id=tokenizer.pad_id)
    _tell_left_out(rows, "data")
    settings = settings.model_copy(update={"steps": rows.steps})
    held_out = None
    if settings.held_out:
        found = prepare(settings.held_out, tokenizer, settings.cache, kind="chat")
        held_out = ChatRows(found, settings, pad_id=tokenizer.pad_id)
        _tell_left_out(held_out, "held_out")
    stage = MaskedStage(objective(settings, tokenizer), rows, held_out, settings.held_out_rows, settings.held_out_at)
    return train_and_export(denoiser, tokenizer, stage, settings)


def _tell_left_out(rows: ChatRows, setting: str) -> None:
    """One line on the examples that are too long, from the first process."""
    lengths, limit = rows.store.lengths, rows.settings.length
    left_out = len(lengths) - len(rows.fitting)
    if left_out and first_process():
        first = int(np.argmax(lengths > limit))
        said = f"left out {left_out:,} of {len(lengths):,} examples of {setting}, which are longer than length={limit}"
        message = f"{said}; the first is number {first + 1}, with {lengths[first]:,} tokens"
        Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
