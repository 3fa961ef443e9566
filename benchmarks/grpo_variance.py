"""How much the score of a token varies with its masks: coupled against decoupled, full-mask and d1, and the theory.

    python benchmarks/grpo_variance.py                      # minutes on two cores; writes docs/grpo_variance.md
    python benchmarks/grpo_variance.py --draws 40 --count 8

Completions are fixed: drawn at temperature 1.2 for hard problems of the dev split, as in training. Each draw of masks
scores all of their tokens. The theory (DiffuCoder, appendix A.4) says by how much coupling lowers the variance of a
token whose masked term M l / t has the mean v: by v^2 / (2 N) for the mean of N pairs, by 2 L v^2 / (L + 1)^2 for the
score with L pairs. A draw is of independent pairs, so those of N pairs are sums of draws of one. Intervals are over
blocks of draws.
"""

import math
import platform
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.diffusion import Estimator, keyed_generator, score_views
from diffucoder.problems import problems
from diffucoder.training.objectives import CompletionBatch, collate, token_scores
from diffucoder.training.rollouts import prompt_ids

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS, STUDENT = 10, 2.26  # blocks of draws behind an interval, and its quantile
PAIRS = (1, 2, 4)


def main(
    model: Annotated[str | None, typer.Option(help="folder; the shipped model if left out")] = None,
    count: Annotated[int, typer.Option(help="completions")] = 24,
    draws: Annotated[int, typer.Option(help="of masks, a multiple of 40")] = 400,
    temperature: Annotated[float, typer.Option(help="of the completions")] = 1.2,
    new_tokens: Annotated[int, typer.Option(help="canvas of a completion")] = 64,
) -> None:
    """Measure, and write the table and the plot."""
    if draws < 40 or draws % 40:
        raise typer.BadParameter(f"draws={draws} does not split into {BLOCKS} blocks of up to 4 pairs; use 40, 80, ...")
    began = time.monotonic()
    coder = DiffuCoder.load(model, dtype=torch.float32)
    batch = completions(coder, count, new_tokens, temperature)
    scored = batch.scored
    coupled, decoupled = (terms(coder, batch, draws, estimator) for estimator in ("coupled", "decoupled"))
    whole = one_pass(coder, batch, 1, "full_mask")[0]  # (N,)
    prompt_masked = one_pass(coder, batch, draws // 4, "d1")  # (D / 4, N)
    truth = torch.cat([coupled.mean((0, 1))[None], decoupled.mean((0, 1))[None]]).mean(0)  # (N,) v of each token
    parts = [
        "# The variance of a token's score over masks",
        f"`python benchmarks/grpo_variance.py --count {count}`, {time.strftime('%Y-%m-%d')}, "
        f"{(time.monotonic() - began) / 60:.0f} minutes: {count} fixed completions of {int(scored.sum())} tokens, "
        "written by the model at temperature "
        f"{temperature:g}; {draws} draws of masks, mask ratios uniform in [0.2, 0.8], one a completion; "
        f"{model or 'the shipped model'} in float32. Python {platform.python_version()}, "
        f"torch {torch.__version__}. Means over tokens, 95 % intervals over {BLOCKS} blocks of draws.",
        "## Mean of N pairs, against theory",
        "The masked terms alone, two forward passes a pair, nothing added and nothing divided by.",
        mean_table(coupled, decoupled, truth),
        "## The score that is trained on",
        "With L pairs and the pass in which everything is hidden, which has no variance over masks.",
        score_table(coupled, decoupled, truth),
        "## One-pass estimators",
        one_pass_text(whole, prompt_masked, truth, coupled),
        "![variance of each token, coupled against decoupled](grpo/variance.svg)",
    ]
    draw(coupled, decoupled, truth)
    (DOCS / "grpo_variance.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts))


def completions(coder: DiffuCoder, count: int, new_tokens: int, temperature: float) -> CompletionBatch:
    """What the model writes for hard problems, one completion each."""
    tokenizer, drawn = coder.tokenizer, list(problems("dev", count, seed=11, hard=True))
    prompts = [prompt_ids(tokenizer, problem.prompt, 128) for problem in drawn]
    params = DecodingParams(steps=new_tokens // 2, temperature=temperature, new_tokens=new_tokens)
    requests = [coder.request_of_ids(ids, params, sample=number) for number, ids in enumerate(prompts)]
    return collate([results[0] for results in coder.run(requests)], pad_id=tokenizer.pad_id)


def views_of(batch: CompletionBatch, draw: int, estimator: Estimator):  # type: ignore[no-untyped-def]  # as score_views
    """The views of one draw of masks, one pair."""
    rows = len(batch.tokens)
    ratios = torch.stack([torch.rand(1, 2, generator=keyed_generator(1, draw, row)) for row in range(rows)], 1)
    noise = [keyed_generator(2, draw, row) for row in range(rows)]
    prompt = batch.valid & ~batch.completion
    return score_views(batch.completion, prompt, 0.2 + 0.6 * ratios, noise, estimator=estimator)


@torch.no_grad()
def terms(coder: DiffuCoder, batch: CompletionBatch, draws: int, estimator: Estimator) -> Tensor:
    """(D, 2, N) the masked terms M l / t of both masks of a pair, for each scored token."""
    found = []
    for at in track(range(draws), description=estimator):
        _, *pair = views_of(batch, at, estimator)
        scores = [token_scores(coder.model, batch, [view], mask_id=coder.model.mask_id) for view in pair]
        both = [score[batch.scored] * 2 for score in scores]
        found.append(torch.stack(both))  # times 2, for the weights of one pair are halved
    return torch.stack(found).double()


@torch.no_grad()
def one_pass(coder: DiffuCoder, batch: CompletionBatch, draws: int, estimator: Estimator) -> Tensor:
    """(D, N) scores of an estimator that takes one pass."""
    views = (views_of(batch, at, estimator) for at in range(draws))
    return torch.stack(
        [token_scores(coder.model, batch, v, mask_id=coder.model.mask_id)[batch.scored] for v in views]
    ).double()


def pooled(values: Tensor, pairs: int) -> Tensor:
    """(D / pairs, N) means of the two terms of `pairs` consecutive draws."""
    return values.mean(1).unflatten(0, (-1, pairs)).mean(1)


def blocked(values: Tensor) -> tuple[float, float]:
    """Mean and 95 % half-width of a figure from its values in each block, by Student's distribution."""
    return float(values.mean()), STUDENT * float(values.std()) / math.sqrt(len(values))


def variances(values: Tensor, pairs: int) -> Tensor:
    """(BLOCKS,) variance over draws, mean over tokens, in each block."""
    return pooled(values, pairs).unflatten(0, (BLOCKS, -1)).var(1).mean(-1)


def mean_table(coupled: Tensor, decoupled: Tensor, truth: Tensor) -> str:
    rows = [_row(pairs, 2 * pairs, coupled, decoupled, truth, 1.0) for pairs in PAIRS]
    return _table(["pairs N", "passes", *_HEAD, "theory v²/(2N)"], rows)


def score_table(coupled: Tensor, decoupled: Tensor, truth: Tensor) -> str:
    rows = []
    for pairs in PAIRS:
        factor = (2 * pairs / (pairs + 1)) ** 2  # the sum of 2 L terms over L + 1, from their mean
        rows.append(_row(pairs, 2 * pairs + 1, coupled, decoupled, truth, factor))
    return _table(["pairs L", "passes", *_HEAD, "theory 2Lv²/(L+1)²"], rows)


_HEAD = ("variance, coupled", "decoupled", "ratio", "reduction", "reduction within pairs")


def _row(pairs: int, passes: int, coupled: Tensor, decoupled: Tensor, truth: Tensor, factor: float) -> list[str]:
    """Variances of the mean of `pairs` pairs, times `factor`, and by how much coupling lowers them."""
    ours, theirs = (factor * variances(terms_, pairs) for terms_ in (coupled, decoupled))
    shown = (ours, theirs, theirs - ours, factor / pairs * within(coupled))
    cells = ["{:.4f} ± {:.4f}".format(*blocked(each)) for each in shown]
    ratio, theory = f"{float(theirs.mean() / ours.mean()):.2f}", factor * float((truth**2).mean()) / (2 * pairs)
    return [str(pairs), str(passes), cells[0], cells[1], ratio, cells[2], cells[3], f"{theory:.4f}"]


def within(coupled: Tensor) -> Tensor:
    """(BLOCKS,) by how much less the mean of a pair varies than that of two terms by themselves with its marginals.

    The same quantity as decoupled minus coupled, without the chance in which masks the decoupled ones happened to be.
    """
    blocks = coupled.unflatten(0, (BLOCKS, -1))  # (K, D / K, 2, N)
    return (blocks.var(1).sum(1) / 4 - blocks.mean(2).var(1)).mean(-1)


def one_pass_text(whole: Tensor, prompt_masked: Tensor, truth: Tensor, coupled: Tensor) -> str:
    bias, apart = whole - truth, prompt_masked.mean(0) - truth
    noise = float(coupled.mean(1).var(0).mean())
    return (
        f"Against v, the mean of the masked terms ({float(truth.mean()):.3f} nats a token on average): `full_mask` has "
        f"variance 0 and is off by {float(bias.mean()):+.3f} on average, {float((bias**2).mean().sqrt()):.3f} root "
        f"mean square; `d1` has variance {float(prompt_masked.var(0).mean()):.3f} over its masks of the prompt, and is "
        f"off by {float(apart.mean()):+.3f}, {float((apart**2).mean().sqrt()):.3f} root mean square. The mean of one "
        f"coupled pair, unbiased, is off by {math.sqrt(noise):.3f} root mean square."
    )


def draw(coupled: Tensor, decoupled: Tensor, truth: Tensor) -> None:
    """One dot a token."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "diffucoder"  # the same drawing gives the same bytes
    from matplotlib import pyplot

    saved = (decoupled.mean(1).var(0) - coupled.mean(1).var(0)).tolist()
    theory = (truth**2 / 2).tolist()
    figure, axes = pyplot.subplots(figsize=(5, 5))
    axes.scatter(theory, saved, s=6, alpha=0.5)
    top = max(theory)
    axes.plot([0, top], [0, top], color="black", linewidth=0.8, label="theory")
    axes.set(xlabel="v² / 2", ylabel="variance decoupled - coupled, mean of one pair")
    axes.legend()
    (DOCS / "grpo").mkdir(exist_ok=True)
    figure.savefig(DOCS / "grpo" / "variance.svg", metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    typer.run(main)
