"""Fixtures for decoding: a small tokenizer, and the recorded behaviour of Dream's released code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.models.checkpoint import load_denoiser
from diffucoder.models.denoiser import Denoiser
from diffucoder.tokenizer import Tokenizer
from recipes.tiny.problems import problems


@pytest.fixture(scope="session")
def vocabulary(train_tokenizer: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 500 tokens, trained on the tiny problems."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(list(problems("train", 300, seed=0)), 500, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(vocabulary: Path) -> Tokenizer:
    return Tokenizer.load(vocabulary)


class Recording(NamedTuple):
    """One call of `diffusion_generate`, and every canvas it went through."""

    canvas: Canvas
    params: DecodingParams
    sequences: Tensor  # (B, T)
    history: Tensor  # (steps, B, T)


@pytest.fixture(scope="session")
def dream_tiny(shared: Path) -> Denoiser:
    """The random Dream checkpoint of the recordings, in fp32."""
    return load_denoiser(shared / "parity" / "dream-tiny", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def recordings(shared: Path) -> list[Recording]:
    """All recorded calls."""
    folder = shared / "parity" / "dream-tiny"
    tensors = load_file(folder / "cases.safetensors")
    mask_id = json.loads((folder / "config.json").read_text())["mask_token_id"]

    def recording(name: str, max_new_tokens: int, **dream: Any) -> Recording:
        ids, valid = tensors[f"{name}.input_ids"], tensors[f"{name}.attention_mask"].bool()
        canvas = Canvas.from_prompts(ids, valid=valid, new_tokens=max_new_tokens, mask_id=mask_id)
        sequences, history = tensors[f"{name}.sequences"].long(), tensors[f"{name}.history"].long()
        return Recording(canvas, DecodingParams.from_dream(**dream), sequences, history)

    return [recording(**case) for case in json.loads((folder / "cases.json").read_text())]
