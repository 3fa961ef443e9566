"""JSON Schema: every answer is valid, whatever the model, its settings and its batch."""

import json
import os
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from diffucoder import DecodingParams, Denoiser, DiffuCoder
from diffucoder.decoding.schema import schema_request
from diffucoder.errors import ConfigError, PromptError
from diffucoder.tokenizer import Tokenizer

ASK = "Describe the function that doubles each number."


EXAMPLES = int(os.environ.get("EXAMPLES", "150"))  # schemas to draw


@pytest.fixture(scope="module")
def coder(causal_lm: Callable[..., Any], tokenizer: Tokenizer) -> DiffuCoder:
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    model = Denoiser.from_causal_lm(
        causal_lm(vocab_size=520, max_position_embeddings=512, **ids), mask_id=tokenizer.mask_id
    )
    return DiffuCoder(model, tokenizer, name="random")


NAMES = st.text('abcdef_ é"\\', min_size=1, max_size=6)
ENUMS = st.lists(
    st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.floats(-9, 9), st.text(max_size=6), st.just([1, "a"])),
    min_size=1,
    max_size=4,
)
LENGTHS = st.tuples(st.integers(0, 3), st.integers(0, 3))
RANGES = st.tuples(st.integers(-9, 9), st.integers(0, 30))
LEAVES = st.one_of(
    st.sampled_from(["string", "integer", "number", "boolean", "null"]).map(lambda kind: {"type": kind}),
    ENUMS.map(lambda values: {"enum": values}),
    LENGTHS.map(lambda pair: {"type": "string", "minLength": pair[0], "maxLength": sum(pair)}),
    RANGES.map(lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}),
    st.just({"type": "integer", "minimum": 0}),
    st.just({"type": ["string", "null"]}),
)


def larger(part: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.dictionaries(NAMES, part, min_size=1, max_size=3).map(
        lambda parts: {"type": "object", "properties": parts, "required": sorted(parts), "additionalProperties": False}
    )
    arrays = st.tuples(part, LENGTHS).map(
        lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1][0], "maxItems": sum(pair[1])}
    )
    return st.one_of(objects, arrays, st.lists(part, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts}))


SCHEMAS = st.dictionaries(NAMES, st.recursive(LEAVES, larger, max_leaves=3), min_size=1, max_size=3).map(
    lambda parts: {"type": "object", "properties": {"always": {"type": "integer"}, **parts}, "required": ["always"]}
)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    schema=SCHEMAS, temperature=st.sampled_from([0.0, 1.0]), steps=st.sampled_from([1, 4, 16]), seed=st.integers(0, 99)
)
def test_every_answer_is_valid(
    coder: DiffuCoder, schema: dict[str, Any], temperature: float, steps: int, seed: int
) -> None:
    params = DecodingParams(new_tokens=400, temperature=temperature, steps=steps, seed=seed)
    try:
        result = coder.fill_schema("f", schema, params, chat=False)
    except PromptError as error:  # a limit that docs/decoding.md names
        assume("has a pattern of over" not in str(error))
        raise
    jsonschema_rs.validate(schema, json.loads(result.text))


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["map", "filter", "fold"]},
        "arguments": {"$ref": "#/$defs/count"},
        "pure": {"type": "boolean"},
    },
    "$defs": {"count": {"type": "integer", "minimum": 0, "title": "Count"}},
}


def test_keys_are_fixed_and_text_is_compact(coder: DiffuCoder) -> None:
    result = coder.fill_schema(ASK, PERSON, new_tokens=100, temperature=1.0)
    name, kind, count, pure = result.pieces
    assert result.text == f'{{"name":{name},"kind":{kind},"arguments":{count},"pure":{pure}}}'
    assert [json.loads(kind) in ("map", "filter", "fold"), json.loads(count) >= 0] == [True, True]
    assert result.finish_reason == "stop"


def test_rows_equal_themselves_alone_beside_other_requests(coder: DiffuCoder) -> None:
    params = DecodingParams(new_tokens=80, steps=12, temperature=1.0, num_samples=2, seed=3)
    bound = schema_request(coder, coder.request(ASK, params), PERSON)
    other = schema_request(coder, coder.request("g", params), {"type": "array", "items": {"type": "number"}})
    free = coder.request("Reverse it.", params)
    together = coder.run([bound, free, other])
    for request, results in zip([bound, free, other], together, strict=True):
        [alone] = coder.run([request])
        assert [result.trace for result in results] == [result.trace for result in alone]
    assert together[0][0].text != together[0][1].text


@pytest.mark.parametrize("setting", [{"revoke": 0.5}, {"block": 8}, {"policy": "random"}, {"top_p": 0.3}, {"top_k": 1}])
def test_settings_of_decoding_leave_answers_valid(coder: DiffuCoder, setting: dict[str, Any]) -> None:
    result = coder.fill_schema(ASK, PERSON, new_tokens=80, steps=10, temperature=0.8, **setting)
    jsonschema_rs.validate(PERSON, json.loads(result.text))


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"type": "string", "pattern": "a+"}, "'pattern'"),
        ({"type": "object", "properties": {"a": {"type": "string", "format": "date"}}}, "the schema.a has"),
        ({"oneOf": []}, "give object, array"),
        ({"type": "integer", "minimum": 5}, "minimum 5"),
        ({"type": "array"}, "without items"),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 10**9}, "maxItems"),
        ({"type": "object", "required": ["b"]}, "requires 'b'"),
        ({"$ref": "#"}, "refers to itself"),
        ({"$ref": "#/$defs/no"}, "is not found"),
        ({"enum": [float("nan")]}, "finite"),
        ({"enum": []}, "at least one"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "smaller minimum"),
        ({"type": "string", "minLength": 40}, "takes at least"),
        ({"const": 1}, "one valid answer"),
        ({"type": []}, "no choices"),
        ({"type": "array", "items": {"type": "string", "maxLength": 100}, "maxItems": 100}, "a pattern of over"),
    ],
)
def test_what_is_not_supported_is_an_error_with_its_place(coder: DiffuCoder, schema: Any, part: str) -> None:
    with pytest.raises(PromptError, match=part.replace("+", ".")):
        coder.fill_schema(ASK, schema, new_tokens=3)


def test_settings_that_cut_json_are_errors(coder: DiffuCoder) -> None:
    for setting in ({"stop": ("}",)}, {"preset": "reference"}):
        with pytest.raises(ConfigError, match="cut JSON"):
            coder.fill_schema(ASK, PERSON, DecodingParams().replace(**setting))
