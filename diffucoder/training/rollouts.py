"""Rollouts: exercises in, graded completions out, for reinforcement learning and its held-out pass@1.

Completions are graded in the sandbox while the next ones are decoded. The run's seed and a completion's number in the
run fix its random numbers, whatever the number of processes.
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from diffucoder.decoding.coder import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.requests import Generation
from diffucoder.decoding.trace import commit_order, global_ar_ness, local_ar_ness, write_traces
from diffucoder.errors import ConfigError
from diffucoder.files import append_jsonl, write_jsonl
from diffucoder.grading.sandbox import Limits, Sandbox
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.data import epoch_index
from diffucoder.training.exercises import Exercise
from diffucoder.training.rewards import Reward, reward
from diffucoder.training.settings import GrpoSettings

_ORDER = 30  # the last number of a key of noise: what is drawn


@dataclass(frozen=True)
class Completion:
    """An answer to an exercise, graded."""

    exercise: Exercise
    generation: Generation
    reward: Reward

    @property
    def length(self) -> int:
        """Tokens up to and including the terminator; all of the canvas if there is none."""
        return min(len(self.generation.tokens) + 1, len(self.generation.trace.steps))

    @property
    def figures(self) -> dict[str, float]:
        """What is logged of it; AR-ness@1 is nan for a single token."""
        order = commit_order(self.generation.trace.steps[: self.length])
        return {
            "reward": self.reward.total,
            "format": self.reward.format,
            "pass_rate": self.reward.pass_rate,
            "solved": float(self.reward.solved),
            "length": float(self.length),
            "tokens_per_forward": self.length / max(1, self.generation.forward_passes),
            "local_ar_ness": local_ar_ness(order, 1),
            "global_ar_ness": global_ar_ness(order, 1),
        }


class Rollouts:
    """Writes and grades completions of a model that is being trained."""

    def __init__(self, coder: DiffuCoder, settings: GrpoSettings, sandbox: Sandbox) -> None:
        self.coder = coder
        self.settings = settings
        self.sandbox = sandbox
        self.params = settings.decoding.replace(seed=settings.seed)
        self.greedy = self.params.replace(temperature=0.0, top_p=None)

    def of_round(
        self, exercises: Sequence[Exercise], number: int, rows: Sequence[int]
    ) -> tuple[list[Completion], dict[str, float]]:
        """Completions `rows` of a round of the run; `group` consecutive rows answer the same exercise."""
        settings = self.settings
        groups = settings.batch // settings.group
        chosen = []
        for row in rows:
            position = number * groups + row // settings.group
            chosen.append(exercises[epoch_index(position, len(exercises), (settings.seed, _ORDER))])
        return self.write(chosen, self.params, [number * settings.batch + row for row in rows])

    def write(
        self, exercises: Sequence[Exercise], params: DecodingParams, numbers: Sequence[int]
    ) -> tuple[list[Completion], dict[str, float]]:
        """One completion for each exercise, and the seconds (docs/rl.md); `numbers` fix their random numbers."""
        began = time.perf_counter()
        graded = []
        with ThreadPoolExecutor(self.sandbox.workers) as pool:
            for start in range(0, len(exercises), self.settings.decode_batch):
                chunk = slice(start, start + self.settings.decode_batch)
                decoded = self.decode(exercises[chunk], params, numbers[chunk])
                for exercise, generation in zip(exercises[chunk], decoded, strict=True):
                    graded.append((exercise, generation, pool.submit(self.reward, exercise, generation)))
            decoded_at = time.perf_counter()
            completions = [Completion(exercise, generation, future.result()) for exercise, generation, future in graded]
        seconds = {"decoding_seconds": decoded_at - began, "waiting_seconds": time.perf_counter() - decoded_at}
        seconds["grading_seconds"] = sum(completion.reward.seconds for completion in completions)
        return completions, seconds

    def decode(self, exercises: Sequence[Exercise], params: DecodingParams, numbers: Sequence[int]) -> list[Generation]:
        settings = self.settings
        requests = []
        for exercise, number in zip(exercises, numbers, strict=True):
            ids = prompt_ids(self.coder.tokenizer, exercise.prompt, settings.prompt_tokens, chat=settings.chat)
            requests.append(self.coder.request_of_ids(ids, params, sample=number))
        return [results[0] for results in self.coder.run(requests)]

    def reward(self, exercise: Exercise, generation: Generation) -> Reward:
        """What an answer is worth; its program runs in the sandbox."""
        settings = self.settings
        seconds = settings.test_seconds
        if settings.rewards == "paper":
            seconds *= len(exercise.tests)
        limits = Limits(seconds=seconds)
        return reward(generation.text, exercise.tests, self.sandbox, style=settings.rewards, limits=limits)


def prompt_ids(tokenizer: Tokenizer, request: str, longest: int, *, chat: bool = True) -> list[int]:
    """The prompt of `request` in at most `longest` tokens: of a longer one the end is kept. ConfigError for no room."""
    plain = tokenizer.encode(request)
    if not chat:
        return plain[-longest:]
    whole = tokenizer.encode_chat(request)
    if len(whole) <= longest:
        return whole
    before, _, after = tokenizer.chat("\0").partition("\0")
    header = tokenizer.encode(before, special=True)
    footer = tokenizer.encode(after, special=True)
    room = longest - len(header) - len(footer)
    if room < 1:
        raise ConfigError(f"prompt_tokens={longest} has no room beside the header of {longest - room}; raise it")
    return [*header, *plain[-room:], *footer]


def write_samples(
    run: Path, step: int, completions: Sequence[Completion], advantages: Sequence[float], tokenizer: Tokenizer
) -> None:
    """Add what `step` learns from to samples.jsonl, and write traces.jsonl and verdicts.jsonl of it."""
    lines = []
    traces = []
    verdicts = []
    for number, (completion, advantage) in enumerate(zip(completions, advantages, strict=True)):
        exercise = completion.exercise
        trace = completion.generation.trace
        tokens = trace.tokens[trace.prompt_length :][: completion.length]
        line = {
            "step": step,
            "id": exercise.id,
            "prompt": exercise.prompt,
            "completion": completion.generation.text,
            "status": completion.reward.status,
            "detail": completion.reward.detail,
            "advantage": round(advantage, 6),
            "forward_passes": completion.generation.forward_passes,
            "tokens": tokenizer.pieces(tokens),
            "steps": trace.steps[: completion.length],
        }
        for name, value in completion.figures.items():
            line[name] = None if math.isnan(value) else round(value, 6)  # JSON has no nan
        lines.append(line)
        traces.append(replace(trace, id=f"{exercise.id}#{number}"))
        verdict = {"task_id": exercise.id, "sample": number, "passed": completion.reward.solved}
        verdicts.append(verdict | {"after_step": step - 1})
    append_jsonl(run / "samples.jsonl", lines)
    write_traces(run / "traces.jsonl", traces)
    write_jsonl(run / "verdicts.jsonl", verdicts)
