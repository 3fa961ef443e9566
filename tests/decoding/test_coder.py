"""Text in, text out: what a request, a hole and a stop string become, on a random model with a real tokenizer.

Where a test needs a model that knows what it wants, a `Writer` stands on the same weights.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffucoder import DecodingParams, Denoiser, DiffuCoder, Generation
from diffucoder.decoding.coder import HOLE_LENGTHS, Span
from diffucoder.decoding.requests import before_stops
from diffucoder.errors import CheckpointError, ConfigError, PromptError, SandboxError
from diffucoder.grading.extract import program_from
from diffucoder.grading.grade import grade
from diffucoder.grading.sandbox import isolation
from diffucoder.models.checkpoint import save_denoiser
from diffucoder.tokenizer import PLACEHOLDER, Tokenizer

ROWS = 520  # of the model's vocabulary; the tokenizer leaves the last ones free
ASK, SHORT = "Write a function f(xs) that doubles each number.", "Reverse it."
PREFIX, SUFFIX = "def f(xs):\n    ", "\n    return result\n"


@pytest.fixture(scope="session")
def model(causal_lm: Callable[..., Any], tokenizer: Tokenizer) -> Denoiser:
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    return Denoiser.from_causal_lm(causal_lm(vocab_size=ROWS, **ids), mask_id=tokenizer.mask_id)


@pytest.fixture(scope="session")
def coder(model: Denoiser, tokenizer: Tokenizer) -> DiffuCoder:
    return DiffuCoder(model, tokenizer, name="random")


class Writer(Denoiser):
    """Wants the text it is given, from the first mask of each row on, and is surer the further left."""

    def __init__(self, model: Any, tokenizer: Tokenizer, text: str) -> None:  # Any: as Denoiser's
        super().__init__(model, mask_id=tokenizer.mask_id)
        self.wanted = torch.tensor(tokenizer.encode(text, special=True) + [tokenizer.pad_id] * 64)
        self.starts: dict[int, int] = {}

    def forward(self, tokens: Tensor, *, rows: Tensor, reduce: Any, **_: Any) -> Any:  # Any: as Denoiser's
        for row, position in rows.tolist():  # first come, leftmost
            self.starts.setdefault(row, position)
        offset = rows[:, 1] - torch.tensor([self.starts[row] for row in rows[:, 0].tolist()])
        logits = torch.nn.functional.one_hot(self.wanted[offset], self.vocab_size) * (20.0 - 0.1 * offset[:, None])
        return reduce(logits, slice(0, len(rows)))


@pytest.fixture
def writer(model: Denoiser, tokenizer: Tokenizer) -> Callable[[str], DiffuCoder]:
    return lambda text: DiffuCoder(Writer(model.model, tokenizer, text), tokenizer)


def answer(coder: DiffuCoder, result: Generation) -> list[int]:
    """What stands behind the prompt, pads and all."""
    return result.trace.tokens[result.trace.prompt_length :]


# --- generate --------------------------------------------------------------------------------------------------------


def test_the_prompt_stays_as_it_is_and_the_answer_stands_behind_it(coder: DiffuCoder) -> None:
    result = coder.generate(ASK, DecodingParams(new_tokens=12))
    prompt = coder.tokenizer.encode_chat(ASK)
    assert result.trace.tokens[: result.trace.prompt_length] == prompt
    assert len(answer(coder, result)) == 12
    assert result.text == coder.tokenizer.decode(result.tokens)
    assert result.pieces == (result.text,)
    assert (result.trace.model, result.seed) == ("random", 0)


def test_raw_text_is_continued_without_a_template(coder: DiffuCoder) -> None:
    result = coder.generate(PREFIX, DecodingParams(new_tokens=5), chat=False)
    assert result.trace.tokens[: result.trace.prompt_length] == coder.tokenizer.encode(PREFIX)


def test_a_conversation_is_answered_after_its_last_message(coder: DiffuCoder) -> None:
    talk = [
        {"role": "user", "content": ASK},
        {"role": "assistant", "content": "def f"},
        {"role": "user", "content": "?"},
    ]
    result = coder.generate(talk, DecodingParams(new_tokens=5))
    assert result.trace.tokens[: result.trace.prompt_length] == coder.tokenizer.encode_chat(talk)


@pytest.mark.parametrize(
    "params",
    [
        DecodingParams(new_tokens=10),
        DecodingParams(new_tokens=10, steps=4, policy="margin", temperature=1.0, seed=3),
        DecodingParams(new_tokens=10, policy="random", temperature=0.7, top_p=0.9),
        DecodingParams(new_tokens=10, preset="reference", steps=6, temperature=0.5),
    ],
)
def test_a_result_does_not_depend_on_who_else_is_in_the_batch(coder: DiffuCoder, params: DecodingParams) -> None:
    prompts = [ASK, SHORT, ASK + " Then sum them."]
    together = coder.generate_batch(prompts, params)
    for prompt, result in zip(prompts, together, strict=True):
        alone = coder.generate(prompt, params)
        assert (alone.tokens, alone.order, alone.text) == (result.tokens, result.order, result.text)
        assert alone.forward_passes == result.forward_passes


def test_samples_differ_and_come_out_again_by_their_seed(coder: DiffuCoder) -> None:
    params = DecodingParams(new_tokens=8, temperature=1.0, num_samples=3, seed=5)
    results = coder.generate_batch([ASK, SHORT], params)
    assert [result.trace.prompt_length for result in results] == sorted(
        (result.trace.prompt_length for result in results), reverse=True
    )  # the longer prompt's samples first, then the shorter one's
    assert len({result.tokens for result in results[:3]}) == 3
    again = coder.generate_batch([ASK, SHORT], params)
    assert [result.tokens for result in again] == [result.tokens for result in results]
    other = coder.generate_batch([ASK, SHORT], params.replace(seed=6))
    assert [result.tokens for result in other] != [result.tokens for result in results]


def test_several_samples_need_generate_batch(coder: DiffuCoder) -> None:
    with pytest.raises(ConfigError, match="num_samples=2 gives several results; use generate_batch"):
        coder.generate(ASK, DecodingParams(num_samples=2))


def test_ids_that_are_no_tokens_and_the_mask_are_never_written(coder: DiffuCoder) -> None:
    params = DecodingParams(new_tokens=40, temperature=50.0, num_samples=10)  # so hot that all ids are equal
    written = {token for result in coder.generate_batch([SHORT], params) for token in answer(coder, result)}
    assert len(written) > 100
    assert coder.tokenizer.vocab_size < coder.model.vocab_size
    assert max(written) < coder.tokenizer.vocab_size
    assert coder.model.mask_id not in written


def test_the_answer_ends_before_its_terminator(writer: Callable[[str], DiffuCoder]) -> None:
    coder = writer("return 1<|im_end|>")
    result = coder.generate(ASK, DecodingParams(new_tokens=20))
    assert (result.text, result.finish_reason) == ("return 1", "stop")
    assert list(result.tokens) == coder.tokenizer.encode("return 1")
    assert result.forward_passes == len(result.tokens) + 1  # the terminator too, and no pad behind it


def test_a_full_canvas_ends_for_its_length(writer: Callable[[str], DiffuCoder]) -> None:
    result = writer("return 1 + 2 + 3").generate(ASK, DecodingParams(new_tokens=3))
    assert (len(result.tokens), result.finish_reason) == (3, "length")


@pytest.mark.parametrize("stop", [("\ndef",), ("never", "\ndef"), ("\nd",)])
def test_a_stop_string_is_cut_off_and_saves_the_rest_of_the_work(
    writer: Callable[[str], DiffuCoder], stop: tuple[str, ...]
) -> None:
    coder = writer("return 1\ndef g(x):\n    return x\n")
    result = coder.generate(ASK, DecodingParams(new_tokens=30, stop=stop))
    assert (result.text, result.finish_reason) == ("return 1", "stop")
    assert result.forward_passes <= len(coder.tokenizer.encode("return 1\ndef g"))
    assert coder.model.mask_id not in answer(coder, result)


def test_tokens_per_forward_is_what_was_written_by_what_was_spent(coder: DiffuCoder) -> None:
    result = coder.generate(ASK, DecodingParams(new_tokens=12, steps=4))
    assert (result.forward_passes, len(result.tokens), result.finish_reason) == (4, 12, "length")
    assert result.tokens_per_forward == 3
    assert result.tokens_per_second == pytest.approx(12 / result.seconds)


def test_the_trace_tells_when_each_token_was_committed(coder: DiffuCoder) -> None:
    result = coder.generate(ASK, DecodingParams(new_tokens=12, steps=5, policy="max_prob"))
    trace = result.trace
    assert len(trace.steps) == len(trace.confidence) == len(trace.tokens) - trace.prompt_length == 12
    assert sorted(result.order) == list(range(12))
    assert [trace.steps[position] for position in result.order] == sorted(trace.steps)
    assert [trace.steps.count(step) for step in range(5)] == [3, 3, 2, 2, 2]
    assert trace.params["policy"] == "max_prob"


# --- stream ----------------------------------------------------------------------------------------------------------


def test_a_stream_shows_every_commitment_and_ends_like_generate(coder: DiffuCoder) -> None:
    params = DecodingParams(new_tokens=12, steps=6, temperature=0.8, seed=2)
    steps, result = list(coder.stream(ASK, params)), coder.generate(ASK, params)
    assert len(steps) == result.forward_passes == 6
    assert steps[-1].canvas[0].tolist() == result.trace.tokens
    assert [coder.show(step).count(PLACEHOLDER) for step in steps] == [10, 8, 6, 4, 2, 0]
    for before, after in pairwise(steps):
        kept = before.canvas != coder.model.mask_id
        assert torch.equal(before.canvas[kept], after.canvas[kept])


# --- infill and fill -------------------------------------------------------------------------------------------------


def test_an_infill_is_the_middle_alone_and_its_surroundings_stay(coder: DiffuCoder) -> None:
    result = coder.infill(PREFIX, SUFFIX, length=5)
    assert len(result.tokens) == 5
    assert result.pieces == (result.text,)
    assert result.text == coder.tokenizer.decode(result.tokens)
    prefix, suffix = coder.tokenizer.encode(PREFIX), coder.tokenizer.encode(SUFFIX)
    assert result.trace.tokens == [*prefix, *result.tokens, *suffix]


def test_a_fill_is_the_whole_text_with_its_holes_filled(coder: DiffuCoder) -> None:
    result = coder.fill(f"{PREFIX}<|hole:3|> = xs<|hole:6|>{SUFFIX}")
    first, second = result.pieces
    assert result.text == f"{PREFIX}{first} = xs{second}{SUFFIX}"
    assert [coder.tokenizer.decode(part) for part in (result.tokens[:3], result.tokens[3:])] == [first, second]
    assert len(result.tokens) == 9
    assert sum(step >= 0 for step in result.trace.steps) == 9


def test_a_fill_of_one_hole_is_the_infill_between_its_sides(coder: DiffuCoder) -> None:
    params = DecodingParams(temperature=0.9, seed=4)
    filled = coder.fill(f"{PREFIX}<|hole:4|>{SUFFIX}", params)
    assert filled.text == PREFIX + coder.infill(PREFIX, SUFFIX, length=4, params=params).text + SUFFIX


def test_a_hole_may_end_the_text(coder: DiffuCoder) -> None:
    assert coder.fill(f"{PREFIX}<|hole:4|>").text.startswith(PREFIX)
    assert len(coder.infill(PREFIX, "", length=4).tokens) == 4


def test_holes_of_open_length_share_one_and_given_lengths_are_kept(coder: DiffuCoder) -> None:
    result = coder.fill(f"{PREFIX}<|hole|> = <|hole:3|>\n    y = <|hole|>{SUFFIX}")
    shared, rest = divmod(len(result.tokens) - 3, 2)
    assert rest == 0
    assert shared in HOLE_LENGTHS
    assert len(result.pieces) == 3


def likelihood(result: Generation) -> float:
    """Mean log-probability of what was committed: under `max_prob` the confidence is the probability."""
    logs = [
        math.log(score) for score, step in zip(result.trace.confidence, result.trace.steps, strict=True) if step >= 0
    ]
    return sum(logs) / len(logs)


@pytest.mark.parametrize("suffix", [SUFFIX, "", "\n    return xs\n"])
def test_an_open_length_is_the_one_whose_tokens_are_likeliest(coder: DiffuCoder, suffix: str) -> None:
    params = DecodingParams(policy="max_prob")
    tried = [coder.infill(PREFIX, suffix, length=length, params=params) for length in HOLE_LENGTHS]
    best = max(tried, key=likelihood)
    chosen = coder.infill(PREFIX, suffix, params=params)
    assert (chosen.tokens, chosen.text) == (best.tokens, best.text)
    assert chosen.trace.forward_passes == best.trace.forward_passes


@pytest.mark.parametrize("seed", range(4))
def test_of_several_samples_a_fill_keeps_the_likeliest(coder: DiffuCoder, seed: int) -> None:
    params = DecodingParams(policy="max_prob", temperature=0.3, num_samples=4, seed=seed)
    chosen = coder.infill(PREFIX, SUFFIX, params=params)
    assert len(chosen.tokens) in HOLE_LENGTHS
    prefix, suffix = coder.tokenizer.encode(PREFIX), coder.tokenizer.encode(SUFFIX)
    assert chosen.trace.tokens == [*prefix, *chosen.tokens, *suffix]
    for length in HOLE_LENGTHS:
        first = coder.infill(PREFIX, SUFFIX, length=length, params=params.replace(num_samples=1))
        assert likelihood(chosen) >= likelihood(first) - 1e-3


@pytest.mark.parametrize("wish", ["<|im_end|>", "<|endoftext|>", "<|dlm_pad|>", "<|im_start|>", "<|mask|>"])
def test_no_special_token_stands_in_a_fill(writer: Callable[[str], DiffuCoder], wish: str) -> None:
    coder = writer(f"x{wish}" * 6)
    result = coder.fill(f"{PREFIX}<|hole:8|>{SUFFIX}")
    assert len(result.tokens) == 8
    assert coder.tokenizer.special_ids.isdisjoint(result.tokens)
    assert result.text.startswith(f"{PREFIX}x")
    assert result.text.endswith(SUFFIX)


def test_no_special_token_stands_in_a_hot_fill(coder: DiffuCoder) -> None:
    params = DecodingParams(temperature=50.0, num_samples=5)
    results = [coder.infill(PREFIX, SUFFIX, length=40, params=params.replace(seed=seed)) for seed in range(3)]
    assert all(coder.tokenizer.special_ids.isdisjoint(result.tokens) for result in results)


# --- names of tokens in a text ---


@pytest.mark.parametrize("name", ["<|mask|>", "<|im_end|>", "<|hole|>", "<|hole:3|>", "<|hole:x|>"])
def test_text_may_spell_any_token(coder: DiffuCoder, name: str) -> None:
    prefix, suffix = f"# {name}\n{PREFIX}", f"{SUFFIX}# {name}\n"
    infilled = coder.infill(prefix, suffix, length=4)
    plain = [*coder.tokenizer.encode(prefix), *infilled.tokens, *coder.tokenizer.encode(suffix)]
    assert infilled.trace.tokens == plain
    edited = coder.edit(f"{prefix}xs{suffix}", [Span(len(prefix), len(prefix) + 2, tokens=4)])
    assert edited.text == f"{prefix}{infilled.text}{suffix}"
    raw = coder.generate(prefix, DecodingParams(new_tokens=3), chat=False)
    assert raw.trace.tokens[: raw.trace.prompt_length] == coder.tokenizer.encode(prefix)
    chat = coder.generate(prefix, DecodingParams(new_tokens=3))
    assert chat.trace.tokens[: chat.trace.prompt_length] == coder.tokenizer.encode_chat(prefix)


def test_a_text_to_fill_may_spell_other_tokens(coder: DiffuCoder) -> None:
    result = coder.fill(f"{PREFIX}<|mask|> + <|hole:3|>{SUFFIX}")
    assert result.text == f"{PREFIX}<|mask|> + {result.pieces[0]}{SUFFIX}"
    assert len(result.tokens) == 3


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda coder: coder.generate(""), "the prompt is empty"),
        (lambda coder: coder.generate(" \n\t"), "the prompt is empty"),
        (lambda coder: coder.generate([]), "the prompt is empty"),
        (lambda coder: coder.generate("", chat=False), "the prompt is empty"),
        (lambda coder: coder.generate_batch([]), "no prompt is given"),
        (lambda coder: coder.generate([{"role": "user", "content": "x"}], chat=False), "leave chat=True"),
        (lambda coder: coder.generate([{"role": "robot", "content": "x"}]), "needs a text content and a role"),
        (lambda coder: coder.generate("x " * 200), "exceed the model's context of 128; shorten the prompt"),
        (lambda coder: coder.generate(ASK, DecodingParams(new_tokens=128)), "and 128 new ones exceed"),
        (lambda coder: coder.generate("half \udcff"), "is not Unicode; give it as UTF-8"),
        (lambda coder: coder.fill("x = 1"), "has no hole to fill; mark one with <|hole|>"),
        (lambda coder: coder.fill(""), "has no hole to fill"),
        (lambda coder: coder.fill("<|hole|> = 1"), "begins with a hole"),
        (lambda coder: coder.fill("x = <|hole:0|>"), "is malformed; write <|hole|>, or <|hole:12|>"),
        (lambda coder: coder.fill("x = <|hole:999|>"), "exceed the model's context"),
        (lambda coder: coder.infill("", SUFFIX), "prefix is empty"),
        (lambda coder: coder.infill(PREFIX, SUFFIX, length=0), "length=0 is not a hole; give at least 1 token"),
        (lambda coder: coder.infill(PREFIX, SUFFIX, length=-3), "length=-3 is not a hole"),
        (lambda coder: coder.edit(PREFIX, [Span(1, 3, tokens=0)]), "length=0 is not a hole"),
        (
            lambda coder: coder.request_of_ids([coder.tokenizer.mask_id], DecodingParams()),
            "has the mask's id 3; mark holes in a text with <|hole|>",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused(
    coder: DiffuCoder, ask: Callable[[DiffuCoder], Generation], message: str
) -> None:
    with pytest.raises(PromptError) as refused:
        ask(coder)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def assert_tokens_are_of_the_text(coder: DiffuCoder, tokens: tuple[int, ...], text: str) -> None:
    """The tokens give the text; the last one may hold the beginning of the stop string."""
    assert coder.tokenizer.decode(tokens).startswith(text)
    assert not tokens or not coder.tokenizer.decode(tokens[:-1]).startswith(text)


@pytest.mark.parametrize("length", [None, 8])
def test_a_stop_string_cuts_text_piece_and_tokens_of_a_hole(coder: DiffuCoder, length: int | None) -> None:
    whole = coder.infill(PREFIX, SUFFIX, length=length)
    stop = whole.text[len(whole.text) // 2]
    cut = coder.infill(PREFIX, SUFFIX, length=length, params=DecodingParams(stop=(stop,)))
    assert (cut.text, cut.finish_reason) == (whole.text.partition(stop)[0], "stop")
    assert cut.pieces == (cut.text,)
    assert cut.tokens == whole.tokens[: len(cut.tokens)] != whole.tokens
    assert_tokens_are_of_the_text(coder, cut.tokens, cut.text)
    assert cut.trace.tokens == whole.trace.tokens
    unheard = coder.infill(PREFIX, SUFFIX, length=length, params=DecodingParams(stop=("unheard",)))
    assert (unheard.finish_reason, unheard.tokens) == ("length", whole.tokens)


@pytest.mark.parametrize("cut_hole", [0, 1])
def test_a_stop_string_cuts_each_hole_of_a_text_and_the_text_goes_on_behind_it(
    coder: DiffuCoder, cut_hole: int
) -> None:
    text = f"{PREFIX}<|hole:6|> = xs<|hole:8|>{SUFFIX}"
    whole = coder.fill(text)
    stop = whole.pieces[cut_hole][3]
    cut = coder.fill(text, DecodingParams(stop=(stop,)))
    first, second = (piece.partition(stop)[0] for piece in whole.pieces)
    assert (cut.pieces, cut.text, cut.finish_reason) == (
        (first, second),
        f"{PREFIX}{first} = xs{second}{SUFFIX}",
        "stop",
    )
    assert len(cut.tokens) < len(whole.tokens) == 14


def test_tokens_end_where_the_stop_string_begins_and_the_pad_need_not_end_an_answer(
    writer: Callable[[str], DiffuCoder],
) -> None:
    coder = writer("return 1\ndef g(x):\n    return x\n")
    params = DecodingParams(new_tokens=30, stop=("1\nd",))
    request = coder.request(ASK, params)
    never = replace(request.canvas, terminators=())  # so that nothing but the stop string ends the answer
    for asked in (request, replace(request, canvas=never)):
        [[result]] = coder.run([asked])
        assert (result.text, result.finish_reason) == ("return ", "stop")
        assert_tokens_are_of_the_text(coder, result.tokens, result.text)
        assert result.tokens_per_forward == len(result.tokens) / result.forward_passes


@pytest.mark.parametrize(("most", "longest"), [(1, 1), (5, 4), (100, 24)])
def test_lengths_are_tried_up_to_a_limit(coder: DiffuCoder, most: int, longest: int) -> None:
    request = coder.infill_request(PREFIX, SUFFIX, DecodingParams(), most=most)
    assert int(request.canvas.masked.sum(1).max()) == longest


def test_a_tokenizer_that_does_not_fit_is_refused(causal_lm: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="use the tokenizer saved with the model"):
        DiffuCoder(Denoiser.from_causal_lm(causal_lm(vocab_size=ROWS), mask_id=7), tokenizer)
    with pytest.raises(CheckpointError, match="but the model only 67 rows"):
        DiffuCoder(Denoiser.from_causal_lm(causal_lm(), mask_id=tokenizer.mask_id), tokenizer)


# --- load ------------------------------------------------------------------------------------------------------------


def test_a_saved_model_writes_the_same(coder: DiffuCoder, tmp_path: Path) -> None:
    save_denoiser(coder.model, tmp_path)
    coder.tokenizer.save(tmp_path)
    loaded = DiffuCoder.load(tmp_path, dtype=torch.float32, device="cpu")
    params = DecodingParams(new_tokens=10, temperature=0.5)
    assert loaded.name == str(tmp_path)
    assert loaded.generate(ASK, params).tokens == coder.generate(ASK, params).tokens


def test_the_shipped_model_writes_a_correct_program() -> None:
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    request = "Write a function filter_numbers(nums) that keeps only the even numbers, then sums the numbers."
    result = DiffuCoder.load(dtype=torch.float32, device="cpu").generate(request)
    cases = {"[1, 2, 3, 4]": 6, "[]": 0, "[7, -2]": -2}
    tests = [f"assert filter_numbers({given}) == {wanted}" for given, wanted in cases.items()]
    verdict = grade(program_from(result.text), tests)
    assert verdict.passed, (verdict.detail, result.text)


def test_the_first_of_several_stop_strings_ends_a_text() -> None:
    assert before_stops("abc", ("c", "bc")) == before_stops("abc", ("bc", "c")) == "a"
    assert before_stops("abc", ("x",)) == "abc"
    assert before_stops("abc", ()) == "abc"
