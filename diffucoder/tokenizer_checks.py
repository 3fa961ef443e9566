"""Which tokenizer.json files are read: those whose parts cost time and memory in proportion to the text.

For: files from anybody. The library that reads them ends the process, or works for hours, on some parts:
expressions that backtrack, replacements that grow, prefixes that are longer than a token. Published tokenizers of the
supported models have few kinds of parts, which are listed here; expressions that are not known are tried first, in a
process of their own. Not for: reading (`tokenizer_files`).
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from diffucoder.errors import CheckpointError
from diffucoder.files import Json
from diffucoder.limited import Limited, LimitError
from diffucoder.model_files import one_line, shown

_KINDS = {
    "model": {"BPE", "WordLevel"},
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace"},
    "pre_tokenizer": {"ByteLevel", "Split", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation", "Metaspace"},
    "post_processor": {"ByteLevel", "TemplateProcessing", "RobertaProcessing", "BertProcessing"},
    "decoder": {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"},
}
_ONCE = {"ByteLevel", "Metaspace"}  # twice they make bytes of bytes
_MAX_PARTS = 16
_MAX_GROWTH = 16  # times, by all replacements together
_MAX_NAME = 256  # characters of an added token
_MAX_NAMES = 2**17  # characters of all added tokens
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN_EXPRESSIONS = {
    _QWEN2,
    _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"),  # Llama 3's
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2's
    r"\p{N}{1,3}",
    r"\p{N}",
}
# an expression of DeepSeek-Coder's that backtracks, and one that cuts the same in linear time
_LINEAR = {r"\s+$": r"(?<!\s)\s+$"}
_REFERENCES = re.compile(r"\\[gk1-9]")
_TRIED = Limited(seconds=10, memory=2**30)
_TRIED_LENGTH = 20_000


def check_tokenizer_json(fields: Json, path: Path) -> None:
    """Raise CheckpointError unless the parts of a tokenizer.json are known and bounded, or the errors of wrong types.

    An expression that has a linear equivalent is replaced by it in `fields`.
    """
    model = fields["model"]
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise CheckpointError(f"{path}: model has {name}={shown(model[name])}, which is not supported")
    check_names([token["content"] for token in fields.get("added_tokens") or ()], path)
    _check_ids(fields, path)
    fields = {**fields, "model": {"type": model.get("type", "BPE")}}  # the oldest files have no type
    for part, kinds in _KINDS.items():
        steps = list(_steps(fields.get(part)))
        reason = _reason_against(steps, kinds)
        if reason:
            raise CheckpointError(f"{path}: {part} {reason}")
        patterns = [step for step in steps if step["type"] == "Replace" or _is_unknown(step.get("pattern") or {})]
        try:
            if patterns:
                _TRIED(try_patterns, patterns, part == "decoder")
        except LimitError as error:
            tried = shown([step["pattern"] for step in patterns])
            raise CheckpointError(
                f"{path}: {part} cannot replace or cut text by {tried} ({one_line(error)}); leave that step out"
            ) from None


def check_names(names: Iterable[str], place: object) -> None:
    """Raise CheckpointError for added tokens that are too long or too many to search for in each text."""
    total = 0
    for name in names:
        if len(name) > _MAX_NAME:
            start = one_line(name[:40])
            raise CheckpointError(f"{place}: added token {start}... has over {_MAX_NAME} characters; shorten it")
        total += len(name)
    if total > _MAX_NAMES:
        raise CheckpointError(f"{place}: added tokens have {total:,} characters, over {_MAX_NAMES:,}; leave some out")


def try_patterns(steps: list[Json], may_give_up: bool) -> int:
    """Use the patterns of steps on texts, and return how many pieces there are; called in a child.

    Expressions cut texts on which they usually backtrack. `may_give_up`: the library may end the search by itself. A
    decoder sees only what the model wrote, and what it cannot decode is an error of one request. An expression that
    cuts users' texts must always do so. For replacements a short text will do: the library panics on no text.
    """
    count = 0
    for step in steps:
        [(kind, text)] = step["pattern"].items()
        pattern = Regex(text) if kind == "Regex" else text
        if _is_unknown(step["pattern"]):
            count += _cut_samples(pattern, set(text), may_give_up)
        if step["type"] == "Replace":
            backend = Tokenizer(models.BPE())
            backend.normalizer = normalizers.Replace(pattern, "x")
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            count += len(backend.encode("hi a\n é "))
    return count


def _cut_samples(expression: Regex, characters: set[str], may_give_up: bool) -> int:
    """Cut texts of these characters, and others, and return how many pieces there are."""
    units = [*sorted(characters.union(" \n\ta1A'._-é日\u0301")), "aA", "a ", "a1", "a'", " \n", "1,", "ab"]
    cut = pre_tokenizers.Split(expression, "isolated")
    count = 0
    for unit in units:
        for end in ("", "!", "\0"):
            try:
                count += len(cut.pre_tokenize_str(unit * (_TRIED_LENGTH // len(unit)) + end))
            except BaseException as error:
                if not (is_panic(error) and may_give_up):
                    raise
                return count
    return count


def _is_unknown(pattern: Json) -> bool:
    """Whether a pattern is an expression that no published model has."""
    return "Regex" in pattern and pattern["Regex"] not in _KNOWN_EXPRESSIONS


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of the tokenizers library, which is not an Exception."""
    return type(error).__name__ == "PanicException"


def _steps(part: Any) -> Iterator[Json]:  # Any: from a file
    """Yield the steps of a part, with sequences replaced by their steps."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    names = ("normalizers", "pretokenizers", "processors", "decoders")
    for name in names:
        for step in part.get(name, ()):
            yield from _steps(step)


def _reason_against(steps: list[Json], kinds: set[str]) -> str | None:
    """What is wrong with the steps of a part, None if nothing is; replaces expressions by their linear equivalents."""
    if len(steps) > _MAX_PARTS:
        return f"has {len(steps)} steps; use at most {_MAX_PARTS}"
    growth = 1.0
    names = [step["type"] for step in steps]
    for step in steps:
        name = step["type"]
        if name not in kinds:
            return f"{shown(name)} is not supported; use one of {', '.join(sorted(kinds))}"
        if name in _ONCE and names.count(name) > 1:
            return f"has {name} twice; use it once"
        pattern: Json = step.get("pattern") or {}
        if "Regex" in pattern:
            pattern["Regex"] = _LINEAR.get(pattern["Regex"], pattern["Regex"])
            if _REFERENCES.search(pattern["Regex"]):
                return f"has an expression that refers to itself ({shown(pattern['Regex'])}), which is not supported"
        if name == "Replace":
            replaced = len(pattern.get("String", ""))
            growth *= max(1, len(step["content"]) / max(1, replaced) + (replaced == 0))
        if name == "Prepend" and len(step["prepend"]) > _MAX_GROWTH:
            return f"prepends {len(step['prepend'])} characters; use at most {_MAX_GROWTH}"
        if name == "TemplateProcessing":
            texts = [piece["Sequence"]["id"] for piece in step["single"] if "Sequence" in piece]
            if texts != ["A"] or len(step["single"]) > _MAX_PARTS:
                return "repeats, drops or adds texts; its template must have the text once"
    if growth > _MAX_GROWTH:
        return f"replaces text by text that is {growth:,.0f} times as long; use at most {_MAX_GROWTH} times"
    return None


def _check_ids(fields: Json, path: Path) -> None:
    """Raise CheckpointError for ids far beyond the number of tokens, because the model gets a row for each."""
    ids = list(fields["model"]["vocab"].values())
    ids += [token["id"] for token in fields.get("added_tokens") or ()]
    limit = 2 * len(ids) + 1000
    if max(ids, default=0) >= limit:
        raise CheckpointError(f"{path}: id {shown(max(ids))} is too large for {len(ids):,} tokens; number them from 0")
