"""Sampling: proposals and confidence equal a plain one-row implementation, for any mix of settings in a batch."""

from typing import Any

import pytest
import torch
from scripted import MASK, VOCABULARY, _sample
from torch import Tensor

from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.sampling import Sampler, Samples, keep_top_k, keep_top_p

SETTINGS: list[dict[str, Any]] = [
    {"policy": policy, **filters}
    for policy in ("max_prob", "margin", "entropy")
    for filters in ({}, {"top_p": 0.6}, {"top_p": 0.95}, {"top_k": 1}, {"top_k": 4}, {"top_p": 0.8, "top_k": 99})
]
ALGS = {"max_prob": "maskgit_plus", "margin": "topk_margin", "entropy": "entropy"}


def propose(
    logits: Tensor, params: DecodingParams, uniform: Tensor, *barred: int, proposable: int | None = None
) -> Samples:
    """What the positions propose, none of them being known."""
    sampler = Sampler.of(params, mask_id=MASK, forbidden=barred, proposable=proposable)
    return sampler.sample(logits, uniform, torch.full((len(logits),), -1))


def random_logits(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["reference", "exact"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_proposals_equal_a_plain_implementation(preset: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    params = DecodingParams(preset=preset, **settings)
    logits = random_logits(18, dtype)
    tokens, confidence, log_prob, *_ = propose(logits, params, torch.zeros(len(logits)))
    own = logits.to(dtype if preset == "reference" else torch.float32, copy=True)
    own[:, MASK] = torch.finfo(own.dtype).min
    for row in range(len(logits)):
        expected, proposal = _sample(own[row : row + 1], ALGS[params.policy], 0.0, params.top_p, params.top_k)
        likeliest, _ = _sample(own[row : row + 1], "maskgit_plus", 0.0, params.top_p, params.top_k)
        assert tokens[row] == proposal
        assert confidence[row] == expected.float()
        assert log_prob[row] == likeliest.float().log()


def test_requests_have_equal_samplers_only_if_all_their_settings_are_equal() -> None:
    params = [DecodingParams(preset=preset, **s) for s in SETTINGS for preset in ("exact", "reference")]
    samplers = {Sampler.of(p, mask_id=MASK) for p in params}
    assert len(samplers) == len(params)
    assert Sampler.of(params[0].replace(steps=3, seed=7), mask_id=MASK) in samplers
    assert Sampler.of(params[0], mask_id=MASK, forbidden=(1,)) not in samplers


def test_the_best_candidates_come_in_order_and_known_tokens_keep_their_place() -> None:
    logits = random_logits(6)
    sampler = Sampler.of(DecodingParams(), mask_id=MASK, forbidden=(3,), proposable=11)
    known = torch.tensor([-1, 2, -1, 5, -1, -1])
    samples = sampler.sample(logits, torch.zeros(6), known, candidates=4)
    barred = logits.clone()
    barred[:, [3, MASK, 11]] = -torch.inf
    expected = barred.log_softmax(-1)
    assert torch.equal(samples.candidates, expected.topk(4).indices)
    torch.testing.assert_close(samples.candidate_log_probs, expected.topk(4).values)
    assert torch.equal(samples.tokens, samples.candidates[:, 0].where(known < 0, known))
    torch.testing.assert_close(samples.log_prob, expected.gather(1, samples.tokens[:, None])[:, 0])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_evenly_spread_numbers_give_each_token_its_share(temperature: float) -> None:
    count = 10_000
    logits = random_logits(1)
    params = DecodingParams(temperature=temperature, top_k=6, policy="max_prob")
    uniform = (torch.arange(count) + 0.5) / count
    tokens, confidence, log_prob, *_ = propose(logits.expand(count, -1), params, uniform)
    logits[:, MASK] = -torch.inf
    kept = keep_top_k(logits / temperature, 6).softmax(-1)[0]  # (V,)
    assert (torch.bincount(tokens, minlength=VOCABULARY) - count * kept).abs().max() < 1.01
    torch.testing.assert_close(confidence, kept[tokens])
    torch.testing.assert_close(log_prob, kept[tokens].log())


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_extreme_numbers_give_possible_tokens(number: float) -> None:
    logits = torch.full((1, VOCABULARY), -50.0)
    logits[0, 4:7] = 1
    params = DecodingParams(temperature=0.5, top_k=3)
    token, *_ = propose(logits, params, torch.tensor([number]), 0, VOCABULARY - 1, proposable=10)
    assert token.item() == (4 if number == 0 else 6)


def test_a_temperature_close_to_0_is_0() -> None:
    logits = random_logits(4)
    cold = propose(logits, DecodingParams(temperature=1e-300), torch.full((4,), 0.999))
    assert cold[0].tolist() == propose(logits, DecodingParams(), torch.zeros(4))[0].tolist()
    assert cold[1].isfinite().all()


def test_barred_and_unused_ids_are_never_proposed() -> None:
    logits = torch.arange(VOCABULARY).float().expand(50, -1)  # the later, the likelier
    params = DecodingParams(temperature=5.0)
    uniform = torch.linspace(0, 0.9999, 50)
    tokens, *_ = propose(logits, params, uniform, 1, 6, proposable=8)
    assert set(tokens.tolist()) == {0, 2, 3, 4, 5, 7}
    reference = params.replace(preset="reference")
    tokens, *_ = propose(logits, reference, uniform, 1, 6, proposable=8)  # the release knows of no unused ids
    assert set(tokens.tolist()) >= {10, 11}
    assert MASK not in tokens


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.25, 0.15]])
    kept = {
        p: (keep_top_p(probabilities.log(), p).softmax(-1) > 0)[0].nonzero()[:, 0].tolist()
        for p in (0.01, 0.49, 0.51, 0.74, 0.76, 0.999)
    }
    assert kept == {0.01: [1], 0.49: [1], 0.51: [1, 2], 0.74: [1, 2], 0.76: [1, 2, 3], 0.999: [0, 1, 2, 3]}


def test_top_k_keeps_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    assert (keep_top_k(logits, 2) > 0).tolist() == [[False, True, True, True]]
    assert (keep_top_k(logits, 1) > 0).tolist() == [[False, True, False, False]]


def test_no_rows_are_no_trouble() -> None:
    for preset in ("exact", "reference"):
        params = DecodingParams(preset=preset, temperature=1, top_p=0.9, top_k=3)
        results = propose(random_logits(0), params, torch.zeros(0))
        assert [len(value) for value in results] == [0] * 6


def test_the_models_logits_are_left_as_they_were() -> None:
    logits = random_logits(3)
    before = logits.clone()
    propose(logits, DecodingParams(temperature=0.5, top_p=0.9), torch.zeros(3), proposable=5)
    assert torch.equal(logits, before)
