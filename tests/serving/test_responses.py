"""The JSON of answers, made from results that are given."""

from types import SimpleNamespace
from typing import Any

import pytest

from diffucoder.decoding.requests import Generation
from diffucoder.decoding.trace import Trace
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.serving.protocol import ChatRequest, CompletionRequest, InfillRequest
from diffucoder.serving.responses import ChatAnswer, CompletionAnswer, fit_into_context

TEXT = "x = 'é日'"


@pytest.fixture(scope="module")
def coder() -> Any:  # a stand-in, since no model is needed
    return SimpleNamespace(tokenizer=load_tokenizer(), name="tiny", model=SimpleNamespace(max_length=60))


@pytest.fixture
def result(coder: Any) -> Any:
    """An answer with characters of two and three tokens, and a special token that its text leaves out."""
    ids = coder.tokenizer.encode("x = 'é<|im_start|>日'", special=True)
    trace = Trace(tokens=[], prompt_length=0, steps=[], confidence=[], log_probs=[-0.5] * len(ids), forward_passes=0)
    text = coder.tokenizer.decode(ids)
    return Generation(
        index=0,
        text=text,
        pieces=(text,),
        tokens=tuple(ids),
        forward_passes=0,
        seconds=0.0,
        finish_reason="length",
        trace=trace,
    )


def test_bytes_of_tokens_are_together_those_of_the_text(coder: Any, result: Any) -> None:
    body = ChatRequest(messages=[{"role": "user", "content": "x"}], logprobs=True)
    choice = ChatAnswer(coder, None, body).choice(result)  # type: ignore[arg-type]  # a choice needs no request
    entries = choice["logprobs"]["content"]
    assert choice["message"]["content"] == TEXT
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == TEXT
    assert "".join(entry["token"] for entry in entries) == TEXT.replace("é", "é<|im_start|>")
    assert [entry["bytes"] for entry in entries[4:6]] == [[0xC3], [0xA9]]


def test_offsets_are_into_the_text(coder: Any, result: Any) -> None:
    body = CompletionRequest(prompt="日", logprobs=1, echo=True)
    request: Any = SimpleNamespace(params=SimpleNamespace(num_samples=1))
    choice = CompletionAnswer(coder, request, body).choice(result)
    columns = choice["logprobs"]
    assert choice["text"] == f"日{TEXT}"
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        if token != "<|im_start|>":
            assert choice["text"][offset : offset + len(token)] == token
    assert "\ufffd" not in "".join(columns["tokens"])


@pytest.mark.parametrize("cut", range(3))
def test_context_is_cut_between_characters(coder: Any, cut: int) -> None:
    prefix = "日" * 50 + "x" * cut
    body = InfillRequest(input_prefix=prefix, input_suffix="y" * cut + "日" * 50)
    before, after = fit_into_context(coder, body)
    assert 0 < len(before) < len(prefix)
    assert prefix.endswith(before)
    assert body.input_suffix.startswith(after)
