"""Oracle 7 and the stage around it: hand-computed vectors, the first step's gradient, and real runs of a small model
that are killed, spread over processes, adapted by adapters, and learn."""

import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from diffucoder.analysis.runs import read_runs
from diffucoder.decoding.coder import DiffuCoder
from diffucoder.decoding.requests import Generation
from diffucoder.decoding.trace import Trace, read_traces
from diffucoder.diffusion import View
from diffucoder.errors import ConfigError, SandboxError
from diffucoder.grading.sandbox import Sandbox, isolation
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer
from diffucoder.models.denoiser import set_causal
from diffucoder.training.exercises import Exercise, write_exercises
from diffucoder.training.grpo import GrpoMicroBatch, GrpoStage, grpo, usable
from diffucoder.training.objectives import (
    CompletionBatch,
    advantages,
    clipped_loss,
    collate,
    k3,
    reduction_count,
    reduction_weights,
    token_scores,
)
from diffucoder.training.rewards import Reward
from diffucoder.training.rollouts import Completion, Rollouts, prompt_ids
from diffucoder.training.settings import GrpoSettings
from recipes.tiny.problems import problems as problems_of_tiny

ROOT = Path(__file__).parents[2]
Fields = dict[str, Any]  # Any: each setting has its own type, checked by pydantic


# --- formulas --------------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1])
    torch.testing.assert_close(advantages(rewards, 4, baseline="leave_one_out"), torch.tensor([2.0, -2, -2, 2]) / 3)
    torch.testing.assert_close(advantages(rewards, 4), torch.tensor([0.5, -0.5, -0.5, 0.5]))


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", [False, True])
def test_advantages_add_up_to_zero_in_each_group(baseline: str, scale: bool) -> None:
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0))
    sums = advantages(rewards, 6, baseline=baseline, scale=scale).view(4, 6).sum(1)
    torch.testing.assert_close(sums, torch.zeros(4), atol=1e-5, rtol=0)


def test_a_group_whose_rewards_are_equal_teaches_nothing_at_all() -> None:
    assert advantages(torch.full((7,), 2.0 * 0.6 + 0.5), 7).tolist() == [0.0] * 7


def test_scaled_advantages_have_the_spread_of_one() -> None:
    found = advantages(torch.tensor([0.0, 1, 2, 3]), 4, scale=True)
    assert float(found.std()) == pytest.approx(1, abs=1e-3)


def test_k3_by_hand() -> None:
    found = k3(torch.tensor([0.0, 0.0, -1.0]), torch.tensor([0.0, 0.1, -1.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0051709, 0.0]), atol=1e-6, rtol=0)


def test_ratios_are_clipped_on_the_side_that_the_advantage_points_to() -> None:
    now = torch.tensor([[1.0, -1.0, 0.1]]).repeat(2, 1)  # ratios 2.7, 0.37, 1.1
    loss, logged = clipped_loss(now, torch.zeros(2, 3), torch.tensor([1.0, -1.0]), low=0.5, high=0.5)
    expected = torch.tensor([[-1.5, -(torch.e**-1.0), -(torch.e**0.1)], [torch.e, 0.5, torch.e**0.1]])
    torch.testing.assert_close(loss, expected)
    assert logged["clip_high"].tolist() == [[True, False, False], [False, False, False]]
    assert logged["clip_low"].tolist() == [[False, False, False], [False, True, False]]


@pytest.mark.parametrize(
    ("reduction", "expected"), [("token", 11 / 4), ("sequence", (1 + 10 / 3) / 2), ("length", 11 / 10)]
)
def test_reductions_by_hand(reduction: str, expected: float) -> None:
    loss = torch.tensor([[1.0, 9, 9, 9, 9], [2, 3, 5, 9, 9]])
    weight = reduction_weights(loss < 9, reduction=reduction)
    count = reduction_count([1, 3], 5, reduction=reduction)
    assert float((loss * weight).sum() / count) == pytest.approx(expected)


class Scripted(nn.Module):
    """A denoiser of two tokens that gives token 0 the log-probabilities it was told, one call's rows each."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs  # (V * B, T)

    def forward(self, tokens: Tensor, *, rows: Tensor, reduce: Any, **_: Any) -> Tensor:
        wanted = self.log_probs[rows[:, 0], rows[:, 1]]  # (M,)
        logits = torch.stack([wanted, (1 - wanted.exp()).log()], -1)  # (M, 2)
        found: Tensor = reduce(logits, slice(0, len(rows)))
        return found


def test_the_coupled_score_by_hand() -> None:
    everything = torch.ones(1, 2, dtype=torch.bool)
    first = torch.tensor([[True, False]])
    views = [View(everything, everything / 2), View(first, first / (0.5 * 2)), View(~first, ~first / (0.5 * 2))]
    batch = CompletionBatch(torch.zeros(1, 2, dtype=torch.long), everything, everything, everything)
    model = Scripted(torch.tensor([[-2.0, -3.0], [-1.0, -7.0], [-7.0, -0.5]]))
    torch.testing.assert_close(token_scores(model, batch, views, mask_id=1), torch.tensor([[-2.0, -2.0]]))


# --- runs ------------------------------------------------------------------------------------------------------------

WORKER = """
import json, os, signal, sys, torch
from pathlib import Path
from diffucoder.training import grpo
from diffucoder.training.processes import exit_worker
from diffucoder.training.settings import GrpoSettings
from worker import shard_on_cpus
torch.set_num_threads(1)
shard_on_cpus()
fields = json.loads(Path(sys.argv[1]).read_text())
die = fields.pop("die", None)
loss = grpo.GrpoStage.loss
def dying(self, model, micro):
    dying.seen += 1
    if dying.seen == die:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, model, micro)
dying.seen = 0
grpo.GrpoStage.loss = dying
grpo.Rollouts.reward = lambda self, exercise, generation: made_up(generation)
grpo.grpo(GrpoSettings(**fields))
exit_worker()
"""


def made_up(generation: Generation) -> Reward:
    """A reward that a model which knows nothing can earn: the share of its tokens that are even."""
    tokens = generation.trace.tokens[generation.trace.prompt_length :]
    share = sum(token % 2 == 0 for token in tokens) / len(tokens)
    return Reward(share, 1.0, share, "ok", "", 0.0)


_HEAD = "from diffucoder.training.rewards import Reward\n" + inspect.getsource(made_up).replace(": Generation", "")


@pytest.fixture(scope="module")
def exercises(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few problems; in most tests their rewards are `made_up`."""
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("exercises") / "exercises.jsonl"
    made = [Exercise(f"e{n}", f"Add {n}.", (f"assert f({n}) == {n + 1}", "assert f(0) == 1")) for n in range(6)]
    write_exercises(path, made)
    return path


@pytest.fixture
def fields(tmp_path: Path, exercises: Path, adapted: Path) -> Fields:
    """Settings of a run of a few seconds."""
    return {
        **{"run": tmp_path / "run", "model": str(adapted), "data": (str(exercises),), "held_out": (str(exercises),)},
        **{"held_out_rows": 4, "steps": 4, "batch": 8, "group": 4, "lr": 1e-3, "bf16": False, "save_every": 2},
        **{"decoding": {"new_tokens": 12, "steps": 4}, "prompt_tokens": 40, "log_every": 1, "samples_every": 2},
        **{"export_dtype": "float32", "kl": 0.05, "reference_every": 3, "workers": 1},
    }


def launch(fields: Fields, *, config: str | None = None) -> subprocess.CompletedProcess[str]:
    """The run as a process of its own, or as two under one of recipes/accelerate/."""
    folder = Path(fields["run"])
    script, settings = folder.with_suffix(".py"), folder.with_suffix(".json")
    script.write_text(_HEAD + WORKER)
    settings.write_text(json.dumps(fields, default=str))
    launcher = [sys.executable]
    if config:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate" / config)]
        launcher += ["--num_processes", "2", "--main_process_port", "0"]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]  # of worker.py
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [*launcher, str(script), str(settings)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rollouts, "reward", lambda _, exercise, generation: made_up(generation))


@pytest.mark.usefixtures("_scripted")
def test_the_first_step_is_on_policy_and_near_the_reference(fields: Fields) -> None:
    grpo(GrpoSettings(**fields))
    first = lines(fields["run"])[0]
    assert first["ratio"] == 1
    assert first["clip_low"] == first["clip_high"] == first["kl"] == 0
    second = lines(fields["run"])[1]
    assert second["ratio"] != 1
    assert 0 < second["kl"] < 1


@pytest.mark.usefixtures("_scripted")
@pytest.mark.parametrize("estimator", ["coupled", "decoupled", "full_mask", "d1"])
def test_each_estimator_trains(fields: Fields, estimator: str) -> None:
    grpo(GrpoSettings(**{**fields, "estimator": estimator, "steps": 2}))
    assert (fields["run"] / "model" / "model.safetensors").exists()


@pytest.mark.usefixtures("_scripted")
def test_the_first_gradient_is_that_of_reinforce(fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    """On policy the gradient of the clipped ratio is that of advantage times score."""
    seen: list[tuple[Tensor, Tensor]] = []
    loss = GrpoStage.loss

    def compared(self: GrpoStage, model: nn.Module, micro: GrpoMicroBatch) -> Any:
        parameter = next(p for name, p in model.named_parameters() if "q_proj.weight" in name)
        (ours,) = torch.autograd.grad(loss(self, model, micro).loss, parameter)
        own = self.score(model, micro) * micro.advantage[:, None] * micro.weight
        (theirs,) = torch.autograd.grad(-own.sum(), parameter)
        seen.append((ours, theirs))
        return loss(self, model, micro)

    monkeypatch.setattr(GrpoStage, "loss", compared)
    grpo(GrpoSettings(**{**fields, "steps": 1, "iterations": 1, "save_every": 1, "kl": 0.0}))
    ours, theirs = seen[0]
    assert float(theirs.abs().max()) > 0
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("_scripted")
@pytest.mark.parametrize("kl", [0.0, 0.05])
def test_micro_batches_change_nothing(fields: Fields, kl: float) -> None:
    runs = [fields["run"] / str(size) for size in (8, 2)]
    for run, size in zip(runs, (8, 2), strict=True):
        grpo(GrpoSettings(**{**fields, "run": run, "micro_batch": size, "steps": 2, "kl": kl}))
    for name in ("loss", "grad_norm", "reward", "ratio"):
        left, right = ([line[name] for line in lines(run)] for run in runs)
        assert left == pytest.approx(right, rel=1e-3, abs=2e-6), name


@pytest.mark.usefixtures("_scripted")
def test_each_inner_iteration_has_masks_of_its_own_and_old_scores_have_the_same(
    fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GrpoMicroBatch] = []
    loss = GrpoStage.loss

    def noted(self: GrpoStage, model: nn.Module, micro: GrpoMicroBatch) -> Any:
        seen.append(micro)
        if micro.old is not None and len(seen) == 2:  # nothing has been learnt in between: the very same numbers
            model.load_state_dict(start)
            torch.testing.assert_close(self.score(model, micro).detach(), micro.old)
        return loss(self, model, micro)

    start = {name: tensor.clone() for name, tensor in load_denoiser(fields["model"]).state_dict().items()}
    monkeypatch.setattr(GrpoStage, "loss", noted)
    grpo(GrpoSettings(**{**fields, "steps": 2}))
    first, second = seen
    assert torch.equal(first.batch.tokens, second.batch.tokens)
    assert not torch.equal(first.views[1].masked, second.views[1].masked)
    assert first.old is None


@pytest.mark.usefixtures("_scripted")
def test_a_run_killed_in_mid_iteration_goes_on_bit_for_bit(fields: Fields) -> None:
    grpo(GrpoSettings(**fields))
    killed = {**fields, "run": fields["run"].with_name("killed")}
    assert launch({**killed, "die": 4}).returncode == -signal.SIGKILL
    assert not (killed["run"] / "model").exists()
    grpo(GrpoSettings(**{**killed, "resume": True}))
    assert same(weights(killed["run"]), weights(fields["run"]))
    told = [line["step"] for line in lines(killed["run"], "samples.jsonl")]
    assert told == [line["step"] for line in lines(fields["run"], "samples.jsonl")]


@pytest.mark.usefixtures("_scripted")
def test_a_run_is_not_continued_with_another_way_of_decoding(fields: Fields) -> None:
    grpo(GrpoSettings(**{**fields, "steps": 2}))
    changed = {"decoding": {"new_tokens": 12, "steps": 6}, "resume": True}
    with pytest.raises(ConfigError, match=r"decoding.steps=6 but the run in .* began with 4; set it back"):
        grpo(GrpoSettings(**{**fields, "steps": 2, **changed}))


@pytest.mark.usefixtures("_scripted")
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_are_one(fields: Fields, config: str) -> None:
    grpo(GrpoSettings(**{**fields, "micro_batch": 2}))
    two = {**fields, "run": fields["run"].with_name("two"), "micro_batch": 2}
    done = launch(two, config=config)
    assert done.returncode == 0, done.stderr
    for name in ("loss", "reward", "kl", "ratio"):
        left, right = ([line[name] for line in lines(run)] for run in (fields["run"], two["run"]))
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4), name


@pytest.mark.usefixtures("_scripted")
def test_under_adapters_the_reference_is_the_model_without_them(fields: Fields) -> None:
    """The KL divergence is 0 at first and stays small, and what is exported is the whole model."""
    grpo(GrpoSettings(**{**fields, "lora_rank": 2, "steps": 2}))
    told = lines(fields["run"])
    assert told[0]["kl"] == 0 < told[1]["kl"]
    assert not any("lora" in name for name in weights(fields["run"]))


@pytest.mark.usefixtures("_scripted")
def test_a_run_learns_what_is_rewarded(fields: Fields) -> None:
    more = {"steps": 40, "save_every": 40, "batch": 32, "group": 8, "lr": 3e-3, "kl": 0.0, "held_out": ()}
    grpo(GrpoSettings(**{**fields, **more}))
    earned = [line["reward"] for line in lines(fields["run"])]
    assert sum(earned[-6:]) / 6 > sum(earned[:6]) / 6 + 0.1


def test_programs_that_are_written_are_run_and_told(fields: Fields, tmp_path: Path) -> None:
    """The shipped model on problems that it half knows, graded in the sandbox."""
    problems = tmp_path / "problems.jsonl"
    made = [Exercise(p.name, p.prompt, p.tests) for p in problems_of_tiny("train", 8, seed=3)]
    write_exercises(problems, made)
    real = {"model": None, "data": (str(problems),), "held_out": (str(problems),), "prompt_tokens": 80, "steps": 2}
    grpo(GrpoSettings(**{**fields, **real, "decoding": {"new_tokens": 48, "steps": 16}}))
    told = lines(fields["run"])[-1]
    assert 0 < told["reward"] <= 2.5
    assert 0 < told["held_out_pass@1"] <= 1
    assert {"zero_variance", "length", "local_ar_ness", "decoding_seconds", "grading_seconds"} <= told.keys()
    samples = lines(fields["run"], "samples.jsonl")
    assert len(samples) == 8
    assert {"ok"} <= {sample["status"] for sample in samples}
    assert all(len(sample["tokens"]) == len(sample["steps"]) for sample in samples)
    traces = read_traces(fields["run"] / "traces.jsonl")
    assert [trace.id for trace in traces] == [f"{sample['id']}#{number}" for number, sample in enumerate(samples)]
    (run,) = read_runs([fields["run"]])  # as diffucoder order does
    assert run.settings["after_step"] == samples[0]["step"] - 1
    assert [answer.passed for answer in run.answers] == [sample["pass_rate"] == 1 for sample in samples]
    assert ["".join(answer.pieces[: answer.length]) for answer in run.answers] == [
        "".join(sample["tokens"]) for sample in samples
    ]


# --- what the settings do in a run -----------------------------------------------------------------------------------


@pytest.fixture
def stage(fields: Fields) -> Any:
    """Makes a stage of the small model, without a trainer around it."""

    def make(**changes: Any) -> GrpoStage:
        settings = GrpoSettings(**{**fields, **changes})
        settings.run.mkdir(exist_ok=True)
        denoiser = load_denoiser(settings.model, dtype=torch.float32)
        coder = DiffuCoder(denoiser, load_tokenizer(settings.model))
        rollouts = Rollouts(coder, settings, sandbox)
        asked = [Exercise(f"e{n}", f"Add {n}.", (f"assert f({n}) == {n + 1}",)) for n in range(6)]
        return GrpoStage(denoiser, rollouts, asked, asked, settings)

    with Sandbox(1) as sandbox:
        yield make


def first_micro_batch(stage: GrpoStage) -> GrpoMicroBatch:
    """What the first update of the first round learns from."""
    micro: GrpoMicroBatch = next(stage.batches(0, [range(8)])).micro_batches[0]
    return micro


def generation(prompt: list[int], answer: list[int], length: int, text: str = "") -> Generation:
    """An answer that fills a canvas, of which `length` tokens come before the terminator."""
    trace = Trace(
        tokens=prompt + answer,
        prompt_length=len(prompt),
        steps=[0] * len(answer),
        confidence=[],
        log_probs=[],
        forward_passes=1,
    )
    return Generation(0, text, (text,), tuple(answer[:length]), 1, 0.0, "stop", trace)


@pytest.mark.usefixtures("_scripted")
def test_a_group_is_of_one_problem_and_groups_differ(stage: Any) -> None:
    made = stage()
    completions, _ = made.rollouts.of_round(made.exercises, 0, list(range(8)))
    asked = [completion.exercise.id for completion in completions]
    assert len(set(asked[:4])) == len(set(asked[4:])) == 1
    assert asked[0] != asked[4]
    assert len({tuple(completion.generation.trace.tokens) for completion in completions[:4]}) > 1


def test_what_counts_of_a_completion_ends_with_its_terminator(stage: Any) -> None:
    for answer, before, length in (([7, 8, 1, 7, 7, 7], 2, 3), ([7] * 6, 6, 6), ([1] * 6, 0, 1)):
        written = generation([7, 9], answer, before)
        assert collate([written], pad_id=0).scored.sum() == length
        assert Completion(Exercise("", "", ()), written, made_up(written)).length == length
    made = stage(decoding={"new_tokens": 6})
    terminators = made.rollouts.coder.tokenizer.terminator_ids
    written = made.rollouts.decode(made.exercises * 20, made.rollouts.params, range(120))
    scored = collate(written, pad_id=0).scored.sum(1).tolist()
    for answer, length in zip(written, scored, strict=True):
        tokens = answer.trace.tokens[answer.trace.prompt_length :]
        ends = [at + 1 for at, token in enumerate(tokens) if token in terminators]
        assert length == min([*ends, 6])
    assert len(set(scored)) > 2


@pytest.mark.usefixtures("_scripted")
def test_the_pads_behind_an_answer_are_scored_where_that_is_asked_for(stage: Any) -> None:
    made = stage(decoding={"new_tokens": 6}, score_padding=True)
    completions, _ = made.rollouts.of_round(made.exercises, 0, list(range(8)))
    ended = []
    for completion in completions:
        trace = completion.generation.trace
        tokens = tuple(trace.tokens[trace.prompt_length :][:2])  # and a terminator
        ended.append(replace(completion, generation=replace(completion.generation, tokens=tokens)))
    pad_id = made.rollouts.coder.tokenizer.pad_id
    assert collate([completion.generation for completion in ended], pad_id=pad_id).scored.sum() == 8 * 3
    micro = made.micro_batch(0, range(8), dict(enumerate(ended)), torch.tensor([1.0, -1] * 4))
    assert micro.count == 8 * 6
    assert made.score_now(micro)[micro.batch.completion].ne(0).all()


@pytest.mark.usefixtures("_scripted")
def test_a_divergence_from_the_reference_costs(stage: Any) -> None:
    made = stage(kl=2.0)
    made.begin()
    micro = first_micro_batch(made)
    moved = replace(micro, reference=micro.reference + 0.5)
    near, far = (made.loss(made.denoiser, each).loss.detach() for each in (micro, moved))
    cost = float(k3(torch.tensor([0.0]), torch.tensor([0.5])))
    assert float(far - near) == pytest.approx(2.0 * cost * float(micro.weight.sum()), rel=1e-3)


@pytest.mark.usefixtures("_scripted")
@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_the_reference_follows_the_policy_when_it_is_due(stage: Any, mix: float) -> None:
    made = stage(reference_every=2, reference_mix=mix, iterations=1)
    kept = made.begin()
    before = {name: tensor.clone() for name, tensor in kept.items()}
    with torch.no_grad():
        for parameter in made.denoiser.parameters():
            parameter.add_(1.0)
    name = next(iter(kept))
    for step, moved in ((0, 0.0), (1, mix)):  # it is due before step 2
        for _ in made.batches(step, [range(8)]):
            torch.testing.assert_close(kept[name], before[name])
        torch.testing.assert_close(kept[name], before[name] + moved)


@pytest.mark.usefixtures("_scripted")
def test_each_completion_has_a_mask_ratio_of_its_own_or_all_have_one(stage: Any) -> None:
    for per, differ in (("row", True), ("step", False)):
        made = stage(ratio_per=per)
        view = first_micro_batch(made).views[1]
        weights_of_rows = {round(float(weight.max()), 5) for weight in view.weight}
        assert (len(weights_of_rows) > 1) is differ


@pytest.mark.usefixtures("_scripted")
def test_completions_of_a_problem_may_share_their_masks(stage: Any) -> None:
    for shared in (False, True):
        made = stage(group_masks=shared)
        masked = first_micro_batch(made).views[1].masked[:, -12:]  # (8, 12): the completions
        assert bool((masked[:4] == masked[0]).all()) is shared
        assert not torch.equal(masked[0], masked[4])


@pytest.mark.usefixtures("_scripted")
def test_objective_settings_reach_the_objective(stage: Any) -> None:
    plain = first_micro_batch(stage())
    one_out = first_micro_batch(stage(advantage="leave_one_out"))
    torch.testing.assert_close(one_out.advantage, plain.advantage * 4 / 3)
    scaled = first_micro_batch(stage(scale_rewards=True))
    torch.testing.assert_close(scaled.advantage.view(2, 4).std(1), torch.ones(2), atol=0.05, rtol=0)
    milder = first_micro_batch(stage(negative_weight=0.25))
    torch.testing.assert_close(milder.advantage, plain.advantage.where(plain.advantage > 0, plain.advantage / 4))
    by_completion = first_micro_batch(stage(reduction="sequence"))
    torch.testing.assert_close(by_completion.weight.sum(1), torch.ones(8))
    assert by_completion.count == 8
    assert first_micro_batch(stage(reduction="length")).count == 8 * 12


@pytest.mark.usefixtures("_scripted")
def test_clipping_settings_reach_the_objective(stage: Any) -> None:
    made = stage(epsilon_low=0.1, epsilon_high=4.0, kl=0.0)
    micro = first_micro_batch(made)
    with torch.no_grad():
        now = made.score(made.denoiser, micro)
    up = made.loss(made.denoiser, replace(micro, old=now - 1.0)).figures  # ratios of 2.7
    down = made.loss(made.denoiser, replace(micro, old=now + 1.0)).figures  # ratios of 0.37
    assert up["clip_high"][0] == 0 < down["clip_low"][0]
    uneven = now + torch.linspace(-1, 1, now.shape[1])
    _, logged = clipped_loss(now, uneven, micro.advantage, low=0.1, high=4.0)
    told = made.loss(made.denoiser, replace(micro, old=uneven)).figures["ratio"][0]
    torch.testing.assert_close(told, (logged["ratio"] * micro.batch.scored).sum(), rtol=1e-3, atol=1e-3)


def test_rollout_settings_reach_decoding_and_rewards(stage: Any) -> None:
    decoding = {"top_p": 0.7, "temperature": 0.9, "threshold": 0.8, "block": 4, "cache": "dual"}
    made = stage(decoding=decoding, seed=5, rewards="paper")
    params = made.rollouts.params
    assert (params.top_p, params.temperature, params.threshold) == (0.7, 0.9, 0.8)
    assert (params.block, params.cache, params.seed) == (4, "dual", 5)
    assert (made.rollouts.greedy.temperature, made.rollouts.greedy.top_p) == (0, None)
    program = generation([1], [1], 1, "def f(n):\n    return n + 1\n")
    right = Exercise("", "", ("assert f(1) == 2",))
    assert made.rollouts.reward(right, program).total == 0.0  # no fence, and so nothing as released
    half = Exercise("", "", ("assert f(1) == 2", "assert f(1) == 3"))
    assert stage().rollouts.reward(half, program).total == 1.5


@pytest.mark.usefixtures("_scripted")
def test_completions_may_be_decoded_by_the_fast_preset(stage: Any) -> None:
    made = stage(decoding={"preset": "fast", "new_tokens": 12})
    params = made.rollouts.params
    assert (params.cache, params.entropy_bound, params.temperature, params.top_p) == ("delayed", 0.01, 1.2, 0.95)
    assert first_micro_batch(made).batch.completion.sum() == 8 * 12


@pytest.mark.usefixtures("_scripted")
def test_held_out_answers_are_greedy(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = stage(), []
    write = Rollouts.write
    monkeypatch.setattr(Rollouts, "write", lambda self, *args: seen.append(args[1]) or write(self, *args))
    list(made.held_out(made.denoiser, [range(4)]))
    assert [params.temperature for params in seen] == [0]


@pytest.mark.usefixtures("_scripted")
def test_decoding_in_training_is_fast_and_sees_the_newest_weights(stage: Any) -> None:
    made = stage()
    tokens = torch.tensor([[5, 6, 7, made.denoiser.mask_id]])
    with torch.no_grad():
        for parameter in made.denoiser.parameters():
            parameter.mul_(1.3)
        plain = made.denoiser(tokens)
        every = torch.ones_like(tokens, dtype=torch.bool)
        wanted = torch.tensor([[0, 1], [0, 2], [0, 3]])
        with made.ready_to_decode():
            assert made.denoiser.fast is not None
            (fast,) = made.denoiser.score(
                tokens, valid=every, feed=every, wanted=wanted, reduce=lambda logits, chunk: logits
            )
    torch.testing.assert_close(fast, plain[0, 1:], atol=1e-4, rtol=1e-4)
    assert made.denoiser.fast is None


def test_steep_ratios_give_numbers() -> None:
    score_ = torch.tensor([[100.0, -100.0, 0.0]], requires_grad=True)
    for advantage in (-1.0, 0.0, 1.0):
        loss, _ = clipped_loss(score_, torch.zeros(1, 3), torch.tensor([advantage]), low=0.5, high=0.5)
        (gradient,) = torch.autograd.grad((loss + k3(score_, torch.zeros(1, 3))).sum(), score_)
        assert gradient.isfinite().all()
        assert loss.isfinite().all()


def test_special_tokens_spelt_in_a_request_are_plain_text(adapted: Path) -> None:
    tokenizer = load_tokenizer(str(adapted))
    spelt = f"Fill {tokenizer.mask_token} and <|im_end|> in."
    ids = prompt_ids(tokenizer, spelt, 60)
    plain = tokenizer.encode_chat("x")
    special = [token for token in ids if token in tokenizer.special_ids]
    assert special == [token for token in plain if token in tokenizer.special_ids]
    assert spelt in tokenizer.decode(ids)


# --- what is left out or refused -------------------------------------------------------------------------------------


def test_long_requests_lose_their_beginning_and_never_their_header(adapted: Path) -> None:
    tokenizer = load_tokenizer(str(adapted))
    whole = tokenizer.encode_chat("add numbers " * 30)
    cut = prompt_ids(tokenizer, "add numbers " * 30, 40)
    head, _, tail = tokenizer.chat("\0").partition("\0")
    header, footer = tokenizer.encode(head, special=True), tokenizer.encode(tail, special=True)
    assert len(cut) == 40 < len(whole)
    assert cut[: len(header)] == header
    assert cut[-len(footer) :] == footer
    assert cut[-20:] == whole[-20:]
    with pytest.raises(ConfigError, match="prompt_tokens=8 has no room"):
        prompt_ids(tokenizer, "add numbers " * 30, 8)


def test_tests_that_a_program_could_tamper_with_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    safe, unsafe = "assert f(1) == 2", "x = f(1)\nassert x > 1"
    kept = usable([Exercise("a", "A", (safe, unsafe)), Exercise("b", "B", (unsafe,))], "held_out")
    assert [(e.id, e.tests) for e in kept] == [("a", (safe,))]
    said = " ".join(capsys.readouterr().err.split())
    assert "held_out: left out 2 tests that a program could tamper with, and 1 problems" in said
    with pytest.raises(ConfigError, match="data has no usable test in 1 problems"):
        usable([Exercise("b", "B", (unsafe,))], "data")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 10}, "batch=10 is not a multiple of group=4"),
        ({"steps": 5}, "steps=5 is not a multiple of iterations=2"),
        ({"save_every": 3}, "save_every=3 is not a multiple of iterations=2"),
        ({"mask_ratio": (0.0, 0.5)}, r"mask_ratio=\(0.0, 0.5\) is not a range inside"),
        ({"decoding": {"cache": "dual"}}, r"in \[decoding\]: cache='dual' needs a block"),
        ({"decoding": {"temperature": 0}}, "decoding.temperature=0: input should be greater than 0"),
        ({"decoding": {"seed": 3}}, "decoding.seed=3 cannot be set for training"),
        ({"decoding": {"num_samples": 2}}, "decoding.num_samples=2 cannot be set for training"),
        ({"decoding": {"stop": ("x",)}}, r"decoding.stop=\('x',\) cannot be set for training"),
        (
            {"decoding": {"cache": "delayed"}, "lora_rank": 2},
            "'delayed' does not work with the adapters of lora_rank=2",
        ),
        ({"estimator": "causal"}, "estimator='causal': input should be 'coupled', 'decoupled', 'full_mask' or 'd1'"),
        ({"estimator": "d1", "pairs": 2}, "pairs=2 is for coupled and decoupled; d1 has one pass"),
        ({"decoding": {"preset": "fast"}, "lora_rank": 2}, "'delayed' does not work with the adapters of lora_rank=2"),
        ({"temperature": 1.0}, "unknown setting 'temperature'; did you mean 'decoding.temperature'"),
        ({"decoding_steps": 8}, "unknown setting 'decoding_steps'; did you mean 'decoding.steps'"),
        ({"prompt_tokens": 4000}, r"prompt_tokens \+ decoding.new_tokens=4012 exceeds the model's context"),
    ],
)
def test_what_cannot_work_is_one_line(fields: Fields, changes: Fields, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        grpo(GrpoSettings(**{**fields, **changes}))
    assert "\n" not in str(raised.value)
    assert not fields["run"].exists()


# --- the autoregressive baseline -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal() -> Fields:
    return runpy.run_path(str(ROOT / "recipes" / "tiny" / "causal.py"))


@pytest.mark.usefixtures("_scripted")
def test_the_autoregressive_baseline_trains(fields: Fields, parent: Path, causal: Fields) -> None:
    given = {**fields, "model": str(parent), "steps": 2, "bf16": "false", "decoding": "{new_tokens = 12}"}
    given |= {name: json.dumps(fields[name]) for name in ("data", "held_out")}
    causal["main"](changes=[f"{name}={value}" for name, value in given.items()])
    assert AutoModelForCausalLM.from_pretrained(fields["run"] / "model").config.model_type == "qwen2"
    first = lines(fields["run"])[0]
    assert first["ratio"] == 1
    assert first["local_ar_ness"] == first["global_ar_ness"] == 1


@pytest.mark.parametrize("change", ["estimator=full_mask", "pairs=2"])
def test_the_autoregressive_baseline_has_no_estimator(fields: Fields, causal: Fields, change: str) -> None:
    given = {"run": fields["run"], "data": json.dumps(fields["data"]), "steps": 2, "lr": 1e-3}
    with pytest.raises(typer.BadParameter, match="estimator and pairs need masks; leave them out"):
        causal["main"](changes=[*(f"{name}={value}" for name, value in given.items()), change])


def test_the_causal_score_is_that_of_the_plain_model(fields: Fields, parent: Path, causal: Fields) -> None:
    tokenizer = load_tokenizer(str(parent))
    denoiser = load_denoiser(str(parent), mask_id=tokenizer.mask_id, dtype=torch.float32)
    set_causal(denoiser.model, True)
    model = causal["CausalModel"](denoiser.model, mask_id=denoiser.mask_id)
    settings = GrpoSettings(**{**fields, "chat": False, "decoding": {"new_tokens": 12, "block": 1, "temperature": 1.0}})
    rollouts = Rollouts(DiffuCoder(model, tokenizer), settings, Sandbox(1))
    asked = [Exercise("a", "def f0(xs):", ()), Exercise("b", "def f1(xs):\n    return", ())]
    written = rollouts.decode(asked, rollouts.params, [0, 1])
    batch = collate(written, pad_id=tokenizer.pad_id)
    views = causal["CausalStage"](model, rollouts, asked, [], settings).views(0, range(2), batch)
    with torch.no_grad():
        ours = token_scores(model, batch, views, mask_id=model.mask_id)
        for row, completion in enumerate(written):
            whole = torch.tensor([completion.trace.tokens])
            logits = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)(whole).logits.log_softmax(-1)
            theirs = logits[0, :-1].gather(1, whole[0, 1:, None])[:, 0][completion.trace.prompt_length - 1 :][
                : int(batch.scored[row].sum())
            ]
            torch.testing.assert_close(ours[row][batch.scored[row]], theirs, atol=1e-4, rtol=1e-4)
