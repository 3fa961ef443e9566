"""How to decode: `DecodingParams` is the only place with the settings of decoding, their defaults and their help.

Three presets share all settings:

* `exact`, the default: exact quotas for each row, early stop, masks and unused ids never proposed, fp32 arithmetic.
* `reference`: the results of `diffusion_generate` in the released Dream and DiffuCoder code, token for token at
  temperature 0 and in distribution above it. Masks are counted for each row; the release takes the batch's mean.
* `fast`: `exact` with a constant set of faster settings (`_fill_in_fast`). On the shipped model pass@1 was 0.8 ± 1.2
  points below `reference` (benchmarks/results/decoding_test.md).
"""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from diffucoder.config import Settings
from diffucoder.errors import ConfigError

Policy = Literal["random", "max_prob", "margin", "entropy"]


class DecodingParams(Settings):
    """Settings of one request. `replace` makes changed copies. Raises ConfigError with value, rule and way out."""

    preset: Literal["exact", "reference", "fast"] = "exact"
    """exact (corrects the released sampler), reference (reproduces it), or fast (exact with two speed-ups)"""

    # number of steps, and the end of a text

    steps: int | None = Field(default=None, ge=1, le=10**6)
    """denoising steps, each one forward pass; if left out, one for each masked token"""

    new_tokens: int = Field(default=64, ge=1, lt=2**31)
    """longest answer in tokens: the number of masks after the prompt"""

    num_samples: int = Field(default=1, ge=1, le=10**6)
    """number of answers for each prompt"""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """end an answer, or the text of each hole, before the first of these strings"""

    seed: int = Field(default=0, ge=0, lt=2**64)
    """seed of the random numbers; the same seed gives the same answers"""

    # sampling: which token a position proposes

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """randomness of the tokens; 0 takes the most likely one. Above 0 it also changes their order"""

    top_p: float | None = Field(default=None, gt=0, le=1)
    """draw only from the most likely tokens that together reach this probability; if left out, from all"""

    top_k: int | None = Field(default=None, ge=1, lt=2**31)
    """draw only from this many of the most likely tokens; if left out, from all"""

    # order: which positions go first

    policy: Policy = "entropy"
    """which positions to commit first: entropy (lowest), max_prob, margin (between the best two tokens) or random"""

    policy_temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """randomness of the order; 0 always takes the most confident positions"""

    block: int | None = Field(default=None, ge=1, lt=2**31)
    """fill blocks of this many tokens from left to right, each in any order; if left out, everything is one block"""

    end_last: bool = False
    """commit the end of an answer only when no mask is left before it"""

    end_penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """take this off the logits of tokens that end an answer, so that answers become longer (Dream-Coder)"""

    # rule: tokens that a step may commit beyond its schedule

    threshold: float | None = Field(default=None, gt=0, le=1)
    """also commit every token of at least this probability; with the policy margin, of this margin (Fast-dLLM)"""

    factor: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """also commit the n most probable tokens, for the largest n with (n + 1)(1 - p of the nth) < this (Fast-dLLM)"""

    entropy_bound: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """also commit tokens of lowest entropy while their sum, without the largest, is at most this (EB-Sampler)"""

    stable: int = Field(default=0, ge=0, le=10**6)
    """beyond the schedule, commit only tokens that were proposed in each of this many steps before, too (KLASS)"""

    revoke: float = Field(default=0.0, ge=0, lt=1)
    """mask tokens that lost most probability again, up to this fraction of the tokens that the step commits"""

    syntax: Literal["python", "compile", "names"] | None = None
    """write only text that keeps a rule: python (it parses), compile (it compiles), names (and no name is unknown)"""

    # cache: keys and values that a pass does not compute again

    cache: Literal["none", "prefix", "dual", "delayed"] = "none"
    """keys and values to keep: none, prefix (left of the block), dual (outside it), delayed (of committed tokens)"""

    eps: float = Field(default=1e-3, gt=0, lt=1)
    """end of the time grid of the preset `reference`, which runs from 1 down to this"""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.preset == "reference":
            for name in _NOT_REFERENCE:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is not a setting of the reference preset; use preset='exact'")
        rules = [name for name in _RULES if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ValueError(f"{rules[0]} and {rules[1]} are two rules for the commitments of a step; choose one")
        if self.entropy_bound is not None and self.policy != "entropy":
            raise ValueError(f"entropy_bound needs the policy 'entropy', not {self.policy!r}; use threshold or factor")
        if self.cache in ("prefix", "dual") and self.block is None:
            raise ValueError(f"cache={self.cache!r} needs a block; give block, 32 for example")
        if self.preset == "fast":
            self._fill_in_fast()
        return self

    def _fill_in_fast(self) -> None:
        """Set the additions of the preset `fast`, except where the user has set something else."""
        given = self.model_fields_set
        added = self.__dict__  # not fields that the user has set: `replace` decides again
        if not given & {*_RULES, "steps"}:
            if self.policy == "entropy":
                added["entropy_bound"] = 0.01
            else:
                added["threshold"] = 0.99
        if not given & {"cache", "block"}:
            added["cache"] = "delayed"

    @property
    def stochastic(self) -> bool:
        """Whether two seeds can give different results."""
        return self.temperature > 0 or self.policy_temperature > 0 or self.policy == "random"

    def replace(self, /, **changes: Any) -> "DecodingParams":  # Any: each field has its own type, checked by pydantic
        """Return these settings with `changes`, validated (pydantic's own `model_copy` does not validate)."""
        return DecodingParams(**{**self.model_dump(exclude_unset=True), **changes})

    @classmethod
    def from_dream(cls, **dream: Any) -> "DecodingParams":  # Any: as they are passed to `diffusion_generate`
        """Return `reference` settings from sampling arguments of Dream's `diffusion_generate`, with its defaults."""
        for name in dream:
            if name not in _DREAM_NAMES:
                close = get_close_matches(name, _DREAM_NAMES, n=1)
                hint = f"did you mean {close[0]!r}?" if close else _NOT_SAMPLING
                raise ConfigError(f"{name!r} is not a sampling argument of diffusion_generate; {hint}")
        alg = dream.get("alg", "origin")
        if alg not in _DREAM_POLICIES:
            raise ConfigError(f"alg={alg!r} is not one of Dream's: {', '.join(_DREAM_POLICIES)}")
        settings = {"steps": 512, **dream, "alg": _DREAM_POLICIES[alg], "alg_temp": dream.get("alg_temp") or 0.0}
        return cls(preset="reference", **{_DREAM_NAMES[name]: value for name, value in settings.items()})


_RULES = ("threshold", "factor", "entropy_bound")
_NOT_REFERENCE = (*_RULES, "stable", "revoke", "end_last", "end_penalty", "syntax", "block", "cache")
_DREAM_POLICIES = {"origin": "random", "maskgit_plus": "max_prob", "topk_margin": "margin", "entropy": "entropy"}
_DREAM_NAMES = {"alg": "policy", "alg_temp": "policy_temperature", "num_return_sequences": "num_samples"}
_DREAM_NAMES |= {name: name for name in ("eps", "steps", "temperature", "top_k", "top_p")}
_NOT_SAMPLING = (
    "Canvas.from_prompts takes prompts, valid (the attention mask), new_tokens, mask_id, pad_id and terminators; "
    "denoise(model, canvas, params) yields the history; a Denoiser takes the place of hooks"
)
