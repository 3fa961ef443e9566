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
from torch.nn.utils.rnn import pad_sequence

from diffucoder.decoding.generate import DiffuCoder, Generation
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.trace import commit_order, global_ar_ness, local_ar_ness
from diffucoder.diffusion import keyed_generator
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

    @classmethod
    def of(cls, exercise: Exercise, prompt: list[int], result: Generation) -> "Completion":
        """What decoding made of the exercise's prompt."""
        trace = result.trace
        tokens = trace.tokens[trace.prompt_length :]
        length = min(len(result.tokens) + 1, len(tokens))
        return cls(exercise, prompt, tokens, length, result.text, trace.steps, result.forward_passes)

    @property
    def ar_ness(self) -> tuple[float, float]:
        """Local and global AR-ness@1 of what comes up to the terminator; nan for a single token."""
        order = commit_order(self.steps[: self.length])
        return local_ar_ness(order, 1), global_ar_ness(order, 1)


@dataclass(frozen=True)
class Graded:
    """Completions with their rewards, and where the time went."""

    completions: list[Completion]
    rewards: list[Reward]
    decoding_seconds: float
    waiting_seconds: float  # for grading, after the last completion was there

    def split(self, shares: Sequence[range]) -> Iterator["Graded"]:
        """The completions of each share, of which there are as many as it is long; without times."""
        at = 0
        for share in shares:
            part = slice(at, at + len(share))
            yield Graded(self.completions[part], self.rewards[part], 0.0, 0.0)
            at += len(share)


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
            threshold=settings.threshold,
            block=settings.block,
            cache=settings.decoding_cache,
            seed=settings.seed,
        )
        self.greedy = self.params.replace(temperature=0.0, top_p=None)

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
        prompts = [prompt_ids(tokenizer, exercise.prompt, width, chat=self.settings.chat) for exercise in exercises]
        if self.settings.estimator == "causal":
            yield from self._continue(exercises, prompts, params, numbers[0])
            return
        canvas = replace(self.coder.canvas_of_ids(prompts, params.new_tokens), sample=torch.tensor(numbers))
        for exercise, prompt, result in zip(exercises, prompts, self.coder.decode(canvas, params), strict=True):
            yield Completion.of(exercise, prompt, result)

    def _continue(
        self, exercises: Sequence[Exercise], prompts: Sequence[list[int]], params: DecodingParams, number: int
    ) -> Iterator[Completion]:
        """Completions of an autoregressive model, left to right, by transformers' own generation.

        It draws from the global generator, which is put back, so unlike a denoiser's these depend on their company.
        """
        tokenizer, model = self.coder.tokenizer, self.coder.model
        rows = [torch.tensor(prompt) for prompt in prompts]
        tokens = pad_sequence(rows, batch_first=True, padding_side="left", padding_value=tokenizer.pad_id)  # (B, P)
        width = tokens.shape[1]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        sampled: dict[str, Any] = {"do_sample": False}  # Any: what transformers takes
        if params.temperature:
            sampled = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p or 1.0, "top_k": 0}
        with torch.random.fork_rng():
            torch.manual_seed(keyed_generator(params.seed, number).initial_seed())
            written = model.model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=(torch.arange(width) >= width - lengths[:, None]).long().to(model.device),
                max_new_tokens=params.new_tokens,
                eos_token_id=sorted(tokenizer.terminator_ids),
                pad_token_id=tokenizer.pad_id,
                **sampled,
            )[:, width:].tolist()
        for exercise, prompt, answer in zip(exercises, prompts, written, strict=True):
            end = next((at for at, token in enumerate(answer) if token in tokenizer.terminator_ids), len(answer))
            length = min(end + 1, params.new_tokens)
            rest = params.new_tokens - length
            padded = answer[:length] + [tokenizer.pad_id] * rest
            text = tokenizer.decode(answer[:end])
            yield Completion(exercise, prompt, padded, length, text, [*range(length), *[-1] * rest], length)

    def _reward(self, completion: Completion) -> Reward:
        settings = self.settings
        times = len(completion.exercise.tests) if settings.rewards == "paper" else 1
        given = reward(
            completion.text,
            completion.exercise.tests,
            self.sandbox,
            style=settings.rewards,
            format_weight=settings.format_weight,
            tests_weight=settings.tests_weight,
            limits=Limits(seconds=settings.test_seconds * times),
        )
        if settings.all_or_nothing and not given.solved:
            return replace(given, total=settings.format_weight * given.format)
        return given


def prompt_ids(tokenizer: Tokenizer, request: str, longest: int, *, chat: bool = True) -> list[int]:
    """The prompt of `request` in at most `longest` tokens: of a longer request the end is kept, with the chat's header.

    Special tokens that are spelt in a request are plain characters: it can hold no mask and end no turn. Without `chat`
    the request is to be continued as it is. ConfigError where the header alone is longer than `longest`.
    """
    asked = tokenizer.encode(request, special=False)
    if not chat:
        return asked[-longest:]
    head, _, tail = tokenizer.chat("\0").partition("\0")
    header, footer = tokenizer.encode(head), tokenizer.encode(tail)
    room = longest - len(header) - len(footer)
    if room < 1:
        raise ConfigError(f"prompt_tokens={longest} has no room beside the header of {longest - room}; raise it")
    whole = tokenizer.encode(tokenizer.chat(request))
    plain = len(whole) <= longest and not set(tokenizer.encode(request)) & tokenizer.special_ids
    return whole if plain else [*header, *asked[-room:], *footer]
