"""A parent from nothing: a plain causal model, whatever it was trained through."""

import json
from pathlib import Path

import pytest
import torch
from stores import CODE, Lab
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.models.checkpoint import find_checkpoint, load_denoiser
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.pretrain import fresh_model, pretrain
from diffucoder.training.settings import PretrainSettings


def settings(lab: Lab, run: Path, **changes: object) -> PretrainSettings:
    sizes = {"hidden": 64, "layers": 1, "intermediate": 64, "context": 32, "positions": 128}
    given = {**lab.common, **sizes, "tokenizer": lab.vocabulary, "data": (str(lab.corpus),), **changes}
    return PretrainSettings(run=run, **given)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_parent_learns_next_tokens(lab: Lab, tmp_path: Path) -> None:
    pretrain(settings(lab, tmp_path, steps=30, log_every=1, held_out=(str(lab.corpus),), lr=2e-2))
    first, *_, last = metrics(tmp_path)
    assert first["loss"] == pytest.approx(torch.tensor(300.0).log().item(), rel=0.05)  # it begins by guessing
    assert last["loss"] < first["loss"] - 2
    assert last["loss"] == pytest.approx(last["unweighted"], rel=1e-5)  # every token weighs the same
    assert last["held_out_loss"] < first["loss"] - 2


def test_a_parent_is_a_plain_causal_model_of_transformers(parent: Path) -> None:
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(parent), AutoTokenizer.from_pretrained(parent)
    assert (plain.config.model_type, find_checkpoint(parent).mask_id) == ("qwen2", None)
    tokens = tokenizer(CODE[0], return_tensors="pt").input_ids
    changed = tokens.clone()
    changed[0, 10:] = 7
    with torch.no_grad():
        logits = plain(input_ids=tokens).logits
        torch.testing.assert_close(plain(input_ids=changed).logits[:, :10], logits[:, :10], rtol=0, atol=1e-6)
        denoiser = load_denoiser(parent, mask_id=tokenizer.mask_token_id, dtype=torch.float32, device="cpu")
        triangle = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        rows = denoiser(tokens, attention=triangle)
    torch.testing.assert_close(rows[:, 1:], logits[:, :-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_written_in_the_dtype_asked_for(lab: Lab, tmp_path: Path, bf16: bool, dtype: str) -> None:
    folder = pretrain(settings(lab, tmp_path, steps=1, bf16=bf16, export_dtype=dtype))
    assert {str(p.dtype) for p in AutoModelForCausalLM.from_pretrained(folder).parameters()} == {f"torch.{dtype}"}


def test_no_steps_write_the_untrained_model(lab: Lab, tmp_path: Path) -> None:
    chosen = settings(lab, tmp_path, steps=0, seed=9, export_dtype="float32")
    fresh = fresh_model(chosen, Tokenizer.load(lab.vocabulary)).model.state_dict()
    written = AutoModelForCausalLM.from_pretrained(pretrain(chosen)).state_dict()
    assert fresh.keys() == written.keys()
    assert all(torch.equal(fresh[name], written[name]) for name in fresh)


def test_a_fresh_model_is_a_function_of_the_seed_and_draws_nothing_else(lab: Lab, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    tokenizer = Tokenizer.load(lab.vocabulary)
    heads = [fresh_model(settings(lab, tmp_path, seed=seed), tokenizer).model.lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("hidden", "heads", "key_heads"), [(64, 1, 1), (128, 2, 1), (192, 3, 3), (256, 4, 2)])
def test_heads_follow_from_the_width(lab: Lab, tmp_path: Path, hidden: int, heads: int, key_heads: int) -> None:
    config = fresh_model(settings(lab, tmp_path, hidden=hidden), Tokenizer.load(lab.vocabulary)).config
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, key_heads)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"context": 100_000, "positions": 100_000},
            r"has [\d,]+ tokens, no row of 100000; lower context or add data",
        ),
        ({"context": 256}, "context=256 exceeds the model's context of 128; lower it to 128 or less"),
        ({"data": ("nowhere",)}, "'nowhere' is not a folder or a file; check the path"),
        ({"data": ()}, r"data=\(\) names no source"),
        ({"hidden": 100}, "hidden=100: input should be a multiple of 64"),
        ({"model": "tiny"}, "model='tiny': .*a parent starts from nothing"),
    ],
)
def test_what_cannot_be_trained_is_one_line(lab: Lab, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        pretrain(settings(lab, tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_tokenizer_is_one_line(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        pretrain(settings(lab, tmp_path / "run", tokenizer=tmp_path))
