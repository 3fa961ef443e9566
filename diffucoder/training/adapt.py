"""Stages 1 and 2: an autoregressive parent becomes a masked-diffusion model, then sees cleaner code.

DiffuCoder, section 3 and appendix B.1, by the method of DiffuLLaMA (arXiv 2410.17891): packed documents, all of them
noised; the attention mask opens from causal to full over the first steps; one row in a hundred is cut to a random
length and one in a hundred keeps a random prefix clean, so that short texts and prompts are met.

Not stated by the paper, and so here: attention crosses the borders of packed documents.
"""

from pathlib import Path

import torch

from diffucoder.diffusion import keyed_generator, random_spans
from diffucoder.training.data import TokenStore, epoch_index, prepare
from diffucoder.training.masked import HELD_OUT, MaskedStage, Row
from diffucoder.training.run import check_length, load_start, objective, train_and_export
from diffucoder.training.settings import AdaptSettings

_ORDER, _SHAPE = 10, 11  # the last number of a key of noise: what is drawn


class PackedRows:
    """Rows of `context` consecutive tokens of the packed documents, in a new order every epoch (`masked.Rows`)."""

    def __init__(
        self,
        store: TokenStore,
        *,
        context: int,
        batch: int,
        seed: int,
        random_length: float = 0.0,
        clean_prefix: float = 0.0,
        infill: float = 0.0,
    ) -> None:
        """ConfigError where `store` does not fill one row."""
        self.store, self.context, self.batch, self.seed = store, context, batch, seed
        self.count = store.windows(context)
        self.shares = (random_length, clean_prefix, infill)

    def width(self, step: int) -> int:
        return self.context

    def row(self, step: int, index: int) -> Row:
        """Each row is, by its shares, cut short, begun clean, noised in spans only, or none of these."""
        if step == HELD_OUT:
            window = index % self.count
        else:
            window = epoch_index(step * self.batch + index, self.count, (self.seed, _ORDER))
        tokens = torch.from_numpy(self.store.window(window, self.context))
        maskable = torch.ones(len(tokens), dtype=torch.bool)
        noise = keyed_generator(self.seed, step, index, _SHAPE)
        short, prefixed, spans = self.shares
        u = float(torch.rand((), generator=noise))
        at = int(torch.randint(2, self.context + 1, (), generator=noise))
        if u < short:
            return Row(tokens[:at], maskable[:at])
        if u < short + prefixed:
            maskable[:at] = False
        elif u < short + prefixed + spans:
            maskable = random_spans(self.context, noise)
        return Row(tokens, maskable)


def adapt(settings: AdaptSettings) -> Path:
    """Run the stage, or go on with it, and return the folder of the adapted model."""
    denoiser, tokenizer = load_start(settings)
    check_length(denoiser, "context", settings.context)
    shape = {"context": settings.context, "batch": settings.batch, "seed": settings.seed}
    store = prepare(settings.data, tokenizer, settings.cache, kind="documents")
    rows = PackedRows(
        store,
        **shape,
        random_length=settings.random_length,
        clean_prefix=settings.clean_prefix,
        infill=settings.infill,
    )
    held_out = None
    if settings.held_out:
        held_out = PackedRows(prepare(settings.held_out, tokenizer, settings.cache, kind="documents"), **shape)
    noise = objective(settings, tokenizer, anneal_steps=settings.anneal_steps)
    stage = MaskedStage(noise, rows, held_out, settings.held_out_rows, settings.held_out_at)
    return train_and_export(denoiser, tokenizer, stage, settings)
