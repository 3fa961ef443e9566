"""Oracle 1 (parity with Dream's released code and plain Qwen2), and the laws of `Denoiser.forward`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffucoder.errors import CheckpointError
from diffucoder.models.attention import Attention, block_causal_mask
from diffucoder.models.checkpoint import load_denoiser
from diffucoder.models.denoiser import Denoiser, set_causal

MakeLM = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(*lengths: int) -> Tensor:
    """`valid` (B, T) for rows of these lengths."""
    longest = max(lengths)
    return torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]


# ---- oracle 1 ----


@pytest.fixture(scope="module")
def dream(shared: Path) -> tuple[Denoiser, dict[str, Tensor]]:
    folder = shared / "parity" / "dream-tiny"
    return load_denoiser(folder, dtype=torch.float32, device="cpu"), load_file(folder / "cases.safetensors")


def test_logits_equal_the_release_shifted_by_one(dream: tuple[Denoiser, dict[str, Tensor]]) -> None:
    denoiser, cases = dream
    logits, raw = denoiser(cases["logits.input_ids"].long()), cases["logits.output"]
    torch.testing.assert_close(logits[:, 1:], raw[:, :-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[:, 0], raw[:, 0], rtol=0, atol=1e-5)


def test_padded_logits_equal_the_release_shifted_by_one(dream: tuple[Denoiser, dict[str, Tensor]]) -> None:
    denoiser, cases = dream
    valid, raw = cases["padded.attention_mask"].bool(), cases["padded.output"]
    logits = denoiser(cases["padded.input_ids"].long(), valid=valid)
    predicted = valid[:, 1:] & valid[:, :-1]  # positions whose left neighbour is real
    assert predicted.any()
    assert not predicted.all()
    torch.testing.assert_close(logits[:, 1:][predicted], raw[:, :-1][predicted], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_attending_left_only_is_the_autoregressive_parent(causal_lm: MakeLM, kind: str) -> None:
    tokens = random_tokens(2, 9)
    plain = causal_lm(kind)(input_ids=tokens).logits
    denoiser = Denoiser.from_causal_lm(causal_lm(kind), mask_id=66)
    triangle = torch.ones(9, 9, dtype=torch.bool).tril()
    assert (denoiser(tokens)[:, 1:] - plain[:, :-1]).abs().max() > 0.1  # it did become bidirectional
    torch.testing.assert_close(denoiser(tokens, attention=triangle)[:, 1:], plain[:, :-1], rtol=0, atol=1e-5)
    set_causal(denoiser.model, True)
    torch.testing.assert_close(denoiser(tokens)[:, 1:], plain[:, :-1], rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention", "sdpa"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_padding_is_not_seen_whatever_attention_a_model_was_loaded_with(
    causal_lm: MakeLM, kind: str, implementation: str
) -> None:
    model = causal_lm(kind)
    model.config._attn_implementation = implementation
    denoiser = Denoiser.from_causal_lm(model, mask_id=66)
    tokens, valid = random_tokens(1, 9), left_padded(9, 6)[1:]
    alone = denoiser(tokens[:, 3:])
    torch.testing.assert_close(denoiser(tokens, valid=valid)[:, 4:], alone[:, 1:], rtol=0, atol=1e-5)
    own = Denoiser.from_causal_lm(causal_lm(kind), mask_id=66)
    assert torch.equal(denoiser(tokens), own(tokens))


def test_attention_may_differ_by_row(tiny: Denoiser) -> None:
    tokens = random_tokens(2, 7)
    full, triangle = torch.ones(7, 7, dtype=torch.bool), torch.ones(7, 7, dtype=torch.bool).tril()
    both = tiny(tokens, attention=torch.stack([full, triangle]))
    torch.testing.assert_close(both[0], tiny(tokens)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(both[1], tiny(tokens, attention=triangle)[1], rtol=0, atol=1e-5)


# ---- padding ----


def test_a_padded_batch_equals_its_rows_alone(tiny: Denoiser) -> None:
    lengths = (4, 11, 7)
    tokens, valid = random_tokens(3, 11), left_padded(*lengths)
    batch = tiny(tokens, valid=valid)
    for row, length in enumerate(lengths):
        alone = tiny(tokens[row : row + 1, -length:])
        torch.testing.assert_close(batch[row, -length:], alone[0], rtol=0, atol=1e-5)


def test_a_padded_causal_batch_equals_its_rows_alone(tiny: Denoiser) -> None:
    tokens, valid = random_tokens(2, 9), left_padded(5, 9)
    triangle = torch.ones(9, 9, dtype=torch.bool).tril()
    batch = tiny(tokens, valid=valid, attention=triangle)
    alone = tiny(tokens[:1, -5:], attention=triangle[:5, :5])
    torch.testing.assert_close(batch[0, -5:], alone[0], rtol=0, atol=1e-5)


def test_what_stands_in_padding_changes_nothing(tiny: Denoiser) -> None:
    tokens, valid = random_tokens(2, 8), left_padded(3, 8)
    other = torch.where(valid, tokens, random_tokens(2, 8, seed=1))
    assert torch.equal(tiny(tokens, valid=valid)[valid], tiny(other, valid=valid)[valid])


def test_all_valid_is_no_mask(tiny: Denoiser) -> None:
    tokens = random_tokens(2, 8)
    assert torch.equal(tiny(tokens, valid=torch.ones(2, 8, dtype=torch.bool)), tiny(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_padding_gives_no_nan(tiny: Denoiser, dtype: torch.dtype) -> None:
    tokens, valid = random_tokens(3, 6), left_padded(6, 0, 2)
    logits = tiny.to(dtype)(tokens, valid=valid)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_gradients_through_padding_are_finite(tiny: Denoiser) -> None:
    with torch.enable_grad():
        tiny(random_tokens(3, 6), valid=left_padded(6, 0, 2)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tiny.parameters())


# ---- block-causal attention ----


@pytest.mark.parametrize("block", [1, 3, 4, 99])
def test_a_block_causal_mask_allows_what_its_definition_says(block: int) -> None:
    origins = torch.tensor([0, 2, 9, 12])
    mask = block_causal_mask(12, block, origins)
    for row, origin in enumerate(origins.tolist()):
        for query in range(12):
            end = origin + ((query - origin) // block + 1) * block if query >= origin else origin  # of its block
            assert mask[row, query].tolist() == [key < end for key in range(12)]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("shifted", [True, False])
def test_a_later_block_changes_no_logit_of_an_earlier_one(causal_lm: MakeLM, kind: str, shifted: bool) -> None:
    denoiser = Denoiser.from_causal_lm(causal_lm(kind), mask_id=66, shifted=shifted, attention=Attention(4))
    tokens = random_tokens(2, 14)
    other = torch.cat([tokens[:, :8], random_tokens(2, 6, seed=1)], 1)
    before, after = denoiser(tokens), denoiser(other)
    unchanged = 9 if shifted else 8  # the state of the last position of a block scores the next block's first token
    assert torch.equal(before[:, :unchanged], after[:, :unchanged])
    within = torch.cat([tokens[:, :7], other[:, -1:], tokens[:, 8:]], 1)
    assert not torch.equal(denoiser(within)[:, 4:7], before[:, 4:7])


@pytest.mark.parametrize("origin", ["start", "prompt"])
def test_blocks_of_a_padded_batch_are_those_of_its_rows_alone(causal_lm: MakeLM, origin: Any) -> None:
    attention = Attention(4, origin)
    denoiser = Denoiser.from_causal_lm(causal_lm(), mask_id=66, attention=attention)
    lengths = (6, 13, 11)
    prompts = torch.tensor([3, 6, 0])
    tokens, valid = random_tokens(3, 13), left_padded(*lengths)
    padding = 13 - torch.tensor(lengths)
    batch = denoiser(tokens, valid=valid, prompt_ends=padding + prompts)
    for row, length in enumerate(lengths):
        alone = denoiser(tokens[row : row + 1, -length:], prompt_ends=prompts[row : row + 1])
        torch.testing.assert_close(batch[row, -length:], alone[0], rtol=0, atol=1e-5)
    full = Denoiser.from_causal_lm(causal_lm(), mask_id=66)
    own = full(tokens, valid=valid, attention=block_causal_mask(13, 4, attention.origins(valid, padding + prompts)))
    assert torch.equal(batch, own)


def test_a_prompt_before_the_blocks_sees_all_of_itself_and_no_answer(causal_lm: MakeLM) -> None:
    denoiser = Denoiser.from_causal_lm(causal_lm(), mask_id=66, attention=Attention(4, "prompt"))
    full = Denoiser.from_causal_lm(causal_lm(), mask_id=66)
    tokens = random_tokens(1, 17)
    ends = torch.tensor([9])
    torch.testing.assert_close(denoiser(tokens, prompt_ends=ends)[:, :9], full(tokens[:, :9]), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        denoiser(tokens[:, :13], prompt_ends=ends)[:, 9:],
        denoiser(tokens, prompt_ends=ends)[:, 9:13],
        rtol=0,
        atol=1e-5,
    )


def test_a_causal_model_has_no_blocks(causal_lm: MakeLM) -> None:
    tokens = random_tokens(2, 9)
    denoiser = Denoiser.from_causal_lm(causal_lm(), mask_id=66, attention=Attention(4))
    set_causal(denoiser.model, True)
    assert torch.equal(denoiser(tokens)[:, 1:], causal_lm()(input_ids=tokens).logits[:, :-1])


# ---- rows and reduce ----


def test_rows_are_rows_of_the_whole(tiny: Denoiser) -> None:
    tokens, valid = random_tokens(3, 10), left_padded(10, 4, 6)
    rows = torch.tensor([[0, 0], [2, 4], [1, 6], [1, 7], [0, 9], [0, 9]])
    whole = tiny(tokens, valid=valid)
    torch.testing.assert_close(tiny(tokens, valid=valid, rows=rows), whole[rows[:, 0], rows[:, 1]], rtol=0, atol=1e-5)


def test_no_rows_give_no_logits(tiny: Denoiser) -> None:
    none = torch.empty(0, 2, dtype=torch.long)
    assert tiny(random_tokens(2, 5), rows=none).shape == (0, 67)
    assert tiny(random_tokens(2, 5), rows=none, reduce=lambda logits, _: logits.argmax(-1)).shape == (0,)


def best_two(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
    assert len(logits) <= 3
    return logits.argmax(-1), logits.topk(2).values, torch.arange(chunk.start, chunk.stop)


def test_reduce_in_chunks_equals_reducing_the_whole(tiny: Denoiser) -> None:
    tokens = random_tokens(2, 10)
    logits = tiny(tokens)
    tiny.chunk_elements = 3 * tiny.vocab_size
    best, top, index = tiny(tokens, reduce=best_two)
    assert torch.equal(best, logits.argmax(-1))
    torch.testing.assert_close(top, logits.topk(2).values, rtol=0, atol=1e-5)
    assert torch.equal(index, torch.arange(20).view(2, 10))
    rows = torch.tensor([[1, 3], [0, 2], [0, 8], [1, 1]])
    best, top, index = tiny(tokens, rows=rows, reduce=best_two)
    assert torch.equal(best, logits[rows[:, 0], rows[:, 1]].argmax(-1))
    assert index.tolist() == [0, 1, 2, 3]


def test_chunked_loss_has_the_gradients_of_the_whole_loss(tiny: Denoiser) -> None:
    tokens, targets = random_tokens(2, 10), random_tokens(2, 10, seed=1).flatten()

    def loss(logits: Tensor, chunk: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, targets[chunk], reduction="none")

    def gradients(elements: int) -> list[Tensor]:
        tiny.zero_grad()
        tiny.chunk_elements = elements
        with torch.enable_grad():
            tiny(tokens, reduce=loss).mean().backward()
        return [parameter.grad.clone() for parameter in tiny.parameters()]

    for chunked, whole in zip(gradients(3 * 67), gradients(10**6), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)


def test_chunked_training_keeps_no_logits(tiny: Denoiser) -> None:
    kept: list[torch.Size] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    def kept_with(elements: int) -> list[torch.Size]:
        kept.clear()
        tiny.chunk_elements = elements
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            tiny(random_tokens(2, 10), reduce=lambda logits, _: logits.logsumexp(-1))
        return kept

    assert (20, 67) in kept_with(10**6)
    assert not {(20, 67), (3, 67)} & {tuple(shape) for shape in kept_with(3 * 67)}


# ---- making one ----


def test_unshifted_rows_score_themselves(causal_lm: MakeLM) -> None:
    shifted = Denoiser.from_causal_lm(causal_lm(), mask_id=66)
    plain = Denoiser.from_causal_lm(causal_lm(), mask_id=66, shifted=False)
    tokens = random_tokens(2, 8)
    assert torch.equal(shifted(tokens)[:, 1:], plain(tokens)[:, :-1])
    rows = torch.tensor([[1, 5]])
    torch.testing.assert_close(plain(tokens, rows=rows)[0], plain(tokens)[1, 5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_mask_without_a_row_gets_the_mean_row(causal_lm: MakeLM, tied: bool) -> None:
    model = causal_lm(tie_word_embeddings=tied)
    before = model.get_input_embeddings().weight.clone()
    denoiser = Denoiser.from_causal_lm(model, mask_id=69)
    after = denoiser.model.get_input_embeddings().weight
    assert denoiser.vocab_size == denoiser.config.vocab_size == 70
    assert torch.equal(after[:67], before)
    torch.testing.assert_close(after[69], before.mean(0))
    assert denoiser(torch.full((1, 4), 69)).shape == (1, 4, 70)


def test_a_spare_row_is_used_as_it_is(causal_lm: MakeLM) -> None:
    model = causal_lm()
    before = model.get_input_embeddings().weight.clone()
    denoiser = Denoiser.from_causal_lm(model, mask_id=66)
    assert torch.equal(denoiser.model.get_input_embeddings().weight, before)


def test_it_knows_its_sizes_and_ids(causal_lm: MakeLM) -> None:
    denoiser = Denoiser.from_causal_lm(causal_lm(), mask_id=66)
    assert (denoiser.vocab_size, denoiser.max_length, denoiser.mask_id) == (67, 128, 66)
    assert (denoiser.device, denoiser.dtype) == (torch.device("cpu"), torch.float32)
    assert denoiser.to(torch.bfloat16).dtype == torch.bfloat16


def test_an_unknown_architecture_is_refused(causal_lm: MakeLM) -> None:
    with pytest.raises(CheckpointError, match="'gpt2' cannot be made bidirectional here; use one of qwen2"):
        Denoiser.from_causal_lm(causal_lm("gpt2", n_embd=32, n_head=4, n_layer=1), mask_id=66)


def test_sliding_windows_are_refused(causal_lm: MakeLM) -> None:
    model = causal_lm(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(CheckpointError, match="sliding_attention layers cannot see a canvas"):
        Denoiser.from_causal_lm(model, mask_id=66)


def test_the_embedding_of_a_pad_is_learnt(tiny: Denoiser) -> None:
    with torch.enable_grad():
        tiny(torch.tensor([[5, 6, 1, 1]])).sum().backward()  # 1 pads
    assert tiny.model.get_input_embeddings().weight.grad[1].abs().sum() > 0
