"""Scaffold: a plain completion of a canvas that keeps a rule, such as a program of `pass` and blank lines.

It needs no model. `witness` falls back on it when nothing that the model proposes keeps the rule.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from diffucoder.decoding.checkers import Checker
from diffucoder.decoding.document import Document, Part
from diffucoder.tokenizer import Hole, Tokenizer

# What may stand in a gap of a program: a statement, an expression, a name, an operator, a delimiter
CORES = (
    *("", "pass", "x", "0", "0,", "x,", ",", "x=0", "=x", "=", ":", "):", ")", "x:", "x: x", "()", "(", "]", "}"),
    *(".x", "+", "+x", "x+", "x.", "in x", "x in", "for x in x", "if x", "else x", "as x", "and", "in", "@", "#"),
    *("x in x:", "x()", "import x", "x)", "x]", "x}", '"', "'", '"""', '""', "def", "class", "if", "return", "import"),
    *("in x:", "finally:x", "except:x", "else:x", "if x:x"),
)
FILLERS = (" ", "\n", "#")
MOST_CHARACTERS = 500_000  # that are judged for a part


def scaffold(document: Document, checker: Checker, tokens: Tensor, holes: Tensor) -> Tensor | None:
    """Return `tokens` (T,) with `holes` (T,) bool filled so that the text keeps the rule; None if no way is found."""
    filled = tokens.masked_fill(holes, document.mask_id)
    if document.terminators:
        ended = filled.masked_fill(holes, min(document.terminators))
        if document.flaw(ended, checker) is None:
            return ended
    for part in [piece for piece in document.pieces if isinstance(piece, Part)]:
        best: tuple[int, Tensor] = (-1, filled)
        text, _ = document.text(filled)
        trials = max(50, MOST_CHARACTERS // (len(text) + 1))
        for ids in islice(_fillings(document, filled, part), trials):
            trial = filled.clone()
            trial[part.start : part.end] = torch.tensor(ids)
            flaw = document.flaw(trial, checker)
            if flaw is None:
                best = (len(filled), trial)
                break
            best = max(best, (flaw.at, trial), key=lambda scored: scored[0])  # the first of equals
        filled = best[1]
    return filled if document.flaw(filled, checker) is None else None


def hole_texts(
    pieces: Iterable[str | Hole], longest: int, tokenizer: Tokenizer, mask_id: int, checker: Checker
) -> list[str]:
    """A text for each hole, of `longest` tokens if it has no length, that together keep the rule; empty ones if not."""
    parts: list[str | Part] = []
    masks = 0
    for piece in pieces:
        if isinstance(piece, Hole):
            start = masks
            masks += piece.length or longest
            parts.append(Part(start, masks, is_answer=False))
        else:
            parts.append(piece)
    document = Document(tuple(parts), tokenizer, mask_id)
    holes = torch.ones(masks, dtype=torch.bool)
    tokens = scaffold(document, checker, torch.full((masks,), mask_id), holes)
    own = [part for part in parts if isinstance(part, Part)]
    if tokens is None:
        return [""] * len(own)
    return [tokenizer.decode(tokens[part.start : part.end].tolist()) for part in own]


def _fillings(document: Document, tokens: Tensor, part: Part) -> Iterator[list[int]]:
    """Yield ids that fill a part: a core, with fillers before or after it."""
    length = part.end - part.start
    encode = document.tokenizer.encode
    text, _ = document.text(tokens)
    line = text.rpartition("\n")[2]
    indents = _indents(text)
    if line.strip():
        indents = [""]
    for filler in FILLERS:
        unit = encode(filler)
        if len(unit) != 1:
            continue
        for indent in indents:
            for core in CORES:
                ids = encode(indent + core)
                rest = unit * (length - len(ids))
                if len(ids) <= length:
                    yield ids + rest
                    yield rest + ids


def _indents(text: str) -> list[str]:
    """Indentations that a line after `text` may have: those of the lines before it, and one level more."""
    lines = [line for line in text.split("\n") if line.strip()]
    found = [line[: len(line) - len(line.lstrip())] for line in lines[-20:]]
    deeper = [f"{indent}    " for indent in found[-1:]] + [f"{indent}\t" for indent in found[-1:]]
    return list(dict.fromkeys(["", *deeper, *reversed(found)]))
