"""Fixtures shared by all tests: tiny random models, and the public reference data beside the repository."""

import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may reach out

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from diffucoder.errors import SandboxError
from diffucoder.grading.sandbox import Sandbox
from diffucoder.models.denoiser import Denoiser

torch.set_num_threads(1)  # the models are tiny: a second thread only waits for the first, above all on a busy machine
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded reference behaviour and public data (`DIFFUCODER_SHARED`, else `../shared`)."""
    folder = Path(os.environ.get("DIFFUCODER_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "parity").is_dir():
        pytest.skip("no shared reference data here; set DIFFUCODER_SHARED")
    return folder


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """Two programs at a time."""
    try:
        with Sandbox(2) as two:
            yield two
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    """One program at a time, all in the same worker."""
    try:
        with Sandbox(1) as one:
            yield one
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def train_tokenizer() -> Callable[..., None]:
    """`train_tokenizer(problems, vocabulary, folder)` of the laboratory, a script and so not to be imported."""
    train: Callable[..., None] = runpy.run_path(str(REPOSITORY / "recipes/tiny/data.py"))["train_tokenizer"]
    return train


@pytest.fixture(scope="session")
def causal_lm() -> Callable[..., Any]:
    """Make a random two-layer causal LM: `causal_lm("llama", tie_word_embeddings=True)`; always the same weights."""

    def make(kind: str = "qwen2", *, seed: int = 0, **overrides: Any) -> Any:
        sizes = {
            "vocab_size": 67,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "pad_token_id": 1,
            "eos_token_id": 1,
            "bos_token_id": None,
            "initializer_range": 0.3,  # logits far enough apart that tests can tell them from rounding
        }
        if kind == "qwen2":
            del sizes["head_dim"]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **overrides}))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zero at birth, which would hide a mistake
                    torch.nn.init.normal_(parameter, std=0.3)
        return model.float().eval()

    return make


@pytest.fixture
def tiny(causal_lm: Callable[..., Any]) -> Denoiser:
    """A random Denoiser in fp32: 67 tokens, of which 66 is the mask and 1 pads."""
    return Denoiser.from_causal_lm(causal_lm(), mask_id=66)
