"""Fixtures for training: data of a few lines, a vocabulary, and models that were trained on them for a few steps."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stores import CHATS, CODE, Lab

from diffucoder.training.adapt import adapt
from diffucoder.training.pretrain import pretrain
from diffucoder.training.settings import AdaptSettings, PretrainSettings
from recipes.tiny.problems import problems


@pytest.fixture(autouse=True)
def _unaccelerated() -> Iterator[None]:
    """accelerate keeps the state of a process in globals; a run that failed leaves its own behind."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def lab(train_tokenizer: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    train_tokenizer(list(problems("train", 50, seed=0)), 300, folder / "vocabulary")
    corpus, chats = folder / "corpus.jsonl", folder / "chats.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in CODE))
    chats.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    common = {"cache": folder / "cache", "steps": 3, "batch": 4, "lr": 1e-2, "save_every": 100, "held_out_rows": 4}
    return Lab(corpus, chats, folder / "vocabulary", common)


@pytest.fixture(scope="session")
def parent(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoregressive model that `pretrain` made."""
    sizes = {"hidden": 64, "layers": 1, "intermediate": 64, "positions": 128, "context": 32}
    settings = {**lab.common, **sizes, "tokenizer": lab.vocabulary, "data": (str(lab.corpus),), "steps": 8}
    return pretrain(PretrainSettings(run=tmp_path_factory.mktemp("parent"), export_dtype="float32", **settings))


@pytest.fixture(scope="session")
def adapted(lab: Lab, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoiser that `adapt` made of it."""
    settings = {**lab.common, "model": str(parent), "data": (str(lab.corpus),), "context": 32, "anneal_steps": 2}
    return adapt(AdaptSettings(run=tmp_path_factory.mktemp("adapted"), **settings))
