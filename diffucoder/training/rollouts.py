"""Rollouts: problems in, graded completions out, for reinforcement learning and its held-out pass@1.

For: choosing the problems of a step, prompts that fit, decoding by the project's own `denoise`, and grading in the
sandbox while the next completions are being decoded. Not for: what is learnt from them (`grpo`).

A completion's random numbers are keyed by the run's seed and its own number in the run, so neither the number of
processes nor the company it is decoded in changes what it is drawn from.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffucoder.decoding.generate import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.trace import global_ar_ness, local_ar_ness
from diffucoder.errors import ConfigError
from diffucoder.grading.sandbox import Limits, Sandbox
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.data import epoch_index
from diffucoder.training.exercises import Exercise
from diffucoder.training.rewards import Reward, reward
from diffucoder.training.settings import GrpoSettings

_ORDER = 30  # the last number of a key of noise: what is drawn


@dataclass(frozen=True)
class Completion:
    """One answer to a problem, before its reward is known."""

    exercise: Exercise
    prompt: list[int]
    tokens: list[int]  # the whole canvas behind the prompt, pads included
    length: int  # tokens up to and including the first terminator; all of them where there is none
    text: str
    steps: list[int]  # the step that committed each of `tokens`; -1: none did
    forward_passes: int

    @property
    def ar_ness(self) -> tuple[float, float]:
        """Local and global AR-ness@1 of what comes up to the terminator; nan for a single token."""
        own = [(step, at) for at, step in enumerate(self.steps[: self.length]) if step >= 0]
        order = [at for _, at in sorted(own)]
        return local_ar_ness(order, 1), global_ar_ness(order, 1)


@dataclass(frozen=True)
class Graded:
    """Completions with their rewards, and where the time went."""

    completions: list[Completion]
    rewards: list[Reward]
    decoding_seconds: float
    waiting_seconds: float  # for grading, after the last completion was there


class Rollouts:
    """Decodes and grades completions of a model that is being trained."""

    def __init__(self, coder: DiffuCoder, settings: GrpoSettings, sandbox: Sandbox) -> None:
        self.coder, self.settings, self.sandbox = coder, settings, sandbox
        self.params = DecodingParams(
            steps=settings.decoding_steps,
            new_tokens=settings.new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            policy=settings.policy,
            seed=settings.seed,
        )
        self.greedy = self.params.replace(temperature=0.0, top_p=None)
        self._limits = Limits(seconds=settings.test_seconds)

    def of_step(self, exercises: Sequence[Exercise], outer: int, rows: Sequence[int]) -> Graded:
        """Completions `rows` of the `outer`-th batch of the run; `group` consecutive rows share a problem."""
        settings = self.settings
        groups = settings.batch // settings.group
        first = outer * groups
        chosen = [
            exercises[epoch_index(first + row // settings.group, len(exercises), (settings.seed, _ORDER))]
            for row in rows
        ]
        return self.of(chosen, self.params, [outer * settings.batch + row for row in rows])

    def of(self, exercises: Sequence[Exercise], params: DecodingParams, numbers: Sequence[int]) -> Graded:
        """One completion for each exercise; `numbers` fix their random numbers."""
        began = time.perf_counter()
        completions: list[Completion] = []
        pending: list[Future[Reward]] = []
        with ThreadPoolExecutor(self.sandbox.workers) as pool:
            for start in range(0, len(exercises), self.settings.decode_batch):
                chunk = slice(start, start + self.settings.decode_batch)
                decoded = list(self._decode(exercises[chunk], params, numbers[chunk]))
                completions += decoded
                pending += [pool.submit(self._reward, each) for each in decoded]
            decoding = time.perf_counter() - began
            rewards = [future.result() for future in pending]
        return Graded(completions, rewards, decoding, time.perf_counter() - began - decoding)

    def _decode(
        self, exercises: Sequence[Exercise], params: DecodingParams, numbers: Sequence[int]
    ) -> Iterator[Completion]:
        tokenizer, width = self.coder.tokenizer, self.settings.prompt_tokens
        prompts = [prompt_ids(tokenizer, exercise.prompt, width) for exercise in exercises]
        canvas = replace(self.coder.canvas_of_ids(prompts, params.new_tokens), sample=torch.tensor(numbers))
        for exercise, prompt, result in zip(exercises, prompts, self.coder.decode(canvas, params), strict=True):
            trace = result.trace
            yield Completion(
                exercise=exercise,
                prompt=prompt,
                tokens=trace.tokens[trace.prompt_length :],
                length=min(len(result.tokens) + 1, params.new_tokens),
                text=result.text,
                steps=trace.steps,
                forward_passes=result.forward_passes,
            )

    def _reward(self, completion: Completion) -> Reward:
        settings = self.settings
        given = reward(
            completion.text,
            completion.exercise.tests,
            self.sandbox,
            style=settings.rewards,
            format_weight=settings.format_weight,
            tests_weight=settings.tests_weight,
            limits=self._limits,
        )
        if settings.all_or_nothing and not given.solved:
            return replace(given, total=settings.format_weight * given.format)
        return given


def prompt_ids(tokenizer: Tokenizer, request: str, longest: int) -> list[int]:
    """The chat prompt of `request` in at most `longest` tokens: of a longer request the end is kept, with the header.

    ConfigError where the header alone is longer than that.
    """
    ids = tokenizer.encode(tokenizer.chat(request))
    if len(ids) <= longest:
        return ids
    head, _, tail = tokenizer.chat("\0").partition("\0")
    header, footer = tokenizer.encode(head), tokenizer.encode(tail)
    room = longest - len(header) - len(footer)
    if room < 1:
        raise ConfigError(f"prompt_tokens={longest} has no room beside the header of {longest - room}; raise it")
    return [*header, *tokenizer.encode(request, special=False)[-room:], *footer]


def sample_lines(step: int, graded: Graded, advantages: Sequence[float]) -> Iterator[dict[str, Any]]:
    """What samples.jsonl holds of each completion."""
    for completion, given, advantage in zip(graded.completions, graded.rewards, advantages, strict=True):
        local, overall = completion.ar_ness
        yield {
            "step": step,
            "id": completion.exercise.id,
            "prompt": completion.exercise.prompt,
            "completion": completion.text,
            "reward": given.total,
            "format": given.format,
            "pass_rate": given.pass_rate,
            "status": given.status,
            "detail": given.detail,
            "advantage": advantage,
            "length": completion.length,
            "forward_passes": completion.forward_passes,
            "steps": completion.steps,
            "local_ar_ness": local,
            "global_ar_ness": overall,
        }
