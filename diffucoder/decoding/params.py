"""How to decode: `DecodingParams`, the one place where a sampling setting, its default and its help are written.

Not for what is decoded (`Canvas`). Dream's names for the same settings are translated by `from_dream`, nowhere else.

Two presets share all settings:

* `exact`, the default: exact quotas for each row, early stop, masks and unused ids never proposed, fp32 arithmetic.
* `reference`: what `diffusion_generate` of the released Dream and DiffuCoder code does, token for token at temperature
  0 and in distribution above it: its time grid with the empty first step, and arithmetic in the model's own dtype.
  Rows do not depend on each other here either, where the release counts masks by the mean of the batch.
"""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from diffucoder.config import Settings
from diffucoder.errors import ConfigError

Policy = Literal["random", "max_prob", "margin", "entropy"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class DecodingParams(Settings):
    """Settings of one request; vary them with `replace`. Raises ConfigError naming value, rule and way out."""

    preset: Literal["exact", "reference"] = "exact"
    """`exact` mends the released sampler's defects; `reference` reproduces them, token for token"""

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
