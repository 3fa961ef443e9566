"""The settings of each training stage, for recipes, `diffucoder train STAGE --help` and the stages. No torch here."""

from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from diffucoder.config import Settings
from diffucoder.decoding.params import DecodingParams

Share = Annotated[float, Field(ge=0, lt=1)]
Sources = Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]
Dtype = Literal["bfloat16", "float32", "float16"]
Times = Literal["uniform", "stratified", "antithetic"]
Normaliser = Literal["length", "masked", "masked_micro"]
Estimator = Literal["coupled", "decoupled", "full_mask", "d1"]
Baseline = Literal["mean", "leave_one_out"]
Reduction = Literal["token", "sequence", "length"]

T = TypeVar("T")
MAY_CHANGE = "a resumed run may change it"
MayChange = Annotated[T, MAY_CHANGE]
"""A setting that affects speed, reports or files, but not the trained model."""


class TrainSettings(Settings):
    """Settings of every stage. A step is one optimiser step; the batch is counted over all processes."""

    run: MayChange[Path] = Field(description="folder of settings, metrics, checkpoints and the finished model")
    resume: MayChange[bool] = Field(default=False, description="continue from the newest whole checkpoint of the run")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of data order and noise")
    steps: int = Field(ge=1, description="optimiser steps; a resumed run may raise them")
    batch: int = Field(default=32, ge=1, description="rows of one optimiser step, over all processes")
    micro_batch: MayChange[int] = Field(default=0, ge=0, description="rows of one forward pass; 0: batch / processes")
    lr: float = Field(gt=0, description="peak learning rate")
    warmup: float = Field(default=0.1, ge=0, description="linear warm-up in steps, or below 1 as a share of all steps")
    final_lr: float = Field(default=0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.95), description="betas of AdamW")
    weight_decay: float = Field(default=0.1, ge=0, description="weight decay of AdamW, on matrices only")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of the averaged weights that are exported; 0: off")
    bf16: bool = Field(default=True, description="bfloat16 autocast over float32 weights")
    gradient_checkpointing: MayChange[bool] = Field(default=False, description="recompute layers to save memory")
    lora_rank: int = Field(default=0, ge=0, description="rank of LoRA adapters, merged on export; 0: off")
    lora_alpha: float = Field(default=16.0, gt=0, description="scale of the adapters, divided by their rank")
    lora_targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="layers that get adapters",
    )
    log_every: MayChange[int] = Field(default=10, ge=1, description="steps between lines of metrics.jsonl")
    save_every: MayChange[int] = Field(default=500, ge=1, description="steps between checkpoints")
    keep: MayChange[int] = Field(default=2, ge=1, description="checkpoints kept")
    evaluate_every: MayChange[int] = Field(default=0, ge=0, description="steps between evaluations; 0: at the end only")
    trackers: MayChange[tuple[str, ...]] = Field(default=(), description="tensorboard, wandb, ... (through accelerate)")
    export_dtype: MayChange[Dtype] = Field(default="bfloat16", description="of the model: bfloat16, float32 or float16")


class DataSettings(TrainSettings):
    """Where a stage starts, and its data."""

    model: str | None = Field(default=None, description="folder or Hub id to start from; default: the shipped model")
    data: Sources = Field(description="one or a list of folders, .jsonl(.gz) files or hub:owner/name[/config][@split]")
    held_out: MayChange[Sources] = Field(default=(), description="sources of the held-out loss, or of pass@1 in grpo")
    held_out_rows: MayChange[int] = Field(default=256, ge=1, description="rows of a held-out evaluation")


class TextSettings(DataSettings):
    """Settings of the stages that train on text."""

    cache: MayChange[Path] = Field(default=Path("runs/data"), description="folder that keeps tokenised data")


class DiffusionSettings(TextSettings):
    """Settings of the masked objective."""

    shifted: bool | None = Field(default=None, description="row i scores token i + 1; if left out, as in the model")
    tied: bool = Field(default=False, description="train embeddings and head as one matrix, if equal at the start")
    time: Times = Field(default="stratified", description="uniform, stratified or antithetic noise levels in a step")
    eps: float = Field(default=1e-3, gt=0, lt=1, description="lowest noise level")
    normaliser: Normaliser = Field(default="masked", description="divisor of the loss: length, masked or masked_micro")
    infill: float = Field(default=0.0, ge=0, le=1, description="share of rows in which only random spans are noised")


class PretrainSettings(TextSettings):
    """Train an autoregressive parent from nothing: Qwen2's layers, every token a target."""

    model: None = Field(default=None, description="must be empty: a parent starts from nothing")
    lora_rank: Literal[0] = Field(default=0, description="must be 0: a parent is trained in full")
    steps: int = Field(ge=0, description="optimiser steps; 0 writes the untrained model")
    tokenizer: Path = Field(description="folder of the tokenizer, which must have a mask token")
    context: int = Field(default=256, ge=8, description="tokens of a row of packed documents")
    hidden: int = Field(default=256, ge=64, multiple_of=64, description="width of the model")
    layers: int = Field(default=5, ge=1, description="number of layers")
    intermediate: int = Field(default=640, ge=1, description="width of the feed-forward blocks")
    positions: int = Field(default=512, ge=8, description="longest sequence")


class AdaptSettings(DiffusionSettings):
    """Stages 1 and 2: train on packed documents with the masked objective (DiffuCoder, section 3 and appendix B.1)."""

    context: int = Field(default=4096, ge=8, description="tokens of a row of packed documents")
    anneal_steps: int = Field(default=0, ge=0, description="steps from causal to full attention; 0: full at once")
    random_length: float = Field(default=0.01, ge=0, le=1, description="share of rows cut to a random length")
    clean_prefix: float = Field(default=0.01, ge=0, le=1, description="share of rows with a clean random prefix")

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        total = self.random_length + self.clean_prefix + self.infill
        if total > 1:
            raise ValueError(f"random_length + clean_prefix + infill = {total:g} is over 1; lower them")
        return self


class SftSettings(DiffusionSettings):
    """Stage 3: train on requests and answers; pads are ordinary targets (DiffuCoder, appendix B.1)."""

    steps: int = Field(default=0, ge=0, description="optimiser steps; 0: those that `epochs` take")
    epochs: float = Field(default=5.0, gt=0, description="passes over the data, if steps is 0")
    length: int = Field(default=2048, ge=8, description="tokens of a row; longer examples are skipped and counted")
    padding: Literal["fixed", "flexible"] = Field(default="fixed", description="fixed (to length) or flexible")
    spare: int = Field(default=0, ge=0, description="with flexible padding: most pads added to the longest row")
    spare_share: float = Field(default=0.25, ge=0, le=1, description="share of steps with spare pads")
    ramp: float = Field(default=0.2, ge=0, le=1, description="share of steps until all requests stay clean")

    @model_validator(mode="after")
    def _spare_is_for_flexible(self) -> Self:
        if self.spare and self.padding == "fixed":
            raise ValueError(f"spare={self.spare} needs padding='flexible'; fixed rows are always padded to length")
        return self


class RolloutParams(DecodingParams):
    """Decoding of completions: the settings of `diffucoder generate`, with defaults of DiffuCoder, appendix B.1."""

    temperature: float = Field(default=1.2, gt=0, description="randomness of the tokens")
    top_p: float | None = Field(default=0.95, gt=0, le=1, description="draw from the most likely tokens of this mass")
    new_tokens: int = Field(default=256, ge=1, description="longest completion in tokens")

    def replace(self, **changes: object) -> DecodingParams:
        """Plain settings with `changes`, which keep the defaults of this class."""
        defaults = {name: getattr(self, name) for name in RolloutParams.__annotations__}
        return super().replace(**{**defaults, **changes})


class GrpoSettings(DataSettings):
    """Stage 4: coupled-GRPO on problems with tests (DiffuCoder §5 and appendix B.1). `batch` counts completions."""

    data: Sources = Field(description="problems with tests: .jsonl(.gz) files, see docs/rl_data.md")
    tied: bool = Field(default=False, description="train embeddings and head as one matrix, if equal at the start")

    group: int = Field(default=8, ge=2, description="completions of each problem")
    prompt_tokens: int = Field(default=200, ge=8, description="longest prompt; longer requests lose their beginning")
    chat: bool = Field(default=True, description="put requests into the chat template; false: continue them")
    decoding: RolloutParams = Field(default=RolloutParams(), description="how completions are decoded")
    decode_batch: int = Field(default=64, ge=1, description="completions decoded together, then graded")

    rewards: Literal["robust", "paper"] = Field(default="robust", description="how to read the format: robust or paper")
    test_seconds: float = Field(default=5.0, gt=0, description="seconds for all tests; rewards=paper: for each test")
    workers: MayChange[int] = Field(default=0, ge=0, description="programs run at a time; 0: one for each core")

    advantage: Baseline = Field(default="mean", description="subtract the mean of the group, or leave_one_out")
    scale_rewards: bool = Field(default=False, description="divide advantages by their group's standard deviation")
    negative_weight: float = Field(default=1.0, ge=0, le=1, description="weight of completions worse than their group")

    estimator: Estimator = Field(default="coupled", description="coupled, decoupled, full_mask or d1 masks")
    pairs: int = Field(default=1, ge=1, description="pairs of masks for coupled and decoupled (lambda)")
    mask_ratio: tuple[Share, Share] = Field(default=(0.2, 0.8), description="range of the mask ratios")
    ratio_per: Literal["row", "step"] = Field(default="row", description="one mask ratio for each row or each step")
    group_masks: bool = Field(default=False, description="use the same masks for all completions of a problem")
    score_padding: bool = Field(default=False, description="score the pads after the terminator too; paper: false")

    iterations: int = Field(default=2, ge=1, description="optimiser steps on one batch of completions (mu)")
    epsilon_low: float = Field(default=0.5, gt=0, lt=1, description="ratios are clipped below 1 minus this")
    epsilon_high: float = Field(default=0.5, gt=0, description="ratios are clipped above 1 plus this")
    reduction: Reduction = Field(default="token", description="loss per token, sequence, or length (of the canvas)")
    kl: float = Field(default=0.01, ge=0, description="weight of the KL divergence from the reference (beta)")
    reference_every: int = Field(default=64, ge=0, description="steps between updates of the reference; 0: never")
    reference_mix: float = Field(default=1.0, ge=0, le=1, description="share of the policy in the updated reference")
    samples_every: MayChange[int] = Field(default=50, ge=1, description="steps between lines of samples.jsonl")

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.batch % self.group:
            raise ValueError(f"batch={self.batch} is not a multiple of group={self.group}; completions come in groups")
        for name, value in (("steps", self.steps), ("save_every", self.save_every)):
            if value % self.iterations:
                raise ValueError(
                    f"{name}={value} is not a multiple of iterations={self.iterations}; completions are not saved, "
                    "so a run can only stop between two batches of them"
                )
        if self.pairs > 1 and self.estimator not in ("coupled", "decoupled"):
            raise ValueError(f"pairs={self.pairs} is for coupled and decoupled; {self.estimator} has one pass, omit it")
        if not 0 < self.mask_ratio[0] <= self.mask_ratio[1]:
            raise ValueError(f"mask_ratio={self.mask_ratio} is not a range inside (0, 1); the paper uses [0.2, 0.8]")
        return self

    @model_validator(mode="after")
    def _decoding_fits(self) -> Self:
        decoding = self.decoding
        for name in ("seed", "num_samples", "stop"):
            value = getattr(decoding, name)
            if value != DecodingParams.model_fields[name].default:
                raise ValueError(f"decoding.{name}={value!r} cannot be set for training; use seed and group")
        if self.lora_rank and decoding.cache != "none":
            raise ValueError(
                f"decoding.cache={decoding.cache!r} does not work with the adapters of lora_rank={self.lora_rank}, "
                "whose layers have no cache; use decoding.cache='none'"
            )
        return self


STAGES: dict[str, type[TrainSettings]] = {
    "pretrain": PretrainSettings,
    "adapt": AdaptSettings,
    "sft": SftSettings,
    "grpo": GrpoSettings,
}
"""One settings class a stage, by the name of its command."""
