"""An autoregressive parent from nothing: what Qwen2.5-Coder is to DiffuCoder, at the size of a laptop.

With a causal mask the Denoiser is the autoregressive model, and with every token scored the objective is next-token
prediction. The parent is written as a plain Qwen2 checkpoint.
"""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from diffucoder.models.denoiser import Denoiser
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.adapt import packed_stage
from diffucoder.training.run import train_and_export
from diffucoder.training.settings import PretrainSettings


def pretrain(settings: PretrainSettings) -> Path:
    """Train the parent, or resume it, and return the folder of the finished model."""
    tokenizer = Tokenizer.load(settings.tokenizer)
    denoiser = fresh_model(settings, tokenizer)
    stage = packed_stage(settings, denoiser, tokenizer)
    return train_and_export(denoiser, tokenizer, stage, settings, parent=True)


def fresh_model(settings: PretrainSettings, tokenizer: Tokenizer) -> Denoiser:
    """A Qwen2-shaped model of random weights, a function of the seed, with the tokenizer's ids."""
    heads = settings.hidden // 64
    config = Qwen2Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,  # two heads share keys and values
        max_position_embeddings=settings.positions,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # transformers draws from the global generator
        return Denoiser.from_causal_lm(Qwen2ForCausalLM(config), mask_id=tokenizer.mask_id)
