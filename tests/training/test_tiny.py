"""Training the shipped model, in miniature: it learns, it can be killed at any moment, and its model opens."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.config import load_settings
from diffucoder.errors import ConfigError
from diffucoder.problems import problems
from diffucoder.tokenizer import Tokenizer
from diffucoder.training import tiny
from diffucoder.training.tiny import END, MASK, PAD, Batch, Examples, TinySettings, train_tiny

MINIATURE = {
    **{"problems": 150, "vocabulary": 400, "hidden": 64, "layers": 1, "intermediate": 64, "batch_tokens": 640},
    **{"causal_steps": 4, "anneal_steps": 4, "diffusion_steps": 12, "warmup": 4, "threads": 1},
}

DYING = """
import os, signal
from diffucoder.training import tiny

def save_or_die(trainer):
    if trainer.step == 9:  # while the ninth checkpoint is half written, in the masked stage
        (trainer.settings.run / "checkpoint.pt.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(trainer)

save, tiny._Trainer.save = tiny._Trainer.save, save_or_die
tiny.main()
"""


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Training sets torch's threads for its process; tests share one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def settings(run: Path, **changes: Any) -> TinySettings:  # Any: each setting has its own type, checked by pydantic
    return TinySettings(run=run, **{**MINIATURE, **changes})


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Everything a finished run has learnt: model, averages and the optimiser's moments."""
    state = torch.load(run / "checkpoint.pt")
    moments = {
        f"{index}.{name}": value
        for index, moment in state["optimizer"]["state"].items()
        for name, value in moment.items()
    }
    averages = {f"average.{name}": value for name, value in state["average"].items()}
    return {**state["model"], **averages, **moments}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    run = tmp_path_factory.mktemp("uninterrupted")
    train_tiny(settings(run))
    return run


@pytest.fixture(scope="module")
def examples(finished: Path) -> Examples:
    return tiny._load_examples(settings(finished))


# --- data ------------------------------------------------------------------------------------------------------------


def test_an_example_is_a_chat_request_and_the_solution_to_it(finished: Path, examples: Examples) -> None:
    tokenizer = Tokenizer.load(finished / "model")
    drawn = {problem.prompt: problem.solution for problem in problems("train", 150, seed=0)}
    assert 100 < len(examples.answer) <= 150
    for i in range(len(examples.answer)):
        ids = examples.tokens[examples.start[i] : examples.start[i + 1]].tolist()
        asked, answer = ids[: examples.answer[i]], ids[examples.answer[i] :]
        prompt = tokenizer.decode(asked, skip_special=False).split("user\n")[1].partition("<|im_end|>")[0]
        assert asked == tokenizer.encode(tokenizer.chat(prompt))
        assert tokenizer.decode(answer, skip_special=False) == drawn[prompt] + "<|im_end|>"


def test_special_ids_are_those_of_the_tokenizer(finished: Path) -> None:
    tokenizer = Tokenizer.load(finished / "model")
    assert tokenizer.encode("<|im_end|><|mask|><|dlm_pad|>") == [END, MASK, PAD]
    assert (tokenizer.mask_id, tokenizer.pad_id) == (MASK, PAD)


def test_batches_depend_on_seed_and_step_alone(finished: Path, examples: Examples) -> None:
    whole = list(tiny._batches(examples, settings(finished), 0))
    assert len(whole) == 16
    later = list(tiny._batches(examples, settings(finished), 7))
    assert all(torch.equal(a, b) for x, y in zip(whole[7:], later, strict=True) for a, b in zip(x, y, strict=True))
    other = next(tiny._batches(examples, settings(finished, seed=1), 0))
    assert other.tokens.shape != whole[0].tokens.shape or not torch.equal(other.tokens, whole[0].tokens)


def test_only_answers_and_the_pads_behind_them_are_masked(finished: Path, examples: Examples) -> None:
    batches = tiny._batches(examples, settings(finished, raw_share=0.0, diffusion_steps=60), 0)
    for batch in islice(batches, 60):
        for tokens, maskable, named in zip(batch.tokens, batch.maskable, batch.named, strict=True):
            start = int(maskable.int().argmax())
            assert maskable[start:].all()
            assert named.nonzero()[:, 0].tolist() == [start + 1, start + 2, start + 3]
            assert tokens[start:].tolist().count(END) == 1
            assert PAD not in tokens[:start]


def test_raw_batches_are_code_without_a_request(finished: Path, examples: Examples) -> None:
    batches = tiny._batches(examples, settings(finished, raw_share=1.0), 4)
    for batch in batches:
        assert batch.maskable[:, 1:].all()
        assert not batch.maskable[:, 0].any()
        assert not batch.named.any()


# --- training --------------------------------------------------------------------------------------------------------


def test_a_finished_run_leaves_a_model_that_opens_and_writes(finished: Path) -> None:
    coder = DiffuCoder.load(finished / "model", dtype=torch.float32, device="cpu")
    assert coder.model.mask_id == MASK
    result = coder.generate("Reverse the list.", DecodingParams(new_tokens=8))
    assert result.forward_passes <= 8
    config = json.loads((finished / "model" / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("Dream", "bfloat16")


def test_the_shipped_weights_are_the_averaged_ones(finished: Path) -> None:
    shipped = DiffuCoder.load(finished / "model", dtype=torch.float32, device="cpu").model
    average = torch.load(finished / "checkpoint.pt")["average"]
    for name, parameter in shipped.named_parameters():
        assert torch.equal(parameter, average[name].bfloat16().float()), name


def test_a_killed_run_continues_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("\n".join(f"{name} = {value}" for name, value in MINIATURE.items()))
    overrides = [f"run={tmp_path / 'run'}", "checkpoint_minutes=1e-9"]  # a checkpoint after every step
    command = [sys.executable, "-c", DYING, tmp_path / "recipe.toml", *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 8
    train_tiny(settings(tmp_path / "run"))
    once, twice = weights(finished), weights(tmp_path / "run")
    assert once.keys() == twice.keys()
    assert [name for name in once if not torch.equal(once[name], twice[name])] == []
    exported = [(run / "model" / "model.safetensors").read_bytes() for run in (finished, tmp_path / "run")]
    assert exported[0] == exported[1]


def test_a_finished_run_started_again_trains_no_further(finished: Path) -> None:
    before = (finished / "model" / "model.safetensors").read_bytes()
    train_tiny(settings(finished))
    assert (finished / "model" / "model.safetensors").read_bytes() == before


def test_the_masked_loss_falls_and_is_logged(tmp_path: Path) -> None:
    shares = {"raw_share": 0.1, "spare": 96, "short_share": 0.6}
    train_tiny(settings(tmp_path, causal_steps=0, diffusion_steps=150, lr=1e-2, batch_tokens=320, **shares))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150]
    assert {"loss", "unweighted", "accuracy", "copied", "grad_norm", "tokens", "time"} < set(lines[0])
    assert lines[2]["unweighted"] < 0.9 * lines[0]["unweighted"]


def test_the_learning_rate_warms_up_stays_and_decays(tmp_path: Path) -> None:
    recipe = settings(tmp_path, causal_steps=0, diffusion_steps=100, warmup=10)
    rates = [tiny._schedule(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(rates[10:70]) == {1.0}
    assert rates[85] == pytest.approx(0.5)
    assert min(rates[70:]) == rates[99] == pytest.approx(1 / 30)


def test_annealing_opens_the_future_step_by_step(finished: Path) -> None:
    """Score the first maskable token with its future open to `annealed`: causally it must not see what follows."""
    denoiser = tiny._fresh_model(settings(finished)).eval()
    tokens = torch.full((1, 12), 20)
    maskable = torch.arange(12)[None] >= 6
    seen: list[torch.Tensor] = []
    denoiser.register_forward_pre_hook(lambda _, __, given: seen.append(given["attention"]), with_kwargs=True)
    batch = Batch(tokens, maskable, torch.zeros_like(maskable))
    for annealed in (0.0, 0.5, 1.0):
        tiny._masked_loss(denoiser, batch, annealed, torch.Generator().manual_seed(0))
    causal, between, full = seen
    assert torch.equal(causal, torch.ones(12, 12).tril().bool())
    assert causal.sum() < between.sum() < 144
    assert between[causal].all()
    assert full is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("problems=5", "problems=5: input should be greater than or equal to 100 (distinct training problems)"),
        ("lr=0", "lr=0: input should be greater than 0"),
        ("layer=3", "unknown setting 'layer'; did you mean 'layers'?"),
    ],
)
def test_a_wrong_setting_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(TinySettings, overrides=[override])
    assert message in str(refused.value)
