"""Settings by name, prompts of the wrong kind, and how results look in a session and a notebook."""

import re

import pytest
import torch

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.decoding.coder import Span
from diffucoder.errors import ConfigError, PromptError
from diffucoder.ramp import ramp

ASK = "Given a number, double the number."


@pytest.fixture(scope="module")
def tiny() -> DiffuCoder:
    return DiffuCoder.load(dtype=torch.float32)


def test_settings_by_name_are_those_of_params(tiny: DiffuCoder) -> None:
    params = DecodingParams(steps=4, new_tokens=16, temperature=0.5, seed=3)
    named = {"steps": 4, "new_tokens": 16, "temperature": 0.5, "seed": 3}
    assert tiny.generate(ASK, **named).trace == tiny.generate(ASK, params).trace
    assert tiny.generate_batch([ASK], **named)[0].trace == tiny.generate(ASK, params).trace
    streamed = list(tiny.stream(ASK, **named))[-1].canvas
    assert torch.equal(streamed, list(tiny.stream(ASK, params))[-1].canvas)
    assert tiny.fill("x = <|hole:4|>\n", steps=2).trace == tiny.fill("x = <|hole:4|>\n", DecodingParams(steps=2)).trace
    infilled = tiny.infill("x = ", "\n", length=4, steps=2)
    assert infilled.trace == tiny.infill("x = ", "\n", length=4, params=DecodingParams(steps=2)).trace
    edited = tiny.edit("x = 1\n", [Span(4, 5, 2)], steps=2)
    assert edited.trace == tiny.edit("x = 1\n", [Span(4, 5, 2)], DecodingParams(steps=2)).trace


def test_names_go_over_the_params_that_are_given(tiny: DiffuCoder) -> None:
    result = tiny.generate(ASK, DecodingParams(steps=4, seed=9), new_tokens=8, steps=2)
    assert (result.trace.params["steps"], result.trace.params["new_tokens"], result.seed) == (2, 8, 9)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda coder: coder.generate(ASK, stepz=8), ConfigError, "unknown setting 'stepz'; did you mean 'steps'?"),
        (lambda coder: coder.fill("x = <|hole|>", temprature=1), ConfigError, "did you mean 'temperature'?"),
        (lambda coder: coder.infill("x", "y", lenght=1), ConfigError, "unknown setting 'lenght'"),
        (lambda coder: coder.edit("x", [], step=1), ConfigError, "did you mean 'steps'?"),
        (lambda coder: coder.generate_batch([ASK], step=1), ConfigError, "did you mean 'steps'?"),
        (lambda coder: list(coder.stream(ASK, step=1)), ConfigError, "did you mean 'steps'?"),
        (lambda coder: coder.generate(ASK, steps=0), ConfigError, "steps=0: input should be greater"),
        (lambda coder: coder.generate(ASK, {"steps": 8}), ConfigError, "is not DecodingParams; give settings by name"),
        (lambda coder: coder.generate(ASK, 8), ConfigError, "params=8 is not DecodingParams"),
        (
            lambda coder: coder.generate(["a", "b"]),
            PromptError,
            "2 texts are given in place of one; use generate_batch",
        ),
        (lambda coder: coder.generate(("a",)), PromptError, "use generate_batch"),
        (lambda coder: coder.generate(5), PromptError, "prompt 5 is not a text; give a text, or the messages"),
        (lambda coder: coder.generate(None), PromptError, "prompt None is not a text"),
        (lambda coder: coder.generate_batch("a"), PromptError, "takes a list of requests, and got one text"),
        (lambda coder: coder.generate_batch([["a"]]), PromptError, "use generate_batch"),
    ],
)
def test_what_is_wrong_is_one_line(tiny: DiffuCoder, ask: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as raised:
        ask(tiny)  # type: ignore[operator]
    assert "\n" not in str(raised.value)


def test_results_and_models_are_one_short_line(tiny: DiffuCoder) -> None:
    shown = repr(tiny.generate(ASK))
    assert shown == "<Generation 'def solve(n):\\n    return n * 2\\n': 11 tokens in 64 passes, stop>"
    assert len(repr(tiny.generate(ASK, steps=1, new_tokens=100))) < 140
    assert repr(tiny) == "<DiffuCoder tiny: 4.2M parameters, float32 on cpu, context 512>"


def test_a_notebook_shows_the_text_coloured_by_step(tiny: DiffuCoder) -> None:
    result = tiny.generate(ASK, steps=8)
    page = result._repr_html_()
    assert page is not None
    assert re.sub(r"<[^>]+>", "", page).rstrip() == result.text.rstrip()
    colours = re.findall(r'title="step (\d+)" style="background: (#\w{6})73"', page)
    assert ("1", ramp(0)) in colours
    assert len({colour for _, colour in colours}) > 1


def test_a_notebook_shows_markup_as_text(tiny: DiffuCoder) -> None:
    page = tiny.fill("x = '<b>'\ny = <|hole:1|>\nz = '<script>'\n")._repr_html_()
    assert page is not None
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
