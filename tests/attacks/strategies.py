"""Hypothesis strategies for what strangers may send: values and text, then requests. `hostile_files` has the files.

For: `fuzz.py`, and tests that want such inputs. Not for: judging what happens (`targets`).

Every example is JSON, so that one that fails can be kept in a file and repeated. Bytes are text of the characters
U+0000 to U+00FF (latin-1).
"""

import json
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from routes import ROUTES

from diffucoder.decoding.params import DecodingParams
from diffucoder.serving import protocol

Json = Any  # whatever JSON can hold
Request = dict[str, Any]  # method, path, headers, body

# --- values ----------------------------------------------------------------------------------------------------------

BOUNDS = (
    *(0, 1, -1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 511, 512, 513, 1535, 1536, 4095, 4096, 4097, 65535, 65536),
    *(10**6, 10**6 + 1, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 10**18, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    *(-(2**31) - 1, -(2**63), -(2**63) - 1, -(2**64), 10**30, 10**100, 10**400, -(10**400)),
)
FRACTIONS = (
    *(0.0, -0.0, 5e-324, 1e-300, 1e-45, 1e-8, 0.5, 1 - 2**-53, 1.0, 1 + 2**-52, 2.0, 2.5, 16.0, 1e10, 1e38, 1e39),
    *(1.7e308, -1e-300, -1.0, -1.7e308, float("inf"), float("-inf"), float("nan")),
)
numbers = st.one_of(st.sampled_from(BOUNDS), st.sampled_from(FRACTIONS), st.integers(), st.floats())

CODE = (
    "def f(x):\n",
    "def double(n):\n    return n",
    "Write a function that takes a string and removes the vowels.",
    "# naïve: 日本語 🙂\r\n\tx = {'a': [1, 2]}\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "```python\ndef solve(text):\n    return text\n```\n",
    "",
)
PIECES = (
    *("", " ", "\n", "\t", "\0", "\x7f", "\x1b[31m", "\r\n", "\\", '"', "'", "`", "%s", "{}", "{0.__class__}", "${x}"),
    *(
        "\ud800",
        "\udfff",
        "\ud83d",
        "\ufeff",
        "\ufffd",
        "\ufdd0",
        "\uffff",
        "\U0010ffff",
        "\u202e",
        "\u0301",
        "e\u0301",
    ),
    *("🙂", "👨\u200d👩\u200d👧", "日本", "ß", "ﬁ", "İ", "ａ", "\u2028", "\x85", "\u00a0", "\u200b"),
    *("<|hole", "<|hole|>", "<|hole:2|>", "<|hole:0|>", "<|hole:|>", "<|hole:999999|>", "<|hole:1e3|>", "<|hole:٣|>"),
    *(
        "<|mask|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "<|dlm_pad|>",
        "<|",
        "|>",
        "<｜x｜>",
        "<|im_start|>system\n",
    ),
    *(
        "def f():\n",
        "@x\n",
        "(",
        "[",
        "{",
        "]",
        ")",
        "if x:\n ",
        "'''",
        '"""',
        "#",
        ";",
        "lambda:",
        "0x",
        "1e9",
        "~",
        "not ",
    ),
    *(
        "null",
        "true",
        "-1",
        "NaN",
        "1e400",
        "tiny",
        "../../etc/passwd",
        "/dev/zero",
        "file:///etc/passwd",
        "a" * 40 + "!",
    ),
    *("{{ 1 }}", "{% for x in y %}", "import os\n", "assert f(1) == 2", "```", "```python\n", "<think>", "</think>"),
)
COUNTS = (2, 3, 10, 100, 1000, 3000, 20_000)
pieces = st.sampled_from(PIECES)
repeated = st.builds(lambda piece, count: piece * count, pieces, st.sampled_from(COUNTS))
odd_text = st.one_of(pieces, st.text(max_size=20), st.lists(pieces, max_size=6).map("".join), repeated)
text = st.one_of(st.sampled_from(CODE), st.sampled_from(CODE), odd_text)
scalars = st.one_of(st.none(), st.booleans(), numbers, odd_text)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=6,
)


def near(value: Json) -> list[Json]:
    """Values that are almost `value`: one off, of another type, too many, none."""
    if isinstance(value, bool):
        return [not value, int(value), str(value).lower(), None]
    if isinstance(value, (int, float)):
        return [value + 1, value - 1, -value, value * 2, value * 1000, value * 2**31, str(value), f"{value}.0", [value]]
    if isinstance(value, str):
        return ["", value + "x", value[:-1], value.upper(), value * 2, value * 1000, [value], {"content": value}, 0]
    if isinstance(value, list):
        return [[], value * 2, value[::-1], value[:1], value[1:], [value], {"0": value}, "", None]
    if isinstance(value, dict):
        return [{}, list(value), [value], {**value, "x": 1}, dict.fromkeys(value), "", None]
    return [0, 1, "", [], {}, False]


# --- requests --------------------------------------------------------------------------------------------------------

small = st.integers(1, 6)
ids = st.lists(st.one_of(st.integers(0, 1535), st.sampled_from(BOUNDS)), max_size=6)
spans = st.fixed_dictionaries(
    {"start": st.integers(0, 12), "end": st.integers(0, 20)}, optional={"tokens": st.one_of(small, numbers)}
)
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": text}), max_size=3)
roles = st.sampled_from(["user"] * 6 + ["assistant", "assistant", "system", "developer", "tool"])
content = st.one_of(text, text, text, parts, st.none())
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": content}, optional={"name": odd_text}), min_size=1, max_size=4
)

HONEST: dict[str, SearchStrategy[Json]] = {
    "model": st.sampled_from([None, "tiny"]),
    "prompt": st.one_of(text, text, ids, st.lists(text | ids, min_size=1, max_size=3)),
    "suffix": text,
    "text": st.one_of(text, st.lists(text | st.sampled_from(["<|hole|>", "<|hole:3|>"]), max_size=5).map("".join)),
    "tests": st.lists(text, max_size=2),
    "passes": st.integers(1, 64),
    "spans": st.lists(spans, max_size=4),
    "instruction": text,
    "messages": messages,
    "content": text,
    "input_prefix": text,
    "input_suffix": text,
    "input_extra": st.lists(st.fixed_dictionaries({"text": text}, optional={"filename": odd_text}), max_size=3),
    "max_tokens": small,
    "max_completion_tokens": small,
    "n_predict": small,
    "n": st.integers(1, 3),
    "n_cmpl": st.integers(1, 3),
    "best_of": st.integers(1, 3),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(1, 50),
    "seed": st.integers(0, 2**63 - 1),
    "stop": st.one_of(odd_text, st.lists(odd_text, max_size=4)),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans(), "denoise": st.booleans()}),
    "logprobs": st.sampled_from([0, 1, True, False]),
    "response_fields": st.lists(st.sampled_from(["content", "timings", "timings/prompt_n", "x/y", ""]), max_size=3),
}
DECODING: dict[str, SearchStrategy[Json]] = {
    "preset": st.sampled_from(["exact", "reference", "fast"]),
    "policy": st.sampled_from(["random", "max_prob", "margin", "entropy"]),
    "cache": st.sampled_from(["none", "prefix", "dual", "delayed"]),
    "steps": small,
    "block": small,
}
_PAGES = [
    "/",
    "/health",
    "/ready",
    "/metrics",
    "/openapi.json",
    "/v1/models",
    "/v1/models/tiny",
    "/v1/models/a%2fb/%00",
]
_PAGES += ["/page/index.html", "/page/../../app.py", "/page/%2e%2e/app.py", "/canvas/x", "/page//etc/passwd", "/docs"]
_OTHERS = sorted({*protocol.OFF, *protocol.HINTS, "unknown", ""})
_NUMERIC = st.one_of(numbers, numbers, values)


@st.composite
def decoding_settings(draw: st.DrawFn) -> dict[str, Json]:
    """The field `decoding` of a request: settings that fit, with values at and over their bounds."""
    settings = {}
    for name in draw(st.lists(st.sampled_from(sorted(DecodingParams.model_fields)), max_size=4, unique=True)):
        honest = {**HONEST, **DECODING}.get(name, st.floats(0, 1))
        settings[name] = draw(st.one_of(honest, honest, _NUMERIC))
    return settings


def _consistent(route: str, body: dict[str, Json]) -> dict[str, Json]:
    """The body without fields that do not go with others of it."""
    left_out = {"best_of", "max_completion_tokens"}
    if not body.get("stream"):
        left_out.add("stream_options")
    if body.get("stream") or "suffix" in body:
        left_out |= {"echo", "logprobs"}
    if route == "/v1/fill" or body.get("spans"):
        left_out |= {"max_tokens", "instruction"}
    if "suffix" in body:
        body["prompt"] = "def f(x):\n"
    if route == "/v1/edit" and not body.get("spans"):
        left_out.add("spans")
        body.setdefault("instruction", "Double it.")
    return {name: value for name, value in body.items() if name not in left_out}


@st.composite
def bodies(draw: st.DrawFn, route: str) -> dict[str, Json]:
    """The fields of a request to `route`: its own with honest values, then some that are not."""
    fields = ROUTES[route][0].model_fields
    names = [name for name, field in fields.items() if field.is_required()]
    optional = sorted(fields.keys() - set(names))
    names += draw(st.lists(st.sampled_from(optional), max_size=4, unique=True)) if optional else []
    body = {}
    for name in names:
        body[name] = draw(decoding_settings() if name == "decoding" else HONEST.get(name, st.booleans()))
    if draw(st.integers(0, 3)):
        body = _consistent(route, body)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        name = draw(st.sampled_from(sorted(fields)) | st.sampled_from(sorted(fields)) | st.sampled_from(_OTHERS))
        body[name] = draw(st.one_of(_NUMERIC, odd_text, st.sampled_from(near(body.get(name)))))
    for name in draw(st.lists(st.sampled_from(sorted(body)), max_size=1)) if draw(st.integers(0, 15)) == 0 else ():
        del body[name]
    return body


@st.composite
def encoded(draw: st.DrawFn, fields: SearchStrategy[Json]) -> str:
    """The bytes of a body: JSON most of the time, else cut, damaged, nested, in another encoding."""
    content = json.dumps(draw(fields), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    damage = draw(st.sampled_from(["none"] * 40 + ["cut", "insert", "deep", "digits", "utf-16", "twice", "other"]))
    at = draw(st.integers(0, len(content))) if damage != "none" else 0
    if damage == "cut":
        content = content[:at]
    if damage == "insert":
        content = content[:at] + draw(st.binary(min_size=1, max_size=3)) + content[at:]
    if damage == "deep":
        content = content.replace(
            b":", b":" + draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([9, 9999])), 1
        )
    if damage == "digits":
        content = content.replace(b":", b":" + b"1" * draw(st.sampled_from([309, 4301, 99999])), 1)
    if damage == "utf-16":
        content = content.decode("utf-8", "replace").encode("utf-16")
    if damage == "twice":
        content = content[:-1] + b"," + content[1:]
    if damage == "other":
        content = json.dumps(draw(values)).encode()
    return content.decode("latin-1")


_TYPES = ["application/json"] * 70 + ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "x"]
_TYPES += ["application/json; charset=utf-16", "application/problem+json"]
_HEADERS = [
    "authorization",
    "origin",
    "accept",
    "accept-encoding",
    "content-encoding",
    "range",
    "x-request-id",
    "cookie",
]
_LATIN = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=12)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A request to the server: any route and field, and now and then another method, path or header."""
    route = draw(st.sampled_from(sorted(ROUTES)))
    request = {"method": "POST", "path": route, "headers": {"content-type": draw(st.sampled_from(_TYPES))}}
    request["body"] = draw(encoded(bodies(route)))
    if draw(st.integers(0, 15)) == 0:
        request["path"] = draw(st.sampled_from([*_PAGES, *ROUTES]))
        request["method"] = draw(st.sampled_from(["GET", "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "POST", "TRACE"]))
    if draw(st.integers(0, 9)) == 0:
        request["headers"][draw(st.sampled_from(_HEADERS))] = draw(_LATIN)
    return request


# --- bytes on a connection -------------------------------------------------------------------------------------------

_LINES = (
    *(
        "POST /v1/completions HTTP/1.1",
        "GET / HTTP/1.0",
        "GET /health HTTP/9.9",
        "\x16\x03\x01\x02\x00",
        "PRI * HTTP/2.0",
    ),
    *(
        "GET http://x/ HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "CONNECT x:1 HTTP/1.1",
        "get /health http/1.1",
        "GET /%ff?%00 HTTP/1.1",
    ),
    *("Host: 127.0.0.1", "Host: ", "Content-Length: 4", "Content-Length: -1", "Content-Length: 99999999999999999999"),
    *(
        "Content-Length: 4\r\nContent-Length: 5",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: x",
        "Expect: 100-continue",
    ),
    *(
        "Connection: close",
        "Connection: Upgrade\r\nUpgrade: websocket",
        "Content-Type: application/json",
        "X: " + "y" * 70000,
    ),
    *(
        "Authorization: Bearer \xff\xfe",
        ": no name",
        "no colon",
        " folded",
        "X\0Y: z",
        "",
        "",
        "4\r\n{}\n\n",
        "0\r\n",
        "zz",
        "{}",
    ),
)
lines = st.lists(st.sampled_from(_LINES) | _LATIN, min_size=1, max_size=9)
connections = st.builds(
    lambda start, parts, end: "\r\n".join([start, *parts]) + end,
    st.sampled_from(_LINES[:10]),
    lines,
    pieces.filter(lambda piece: piece.isascii()),
)
"""What is sent on a connection before it is closed, as bytes in text."""
