"""The kernels of a training step: bfloat16 within its rounding of the truth, and torch left as it was found."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffucoder.training.trainer import training_kernels

CPU = torch.device("cpu")


def attended(dtype: torch.dtype, mask: Tensor | None) -> list[Tensor]:
    """The output and the gradients of query, key and value, in float64; the same numbers for every `dtype`."""
    draws = torch.randn(4, 2, 4, 48, 16, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype)
    query, key, value = (draws[at].clone().requires_grad_() for at in range(3))
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return [out.double(), *(grad.double() for grad in torch.autograd.grad(out, (query, key, value), draws[3]))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "within"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_a_step_attends_as_float64_does(dtype: torch.dtype, within: float, masked: bool) -> None:
    mask = torch.ones(48, 48, dtype=torch.bool).tril() if masked else None
    truth = attended(torch.float64, mask)
    with training_kernels(CPU, bf16=dtype == torch.bfloat16):
        found = attended(dtype, mask)
    for ours, exact in zip(found, truth, strict=True):
        assert (ours - exact).norm() < within * exact.norm()


def test_torch_is_left_as_it_was_found() -> None:
    def state() -> tuple[bool, bool]:
        backends = torch.backends.cuda
        return backends.fp16_bf16_reduction_math_sdp_allowed(), backends.flash_sdp_enabled()

    before = state()
    with training_kernels(CPU, bf16=True):
        assert state() == (True, False)
    assert state() == before
