"""Train the shipped model `tiny` from nothing on a CPU: tokenizer, data, three stages, checkpoint.

The paper's road in small. (1) An autoregressive warm-up of the same weights: every token is a target, so the model
learns to copy names and numbers from the request long before a masked objective would teach it. (2) Adaptation: under
the masked objective the attention mask anneals from causal to full (DiffuLLaMA, arXiv 2410.17891). (3) Masked diffusion
on requests and answers with the request clean (DiffuCoder §3): pads are ordinary targets, which teaches the length.

A run can be stopped at any moment: the newest checkpoint in the run folder continues it.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config, Qwen2ForCausalLM

from diffucoder.config import Settings, load_settings
from diffucoder.diffusion import corrupt, diffusion_loss, sample_time
from diffucoder.errors import ConfigError, DiffuCoderError
from diffucoder.models.denoiser import Denoiser
from diffucoder.problems import problems
from diffucoder.training.tiny_tokenizer import train_tokenizer

_FIXED = ("seed", "problems", "vocabulary", "hidden", "layers", "intermediate", "batch_tokens", "longest")
END, MASK, PAD = 2, 3, 4  # <|im_end|>, <|mask|>, <|dlm_pad|>: the order of tiny_tokenizer.SPECIAL_TOKENS


class TinySettings(Settings):
    """What `make tiny` trains; `recipes/tiny/tiny.toml` holds the shipped values."""

    run: Path = Field(default=Path("runs/tiny"), description="folder of checkpoints, metrics and the finished model")
    seed: int = Field(default=0, description="of data, initial weights and noise")
    problems: int = Field(default=160_000, ge=100, description="distinct training problems")
    vocabulary: int = Field(default=1536, ge=300, description="tokens of the byte-level BPE, special ones included")
    hidden: int = Field(default=256, ge=64, multiple_of=64, description="width of the model")
    layers: int = Field(default=5, ge=1, description="depth of the model")
    intermediate: int = Field(default=640, description="width of the feed-forward blocks")
    batch_tokens: int = Field(default=4096, ge=160, description="tokens of a batch, padding included")
    causal_steps: int = Field(default=1000, description="autoregressive warm-up")
    anneal_steps: int = Field(default=300, description="causal to full attention, within the diffusion steps")
    diffusion_steps: int = Field(default=5300, description="masked diffusion")
    raw_share: float = Field(default=0.05, ge=0, le=1, description="batches of code alone, without a request")
    longest: int = Field(default=96, ge=8, description="tokens; problems with longer answers are left out")
    spare: int = Field(default=64, ge=1, description="most pads a batch gets behind its longest row")
    short_share: float = Field(default=0.75, ge=0, le=1, description="batches without spare pads")
    lr: float = Field(default=2e-3, gt=0, description="peak; linear warm-up, constant, linear decay over the last 30 %")
    warmup: int = Field(default=200, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.05, ge=0, description="of the matrices")
    ema: float = Field(default=0.998, ge=0, lt=1, description="decay of the averaged weights that are shipped")
    threads: int = Field(default=0, ge=0, description="torch threads; 0 = all")
    checkpoint_minutes: float = Field(default=5, gt=0, description="between checkpoints")

    @property
    def steps(self) -> int:
        return self.causal_steps + self.diffusion_steps


class Examples(NamedTuple):
    """Requests and answers in one row: example i is tokens[start[i]:start[i+1]], its answer begins at answer[i]."""

    tokens: Tensor  # (N,) int16
    start: Tensor  # (E + 1,)
    answer: Tensor  # (E,) offset of the answer within the example


class Batch(NamedTuple):
    tokens: Tensor  # (B, T) int64, right-filled with PAD
    maskable: Tensor  # (B, T) bool: the answer and its pads
    named: Tensor  # (B, T) bool: the first tokens behind `def`, which must be copied from the request


def train_tiny(settings: TinySettings) -> Path:
    """Run all stages, continuing from the run folder's checkpoint, and return the folder of the finished model."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    settings.run.mkdir(parents=True, exist_ok=True)
    _claim(settings)
    examples = _load_examples(settings)
    trainer = _Trainer(settings)
    trainer.resume()
    count = TextColumn("{task.completed}/{task.total}")
    with Progress(TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn()) as progress:
        task = progress.add_task("tiny", total=settings.steps, completed=trainer.step)
        for batch in _batches(examples, settings, trainer.step):
            loss = trainer.train_step(batch)
            stage = "causal" if trainer.step <= settings.causal_steps else "diffusion"
            progress.update(task, completed=trainer.step, description=f"{stage} loss {loss:.3f}")
    return trainer.export()


def _claim(settings: TinySettings) -> None:
    """Refuse to continue a run folder with other data or another model than it was begun with."""
    fixed = settings.model_dump(mode="json", include=set(_FIXED))
    path = settings.run / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(fixed, indent=2) + "\n", encoding="utf-8")
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    for name, value in fixed.items():
        if begun.get(name) != value:
            raise ConfigError(
                f"{name}={value} but the run in {str(settings.run)!r} was begun with {begun.get(name)}; "
                "give it back, or name another folder by run=..."
            )


# --- data ------------------------------------------------------------------------------------------------------------


def _load_examples(settings: TinySettings) -> Examples:
    """Generate, tokenise and cache the training problems in the run folder."""
    cached = settings.run / "examples.pt"
    if not cached.exists():
        drawn = list(problems("train", settings.problems, seed=settings.seed))
        tokenizer = train_tokenizer(drawn[:20_000], settings.vocabulary, settings.run / "model")
        ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # the chat template of tiny_tokenizer
        asked = tokenizer.encode_batch([ask.format(p.prompt) for p in drawn])
        answers = tokenizer.encode_batch([p.solution + "<|im_end|>" for p in drawn])
        pairs = [(a.ids, b.ids) for a, b in zip(asked, answers, strict=True) if len(b.ids) <= settings.longest]
        start = np.cumsum([0, *(len(a) + len(b) for a, b in pairs)])
        flat = np.concatenate([np.array(part, dtype=np.int16) for pair in pairs for part in pair])
        partial = cached.with_suffix(".pt.partial")  # as for checkpoints: a kill leaves nothing half written
        torch.save(tuple(map(torch.as_tensor, (flat, start, [len(a) for a, _ in pairs]))), partial)
        partial.replace(cached)
    return Examples(*torch.load(cached))


def _batches(examples: Examples, settings: TinySettings, first_step: int) -> Iterator[Batch]:
    """One batch for each step left, a function of seed and step alone; rows of similar length share a batch."""
    lengths = (examples.start[1:] - examples.start[:-1]).numpy()  # (E,)
    for step in range(first_step, settings.steps):
        rng = np.random.default_rng((settings.seed, step))
        rows = settings.batch_tokens // 80
        pool = rng.integers(len(lengths), size=rows * 8)
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        at = int(rng.integers(0, 8)) * rows
        picked = pool[at : at + rows]
        causal = step < settings.causal_steps
        raw = not causal and rng.random() < settings.raw_share
        width = int(lengths[picked].max())
        if not causal and rng.random() > settings.short_share:
            width += int(rng.integers(0, settings.spare))
            picked = picked[: max(1, settings.batch_tokens // width)]
        yield _collate(examples, picked, width, raw=raw)


def _collate(examples: Examples, picked: np.ndarray[Any, Any], width: int, *, raw: bool) -> Batch:
    tokens = torch.full((len(picked), width), PAD)
    maskable = torch.zeros(len(picked), width, dtype=torch.bool)
    named = torch.zeros_like(maskable)
    for row, index in enumerate(picked.tolist()):
        ids = examples.tokens[examples.start[index] : examples.start[index + 1]]
        answer = int(examples.answer[index])
        if raw:
            ids, answer = ids[answer:], 0
        tokens[row, : len(ids)] = ids
        maskable[row, max(answer, 1) :] = True  # position 0 has no left neighbour to be scored from
        named[row, answer + 1 : answer + 4] = not raw
    return Batch(tokens, maskable, named)


# --- training --------------------------------------------------------------------------------------------------------


class _Trainer:
    """Model, optimiser and averaged weights; one file holds them all, so that a run continues where it stopped."""

    def __init__(self, settings: TinySettings) -> None:
        self.settings, self.step, self.saved_at = settings, 0, time.monotonic()
        self.denoiser = _fresh_model(settings)
        decayed = [p for p in self.denoiser.parameters() if p.ndim > 1]
        plain = [p for p in self.denoiser.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)
        self.average = {name: p.detach().clone() for name, p in self.denoiser.named_parameters()}
        self.window: list[dict[str, float]] = []

    def train_step(self, batch: Batch) -> float:
        settings = self.settings
        noise = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * _schedule(self.step, settings)
        # MATH: for short rows the CPU's flash attention takes longer backward than the plain products
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel([SDPBackend.MATH]):
            if self.step < settings.causal_steps:
                loss, figures = _causal_loss(self.denoiser, batch)
            else:
                annealed = (self.step + 1 - settings.causal_steps) / max(1, settings.anneal_steps)
                loss, figures = _masked_loss(self.denoiser, batch, annealed, noise)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        norm = torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(settings.ema, self.step / (self.step + 10))
        for name, parameter in self.denoiser.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - decay)
        self._log(figures | {"grad_norm": float(norm), "tokens": batch.tokens.numel()})
        return figures["loss"]

    def _log(self, figures: dict[str, float]) -> None:
        self.window.append(figures)
        if self.step % 50 == 0:
            mean = {key: round(float(np.nanmean([f[key] for f in self.window])), 5) for key in figures}
            with (self.settings.run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, "time": round(time.time(), 1), **mean}) + "\n")
            self.window = []
        if time.monotonic() - self.saved_at > self.settings.checkpoint_minutes * 60 or self.step == self.settings.steps:
            self.save()

    def save(self) -> None:
        """Write the checkpoint beside the old one and swap them: a kill leaves one of the two whole."""
        state = {
            "step": self.step,
            "model": self.denoiser.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
        }
        partial = self.settings.run / "checkpoint.pt.partial"
        torch.save(state, partial)
        partial.replace(self.settings.run / "checkpoint.pt")
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        path = self.settings.run / "checkpoint.pt"
        if path.exists():
            state = torch.load(path)
            self.step, self.average = state["step"], state["average"]
            self.denoiser.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

    def export(self) -> Path:
        """Write the averaged weights as a Dream checkpoint in bfloat16."""
        from diffucoder.models.checkpoint import save_denoiser

        self.denoiser.load_state_dict(self.average, strict=False)
        folder = self.settings.run / "model"
        save_denoiser(self.denoiser.to(torch.bfloat16), folder)
        return folder


def _fresh_model(settings: TinySettings) -> Denoiser:
    torch.manual_seed(settings.seed)  # transformers draws initial weights from the global generator
    config = Qwen2Config(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 64,
        num_key_value_heads=max(1, settings.hidden // 128),
        max_position_embeddings=512,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return Denoiser.from_causal_lm(Qwen2ForCausalLM(config), mask_id=MASK)


def _schedule(step: int, settings: TinySettings) -> float:
    """Share of the peak learning rate: warm-up, constant, linear decay to 2 % over the last 30 % of the steps."""
    left = (settings.steps - step) / (0.3 * settings.steps)
    return min(1.0, (step + 1) / settings.warmup, max(0.02, left))


def _causal_loss(denoiser: Denoiser, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Next-token cross-entropy on every real token: with a causal mask the Denoiser is the autoregressive model."""
    length = batch.tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    wanted = batch.tokens != PAD
    wanted[:, 0] = False
    rows = wanted.nonzero()  # (M, 2)
    targets = batch.tokens[wanted]
    logits = denoiser(batch.tokens, attention=causal, rows=rows)  # (M, V)
    loss = F.cross_entropy(logits, targets)
    return loss, _figures(loss, loss, logits, targets, batch.named[wanted])


def _masked_loss(
    denoiser: Denoiser, batch: Batch, annealed: float, noise: Generator
) -> tuple[Tensor, dict[str, float]]:
    t = sample_time(len(batch.tokens), generator=noise)
    noisy, masked = corrupt(batch.tokens, batch.maskable, t, MASK, noise)
    attention = None
    if annealed < 1:  # DiffuLLaMA: one draw for the batch, keys to the right open with probability `annealed`
        length = noisy.shape[1]
        attention = torch.ones(length, length).tril().bool() | (torch.rand(length, length, generator=noise) < annealed)
    targets = batch.tokens[masked]
    logits = denoiser(noisy, attention=attention, rows=masked.nonzero())  # (M, V)
    cross_entropy = F.cross_entropy(logits.float(), targets, reduction="none")  # (M,)
    loss = diffusion_loss(cross_entropy, masked, t, batch.maskable, normaliser="length")
    return loss, _figures(loss, cross_entropy.mean(), logits, targets, batch.named[masked])


def _figures(loss: Tensor, plain: Tensor, logits: Tensor, targets: Tensor, named: Tensor) -> dict[str, float]:
    right = (logits.detach().argmax(-1) == targets).float()
    return {
        "loss": float(loss.detach()),
        "unweighted": float(plain.detach()),
        "accuracy": float(right.mean()),
        "copied": float(right[named].mean()),  # accuracy on tokens that only the request can tell
    }


def main() -> None:
    """`python -m diffucoder.training.tiny RECIPE.toml [key=value ...]`: train, and say where the model is."""
    try:
        recipe = Path(sys.argv[1]) if len(sys.argv) > 1 else None
        folder = train_tiny(load_settings(TinySettings, recipe, sys.argv[2:]))
    except DiffuCoderError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"model in {folder}; try: diffucoder generate --model {folder} ...")


if __name__ == "__main__":
    main()
