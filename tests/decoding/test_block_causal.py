"""Block-causal models: what a pass is fed and shows, an exact cache, and rows that do not depend on their batch.

The models are random, of two layers, in float64, so that equal computations give equal choices.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.step import Sequence, Step, advance, decode, denoise
from diffucoder.errors import ConfigError, PromptError
from diffucoder.models.attention import FULL, Attention, Origin
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer
from diffucoder.models.denoiser import Denoiser
from diffucoder.serving.engine import Engine
from diffucoder.serving.settings import EngineSettings

MakeLM = Callable[..., Any]
MASK = 66
SHAPES = [(4, "start", False), (4, "start", True), (3, "prompt", True), (5, "prompt", False)]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def model(request: pytest.FixtureRequest, causal_lm: MakeLM) -> Denoiser:
    """By the fast layers."""
    block, origin, shifted = request.param
    made = Denoiser.from_causal_lm(
        causal_lm("qwen3"), mask_id=MASK, shifted=shifted, attention=Attention(block, origin)
    ).double()
    made.use_fast_layers()
    return made


def canvas_of(rows: list[list[int]], *, new_tokens: int) -> Canvas:
    longest = max(map(len, rows))
    return Canvas.from_prompts(
        torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        valid=torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows]),
        new_tokens=new_tokens,
        mask_id=MASK,
    )


def run(model: Denoiser, canvas: Canvas, **params: Any) -> list[Step]:
    return list(denoise(model, canvas, DecodingParams(**params)))


def assert_same_steps(one: list[Step], other: list[Step]) -> None:
    assert len(one) == len(other)
    for mine, its in zip(one, other, strict=True):
        assert torch.equal(mine.canvas, its.canvas)
        torch.testing.assert_close(mine.log_prob, its.log_prob, rtol=0, atol=1e-5)


def by_definition(model: Denoiser, prompt: list[int], new_tokens: int) -> list[int]:
    """The text that one token a step gives, least entropy first: from whole canvases, computed by transformers."""
    size = model.attention.block
    assert size is not None
    origin = 0 if model.attention.origin == "start" else len(prompt)
    row = prompt + [MASK] * new_tokens
    while MASK in row:
        first = row.index(MASK)
        start = origin + (first - origin) // size * size
        end = min(start + size, len(row))
        shown = torch.tensor([row[:end]])  # nothing after the block
        logits = model(shown, prompt_ends=torch.tensor([len(prompt)]))[0]  # (T, V)
        logits[:, MASK] = -torch.inf
        best = min(
            (position for position in range(start, end) if row[position] == MASK),
            key=lambda position: float(torch.distributions.Categorical(logits=logits[position]).entropy()),
        )
        row[best] = int(logits[best].argmax())
    return row


prompts = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@settings(max_examples=15, deadline=None)
@given(prompt=prompts, new_tokens=st.integers(1, 11))
@torch.no_grad()
def test_the_text_is_that_of_the_definition(model: Denoiser, prompt: list[int], new_tokens: int) -> None:
    expected = by_definition(model, prompt, new_tokens)
    for cache in ("none", "delayed"):
        *_, last = run(model, canvas_of([prompt], new_tokens=new_tokens), cache=cache)
        assert last.canvas[0].tolist() == expected


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(prompts, min_size=1, max_size=4),
    new_tokens=st.integers(1, 14),
    more=st.sampled_from(
        [{}, {"steps": 4}, {"threshold": 0.05}, {"temperature": 1.0}, {"block": 2}, {"revoke": 0.6, "steps": 5}]
    ),
)
def test_a_cache_changes_nothing_and_neither_does_the_batch(
    model: Denoiser, rows: list[list[int]], new_tokens: int, more: dict[str, Any]
) -> None:
    canvas = canvas_of(rows, new_tokens=new_tokens)
    uncached = run(model, canvas, **more)
    assert_same_steps(run(model, canvas, cache="delayed", **more), uncached)
    for row, prompt in enumerate(rows):
        alone = run(model, canvas_of([prompt], new_tokens=new_tokens), cache="delayed", **more)
        assert torch.equal(alone[-1].canvas[0], uncached[-1].canvas[row, -len(prompt) - new_tokens :])


def test_rows_that_join_later_share_passes_with_those_at_work(model: Denoiser) -> None:
    canvases = [canvas_of([list(range(1, length))], new_tokens=9) for length in (3, 8, 6)]
    params = DecodingParams(cache="prefix", block=2)
    alone = [run(model, canvas, cache="prefix", block=2)[-1].canvas[0].tolist() for canvas in canvases]
    canvases = [canvas_of([list(range(1, length))], new_tokens=9) for length in (3, 8, 6)]
    sequences = [Sequence(_with(canvas, model), params) for canvas in canvases]
    for going in range(1, 4):
        for _ in range(2):
            advance(model, sequences[:going])
    for _ in decode(model, sequences):
        pass
    assert [sequence.tokens.tolist() for sequence in sequences] == alone
    assert model.cache.in_use == 0


def _with(canvas: Canvas, model: Denoiser) -> Canvas:
    return Canvas(
        tokens=canvas.tokens,
        valid=canvas.valid,
        sample=canvas.sample,
        mask_id=canvas.mask_id,
        attention=model.attention,
    )


def test_a_cached_pass_is_fed_the_block_and_what_was_just_finished(model: Denoiser) -> None:
    size = model.attention.block
    assert size is not None
    canvas = _with(canvas_of([[1, 2, 3]], new_tokens=4 * size), model)
    sequence = Sequence(canvas, DecodingParams(cache="delayed"))
    fed = []
    while sequence.finish_reason is None:
        _, end = sequence.model_block()
        feed = sequence.cache_plan.feed(sequence, model)
        assert not feed[end:].any()
        fed.append(int(feed.sum()))
        advance(model, [sequence])
    assert max(fed[1:]) <= 2 * size + 1
    assert fed[-1] <= size + 1


@torch.no_grad()
def test_a_later_block_changes_no_earlier_logit(model: Denoiser) -> None:
    tokens = torch.randint(1, 60, (2, 17))
    changed = tokens.clone()
    size = model.attention.block
    assert size is not None
    prompt_ends = torch.tensor([5, 5])
    start = (0 if model.attention.origin == "start" else 5) + 2 * size
    changed[:, start:] = 61 - changed[:, start:]
    before, after = (model(ids, prompt_ends=prompt_ends) for ids in (tokens, changed))
    kept = start + model.first_scorable  # of a shifted model, the first token of a block is scored from the one before
    assert torch.equal(before[:, :kept], after[:, :kept])
    assert not torch.equal(before[:, kept:], after[:, kept:])


def test_the_plain_layers_give_the_same_text(model: Denoiser) -> None:
    canvas = canvas_of([[1, 2, 3, 4, 5], [7]], new_tokens=10)
    fast = run(model, canvas)
    layers, model.fast = model.fast, None
    try:
        assert_same_steps(run(model, canvas), fast)
    finally:
        model.fast = layers


def test_nothing_is_taken_back_from_a_finished_block(model: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "attention", Attention(8, model.attention.origin))
    canvas = _with(canvas_of([[1, 2, 3]], new_tokens=24), model)
    taken_back = 0
    for seed in range(20):
        sequence = Sequence(canvas, DecodingParams(revoke=0.9, steps=10, temperature=2.0, seed=seed))
        while sequence.finish_reason is None:
            start, _ = sequence.model_block()
            [step] = advance(model, [sequence])
            assert step.revoked is not None
            assert not step.revoked[0, :start].any()
            taken_back += int(step.revoked.sum())
    assert taken_back


def test_the_released_sampler_is_rejected(model: Denoiser) -> None:
    with pytest.raises(ConfigError, match=r"^preset='reference' is Dream's sampler, .*use preset='exact'$"):
        run(model, canvas_of([[1]], new_tokens=4), preset="reference", steps=4)


# --- text and server -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["start", "prompt"])
def coder(request: pytest.FixtureRequest) -> DiffuCoder:
    """The shipped model, as if it had been trained in blocks of 8."""
    origin: Origin = request.param
    denoiser = load_denoiser(None, dtype=torch.float32, device="cpu")
    denoiser.attention = Attention(8, origin)
    denoiser.use_fast_layers()
    return DiffuCoder(denoiser, load_tokenizer())


def test_a_hole_before_text_is_rejected_with_what_works(coder: DiffuCoder) -> None:
    for ask in (
        lambda: coder.infill("def f(x):\n    return", "\n"),
        lambda: coder.fill("x = <|hole:2|>\n"),
        lambda: coder.fill("x = <|hole:2|>\ny = <|hole:2|>"),
    ):
        with pytest.raises(PromptError, match=r"text after a hole.*blocks of 8 tokens.*continue the text before"):
            ask()
    assert coder.fill("x = <|hole:2|>").text.startswith("x = ")
    assert coder.infill("x = ", "", length=3).forward_passes == 3


def test_requests_of_the_server_get_what_they_get_alone(coder: DiffuCoder) -> None:
    params = [
        DecodingParams(new_tokens=24, cache="delayed"),
        DecodingParams(new_tokens=9, temperature=1.0, num_samples=3),
        DecodingParams(new_tokens=40, preset="fast"),
    ]
    requests = [coder.request(f"Write a function number {n}.", one) for n, one in enumerate(params)]
    alone = [[result.tokens for result in coder.run([request])[0]] for request in requests]
    engine = Engine(coder, EngineSettings())

    async def work() -> list[list[tuple[int, ...]]]:
        jobs = [engine.submit(request, watched=False) for request in requests]
        return [[result.tokens for result in await job.results()] for job in jobs]

    assert asyncio.run(asyncio.wait_for(work(), 120)) == alone
    engine.close()
    assert coder.model.cache.in_use == 0


def test_full_attention_is_the_default() -> None:
    assert Attention(None) == FULL
    assert canvas_of([[1]], new_tokens=1).attention == FULL
