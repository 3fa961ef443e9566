"""Constraints and verifiers: the two hooks of a decoding step after order and rule have chosen.

A constraint may veto or replace commitments; it is given to its `Sequence`. A verifier may mask earlier ones again; it
follows from the settings (`verifier_of`). Both see one sequence at a time.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.policies import highest

if TYPE_CHECKING:
    from diffucoder.decoding.sequence import Proposals, Sequence


@dataclass(frozen=True, eq=False)
class Decision:
    """The commitments of a step to a sequence."""

    committed: Tensor  # (T,) bool
    tokens: Tensor  # (T,) ids, read where committed
    log_prob: Tensor  # (T,) of those tokens
    revoked: Tensor | None = None  # (T,) bool: earlier commitments to mask again before these are made


class IdLimits(NamedTuple):
    """The ids that the open positions of a sequence may have."""

    which: Tensor  # (T,) the row of `masks` for each position; -1: no limit
    masks: Tensor  # (K, V) bool


class Constraint(Protocol):
    """Decides whether the chosen tokens may be committed. It must let decoding come to an end."""

    @property
    def takes_back(self) -> bool:
        """Whether it may mask committed tokens again."""

    def candidates(self, sequence: "Sequence") -> int:
        """Return the number of most probable ids of each position that it wants of the next pass."""

    def limits(self, sequence: "Sequence") -> IdLimits | None:
        """Return the ids that open positions may propose in the next pass; None: all of them."""

    def move(self, places: Tensor) -> None:
        """Note that the sequence was resized: each of its positions was at `places` (T',) before."""

    def problem(self, sequence: "Sequence") -> str:
        """Why the finished `sequence` does not keep the constraint; empty if it does."""

    def allow(self, sequence: "Sequence", proposals: "Proposals", decision: Decision) -> Decision:
        """Return the decision with vetoes and replacements, given the proposals of the sequence, (T,) each."""


class Verifier(Protocol):
    """Decides which earlier commitments are masked again."""

    def verify(self, sequence: "Sequence") -> Tensor:
        """Return (T,) bool: positions whose committed tokens are scored again, if the pass can score them."""

    def revoke(self, sequence: "Sequence", proposals: "Proposals", decision: Decision) -> Tensor:
        """Return (T,) bool: verified commitments to revoke, fewer than the step commits, so that decoding ends."""

    def move(self, places: Tensor) -> None:
        """Note that the sequence was resized: each of its positions was at `places` (T',) before."""


class LostProbability:
    """Revoke the tokens that lost most probability since they were scored last, at most `share` times the committed.

    The idea is Saber's (arXiv 2510.18165), but the rules differ (docs/decoding.md).
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._scored = torch.zeros(())  # then (T,): log-probability of each commitment when it was scored last

    def verify(self, sequence: "Sequence") -> Tensor:
        return sequence.holes

    def revoke(self, sequence: "Sequence", proposals: "Proposals", decision: Decision) -> Tensor:
        lost = (self._scored - proposals.log_prob).masked_fill(~proposals.verified, 0)
        most = torch.tensor([int(self.share * int(decision.committed.sum()))])
        revoked = highest(lost[None], lost[None] > 0, most)[0]
        scored = proposals.log_prob.where(proposals.verified, self._scored)
        self._scored = decision.log_prob.where(decision.committed, scored)
        return revoked

    def move(self, places: Tensor) -> None:
        self._scored = self._scored[places]


def verifier_of(params: DecodingParams) -> Verifier | None:
    """Return the verifier of `params`, if any."""
    return LostProbability(params.revoke) if params.revoke else None
