"""Models that are loaded without transformers: the same numbers and errors, and a transformers model on request."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffucoder.decoding.coder import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import CheckpointError
from diffucoder.models.checkpoint import find_checkpoint, load_with_tokenizer
from diffucoder.models.hub import SHIPPED
from diffucoder.models.plain import PlainConfig

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
    assert isinstance(find_checkpoint(None, plain=True).config, PlainConfig)
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


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_theta": float("nan")},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"hidden_size": "256"},
        {"vocab_size": True},
        {"tie_word_embeddings": True},
        {"use_sliding_window": True},
        {"attention_dropout": "none"},
        {"torch_dtype": "int3"},
        {"head_dim": 64},
        {"partial_rotary_factor": 0.5},
        {"quantization_config": {"bits": 4}},
    ],
)
def test_other_configs_are_left_to_transformers(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = Path(shutil.copytree(SHIPPED, tmp_path / "model"))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))
    outcomes = []
    for plain in (False, True):
        try:
            config = find_checkpoint(folder, plain=plain).config
        except CheckpointError as error:
            outcomes.append(str(error))
        else:
            outcomes.append(type(config).__name__)
    assert outcomes[0] == outcomes[1]
