"""Projections in int8 and packed: near or equal to the weights they are made of, whatever else is in the batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffucoder.bench import bench
from diffucoder.decoding.generate import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import CheckpointError
from diffucoder.models import projections
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.projections import int8_projection, packable, packed_projection

MakeLM = Callable[..., Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_is_the_product_of_what_it_rounds(dtype: torch.dtype, biased: bool) -> None:
    weight, bias = normal(48, 32), normal(48, seed=1) if biased else None
    hidden = normal(2, 5, 32, seed=2).to(dtype)
    by_output = weight.abs().amax(1, keepdim=True) / 127
    by_row = hidden.float().abs().amax(-1, keepdim=True) / 127
    rounded = F.linear((hidden.float() / by_row).round() * by_row, (weight / by_output).round() * by_output, bias)
    given = int8_projection(weight, bias)(hidden)
    assert given.dtype == dtype
    torch.testing.assert_close(given, rounded.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_it_is_off_by_what_half_steps_can_do() -> None:
    weight, hidden = normal(64, 256), normal(9, 256, seed=1)
    exact = F.linear(hidden.double(), weight.double())
    off = (int8_projection(weight, None)(hidden) - exact).abs()
    steps = hidden.abs().amax(-1, keepdim=True) / 254, weight.abs().amax(1) / 254  # half of each
    most = steps[0] * weight.abs().sum(1) + hidden.abs().sum(1, keepdim=True) * steps[1] + 256 * steps[0] * steps[1]
    assert (off <= most).all()
    assert off.mean() < 0.01 * exact.abs().mean()


def test_a_row_has_the_same_result_alone_and_in_company() -> None:
    project, hidden = int8_projection(normal(40, 64), normal(40, seed=1)), normal(7, 64, seed=2)
    hidden[3] *= 1e4  # scales are of rows: its neighbours do not notice
    together = project(hidden)
    for row in range(7):
        assert torch.equal(project(hidden[row : row + 1])[0], together[row])


def test_a_row_of_zeros_gives_the_bias() -> None:
    bias = normal(8)
    assert torch.equal(int8_projection(normal(8, 16, seed=1), bias)(torch.zeros(2, 16)), bias.expand(2, 8))


def test_a_model_in_int8_scores_nearly_as_it_did(causal_lm: MakeLM) -> None:
    model = Denoiser.from_causal_lm(causal_lm("qwen2"), mask_id=66)
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        scores = model(ids)
        model.use_lean(int8=True)
        rounded = model(ids)
        model.bfloat16()  # what is cast is read anew, in int8 again
        cast = model(ids)
    assert not torch.equal(scores, rounded)
    assert (scores - rounded).std() < 0.1 * scores.std()
    assert model.compute_dtype == torch.int8
    assert (cast - rounded).std() < 0.1 * scores.std()
    for name, tensor in model.state_dict().items():  # training and saving go by the weights as they were
        assert torch.equal(tensor, before[name].bfloat16()), name


def test_the_shipped_model_writes_in_int8_what_it_writes_in_bfloat16() -> None:
    request = "Write a function keep(nums) that keeps only the even numbers."
    params = DecodingParams(new_tokens=32)
    by = {dtype: DiffuCoder.load(dtype=dtype) for dtype in (torch.bfloat16, torch.int8)}
    answers = {dtype: coder.generate(request, params).text for dtype, coder in by.items()}
    assert answers[torch.int8] == answers[torch.bfloat16]
    assert bench(by[torch.int8].model, repeats=1).dtype == "int8"


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("biased", [True, False])
def test_packed_weights_are_the_same_weights(biased: bool) -> None:
    weight, bias = normal(48, 32).bfloat16(), normal(48, seed=1).bfloat16() if biased else None
    project = packed_projection(weight, bias)
    for rows in (0, 1, 7, 300):
        hidden = normal(2, rows, 32, seed=rows).bfloat16()
        plain = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
        assert project(hidden).dtype == torch.bfloat16
        torch.testing.assert_close(project(hidden).float(), plain, rtol=2**-7, atol=1e-5)  # one rounding


def test_only_small_models_in_bfloat16_on_a_cpu_are_packed(causal_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not packable(causal_lm("qwen2"))
    assert packable(causal_lm("qwen2").bfloat16()) is torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not packable(causal_lm("qwen2").bfloat16().to("meta"))
    monkeypatch.setattr(projections, "_MOST_PACKED", 1000)
    assert not packable(causal_lm("qwen2").bfloat16())


@torch.no_grad()
def test_a_packed_model_scores_as_it_did_and_is_packed_anew_when_cast(causal_lm: MakeLM) -> None:
    model = Denoiser.from_causal_lm(causal_lm("qwen2"), mask_id=66)
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    scores = model(ids)
    model.use_lean(packed=True)
    torch.testing.assert_close(model(ids), scores, rtol=0, atol=1e-5)  # nothing to pack
    packed = model.bfloat16()(ids)
    model.use_lean()
    rounding = (model(ids) - scores).std()  # of bfloat16 itself
    assert rounding < 0.03 * scores.std()
    assert (packed - scores).std() < 1.5 * rounding


def test_layers_that_are_not_plain_are_refused(causal_lm: MakeLM) -> None:
    model = Denoiser.from_causal_lm(causal_lm("qwen2", hidden_act="gelu"), mask_id=66)
    with pytest.raises(CheckpointError, match="cannot be decoded in int8, plain layers on a CPU can; use bfloat16"):
        model.use_lean(int8=True)
