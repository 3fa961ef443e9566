"""How well models restore held-out text: denoising losses at three noise levels, and the token after a prefix.

    python recipes/small/measure.py MODEL [MODEL ...] --held-out runs/small-cpu/data/held_out.jsonl
    python recipes/small/measure.py START --causal --held-out ...         # the parent: attention to the left alone

All models see the same rows under the same noise, so two of them (bfloat16 and eight bits, say) differ by their weights
alone. The figures are mean cross-entropies in nats; the table goes to standard output, `--figures` adds them to a file.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from diffucoder.models.checkpoint import default_device_and_dtype
from diffucoder.training.adapt import PackedRows
from diffucoder.training.data import prepare
from diffucoder.training.masked import MaskedStage, Objective
from diffucoder.training.run import open_model

LEVELS = (0.2, 0.5, 0.9)
BATCH = 8


def main(
    models: Annotated[list[Path], typer.Argument(help="folders of denoisers, or of runs: their newest checkpoint")],
    *,
    held_out: Annotated[Path, typer.Option(help="documents")],
    rows: Annotated[int, typer.Option(help="rows of `context` tokens")] = 64,
    context: Annotated[int, typer.Option(help="tokens of a row")] = 128,
    causal: Annotated[bool, typer.Option("--causal", help="attend to the left alone, as the parent does")] = False,
    cache: Annotated[Path, typer.Option(help="folder of tokenised data")] = Path("runs/data"),
    figures: Annotated[Path | None, typer.Option(help="add what was found to this JSON Lines file")] = None,
) -> None:
    """Measure each model, and write a line for it."""
    print("| model | " + " | ".join(f"t = {level}" for level in LEVELS) + " | after a prefix |")
    print("| --- | " + "--: | " * (len(LEVELS) + 1))
    for folder in models:
        began = time.monotonic()
        told = measured(folder, held_out, rows=rows, context=context, causal=causal, cache=cache)
        print(
            f"| {folder}{' (causal)' * causal} | " + " | ".join(f"{told[name]:.3f}" for name in told) + " |", flush=True
        )
        if figures:
            line = {"model": str(folder), "causal": causal, "rows": rows, "context": context, **told}
            with figures.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"seconds": round(time.monotonic() - began, 1)}) + "\n")


@torch.no_grad()
def measured(folder: Path, held_out: Path, *, rows: int, context: int, causal: bool, cache: Path) -> dict[str, float]:
    """Mean cross-entropy by noise level, and of the token after a prefix."""
    denoiser, tokenizer = open_model(folder, torch.float32)  # of a run's folder the newest checkpoint
    denoiser.to(*default_device_and_dtype()).use_lean()
    store = prepare([str(held_out)], tokenizer, cache, kind="documents")
    source = PackedRows(store, context=context, batch=BATCH, seed=0)
    objective = Objective(mask_id=tokenizer.mask_id, pad_id=tokenizer.pad_id, seed=0, batch=BATCH, normaliser="length")
    stage = MaskedStage(objective, source, source, rows, LEVELS)
    left = torch.ones(context, context, dtype=torch.bool).tril() if causal else None

    def model(tokens: torch.Tensor, **options: Any) -> Any:  # Any: as the denoiser has them
        return denoiser(tokens, **{**options, "attention": left})

    shares = [range(at, at + BATCH) for at in range(0, stage.held_out_rows, BATCH)]
    sums: dict[str, list[float]] = {}
    for name, micro in stage.by_level(shares):
        value, number = stage.loss(model, micro).figures["unweighted"]  # type: ignore[arg-type]  # called alone
        total = sums.setdefault(name, [0.0, 0])
        total[0], total[1] = total[0] + float(value), total[1] + number
    return {name: value / number for name, (value, number) in sums.items()}


if __name__ == "__main__":
    typer.run(main)
