"""How to decode: `DecodingParams`, the one place where a sampling setting, its default and its help are written.

Not for what is decoded (`Canvas`). Dream's names for the same settings are translated by `from_dream`, nowhere else.

Three presets share all settings:

* `exact`, the default: exact quotas for each row, early stop, masks and unused ids never proposed, fp32 arithmetic.
* `reference`: what `diffusion_generate` of the released Dream and DiffuCoder code does, token for token at temperature
  0 and in distribution above it: its time grid with the empty first step, and arithmetic in the model's own dtype.
  Rows do not depend on each other here either, where the release counts masks by the mean of the batch.
* `fast`: `exact`, and settings that were found to cost no quality, chosen by what is quickest here (`tuning`).
"""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from diffucoder.config import Settings
from diffucoder.errors import ConfigError

Policy = Literal["random", "max_prob", "margin", "entropy"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class DecodingParams(Settings):
    """Settings of one request; vary them with `replace`. Raises ConfigError naming value, rule and way out."""

    preset: Literal["exact", "reference", "fast"] = "exact"
    """`exact` mends the released sampler's defects; `reference` reproduces them; `fast` commits what is sure at once"""

    steps: int | None = Field(default=None, ge=1)
    """denoising steps, each one forward pass; None = one for each masked token"""

    policy: Policy = "entropy"
    """which positions to commit first: random, surest token, widest margin between the best two, or least entropy"""

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """randomness of the tokens, and above 0 of their order, which is judged after tempering; 0 = the likeliest token"""

    top_p: float | None = Field(default=None, gt=0, le=1)
    """propose only the likeliest tokens that together reach this probability; None = all"""

    top_k: int | None = Field(default=None, ge=1)
    """propose only this many of the likeliest tokens; None = all"""

    policy_temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """randomness of the order: positions drawn by confidence / this, without replacement; 0 = the surest"""

    threshold: float | None = Field(default=None, gt=0, le=1)
    """commit also every token at least this probable; for the policy margin, of at least this margin (Fast-dLLM)"""

    factor: float | None = Field(default=None, gt=0)
    """commit also the n most probable tokens, the most for which (n + 1)(1 - p of the nth) < this (Fast-dLLM)"""

    entropy_bound: float | None = Field(default=None, ge=0)
    """commit also the tokens of least entropy, whose entropies without the largest add up to this (EB-Sampler)"""

    ar_bound: float | None = Field(default=None, ge=0)
    """an entropy bound of this times the local AR-ness until now: wide as long as tokens come one behind the other"""

    adaptive: bool = False
    """commit also every token more probable than those committed so far are on average (Saber)"""

    revoke: float = Field(default=0.0, ge=0, lt=1)
    """mask again this share of as many tokens as a step commits: those that lost most probability since (Saber)"""

    block: int | None = Field(default=None, ge=1)
    """fill the canvas in blocks of this many positions from left to right, any order within; None = one block"""

    horizon: int | None = Field(default=None, ge=1)
    """show the model only this many positions from the first mask on, and the last; None = the whole canvas"""

    drafts: int = Field(default=0, ge=0)
    """commitments guessed ahead and checked by one pass: the same result in fewer, wider passes (self-speculation)"""

    branches: int = Field(default=1, ge=1)
    """canvases looked at in one pass, with another token each, of which the surest goes on (LoPA); 1 = none but one"""

    cache: Literal["none", "prefix", "dual", "delayed"] = "none"
    """what passes do not compute anew: keys and values left of the block, of all outside it (Fast-dLLM), or of every
    token from the second pass on after the one that committed it (dKV-Cache)"""

    refresh_every: int | None = Field(default=None, ge=1)
    """steps until a cache is computed anew; None = when a block begins"""

    vicinity: int = Field(default=0, ge=0)
    """positions on either side of the block that a cache leaves out, too (dInfer)"""

    cache_delay: int = Field(default=0, ge=0)
    """steps into a block for which the block before it is not taken from the cache (d3LLM)"""

    eps: float = Field(default=1e-3, gt=0, lt=1)
    """end of the time grid of the `reference` preset, which runs from 1 down to this"""

    seed: int = Field(default=0, ge=0)
    """fixes the result, together with the number of the sample"""

    new_tokens: int = Field(default=64, ge=1)
    """masks put behind a prompt; for text-level generation: a canvas brings its own"""

    num_samples: int = Field(default=1, ge=1)
    """samples of each canvas row, which become consecutive rows"""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """end a text before the first of these strings; for text-level generation"""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        names = ("threshold", "factor", "entropy_bound", "ar_bound")
        rules = [name for name in names if getattr(self, name) is not None]
        rules += ["adaptive"] if self.adaptive else []
        changed = [name for name in _EXACT_ONLY if getattr(self, name) != type(self).model_fields[name].default]
        if self.preset == "reference" and changed:
            raise ValueError(f"{changed[0]} is no setting of the reference preset; use preset='exact'")
        if len(rules) > 1:
            raise ValueError(f"{rules[0]} and {rules[1]} are two rules for what a step commits; choose one")
        if rules and rules[0] in ("entropy_bound", "ar_bound") and self.policy != "entropy":
            raise ValueError(f"{rules[0]} goes by the policy 'entropy', not {self.policy!r}; use threshold or factor")
        others = {"branches": self.branches > 1, "revoke": self.revoke > 0, "adaptive": self.adaptive}
        others["ar_bound"] = self.ar_bound is not None  # how much is committed hangs on the order until then
        others["a delayed cache"] = self.cache == "delayed"  # what it keeps depends on the passes that led there
        other = next((name for name, there in others.items() if there), "")
        if self.drafts and other:
            raise ValueError(f"drafts={self.drafts} cannot foresee steps under {other}; drop one of them")
        if self.cache in ("prefix", "dual") and self.block is None:
            raise ValueError(f"cache={self.cache!r} is kept for a block; give block, 32 for example")
        if self.cache == "delayed" and (self.vicinity or self.cache_delay):
            name = "vicinity" if self.vicinity else "cache_delay"
            raise ValueError(f"{name} is measured from the block of a cache, and 'delayed' has none; drop one of them")
        if self.cache != "none" and self.horizon is not None:
            raise ValueError(f"horizon={self.horizon} and cache={self.cache!r} both narrow the pass; choose one")
        return self

    @property
    def stochastic(self) -> bool:
        """Whether two seeds may differ."""
        return self.temperature > 0 or self.policy_temperature > 0 or self.policy == "random"

    def replace(self, **changes: Any) -> "DecodingParams":  # Any: each field has its own type, checked by pydantic
        """These settings with `changes`, validated (pydantic's own `model_copy` does not validate)."""
        return DecodingParams(**{**self.model_dump(), **changes})

    @classmethod
    def from_dream(cls, **dream: Any) -> "DecodingParams":  # Any: as they are passed to `diffusion_generate`
        """The `reference` preset from sampling arguments of Dream's `diffusion_generate`, and its defaults."""
        for name in dream:
            if name in _NOT_SAMPLING:
                raise ConfigError(f"{name!r} of diffusion_generate is no sampling argument; use {_NOT_SAMPLING[name]}")
            if name not in _DREAM_DEFAULTS:
                close = get_close_matches(name, _DREAM_DEFAULTS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(_DREAM_DEFAULTS))}"
                raise ConfigError(f"unknown argument {name!r} of diffusion_generate; {hint}")
        arguments = {**_DREAM_DEFAULTS, **dream}
        alg, policy_temperature = arguments.pop("alg"), arguments.pop("alg_temp")
        if alg not in _DREAM_POLICIES:
            raise ConfigError(f"alg={alg!r} is not one of Dream's: {', '.join(_DREAM_POLICIES)}")
        return cls(
            preset="reference",
            policy=_DREAM_POLICIES[alg],
            policy_temperature=0.0 if policy_temperature is None else policy_temperature,
            num_samples=arguments.pop("num_return_sequences"),
            **arguments,  # these have one name in both
        )


_EXACT_ONLY = (
    *("threshold", "factor", "entropy_bound", "ar_bound", "adaptive", "revoke"),
    *("block", "horizon", "drafts", "branches", "cache"),
)
_DREAM_POLICIES: dict[str, Policy] = {
    "origin": "random",
    "maskgit_plus": "max_prob",
    "topk_margin": "margin",
    "entropy": "entropy",
}
_DREAM_DEFAULTS: dict[str, Any] = {  # Any: values of DreamGenerationConfig, of several types
    "alg": "origin",
    "alg_temp": None,
    "eps": 1e-3,
    "num_return_sequences": 1,
    "steps": 512,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
}
_CANVAS = "Canvas.from_prompts(input_ids, valid=..., new_tokens=..., mask_id=..., pad_id=..., terminators=...)"
_STEPS = "the Steps that denoise(model, canvas, params) yields"
_NOT_SAMPLING = {
    **dict.fromkeys(("inputs", "input_ids", "attention_mask", "max_length", "max_new_tokens"), _CANVAS),
    **dict.fromkeys(("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id"), _CANVAS),
    **dict.fromkeys(("return_dict", "return_dict_in_generate", "output_history"), _STEPS),
    "generation_tokens_hook_func": _STEPS,
    "generation_logits_hook_func": "a Denoiser whose forward does what the hook did",
    "generation_config": "its fields, one by one: from_dream(steps=..., alg=...)",
}
