"""Constraints and verifiers: the hooks of a decoding step, by small ones written here."""

import torch
from scripted import MASK, PAD, VOCABULARY, Scripted, canvas, rugged, sure_of
from torch import Tensor

from diffucoder.decoding.constraints import Decision
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.sequence import Proposals, Sequence
from diffucoder.decoding.step import decode


class AllowedIds:
    """Commits the likeliest allowed candidate in place of an id that is not allowed; postpones it if there is none."""

    takes_back = False

    def __init__(self, *ids: int) -> None:
        self.ids = torch.tensor(ids)

    def candidates(self, sequence: Sequence) -> int:
        return VOCABULARY  # so that one of them is always allowed

    def limits(self, sequence: Sequence) -> None:
        pass

    def move(self, places: Tensor) -> None:
        raise AssertionError("no row is resized")

    def problem(self, sequence: Sequence) -> str:
        return ""

    def allow(self, sequence: Sequence, proposals: Proposals, decision: Decision) -> Decision:
        allowed = torch.isin(proposals.candidates, self.ids)  # (T, k)
        best = allowed.int().argmax(-1, keepdim=True)  # (T, 1)
        possible = allowed.any(-1)
        committed = decision.committed & possible
        if not committed.any():  # a step commits something
            committed = proposals.open & possible
        return Decision(
            committed,
            tokens=proposals.candidates.gather(-1, best)[:, 0],
            log_prob=proposals.candidate_log_probs.gather(-1, best)[:, 0],
        )


def finish(model: Scripted, *sequences: Sequence) -> None:
    for _ in decode(model, sequences):  # type: ignore[arg-type]
        pass


def test_a_constraint_replaces_and_postpones_what_is_not_allowed() -> None:
    start = canvas([1, 2], new_tokens=8)
    free, bound = (
        Sequence(start, DecodingParams(), constraint=constraint) for constraint in (None, AllowedIds(0, 2, 3, 5, 7))
    )
    finish(Scripted(rugged), free, bound)
    assert not set(free.tokens[2:].tolist()) <= {0, 2, 3, 5, 7}
    assert set(bound.tokens[2:].tolist()) <= {0, 2, 3, 5, 7}
    assert all(step >= 0 for step in bound.trace().steps)


def test_a_constraint_of_one_sequence_changes_nothing_for_others_and_log_probs_are_of_what_was_committed() -> None:
    start = canvas([1, 2], new_tokens=6)
    alone = Sequence(start, DecodingParams())
    finish(Scripted(rugged), alone)
    free, bound = Sequence(start, DecodingParams()), Sequence(start, DecodingParams(), constraint=AllowedIds(5))
    finish(Scripted(rugged), free, bound)
    assert free.trace() == alone.trace()
    assert bound.tokens[2:].tolist() == [5] * 6
    assert min(bound.trace().log_probs) < min(free.trace().log_probs)


class SecondThoughts:
    """Takes back the first token it sees committed at a place, once."""

    def __init__(self, place: int) -> None:
        self.place, self.done = place, False

    def verify(self, sequence: Sequence) -> Tensor:
        return sequence.holes

    def revoke(self, sequence: Sequence, proposals: Proposals, decision: Decision) -> Tensor:
        revoked = torch.zeros_like(sequence.holes)
        if not self.done and proposals.verified[self.place] and int(decision.committed.sum()) > 0:
            revoked[self.place] = self.done = True
        return revoked


def test_a_verifier_sees_committed_tokens_scored_again_and_takes_them_back() -> None:
    left_to_right = Scripted(sure_of(lambda place: place))
    sequence = Sequence(canvas([1, 1], new_tokens=4), DecodingParams(steps=4))
    sequence.verifier = SecondThoughts(2)
    finish(left_to_right, sequence)
    assert MASK not in sequence.tokens
    assert sequence.trace().revoked == [[0, 2, 0, 1]]  # the first hole's token 2, of step 0, revoked by step 1
    assert sequence.trace().steps[0] > 1


def test_a_row_ends_at_what_comes_in_place_of_a_revoked_token() -> None:
    """Until once saw position 3; then another token comes there, and nothing after it is known yet."""
    order = torch.tensor([0, 0, 0, 1, 5, 2, 3, 4])  # of positions 2 to 7: 2, 3, 5, 6, 7, 4

    def score(tokens: Tensor, place: Tensor) -> Tensor:
        changed = (place == 3) & (tokens[:, 5] != MASK)[:, None]
        token = torch.where(changed, 10, place)
        return torch.nn.functional.one_hot(token, VOCABULARY) * (8 - 0.05 * order[place])[..., None]

    seen: list[list[int]] = []

    def until(settled: Tensor) -> bool:
        seen.append(settled.tolist())
        return 10 in settled

    sequence = Sequence(canvas([1, 1], new_tokens=6), DecodingParams(policy="max_prob"), until=until)
    sequence.verifier = SecondThoughts(3)
    finish(Scripted(score), sequence)
    assert seen == [[2], [2, 3], [2, 10]]
    assert (sequence.finish_reason, sequence.forward_passes) == ("stop", 4)
    assert sequence.tokens.tolist() == [1, 1, 2, 10, PAD, 5, 6, PAD]
