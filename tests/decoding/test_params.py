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
        ({"ar_bound": 0.1, "entropy_bound": 0.1}, "entropy_bound and ar_bound are two rules"),
        ({"ar_bound": 0.1, "policy": "max_prob"}, "ar_bound goes by the policy 'entropy', not 'max_prob'"),
        ({"ar_bound": 0.1, "drafts": 3}, "drafts=3 cannot foresee steps under ar_bound"),
        ({"ar_bound": 0.1, "preset": "reference"}, "ar_bound is no setting of the reference preset"),
    ],
    ids=str,
)
def test_what_does_not_go_with_the_bound_by_ar_ness_is_said(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DecodingParams(**settings)


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
