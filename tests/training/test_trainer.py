"""The Trainer's laws: accumulation and processes change nothing, a killed run goes on bit for bit, torn checkpoints
are passed over. Runs are real: a process that is killed, two processes over gloo."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.files import disk_is_full
from diffucoder.training import checkpoints
from diffucoder.training.settings import TrainSettings
from diffucoder.training.trainer import Trainer, schedule

ROOT = Path(__file__).parents[2]
Fields = dict[str, Any]  # Any: each setting has its own type, checked by pydantic


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def launch(fields: Fields, *, config: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run worker.py as a program: alone, or as two processes under one of recipes/accelerate/."""
    path = fields["run"].with_suffix(".json")
    path.write_text(json.dumps(fields, default=str))
    launcher = [sys.executable]
    if config:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate" / config)]
        launcher += ["--num_processes", "2", "--main_process_port", "0"]
    script = str(ROOT / "tests" / "training" / "worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, script, str(path)], capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that nothing interrupts, one micro-batch a step."""
    run = tmp_path_factory.mktemp("whole") / "run"
    worker.run({"run": run})
    return run


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, in micro-batches of two rows."""
    run = tmp_path_factory.mktemp("accumulated") / "run"
    worker.run({"run": run, "micro_batch": 2})
    return run


# --- what a step is --------------------------------------------------------------------------------------------------


def test_a_run_learns(whole: Path) -> None:
    unweighted = [line["unweighted"] for line in lines(whole)]
    assert unweighted[-1] < unweighted[0] - 0.2


@pytest.mark.parametrize("normaliser", ["masked", "length"])
def test_accumulation_changes_nothing(tmp_path: Path, normaliser: str) -> None:
    for size in (8, 1):
        worker.run({"run": tmp_path / str(size), "micro_batch": size, "normaliser": normaliser, "steps": 5})
    assert losses(tmp_path / "8") == pytest.approx(losses(tmp_path / "1"), rel=1e-6)
    norms = [[line["grad_norm"] for line in lines(tmp_path / size)] for size in ("8", "1")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_released_normaliser_does_depend_on_micro_batches(tmp_path: Path) -> None:
    for size in (8, 1):
        worker.run({"run": tmp_path / str(size), "micro_batch": size, "normaliser": "masked_micro", "steps": 1})
    assert losses(tmp_path / "8") != pytest.approx(losses(tmp_path / "1"), rel=1e-2)


@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_are_one(tmp_path: Path, accumulated: Path, config: str) -> None:
    done = launch({"run": tmp_path / "two", "micro_batch": 2, "evaluate_every": 3}, config=config)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(accumulated), abs=1e-5)
    assert lines(tmp_path / "two")[-1]["held_out_loss"] == pytest.approx(
        lines(accumulated)[-1]["held_out_loss"], abs=1e-5
    )
    for name, weight in weights(accumulated).items():  # Adam divides by gradients near zero, so not to the last digit
        assert torch.allclose(weight, weights(tmp_path / "two")[name], rtol=1e-3, atol=1e-4), name


def test_the_schedule_is_that_of_transformers() -> None:
    settings = TrainSettings(run=Path("x"), steps=50, lr=1.0, warmup=0.2, final_lr=0.1)
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, 50, min_lr_rate=0.1)
    for step in range(50):
        if step >= 10:
            assert schedule(step, settings) == pytest.approx(theirs.get_last_lr()[0])
        else:  # theirs wastes its first step at zero
            assert schedule(step, settings) == pytest.approx((step + 1) / 10)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("warmup", [0, 0.05, 0.1, 0.3, 1.5, 3, 40])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_learning_rate_never_exceeds_its_peak(warmup: float, steps: int) -> None:
    settings = TrainSettings(run=Path("x"), steps=steps, lr=1.0, warmup=warmup)
    assert all(0 < schedule(step, settings) <= 1 for step in range(steps))


def test_the_held_out_loss_is_of_the_averaged_weights(tmp_path: Path, whole: Path) -> None:
    last = lines(whole)[-1]["held_out_loss"]
    settings = TrainSettings(**{**worker.DEFAULTS, "run": tmp_path / "run"})
    trained = worker.model()
    trained.model.load_state_dict(weights(whole))
    trainer = Trainer(trained, worker.stage(settings), settings.model_copy(update={"ema": 0.0}))
    assert trainer.evaluate()["held_out_loss"] == pytest.approx(last, rel=1e-6)
    trainer.close()


def test_noise_and_data_leave_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    worker.run({"run": tmp_path / "run", "steps": 2, "lora_rank": 2})
    assert torch.equal(torch.get_rng_state(), before)


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_run_killed_in_mid_step_goes_on_bit_for_bit(tmp_path: Path, accumulated: Path) -> None:
    fields: Fields = {"run": tmp_path / "run", "micro_batch": 2}
    assert launch({**fields, "die": 5}).returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "model").exists()
    worker.run({**fields, "resume": True})
    assert same(weights(tmp_path / "run"), weights(accumulated))
    for ours, theirs in zip(lines(tmp_path / "run"), lines(accumulated), strict=True):
        timed = {"tokens_per_second"}
        assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}


def test_a_sharded_run_that_is_killed_goes_on_in_one_process(tmp_path: Path, accumulated: Path) -> None:
    fields: Fields = {"run": tmp_path / "run", "micro_batch": 2}
    assert launch({**fields, "die": 5}, config="fsdp2.yaml").returncode != 0
    assert max(checkpoints.checkpoint_steps(tmp_path / "run")) == 4
    worker.run({**fields, "resume": True})
    assert losses(tmp_path / "run") == pytest.approx(losses(accumulated), abs=1e-5)


def test_a_run_killed_while_it_writes_goes_on_bit_for_bit(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: Fields = {"run": tmp_path / "run"}

    def die(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(checkpoints, "_sync", die)  # the first checkpoint's files are there, its folder is not yet
    with pytest.raises(RuntimeError, match="killed"):
        worker.run(dict(fields))
    monkeypatch.undo()
    _reset()
    worker.run({**fields, "resume": True})
    assert same(weights(tmp_path / "run"), weights(whole))


@pytest.mark.parametrize("harm", ["cut", "flip", "lose", "unlist"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, whole: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    worker.run({"run": run, "keep": 5})
    newest = run / "checkpoints" / "step-00000010"
    file = next(newest.glob("*.safetensors"))
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    elif harm == "lose":
        file.unlink()
    else:
        (newest / "whole.json").write_text('{"files"')
    worker.run({"run": run, "keep": 5, "resume": True})
    assert "step-00000010 is torn" in " ".join(capsys.readouterr().err.split())
    assert same(weights(run), weights(whole))
    assert len(lines(run)) == 10


def test_only_the_newest_checkpoints_are_kept(whole: Path) -> None:
    assert sorted(checkpoints.checkpoint_steps(whole)) == [8, 10]


def test_a_finished_run_resumed_writes_its_model_again(tmp_path: Path, whole: Path) -> None:
    worker.run({"run": tmp_path / "run"})
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    worker.run({"run": tmp_path / "run", "resume": True})
    assert same(weights(tmp_path / "run"), weights(whole))


def test_a_finished_run_goes_on_with_more_steps(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    worker.run({"run": run})
    worker.run({"run": run, "steps": 14, "resume": True})
    assert "goes on after step 10 of 14" in capsys.readouterr().err
    assert [line["step"] for line in lines(run)] == list(range(1, 15))
    assert losses(run)[:10] == losses(whole)
    longer = TrainSettings(run=run, steps=14, lr=1e-2)
    assert [line["lr"] for line in lines(run)[10:]] == pytest.approx(
        [1e-2 * schedule(s, longer) for s in range(10, 14)], abs=1e-6
    )
    with pytest.raises(ConfigError, match=r"steps=12 but the run in .* began with 14"):
        worker.run({"run": run, "steps": 12, "resume": True})
    _reset()
    worker.run({"run": run, "steps": 14, "resume": True})
    assert "has all of its 14 steps" in capsys.readouterr().err


def test_a_run_resumed_before_its_first_checkpoint_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker.run({"run": tmp_path / "run", "steps": 2, "resume": True})
    assert "has no checkpoint; it starts at step 0" in capsys.readouterr().err


def test_a_model_whose_checkpoints_are_gone_is_not_overwritten(tmp_path: Path) -> None:
    run = tmp_path / "run"
    worker.run({"run": run, "steps": 2})
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="holds a run already"):
        worker.run({"run": run, "steps": 2})
    _reset()


def test_checkpoints_of_unknown_settings_are_not_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    worker.run({"run": run, "steps": 2})
    (run / "settings.json").unlink()
    with pytest.raises(ConfigError, match=r"has checkpoints but no settings.json"):
        worker.run({"run": run, "steps": 2, "resume": True})
    _reset()


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    """The limit on the size of a file stands for the disk."""
    run = tmp_path / "run"
    worker.run({"run": run})
    (run / "checkpoints" / "step-00000099.partial").mkdir()  # of a process that was killed
    with (
        limited_files(100_000),
        pytest.raises(CheckpointError, match=r"step-00000012 cannot be written \(the disk is full\)"),
    ):
        worker.run({"run": run, "steps": 14, "resume": True})
    _reset()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]
    worker.run({"run": run, "steps": 14, "resume": True})
    assert [line["step"] for line in lines(run)] == list(range(1, 15))


def test_an_export_on_a_full_disk_leaves_nothing_and_keeps_the_one_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    worker.run({"run": run, "steps": 2})
    before = weights(run)
    for model_is_there in (True, False):
        if not model_is_there:
            shutil.rmtree(run / "model")
        with limited_files(5_000), pytest.raises(Exception, match=r".") as caught:
            worker.run({"run": run, "steps": 2, "resume": True})
        assert disk_is_full(caught.value)
        _reset()
        assert (run / "model").exists() == model_is_there
        assert not (run / "model.partial").exists()
        if model_is_there:
            assert same(weights(run), before)
    worker.run({"run": run, "steps": 2, "resume": True})
    assert same(weights(run), before)


def test_an_export_that_was_cut_short_leaves_nothing_in_the_next(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    worker.run({"run": run})
    (run / "model" / "partial").mkdir()
    (run / "model" / "partial" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    worker.run({"run": run, "resume": True})
    assert {path.name for path in (run / "model").glob("model*")} == {"model.safetensors"}


def test_a_run_folder_is_not_overwritten(tmp_path: Path) -> None:
    worker.run({"run": tmp_path / "run", "steps": 2})
    with pytest.raises(ConfigError, match="holds a run already; resume it with --resume"):
        worker.run({"run": tmp_path / "run", "steps": 2})
    _reset()


def test_a_run_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    worker.run({"run": tmp_path / "run", "steps": 2})
    with pytest.raises(ConfigError, match=r"lr=0.5 but the run in .* began with 0.01"):
        worker.run({"run": tmp_path / "run", "steps": 2, "lr": 0.5, "resume": True})
    _reset()


def test_counts_are_exact_beyond_what_float32_holds(tmp_path: Path) -> None:
    settings = TrainSettings(**{**worker.DEFAULTS, "run": tmp_path / "run"})
    trainer = Trainer(worker.model(), worker.stage(settings), settings)
    assert trainer._sum([2**24 + 1, 0.5]) == [2**24 + 1, 0.5]
    trainer.close()


def test_a_stopped_run_writes_a_checkpoint_first(tmp_path: Path) -> None:
    fields: Fields = {"run": tmp_path / "run", "steps": 10_000, "save_every": 10_000}
    path = tmp_path / "fields.json"
    path.write_text(json.dumps(fields, default=str))
    script = str(ROOT / "tests" / "training" / "worker.py")
    with subprocess.Popen([sys.executable, script, str(path)], stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "continue with --resume" in " ".join(said.split())
    (step,) = checkpoints.checkpoint_steps(tmp_path / "run")
    assert lines(tmp_path / "run")[-1]["step"] <= step


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grad_norm=(nan|inf) in step \d+; start again with less than lr=1e\+30"):
        worker.run({"run": tmp_path / "run", "lr": 1e30, "save_every": 1})
    assert max(checkpoints.checkpoint_steps(tmp_path / "run"), default=0) < 5
    _reset()


def test_the_checkpoint_just_written_is_kept_beside_a_torn_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    worker.run({"run": run, "keep": 1})
    (run / "checkpoints" / "step-00000010" / "whole.json").unlink()
    worker.run({"run": run, "keep": 1, "resume": True, "save_every": 7})
    assert sorted(checkpoints.checkpoint_steps(run)) == [10]
    worker.run({"run": run, "keep": 1, "resume": True})
    assert len(lines(run)) == 10


def test_lines_of_a_run_that_never_saved_do_not_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n')
    worker.run({"run": run, "steps": 2})
    assert [line["step"] for line in lines(run)] == [1, 2]


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch=8 does not split into micro-batches of 3 rows"):
        worker.run({"run": tmp_path / "run", "micro_batch": 3})
    _reset()


def test_adapters_learn_and_are_merged(tmp_path: Path) -> None:
    worker.run({"run": tmp_path / "run", "lora_rank": 4, "export_dtype": "float32"})
    before, after = worker.model().model.state_dict(), weights(tmp_path / "run")
    assert not any("lora" in name for name in after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith("proj.weight") for name in changed)


@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_adapters_of_two_processes_are_those_of_one(tmp_path: Path, config: str) -> None:
    fields: Fields = {"lora_rank": 4, "micro_batch": 2}
    worker.run({"run": tmp_path / "one", **fields})
    done = launch({"run": tmp_path / "two", **fields}, config=config)
    assert done.returncode == 0, done.stderr
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(tmp_path / run / file) for run in ("one", "two"))
        assert one.keys() == two.keys()
        for name, weight in one.items():
            assert torch.allclose(weight, two[name], rtol=1e-3, atol=1e-4), name


def test_adapters_for_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora_targets=.* are not in this model"):
        worker.run({"run": tmp_path / "run", "lora_rank": 4, "lora_targets": ("qkv",)})


def test_gradient_checkpointing_gives_the_same_losses(tmp_path: Path, whole: Path) -> None:
    worker.run({"run": tmp_path / "run", "gradient_checkpointing": True})
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)


def test_trackers_get_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")  # an optional tracker
    worker.run({"run": tmp_path / "run", "steps": 2, "trackers": ("tensorboard",)})
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trackers": ("abacus",)}, r"trackers=\['abacus'\] cannot be used"),
        ({"run": Path("/proc/nowhere")}, "run='/proc/nowhere' cannot be used"),
        ({"betas": (2, 3)}, "betas"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path: Path, fields: Fields, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        worker.run({"run": tmp_path / "run", **fields})


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let this process write no file longer than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def _reset() -> None:
    """What `Trainer.close` does, for a run that never got there."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
