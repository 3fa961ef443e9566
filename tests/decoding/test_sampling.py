"""Sampling: proposals and confidence equal a plain one-row implementation, for any mix of settings in a batch."""

from typing import Any

import pytest
import torch
from scripted import MASK, VOCABULARY, _sample
from torch import Tensor

from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.sampling import Rules, keep_top_k, keep_top_p, propose

SETTINGS: list[dict[str, Any]] = [
    {"policy": policy, **filters}
    for policy in ("max_prob", "margin", "entropy")
    for filters in ({}, {"top_p": 0.6}, {"top_p": 0.95}, {"top_k": 1}, {"top_k": 4}, {"top_p": 0.8, "top_k": 99})
]
ALGS = {"max_prob": "maskgit_plus", "margin": "topk_margin", "entropy": "entropy"}


def rules(params: list[DecodingParams], *barred: int) -> Rules:
    return Rules.of(params, torch.tensor([[MASK, *barred]] * len(params)))


def random_logits(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["reference", "exact"])
def test_a_mix_of_settings_equals_each_row_by_itself(preset: str, dtype: torch.dtype) -> None:
    params = [DecodingParams(preset=preset, **settings) for settings in SETTINGS]
    logits = random_logits(len(params), dtype)
    tokens, confidence, log_prob = propose(logits, rules(params), torch.zeros(len(params)))
    for row, p in enumerate(params):
        own = logits[row : row + 1].to(dtype if preset == "reference" else torch.float32, copy=True)
        own[:, MASK] = torch.finfo(own.dtype).min
        expected, proposal = _sample(own, ALGS[p.policy], 0.0, p.top_p, p.top_k)
        sure, _ = _sample(own, "maskgit_plus", 0.0, p.top_p, p.top_k)
        assert tokens[row] == proposal
        assert confidence[row] == expected.float()
        assert log_prob[row] == sure.float().log()


def test_both_presets_in_one_batch_keep_their_own_arithmetic() -> None:
    params = [DecodingParams(preset=preset, **s) for s in SETTINGS for preset in ("exact", "reference")]
    logits, uniform = random_logits(len(params), torch.bfloat16), torch.rand(len(params))
    together = propose(logits, rules(params), uniform)
    for row, p in enumerate(params):
        alone = propose(logits[row : row + 1], rules([p]), uniform[row : row + 1])
        assert [value[row].item() for value in together] == [value.item() for value in alone]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_evenly_spread_numbers_give_each_token_its_share(temperature: float) -> None:
    count = 10_000
    logits = random_logits(1)
    params = DecodingParams(temperature=temperature, top_k=6, policy="max_prob")
    uniform = (torch.arange(count) + 0.5) / count
    tokens, confidence, log_prob = propose(
        logits.expand(count, -1), rules([params])[torch.zeros(count).long()], uniform
    )
    logits[:, MASK] = -torch.inf
    kept = keep_top_k(logits / temperature, torch.tensor([[6]]), 6).softmax(-1)[0]  # (V,)
    assert (torch.bincount(tokens, minlength=VOCABULARY) - count * kept).abs().max() < 1.01
    torch.testing.assert_close(confidence, kept[tokens])
    torch.testing.assert_close(log_prob, kept[tokens].log())


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_extreme_numbers_give_possible_tokens(number: float) -> None:
    logits = torch.full((1, VOCABULARY), -50.0)
    logits[0, 4:7] = 1
    params = [DecodingParams(temperature=0.5, top_k=3)]
    token, _, _ = propose(logits, rules(params, 0, VOCABULARY - 1), torch.tensor([number]), proposable=10)
    assert token.item() == (4 if number == 0 else 6)


def test_a_temperature_close_to_0_is_0() -> None:
    logits = random_logits(4)
    cold = propose(logits, rules([DecodingParams(temperature=1e-300)] * 4), torch.full((4,), 0.999))
    assert cold[0].tolist() == propose(logits, rules([DecodingParams()] * 4), torch.zeros(4))[0].tolist()
    assert cold[1].isfinite().all()


def test_barred_and_unused_ids_are_never_proposed() -> None:
    logits = torch.arange(VOCABULARY).float().expand(50, -1)  # the later, the likelier
    params = [DecodingParams(temperature=5.0)] * 50
    uniform = torch.linspace(0, 0.9999, 50)
    tokens, _, _ = propose(logits, rules(params, 1, 6), uniform, proposable=8)
    assert set(tokens.tolist()) == {0, 2, 3, 4, 5, 7}
    reference = [p.replace(preset="reference") for p in params]
    tokens, _, _ = propose(logits, rules(reference), uniform, proposable=8)  # the release knows of no unused ids
    assert set(tokens.tolist()) >= {10, 11}
    assert MASK not in tokens


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.25, 0.15]])
    kept = {
        p: (keep_top_p(probabilities.log(), torch.tensor([[p]])).softmax(-1) > 0)[0].nonzero()[:, 0].tolist()
        for p in (0.01, 0.49, 0.51, 0.74, 0.76, 0.999)
    }
    assert kept == {0.01: [1], 0.49: [1], 0.51: [1, 2], 0.74: [1, 2], 0.76: [1, 2, 3], 0.999: [0, 1, 2, 3]}


def test_top_k_keeps_ties() -> None:
    kept = keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0], [1.0, 3.0, 2.0, 2.0]]), torch.tensor([[2], [1]]), 2)
    assert (kept > 0).tolist() == [[False, True, True, True], [False, True, False, False]]


def test_no_rows_are_no_trouble() -> None:
    for preset in ("exact", "reference"):
        params = DecodingParams(preset=preset, temperature=1, top_p=0.9, top_k=3)
        results = propose(random_logits(0), rules([params])[torch.zeros(0).long()], torch.zeros(0))
        assert [tuple(value.shape) for value in results] == [(0,)] * 3


def test_the_models_logits_are_left_as_they_were() -> None:
    logits = random_logits(3)
    before = logits.clone()
    propose(logits, rules([DecodingParams(temperature=0.5, top_p=0.9)] * 3), torch.zeros(3), proposable=5)
    assert torch.equal(logits, before)
