"""The shipped model is loaded without transformers: the same numbers, and a transformers model on request."""

import subprocess
import sys

import pytest
import torch

from diffucoder.decoding.coder import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.models.checkpoint import load_with_tokenizer

REQUEST = "Given a number, double the number."


def test_an_answer_needs_no_transformers() -> None:
    program = (
        "import sys; from diffucoder import DiffuCoder\n"
        f"DiffuCoder.load().generate({REQUEST!r})\n"
        "assert not {'transformers', 'huggingface_hub', 'sympy', 'torch._dynamo'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_the_transformers_model(dtype: torch.dtype) -> None:
    plain = DiffuCoder.load(dtype=dtype)
    whole = DiffuCoder(*load_with_tokenizer(None, dtype=dtype), name="tiny")
    whole.model.use_fast_layers()
    params = DecodingParams(temperature=0.8, seed=3)
    first = plain.generate(REQUEST, params)
    second = whole.generate(REQUEST, params)
    assert first.tokens == second.tokens
    assert first.trace == second.trace


def test_the_transformers_model_shares_the_weights() -> None:
    denoiser = DiffuCoder.load(dtype=torch.float32).model
    before = {name: weight.data_ptr() for name, weight in denoiser.named_parameters()}
    assert type(denoiser.model).__name__ == "Qwen2ForCausalLM"
    assert {name: weight.data_ptr() for name, weight in denoiser.named_parameters()} == before
    assert not denoiser.config.is_causal
    assert not denoiser.training


def test_the_reference_preset_computes_by_transformers() -> None:
    params = DecodingParams(preset="reference", steps=8, new_tokens=16)
    plain = DiffuCoder.load(dtype=torch.float32)
    whole = DiffuCoder(*load_with_tokenizer(None, dtype=torch.float32), name="tiny")
    assert plain.generate(REQUEST, params).trace == whole.generate(REQUEST, params).trace
