"""JSON Schema → the fixed text of an answer, and a pattern for each value in it.

`slots_of` reads a schema. Braces, keys and commas of objects are fixed text. Every other value is one hole: a string
with its quotes, a number, a literal, an array, or a choice (`enum`, `anyOf`). Optional properties are written too.
A keyword that is not known here is an error, because an answer that ignores it may not be valid.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from diffucoder.decoding import regular
from diffucoder.decoding.regular import HolePattern, Pattern, characters, either, repeated, sequence, text
from diffucoder.decoding.requests import Request, SchemaRequest
from diffucoder.errors import ConfigError, PromptError
from diffucoder.tokenizer import Hole, Tokenizer

if TYPE_CHECKING:
    from diffucoder.decoding.coder import DiffuCoder

Json = Any  # a schema, or a value
LONGEST_REPEAT = 128  # characters or items that a schema may count
MOST_NODES = 500  # of a schema whose references are replaced
DEEPEST = 32  # levels of a schema
MOST_STATES = 1024  # of all automata of a schema
MOST_EXTRA = 24  # tokens of a value of any length, over those that it needs

_ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly $schema $id $comment $defs definitions".split()
)
_KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum"}),
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
_PYTHON_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}
_DIGIT = characters("0123456789")
_NATURAL = either(text("0"), sequence(characters("123456789"), repeated(_DIGIT)))
_INTEGER = either(_NATURAL, sequence(text("-"), characters("123456789"), repeated(_DIGIT)))
_NUMBER = sequence(_INTEGER, either(text(""), sequence(text("."), repeated(_DIGIT, 1))))
_LETTER = characters('"\\' + "".join(map(chr, range(32))), others=True)


class Slot(NamedTuple):
    """A value to fill in."""

    schema: str  # its schema, as JSON
    choices: tuple[str, ...]  # JSON texts, if it is one of a few


def slots_of(schema: Json) -> list[str | Slot]:
    """Return the fixed texts and the slots of the values of a schema, in order. Raises PromptError."""
    pieces: list[str | Slot] = []
    for piece in _pieces(_Inliner(schema).inlined(schema, 0), "the schema"):
        if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces


class _Inliner:
    """Replaces the references of a schema by what they refer to."""

    def __init__(self, root: Json) -> None:
        self.root = root
        self.nodes = 0

    def inlined(self, node: Json, depth: int) -> Json:
        """Return a schema without references. PromptError for one that is too large, as a recursive one is."""
        self.nodes += 1
        if depth > DEEPEST or self.nodes > MOST_NODES:
            raise PromptError(
                f"the schema has over {DEEPEST} levels or {MOST_NODES} parts, or refers to itself; use a smaller one"
            )
        if not isinstance(node, dict):
            raise PromptError(f"{str(node)[:60]} is not a schema; give an object with a type")
        if "$ref" in node:  # "#" is the whole
            siblings = {key: value for key, value in node.items() if key != "$ref"}
            return self.inlined({**self._target(node["$ref"]), **siblings}, depth + 1)
        node = {key: value for key, value in node.items() if key not in _ANNOTATIONS}
        if isinstance(node.get("properties"), dict):
            node["properties"] = {key: self.inlined(part, depth + 1) for key, part in node["properties"].items()}
        if isinstance(node.get("items"), dict):
            node["items"] = self.inlined(node["items"], depth + 1)
        if isinstance(node.get("anyOf"), list):
            node["anyOf"] = [self.inlined(part, depth + 1) for part in node["anyOf"]]
        return node

    def _target(self, reference: Json) -> dict[str, Json]:
        target = self.root
        for key in str(reference).split("/")[1:]:
            target = target.get(key) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise PromptError(f"$ref {str(reference)[:60]} is not found in the schema; refer to #/$defs/NAME")
        return target


def _pieces(schema: Json, where: str) -> Iterable[str | Slot]:
    """The pieces of a schema without references."""
    if _type_of(schema, where) == "object":
        opening = "{"
        for key, part in _properties(schema, where).items():
            yield f"{opening}{_json(key)}:"
            yield from _pieces(part, f"{where}.{key}")
            opening = ","
        if opening == "{":  # it has no properties
            yield opening
        yield "}"
        return
    pattern_of(schema, where)  # its errors come first
    choices = _choices(schema, where)
    if len(choices) == 1:
        yield choices[0]
    else:
        yield Slot(json.dumps(schema), tuple(choices))


def _type_of(schema: Json, where: str) -> str:
    """The kind of a schema: a type, enum or anyOf. Raises PromptError for what is not supported."""
    kind: Json = schema.get("type")
    known = {"type"}
    if "anyOf" in schema or isinstance(kind, list):
        kind = "anyOf"
        known = {"anyOf" if "anyOf" in schema else "type"}
    elif "enum" in schema or "const" in schema:
        kind = "enum"
        known = {"enum" if "enum" in schema else "const", "type"}
    elif kind in ("object", "array", "string", "integer", "number", "boolean", "null"):
        known |= _KEYWORDS[kind]
    else:
        raise PromptError(f"{where} has type {str(kind)[:60]!r}; give {', '.join(_KEYWORDS)}, an enum or anyOf")
    unknown = sorted(schema.keys() - known)
    if unknown:
        raise PromptError(
            f"{where} has the keyword {unknown[0][:60]!r}, which is not supported for {kind}; leave it out, and check "
            "the answer yourself"
        )
    return str(kind)


def _properties(schema: Json, where: str) -> dict[str, Json]:
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise PromptError(f"{where} has properties or required of another form; give an object and a list of names")
    for name in required:
        if not isinstance(name, str) or name not in properties:
            raise PromptError(f"{where} requires {str(name)[:60]!r}, which is not in its properties; add it there")
    return properties


def _choices(schema: Json, where: str) -> list[str]:
    """The JSON texts of an enum, a const or a literal; [] for other schemas."""
    if _type_of(schema, where) != "enum":
        return {"boolean": ["true", "false"], "null": ["null"]}.get(str(schema.get("type")), [])
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    if not isinstance(values, list):
        raise PromptError(f"{where} has an enum that is not a list; list its values")
    choices = [_json(value) for value in values if _is_of_type(value, schema.get("type"))]
    if not choices:
        raise PromptError(f"{where} has no value of type {schema.get('type')}; list at least one")
    return choices


def _is_of_type(value: Json, kind: Json) -> bool:
    if kind is None or (kind == "null" and value is None):
        return True
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    return isinstance(value, _PYTHON_TYPES.get(kind, ()))


def pattern_of(schema: Json, where: str) -> Pattern:
    """Return the pattern of the JSON texts of a value, without blanks. The schema has no references."""
    kind = _type_of(schema, where)
    if kind == "anyOf":
        parts = schema.get("anyOf")
        if parts is None:
            parts = [{"type": each} for each in schema["type"]]
        if not isinstance(parts, list) or not parts:
            raise PromptError(f"{where} has no choices; list at least one")
        return either(*(pattern_of(part, where) for part in parts))
    if choices := _choices(schema, where):
        return either(*map(text, choices))
    if kind == "object":
        return _object(schema, where)
    simple: dict[str, Callable[[Json, str], Pattern]] = {"array": _array, "string": _string, "integer": _integer}
    if kind in simple:
        return simple[kind](schema, where)
    return _NUMBER


def _object(schema: Json, where: str) -> Pattern:
    parts = [text("{")]
    for key, part in _properties(schema, where).items():
        parts += [text(f"{_json(key)}:"), pattern_of(part, f"{where}.{key}"), text(",")]
    return sequence(*parts[: max(1, len(parts) - 1)], text("}"))  # no comma after the last


def _array(schema: Json, where: str) -> Pattern:
    least = _count(schema, "minItems", where) or 0
    most = _count(schema, "maxItems", where)
    _check_order(least, most, where)
    if most == 0:
        return text("[]")
    if "items" not in schema:
        raise PromptError(f"{where} is an array without items; give the schema of an item")
    item = pattern_of(schema["items"], f"{where}[]")
    others = None if most is None else most - 1  # items after the first
    full = sequence(item, repeated(sequence(text(","), item), max(least - 1, 0), others))
    return sequence(text("["), full if least else either(text(""), full), text("]"))


def _string(schema: Json, where: str) -> Pattern:
    least = _count(schema, "minLength", where) or 0
    most = _count(schema, "maxLength", where)
    _check_order(least, most, where)
    return sequence(text('"'), repeated(_LETTER, least, most), text('"'))


def _integer(schema: Json, where: str) -> Pattern:
    least = schema.get("minimum")
    most = schema.get("maximum")
    if least is None and most is None:
        return _INTEGER
    if least == 0 and most is None:
        return _NATURAL
    if type(least) is not int or type(most) is not int or not 0 <= most - least < 1000:
        raise PromptError(
            f"{where} has minimum {str(least)[:20]} and maximum {str(most)[:20]}; give minimum 0 alone, or both of at "
            "most 1000 integers"
        )
    return either(*(text(str(value)) for value in range(least, most + 1)))


def _count(schema: Json, keyword: str, where: str) -> int | None:
    value = schema.get(keyword)
    if value is not None and (type(value) is not int or not 0 <= value <= LONGEST_REPEAT):
        raise PromptError(f"{where} has {keyword} {str(value)[:20]}; give an integer from 0 to {LONGEST_REPEAT}")
    return value


def _check_order(least: int, most: int | None, where: str) -> None:
    if most is not None and least > most:
        raise PromptError(f"{where} has at least {least} and at most {most} parts; give a smaller minimum")


def _json(value: Json) -> str:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise PromptError(f"{str(value)[:60]} has no text in JSON; use finite numbers") from None


@lru_cache(maxsize=16)
def automaton_of(schema: str, tokenizer: Tokenizer, rows: int) -> regular.TokenAutomaton:
    """Return the automaton of a value with blanks around it, for a model with `rows` ids."""
    blank = text(" ")
    pattern = sequence(repeated(blank, most=1), pattern_of(json.loads(schema), "a value"), repeated(blank))
    return regular.TokenAutomaton(regular.automaton_of(pattern), tokenizer, rows)


class Value(NamedTuple):
    """A hole for a value: its language, and its length in tokens."""

    automaton: regular.TokenAutomaton
    length: int


def fitted(pieces: list[str | Slot], tokenizer: Tokenizer, rows: int, *, most: int) -> list[str | Value]:
    """Give each slot a length, so that all takes `most` tokens at most, for a model with `rows` ids. PromptError."""
    automata: dict[int, regular.TokenAutomaton] = {}
    lengths: dict[int, int] = {}
    free: list[int] = []  # slots of any length
    needed = 0
    states = 0
    for number, piece in enumerate(pieces):
        if isinstance(piece, str):
            needed += len(tokenizer.encode(piece))
            continue
        automata[number] = automaton_of(piece.schema, tokenizer, rows)
        states += len(automata[number].final)
        if states > MOST_STATES:
            raise PromptError(f"the values have patterns of over {MOST_STATES} states; give a smaller schema")
        lengths[number] = automata[number].least_tokens()
        if piece.choices:
            lengths[number] = max(lengths[number], *(len(tokenizer.encode(choice)) for choice in piece.choices))
        else:
            free.append(number)
        needed += lengths[number]
    if needed > most:
        raise PromptError(f"the schema takes at least {needed} tokens, and new_tokens is {most}; give more")
    for left, number in zip(range(len(free), 0, -1), free, strict=True):
        extra = min((most - needed) // left, MOST_EXTRA)
        lengths[number] += extra
        needed += extra
    values: list[str | Value] = []
    for number, piece in enumerate(pieces):
        if isinstance(piece, str):
            values.append(piece)
            continue
        value = Value(automata[number], lengths[number])
        if not value.automaton.matches([None] * value.length):
            raise PromptError(f"no value of the schema has {value.length} tokens; change new_tokens (max_tokens)")
        values.append(value)
    return values


def schema_request(coder: "DiffuCoder", request: Request, schema: Mapping[str, Any]) -> Request:
    """Make the request of `fill_schema` for the prompt of a request. PromptError or ConfigError if it cannot be."""
    params = request.params
    if params.preset == "reference" or params.stop:
        raise ConfigError("the reference preset and stop strings would cut JSON; use preset='exact', and no stop")
    if coder.model.attention.block is not None:
        raise PromptError("a schema has text after its values, which this model cannot see: it writes in blocks")
    if request.result_count != params.num_samples:
        raise PromptError("a schema belongs to one prompt; send a request for each prompt")
    row: list[int] = request.canvas.tokens[0, : -params.new_tokens].tolist()
    pieces: list[str | Hole] = [""]
    sizes = [len(row)]
    patterns = []
    for piece in fitted(slots_of(schema), coder.tokenizer, coder.model.vocab_size, most=params.new_tokens):
        ids: list[int] = []
        if isinstance(piece, Value):
            patterns.append(HolePattern(len(row), piece.length, piece.automaton))
            row += [coder.model.mask_id] * piece.length
            pieces.append(Hole(piece.length))
        else:
            ids = coder.tokenizer.encode(piece)
            row += ids
            pieces.append(piece)
        sizes.append(len(ids))
    if not patterns:
        raise PromptError("the schema has one valid answer, so that nothing is left to decode; give it a value")
    special = tuple(sorted(coder.tokenizer.special_ids - {coder.model.mask_id}))
    canvas = coder.canvas_of([row], 0, forbidden=special)
    return SchemaRequest(
        canvas=canvas.repeat(params.num_samples),
        params=params,
        tokenizer=coder.tokenizer,
        model_name=coder.name,
        remark=coder.remark_of(canvas),
        pieces=pieces,
        sizes=sizes,
        lengths=(0,),
        whole=True,
        patterns=patterns,
    )
