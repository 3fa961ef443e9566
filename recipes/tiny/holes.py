"""Holes whose length the model decides (DreamOn), against lengths that are tried: both tuned alike from `tiny`.

    python recipes/tiny/holes.py              # train two arms, measure 500 held-out holes: half an hour on a core

The arm `shipped` is `tiny` itself. The arm `resized` learns two more tokens: a hole of too few places is filled from
the left, and its last place says `<|expand|>`; places too many say `<|delete|>`. The arm `lengths` sees holes of the
right length, and is decoded as any model is: at seven lengths, of which the likeliest is kept. Each arm is a folder
under `runs/tiny-holes`; a finished one is not trained again. The table goes to benchmarks/results/holes.md.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Annotated

import tokenizers
import torch
import typer
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "benchmarks")]

from common import RESULTS, paired_gain, solved, write_page

from diffucoder import DecodingParams, DiffuCoder, Generation
from diffucoder.metrics import wilson
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer, save_denoiser
from diffucoder.models.denoiser import Denoiser, grow_vocabulary
from diffucoder.tokenizer import DELETE_TOKEN, EXPAND_TOKEN, Tokenizer
from recipes.tiny.problems import Problem, problems

LENGTHS = "the likeliest of seven lengths"
ARMS = {"resized": "its own length, from 4 masks on", "shipped": LENGTHS, "lengths": LENGTHS}
BATCH = 32
LONGEST = 24  # tokens of a hole
RATE = 1e-3


def main(
    run: Annotated[Path, typer.Option(help="folder of the models")] = Path("runs/tiny-holes"),
    steps: Annotated[int, typer.Option(help="training steps of each arm")] = 800,
    count: Annotated[int, typer.Option(help="held-out holes")] = 500,
    split: Annotated[str, typer.Option(help="test for figures to report, dev for decisions")] = "test",
) -> None:
    """Train what is not trained yet, fill the holes, grade the programs, and write the table."""
    drawn = list(problems(split, count, seed=1))
    texts = list(cut(drawn, seed=1))
    rows = []
    verdicts = {}
    for arm, way in ARMS.items():
        if arm != "shipped" and not (run / arm / "model.safetensors").exists():
            train(arm, run / arm, steps)
        coder = DiffuCoder.load(None if arm == "shipped" else run / arm, dtype=torch.float32)
        results = list(filled(coder, texts))
        verdicts[arm] = solved([result.text for result in results], drawn)
        low, high = wilson(sum(verdicts[arm]), count)
        exact = mean([result.pieces[0] == middle for result, (_, middle, _) in zip(results, texts, strict=True)])
        passes = mean([result.forward_passes for result in results])
        figures = [f"**{mean(verdicts[arm]):.1%}**", f"{low:.1%} – {high:.1%}", f"{exact:.1%}", f"{passes:.1f}"]
        rows.append([arm, way, *figures, paired_gain(verdicts["resized"], verdicts[arm])])
        print(*rows[-1], flush=True)
    details = (f"{count} holes of 1 to {LONGEST} tokens in solutions of the {split} split; {steps} steps each arm",)
    head = ("model", "length of a hole", "solved", "95 % interval", "same text", "passes", "against resized")
    if split == "test":
        write_page(RESULTS / "holes.md", "python recipes/tiny/holes.py", details, head, rows)


def filled(coder: DiffuCoder, texts: list[tuple[str, str, str]]) -> Iterator[Generation]:
    """Yield the text with its hole filled, decoded in batches."""
    for start in track(range(0, len(texts), BATCH), description="filling"):
        batch = texts[start : start + BATCH]
        requests = [coder.fill_request(f"{before}<|hole|>{after}", DecodingParams()) for before, _, after in batch]
        for [result] in coder.run(requests):
            yield result


def cut(drawn: list[Problem], *, seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield the text before, in and after a hole of each document: a run of tokens of its solution."""
    rng = random.Random(seed)
    tokenizer = load_tokenizer()
    for problem in drawn:
        ids = tokenizer.encode(problem.solution)
        start = rng.randrange(2, len(ids))
        end = min(len(ids), start + rng.randint(1, LONGEST))
        before, middle, after = (tokenizer.decode(part) for part in (ids[:start], ids[start:end], ids[end:]))
        yield f"# {problem.prompt}\n{before}", middle, after


def train(arm: str, folder: Path, steps: int) -> None:
    """Tune the shipped model on holes, and save it."""
    torch.manual_seed(0)
    rng = random.Random(0)
    denoiser = load_denoiser(None, dtype=torch.float32)
    tokenizer = load_tokenizer()
    if arm == "resized":
        tokenizer = with_length_tokens(tokenizer)
        grow_vocabulary(denoiser.model, tokenizer.backend.get_vocab_size())
    documents = list(cut(list(problems("train", steps * BATCH // 4, seed=2)), seed=2))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    denoiser.train()
    for step in range(steps):
        rows = [example(tokenizer, rng.choice(documents), rng, resized=arm == "resized") for _ in range(BATCH)]
        loss = loss_of(denoiser, rows, tokenizer.pad_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{arm}: step {step}/{steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    denoiser.eval()
    tokenizer.save(folder)
    save_denoiser(denoiser, folder)


def with_length_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the two tokens by which a model decides the length of a hole."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in (EXPAND_TOKEN, DELETE_TOKEN)])
    return Tokenizer(backend, config=tokenizer.config)


def example(
    tokenizer: Tokenizer, document: tuple[str, str, str], rng: random.Random, *, resized: bool
) -> tuple[list[int], list[int]]:
    """A row of ids with masks, and the id that each mask is to become; -1 for all other positions."""
    before, middle, after = (tokenizer.encode(part) for part in document)
    places = len(middle)
    if resized:
        places = rng.choice((4, rng.randint(1, LONGEST + 4)))
    targets = middle[:places]
    open_from = len(targets)  # from here on there is no token that could have been committed
    if places < len(middle):
        assert tokenizer.expand_id is not None
        targets[-1] = tokenizer.expand_id
        open_from -= 1
    elif places > len(middle):
        assert tokenizer.delete_id is not None
        targets += [tokenizer.delete_id] * (places - len(middle))
    share = rng.random()
    masked = [index >= open_from or rng.random() < share for index in range(places)]
    if not any(masked):
        masked[rng.randrange(places)] = True
    hole = [tokenizer.mask_id if hidden else token for token, hidden in zip(targets, masked, strict=True)]
    wanted = [token if hidden else -1 for token, hidden in zip(targets, masked, strict=True)]
    return before + hole + after, [-1] * len(before) + wanted + [-1] * len(after)


def loss_of(denoiser: Denoiser, rows: list[tuple[list[int], list[int]]], pad_id: int) -> Tensor:
    """Mean cross-entropy of the masked positions."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids, _ in rows])
    targets = torch.tensor([[-1] * (longest - len(wanted)) + wanted for _, wanted in rows])
    valid = torch.tensor([[False] * (longest - len(ids)) + [True] * len(ids) for ids, _ in rows])
    wanted = (targets >= 0).nonzero()
    logits = denoiser(ids, valid=valid, rows=wanted)  # (M, V)
    return F.cross_entropy(logits, targets[tuple(wanted.T)])


if __name__ == "__main__":
    typer.run(main)
