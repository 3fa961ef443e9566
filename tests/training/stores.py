"""What small runs train on: lines of code and of chat, and token stores whose tokens tell where they come from."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from diffucoder.training.data import TokenStore

CODE = [f"def f{n}(xs):\n    return [x + {n} for x in xs]\n" for n in range(30)]
CHATS = [{"prompt": f"Add {n}.", "answer": "return " + "x + 1" * (1 + n % 3)} for n in range(30)]


class Lab(NamedTuple):
    """Where things are, and the settings that all small runs share."""

    corpus: Path
    chats: Path
    vocabulary: Path
    common: Mapping[str, Any]  # Any: each setting has its own type, checked by pydantic


def store_of(folder: Path, examples: Iterable[tuple[list[int], int]]) -> TokenStore:
    """A store in memory of these tokens; each example comes with the place where its answer begins."""
    ids, answers = zip(*examples, strict=True)
    return TokenStore(Dataset.from_dict({"ids": list(ids), "answer": list(answers)}), folder)


def counting(folder: Path, tokens: int) -> TokenStore:
    """Documents whose tokens count from 0 on, so that a row's first token tells which window it is."""
    return store_of(folder, [(list(range(at, min(at + 7, tokens))), 0) for at in range(0, tokens, 7)])


def chats(folder: Path, lengths: Iterable[int], *, answer: int = 4) -> TokenStore:
    """Chats of these lengths, whose answers begin at `answer`; all tokens of chat i are 10 + i."""
    return store_of(folder, [([10 + at] * length, answer) for at, length in enumerate(lengths)])
