"""Model folders and GGUF files that anybody may have made: one line of error, in bounded time and memory, or they work.

The folders are the shipped model with one file changed. All of them are loaded in one process, under limits; what ends
that process (an abort, a panic, too much memory) fails the test.
"""

import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from diffucoder.errors import CheckpointError, PromptError
from diffucoder.models.checkpoint import find_checkpoint, load_tokenizer
from diffucoder.models.gguf import read_gguf
from diffucoder.models.hub import SHIPPED
from diffucoder.tokenizer import Tokenizer
from diffucoder.tokenizer_checks import check_tokenizer_json

CONFIG = json.loads((SHIPPED / "config.json").read_text())
ROLES = json.loads((SHIPPED / "tokenizer_config.json").read_text())
WORDS = json.loads((SHIPPED / "tokenizer.json").read_text())
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
JINJA = "chat_template.jinja"
DEEP = "[" * 100_000
GROWS = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 200}
DOUBLES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def config(**changes: Any) -> dict[str, Any]:
    return {"config.json": {**CONFIG, **changes}}


def roles(**changes: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": {**ROLES, **changes}}


def words(**changes: Any) -> dict[str, Any]:
    return {"tokenizer.json": {**WORDS, **changes}}


def model(**changes: Any) -> dict[str, Any]:
    return words(model={**WORDS["model"], **changes})


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def index(value: Any) -> dict[str, Any]:
    return {WEIGHTS: None, INDEX: {"weight_map": {"a": value}}}


def template(*pieces: str) -> dict[str, Any]:
    single = [{"Sequence": {"id": piece, "type_id": 0}} for piece in pieces]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(1000)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def link_to(target: str | Path) -> Any:
    return lambda path: path.symlink_to(target)


def sparse(size: int) -> Any:
    return lambda path: (path.touch(), os.truncate(path, size))


# name -> the files that are changed: None for removed, a function to make it, bytes, text, or JSON
FOLDERS: dict[str, dict[str, Any]] = {
    "index of a number": index(5),
    "index of a list": index(["x"]),
    "index of null": index(None),
    "index of a list of names": {WEIGHTS: None, INDEX: {"weight_map": ["x"]}},
    "index is a list": {WEIGHTS: None, INDEX: []},
    "index of an absolute path": index(str(SHIPPED / WEIGHTS)),
    "index that leaves the folder": index("../model.safetensors"),
    "index of a long name": index("x" * 5000 + ".safetensors"),
    "index of a name with a null": index("a\0.safetensors"),
    "index of a pickle": index("pytorch_model.bin"),
    "index is deep": {WEIGHTS: None, INDEX: '{"weight_map":' * 50_000},
    "weights: a pipe": {WEIGHTS: os.mkfifo},
    "weights: a folder": {WEIGHTS: os.mkdir},
    "weights: a socket": {WEIGHTS: make_socket},
    "weights: endless": {WEIGHTS: link_to("/dev/zero")},
    "weights: a dead link": {WEIGHTS: link_to("nowhere")},
    "weights: a circle of links": {WEIGHTS: link_to(WEIGHTS)},
    "weights: a pickle alone": {WEIGHTS: None, "pytorch_model.bin": b"\x80\x04."},
    "weights: empty": {WEIGHTS: b""},
    "weights: a header of 2**63 bytes": {WEIGHTS: struct.pack("<Q", 2**63) + b"{}"},
    "weights: a header that is deep": {WEIGHTS: struct.pack("<Q", 100_000) + DEEP.encode()},
    "weights: overlap": {
        WEIGHTS: header(
            a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            b={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        )
    },
    "weights: beyond the file": {WEIGHTS: header(a={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]})},
    "weights: sizes that overflow": {WEIGHTS: header(a={"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]})},
    "weights: negative": {WEIGHTS: header(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]})},
    "weights: an unknown dtype": {WEIGHTS: header(a={"dtype": "X9", "shape": [1], "data_offsets": [0, 4]})},
    "weights: a control character in a name": {
        WEIGHTS: header(**{"\x1b[2J\n": {"dtype": "F32", "shape": [250], "data_offsets": [0, 1000]}})
    },
    "config: deep": {"config.json": '{"a":' * 100_000},
    "config: deep enough to be read": {"config.json": '{"a":' * 900 + "1" + "}" * 900},
    "config: a pipe": {"config.json": os.mkfifo},
    "config: a folder": {"config.json": os.mkdir},
    "config: endless": {"config.json": link_to("/dev/zero")},
    "config: a link elsewhere": {"config.json": link_to("/etc/passwd")},
    "config: 17 GB of nothing": {"config.json": sparse(17 << 30)},
    "config: not UTF-8": {"config.json": b"\xff\xfe{}"},
    "config: null": {"config.json": "null"},
    "config: a number of 10,000 digits": {"config.json": '{"vocab_size": ' + "9" * 10_000 + "}"},
    "config: model_type a list": config(model_type=["Dream"]),
    "config: model_type long": config(model_type="x" * 10**6),
    "config: quantisation": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "config: quantisation is a number": config(quantization_config=4),
    "config: dtype is a function": config(torch_dtype="load"),
    "config: dtype is a list": config(dtype=["float32"]),
    "config: a billion layers": config(num_hidden_layers=10**9),
    "config: no layers": config(num_hidden_layers=0),
    "config: minus a layer": config(num_hidden_layers=-1),
    "config: layers as text": config(num_hidden_layers="5"),
    "config: layers as a truth value": config(num_hidden_layers=True),
    "config: half a layer": config(num_hidden_layers=5.5),
    "config: a width of 10**12": config(hidden_size=10**12),
    "config: a width of 10**30": config(hidden_size=10**30),
    "config: a width of 2**24": config(hidden_size=2**24),
    "config: a width of null": config(hidden_size=None),
    "config: a width that is not a number": {"config.json": json.dumps({**CONFIG, "hidden_size": float("nan")})},
    "config: no heads": config(num_attention_heads=0),
    "config: three heads": config(num_attention_heads=3),
    "config: no key heads": config(num_key_value_heads=0),
    "config: three key heads": config(num_key_value_heads=3),
    "config: an odd head": config(head_dim=63),
    "config: a vocabulary of 10**15": config(vocab_size=10**15),
    "config: a vocabulary of a list": config(vocab_size=[1536]),
    "config: 10**18 positions": config(max_position_embeddings=10**18),
    "config: minus one position": config(max_position_embeddings=-1),
    "config: eps of infinity": {"config.json": json.dumps({**CONFIG, "rms_norm_eps": float("inf")})},
    "config: eps as text": config(rms_norm_eps="1e-6"),
    "config: activation": config(hidden_act="__import__"),
    "config: activation is a list": config(hidden_act=["silu"]),
    "config: rope as text": config(rope_scaling="linear"),
    "config: unknown rope": config(rope_scaling={"rope_type": "someone/rope", "factor": 2.0}),
    "config: rope without a type": config(rope_scaling={"factor": "2"}),
    "config: rope of nothing": config(rope_scaling={"rope_type": "linear", "factor": 0}),
    "config: rope of a list": config(rope_scaling={"rope_type": "yarn", "factor": [1]}),
    "config: rope without sizes": config(rope_scaling={"rope_type": "llama3"}),
    "config: a theta below zero": config(rope_theta=-1.0),
    "config: layer types": config(layer_types=[1, 2]),
    "config: mask as text": config(mask_token_id="3"),
    "config: mask beyond": config(mask_token_id=1536),
    "config: mask below": config(mask_token_id=-1),
    "config: mask of a list": config(mask_token_id=[3]),
    "config: pad beyond": config(pad_token_id=10**6),
    "config: pad of a table": config(pad_token_id={}),
    "config: end of a list of text": config(eos_token_id=["2"]),
    "config: end of 10**30": config(eos_token_id=10**30),
    "extras: shifted": {"diffucoder.json": {"shifted": "no"}},
    "extras: mask": {"diffucoder.json": {"mask_token_id": True}},
    "extras: a list": {"diffucoder.json": []},
    "adapter": {"adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "someone/model"}},
    "adapter: a list": {"adapter_config.json": "[]"},
    "adapter: a pipe": {"adapter_config.json": os.mkfifo},
    "roles: mask_token 5": roles(mask_token=5),
    "roles: mask_token a list": roles(mask_token=["<|mask|>"]),
    "roles: mask_token unknown": roles(mask_token="hello"),
    "roles: pad_token of a number": roles(pad_token={"content": 4}),
    "roles: half a character": {"tokenizer_config.json": '{"mask_token": "\\ud800"}'},
    "roles: a list": {"tokenizer_config.json": "[]"},
    "roles: a pipe": {"tokenizer_config.json": os.mkfifo},
    "roles: extra tokens are a number": roles(extra_special_tokens=5),
    "roles: extra tokens of numbers": roles(extra_special_tokens=[5]),
    "roles: own tokens are a list": roles(model_specific_special_tokens=[1]),
    "roles: added tokens are a list": roles(added_tokens_decoder=[1]),
    "roles: added tokens without ids": roles(added_tokens_decoder={"x": {"content": "<x>"}}),
    "roles: added tokens far away": roles(added_tokens_decoder={"4294967295": {"content": "<x>"}}),
    "roles: an added token of 1 MB": roles(extra_special_tokens=["x" * 10**6]),
    "roles: a million characters of added tokens": roles(extra_special_tokens=[f"<{n:0200}>" for n in range(5000)]),
    "map: a list": {"special_tokens_map.json": "[1]"},
    "map: a number": {"special_tokens_map.json": {"mask_token": 5}},
    "added tokens: ids as text": {"added_tokens.json": {"<x>": "1536"}},
    "added tokens: ids of lists": {"added_tokens.json": {"<x>": [1]}},
    "added tokens: far away": {"added_tokens.json": {"<x>": 2**40}},
    "added tokens: a clash": {"added_tokens.json": {"<x>": 7}},
    "added tokens: a socket": {"added_tokens.json": make_socket},
    "words: a pipe": {"tokenizer.json": os.mkfifo},
    "words: endless": {"tokenizer.json": link_to("/dev/zero")},
    "words: 70 MB": {"tokenizer.json": sparse(70 << 20)},
    "words: deep": {"tokenizer.json": '{"model":' * 50_000},
    "words: no model": {"tokenizer.json": {"version": "1.0"}},
    "words: model of another kind": model(type="Unigram"),
    "words: model of a list": words(model=[]),
    "words: ids as text": model(vocab={"a": "1"}),
    "words: ids far away": model(vocab={**WORDS["model"]["vocab"], "zz": 2**32 - 1}),
    "words: ids below zero": model(vocab={"a": -1}),
    "words: merges of numbers": model(merges=[1, 2]),
    "words: merges of unknown words": model(merges=[["zzz", "yyy"]]),
    "words: a long prefix": model(continuing_subword_prefix="###########"),
    "words: a suffix": model(end_of_word_suffix="日" * 100),
    "words: chance": model(dropout=0.5),
    "words: text that grows 10**13 times": words(normalizer={"type": "Sequence", "normalizers": [GROWS] * 6}),
    "words: text that grows 200 times": words(normalizer=GROWS),
    "words: replacing nothing": words(normalizer={**GROWS, "pattern": {"String": ""}}),
    "words: a character map": words(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "words: a long beginning": words(normalizer={"type": "Prepend", "prepend": "x" * 10**6}),
    "words: bytes of bytes": words(pre_tokenizer={"type": "Sequence", "pretokenizers": [DOUBLES] * 30}),
    "words: backtracking": words(pre_tokenizer=split("(a+)+$|(a|a)*b")),
    "words: quadratic": words(pre_tokenizer=split("(?:a*a*)*b|a")),
    "words: not an expression": words(pre_tokenizer=split("(((")),
    "words: recursion": words(pre_tokenizer=split("(?<x>a\\g<x>?b)")),
    "words: an unknown part": words(pre_tokenizer={"type": "Custom"}),
    "words: a part without a kind": words(pre_tokenizer={}),
    "words: a part of a number": words(decoder=5),
    "words: text four times": words(post_processor=template("A", "A", "A", "A")),
    "words: another text": words(post_processor=template("B")),
    "words: no text": words(post_processor=template()),
    "words: padding of a list": words(padding=[]),
    "words: added tokens of numbers": words(added_tokens=[1]),
    "words: an id of text": words(added_tokens=[{**WORDS["added_tokens"][0], "id": "x"}]),
    "words: neither form": {"tokenizer.json": None},
    "words: vocab.json of lists": {"tokenizer.json": None, "vocab.json": {"a": []}, "merges.txt": ""},
    "words: merges.txt of other things": {"tokenizer.json": None, "vocab.json": {"a": 0}, "merges.txt": "a b c\n"},
    "words: merges.txt a pipe": {"tokenizer.json": None, "vocab.json": {"a": 0}, "merges.txt": os.mkfifo},
    "template: a pipe": {JINJA: os.mkfifo},
    "template: a private file": {JINJA: link_to("/etc/hostname")},
    "template: not UTF-8": {JINJA: b"\xff\xfe"},
    "template: a folder": {JINJA: os.mkdir},
    "template: of a list without names": {**roles(chat_template=[{"x": 1}]), JINJA: None},
    "template: of a list of lists": {**roles(chat_template=[[1]]), JINJA: None},
    "template: of a number": {**roles(chat_template=5), JINJA: None},
    "template: named by a list": {**roles(chat_template=[{"name": [], "template": "x"}]), JINJA: None},
    "template: default is a number": {**roles(chat_template={"default": 5}), JINJA: None},
    "template: a type error": {JINJA: "{{ 1 + 'a' }}"},
    "template: divides by zero": {JINJA: "{{ 1 // 0 }}"},
    "template: does not parse": {JINJA: "{% for %}"},
    "template: parses deep": {JINJA: "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"},
    "template: 10 GB": {JINJA: "{{ 'x' * 10000000000 }}"},
    "template: 100 MB": {JINJA: "{{ 'x' * 100000000 }}"},
    "template: doubles": {
        JINJA: "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    },
    "template: loops": {
        JINJA: "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    },
    "template: power": {JINJA: "{{ 9 ** (9 ** 9) }}"},
    "template: range": {JINJA: "{{ range(10 ** 12) | list }}"},
    "template: recursion": {JINJA: "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"},
    "template: includes": {JINJA: "{% include '/etc/passwd' %}"},
    "template: imports": {JINJA: "{% import 'os' as os %}{{ os }}"},
    "template: extends": {JINJA: "{% extends messages %}"},
    "template: classes": {JINJA: "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}"},
    "template: side effects": {JINJA: "{{ messages.clear() }}"},
    "template: raises": {JINJA: "{{ raise_exception('only polite users') }}"},
    "template: format": {JINJA: "{{ '{0.__class__}'.format(messages) }}{{ '%1000000000d' % 1 }}"},
}
WORK = {  # folders with odd files that change nothing
    "attention of a hub": config(attn_implementation="someone/kernel", _attn_implementation="someone/kernel"),
    "mask id 3.0": config(mask_token_id=3.0),
    "remote code": config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "someone/x--evil.Model"}),
    "weights elsewhere": config(transformers_weights="../../x.safetensors", base_model_name_or_path="someone/x"),
    "pad id -1": config(pad_token_id=-1),
    "generation: a list": {"generation_config.json": "[1]"},
    "generation: a pipe": {"generation_config.json": os.mkfifo},
    "a tokenizer's code": roles(auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}, tokenizer_class="Evil"),
    "tokenizer: settings of a training run": words(
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
        padding={
            **{"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
        },
    ),
    "tokenizer: another known expression": words(pre_tokenizer=split(r"\p{N}{1,3}")),
    "tokenizer: an expression that is tried": words(pre_tokenizer=split(r"[a-z]+|[^a-z]")),
    "a template of another kind": {JINJA: "{{ messages[-1].content | trim }}{{ eos_token }}"},
}
PROBE = """
import json, sys, time
import torch
from diffucoder.models.checkpoint import load_with_tokenizer
torch.set_num_threads(1)
for line in sys.stdin:
    began = time.process_time()
    try:
        denoiser, tokenizer = load_with_tokenizer(line.strip(), dtype=torch.float32, device="cpu")
        ids = tokenizer.encode_chat("a" * 40 + "xc <|im_end|>")
        denoiser(torch.tensor([ids[:40]]))
        outcome = ["fine", tokenizer.decode(ids)[:50]]
    except Exception as error:
        outcome = [type(error).__name__, str(error)]
    print(json.dumps([*outcome, time.process_time() - began]), flush=True)
"""


def make_folder(folder: Path, files: dict[str, Any]) -> Path:
    """The shipped model with other files."""
    shutil.copytree(SHIPPED, folder)
    for name, content in files.items():
        path = folder / name
        path.unlink(missing_ok=True)
        if callable(content):
            content(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def outcomes(folders: list[Path]) -> list[list[Any]]:
    """How loading each folder and one chat end, in a process with 4 GiB and without a network."""

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input="\n".join(map(str, folders)),
        capture_output=True,
        text=True,
        preexec_fn=limits,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(folders), f"{folders[len(lines)]} ended the process: {done.stderr[-500:]}"
    return lines


def test_each_hostile_folder_is_one_line_that_names_it(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / str(number), files) for number, files in enumerate(FOLDERS.values())]
    assert len(folders) >= 150
    wrong = []
    for name, folder, (kind, message, seconds) in zip(FOLDERS, folders, outcomes(folders), strict=True):
        place = "template" if name.startswith("template") else str(folder)
        as_expected = kind in ("CheckpointError", "PromptError") and place in message
        if not as_expected or "\n" in message or not message.isprintable() or len(message) > 700 or seconds > 10:
            wrong.append((name, kind, message[:300], seconds))
    assert wrong == []


def test_odd_files_that_are_not_read_change_nothing(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / str(number), files) for number, files in enumerate(WORK.values())]
    for name, (kind, message, _) in zip(WORK, outcomes(folders), strict=True):
        assert kind == "fine", (name, message)
        assert "aaaa" in message


def test_the_command_line_prints_one_line(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {**config(hidden_size=10**12)})
    command = [sys.executable, "-m", "diffucoder.cli", "generate", "--model", str(folder), "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{folder}/config.json is not a Dream config: hidden_size=1000000000000: " in done.stderr


def test_names_that_no_folder_can_have() -> None:
    for name in ("x" * 5000, "a\0b", "/" + "y" * 300 + "/z", "~" * 5000):
        with pytest.raises(CheckpointError):
            find_checkpoint(name)


def test_a_template_that_raises_gives_its_reason(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder(tmp_path / "m", {JINJA: "{{ raise_exception('only polite users') }}"}))
    with pytest.raises(PromptError, match="template rejects these messages: only polite users"):
        tokenizer.chat("hi")


def test_links_inside_a_folder_and_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = make_folder(tmp_path / "models--a--b" / "snapshots" / "0123", {})
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, name in enumerate(("config.json", JINJA, "tokenizer.json", WEIGHTS)):
        (snapshot / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "tokenizer_config.json").rename(snapshot / "other")
    (snapshot / "tokenizer_config.json").symlink_to("other")
    assert load_tokenizer(snapshot).chat("hi") == load_tokenizer().chat("hi")


@pytest.mark.parametrize("pattern", [{"String": ""}, {"Regex": ""}, {"Regex": "a*"}, {"Regex": r"\b"}])
def test_a_replacement_of_an_empty_text_is_one_line(pattern: dict[str, str]) -> None:
    step = {"type": "Replace", "pattern": pattern, "content": "x"}
    with pytest.raises(CheckpointError, match="normalizer cannot replace"):
        check_tokenizer_json({"model": {"vocab": {}}, "normalizer": step}, Path("tokenizer.json"))


@pytest.mark.parametrize("pattern", [{"String": " "}, {"String": "\u2581"}, {"Regex": " {2,}"}])
def test_replacements_of_published_models_are_read(pattern: dict[str, str]) -> None:
    step = {"type": "Replace", "pattern": pattern, "content": "x"}
    check_tokenizer_json({"model": {"vocab": {}}, "normalizer": step, "decoder": step}, Path("tokenizer.json"))


def test_blanks_are_cut_as_deepseek_coder_does_in_linear_time() -> None:
    pattern = {"Regex": r"\s+$"}
    step = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    check_tokenizer_json({"model": {"vocab": {}}, "pre_tokenizer": step}, Path("tokenizer.json"))
    slow, fast = (pre_tokenizers.Split(Regex(each), "isolated") for each in (r"\s+$", pattern["Regex"]))
    for characters in product(" \n\ra", repeat=6):
        text = "".join(characters)
        assert slow.pre_tokenize_str(text) == fast.pre_tokenize_str(text)
    began = time.process_time()
    fast.pre_tokenize_str(" " * 2**20 + "x")
    assert time.process_time() - began < 5


def test_loading_the_shipped_tokenizer_stays_quick() -> None:
    load_tokenizer()  # imports
    times = []
    for _ in range(5):
        began = time.process_time()
        load_tokenizer()
        times.append(time.process_time() - began)
    assert min(times) < 0.25


# ---- any value in any place ----

ANY = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([2**63, -1, 10**30])
)
VALUES = st.recursive(ANY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json", "special_tokens_map.json")


def places(content: Any) -> list[tuple[Any, ...]]:
    """The ways to all values in a JSON file, without most of a long list."""
    found: list[tuple[Any, ...]] = [()]
    entries: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        entries = list(content.items())[:30]
    elif isinstance(content, list):
        entries = list(enumerate(content))[:3]
    for key, value in entries:
        found += [(key, *rest) for rest in places(value)]
    return found


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[str, str]:
    """A file of a model, and its text with one value replaced."""
    name = draw(st.sampled_from(FILES))
    content = {"config.json": CONFIG, "tokenizer_config.json": ROLES, "tokenizer.json": WORDS}.get(name, {"<x>": 1536})
    content = json.loads(json.dumps(content))
    way = draw(st.sampled_from(places(content)))
    value = draw(VALUES)
    if not way:
        return name, json.dumps(value)
    inside = content
    for key in way[:-1]:
        inside = inside[key]
    inside[way[-1]] = value
    return name, json.dumps(content)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(damaged=damaged_files())
def test_any_value_in_any_place_loads_or_is_one_line(tmp_path_factory: pytest.TempPathFactory, damaged: Any) -> None:
    name, text = damaged
    folder = tmp_path_factory.mktemp("damaged") / "m"
    make_folder(folder, {name: text.encode(errors="surrogatepass"), WEIGHTS: None})
    message = ""
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode_chat("hi <|im_end|>"))
    except (CheckpointError, PromptError) as error:
        message = str(error)
    assert "\n" not in message


# ---- GGUF ----


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(fields: bytes = b"", *, tensors: int = 0, count: int = 1, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, count) + fields + bytes(64)


def field(kind: int, value: bytes, key: str = "general.x") -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", dimensions or len(shape)) + sizes + struct.pack("<IQ", kind, offset)


GGUFS = {
    "another file": b"GIF89a" + bytes(100),
    "nothing": b"",
    "version": gguf(version=10**9),
    "2**60 fields": gguf(count=2**60),
    "2**60 tensors": gguf(count=0, tensors=2**60),
    "a key of 2**60 bytes": gguf(struct.pack("<Q", 2**60)),
    "a text of 2**60 bytes": gguf(field(8, struct.pack("<Q", 2**60))),
    "a text that is not UTF-8": gguf(field(8, struct.pack("<Q", 2) + b"\xff\xff")),
    "an array of 2**60 bytes": gguf(field(9, struct.pack("<IQ", 0, 2**60))),
    "an array of 2**60 texts": gguf(field(9, struct.pack("<IQ", 8, 2**60))),
    "an array that nobody reads": gguf(field(9, struct.pack("<IQ", 8, 5000) + bytes(40_000))),
    "a long vocabulary": gguf(field(9, struct.pack("<IQ", 0, 2**20 + 1) + bytes(2**20 + 1), "tokenizer.ggml.scores")),
    "arrays of arrays": gguf(field(9, struct.pack("<IQ", 9, 1) * 5000)),
    "an unknown type": gguf(field(99, b"")),
    "an unknown type of items": gguf(field(9, struct.pack("<IQ", 99, 1))),
    "a key twice": gguf(field(0, b"1") * 2, count=2),
    "alignment 0": gguf(field(4, struct.pack("<I", 0), key="general.alignment")),
    "alignment as text": gguf(field(8, text("32"), key="general.alignment")),
    "alignment of 3": gguf(field(4, struct.pack("<I", 3), key="general.alignment")),
    "a tensor of 2**32 dimensions": gguf(tensor("a", 1, dimensions=2**32 - 1), count=0, tensors=1),
    "a tensor without dimensions": gguf(tensor("a"), count=0, tensors=1),
    "a tensor of 2**64 numbers": gguf(tensor("a", 2**32, 2**32), count=0, tensors=1),
    "a tensor elsewhere": gguf(tensor("a", 1, offset=2**63), count=0, tensors=1),
    "a tensor of an unknown type": gguf(tensor("a", 1, kind=77), count=0, tensors=1),
    "a tensor twice": gguf(tensor("a", 1) * 2, count=0, tensors=2),
    "an architecture of a number": gguf(field(4, struct.pack("<I", 1), key="general.architecture")),
    "an architecture of an array": gguf(field(9, struct.pack("<IQ", 0, 0), key="general.architecture")),
    "no vocabulary": gguf(field(8, text("llama"), key="general.architecture")),
}


@pytest.mark.parametrize("name", GGUFS)
def test_each_hostile_gguf_is_one_line(tmp_path: Path, name: str) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUFS[name])
    began = time.process_time()
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        read_gguf(path)
    assert str(caught.value).isprintable()
    assert time.process_time() - began < 10


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to("/dev/zero"), link_to("nowhere"), make_socket])
def test_a_gguf_has_to_be_a_regular_file(tmp_path: Path, make: Any) -> None:
    pytest.importorskip("gguf")
    make(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError):
        read_gguf(tmp_path / "m.gguf")
