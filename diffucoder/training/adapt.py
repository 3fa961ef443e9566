"""Stages 1 and 2: an autoregressive parent becomes a masked-diffusion model, then trains on cleaner code.

DiffuCoder, section 3 and appendix B.1, by the method of DiffuLLaMA (arXiv 2410.17891): packed documents are noised, and
the attention mask opens from causal to full over the first steps. A few rows are cut to a random length or keep a
random prefix clean. Attention crosses the borders of packed documents; the paper does not say.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from diffucoder.diffusion import keyed_generator, random_spans
from diffucoder.models.denoiser import Denoiser
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.data import TokenStore, epoch_index, prepare
from diffucoder.training.masked import HELD_OUT, MaskedStage, Row
from diffucoder.training.run import check_length, load_start, masked_stage, train_and_export
from diffucoder.training.settings import AdaptSettings, PretrainSettings

_ORDER, _SHAPE = 10, 11  # the last number of a key of noise: what is drawn


@dataclass
class PackedRows:
    """Rows of consecutive tokens of the packed documents (`masked.Rows`). The last three fields are shares of them."""

    store: TokenStore
    context: int
    batch: int
    seed: int
    random_length: float = 0.0
    clean_prefix: float = 0.0
    infill: float = 0.0

    def __post_init__(self) -> None:
        self.count = self.store.windows(self.context)

    def width(self, step: int) -> int:
        return self.context

    def row(self, step: int, index: int) -> Row:
        """A row is plain, or by its shares cut short, or has a clean prefix, or is noised in random spans only."""
        if step == HELD_OUT:
            window = index % self.count
        else:
            window = epoch_index(step * self.batch + index, self.count, (self.seed, _ORDER))
        tokens = torch.from_numpy(self.store.window(window, self.context))
        maskable = torch.ones(len(tokens), dtype=torch.bool)
        noise = keyed_generator(self.seed, step, index, _SHAPE)
        u = float(torch.rand((), generator=noise))
        at = int(torch.randint(2, self.context + 1, (), generator=noise))
        if u < self.random_length:
            return Row(tokens[:at], maskable[:at])
        if u < self.random_length + self.clean_prefix:
            maskable[:at] = False
        elif u < self.random_length + self.clean_prefix + self.infill:
            maskable = random_spans(self.context, noise)
        return Row(tokens, maskable)


def packed_stage(
    settings: AdaptSettings | PretrainSettings, denoiser: Denoiser, tokenizer: Tokenizer, **shares: float
) -> MaskedStage:
    """A stage over packed rows of `data`, with the given shares, and plain rows of `held_out`."""
    check_length(denoiser, "context", settings.context)
    denoiser.trained_length = settings.context

    def rows_of(sources: tuple[str, ...], **shares: float) -> PackedRows:
        store = prepare(sources, tokenizer, settings.cache, kind="documents")
        return PackedRows(store, settings.context, settings.batch, settings.seed, **shares)

    rows = rows_of(settings.data, **shares)
    held_out = rows_of(settings.held_out) if settings.held_out else None
    return masked_stage(settings, denoiser, tokenizer, rows, held_out)


def adapt(settings: AdaptSettings) -> Path:
    """Run the stage, or resume it, and return the folder of the adapted model."""
    denoiser, tokenizer = load_start(settings)
    shares = settings.model_dump(include={"random_length", "clean_prefix", "infill"})
    stage = packed_stage(settings, denoiser, tokenizer, **shares)
    return train_and_export(denoiser, tokenizer, stage, settings)
