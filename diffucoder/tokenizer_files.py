"""The files of a tokenizer: vocabulary, added tokens, settings and chat templates, read as transformers reads them.

Each file is read by `model_files`, and `tokenizer_checks` says which kinds of tokenizers are.

DiffuCoder ships no `tokenizer.json`, only Qwen2's `vocab.json` and `merges.txt` and a list of added tokens; both forms
are read. Not for: what the tokens mean (`tokenizer`).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, pre_tokenizers

from diffucoder.errors import CheckpointError
from diffucoder.files import Json
from diffucoder.model_files import one_line, read_json, read_model_text, shown
from diffucoder.tokenizer_checks import check_names, check_tokenizer_json

# Added tokens that are text to Qwen2.5, so decoding keeps them
_QWEN_TEXT = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
    <|file_sep|>""".split()
# Control tokens by their form, whatever their flags: llama.cpp's rule. DeepSeek's has full-width bars
CONTROL = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_MAX_TEMPLATES = 50
ROLES = [f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # in transformers' order


def add_special(backend: tokenizers.Tokenizer, token: str) -> None:
    """Give `backend` a special `token` at the next free id, unless it has that token already."""
    if backend.token_to_id(token) is None:
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def qwen2_words() -> pre_tokenizers.PreTokenizer:
    """Return Qwen2's pre-tokenizer, which splits text into words; merges stay within a word."""
    words: pre_tokenizers.PreTokenizer = _qwen2_backend().pre_tokenizer
    return words


def read_config(folder: Path) -> Json:
    """Return `tokenizer_config.json`, completed from other files in which some checkpoints keep parts of it.

    Which file overrules which is as in transformers: it reads the map of special tokens only where the config describes
    no added tokens, and templates in files of their own before others.
    """
    config = read_json(folder / "tokenizer_config.json")
    tokens = read_json(folder / "special_tokens_map.json")
    if "added_tokens_decoder" in config:
        tokens.pop("additional_special_tokens", None)
        config = tokens | config
    else:
        config |= tokens
    legacy = read_json(folder / "chat_template.json").get("chat_template")  # of models with processors
    config["chat_template"] = _template_files(folder) or config.get("chat_template") or legacy
    return config


def _template_files(folder: Path) -> dict[str, str]:
    """The chat templates that have files of their own, by name."""
    templates = {}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))[:_MAX_TEMPLATES]:
        templates[path.stem] = read_model_text(path, folder=folder)
    templates.setdefault("default", read_model_text(folder / "chat_template.jinja"))
    return {name: re.sub("\r\n?", "\n", text) for name, text in templates.items() if text is not None}


def read_backend(folder: Path, config: Json) -> tokenizers.Tokenizer:
    """The vocabulary in `folder`, from `tokenizer.json` or from `vocab.json` and `merges.txt`, and all added tokens."""
    try:
        backend = _read_vocabulary(folder, config)
        backend.no_truncation()  # some files keep the settings of a training run
        backend.no_padding()
        named = _named_tokens(config)
        listed = dict(sorted(_added_tokens(folder, config, named, backend.get_added_tokens_decoder()).items()))
        check_names([token.content for token in (*listed.values(), *named)], folder)
        backend.add_tokens(list(listed.values()))
        for id_, token in listed.items():
            assigned = backend.token_to_id(token.content)
            if assigned != id_:  # ids are assigned in order: a gap or a clash shifts all later ones
                message = f"{shown(token.content)} should be token {id_}, is {assigned}; fetch its files again"
                raise CheckpointError(f"{folder}: {message}")
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens([token for token in named if token.content not in added])
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions, whatever is wrong with a file
        reason = one_line(error)
        raise CheckpointError(f"{folder}: tokenizer cannot be read ({reason}); fetch it again") from error
    return backend


def _read_vocabulary(folder: Path, config: Json) -> tokenizers.Tokenizer:
    """Return the tokenizer without the additions of the config. Raises the errors of tokenizers for damaged files."""
    if (folder / "tokenizer.json").exists():
        fields = read_json(folder / "tokenizer.json")
        check_tokenizer_json(fields, folder / "tokenizer.json")
        return tokenizers.Tokenizer.from_str(json.dumps(fields))  # what was checked: a key may be there twice
    vocabulary = read_json(folder / "vocab.json")
    merges = read_model_text(folder / "merges.txt")
    if not vocabulary or merges is None:
        raise CheckpointError(f"{folder} has no tokenizer.json, nor vocab.json and merges.txt")
    kind = str(config.get("tokenizer_class") or "Qwen2")
    if not kind.startswith(("Qwen2", "Dream", "PreTrained")):
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and vocab.json is read as Qwen2's, not as {one_line(kind)}'s; save it "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    check_tokenizer_json({"model": {"vocab": vocabulary}}, folder / "vocab.json")
    pairs = []
    for line in merges.replace("\r\n", "\n").split("\n"):
        if line and not line.startswith("#version"):
            first, second = line.split(" ")
            pairs.append((first, second))
    backend: tokenizers.Tokenizer = _qwen2_backend(vocabulary, pairs)
    return backend


def _added_tokens(
    folder: Path, config: Json, named: list[AddedToken], present: Mapping[int, AddedToken]
) -> dict[int, AddedToken]:
    """Return the tokens that the checkpoint adds to its vocabulary, by id, without those `present` in it.

    Those of `added_tokens.json` that no role and no list names are text, unless they look like control tokens.
    """
    tokens = {}
    special = [token.content for token in named if token.special]
    if "added_tokens_decoder" not in config:
        for name, id_ in read_json(folder / "added_tokens.json").items():
            if id_ not in present or present[id_].content != name:
                hidden = name in special or (CONTROL.fullmatch(name) is not None and name not in _QWEN_TEXT)
                normalized = not hidden and name not in _QWEN_TEXT
                tokens[id_] = AddedToken(name, special=hidden, normalized=normalized)
    roles = [token_name(value) for value in role_tokens(config).values()]
    for id_, described in (config.get("added_tokens_decoder") or {}).items():
        tokens[int(id_)] = AddedToken(**described)
        tokens[int(id_)].special |= described["content"] in roles
    return tokens


def role_tokens(config: Json) -> Json:
    """Return the tokens that a config names, as they are written, in the order in which transformers gives them ids."""
    tokens = {role: config[role] for role in ROLES if config.get(role)}
    others = [name for name in config if name.endswith("_token") and name not in ROLES]
    own = {name: config[name] for name in others if isinstance(config[name], (str, Mapping)) and config[name]}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    if isinstance(extra, Mapping):
        own |= extra
    return tokens | (own or config.get("model_specific_special_tokens") or {})


def _named_tokens(config: Json) -> list[AddedToken]:
    """The special tokens that the config names, in the order that transformers gives them ids."""
    values = [(value, True) for value in role_tokens(config).values()]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, Mapping):
        values += [(value, not isinstance(value, Mapping) or bool(value.get("special"))) for value in extra]
    tokens = []
    for value, special in values:
        flags: Json = {"normalized": False}
        if isinstance(value, Mapping):
            flags = {name: value[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in value}
        name = token_name(value)
        if name:
            tokens.append(AddedToken(name, special=special, **flags))
    return tokens


def token_name(token: Any) -> str | None:  # Any: from a file
    """The text of a token, which is a string or an object with its content; None for null. Raises CheckpointError."""
    if isinstance(token, Mapping):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise CheckpointError(f"special token {shown(token)} in tokenizer_config.json is not text; fetch it again")
    return token


def _qwen2_backend(vocabulary: Json | None = None, merges: list[tuple[str, str]] | None = None) -> Any:
    """Qwen2's byte-level BPE without added tokens; an empty one without a vocabulary. Any: as transformers has it."""
    from transformers import Qwen2Tokenizer  # late: slow to import

    return Qwen2Tokenizer(vocabulary, merges, unk_token=None, eos_token=None, pad_token=None).backend_tokenizer
