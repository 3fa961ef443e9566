"""The objective over scripted rows: what is hidden, seen, scored and weighed. Oracles are transformers' own loss of the
autoregressive parent, and the cross-entropy of full logits."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffucoder.diffusion import keyed_generator
from diffucoder.models.denoiser import Denoiser
from diffucoder.training.masked import HELD_OUT, MaskedMicro, MaskedStage, Objective, Row

MASK, PAD, BATCH = 66, 1, 8
MakeLM = Callable[..., Any]


class ScriptedRows:
    """Random rows, each as long as its turn in `lengths` says; what stands before `clean` is never hidden."""

    def __init__(self, *lengths: int, clean: int = 0) -> None:
        self.lengths, self.clean = lengths, clean

    def width(self, step: int) -> int:
        return max(self.lengths)

    def row(self, step: int, index: int) -> Row:
        length = self.lengths[index % len(self.lengths)]
        tokens = torch.randint(2, 60, (length,), generator=keyed_generator(99, step, index))
        return Row(tokens, torch.arange(length) >= self.clean)


def stage_of(rows: ScriptedRows, held_out_rows: int = 0, **fields: Any) -> MaskedStage:
    """Over `rows`, which are its held-out rows too; `fields` are of `Objective`."""
    objective = Objective(**{"mask_id": MASK, "pad_id": PAD, "seed": 0, "batch": BATCH, **fields})
    return MaskedStage(objective, rows, rows if held_out_rows else None, held_out_rows)


def whole_step(stage: MaskedStage, step: int) -> MaskedMicro:
    (micro,) = stage.micro_batches(step, [range(stage.objective.batch)])
    return micro


def by_row(micro: MaskedMicro) -> dict[int, float]:
    """The time of every row that has something to score, as its weight tells under `length`."""
    return {int(row): 1 / float(weight) for row, weight in zip(micro.rows[:, 0], micro.weights, strict=True)}


def same(left: MaskedMicro, right: MaskedMicro) -> bool:
    tensors = (left.noisy, right.noisy), (left.rows, right.rows), (left.weights, right.weights)
    return left.count == right.count and all(torch.equal(ours, theirs) for ours, theirs in tensors)


def joined(micros: Sequence[MaskedMicro]) -> Tensor:
    return torch.cat([micro.noisy for micro in micros])


# --- what is hidden --------------------------------------------------------------------------------------------------


def test_what_is_hidden_is_the_mask_and_is_what_is_scored() -> None:
    rows = ScriptedRows(20, clean=5)
    micro = whole_step(stage_of(rows), 3)
    clean = torch.stack([rows.row(3, index).tokens for index in range(BATCH)])
    assert torch.equal((micro.noisy == MASK).nonzero(), micro.rows)
    assert torch.equal(clean[micro.noisy == MASK], micro.targets)
    assert torch.equal(micro.noisy[micro.noisy != MASK], clean[micro.noisy != MASK])
    assert int(micro.rows[:, 1].min()) >= 5
    assert micro.tokens == BATCH * 20


def test_position_zero_is_never_hidden_nor_counted() -> None:
    micro = whole_step(stage_of(ScriptedRows(20), eps=1 - 1e-6), 0)
    assert torch.equal(micro.noisy == MASK, (torch.arange(20) > 0).expand(BATCH, 20))
    assert micro.count == BATCH * 19


def test_a_model_that_scores_position_zero_has_it_hidden_too() -> None:
    micro = whole_step(stage_of(ScriptedRows(20), eps=1 - 1e-6, first_scorable=0), 0)
    assert (micro.noisy == MASK).all()
    assert micro.count == BATCH * 20


def test_times_have_one_row_in_every_slice_however_the_step_is_cut() -> None:
    rows = ScriptedRows(600)
    stage = stage_of(rows, batch=16, eps=1e-6, normaliser="length")
    micros = stage.micro_batches(0, [range(at, at + 2) for at in range(0, 16, 2)])
    times = [time for micro in micros for time in by_row(micro).values()]
    assert sorted(int(time * 16) for time in times) == list(range(16))


@pytest.mark.parametrize("size", [1, 3, 6])
def test_how_a_step_is_cut_changes_no_row(size: int) -> None:
    stage = stage_of(ScriptedRows(20, 15, 20), batch=12, anneal_steps=9)
    micros = stage.micro_batches(5, [range(at, at + size) for at in range(0, 12, size)])
    whole = whole_step(stage, 5)
    assert torch.equal(joined(micros), whole.noisy)
    assert torch.equal(torch.cat([micro.weights for micro in micros]), whole.weights)
    assert sum(micro.count for micro in micros) == whole.count
    assert all(torch.equal(micro.attention, whole.attention) for micro in micros)


def test_another_process_has_the_same_noise_for_its_rows() -> None:
    stage = stage_of(ScriptedRows(20))
    assert torch.equal(joined(stage.micro_batches(2, [range(4, 6)])), whole_step(stage, 2).noisy[4:6])


def test_noise_is_the_same_every_time_and_another_for_every_step_and_seed() -> None:
    stage = stage_of(ScriptedRows(20))
    assert same(whole_step(stage, 4), whole_step(stage_of(ScriptedRows(20)), 4))
    assert not same(whole_step(stage, 4), whole_step(stage, 5))
    assert not same(whole_step(stage, 4), whole_step(stage_of(ScriptedRows(20), seed=1), 4))


# --- what is seen ----------------------------------------------------------------------------------------------------


def test_rows_that_fill_their_width_need_no_mask() -> None:
    micro = whole_step(stage_of(ScriptedRows(20)), 0)
    assert micro.valid is None
    assert micro.attention is None


def test_short_rows_are_padded_out_of_sight() -> None:
    micro = whole_step(stage_of(ScriptedRows(20, 12), eps=0.9), 0)
    assert micro.valid is not None
    assert micro.valid.sum(1).tolist() == [20, 12] * (BATCH // 2)
    assert micro.noisy[~micro.valid].unique().tolist() == [PAD]
    assert int(micro.rows[micro.rows[:, 0] == 1, 1].max()) < 12


def test_a_short_row_costs_what_it_costs_alone(tiny: Denoiser) -> None:
    stage = stage_of(ScriptedRows(20, 12), normaliser="length")
    micro = stage.micro_batches(0, [range(1, 2)])[0]
    row, position = micro.rows.unbind(1)
    logits = tiny(micro.noisy[:, :12])[row, position]
    alone = (F.cross_entropy(logits, micro.targets, reduction="none") * micro.weights).sum()
    torch.testing.assert_close(stage.loss(tiny, micro).loss, alone, rtol=1e-5, atol=1e-5)


def test_attention_opens_step_by_step_and_is_full_from_the_last_step_of_annealing_on() -> None:
    length, stage = 200, stage_of(ScriptedRows(200), batch=1, anneal_steps=4)
    right = torch.ones(length, length, dtype=torch.bool).triu(1)
    for step, share in enumerate([0.25, 0.5, 0.75]):
        attention = whole_step(stage, step).attention
        assert attention is not None
        assert attention[~right].all()
        assert float(attention[right].float().mean()) == pytest.approx(share, abs=0.02)
    assert all(whole_step(stage, step).attention is None for step in (3, 4, 100))


def test_annealing_over_ten_thousand_steps_opens_one_key_in_ten_thousand_first() -> None:
    attention = whole_step(stage_of(ScriptedRows(1500), batch=1, anneal_steps=10_000), 0).attention
    assert attention is not None
    opened = int(attention.triu(1).sum())  # of a million keys: 112 are expected
    assert opened == pytest.approx(1e-4 * 1500 * 1499 / 2, abs=5 * 112**0.5)


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_an_autoregressive_stage_has_the_loss_of_transformers(causal_lm: MakeLM) -> None:
    rows = ScriptedRows(20)
    stage = stage_of(rows, autoregressive=True)
    micro = whole_step(stage, 0)
    tokens = torch.stack([rows.row(0, index).tokens for index in range(BATCH)])
    assert torch.equal(micro.noisy, tokens)
    plain, denoiser = causal_lm(), Denoiser.from_causal_lm(causal_lm(), mask_id=MASK)
    theirs = plain(input_ids=tokens, labels=tokens).loss
    ours = stage.loss(denoiser, micro).loss / micro.count
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    theirs.backward()
    ours.backward()
    for (name, left), right in zip(denoiser.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("normaliser", ["length", "masked", "masked_micro"])
@pytest.mark.parametrize("lengths", [(20,), (20, 13)])
def test_the_loss_is_that_of_full_logits(tiny: Denoiser, normaliser: str, lengths: tuple[int, ...]) -> None:
    tiny.chunk_elements = 67 * 7  # the logits are made in many pieces
    stage = stage_of(ScriptedRows(*lengths), normaliser=normaliser, anneal_steps=9)
    micro = whole_step(stage, 2)
    terms = stage.loss(tiny, micro)
    logits = tiny(micro.noisy, valid=micro.valid, attention=micro.attention)[micro.noisy == MASK]  # (M, V)
    cost = F.cross_entropy(logits, micro.targets, reduction="none").detach()
    torch.testing.assert_close(terms.loss.detach(), (cost * micro.weights).sum(), rtol=1e-5, atol=1e-5)
    total, scored = terms.figures["unweighted"]
    assert float(total) / scored == pytest.approx(float(cost.mean()), rel=1e-5)
    right, scored = terms.figures["accuracy"]
    assert (float(right), scored) == (float((logits.argmax(-1) == micro.targets).sum()), len(cost))


def test_rows_with_nothing_to_hide_cost_nothing_and_have_gradients(tiny: Denoiser) -> None:
    stage = stage_of(ScriptedRows(10, clean=10))
    micro = whole_step(stage, 0)
    terms = stage.loss(tiny, micro)
    terms.loss.backward()  # a process whose rows are all clean still takes part in the step
    assert (float(terms.loss.detach()), micro.count, terms.figures["accuracy"][1]) == (0, 0, 0)


# --- held out --------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_noised_alike_every_time_whatever_the_step_was() -> None:
    stage = stage_of(ScriptedRows(20), held_out_rows=16, anneal_steps=1000)
    first = stage.micro_batches(HELD_OUT, [range(0, 8), range(8, 16)])
    whole_step(stage, 7)
    assert all(map(same, stage.micro_batches(HELD_OUT, [range(0, 8), range(8, 16)]), first))
    assert torch.equal(joined(stage.micro_batches(HELD_OUT, [range(at, at + 1) for at in range(16)])), joined(first))


def test_held_out_rows_see_everything_and_are_measured_per_token() -> None:
    objective = {"normaliser": "masked_micro", "anneal_steps": 1000, "time": "uniform"}
    (micro,) = stage_of(ScriptedRows(20, clean=4), held_out_rows=8, **objective).micro_batches(HELD_OUT, [range(8)])
    assert micro.attention is None
    assert micro.count == 8 * 16
    assert all(0 < time <= 1 for time in by_row(micro).values())


def test_held_out_rows_come_in_whole_steps() -> None:
    assert [stage_of(ScriptedRows(9), held_out_rows=rows).held_out_rows for rows in (1, 8, 9)] == [8, 8, 16]


def test_without_held_out_rows_there_is_nothing_to_measure() -> None:
    assert stage_of(ScriptedRows(9)).held_out_rows == 0
