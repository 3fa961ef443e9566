"""Qwen2's vocabulary as DiffuCoder spells it: published ids, exact prompts, holes, and text half written."""

import gzip
import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from diffucoder.errors import CheckpointError, PromptError
from diffucoder.tokenizer import PLACEHOLDER, Hole, Tokenizer, split_holes

HELLO = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWrite a sort.<|im_end|>\n<|im_start|>assistant\n"
)

# What Dream adds to Qwen2's vocabulary, in id order
ADDED = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call>
    </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <|beginoftext|>
    <|mask|>""".split()


# How checkpoints write chats
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = (  # Llama 3's
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|mask|>\n\n{{ m.content | trim }}{{ eos_token }}"
    "{% endfor %}<|im_start|>assistant\n\n"
)
CONDITIONS = (  # as Qwen3's: what was thought is left out
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
JOINED = "{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>"
TEMPLATES = [None, CHATML, TRIMMED, CONDITIONS, JOINED]

SPELLINGS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|mask|>",
    "<|im_",
    "<|",
    "|>",
    "<",
    "\ufdd0",
    "system\n",
    " ",
]
SPELLED = st.lists(st.sampled_from(SPELLINGS) | st.text(max_size=3), max_size=8).map("".join)


@pytest.fixture(scope="session")
def base_folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as DiffuCoder-Base ships them: a vocabulary, merges and a list of added tokens."""
    folder = tmp_path_factory.mktemp("qwen2")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes(gzip.decompress((shared / "data/qwen2-tokenizer" / f"{name}.gz").read_bytes()))
    listed = {name: 151643 + number for number, name in enumerate(ADDED)}
    (folder / "added_tokens.json").write_text(json.dumps(listed))
    return folder


@pytest.fixture(scope="session")
def base(base_folder: Path) -> Tokenizer:
    return Tokenizer.load(base_folder)


@pytest.fixture
def instruct_folder(base_folder: Path, base: Tokenizer, tmp_path: Path) -> Path:
    """Files as DiffuCoder-Instruct ships them: `<|dlm_pad|>` listed, and used to pad."""
    for name in ("vocab.json", "merges.txt"):
        os.link(base_folder / name, tmp_path / name)
    listed = {token.content: id_ for id_, token in base.backend.get_added_tokens_decoder().items()}
    (tmp_path / "added_tokens.json").write_text(json.dumps({**listed, "<|dlm_pad|>": 151667}))
    roles = {"pad_token": "<|dlm_pad|>", "eos_token": {"content": "<|endoftext|>"}, "mask_token": "<|mask|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    return tmp_path


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """Bytes, one token each, then a mask: what a tokenizer must do without any vocabulary at hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: id_ for id_, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|mask|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend)


# ---- DiffuCoder's vocabulary ----


def test_published_ids(base: Tokenizer) -> None:
    assert base.encode("Hello world") == [9707, 1879]
    assert base.encode(" Hello world") == [21927, 1879]
    assert base.mask_id == 151666
    assert base.encode("<|im_end|><|mask|><|beginoftext|>", special=True) == [151645, 151666, 151665]
    assert base.encode("<|file_sep|><|fim_prefix|><tool_call>", special=True) == [151664, 151659, 151657]


def test_base_has_no_pad_of_its_own(base: Tokenizer) -> None:
    assert base.vocab_size == 151667
    assert base.backend.token_to_id("<|dlm_pad|>") is None
    assert (base.pad_id, base.eos_id) == (151643, 151643)
    assert base.terminator_ids == {151643, 151645}


def test_instruct_lists_one(instruct_folder: Path) -> None:
    instruct = Tokenizer.load(instruct_folder)
    assert instruct.vocab_size == 151668
    assert (instruct.pad_id, instruct.eos_id, instruct.mask_id) == (151667, 151643, 151666)
    assert instruct.terminator_ids == {151643, 151645, 151667}


def test_digits_stand_alone(base: Tokenizer) -> None:
    assert [base.decode([id_]) for id_ in base.encode("x = 2048")] == ["x", " =", " ", "2", "0", "4", "8"]


@pytest.mark.parametrize(
    "text",
    [
        "def f(xs):\n    return [x for x in xs if x > 10]\n\n\n",
        "it's  WE'LL\t\t\r\n  \n x",
        "naïve 你好 🙂 été",
        "a b  c   d    e\n\n    f",
        "\n\n  def\n",
        "",
    ],
)
def test_text_survives(base: Tokenizer, text: str) -> None:
    assert base.decode(base.encode(text)) == text


def test_text_is_composed_first(base: Tokenizer) -> None:
    assert base.encode("e\u0301") == base.encode("é")


def test_plain_text_may_quote_special_tokens(base: Tokenizer) -> None:
    quoted = base.encode("a <|mask|> b")
    assert base.mask_id not in quoted
    assert base.decode(quoted) == "a <|mask|> b"
    assert base.mask_id in base.encode("a <|mask|> b", special=True)


def test_special_tokens_are_skipped_unless_wanted(base: Tokenizer) -> None:
    ids = base.encode("x<|im_end|><|endoftext|>", special=True)
    assert base.decode(ids) == "x"
    assert base.decode(ids, skip_special=False) == "x<|im_end|><|endoftext|>"
    assert base.decode([*ids, 152_000]) == "x"  # a spare row of the model
    assert base.decode([151659]) == "<|fim_prefix|>"  # text to Qwen2.5, not special


# ---- save and load ----


def test_saved_and_loaded_it_is_the_same(instruct_folder: Path, tmp_path: Path) -> None:
    instruct = Tokenizer.load(instruct_folder)
    instruct.save(tmp_path / "one")
    again = Tokenizer.load(tmp_path / "one")
    text = "<|im_start|>user\nsum 1..10 — naïve<|im_end|><|mask|><|dlm_pad|>"
    assert again.encode(text, special=True) == instruct.encode(text, special=True)
    for name in ("mask_id", "pad_id", "eos_id", "terminator_ids", "vocab_size", "chat_template"):
        assert getattr(again, name) == getattr(instruct, name)
    again.save(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_transformers_reads_what_is_saved(base: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = HELLO + "x = 2048 <|mask|>"
    assert theirs(text)["input_ids"] == base.encode(text, special=True)
    assert (theirs.mask_token_id, theirs.pad_token_id) == (base.mask_id, base.pad_id)


def test_a_parent_gets_a_mask_at_the_next_free_id(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|mask|>", "<|other|>"))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no mask token '<\|mask\|>'; use the tokenizer saved with the model"):
        Tokenizer.load(tmp_path)
    parent = Tokenizer.load(tmp_path, add_mask=True)
    assert (parent.mask_id, parent.vocab_size) == (260, 261)
    assert parent.encode("a<|mask|>", special=True)[-1] == 260


def test_damaged_and_missing_files(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json, nor vocab.json and merges.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        Tokenizer.load(tmp_path)


def test_added_tokens_must_fit_the_vocabulary(instruct_folder: Path) -> None:
    (instruct_folder / "added_tokens.json").write_text(json.dumps({"<|mask|>": 151666}))
    with pytest.raises(CheckpointError, match=r"'<\|mask\|>' should be token 151666, is 151643"):
        Tokenizer.load(instruct_folder)


# ---- files as others write them: transformers is the oracle ----

FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
HIDDEN = {"content": "<hidden>", "special": True, **FLAGS}
ONE = {"content": "<one>", "special": True, **FLAGS, "rstrip": True}
FORMS: dict[str, dict[str, dict[str, object]]] = {  # files beside a tokenizer.json of 260 tokens
    "config lists it": {"tokenizer_config.json": {"mask_token": "<hidden>", "added_tokens_decoder": {"260": HIDDEN}}},
    "config lists two, which strip": {
        "tokenizer_config.json": {
            "mask_token": "<hidden>",
            "added_tokens_decoder": {"261": {**HIDDEN, "lstrip": True}, "260": {**HIDDEN, "content": "<one>"}},
        }
    },
    "config names it": {"tokenizer_config.json": {"pad_token": "<own pad>", "mask_token": "<hidden>"}},
    "an object names it": {"tokenizer_config.json": {"mask_token": {"__type": "AddedToken", **HIDDEN, "rstrip": True}}},
    "after additional tokens": {
        "tokenizer_config.json": {"mask_token": "<hidden>", "additional_special_tokens": ["<|im_start|>", "<one>"]}
    },
    "before extra tokens": {"tokenizer_config.json": {"extra_special_tokens": ["<one>"], "mask_token": "<hidden>"}},
    "extra tokens have names": {
        "tokenizer_config.json": {"extra_special_tokens": {"image_token": "<one>"}, "mask_token": "<hidden>"}
    },
    "a role of its own": {"tokenizer_config.json": {"image_token": "<one>", "mask_token": "<hidden>"}},
    "the map names it": {
        "tokenizer_config.json": {"mask_token": "<|endoftext|>"},
        "special_tokens_map.json": {"mask_token": {"content": "<hidden>", **FLAGS, "lstrip": True}},
    },
    "the map is overruled": {
        "tokenizer_config.json": {"mask_token": "<hidden>", "added_tokens_decoder": {"260": HIDDEN}},
        "special_tokens_map.json": {"mask_token": "<|endoftext|>"},
    },
    "tokens of the model's own": {
        "tokenizer_config.json": {
            "mask_token": "<hidden>",
            "model_specific_special_tokens": {"image_token": "<one>", "x_token": {"__type": "AddedToken", **ONE}},
        }
    },
    "tokens of the model's own are overruled": {
        "tokenizer_config.json": {
            "mask_token": "<hidden>",
            "image_token": "<one>",
            "model_specific_special_tokens": {"x_token": "<two>"},
        }
    },
    "an extra token that is text": {
        "tokenizer_config.json": {
            "mask_token": "<hidden>",
            "extra_special_tokens": [{"__type": "AddedToken", **HIDDEN, "content": "<one>", "special": False}],
        }
    },
    "a list of old, where nothing names one": {
        "tokenizer_config.json": {"mask_token": "<hidden>"},
        "added_tokens.json": {"<hidden>": 260, "<one>": 261},
    },
    "a list of old, where a list names one": {
        "tokenizer_config.json": {"mask_token": "<hidden>", "extra_special_tokens": ["<one>"]},
        "added_tokens.json": {"<hidden>": 260, "<one>": 261},
    },
    "a list of old is overruled": {
        "tokenizer_config.json": {"mask_token": "<hidden>", "added_tokens_decoder": {"260": HIDDEN}},
        "added_tokens.json": {"<one>": 261},
    },
    "a list of old": {"tokenizer_config.json": {"mask_token": "<hidden>"}, "added_tokens.json": {"<hidden>": 260}},
    "a word of the vocabulary": {"tokenizer_config.json": {"mask_token": "z"}},
    "bos is asked for": {"tokenizer_config.json": {"add_bos_token": True, "mask_token": "<|mask|>"}},
}


def write_files(folder: Path, tokenizer: Tokenizer, files: dict[str, dict[str, object]]) -> Path:
    """The vocabulary of `tokenizer` and other files; a value that is a string is not written as JSON."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_added_tokens_are_those_of_transformers(small: Tokenizer, tmp_path: Path, form: str) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(write_files(tmp_path, small, FORMS[form]))
    own = Tokenizer.load(tmp_path)
    assert (own.mask_token, own.mask_id) == (theirs.mask_token, theirs.mask_token_id)
    assert str(own.backend.get_added_tokens_decoder()) == str(theirs.added_tokens_decoder)
    for text in ("a <hidden> b<one>", "z<|im_end|> <own pad>  <hidden>"):
        ids = own.encode(text, special=True)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert own.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


TEMPLATE_FILES: dict[str, dict[str, object]] = {
    "text": {"tokenizer_config.json": {"chat_template": "A"}},
    "list": {"tokenizer_config.json": {"chat_template": [{"name": n, "template": n} for n in ("rag", "default")]}},
    "table": {"tokenizer_config.json": {"chat_template": {"content": "B", "default": "A"}}},
    "null and a file": {"tokenizer_config.json": {"chat_template": None}, "chat_template.jinja": "B"},
    "a file goes first": {"tokenizer_config.json": {"chat_template": "A"}, "chat_template.jinja": "B\r\nb"},
    "a folder of files": {"chat_template.jinja": "A", "additional_chat_templates/rag.jinja": "B"},
    "a folder goes before": {"chat_template.jinja": "A", "additional_chat_templates/default.jinja": "B"},
    "none": {},
}


@pytest.mark.parametrize("form", TEMPLATE_FILES)
def test_the_chat_template_is_that_of_transformers(small: Tokenizer, tmp_path: Path, form: str) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(write_files(tmp_path, small, TEMPLATE_FILES[form]))  # type: ignore[arg-type]
    expected = theirs.get_chat_template() if form != "none" else None
    assert Tokenizer.load(tmp_path).chat_template == expected


def test_templates_without_a_default_are_refused_when_a_chat_is_written(small: Tokenizer, tmp_path: Path) -> None:
    write_files(tmp_path, small, {"tokenizer_config.json": {"chat_template": {"rag": "A", "tool_use": "B"}}})
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("a")
    with pytest.raises(CheckpointError, match=r"of several chat templates \(rag, tool_use\) none is 'default'"):
        loaded.chat("hi")
    with pytest.raises(CheckpointError, match="chat_template=7 is not text"):
        Tokenizer(small.backend, config={"chat_template": 7}).chat("hi")


def test_the_template_of_a_processor_is_read_if_there_is_no_other(small: Tokenizer, tmp_path: Path) -> None:
    write_files(tmp_path, small, {"chat_template.json": {"chat_template": "{{ messages[0].content }}?"}})
    assert Tokenizer.load(tmp_path).chat("hi") == "hi?"


def test_byte_order_marks_are_skipped(small: Tokenizer, tmp_path: Path) -> None:
    write_files(tmp_path, small, {"tokenizer_config.json": {"eos_token": "<|endoftext|>"}, "chat_template.jinja": "A"})  # type: ignore[dict-item]
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.chat("hi")) == (small.backend.token_to_id("<|endoftext|>"), "A")


def test_settings_of_a_training_run_neither_cut_nor_pad(small: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    loaded = Tokenizer.load(write_files(tmp_path, Tokenizer(backend), {}))
    texts = ["a", "a long text"]
    assert loaded.encode_batch(texts) == [loaded.encode(text) for text in texts] == small.encode_batch(texts)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"added_tokens_decoder": {"400": HIDDEN}}}, "should be token 400, is 260"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"260": 3}}}, "tokenizer cannot be read"),
        ({"tokenizer_config.json": {"mask_token": 7}}, "special token 7 in tokenizer_config.json is not text"),
        ({"tokenizer_config.json": {"additional_special_tokens": [7]}}, "special token 7"),
    ],
)
def test_lists_of_tokens_that_make_no_sense(
    small: Tokenizer, tmp_path: Path, files: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(write_files(tmp_path, small, files))


def test_a_vocabulary_of_another_kind_is_not_read_as_qwens(instruct_folder: Path) -> None:
    config = instruct_folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(CheckpointError, match="is read as Qwen2's, not as GPT2Tokenizer's; save it with"):
        Tokenizer.load(instruct_folder)


# ---- prompts ----


def test_the_prompt_is_exact_and_survives(base: Tokenizer) -> None:
    assert base.chat("Write a sort.") == HELLO
    ids = base.encode_chat("Write a sort.")
    assert base.decode(ids, skip_special=False) == HELLO
    assert ids[-3:] == [151644, *base.encode("assistant\n")]


def test_conversations_and_systems(small: Tokenizer) -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "bye"},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "yes?<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert small.chat([{"role": "system", "content": "Be brief."}, *turns]) == expected
    assert small.chat(turns) == expected.replace("Be brief.", "You are a helpful assistant.")


def test_a_checkpoints_own_template_is_used(small: Tokenizer) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}"
        "{% if add_generation_prompt %}[bot]{% endif %}"
    )
    own = Tokenizer(small.backend, config={"chat_template": template, "eos_token": "<|endoftext|>"})
    assert own.chat("hi") == "[user] hi<|endoftext|>\n[bot]"
    with pytest.raises(PromptError, match="template rejects these messages: never"):
        own.chat("no")


def test_the_template_is_read_from_its_own_file_and_kept(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.chat("hi") == "hi!"
    loaded.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").chat("hi") == "hi!"


def test_a_template_cannot_reach_out_of_its_sandbox(small: Tokenizer) -> None:
    own = Tokenizer(small.backend, config={"chat_template": "{{ messages.__class__.__mro__[1].__subclasses__() }}"})
    with pytest.raises(PromptError):
        own.chat("hi")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "holds nothing to answer"),
        ([{"role": "user"}], "needs a text content"),
        ([{"role": "robot", "content": "x"}], "role: system, user or assistant"),
    ],
)
def test_messages_that_cannot_be_written(small: Tokenizer, messages: list[dict[str, str]], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        small.chat(messages)


def test_templates_see_what_transformers_shows_them(small: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    template = "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}{{ pad_token }}"
    roles = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|endoftext|>"}}
    own = Tokenizer(small.backend, config={"chat_template": template, **roles})
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=small.backend, bos_token="<|im_start|>", eos_token="<|endoftext|>"
    )
    for text in ("a", " <|im_end|> ", "é\n"):
        spoken = [{"role": "user", "content": text}]
        expected = theirs.apply_chat_template(spoken, chat_template=template, tokenize=False)
        assert own.chat(text) == expected


# ---- names of control tokens in users' text ----


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return Tokenizer(tokenizer.backend, config={"chat_template": template, **roles})


@settings(deadline=None)
@given(text=SPELLED)
def test_any_text_is_its_characters(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.special_ids.isdisjoint(ids)
    assert small.decode(ids) == text


def test_a_control_token_is_known_by_its_flag_its_role_or_its_form(small: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    text_tokens = ["<|fim_prefix|>", "<\uff5cUser\uff5c>", "<end>", "<tool_call>"]
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in text_tokens])
    own = Tokenizer(backend, config={"eos_token": "<end>"})
    plain = [len(own.encode(token)) > 1 for token in text_tokens]
    assert plain == [True, True, True, False]  # a tool call is text to Qwen
    assert all(own.encode(token, special=True) == [backend.token_to_id(token)] for token in text_tokens)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(deadline=None, max_examples=30)
@given(contents=st.lists(SPELLED, min_size=1, max_size=3))
def test_a_chat_has_the_control_tokens_that_its_template_writes(
    small: Tokenizer, template: str | None, contents: list[str]
) -> None:
    own = with_template(small, template)
    turns = [{"role": "user", "content": content} for content in contents]
    ids = own.encode_chat(turns)
    empty = own.encode(own.chat([{**turn, "content": ""} for turn in turns]), special=True)
    assert [id_ for id_ in ids if id_ in own.special_ids] == [id_ for id_ in empty if id_ in own.special_ids]
    assert own.decode(ids, skip_special=False) == own.chat(turns)


def test_control_tokens_take_blanks_as_they_do_without_a_spelled_one(small: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    backend.add_special_tokens([AddedToken("<|left|>", lstrip=True), AddedToken("<|right|>", rstrip=True)])
    own = Tokenizer(backend, config={"chat_template": "{{ messages[0].content }} <|left|> a <|right|>  b<|im_end|>"})
    before = own.encode("x<|im_end|>")
    assert own.encode_chat("x<|im_end|>") == [*before, *own.encode(" <|left|> a <|right|>  b<|im_end|>", special=True)]


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_character_is_lost_in_a_chat(small: Tokenizer, template: str | None) -> None:
    own = with_template(small, template)
    for text in ("a\ufdd0b", "\ufdd0<|im_end|>\ufdd0", "<|\ufdd0"):
        assert own.decode(own.encode_chat(text), skip_special=False) == own.chat(text)
    with pytest.raises(PromptError, match="is not Unicode"):
        own.encode_chat("a\udc00<|im_end|>")


def test_a_control_token_of_one_character_is_text_in_a_message(small: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    backend.add_special_tokens([AddedToken("\u241f"), AddedToken("\u241f\u241f")])
    own = Tokenizer(backend, config={"chat_template": "{{ messages[0].content }}\u241f"})
    ids = own.encode_chat("a\u241fb\u241f\u241f")
    assert [id_ for id_ in ids if id_ in own.special_ids] == [backend.token_to_id("\u241f")]
    assert own.decode(ids, skip_special=False) == "a\u241fb\u241f\u241f\u241f"


@pytest.mark.parametrize("template", TEMPLATES[:-1])
def test_a_message_cannot_forge_a_conversation(small: Tokenizer, template: str | None) -> None:
    own = with_template(small, template)
    real = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go"},
    ]
    before, _, after = own.chat("\0").partition("\0")
    forged = own.chat(real).removeprefix(before).removesuffix(after)
    assert own.chat(forged) == own.chat(real)
    assert own.encode_chat(forged) != own.encode_chat(real)


@pytest.mark.parametrize("template", TEMPLATES[1:])
@pytest.mark.parametrize(
    "content", ["hi", " a <b> | c é\n", "<tool_call>x</tool_call>", "so</think>\n\nyes", "is a <|", ""]
)
def test_a_chat_is_encoded_as_by_transformers(base: Tokenizer, template: str, content: str) -> None:
    from transformers import PreTrainedTokenizerFast

    own = with_template(base, template)
    theirs = PreTrainedTokenizerFast(tokenizer_object=base.backend, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    encoded = theirs.apply_chat_template(turns, chat_template=template, add_generation_prompt=True)
    assert own.encode_chat(turns) == encoded["input_ids"]


def test_a_spelled_token_leaves_the_rest_of_the_chat_as_it_was(base: Tokenizer) -> None:
    ids = base.encode_chat("Explain\n<|im_end|> to me", prefill="```python\n")
    before, _, after = HELLO.partition("Write a sort.")
    quoted = base.encode("user\nExplain\n<|im_end|> to me")
    header = base.encode(before.removesuffix("user\n"), special=True)
    assert ids == [*header, *quoted, *base.encode(after + "```python\n", special=True)]
    assert base.encode_chat("x", prefill="```python\n") == base.encode(base.chat("x") + "```python\n", special=True)


# ---- bytes ----


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 259), max_size=12))
def test_bytes_and_pieces_together_are_the_text(small: Tokenizer, ids: list[int]) -> None:
    whole = small.decode(ids, skip_special=False)
    assert b"".join(map(small.token_bytes, ids)).decode(errors="replace") == whole
    assert "".join(small.pieces(ids)) == whole


def test_a_character_belongs_to_its_last_token(small: Tokenizer) -> None:
    assert small.pieces(small.encode("aé日")) == ["a", "", "é", "", "", "日"]
    assert [small.token_bytes(id_) for id_ in small.encode("é")] == [b"\xc3", b"\xa9"]
    assert small.token_bytes(small.mask_id) == b"<|mask|>"
    assert small.token_bytes(10_000) == b""  # a spare row of the model


def test_bytes_of_a_vocabulary_with_byte_fallback() -> None:
    vocabulary = {"<unk>": 0, "\u2581def": 1, "<0xE6>": 2, "<0x97>": 3, "<0xA5>": 4, "é": 5, "<|mask|>": 6}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    own = Tokenizer(backend)
    assert own.pieces([1, 2, 3, 4, 5]) == [" def", "", "", "日", "é"]
    assert "".join(own.pieces([1, 2, 3, 4, 5])) == own.decode([1, 2, 3, 4, 5])


# ---- many texts at once ----


def test_a_batch_is_encoded_like_each_of_its_texts(small: Tokenizer) -> None:
    texts = ["a", "", "é<|mask|>", "<|im_end|>\n" * 3]
    for special in (True, False):
        assert small.encode_batch(texts, special=special) == [small.encode(t, special=special) for t in texts]
    assert small.encode_batch([]) == []
    with pytest.raises(PromptError, match=r"text '\\udcff' is not Unicode"):
        small.encode_batch(["a", "\udcff"])


def test_a_turn_ends_with_its_own_token_or_the_end_of_text(small: Tokenizer) -> None:
    assert small.turn_end_id == small.backend.token_to_id("<|im_end|>") != small.eos_id
    text = small.backend.to_str().replace("<|im_end|>", "<|other|>")
    assert Tokenizer(tokenizers.Tokenizer.from_str(text)).turn_end_id == small.eos_id


# ---- holes ----


def test_holes_split_text() -> None:
    assert split_holes("def f(xs):\n    <|hole|>\n    return <|hole:12|>\n") == [
        "def f(xs):\n    ",
        Hole(),
        "\n    return ",
        Hole(12),
        "\n",
    ]
    assert split_holes("<|hole|><|hole:1|>") == [Hole(None), Hole(1)]
    assert split_holes("no hole <|mask|>") == ["no hole <|mask|>"]
    assert split_holes("") == []
    assert split_holes("x = '<|hole'\ny = '|>'") == ["x = '<|hole'\ny = '|>'"]


def test_many_beginnings_of_holes_take_linear_time() -> None:
    text = "<|hole" * 200_000  # in quadratic time an hour
    assert split_holes(text) == [text]


@pytest.mark.parametrize(
    "hole", ["<|hole:|>", "<|hole:0|>", "<|hole:-3|>", "<|hole:x|>", "<|holes|>", "<|hole:9999999|>"]
)
def test_malformed_holes(hole: str) -> None:
    with pytest.raises(PromptError, match="is malformed; write"):
        split_holes(f"a {hole} b")


# ---- half-written text ----


def test_masks_show_as_placeholders(small: Tokenizer) -> None:
    mask = small.mask_id
    assert small.decode_partial([*small.encode("ab"), mask, mask, *small.encode("c")]) == f"ab{PLACEHOLDER * 2}c"
    assert small.decode_partial([mask, *small.encode("c<|endoftext|>", special=True)]) == f"{PLACEHOLDER}c"
    assert small.decode_partial([]) == ""


def test_half_a_character_shows_as_a_placeholder(small: Tokenizer) -> None:
    ids = small.encode("a🙂b")  # 1 + 4 + 1 bytes, one token each
    assert len(ids) == 6
    mask = small.mask_id
    for hidden in range(1, 5):  # any one byte of the character still masked
        partial = small.decode_partial([mask if i == hidden else id_ for i, id_ in enumerate(ids)])
        assert (partial[0], set(partial[1:-1]), partial[-1]) == ("a", {PLACEHOLDER}, "b")
    assert small.decode_partial(ids[:3]) == f"a{PLACEHOLDER}"
    assert small.decode_partial(ids[1:2]) == PLACEHOLDER
    assert small.decode_partial(ids) == "a🙂b"
