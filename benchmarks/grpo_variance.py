"""How much the score of a token varies with its masks: coupled against decoupled, full-mask and d1, and the theory.

    python benchmarks/grpo_variance.py                      # minutes on two cores; writes docs/grpo_variance.md
    python benchmarks/grpo_variance.py --draws 80 --count 8

Completions are fixed: sampled at temperature 1.2 for hard problems of the dev split, as in training. Each draw of masks
scores all of their tokens. The theory (DiffuCoder, appendix A.4) gives the variance that coupling saves for a token
whose masked term M l / t has the mean v: v^2 / (2 N) for the mean of N pairs, 2 L v^2 / (L + 1)^2 for the score with L
pairs. A draw is of independent pairs, so those of N pairs are sums of draws of one. Intervals are over blocks of draws.
"""

import math
from typing import Annotated

import torch
import typer
from common import ROOT, key_of
from rich.progress import track
from torch import Tensor

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.diffusion import Estimator, View, keyed_generator, score_views
from diffucoder.training.objectives import CompletionBatch, collate, token_scores
from diffucoder.training.rollouts import prompt_ids
from recipes.report import drawing, provenance, table, update_page
from recipes.tiny.problems import problems

BLOCKS = 10  # blocks of draws that an interval is computed from
STUDENT = 2.26  # 97.5 % quantile for so many blocks
PAIRS = (1, 2, 4)
TEMPERATURE = 1.2  # of the completions
COLUMNS = ("variance, coupled", "decoupled", "ratio", "reduction")


def main(
    model: Annotated[str | None, typer.Option(help="folder; default: the shipped model")] = None,
    count: Annotated[int, typer.Option(help="completions")] = 24,
    draws: Annotated[int, typer.Option(help="draws of masks, a multiple of 40")] = 400,
) -> None:
    """Measure, and write the tables and the plot."""
    if draws < 80 or draws % 40:
        raise typer.BadParameter(
            f"draws={draws} does not split into {BLOCKS} blocks of up to 4 pairs; use 80, 120, ..."
        )
    coder = DiffuCoder.load(model, dtype=torch.float32)
    batch = write_completions(coder, count)
    coupled = masked_terms(coder, batch, draws, "coupled")  # (D, 2, N)
    decoupled = masked_terms(coder, batch, draws, "decoupled")
    truth = (coupled.mean((0, 1)) + decoupled.mean((0, 1))) / 2  # (N,) v of each token
    run = provenance(
        f"python benchmarks/grpo_variance.py --count {count}",
        f"{count} fixed completions of {int(batch.scored.sum())} tokens, temperature {TEMPERATURE:g}",
        f"{draws} draws of masks; model {key_of(model)} in float32",
    )
    sections = {
        "run": run,
        "mean": mean_table(coupled, decoupled, truth),
        "score": score_table(coupled, decoupled, truth),
        "one pass": one_pass_table(coder, batch, draws // 4, truth, coupled),
    }
    update_page(ROOT / "docs" / "grpo_variance.md", sections)
    with drawing(ROOT / "docs" / "grpo" / "variance.svg", size=(5, 5)) as axes:
        theory = truth**2 / 2
        saved = decoupled.mean(1).var(0) - coupled.mean(1).var(0)
        axes.scatter(theory.tolist(), saved.tolist(), s=6, alpha=0.5)
        top = float(theory.max())
        axes.plot([0, top], [0, top], color="black", linewidth=0.8, label="theory")
        axes.set(xlabel="v² / 2", ylabel="variance decoupled - coupled, mean of one pair")
        axes.legend()


def write_completions(coder: DiffuCoder, count: int) -> CompletionBatch:
    """What the model writes for hard problems, one completion each."""
    params = DecodingParams(steps=32, temperature=TEMPERATURE, new_tokens=64)
    requests = []
    for number, problem in enumerate(problems("dev", count, seed=11, hard=True)):
        ids = prompt_ids(coder.tokenizer, problem.prompt, 128)
        requests.append(coder.request_of_ids(ids, params, sample=number))
    return collate([results[0] for results in coder.run(requests)], pad_id=coder.tokenizer.pad_id)


def draw_views(batch: CompletionBatch, draw: int, estimator: Estimator) -> list[View]:
    """The views of one draw of masks, one pair: mask ratios are uniform in [0.2, 0.8], one a completion."""
    rows = range(len(batch.tokens))
    ratios = torch.stack([torch.rand(1, 2, generator=keyed_generator(1, draw, row)) for row in rows], 1)
    noise = [keyed_generator(2, draw, row) for row in rows]
    prompt = ~batch.completion if batch.valid is None else batch.valid & ~batch.completion
    return score_views(batch.completion, prompt, 0.2 + 0.6 * ratios, noise, estimator=estimator)


@torch.no_grad()
def scores(coder: DiffuCoder, batch: CompletionBatch, views: list[View]) -> Tensor:
    """(N,) the score of each scored token, float64."""
    return token_scores(coder.model, batch, views, mask_id=coder.model.mask_id)[batch.scored].double()


def masked_terms(coder: DiffuCoder, batch: CompletionBatch, draws: int, estimator: Estimator) -> Tensor:
    """(D, 2, N) the masked terms M l / t of both masks of a pair, for each scored token."""
    terms = []
    for draw in track(range(draws), description=estimator):
        _, first, second = draw_views(batch, draw, estimator)
        pair = torch.stack([scores(coder, batch, [first]), scores(coder, batch, [second])])
        terms.append(2 * pair)  # the weights of one pair are halved
    return torch.stack(terms)


def mean_table(coupled: Tensor, decoupled: Tensor, truth: Tensor) -> str:
    """The mean of N pairs."""
    rows = [[pairs, 2 * pairs, *variance_cells(pairs, coupled, decoupled, truth, 1.0)] for pairs in PAIRS]
    return table(["pairs N", "passes", *COLUMNS, "theory v²/(2N)"], rows)


def score_table(coupled: Tensor, decoupled: Tensor, truth: Tensor) -> str:
    """The score with L pairs and the pass in which everything is hidden."""
    rows = []
    for pairs in PAIRS:
        factor = (2 * pairs / (pairs + 1)) ** 2  # the sum of 2 L terms over L + 1, from their mean
        rows.append([pairs, 2 * pairs + 1, *variance_cells(pairs, coupled, decoupled, truth, factor)])
    return table(["pairs L", "passes", *COLUMNS, "theory 2Lv²/(L+1)²"], rows)


def variance_cells(pairs: int, coupled: Tensor, decoupled: Tensor, truth: Tensor, factor: float) -> list[str]:
    """Variances of the mean of `pairs` pairs, times `factor`, and by how much coupling lowers them."""
    ours = factor * block_variances(coupled, pairs)
    theirs = factor * block_variances(decoupled, pairs)
    theory = factor * float((truth**2).mean()) / (2 * pairs)
    return [
        interval(ours),
        interval(theirs),
        f"{float(theirs.mean() / ours.mean()):.2f}",
        interval(theirs - ours),
        f"{theory:.4f}",
    ]


def block_variances(terms: Tensor, pairs: int) -> Tensor:
    """(BLOCKS,) the variance over draws of the mean of `pairs` pairs, mean over tokens, in each block."""
    means = terms.mean(1).unflatten(0, (-1, pairs)).mean(1)  # (D / pairs, N)
    return means.unflatten(0, (BLOCKS, -1)).var(1).mean(-1)


def interval(values: Tensor) -> str:
    """Mean and 95 % half-width of a figure from its values in each block, by Student's distribution."""
    return f"{float(values.mean()):.4f} ± {STUDENT * float(values.std()) / math.sqrt(len(values)):.4f}"


def one_pass_table(coder: DiffuCoder, batch: CompletionBatch, draws: int, truth: Tensor, coupled: Tensor) -> str:
    """How far estimators with one pass are off, beside one coupled pair."""
    rows = []
    for name, values in (
        ("full_mask", scores(coder, batch, draw_views(batch, 0, "full_mask"))[None]),
        ("d1", torch.stack([scores(coder, batch, draw_views(batch, draw, "d1")) for draw in range(draws)])),
        ("mean of one coupled pair", coupled.mean(1)),
    ):  # (D, N) each
        bias = values.mean(0) - truth
        variance = values.var(0, correction=0).mean()
        error = ((values - truth) ** 2).mean().sqrt()
        rows.append([name, f"{float(variance):.3f}", f"{float(bias.mean()):+.3f}", f"{float(error):.3f}"])
    return table(["estimator", "variance over masks", "mean bias", "root mean square error"], rows)


if __name__ == "__main__":
    typer.run(main)
