"""The files of a tokenizer: vocabulary, added tokens, settings and chat templates, read as transformers reads them.

DiffuCoder ships no `tokenizer.json`, only Qwen2's `vocab.json` and `merges.txt` and a list of added tokens; both forms
are read. Not for: what the tokens mean (`tokenizer`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, pre_tokenizers

from diffucoder.errors import CheckpointError
from diffucoder.files import Json
from diffucoder.model_files import read_json

# Added tokens that are text to Qwen2.5, so decoding keeps them
_QWEN_TEXT = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
    <|file_sep|>""".split()
ROLES = [f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # in transformers' order


def add_special(backend: tokenizers.Tokenizer, token: str) -> None:
    """Give `backend` a special `token` at the next free id, unless it has that token already."""
    if backend.token_to_id(token) is None:
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def qwen2_words() -> pre_tokenizers.PreTokenizer:
    """Qwen2's pre-tokenizer: it cuts text into the words that merges stay within."""
    words: pre_tokenizers.PreTokenizer = _qwen2_backend().pre_tokenizer
    return words


def read_config(folder: Path) -> Json:
    """`tokenizer_config.json`, completed by the files that some checkpoints keep parts of it in.

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
    try:
        paths = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
        if (folder / "chat_template.jinja").exists():
            paths.setdefault("default", folder / "chat_template.jinja")
        files = {name: path.read_text(encoding="utf-8-sig") for name, path in paths.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: chat template cannot be read ({error}); fetch it again") from error
    legacy = read_json(folder / "chat_template.json").get("chat_template")  # of models with processors
    config["chat_template"] = files or config.get("chat_template") or legacy
    return config


def read_backend(folder: Path, config: Json) -> tokenizers.Tokenizer:
    """The vocabulary in `folder`, from `tokenizer.json` or from `vocab.json` and `merges.txt`, and all added tokens."""
    whole = folder / "tokenizer.json"
    vocabulary = folder / "vocab.json"
    merges = folder / "merges.txt"
    if not whole.exists() and not (vocabulary.exists() and merges.exists()):
        raise CheckpointError(f"{folder} has no tokenizer.json, nor vocab.json and merges.txt")
    kind = str(config.get("tokenizer_class") or "Qwen2")
    if not whole.exists() and not kind.startswith(("Qwen2", "Dream", "PreTrained")):
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and vocab.json is read as Qwen2's, not as {kind}'s; save it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        if whole.exists():
            backend = tokenizers.Tokenizer.from_str(read_text(whole))
        else:
            backend = _qwen2_backend(str(vocabulary), str(merges))
        backend.no_truncation()  # some files keep the settings of a training run
        backend.no_padding()
        present = backend.get_added_tokens_decoder()
        listed = _added_tokens(folder, config, present)
        named = _named_tokens(config)
    except Exception as error:  # tokenizers raises bare Exceptions, whatever is wrong with a file
        raise CheckpointError(f"{folder}: tokenizer cannot be read ({error}); fetch it again") from error
    names = [token.content for token in named]
    for id_, token in sorted(listed.items()):
        token.special = token.special or token.content in names
        backend.add_tokens([token])
        assigned = backend.token_to_id(token.content)
        if assigned != id_:  # ids are assigned in order: a gap or a clash shifts all later ones
            message = f"{token.content!r} should be token {id_}, is {assigned}; fetch its files again"
            raise CheckpointError(f"{folder}: {message}")
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([token for token in named if token.content not in added])
    return backend


def _added_tokens(folder: Path, config: Json, present: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
    """The tokens that the checkpoint adds to its vocabulary, by id, besides those that are `present` in it."""
    tokens = {}
    for name, id_ in read_json(folder / "added_tokens.json").items():
        if id_ not in present or present[id_].content != name:
            tokens[id_] = AddedToken(name, special=name not in _QWEN_TEXT, normalized=False)
    for id_, described in (config.get("added_tokens_decoder") or {}).items():
        tokens[int(id_)] = AddedToken(**described)
    return tokens


def _named_tokens(config: Json) -> list[AddedToken]:
    """The special tokens that the config names, in the order that transformers gives them ids."""
    others = [name for name in config if name.endswith("_token") and isinstance(config[name], (str, Mapping))]
    values = [config.get(name) for name in dict.fromkeys([*ROLES, *others])]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values += extra.values() if isinstance(extra, Mapping) else extra
    tokens = []
    for value in values:
        flags: Json = {}
        if isinstance(value, Mapping):
            flags = {name: value[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in value}
        content = token_name(value)
        if content:
            tokens.append(AddedToken(content, special=True, **flags))
    return tokens


def token_name(token: Any) -> str | None:  # Any: from a file
    """The text of a token, which is a string or an object with its content; None for null. Raises CheckpointError."""
    if isinstance(token, Mapping):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise CheckpointError(f"special token {token!r} in tokenizer_config.json is not text; fetch the file again")
    return token


def _qwen2_backend(vocabulary: str | None = None, merges: str | None = None) -> Any:  # Any: as transformers has it
    """Qwen2's byte-level BPE without added tokens, from the paths of two files; without files an empty one."""
    from transformers import Qwen2Tokenizer  # late: slow to import

    return Qwen2Tokenizer(vocabulary, merges, unk_token=None, eos_token=None, pad_token=None).backend_tokenizer
