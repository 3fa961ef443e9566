"""Holes whose length the model decides: exact texts of scripted models, alone and in batches, and limits that hold."""

import json
import math
from typing import Any

import pytest
import tokenizers
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.coder import HOLE_LENGTHS
from diffucoder.decoding.constraints import LostProbability
from diffucoder.decoding.requests import WindowedRequest
from diffucoder.decoding.resize import Resize
from diffucoder.decoding.step import Sequence, Step, decode, denoise
from diffucoder.errors import PromptError
from diffucoder.models.attention import FULL
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer
from diffucoder.models.denoiser import Denoiser, grow_vocabulary
from diffucoder.serving.app import create_app
from diffucoder.serving.cost import Budget
from diffucoder.serving.settings import EngineSettings, ServerSettings
from diffucoder.tokenizer import DELETE_TOKEN, EXPAND_TOKEN, Tokenizer
from diffucoder.watch import CanvasView

VOCABULARY, MASK, EXPAND, DELETE = 12, 9, 10, 11
RULE = Resize(EXPAND, DELETE, most=64)


class Wanted:
    """Looks like an unshifted Denoiser. It knows the text of each hole, and fills it from the left.

    Rows name their holes by the token before: hole n follows the token n. A position whose hole has too few places
    left says expand; the first one too many says delete.
    """

    first_scorable = 0
    attention = FULL
    mask_id = MASK
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, texts: dict[int, list[int]]) -> None:
        self.texts = texts
        self.longest = 0

    def needed_for(self, positions: Tensor) -> Tensor:
        return positions

    def scorable(self, fed: Tensor) -> Tensor:
        return fed

    def score(self, tokens: Tensor, *, valid: Tensor, wanted: Tensor, reduce: Any, **_: Any) -> Any:
        self.longest = max(self.longest, int((tokens == MASK).sum(-1).max()))
        rows = [self.proposals(row[row_valid].tolist()) for row, row_valid in zip(tokens, valid, strict=True)]
        logits = torch.zeros(len(wanted), VOCABULARY)
        for index, (row, position) in enumerate(wanted.tolist()):
            start = tokens.shape[1] - int(valid[row].sum())
            token, sure = rows[row][position - start]
            logits[index, token] = sure
        return reduce(logits, slice(0, len(wanted)))

    def proposals(self, row: list[int]) -> list[tuple[int, float]]:
        found = []
        hole, start = 0, 0
        for position, token in enumerate(row):
            if token in self.texts:
                hole, start = token, position + 1
            wanted = self.texts[hole] if hole else []
            size = 0
            while start + size < len(row) and row[start + size] not in (*self.texts, 8):
                size += 1
            offset = position - start
            proposal = EXPAND
            if size >= len(wanted):
                proposal = wanted[offset] if 0 <= offset < len(wanted) else DELETE
            found.append((proposal, 20.0 - 0.1 * position))  # the surest first: from the left
        return found


def run(model: Any, rows: list[list[int]], rule: Resize = RULE, **params: Any) -> tuple[list[Sequence], list[Step]]:
    longest = max(map(len, rows))
    canvas = Canvas(
        tokens=torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        valid=torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows]),
        sample=torch.zeros(len(rows), dtype=torch.long),
        mask_id=MASK,
        resize=rule,
    )
    sequences = [Sequence(canvas, DecodingParams(**params), row=row) for row in range(len(rows))]
    steps = [step for pairs in decode(model, sequences) for _, step in pairs]
    return sequences, steps


texts = st.lists(st.integers(3, 7), min_size=0, max_size=9)


@settings(max_examples=80, deadline=None)
@given(first=texts, second=texts, masks=st.integers(1, 5), more=st.sampled_from([{}, {"threshold": 0.9}, {"steps": 2}]))
def test_the_holes_become_what_the_model_wants_alone_and_in_a_batch(
    first: list[int], second: list[int], masks: int, more: dict[str, Any]
) -> None:
    holes = {1: first, 2: second}
    rows = [
        [8, 1, *[MASK] * masks, 8],
        [8, 8, 1, *[MASK] * masks, 8, 2, *[MASK] * 4, 8, 8],
        [2, *[MASK] * (masks + 1)],
    ]
    expected = [[8, 1, *first, 8], [8, 8, 1, *first, 8, 2, *second, 8, 8], [2, *second]]
    together, _ = run(Wanted(holes), rows, **more)
    assert [sequence.tokens.tolist() for sequence in together] == expected
    for row, text in zip(rows, expected, strict=True):
        [alone], _ = run(Wanted(holes), [row], **more)
        assert alone.tokens.tolist() == text


@settings(max_examples=60, deadline=None)
@given(most=st.integers(1, 12), masks=st.integers(1, 12), more=st.sampled_from([{}, {"threshold": 0.5}, {"steps": 1}]))
def test_no_hole_exceeds_the_limit(most: int, masks: int, more: dict[str, Any]) -> None:
    model = Wanted({1: [3] * 100})
    masks = min(masks, most)
    [sequence], steps = run(model, [[8, 1, *[MASK] * masks, 8]], Resize(EXPAND, DELETE, most), **more)
    assert model.longest <= most
    assert sequence.finish_reason is not None
    assert len(sequence.tokens) == most + 3
    assert EXPAND not in sequence.tokens
    assert len(steps) <= masks + 2 * most


class Random:
    """Proposes at random; expands and deletes as often as anything else."""

    first_scorable = 0
    attention = FULL
    mask_id = MASK
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    needed_for = scorable = staticmethod(lambda positions: positions)

    def score(self, tokens: Tensor, *, wanted: Tensor, reduce: Any, **_: Any) -> Any:
        logits = 9 * torch.rand(len(wanted), VOCABULARY, generator=self.generator)
        return reduce(logits, slice(0, len(wanted)))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    most=st.integers(4, 20),
    more=st.sampled_from([{}, {"threshold": 0.2}, {"steps": 2}, {"temperature": 1.0}, {"revoke": 0.5, "steps": 3}]),
)
def test_decoding_ends_and_leaves_the_text_around_holes_alone(seed: int, most: int, more: dict[str, Any]) -> None:
    [sequence], steps = run(Random(seed), [[8, 1, *[MASK] * 4, 8, 2]], Resize(EXPAND, DELETE, most), **more)
    tokens = sequence.tokens.tolist()
    assert tokens[:2] == [8, 1]
    assert tokens[-2:] == [8, 2]
    assert not {MASK, EXPAND, DELETE} & set(tokens)
    assert len(tokens) - 4 <= most
    assert len(steps) == sequence.forward_passes == sequence.trace().forward_passes
    assert sequence.places[[0, 1, -2, -1]].tolist() == [0, 1, 6, 7]
    trace = sequence.trace()
    assert len(trace.steps) == len(tokens) - 2
    for step in steps:
        if step.resized is not None:
            assert step.places is not None
            assert step.places.shape == step.resized.shape


def test_masks_right_of_a_deletion_go_and_tokens_stay() -> None:
    tokens = torch.tensor([8, 3, DELETE, MASK, 4, MASK, 8, MASK, EXPAND])
    holes = torch.tensor([False, True, True, True, True, True, False, True, True])
    places = RULE.places(tokens, holes, MASK)
    assert places is not None
    assert places.tolist() == [0, 1, 4, 6, 7, 8, 8]
    assert RULE.places(torch.tensor([8, 3, MASK]), torch.tensor([False, True, True]), MASK) is None


def test_a_step_count_holds_but_for_what_is_added() -> None:
    texts = {1: [3] * 12}
    _, one = run(Wanted(texts), [[8, 1, *[MASK] * 12, 8]], steps=3)
    assert len(one) == 3
    _, more = run(Wanted(texts), [[8, 1, *[MASK] * 6, 8]], steps=3)
    assert len(more) <= 3 + 3


def test_what_was_scored_moves_with_its_tokens() -> None:
    verifier = LostProbability(0.9)
    verifier._scored = torch.tensor([0.0, -1.0, -2.0, -3.0])
    verifier.move(torch.tensor([0, 2, 2, 3]))
    assert verifier._scored.tolist() == [0, -2, -2, -3]


def test_a_revoked_or_expanded_position_has_no_score_in_the_trace() -> None:
    for seed in range(20):
        more = {"revoke": 0.5, "steps": 3}
        [sequence], _ = run(Random(seed), [[8, 1, *[MASK] * 6, 8]], Resize(EXPAND, DELETE, 12), **more)
        trace = sequence.trace()
        for step, log_prob in zip(trace.steps, trace.log_probs, strict=True):
            assert step >= 0 or log_prob == 0


def test_an_emptied_hole_is_never_the_likeliest() -> None:
    [sequence], _ = run(Wanted({1: []}), [[8, 1, *[MASK] * 3, 8]])
    assert sequence.tokens.tolist() == [8, 1, 8]
    assert sequence.trace().mean_log_prob == -math.inf


def test_canvases_that_are_decoded_together_have_the_smallest_limit() -> None:
    canvases = []
    for most in (9, 5):
        tokens = torch.tensor([[8, MASK]])
        valid = torch.ones_like(tokens, dtype=torch.bool)
        resize = Resize(EXPAND, DELETE, most)
        canvases.append(Canvas(tokens=tokens, valid=valid, sample=torch.zeros(1), mask_id=MASK, resize=resize))
    assert Canvas.stacked(canvases).resize == Resize(EXPAND, DELETE, 5)
    model: Any = Random(0)
    with pytest.raises(PromptError, match=r"may change their length; decode it with DiffuCoder.run"):
        next(denoise(model, canvases[0], DecodingParams()))


def test_windows_share_the_least_limit() -> None:
    canvases = []
    for length, most in ((9, 40), (30, 7)):
        tokens = torch.tensor([[8] * length + [MASK]])
        valid, sample = torch.ones_like(tokens, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
        rule = Resize(EXPAND, DELETE, most)
        canvases.append(Canvas(tokens=tokens, valid=valid, sample=sample, mask_id=MASK, resize=rule))
    for both in (canvases, canvases[::-1]):
        stacked = Canvas.stacked(both)
        assert stacked.resize is not None
        assert stacked.resize.most == 7


def test_entropies_are_those_of_the_first_steps_or_none() -> None:
    canvas = Canvas(
        tokens=torch.tensor([[1, MASK, MASK, 8]]),
        valid=torch.ones(1, 4, dtype=torch.bool),
        sample=torch.zeros(1, dtype=torch.long),
        mask_id=MASK,
        resize=RULE,
    )
    for text, recorded in (([3, 4], True), ([3, 4, 5, 6], False)):
        sequence = Sequence(canvas, DecodingParams(), entropies=9)
        model: Any = Wanted({1: text})
        for _ in decode(model, [sequence]):
            pass
        assert bool(sequence.trace().entropies) == recorded


# --- text and server -------------------------------------------------------------------------------------------------

TEXT = "def f(x):\n    y = <|hole|>\n    return <|hole|>\n"


class Insisting(Denoiser):
    """The shipped model, which expands in its passes 1 and 3 and deletes in its pass 6."""

    passes = 0

    def score(self, tokens: Tensor, *, reduce: Any, **more: Any) -> Any:
        self.passes += 1
        insists = {1: self.vocab_size - 2, 3: self.vocab_size - 2, 6: self.vocab_size - 1}.get(self.passes % 10)

        def insisted(logits: Tensor, chunk: slice) -> Any:
            logits[:, -2:] = -50
            if insists is not None:
                logits[:, insists] = 50
            return reduce(logits, chunk)

        return super().score(tokens, reduce=insisted, **more)


@pytest.fixture
def coder() -> DiffuCoder:
    shipped = load_denoiser(None, dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer()
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in (EXPAND_TOKEN, DELETE_TOKEN)])
    grow_vocabulary(shipped.model, backend.get_vocab_size())
    model = Insisting(shipped.model, mask_id=shipped.mask_id, shifted=shipped.shifted)
    assert backend.token_to_id(EXPAND_TOKEN) == model.vocab_size - 2
    return DiffuCoder(model, Tokenizer(backend, config=tokenizer.config))


@pytest.mark.parametrize("cache", ["none", "delayed"])
def test_text_is_filled_by_holes_that_change_their_length(coder: DiffuCoder, cache: Any) -> None:
    result = coder.fill(TEXT, DecodingParams(cache=cache))
    before, between, after = TEXT.split("<|hole|>")
    assert result.text == before + result.pieces[0] + between + result.pieces[1] + after
    changes = [n for n in range(1, result.forward_passes + 1) if n % 10 in (1, 3, 6)]
    assert len(result.tokens) == result.forward_passes - len(changes)  # each other pass commits a token
    assert len(changes) >= 3
    assert coder.model.cache.in_use == 0


def test_the_live_view_follows_holes_that_change_their_length(coder: DiffuCoder) -> None:
    request = coder.fill_request(TEXT, DecodingParams())
    view = CanvasView(coder.tokenizer, request.canvas.masked[0])
    resized = 0

    def show(_: Sequence, step: Step) -> None:
        nonlocal resized
        view.update(step)
        resized += step.resized is not None

    [[result]] = coder.run([request], on_step=show)
    assert resized >= 3
    assert view.tokens == list(result.trace.tokens[result.trace.prompt_length :])
    committed = {position: step for position, step in enumerate(result.trace.steps) if step >= 0}
    assert view.step_of == committed


def test_given_lengths_are_kept(coder: DiffuCoder) -> None:
    result = coder.fill(TEXT.replace("<|hole|>", "<|hole:3|>"))
    assert len(result.tokens) == 6
    assert len(coder.fill(TEXT, DecodingParams(new_tokens=5)).tokens) <= 5


def test_holes_of_far_windows_keep_their_lengths_whichever_is_given(coder: DiffuCoder) -> None:
    lines = [f"value_{number} = {number}\n" for number in range(300)]
    for first, last in (("<|hole:3|>", "<|hole|>"), ("<|hole|>", "<|hole:3|>")):
        lines[2], lines[250] = f"v = {first}\n", f"w = {last}\n"
        request = coder.fill_request("".join(lines), DecodingParams(steps=1))
        assert isinstance(request, WindowedRequest)
        assert request.canvas.resize is None
        assert len(request.canvas.tokens) == 1 + len(HOLE_LENGTHS)


def test_a_sample_of_which_nothing_is_left_is_not_the_likeliest(
    coder: DiffuCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(coder.model, Insisting)
    coder.model.passes = 5  # the next pass deletes, the one after the next expands
    [[empty]] = coder.run([coder.fill_request("x = <|hole|>", DecodingParams())])
    [[other]] = coder.run([coder.fill_request("x = <|hole|>", DecodingParams(new_tokens=4))])
    assert other.order
    assert not empty.order
    monkeypatch.setattr(coder, "run", lambda requests: [[empty, other]])
    assert coder.fill("x = <|hole|>") is other


@pytest.mark.parametrize("more", [{"steps": 2}, {"steps": 3, "revoke": 0.5}, {"new_tokens": 1}])
@pytest.mark.parametrize("text", [TEXT, TEXT + "value = 1\n" * 200 + "w = <|hole|>"])
def test_the_estimate_holds_in_windows_too(coder: DiffuCoder, text: str, more: dict[str, Any]) -> None:
    request = coder.fill_request(text, DecodingParams(**more))
    cost = Budget(coder.model, EngineSettings()).cost_of(request)
    longest = 0

    def watch(sequence: Sequence, _: Step) -> None:
        nonlocal longest
        longest = max(longest, len(sequence.tokens))

    [[result]] = coder.run([request], on_step=watch)
    assert result.forward_passes <= cost.passes
    assert longest <= cost.positions


def test_what_is_revoked_is_estimated(coder: DiffuCoder) -> None:
    request = coder.request("Write a function.", DecodingParams(new_tokens=12, steps=3, revoke=0.5))
    [[result]] = coder.run([request])
    assert 3 < result.forward_passes <= Budget(coder.model, EngineSettings()).cost_of(request).passes


def test_a_stream_shows_each_change_of_length(coder: DiffuCoder) -> None:
    with TestClient(create_app(coder, ServerSettings())) as client:
        body = {"text": TEXT, "n": 3, "stream": True, "stream_options": {"denoise": True}}
        chunks = [json.loads(line[6:]) for line in client.post("/v1/fill", json=body).text.split("\n\n")[:-2]]
    rows: dict[int, list[str | None]] = {}
    resized = 0
    for chunk in chunks:
        change = chunk.get("denoise", {})
        if "committed" in change:
            for entry in change["committed"]:
                rows[change["row"]][entry["position"]] = entry["text"]
        if "canvas" in change:
            rows[change["row"]] = change["canvas"]
            resized += "committed" in change
    assert resized >= 6
    ends = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(ends) == 3
    for end in ends:
        assert "".join(map(str, rows[end["row"]])) == end["text"].removeprefix("def f(x):\n    y = ")
