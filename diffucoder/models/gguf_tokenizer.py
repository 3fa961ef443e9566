"""The vocabulary inside a GGUF file: a tokenizer out of its metadata, and into it.

For: ids equal to llama.cpp's, whichever of the two reads the text. Not for: files and weights (`gguf`).

A GGUF does not hold how text is cut into words before merging, only a name for it (`tokenizer.ggml.pre`). A wrong way
of cutting gives wrong ids in silence (transformers leaves SmolLM's digits uncut), so unknown names are refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from diffucoder.errors import CheckpointError
from diffucoder.tokenizer import MASK_TOKEN, Tokenizer, add_special, qwen2_words

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types
_KEY = "tokenizer.ggml."
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
# cut differently by all pre-tokenizers we know of: digits, contractions, marks, blanks, line ends, scripts
_PROBE = (
    "Don't WE'VE we'll\n\n  x1 = 12345.678 ²½ \t\t y\r\n   __init__(self,\u00a0é)  日本語 ١٢٣ £$%^&*\n हिन्दी ...\n\t \n"
)


def read_tokenizer(file: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE that the metadata of `file` describes, with roles and chat template, and a mask token added.

    CheckpointError where it is of another kind, cuts text in a way not known here, or is damaged.
    """
    kind, pre = fields.get(f"{_KEY}model"), fields.get(f"{_KEY}pre")
    splitters = _splitters()
    if kind != "gpt2" or pre not in splitters:
        known = " or ".join(splitters)
        raise CheckpointError(
            f"{file}: tokenizer.ggml.model={kind!r} with tokenizer.ggml.pre={pre!r} is not understood, and would give "
            f"wrong ids; use a GGUF of gpt2 with {known}, or the parent's folder with its tokenizer.json"
        )
    try:
        tokens, types = fields[f"{_KEY}tokens"], list(fields[f"{_KEY}token_type"])
        while types and types[-1] == UNUSED:  # names for spare rows: the mask wants the first of them
            types.pop()
        vocabulary = {token: id_ for id_, token in enumerate(tokens[: len(types)])}
        merges = [tuple(merge.split(" ")) for merge in fields[f"{_KEY}merges"]]
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        roles = {role: fields.get(f"{_KEY}{name}_token_id") for role, name in _ROLES.items()}
        config = {role: tokens[id_] for role, id_ in roles.items() if id_ is not None}
    except Exception as error:  # tokenizers raises bare Exceptions, whatever is wrong with a vocabulary
        raise CheckpointError(f"{file}: tokenizer cannot be read ({error!r}); fetch it again") from error
    backend.pre_tokenizer = splitters[pre]
    backend.decoder = decoders.ByteLevel()
    added = [(token, type_) for token, type_ in zip(tokens, types, strict=False) if type_ in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, special=type_ == CONTROL, normalized=False) for token, type_ in added])
    add_special(backend, MASK_TOKEN)
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return Tokenizer(backend, config=config)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, *, rows: int) -> None:
    """Add to the metadata of a `gguf.GGUFWriter` all that llama.cpp needs of `tokenizer`.

    The vocabulary gets an entry for each of the model's `rows`, spare ones named as such. CheckpointError where
    llama.cpp has no name for the way text is cut.
    """
    backend = tokenizer.backend
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_of_splitter(backend))
    spelt = {id_: token for token, id_ in backend.get_vocab(with_added_tokens=True).items()}
    types = dict.fromkeys(spelt, NORMAL)
    types |= {i: CONTROL if token.special else USER_DEFINED for i, token in backend.get_added_tokens_decoder().items()}
    writer.add_token_list([spelt.get(id_, f"[PAD{id_}]") for id_ in range(rows)])
    writer.add_token_types([types.get(id_, UNUSED) for id_ in range(rows)])
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, id_ in (
        (writer.add_bos_token_id, tokenizer.bos_id),
        (writer.add_eos_token_id, tokenizer.eos_id),
        (writer.add_pad_token_id, tokenizer.pad_id),
        (writer.add_mask_token_id, tokenizer.mask_id),
    ):
        if id_ is not None:
            add(id_)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _splitters() -> dict[str, pre_tokenizers.PreTokenizer]:
    """How text is cut into words, by what `tokenizer.ggml.pre` calls it."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return {"qwen2": qwen2_words(), "smollm": pre_tokenizers.Sequence([digits, gpt2_words])}


def _name_of_splitter(backend: tokenizers.Tokenizer) -> str:
    """What `tokenizer.ggml.pre` calls the way `backend` cuts text, found by cutting one that tells all apart."""

    def cut(splitter: pre_tokenizers.PreTokenizer | None) -> list[str]:
        return [piece for piece, _ in splitter.pre_tokenize_str(_PROBE)] if splitter else [_PROBE]

    unchanged = backend.normalizer is None or backend.normalizer.normalize_str(_PROBE) == _PROBE
    if isinstance(backend.model, models.BPE) and unchanged:
        for name, known in _splitters().items():
            if cut(known) == cut(backend.pre_tokenizer):
                return name
    raise CheckpointError(
        f"tokenizer cuts text in a way this export has no name for (known: {', '.join(_splitters())}), so llama.cpp "
        "would give other ids; export a model whose tokenizer is one of those"
    )
