"""The autoregressive baseline of the laboratory: ordinary GRPO of the parent, which writes from left to right.

    python recipes/tiny/causal.py recipes/tiny/grpo.toml --set model=runs/tiny/parent/model --set run=... --set data=...

Everything but writing and scoring is `diffucoder train grpo`: settings, rewards, advantages, loss, checkpoints. The
settings of the masks mean nothing here. Completions draw from torch's global generator, so unlike a denoiser's they
depend on the batch that they are written in.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffucoder.config import load_settings
from diffucoder.decoding.coder import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.requests import Generation
from diffucoder.decoding.trace import Trace
from diffucoder.diffusion import View, keyed_generator
from diffucoder.grading.sandbox import Sandbox
from diffucoder.models.denoiser import Denoiser, set_causal
from diffucoder.training.exercises import Exercise, read_exercises
from diffucoder.training.grpo import GrpoStage, usable
from diffucoder.training.objectives import CompletionBatch
from diffucoder.training.rollouts import Rollouts
from diffucoder.training.run import load_start, train_and_export
from diffucoder.training.settings import GrpoSettings


class CausalModel(Denoiser):
    """The autoregressive model again: each token is scored from the tokens to its left."""

    def forward(self, tokens: Tensor, **inputs: Any) -> Any:  # Any: as the denoiser has them
        left = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        return super().forward(tokens, attention=left, **inputs)


class CausalRollouts(Rollouts):
    """Completions written from left to right, by transformers' own generation."""

    def decode(self, exercises: Sequence[Exercise], params: DecodingParams, numbers: Sequence[int]) -> list[Generation]:
        tokenizer = self.coder.tokenizer
        model = self.coder.model
        prompts = [torch.tensor(self.prompt_ids(exercise)) for exercise in exercises]
        tokens = pad_sequence(prompts, batch_first=True, padding_side="left", padding_value=tokenizer.pad_id)  # (B, P)
        width = tokens.shape[1]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        sampling: dict[str, Any] = {"do_sample": False}  # Any: what transformers takes
        if params.temperature:
            sampling = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p or 1.0, "top_k": 0}
        with torch.random.fork_rng():
            torch.manual_seed(keyed_generator(params.seed, numbers[0]).initial_seed())
            written = model.model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=(torch.arange(width) >= width - lengths[:, None]).long().to(model.device),
                max_new_tokens=params.new_tokens,
                eos_token_id=sorted(tokenizer.terminator_ids),
                pad_token_id=tokenizer.pad_id,
                **sampling,
            )[:, width:].tolist()
        pairs = zip(prompts, written, strict=True)
        return [self._generation(prompt.tolist(), answer, params) for prompt, answer in pairs]

    def _generation(self, prompt: list[int], answer: list[int], params: DecodingParams) -> Generation:
        """As decoding a canvas gives it: one token a step, pads after the terminator."""
        tokenizer = self.coder.tokenizer
        ends = [at for at, token in enumerate(answer) if token in tokenizer.terminator_ids]
        end = ends[0] if ends else len(answer)
        length = min(end + 1, params.new_tokens)
        pads = params.new_tokens - length
        trace = Trace(
            tokens=prompt + answer[:length] + [tokenizer.pad_id] * pads,
            prompt_length=len(prompt),
            steps=[*range(length), *[-1] * pads],
            confidence=[0.0] * params.new_tokens,
            log_probs=[0.0] * params.new_tokens,
            forward_passes=length,
            params=params.model_dump(mode="json"),
            model=self.coder.name,
        )
        text = tokenizer.decode(answer[:end])
        reason = "stop" if ends else "length"
        return Generation(0, text, (text,), tuple(answer[:end]), length, 0.0, reason, trace)


class CausalStage(GrpoStage):
    """One view without masks scores every token: its log-probability is exact."""

    def views(self, step: int, rows: Sequence[int], batch: CompletionBatch) -> list[View]:
        return [View(torch.zeros_like(batch.completion), batch.completion.float())]


def main(
    recipe: Annotated[Path | None, typer.Argument(help="TOML file of settings of diffucoder train grpo")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="name=value, over the file; repeatable")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the run's newest checkpoint")] = False,
) -> None:
    """Train the parent by GRPO, or resume it."""
    settings = load_settings(GrpoSettings, recipe, [*(changes or ()), f"resume={str(resume).lower()}"])
    if settings.score_padding:
        raise typer.BadParameter("score_padding=true needs masks, and the parent writes no pads; leave it out")
    exercises = usable(read_exercises(settings.data), "data")
    held_out = usable(read_exercises(settings.held_out), "held_out") if settings.held_out else []
    denoiser, tokenizer = load_start(settings)
    set_causal(denoiser.model, True)
    model = CausalModel(denoiser.model, mask_id=denoiser.mask_id)
    with Sandbox(settings.workers or None) as sandbox:
        rollouts = CausalRollouts(DiffuCoder(model, tokenizer, name=str(settings.model)), settings, sandbox)
        stage = CausalStage(model, rollouts, exercises, held_out, settings)
        print(train_and_export(model, tokenizer, stage, settings, parent=True))


if __name__ == "__main__":
    typer.run(main)
