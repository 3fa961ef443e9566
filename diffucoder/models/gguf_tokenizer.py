"""The vocabulary inside a GGUF file: read a tokenizer from its metadata, and write one into it.

A GGUF does not hold how text is cut into words before merging, only a name for it (`tokenizer.ggml.pre`). A wrong
pre-tokenizer gives wrong ids silently (transformers leaves SmolLM's digits uncut), so unknown names are rejected.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from diffucoder.errors import CheckpointError
from diffucoder.model_files import one_line, shown
from diffucoder.tokenizer import MASK_TOKEN, Tokenizer
from diffucoder.tokenizer_checks import check_names
from diffucoder.tokenizer_files import add_special, qwen2_words

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
# every known pre-tokenizer cuts this differently: digits, contractions, marks, blanks, line ends, scripts
_SAMPLE = (
    "Don't WE'VE we'll\n\n  x1 = 12345.678 ²½ \t\t y\r\n   __init__(self,\u00a0é)  日本語 ١٢٣ £$%^&*\n हिन्दी ...\n\t \n"
)


def read_tokenizer(file: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE that the metadata of `file` describes, with roles and chat template, and a mask token added.

    CheckpointError if it is of another kind, has an unknown pre-tokenizer, or is damaged.
    """
    kind = fields.get("tokenizer.ggml.model")
    pre = fields.get("tokenizer.ggml.pre")
    known = _pre_tokenizers()
    if kind != "gpt2" or not isinstance(pre, str) or pre not in known:
        raise CheckpointError(
            f"{file}: tokenizer.ggml.model={shown(kind)} with tokenizer.ggml.pre={shown(pre)} is not supported and "
            f"would give wrong ids; use a GGUF of gpt2 with {' or '.join(known)}, or the parent's folder with its "
            "tokenizer.json"
        )
    try:
        backend = _read_bpe(fields)
        config = _read_roles(fields)
    except Exception as error:  # tokenizers raises bare Exceptions, whatever is wrong with a vocabulary
        raise CheckpointError(f"{file}: tokenizer cannot be read ({one_line(repr(error))}); fetch it again") from error
    backend.pre_tokenizer = known[pre]
    add_special(backend, MASK_TOKEN)
    return Tokenizer(backend, config=config)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, *, rows: int) -> None:
    """Add what llama.cpp needs about `tokenizer` to a `gguf.GGUFWriter`, with an entry for each of the model's `rows`.

    CheckpointError if llama.cpp has no name for the pre-tokenizer.
    """
    backend = tokenizer.backend
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_of_pre_tokenizer(backend))
    tokens = [f"[PAD{id_}]" for id_ in range(rows)]
    types = [UNUSED] * rows
    for token, id_ in backend.get_vocab(with_added_tokens=True).items():
        tokens[id_] = token
        types[id_] = NORMAL
    for id_, added in backend.get_added_tokens_decoder().items():
        types[id_] = CONTROL if added.special else USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_mask_token_id(tokenizer.mask_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _read_bpe(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Vocabulary, merges and added tokens. Raises whatever tokenizers does if they are damaged."""
    types = list(fields["tokenizer.ggml.token_type"])
    while types and types[-1] == UNUSED:  # names of spare rows: the mask gets the first of them
        types.pop()
    tokens = fields["tokenizer.ggml.tokens"][: len(types)]
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ValueError("two tokens have the same name")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.decoder = decoders.ByteLevel()
    added = []
    for token, type_ in zip(tokens, types, strict=False):
        if type_ in (CONTROL, USER_DEFINED):
            added.append(AddedToken(token, special=type_ == CONTROL, normalized=False))
    check_names([token.content for token in added], "tokenizer.ggml.tokens")
    backend.add_tokens(added)
    return backend


def _read_roles(fields: Mapping[str, Any]) -> dict[str, str]:
    """What would be in a `tokenizer_config.json`: special tokens by role, and the chat template."""
    config = {}
    for role, name in _ROLES.items():
        id_ = fields.get(f"tokenizer.ggml.{name}_token_id")
        if id_ is not None:
            config[role] = fields["tokenizer.ggml.tokens"][id_]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return config


def _pre_tokenizers() -> dict[str, pre_tokenizers.PreTokenizer]:
    """The known ways to cut text into words, by llama.cpp's names (`tokenizer.ggml.pre`)."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return {"qwen2": qwen2_words(), "smollm": pre_tokenizers.Sequence([digits, gpt2_words])}


def _name_of_pre_tokenizer(backend: tokenizers.Tokenizer) -> str:
    """llama.cpp's name for the way `backend` cuts text: the known pre-tokenizer that cuts a sample the same way."""
    known = _pre_tokenizers()
    unchanged = backend.normalizer is None or backend.normalizer.normalize_str(_SAMPLE) == _SAMPLE
    if isinstance(backend.model, models.BPE) and backend.pre_tokenizer is not None and unchanged:
        pieces = backend.pre_tokenizer.pre_tokenize_str(_SAMPLE)
        for name, pre_tokenizer in known.items():
            if pre_tokenizer.pre_tokenize_str(_SAMPLE) == pieces:
                return name
    raise CheckpointError(
        f"tokenizer cuts text in a way that this export has no name for (known: {', '.join(known)}), so llama.cpp "
        "would give other ids; export a model whose tokenizer is one of those"
    )
