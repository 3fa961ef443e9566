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

_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace"}
_PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation", "Metaspace"}
_POST_PROCESSORS = {"ByteLevel", "TemplateProcessing", "RobertaProcessing", "BertProcessing"}
_DECODERS = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_MODELS = {"BPE", "WordLevel"}
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
    if model.get("type", "BPE") not in _MODELS:  # the oldest files have no type
        raise CheckpointError(f"{path}: model {shown(model['type'])} is not supported; use one of {_listed(_MODELS)}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise CheckpointError(f"{path}: model has {name}={shown(model[name])}, which is not supported")
    expressions: dict[str, set[str]] = {"decoder": set(), "others": set()}
    for part, kinds in (
        ("normalizer", _NORMALIZERS),
        ("pre_tokenizer", _PRE_TOKENIZERS),
        ("post_processor", _POST_PROCESSORS),
        ("decoder", _DECODERS),
    ):
        steps = list(_steps(fields.get(part)))
        for step in steps:
            if step["type"] not in kinds:
                kind = shown(step["type"])
                raise CheckpointError(f"{path}: {part} {kind} is not supported; use one of {_listed(kinds)}")
        reason = _reason_against(steps, expressions["decoder" if part == "decoder" else "others"])
        if reason:
            raise CheckpointError(f"{path}: {part} {reason}")
    check_names([token["content"] for token in fields.get("added_tokens") or ()], path)
    _check_ids(fields, path)
    for part, found in expressions.items():
        unknown = sorted(found - _KNOWN_EXPRESSIONS)
        if unknown:
            _try_expressions(unknown, path, may_give_up=part == "decoder")


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


def split_samples(expressions: list[str], may_give_up: bool) -> int:
    """Cut texts on which expressions usually backtrack, and return how many pieces there are; called in a child.

    `may_give_up`: the library may end the search by itself. A decoder sees only what the model wrote, and what it
    cannot decode is an error of one request. An expression that cuts users' texts must always do so.
    """
    characters = set(" \n\ta1A'._-é日\u0301").union(*expressions)
    units = [*sorted(characters), "aA", "a ", "a1", "a'", " \n", "1,", "ab"]
    count = 0
    for expression in expressions:
        cut = pre_tokenizers.Split(Regex(expression), "isolated")
        for unit in units:
            for end in ("", "!", "\0"):
                try:
                    count += len(cut.pre_tokenize_str(unit * (_TRIED_LENGTH // len(unit)) + end))
                except BaseException as error:
                    if not (is_panic(error) and may_give_up):
                        raise
                    return count
    return count


def replace_samples(pattern: Json) -> int:
    """Replace a pattern in a text and return the number of words. Called in a child: the library panics on no text."""
    [(kind, text)] = pattern.items()
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(Regex(text) if kind == "Regex" else text, "x")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return len(backend.encode("hi a\n é "))


def _try_expressions(expressions: list[str], path: Path, *, may_give_up: bool) -> None:
    try:
        _TRIED(split_samples, expressions, may_give_up)
    except LimitError as error:
        reason = f"cutting {_TRIED_LENGTH:,} characters {one_line(error)}"
        raise CheckpointError(f"{path}: expression {shown(expressions[0])} is not safe: {reason}") from None


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


def _reason_against(steps: list[Json], expressions: set[str]) -> str | None:
    """Return the fault of the steps of a part, or None; add their expressions to `expressions`."""
    if len(steps) > _MAX_PARTS:
        return f"has {len(steps)} steps; use at most {_MAX_PARTS}"
    growth = 1.0
    kinds = [step["type"] for step in steps]
    for step in steps:
        pattern: Json = step.get("pattern") or {}
        if "Regex" in pattern:
            pattern["Regex"] = _LINEAR.get(pattern["Regex"], pattern["Regex"])
            expressions.add(pattern["Regex"])
            if _REFERENCES.search(pattern["Regex"]):
                return f"has an expression that refers to itself ({shown(pattern['Regex'])}), which is not supported"
        if step["type"] == "Replace":
            try:
                _TRIED(replace_samples, pattern)
            except LimitError as error:
                return f"cannot replace {shown(pattern)} ({one_line(error)}); leave that step out"
            replaced = len(pattern["String"]) if "String" in pattern else 0
            growth *= max(1, len(step["content"]) / max(1, replaced) + (replaced == 0))
        if step["type"] == "Prepend" and len(step["prepend"]) > _MAX_GROWTH:
            return f"prepends {len(step['prepend'])} characters; use at most {_MAX_GROWTH}"
        if step["type"] == "TemplateProcessing" and not _is_plain(step["single"]):
            return "repeats, drops or adds texts; its template must have the text once"
        if step["type"] in _ONCE and kinds.count(step["type"]) > 1:
            return f"has {step['type']} twice; use it once"
    if growth > _MAX_GROWTH:
        return f"replaces text by text that is {growth:,.0f} times as long; use at most {_MAX_GROWTH} times"
    return None


def _is_plain(template: list[Json]) -> bool:
    """Whether a template of a post-processor has the text once, and few tokens around it."""
    texts = [piece["Sequence"]["id"] for piece in template if "Sequence" in piece]
    return texts == ["A"] and len(template) <= _MAX_PARTS


def _check_ids(fields: Json, path: Path) -> None:
    """Raise CheckpointError for ids far beyond the number of tokens, because the model gets a row for each."""
    ids = list(fields["model"]["vocab"].values())
    ids += [token["id"] for token in fields.get("added_tokens") or ()]
    limit = 2 * len(ids) + 1000
    if max(ids, default=0) >= limit:
        raise CheckpointError(f"{path}: id {shown(max(ids))} is too large for {len(ids):,} tokens; number them from 0")


def _listed(kinds: set[str]) -> str:
    return ", ".join(sorted(kinds))
