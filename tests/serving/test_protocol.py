"""Requests as clients send them: what asks for nothing is left out, and what is wrong is named."""

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from routes import CHAT, ROUTES

from diffucoder import DiffuCoder
from diffucoder.decoding.diffs import unified_diff
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.requests import before_stops
from diffucoder.decoding.step import decode
from diffucoder.serving import protocol
from diffucoder.serving.app import create_app
from diffucoder.serving.settings import ServerSettings

Json = dict[str, Any]


@pytest.fixture(scope="module")
def coder() -> DiffuCoder:
    return DiffuCoder.load(dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def client(coder: DiffuCoder) -> Iterator[TestClient]:
    with TestClient(create_app(coder), raise_server_exceptions=False) as made:
        yield made


def answered(client: TestClient, path: str, body: Json) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, (body, answer.text)
    return answer.json()


def rejected(client: TestClient, path: str, body: Json) -> Json:
    answer = client.post(path, json=body)
    assert answer.status_code == 400, (body, answer.text)
    error: Json = answer.json()["error"]
    return error


def streamed(client: TestClient, path: str, body: Json) -> list[Json]:
    """The events of a stream."""
    answer = client.post(path, json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line and line != "data: [DONE]"]
    return [json.loads(line) for line in lines]


def alike(answer: Any) -> Any:
    """An answer without what differs from one time to the next."""
    if isinstance(answer, list):
        return [alike(each) for each in answer]
    if isinstance(answer, dict):
        return {key: alike(each) for key, each in answer.items() if key not in ("id", "created", "timings")}
    return answer


# --- what asks for nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
def test_null_is_as_if_left_out_for_every_field(client: TestClient, path: str) -> None:
    kind, body = ROUTES[path]
    optional = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
    openais = ("tools", "tool_choice", "store", "service_tier", "reasoning_effort", "audio", "prediction", "logit_bias")
    nulls = {**optional, **dict.fromkeys(openais), "nobody_knows_this": None}
    assert alike(answered(client, path, {**nulls, **body})) == alike(answered(client, path, body))


@pytest.mark.parametrize("path", ROUTES)
def test_hints_and_values_that_change_nothing_are_as_if_left_out(client: TestClient, path: str) -> None:
    _, body = ROUTES[path]
    plain = alike(answered(client, path, body))
    nothing = {field: values[-1] for field, values in protocol.OFF.items() if field not in body}
    hints = {field: {"any": ["thing", 3]} for field in protocol.HINTS}
    assert alike(answered(client, path, {**nothing, **hints, **body})) == plain
    for field, values in protocol.OFF.items():
        for value in values:
            if field not in body:
                assert alike(answered(client, path, {**body, field: value})) == plain


def test_null_within_fields_is_as_if_left_out(client: TestClient) -> None:
    text = "x = 1\n"
    span = {"start": 4, "end": 5}
    assert answered(client, "/v1/edit", {"text": text, "spans": [{**span, "tokens": None}], "instruction": None})
    extra = [{"text": "a = 1\n", "filename": None, "time": None}]
    assert answered(client, "/infill", {"input_prefix": "x =", "input_suffix": "\n", "input_extra": extra})
    asked = {"messages": CHAT, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": None}}
    assert client.post("/v1/chat/completions", json=asked).status_code == 200
    nulls = dict.fromkeys(DecodingParams.model_fields)
    assert answered(client, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, "decoding": nulls})


def test_what_would_change_the_answer_is_rejected_by_name(client: TestClient) -> None:
    for field, value in {
        "presence_penalty": 0.5,
        "min_p": 0.1,
        "top_logprobs": 3,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "response_format": {"type": "json_object"},
        "store": True,
        "modalities": ["text", "audio"],
        "logit_bias": {"5": 1},
        "reasoning_effort": "high",
    }.items():
        error = rejected(client, "/v1/chat/completions", {"messages": CHAT, field: value})
        assert error["param"] == field
        assert f"{field} is not supported here" in error["message"]


def test_zero_logprobs_are_not_no_logprobs(client: TestClient) -> None:
    body = {"prompt": "def f(x):\n    return", "max_tokens": 4}
    told = [
        answered(client, "/v1/completions", {**body, "logprobs": value})["choices"][0] for value in (0, False, None)
    ]
    assert [each["logprobs"] is not None for each in told] == [True, False, False]


# --- messages --------------------------------------------------------------------------------------------------------


def test_the_servers_own_message_can_be_sent_back(client: TestClient) -> None:
    said = answered(client, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 24})["choices"][0]["message"]
    empty: Json = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None, "reasoning": ""}
    parts = [{"type": "text", "text": said["content"], "annotations": []}]
    forms = [{"role": "assistant", "content": said["content"]}, said, {**said, **empty}]
    forms += [{**said, "tool_calls": []}, {**said, "content": parts}]
    told = []
    for message in forms:
        body = {"messages": [*CHAT, message, *CHAT], "max_tokens": 4}
        told.append(alike(answered(client, "/v1/chat/completions", body)))
    assert told == [told[0]] * len(forms)


def test_an_assistants_message_may_be_null_and_no_other(client: TestClient) -> None:
    messages = [*CHAT, {"role": "assistant", "content": None, "refusal": None}, *CHAT]
    assert answered(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    for message in ({"role": "user"}, {"role": "system", "content": None}):
        error = rejected(client, "/v1/chat/completions", {"messages": [message]})
        assert f"the {message['role']} message has no content" in error["message"]


def test_text_parts_are_their_text(client: TestClient) -> None:
    words = CHAT[0]["content"]
    hint = {"cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": words[:5], **hint}, {"type": "text", "text": words[5:]}]
    messages = [{"role": "user", "content": parts, **hint}]
    asked = [{"messages": CHAT, "max_tokens": 8}, {"messages": messages, "max_tokens": 8}]
    one, other = [answered(client, "/v1/chat/completions", body) for body in asked]
    assert alike(one) == alike(other)


# --- errors ----------------------------------------------------------------------------------------------------------


def part(**fields: Any) -> list[Json]:
    return [{"role": "user", "content": [{"type": "text", "text": "x", **fields}]}]


@pytest.mark.parametrize(
    ("path", "change", "param", "said"),
    [
        ("chat/completions", {"messages": part(text=5)}, "messages.0.content.0.text", "valid string"),
        ("chat/completions", {"messages": part(colour=1)}, "messages.0.content.0.colour", "is not supported here"),
        ("chat/completions", {"messages": part(type="audio")}, "messages.0.content.0.type", "should be 'text'"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string, or"),
        ("completions", {"stop": 5}, "stop", "valid string, or Input should be a valid list"),
        ("completions", {"stop": "x" * 1001}, "stop", "stop: String should have at most 1000 characters"),
        ("completions", {"stop": ["a", 3]}, "stop.1", "stop.1: Input should be a valid string"),
        ("completions", {"stop": ["a"] * 17}, "stop", "stop: List should have at most 16 items"),
        ("completions", {"prompt": 5}, "prompt", "valid string, or Input should be a valid list"),
        ("completions", {"prompt": ["a", 5]}, "prompt.1", "valid string"),
        ("completions", {"prompt": [3, "a"]}, "prompt.1", "valid integer"),
        ("completions", {"prompt": []}, "prompt", "at least 1 item"),
        ("completions", {"prompt": [[]]}, "prompt.0", "at least 1 item"),
        ("completions", {"prompt": None, "promt": "x"}, "promt", "promt is not supported here"),
        ("completions", {"prompt": [2**70]}, None, "is not one of 0 to"),
        ("completions", {"prompt": [-1]}, None, "is not one of 0 to"),
        ("completions", {"prompt": ["a", "b"], "suffix": "c"}, None, "a suffix belongs to one prompt of text"),
        ("completions", {"logprobs": 5}, "logprobs", "less than or equal to 1"),
    ],
    ids=str,
)
def test_an_error_names_the_rule_that_is_broken(
    client: TestClient, path: str, change: Json, param: str | None, said: str
) -> None:
    _, body = ROUTES[f"/v1/{path}"]
    error = rejected(client, f"/v1/{path}", {**body, **change})
    assert said in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("value", [2**63, 2**64, 10**30, -(2**70)], ids=["2**63", "2**64", "10**30", "-2**70"])
@pytest.mark.parametrize("path", ROUTES)
def test_integers_beyond_64_bits_are_the_clients_mistake_or_no_limit(client: TestClient, path: str, value: int) -> None:
    kind, body = ROUTES[path]
    bodies = [{**body, name: value} for name, field in kind.model_fields.items() if "int" in str(field.annotation)]
    if "decoding" in kind.model_fields:
        settings = [name for name, field in DecodingParams.model_fields.items() if "int" in str(field.annotation)]
        presets: list[Json] = [{}, {"preset": "reference"}, {"cache": "dual", "block": 4}]
        for name, preset in itertools.product(settings, presets):
            bodies.append({**body, "decoding": {**preset, name: value}})
    for each in bodies:
        assert client.post(path, json=each).status_code in (200, 400), each
    rejected(client, "/v1/edit", {"text": "abc", "spans": [{"start": 0, "end": value}]})


# --- defaults --------------------------------------------------------------------------------------------------------


def test_defaults_of_the_server_hold_where_a_request_says_nothing(coder: DiffuCoder) -> None:
    decoding = DecodingParams(stop=("return",), num_samples=2, temperature=1.0, seed=3, top_k=20, new_tokens=24)
    with TestClient(create_app(coder, ServerSettings(decoding=decoding))) as client:
        expected = [result.text for result in coder.generate_batch([CHAT], decoding)]
        for change in ({}, {"stop": None, "n": None, "seed": -1, "max_tokens": -1}):
            told = answered(client, "/v1/chat/completions", {"messages": CHAT, **change})
            assert [choice["message"]["content"] for choice in told["choices"]] == expected
        unstopped = coder.generate_batch([CHAT], decoding.replace(stop=(), num_samples=1))[0].text
        told = answered(client, "/v1/chat/completions", {"messages": CHAT, "stop": [], "n": 1})
        assert [choice["message"]["content"] for choice in told["choices"]] == [unstopped]
        for path in ("/v1/fill", "/v1/edit"):  # holes end where the text goes on
            assert len(answered(client, path, ROUTES[path][1])["choices"]) == 2
        for path in ("/infill", "/completion"):
            assert len(answered(client, path, ROUTES[path][1])) == 2


def test_what_the_server_sets_is_kept_when_a_request_chooses_fast() -> None:
    default = DecodingParams(cache="none", threshold=0.5)
    body = protocol.ChatRequest.model_validate({"messages": CHAT, "decoding": {"preset": "fast"}})
    params = body.params(default)
    assert (params.cache, params.threshold, params.entropy_bound) == ("none", 0.5, None)
    body = protocol.ChatRequest.model_validate({"messages": CHAT, "decoding": {"cache": "none"}})
    assert body.params(DecodingParams(preset="fast")).cache == "none"
    body = protocol.ChatRequest.model_validate({"messages": CHAT, "decoding": {"entropy_bound": None, "cache": None}})
    params = body.params(DecodingParams(preset="fast"))
    assert (params.cache, params.entropy_bound) == ("delayed", None)  # null is a value of the one, not of the other


# --- several prompts, and llama.cpp's routes -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_answered_as_if_sent_one_by_one(client: TestClient, stream: bool) -> None:
    prompts = ["def f(x):\n    return", "class Stack:\n    def push(self, item):\n        ", "a ="]
    ids = answered(client, "/tokenize", {"content": prompts[1]})["tokens"]
    body = {"max_tokens": 8, "n": 2, "temperature": 1.2, "seed": 5, "stop": ["\n\n"]}
    alone = [answered(client, "/v1/completions", {**body, "prompt": prompt}) for prompt in prompts]
    expected = [choice["text"] for each in alone for choice in each["choices"]]
    for asked in (prompts, [prompts[0], ids, prompts[2]]):
        if stream:
            texts = [""] * 6
            for event in streamed(client, "/v1/completions", {**body, "prompt": asked}):
                for choice in event["choices"]:
                    texts[choice["index"]] += choice["text"]
            assert texts == expected
            continue
        told = answered(client, "/v1/completions", {**body, "prompt": asked})
        assert [(choice["index"], choice["text"]) for choice in told["choices"]] == list(enumerate(expected))
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert told["usage"][count] == sum(each["usage"][count] for each in alone)


def test_prompts_times_answers_are_bounded(client: TestClient) -> None:
    error = rejected(client, "/v1/completions", {"prompt": ["a"] * 33, "n": 2})
    assert "66 rows" in error["message"]


def test_each_choice_repeats_its_own_prompt(client: TestClient) -> None:
    prompts = ["def f(x):\n", "class Stack:\n"]
    ids = [answered(client, "/tokenize", {"content": prompt})["tokens"] for prompt in prompts]
    for asked in (prompts, ids):
        told = answered(client, "/v1/completions", {"prompt": asked, "n": 2, "max_tokens": 4, "echo": True})
        starts = [choice["text"].startswith(prompt) for prompt in prompts for choice in told["choices"]]
        assert starts == [True, True, False, False, False, False, True, True]


def test_the_mask_is_not_a_token_of_a_prompt(client: TestClient, coder: DiffuCoder) -> None:
    error = rejected(client, "/v1/completions", {"prompt": [302, coder.model.mask_id]})
    assert "or is the mask" in error["message"]


def test_completion_continues_text_in_llama_cpps_form(client: TestClient) -> None:
    prompt = "def double(n):\n    return"
    expected = answered(client, "/v1/completions", {"prompt": prompt, "max_tokens": 8})["choices"][0]
    told = answered(client, "/completion", {"prompt": prompt, "n_predict": 8})
    assert told["content"] == expected["text"]
    assert told["stop_type"] == "word"
    assert told["tokens_evaluated"] == 6
    several = answered(client, "/completion", {"prompt": [prompt, "a ="], "n_predict": 8, "n_cmpl": 2})
    assert [each["content"] for each in several[:2]] == [told["content"]] * 2
    assert len(several) == 4
    assert answered(client, "/completion", {"prompt": prompt, "n_predict": 0})["content"] == ""


@pytest.mark.parametrize("path", ["/infill", "/completion"])
def test_llama_cpps_stream_has_the_text_and_then_the_figures(client: TestClient, path: str) -> None:
    _, body = ROUTES[path]
    body = {**body, "n_predict": 8, "n_cmpl": 2, "temperature": 1.0, "stop": ["("]}
    whole = answered(client, path, body)
    events = streamed(client, path, body)
    texts = [event["content"] for event in events if not event["stop"]]
    assert texts == [answer["content"] for answer in whole]
    ends = [event for event in events if event["stop"]]
    assert [{**end, "content": text} for end, text in zip(alike(ends), texts, strict=True)] == [
        {**answer, "index": index} for index, answer in enumerate(alike(whole))
    ]


# --- streams, stop strings, diffs ------------------------------------------------------------------------------------

CHANGES: list[Json] = [
    {"n": 3},
    {"n": 2, "decoding": {"block": 1}},
    {"n": 2, "decoding": {"block": 4, "threshold": 0.3}},
    {"n": 3, "decoding": {"preset": "fast"}},
    {"n": 2, "decoding": {"revoke": 0.5, "threshold": 0.3}},
    {"n": 2, "decoding": {"policy": "random", "steps": 3}},
    {"n": 2, "decoding": {"preset": "reference", "steps": 4}},
]
STOPS: list[Json] = [{}, {"stop": [" ", "\n"]}, {"stop": ["e", "re"]}]
STREAMED: list[tuple[str, Json, bool]] = [
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 12}, True),
    ("/v1/completions", {"prompt": "def f(x):\n    return", "max_tokens": 10}, True),
    ("/v1/completions", {"prompt": ["def f(x):\n    return", "a ="], "max_tokens": 10}, True),
    ("/v1/completions", {"prompt": "def f(x):\n    return", "suffix": "\n", "max_tokens": 8}, True),
    ("/v1/completions", {"prompt": "def f(x):\n    return", "suffix": "\n"}, True),
    ("/v1/fill", {"text": "def f(x):\n    <|hole:4|>\n    return <|hole:3|>\n"}, False),
    ("/v1/edit", {"text": "x = 1", "spans": [{"start": 4, "end": 5, "tokens": 3}]}, False),
    ("/v1/edit", {"text": "x = 1", "instruction": "Double the number.", "max_tokens": 12}, True),
]


def joined(events: list[Json]) -> list[Json]:
    """The choices that the events of a stream are pieces of."""
    choices: dict[int, Json] = {}
    for event in events:
        assert "error" not in event, event
        for piece in event["choices"]:
            choice = choices.setdefault(piece["index"], {"text": ""})
            choice["text"] += piece["delta"].get("content", "") if "delta" in piece else piece["text"]
            choice["finish_reason"] = piece["finish_reason"]
            choice["diff"] = piece.get("diff")
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize(("path", "body", "may_stop"), STREAMED, ids=str)
def test_a_stream_has_the_choices_of_the_whole_answer(
    client: TestClient, path: str, body: Json, may_stop: bool
) -> None:
    for change, stop in itertools.product(CHANGES, STOPS if may_stop else STOPS[:1]):
        asked = {**body, **change, **stop, "temperature": 1.3, "seed": 2}
        whole = answered(client, path, asked)
        expected = []
        for choice in whole["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            expected.append({"text": text, "finish_reason": choice["finish_reason"], "diff": choice.get("diff")})
        events = streamed(client, path, {**asked, "stream_options": {"include_usage": True}})
        assert joined(events) == expected, asked
        assert [event["usage"] for event in events if "usage" in event] == [whole["usage"]]


@pytest.mark.parametrize("stop", [["\n"], [" ", "("], ["e"], ["re", "e"], ["("]], ids=str)
@pytest.mark.parametrize("hole", [{}, {"suffix": "\n"}], ids=["end", "hole"])
def test_tokens_and_usage_are_those_of_the_text_before_a_stop_string(
    client: TestClient, coder: DiffuCoder, stop: list[str], hole: Json
) -> None:
    body = {"prompt": "def f(x):\n    return", "max_tokens": 12, "n": 6, "temperature": 1.3, "seed": 4, "logprobs": 1}
    told = answered(client, "/v1/completions", {**body, **hole, "stop": stop})
    texts = [choice["text"] for choice in told["choices"]]
    tokens = [choice["logprobs"]["tokens"] for choice in told["choices"]]
    assert told["usage"]["completion_tokens"] == sum(map(len, tokens))
    for text, pieces in zip(texts, tokens, strict=True):
        assert not any(string in text for string in stop)
        assert "".join(pieces).startswith(text)
        assert not text or len("".join(pieces[:-1])) < len(text)  # the last one has a part in it
        assert text or not pieces


def test_what_was_written_after_a_gap_is_not_in_the_answer(coder: DiffuCoder) -> None:
    """A row that a stop string ends has gaps; the tokens after them may spell another stop string, or end the text."""
    params = DecodingParams(temperature=1.3, num_samples=24, new_tokens=16, policy="random", stop=("e", "re"))
    request = coder.request("def f(x):\n    return", params, chat=False)
    sequences = request.sequences()
    for _ in decode(coder.model, sequences):
        pass
    gaps = 0
    for sequence, result in zip(sequences, request.results(sequences, 1.0), strict=True):
        written = sequence.tokens[sequence.first_hole : sequence.written_end].tolist()
        gaps += -1 in result.trace.steps
        assert list(result.tokens) == written[: len(result.tokens)]
        assert result.text == before_stops(coder.tokenizer.decode(written), params.stop)
    assert gaps


DIFFS = [
    ("a\nb", "a\nc"),
    ("a\n", "a"),
    ("a", "a\n"),
    ("", "x\n"),
    ("", "x"),
    ("x\n", ""),
    ("x", ""),
    ("a\r\nb\r\n", "a\r\nc\r\n"),
    ("a\r\nb\r\n", "a\nb\n"),
    ("a\rb\n", "a\rc\n"),
    ("a\r", "b\r"),
    ("a\x0cb\nc\n", "a\x0cd\nc\n"),
    ("a\u2028b\u2029\nq\n", "a\u2028c\nq\n"),
    ("a\x85b\x1c\x1d\n", "a\x85c\x1c\n"),
    ("\\ No newline at end of file\n-x", "\\ No newline at end of file\n+x"),
    ("--- a\n+++ b\n@@ -1 +1 @@\n", "--- c\n"),
    ("\n\n\n", "\n\n"),
    ("a \n\tb\n", "a\n\tb \n"),
    ("é\n日本", "é\n日本語"),
]


@pytest.mark.parametrize(("before", "after"), DIFFS)
def test_git_applies_a_diff(tmp_path: Path, before: str, after: str) -> None:
    (tmp_path / "after").write_bytes(before.encode())
    command = ["git", "apply", "-p0", "--whitespace=nowarn", "-"]
    diff = unified_diff(before, after).encode()
    done = subprocess.run(command, input=diff, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "after").read_bytes() == after.encode()


def test_a_text_that_stays_has_no_diff() -> None:
    assert unified_diff("a\nb", "a\nb") == ""


# --- HEAD ------------------------------------------------------------------------------------------------------------


def test_head_is_answered_wherever_get_is(client: TestClient) -> None:
    paths = [path for path, routes in client.get("/openapi.json").json()["paths"].items() if "get" in routes]
    assert {"/health", "/ready", "/metrics", "/v1/models", "/v1/models/{model}"} <= set(paths)
    for path in ["/", "/page/page.js", "/openapi.json", "/nothing", "/v1/models/none", "/v1/completions", *paths]:
        got = client.get(path.replace("{model}", "tiny"))
        head = client.head(path.replace("{model}", "tiny"))
        assert head.status_code == got.status_code
        assert head.content == b""
        assert head.headers.get("content-type") == got.headers.get("content-type")
    assert client.head("/health").status_code == 200
