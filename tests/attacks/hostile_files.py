"""Hypothesis strategies for files that strangers made: model folders, traces, datasets, settings, run folders.

An example is {"target": what reads it, "files": {name: edits}}: the honest files of the target (`targets` has them)
with edits, each a list of its kind and arguments:

* ["set", path, value], ["drop", path]: of the JSON document, where a file of JSON lines is a list, and a TOML file or
  the header of a safetensors file an object. Indices count modulo the length, so that a path fits any list.
* ["cut", share], ["flip", share, byte], ["insert", share, bytes]: of the bytes; a share of the length is a position.
* ["text", bytes]: other content. ["repeat", count]: the content so many times. ["deep", opening, count]: brackets.
* ["gone"], ["folder"], ["pipe"], ["link", target], ["zip", mebibytes]: no file, or something else of its name.
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from hostile_values import COMPONENTS, DATA_NAMES, NAMES, PICKLES, TEMPLATES, VALUES, WORDS
from hypothesis import strategies as st
from strategies import CODE, Json, near, numbers, odd_text, pieces, text, values

from diffucoder.decoding.params import DecodingParams
from diffucoder.evaluation.settings import EvaluateSettings
from diffucoder.models.hub import SHIPPED
from diffucoder.training.settings import STAGES

Edit = list[Any]
Files = dict[str, Any]  # target, files

hostile = st.one_of(
    values,
    numbers,
    odd_text,
    st.sampled_from(COMPONENTS),
    st.sampled_from(TEMPLATES),
    st.sampled_from(WORDS),
    st.sampled_from(VALUES),
)
_shares = st.floats(0, 1)
_bytes = st.binary(min_size=1, max_size=4).map(lambda content: content.decode("latin-1"))


def _paths(document: Json, depth: int = 4) -> list[list[Json]]:
    """The paths of a JSON document; of long lists and objects those of the first four entries."""
    if not depth or not isinstance(document, (dict, list)):
        return []
    entries: Sequence[tuple[Json, Json]] = list(document.items() if isinstance(document, dict) else enumerate(document))
    found = []
    for name, value in entries if len(entries) < 60 else entries[:4]:
        found += [[name], *([name, *path] for path in _paths(value, depth - 1))]
    return found


@cache
def _shipped(name: str) -> Json:
    return json.loads((SHIPPED / name).read_text(encoding="utf-8"))


def _value_at(document: Json, path: Sequence[Json]) -> Json:
    for name in path:
        document = document[name]
    return document


# --- edits of any file -----------------------------------------------------------------------------------------------


@st.composite
def raw_edits(draw: st.DrawFn) -> Edit:
    """An edit that knows nothing of what is in a file."""
    kinds = ["cut", "cut", "flip", "flip", "insert", "text", "repeat", "deep", "gone", "folder", "link", "pipe", "zip"]
    kind = draw(st.sampled_from(kinds))
    if kind == "cut":
        return [kind, draw(_shares)]
    if kind == "flip":
        return [kind, draw(_shares), draw(st.integers(0, 255))]
    if kind == "insert":
        return [kind, draw(_shares), draw(_bytes)]
    if kind == "text":
        content = draw(text | values.map(json.dumps))
        return [kind, content.encode("utf-8", "surrogatepass").decode("latin-1")]
    if kind == "repeat":
        return [kind, draw(st.sampled_from([0, 2, 3, 50]))]
    if kind == "deep":
        return [
            kind,
            draw(st.sampled_from(["[", '{"a":', "(", "{{ (", "-"])),
            draw(st.sampled_from([10, 1000, 100_000])),
        ]
    if kind == "link":
        return [kind, draw(st.sampled_from(["/dev/zero", "/dev/null", "nowhere", "/proc/self/mem", "."]))]
    if kind == "zip":
        return [kind, draw(st.sampled_from([1, 300]))]
    return [kind]


@st.composite
def json_edits(draw: st.DrawFn, document: Json, names: Sequence[str] = NAMES) -> Edit:
    """An edit of a JSON document like `document`: a value, or a name of `names` that it does not have."""
    paths = _paths(document)
    if draw(st.integers(0, 3)) == 0 or not paths:
        where = draw(st.sampled_from([path[:-1] for path in paths] or [[]]))
        return ["set", [*where, draw(st.sampled_from(names) | odd_text)], draw(hostile)]
    path = draw(st.sampled_from(paths))
    if draw(st.integers(0, 5)) == 0:
        return ["drop", path]
    value = _value_at(document, path)
    return ["set", path, draw(st.sampled_from(near(value)) | hostile)]


def edits(document: Json, names: Sequence[str] = NAMES) -> st.SearchStrategy[list[Edit]]:
    """One to three edits of a file of JSON."""
    one = json_edits(document, names)
    return st.one_of(
        st.lists(one, min_size=1, max_size=3), st.lists(one, min_size=1, max_size=2), raw_edits().map(lambda e: [e])
    )


# --- model folders ---------------------------------------------------------------------------------------------------

_INDEX = {"metadata": {"total_size": 8471592}, "weight_map": {"model.norm.weight": "model.safetensors"}}
_HEADER = {
    "lm_head.weight": {"dtype": "BF16", "shape": [1536, 256], "data_offsets": [0, 786432]},
    "__metadata__": {"format": "pt"},
}
_HEADER_NAMES = (
    "__metadata__",
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.99.x",
    "dtype",
    "shape",
    "data_offsets",
)
_OTHER_FILES = {
    "special_tokens_map.json": {"mask_token": "<|mask|>", "additional_special_tokens": ["<|x|>"]},
    "added_tokens.json": {"<|x|>": 1536},
    "diffucoder.json": {"mask_token_id": 3, "shifted": True},
    "chat_template.json": {"chat_template": "{{ messages }}"},
    "adapter_config.json": {"peft_type": "LORA"},
    "settings.json": {"run": "x"},
}


def _whole(document: Json) -> Edit:
    return ["text", json.dumps(document)]


@st.composite
def model_files(draw: st.DrawFn) -> Files:
    """A model folder like the shipped one, of which one or two files are not."""
    files: dict[str, list[Edit]] = {}
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        kind = draw(
            st.sampled_from(
                ["config", "config", "words", "words", "roles", "template", "weights", "other", "old", "any"]
            )
        )
        if kind == "config":
            files["config.json"] = draw(edits(_shipped("config.json")))
        elif kind == "words":
            files["tokenizer.json"] = draw(
                edits(_shipped("tokenizer.json"), ("normalizer", "pre_tokenizer", "padding", "type"))
            )
            if draw(st.booleans()):
                part = draw(
                    st.sampled_from(["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "padding"])
                )
                files["tokenizer.json"] = [["set", [part], draw(st.sampled_from(COMPONENTS))]]
        elif kind == "roles":
            files["tokenizer_config.json"] = draw(edits(_shipped("tokenizer_config.json")))
        elif kind == "template":
            pieces_of_it = st.lists(st.sampled_from(TEMPLATES) | pieces, min_size=1, max_size=2)
            content = "".join(draw(pieces_of_it)).encode("utf-8", "surrogatepass").decode("latin-1")
            files["chat_template.jinja"] = [draw(st.sampled_from([["text", content], ["insert", 1.0, content]]))]
        elif kind == "weights":
            files["model.safetensors"] = draw(edits(_HEADER, _HEADER_NAMES))
        elif kind == "old":  # the vocabulary as Qwen2 has it
            files["tokenizer.json"] = [["gone"]]
            vocabulary = {"a": 0, "b": 1, "ab": 2, "<|mask|>": 3}
            files["vocab.json"] = [_whole(vocabulary), *draw(st.lists(json_edits(vocabulary), max_size=2))]
            files["merges.txt"] = [
                ["text", draw(st.sampled_from(["#version: 0.2\na b\n", "a b", "a  b\n", "x y\n", "", "a b c\n"]))]
            ]
        elif kind == "other":
            name = draw(st.sampled_from(sorted(_OTHER_FILES)))
            files[name] = [_whole(_OTHER_FILES[name]), *draw(edits(_OTHER_FILES[name]))]
        else:
            name = draw(
                st.sampled_from(
                    ["generation_config.json", "chat_template.jinja", "tokenizer.model", "pytorch_model.bin"]
                )
            )
            files[name] = [draw(raw_edits())]
    if draw(st.integers(0, 19)) == 0:
        files["model.safetensors"] = [["gone"]]
        files["model.safetensors.index.json"] = [_whole(_INDEX), *draw(edits(_INDEX))]
    return {"target": "model", "files": files}


# --- data ------------------------------------------------------------------------------------------------------------

TRACE = {
    **{
        "format": "diffucoder-trace",
        "version": 3,
        "tokens": [1, 2, 70, 71, 72],
        "prompt_length": 2,
        "steps": [0, 1, -1],
    },
    **{
        "confidence": [0.5, 0.1, 0.0],
        "log_probs": [-0.1, -0.2, 0.0],
        "forward_passes": 2,
        "params": {"seed": 0, "steps": 2},
    },
    **{"model": "tiny", "id": "tiny/7#0", "revoked": [[0, 70, 0, 1]], "entropies": ""},
}
_TRACE_NAMES = (*TRACE, "model", "params", "seed", "temperature", "entropies")
CHAT = {
    "messages": [
        {"role": "user", "content": "Double n."},
        {"role": "assistant", "content": "def f(n):\n    return 2 * n"},
    ]
}
DOCUMENT = {"text": "def f(x):\n    return x\n"}
EXERCISE = {"id": "1", "prompt": "Double n.", "tests": ["assert double(2) == 4"]}
SAMPLE = {"task_id": "tiny/0", "sample": 0, "solution": "def f(x):\n    return x", "passed": True}
_LINES: dict[str, Json] = {
    "traces": TRACE,
    "chats": CHAT,
    "documents": DOCUMENT,
    "exercises": EXERCISE,
    "samples": SAMPLE,
}
_LINES["benchmark"] = EXERCISE
_TRACE_VALUES = [
    "eJwDAAAAAAE=",
    "!!",
    "AAAA",
    "eJztwQENAAAAwqD3T20ON6AAAAAAAAAAAIA3A5gAAAE=",
    "owner/name",
    "/dev/zero",
    "../x",
]
_MORE: dict[str, Json] = {
    "humaneval": {
        "task_id": "H/0",
        "prompt": "def f(n):\n",
        "test": "def check(candidate):\n    assert candidate(1) == 1\n",
        "entry_point": "f",
    },
    "acecode": {"id": "a", "question": "Double n.", "test_cases": ["assert double(2) == 4"]},
}


@st.composite
def data_files(draw: st.DrawFn) -> Files:
    """A file of JSON lines: traces, chats, documents, exercises or samples."""
    target = draw(st.sampled_from(["traces", "traces", *_LINES]))
    names = _TRACE_NAMES if target == "traces" else DATA_NAMES
    document = [_LINES[target]] * 2
    changes = draw(edits(document, names))
    if target == "traces" and draw(st.integers(0, 3)) == 0:
        field = draw(st.sampled_from(["entropies", "model", "id"]))
        changes = [["set", [0, field], draw(st.sampled_from(_TRACE_VALUES) | odd_text)]]
    if target == "exercises" and draw(st.integers(0, 2)) == 0:
        row = draw(st.sampled_from(sorted(_MORE)))
        changes = [["set", [0], _MORE[row]], *draw(st.lists(json_edits([_MORE[row]], DATA_NAMES), max_size=2))]
    return {"target": target, "files": {"rows.jsonl": changes}}


# --- settings and run folders ----------------------------------------------------------------------------------------

_RECIPE = {"steps": 1, "batch": 1, "length": 32, "lr": 1e-4, "seed": 0, "decoding": {"steps": 4}, "betas": [0.9, 0.95]}


@st.composite
def settings_files(draw: st.DrawFn) -> Files:
    """A recipe in TOML for a stage of training."""
    stage = draw(st.sampled_from(sorted(STAGES)))
    names = [*STAGES[stage].model_fields, *DecodingParams.model_fields, "decoding.steps", "a.b"]
    changes = draw(st.lists(json_edits(_RECIPE, names), min_size=1, max_size=4) | raw_edits().map(lambda e: [e]))
    return {"target": f"recipe-{stage}", "files": {"recipe.toml": changes}}


_SETTINGS = {"version": 2, "benchmark": "tiny", "params": {"steps": 2}, "model": "tiny", "limit": 2, "weights": "0"}
_REPORT_NAMES = (*EvaluateSettings.model_fields, "version", "params")


@st.composite
def run_folders(draw: st.DrawFn) -> Files:
    """A run folder of `evaluate`, `order` or `train sft`, of which one or two files are damaged."""
    target = draw(st.sampled_from(["evaluate-run", "order-run", "train-run"]))
    files: dict[str, list[Edit]] = {}
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        if target == "train-run":
            choices = ["settings.json", "metrics.jsonl", "checkpoints/step-00000002/*0"]
            choices += [f"checkpoints/step-00000002/{name}" for name in ("whole.json", "*0", "*1", "*2", ".metadata")]
        else:
            choices = ["settings.json", "samples.jsonl", "verdicts.jsonl", "report.json", "traces.jsonl"]
        name = draw(st.sampled_from(choices))
        document: Json = _SETTINGS
        if name.endswith(".jsonl"):
            document = [TRACE if name.startswith("traces") else SAMPLE | {"step": 1}]
        if name.endswith(".json") and "checkpoints" in name:
            document = {"step": 2, "files": {"model.safetensors": [1, 1]}}
        files[name] = draw(
            st.lists(raw_edits(), min_size=1, max_size=1) if "json" not in name else edits(document, _REPORT_NAMES)
        )
        if name.endswith(".metadata") and draw(st.booleans()):
            files[name] = [["text", draw(st.sampled_from(PICKLES))]]
    return {"target": target, "files": files}


_GGUF = st.lists(raw_edits(), min_size=1, max_size=2).map(
    lambda changes: {"target": "gguf", "files": {"model.gguf": changes}}
)
_OPTIONS = (
    "temperature",
    "steps",
    "seed",
    "top-p",
    "policy",
    "block",
    "num-samples",
    "new-tokens",
    "stop",
    "cache",
    "dtype",
)


@st.composite
def options(draw: st.DrawFn) -> Files:
    """Options of the command line, and a text with holes from a file."""
    given = {}
    if draw(st.booleans()):
        odd = st.one_of(numbers.map(str), odd_text, st.sampled_from(WORDS))
        given = draw(st.dictionaries(st.sampled_from(_OPTIONS), odd, max_size=3))
    content = draw(st.lists(st.sampled_from(CODE) | pieces, max_size=5).map("".join))
    if draw(st.booleans()):
        content += "<|hole:2|>" + draw(pieces)
    safe = {name: value.replace("\0", "") for name, value in given.items()}
    edit = ["text", content.encode("utf-8", "surrogatepass").decode("latin-1")]
    return {"target": "infill", "files": {"holes.py": [edit]}, "options": safe}


_reply = st.lists(st.sampled_from(CODE) | odd_text, max_size=8).map("".join)
replies = st.builds(
    lambda content: {
        "target": "reply",
        "files": {"reply.txt": [["text", content.encode("utf-8", "replace").decode("latin-1")]]},
    },
    _reply,
)
_SMALL = {
    "model": model_files(),
    "data": data_files(),
    "settings": settings_files(),
    "options": options(),
    "reply": replies,
}
_OFTEN = ["model"] * 5 + ["data"] * 3 + ["settings", "options", "reply"]
small_files = st.sampled_from(_OFTEN).flatmap(_SMALL.__getitem__)
large_files = st.one_of(run_folders(), _GGUF)
