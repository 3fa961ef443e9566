"""Training of block-causal models: one pass over two texts is as many passes over prefixes as there are blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffucoder.diffusion import View
from diffucoder.models.attention import Attention
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer, save_denoiser
from diffucoder.models.denoiser import Denoiser
from diffucoder.training.adapt import adapt
from diffucoder.training.masked import MaskedStage, Objective, Row
from diffucoder.training.objectives import CompletionBatch, token_scores
from diffucoder.training.settings import AdaptSettings

MASK = 66
MakeLM = Callable[..., Any]


@pytest.fixture(params=[(4, "start", False), (4, "start", True), (3, "prompt", True)], ids=str)
def model(request: pytest.FixtureRequest, causal_lm: MakeLM) -> Denoiser:
    block, origin, shifted = request.param
    attention = Attention(block, origin)
    return Denoiser.from_causal_lm(causal_lm("qwen3"), mask_id=MASK, shifted=shifted, attention=attention).double()


def by_prefixes(model: Denoiser, noisy: Tensor, clean: Tensor, prompt: int) -> Tensor:
    """(T, V) logits of one row (T,): each block from the clean text before it and itself, nothing after it."""
    size = model.attention.block
    assert size is not None
    origin = 0 if model.attention.origin == "start" else prompt
    parts = []
    if origin:
        parts.append(model(noisy[None, :origin], prompt_ends=torch.tensor([prompt]))[0])
    for start in range(origin, len(noisy), size):
        end = min(start + size, len(noisy))
        text = torch.cat([clean[:start], noisy[start:end]])[None]
        parts.append(model(text, prompt_ends=torch.tensor([prompt]))[0, start:])
    return torch.cat(parts)


def noised(rows: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(2, 60, (rows, length), generator=generator)
    noisy = clean.masked_fill(torch.rand(rows, length, generator=generator) < 0.6, MASK)
    noisy[:, :5] = clean[:, :5]
    return noisy, clean


@torch.no_grad()
def test_two_texts_in_one_pass_are_as_many_passes_as_blocks(model: Denoiser) -> None:
    noisy, clean = noised(3, 17)
    prompt = torch.tensor([5, 5, 5])
    together = model(noisy, clean=clean, prompt_ends=prompt)
    for row in range(3):
        torch.testing.assert_close(together[row], by_prefixes(model, noisy[row], clean[row], 5), rtol=0, atol=1e-6)


@torch.no_grad()
def test_padding_on_either_side_moves_no_block(model: Denoiser) -> None:
    noisy, clean = noised(1, 14)
    alone = model(noisy, clean=clean, prompt_ends=torch.tensor([5]))
    for left, right in ((3, 0), (0, 5), (2, 2)):
        valid = F.pad(torch.ones_like(noisy, dtype=torch.bool), (left, right))
        padded = [F.pad(text, (left, right), value=1) for text in (noisy, clean)]
        found = model(padded[0], clean=padded[1], valid=valid, prompt_ends=torch.tensor([5 + left]))
        torch.testing.assert_close(found[:, left : left + 14], alone, rtol=0, atol=1e-6)


class OneRow:
    """The same row again and again."""

    def __init__(self, tokens: Tensor, clean: int) -> None:
        self.tokens = tokens
        self.clean = clean

    def width(self, step: int) -> int:
        return len(self.tokens) + 2

    def row(self, step: int, index: int) -> Row:
        return Row(self.tokens, torch.arange(len(self.tokens)) >= self.clean)


def test_the_loss_is_that_of_the_blocks(model: Denoiser) -> None:
    tokens = noised(1, 19)[1][0]
    first = model.first_scorable
    objective = Objective(mask_id=MASK, pad_id=1, seed=0, batch=4, first_scorable=first, block_causal=True)
    stage = MaskedStage(objective, OneRow(tokens, clean=6), None, 0)
    [micro] = stage.micro_batches(0, [range(4)])
    loss = stage.loss(model, micro)
    expected = torch.zeros((), dtype=torch.float64)
    logits = [by_prefixes(model, noisy[:19], tokens, 6) for noisy in micro.noisy]
    for (row, position), target, weight in zip(micro.rows.tolist(), micro.targets, micro.weights, strict=True):
        expected += weight * F.cross_entropy(logits[row][position].float(), target)
    torch.testing.assert_close(loss.loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_a_completion_is_scored_after_what_it_was_written_after(model: Denoiser) -> None:
    tokens = noised(2, 15)[1]
    completion = torch.arange(15).expand(2, 15) >= 6
    batch = CompletionBatch(tokens, torch.ones_like(completion), completion, completion)
    masked = completion & (torch.rand(2, 15, generator=torch.Generator().manual_seed(1)) < 0.5)
    scores = token_scores(model, batch, [View(masked, masked.float())], mask_id=MASK, block_causal=True)
    for row in range(2):
        logits = by_prefixes(model, tokens[row].masked_fill(masked[row], MASK), tokens[row], 6)
        for position in range(15):
            expected = 0.0
            if masked[row, position]:
                expected = float(logits[position].log_softmax(-1)[tokens[row, position]])
            assert abs(float(scores[row, position]) - expected) < 1e-5


def test_a_stage_trains_a_block_causal_start_and_keeps_its_blocks(tmp_path: Path) -> None:
    start = load_denoiser(None, dtype=torch.float32, device="cpu")
    start.attention = Attention(8)
    save_denoiser(start, tmp_path / "start")
    load_tokenizer().save(tmp_path / "start")
    assert load_denoiser(tmp_path / "start").attention == Attention(8)
    text = "def double(n):\n    return n * 2\n\n\ndef half(n):\n    return n // 2\n"
    (tmp_path / "code.py").write_text(text * 20)
    settings = AdaptSettings(
        model=str(tmp_path / "start"),
        data=(str(tmp_path / "code.py"),),
        run=tmp_path / "run",
        steps=6,
        batch=4,
        context=48,
        lr=1e-3,
        cache=tmp_path / "cache",
        trackers=(),
    )
    folder = adapt(settings)
    trained = load_denoiser(folder)
    assert trained.attention == Attention(8)
    assert not torch.equal(next(trained.parameters()), next(start.parameters()))
