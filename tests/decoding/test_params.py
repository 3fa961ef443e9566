"""DecodingParams: refuses bad settings in one line, and translates Dream's names."""

from typing import Any

import pytest

from diffucoder.config import load_settings
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"eps": 1.0}, "eps=1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"policy": "surest"}, "'max_prob'"),
        ({"stop": ("",)}, "stop"),
        ({"temprature": 1.0}, "did you mean 'temperature'?"),
        ({"zzz": 1.0}, "policy_temperature"),
        ({"self": 1.0}, "unknown setting 'self'"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DecodingParams(**settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"threshold": 0.1, "entropy_bound": 0.1}, "threshold and entropy_bound are two rules"),
        ({"entropy_bound": 0.1, "policy": "max_prob"}, "entropy_bound needs the policy 'entropy', not 'max_prob'"),
        ({"cache": "dual"}, "cache='dual' needs a block; give block"),
        ({"stable": 1, "preset": "reference"}, "stable is not a setting of the reference preset"),
        ({"entropy_bound": 0.1, "preset": "reference"}, "entropy_bound is not a setting of the reference preset"),
        ({"revoke": 0.1, "preset": "reference"}, "revoke is not a setting of the reference preset"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DecodingParams(**settings)


# --- the preset fast: a constant set of settings


@pytest.mark.parametrize(
    ("settings", "filled_in"),
    [
        ({}, {"entropy_bound": 0.01, "cache": "delayed"}),
        ({"policy": "margin"}, {"threshold": 0.99, "cache": "delayed"}),
        ({"steps": 8}, {"entropy_bound": None, "cache": "delayed"}),
        ({"factor": 1.0}, {"entropy_bound": None, "factor": 1.0, "cache": "delayed"}),
        ({"entropy_bound": 0.5}, {"entropy_bound": 0.5, "cache": "delayed"}),
        ({"entropy_bound": None}, {"entropy_bound": None, "cache": "delayed"}),
        ({"cache": "none"}, {"entropy_bound": 0.01, "cache": "none"}),
        ({"block": 16}, {"entropy_bound": 0.01, "cache": "none"}),
        ({"revoke": 0.5}, {"entropy_bound": 0.01, "cache": "delayed", "revoke": 0.5}),
    ],
    ids=str,
)
def test_fast_fills_in_what_is_not_given(settings: dict[str, Any], filled_in: dict[str, Any]) -> None:
    params = DecodingParams(preset="fast", **settings)
    assert {name: getattr(params, name) for name in filled_in} == filled_in


def test_what_fast_fills_in_is_decided_again_when_settings_are_replaced() -> None:
    fast = DecodingParams(preset="fast", temperature=0.3)
    assert fast.replace(policy="margin").threshold == 0.99
    assert fast.replace(policy="margin").entropy_bound is None
    assert fast.replace(steps=4).entropy_bound is None
    assert fast.replace(preset="exact") == DecodingParams(temperature=0.3)
    assert DecodingParams(**fast.model_dump()) == fast  # as a trace holds them


def test_a_setting_is_refused_on_the_command_line_too() -> None:
    with pytest.raises(ConfigError, match="steps=0"):
        load_settings(DecodingParams, overrides=["steps=0"])
    assert load_settings(DecodingParams, overrides=["policy=margin", "steps=7"]) == DecodingParams(
        policy="margin", steps=7
    )


def test_every_setting_explains_itself() -> None:
    assert all(field.description for field in DecodingParams.model_fields.values())


def test_settings_are_frozen_and_replaced_with_validation() -> None:
    params = DecodingParams(steps=8)
    assert params.replace(temperature=0.2) == DecodingParams(steps=8, temperature=0.2)
    with pytest.raises(ConfigError, match="steps=0"):
        params.replace(steps=0)
    with pytest.raises(ConfigError, match="unknown setting 'self'"):
        params.replace(**{"self": 1})
    with pytest.raises(ValueError, match="frozen"):
        params.steps = 9


@pytest.mark.parametrize(
    ("settings", "stochastic"),
    [({}, False), ({"temperature": 0.1}, True), ({"policy_temperature": 1}, True), ({"policy": "random"}, True)],
)
def test_only_some_settings_need_random_numbers(settings: dict[str, Any], stochastic: bool) -> None:
    assert DecodingParams(**settings).stochastic is stochastic


def test_dreams_defaults_are_translated() -> None:
    assert DecodingParams.from_dream() == DecodingParams(preset="reference", steps=512, policy="random")


def test_dreams_names_are_translated() -> None:
    params = DecodingParams.from_dream(
        alg="topk_margin", alg_temp=0.5, steps=64, temperature=0.2, top_p=0.95, top_k=50, num_return_sequences=3
    )
    assert params == DecodingParams(
        preset="reference",
        policy="margin",
        policy_temperature=0.5,
        steps=64,
        temperature=0.2,
        top_p=0.95,
        top_k=50,
        num_samples=3,
    )
    assert DecodingParams.from_dream(alg="maskgit_plus", alg_temp=None).policy_temperature == 0


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("attention_mask", "Canvas.from_prompts"),
        ("max_new_tokens", "new_tokens"),
        ("mask_token_id", "mask_id"),
        ("output_history", "denoise"),
        ("generation_tokens_hook_func", "denoise"),
        ("generation_logits_hook_func", "Denoiser"),
    ],
)
def test_what_is_no_sampling_argument_is_sent_where_it_belongs(name: str, place: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'.*{place}"):
        DecodingParams.from_dream(**{name: None})


def test_unknown_dream_arguments_and_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'alg_temp'"):
        DecodingParams.from_dream(alg_tmp=0.5)
    with pytest.raises(ConfigError, match="maskgit_plus"):
        DecodingParams.from_dream(alg="low_confidence")
    with pytest.raises(ConfigError, match="steps=0"):
        DecodingParams.from_dream(steps=0)
