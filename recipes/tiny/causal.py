"""The autoregressive baseline of the laboratory: ordinary GRPO of the parent, which writes from left to right.

    python recipes/tiny/causal.py recipes/tiny/grpo.toml --set model=runs/tiny/parent/model --set run=... --set data=...

Everything but the model and its score is `diffucoder train grpo`. Blocks of one position are filled in order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from diffucoder.config import load_settings
from diffucoder.decoding.coder import DiffuCoder
from diffucoder.diffusion import View
from diffucoder.grading.sandbox import Sandbox
from diffucoder.models.denoiser import Denoiser, set_causal
from diffucoder.training.exercises import read_exercises
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
    overrides = [*(changes or ()), f"resume={str(resume).lower()}", "decoding.block=1"]
    settings = load_settings(GrpoSettings, recipe, overrides)
    if settings.score_padding or {"estimator", "pairs"} & settings.model_fields_set:
        raise typer.BadParameter("score_padding, estimator and pairs need masks; leave them out")
    exercises = usable(read_exercises(settings.data), "data")
    held_out = usable(read_exercises(settings.held_out), "held_out") if settings.held_out else []
    denoiser, tokenizer = load_start(settings)
    set_causal(denoiser.model, True)
    model = CausalModel(denoiser.model, mask_id=denoiser.mask_id)
    with Sandbox(settings.workers or None) as sandbox:
        rollouts = Rollouts(DiffuCoder(model, tokenizer, name=str(settings.model)), settings, sandbox)
        stage = CausalStage(model, rollouts, exercises, held_out, settings)
        print(train_and_export(model, tokenizer, stage, settings, parent=True))


if __name__ == "__main__":
    typer.run(main)
