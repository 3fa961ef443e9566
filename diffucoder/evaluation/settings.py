"""Settings of `diffucoder evaluate` and `diffucoder order`. No torch: the command line makes options of them."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from diffucoder.config import Settings
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError

_NOT_OF_A_MODEL = {"benchmark", "samples", "data", "run", "limit", "workers", "packages", "unsafe"}


class RunSettings(Settings):
    """Settings of both commands. Several values of `steps` or `temperature` make a run each."""

    data: Path | None = Field(default=None, description="folder of the published files; if left out, the Hub")
    run: Path | None = Field(default=None, description="run folder; if left out, one below runs/")
    limit: int | None = Field(default=None, ge=1, description="number of tasks, from the first on; if left out, all")
    raw: bool = Field(default=False, description="continue the prompt as it is, without a chat template (base models)")
    steps: str | None = Field(default=None, description="denoising steps; several, as in 512,256, make a run each")
    temperature: str | None = Field(default=None, description="randomness of the tokens; several make a run each")
    hole: str | None = Field(
        default=None,
        description="tokens of the hole in infilling benchmarks: oracle (default: that of the published solution), "
        "likeliest (of several lengths), or lengths as in 4,8,16,32,64, which make a run each",
    )
    batch: int = Field(default=8, ge=1, description="tasks decoded together")
    unsafe: bool = Field(default=False, description="run programs WITHOUT a sandbox, as yourself")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="float32, bfloat16 or float16; if left out, the fastest on this machine"
    )
    device: str | None = Field(default=None, description="cpu, cuda or mps; if left out, the best on this machine")
    decoding: DecodingParams = DecodingParams()

    def sweep(self) -> list[DecodingParams]:
        """Return the decoding settings of each run. Raises ConfigError for a value that cannot be one."""
        choices: dict[str, list[Any]] = {}
        for name, kind in (("policy", str), ("steps", int), ("temperature", float)):
            text = getattr(self, name, None)  # only the analysis of order compares policies
            if text:
                choices[name] = _values(name, text, kind)
        return [self.decoding.replace(**dict(zip(choices, row, strict=True))) for row in product(*choices.values())]

    def holes(self) -> list[str | int]:
        """Return the lengths of holes of each run. Raises ConfigError for a value that cannot be one."""
        if self.hole in (None, "oracle", "likeliest"):
            return [self.hole or "oracle"]
        lengths = _values("hole", self.hole or "", int)
        if min(lengths) < 1:
            raise ConfigError(f"hole={self.hole!r} must be oracle, likeliest, or lengths of 1 or more, as in 4,8,16")
        return lengths


class EvaluateSettings(RunSettings):
    """What to evaluate: a model, or a file of samples."""

    benchmark: str = Field(
        description="tiny, humaneval, humaneval+, mbpp, mbpp+, humaneval-infilling, ..., or your own .jsonl file"
    )
    model: str | None = Field(
        default=None, description="folder, Hub id, or name from `diffucoder models`; if left out, the shipped model"
    )
    samples: Path | None = Field(
        default=None, description="grade this file of completions (JSONL, also .gz) instead of a model"
    )
    workers: int | None = Field(default=None, ge=1, description="programs run at a time; if left out, one per core")
    packages: tuple[Path, ...] = Field(default=(), description="folder of packages that programs may import")

    @model_validator(mode="after")
    def _samples_need_no_model(self) -> Self:
        given = self.model_dump(exclude_defaults=True)
        given |= given.pop("decoding", {})
        unused = sorted(given.keys() - _NOT_OF_A_MODEL)
        if self.samples is not None and unused:
            option = unused[0].replace("_", "-")
            raise ValueError(f"--samples are graded as they are, and --{option} is for a model; give one of the two")
        return self


class OrderSettings(RunSettings):
    """What to analyse: models on some prompts, or recorded traces."""

    prompts: str | None = Field(
        default=None,
        description="a benchmark of `diffucoder evaluate`, gsm8k, or a .jsonl file of prompts, optionally with tests",
    )
    model: tuple[str, ...] = Field(
        default=(),
        description="folder, Hub id or known name (tiny is the shipped model); with --traces, the model whose "
        "tokenizer reads them, if it is not the one that they name",
    )
    traces: tuple[Path, ...] = Field(default=(), description="a file of traces, or a run folder, instead of PROMPTS")
    policy: str | None = Field(default=None, description="entropy, max_prob, margin or random; several make a run each")
    maps: int = Field(default=8, ge=0, description="prompts whose entropies are kept at every step")

    @model_validator(mode="after")
    def _prompts_or_traces(self) -> Self:
        if (self.prompts is None) == (not self.traces):
            raise ValueError("give PROMPTS for a model, or --traces of recorded answers; one of the two")
        if self.traces and len(self.model) > 1:
            raise ValueError("--traces are read with one tokenizer; give one --model")
        return self

    @property
    def folder(self) -> Path:
        """Folder of the report and of the runs."""
        return self.run or Path("runs/order") / Path(self.prompts or "traces").stem


def _values(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be numbers separated by commas, as in --{name} 512,256") from None
