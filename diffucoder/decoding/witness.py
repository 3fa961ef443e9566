"""Witness: decode so that the finished text keeps a rule, such as that Python can parse it, in any order.

The witness is a completion of the canvas that is known to keep the rule: committed tokens, and a token for every mask.
Once there is one, a step commits only what leaves one, so the finished text keeps the rule. The idea is LAVE's
(arXiv 2602.00612). A `Checker` judges the text, so tokens that split words and indentation need no grammar.

1. The proposals of the step are tried first: committed tokens, and the best proposal at every mask. Then what is
   chosen, with the witness at the other masks. If that breaks the rule, only the surest half is tried, and so on. If
   even the surest token breaks it, a token of the witness is committed.
2. While there is no witness every choice is committed, as without a rule. Now and then one is searched for among the
   next-best candidates near the flaw.
3. A text that is finished without a witness has its flawed lines masked again. After `MOST_RETREATS` of these all
   tokens are replaced by a plain completion (`scaffold`). If there is none, `problem` names the flaw.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffucoder.decoding.checkers import Checker, Flaw
from diffucoder.decoding.constraints import Decision
from diffucoder.decoding.document import Document
from diffucoder.decoding.scaffold import scaffold

if TYPE_CHECKING:
    from diffucoder.decoding.sequence import Proposals, Sequence

CANDIDATES = 8  # ids of each position that a search chooses from
NEAR = 8  # positions near a flaw that a search changes
MOST_TRIALS = 16  # texts that a search judges before it follows the best of them
MOST_RETREATS = 3
MARGIN = 16  # positions after an incomplete text that are masked again, too
NOT_SCORED = -30.0  # nats: the log-probability of a token that no pass proposed


class Completion(NamedTuple):
    """A token for each position of a row."""

    tokens: Tensor  # (T,) ids; the mask's where nothing was proposed yet
    log_prob: Tensor  # (T,) when it was proposed

    def replaced(self, where: Tensor, tokens: Tensor, log_prob: Tensor) -> "Completion":
        """These with other tokens `where` (T,) is True."""
        return Completion(tokens.where(where, self.tokens), log_prob.where(where, self.log_prob))


class Witness:
    """The constraint that the text of a sequence keeps the rule of a checker."""

    def __init__(self, document: Document, checker: Checker) -> None:
        self.document = document
        self.checker = checker
        self._witness: Completion | None = None
        self._guess: Completion | None = None  # the latest proposals
        self._search_at = 0  # number of masks at which the proposals are searched next
        self._retreats = 0
        self._is_hopeless = False  # whether the text before the first hole already breaks the rule

    @property
    def takes_back(self) -> bool:
        """Whether committed tokens may be masked again: only while no whole witness is known."""
        return not self._is_hopeless and (self._witness is None or self._has_gaps(self._witness))

    def candidates(self, sequence: "Sequence") -> int:
        """Return the number of most probable ids of each position that the next pass should give."""
        if self._witness is None and self._may_search(sequence):
            return CANDIDATES
        return 0

    def limits(self, sequence: "Sequence") -> None:
        """No id is ruled out before it is tried."""

    def move(self, places: Tensor) -> None:
        """Follow a sequence that was resized: each of its positions was at `places` (T',) before."""
        self.document = self.document.moved(places)
        self._witness = self._guess = None

    def problem(self, sequence: "Sequence") -> str:
        """Why the text of `sequence` does not keep the rule; empty if it does."""
        return self.document.problem(sequence.tokens, self.checker)

    def allow(self, sequence: "Sequence", proposals: "Proposals", decision: Decision) -> Decision:
        """Return the part of `decision` that leaves a witness, or other commitments in its place."""
        if self._guess is None:
            self._is_hopeless = self._flaw(sequence.tokens) is not None
        guess = self._next_guess(sequence, proposals)
        if self._is_hopeless:
            return decision
        is_known = self._witness is not None and torch.equal(guess.tokens, self._witness.tokens)
        if is_known or self._keeps(guess):
            self._witness = guess
            return decision
        if self._witness is not None and self._has_gaps(self._witness):
            gaps = self._witness.tokens == self.document.mask_id
            self._witness = self._witness.replaced(gaps, *guess)
            if not self._keeps(self._witness):  # what was proposed since does not go with it
                self._witness = None
        if self._witness is not None:
            return self._reduced(self._witness, sequence, proposals, decision)
        if self._may_search(sequence):
            self._search_at = int(sequence.masked.sum()) // 2
            self._witness = self._search(guess, proposals)
            if self._witness is not None:
                return Decision(decision.committed, *self._witness)
        finished = decision.tokens.where(decision.committed, sequence.tokens)
        if self._is_over(sequence, finished) and self._flaw(finished) is not None:
            return self._retreat(sequence, decision, finished)
        return decision

    def _next_guess(self, sequence: "Sequence", proposals: "Proposals") -> Completion:
        before = self._guess
        if before is None:
            before = Completion(sequence.tokens, torch.full(sequence.tokens.shape, NOT_SCORED))
            self._search_at = int(sequence.masked.sum()) // 2
        tokens = proposals.tokens.where(proposals.open | ~sequence.masked, before.tokens)
        self._guess = Completion(tokens, proposals.log_prob.where(proposals.open, before.log_prob))
        return self._guess

    def _may_search(self, sequence: "Sequence") -> bool:
        return int(sequence.masked.sum()) <= self._search_at

    def _has_gaps(self, completion: Completion) -> bool:
        return bool((completion.tokens == self.document.mask_id).any())

    def _is_over(self, sequence: "Sequence", tokens: Tensor) -> bool:
        """Whether `sequence` is finished once it has these `tokens` (T,)."""
        resize = sequence.canvas.resize
        if resize is not None and (tokens == resize.expand_id).any():
            return False
        _, whole = self.document.text(tokens)
        return whole

    def _keeps(self, completion: Completion) -> bool:
        return self._flaw(completion.tokens) is None

    def _flaw(self, tokens: Tensor) -> Flaw | None:
        return self.document.flaw(tokens, self.checker)

    def _reduced(
        self, witness: Completion, sequence: "Sequence", proposals: "Proposals", decision: Decision
    ) -> Decision:
        """Return the part of `decision` that leaves a witness, or one token of the witness."""
        committed = torch.zeros_like(decision.committed)
        chosen = decision.committed.nonzero()[:, 0]
        chosen = chosen[proposals.confidence[chosen].argsort(descending=True, stable=True)]
        while len(chosen):
            committed[:] = False
            committed[chosen] = True
            trial = witness.replaced(committed, decision.tokens, decision.log_prob)
            if self._keeps(trial):
                self._witness = trial
                return Decision(committed, decision.tokens, decision.log_prob)
            chosen = chosen[: len(chosen) // 2]
        # The surest of the positions at which the model now proposes what the witness has, else the surest of all
        agreed = proposals.open & (proposals.tokens == witness.tokens)
        possible = agreed if agreed.any() else decision.committed
        committed[:] = False
        committed[proposals.confidence.masked_fill(~possible, -torch.inf).argmax()] = True
        return Decision(committed, *witness)

    def _search(self, completion: Completion, proposals: "Proposals") -> Completion | None:
        """Exchange proposals near the flaw of `completion` for next-best candidates until it keeps the rule."""
        flaw = self._flaw(completion.tokens)
        while flaw is not None:
            best: Completion | None = None
            for trial in self._exchanges(completion, proposals, flaw):
                trial_flaw = self._flaw(trial.tokens)
                if trial_flaw is None:
                    return trial
                if trial_flaw.at > flaw.at:  # the furthest is nearest to the end
                    flaw, best = trial_flaw, trial
            if best is None:
                return None
            completion = best
        return completion

    def _exchanges(self, completion: Completion, proposals: "Proposals", flaw: Flaw) -> list[Completion]:
        """Completions with one other token near the flaw, the most probable ones first."""
        place = self.document.position(completion.tokens, flaw.at)
        positions = proposals.open.nonzero()[:, 0]
        positions = positions[(positions - place).abs().argsort(stable=True)][:NEAR]
        candidates = proposals.candidates[positions]  # (P, k)
        log_probs = proposals.candidate_log_probs[positions].masked_fill(
            candidates == completion.tokens[positions][:, None], -torch.inf
        )
        likeliest = log_probs.flatten().argsort(descending=True, stable=True)[:MOST_TRIALS]
        exchanges = []
        for option in likeliest[log_probs.flatten()[likeliest].isfinite()].tolist():
            row, column = divmod(option, candidates.shape[1])
            trial = Completion(completion.tokens.clone(), completion.log_prob.clone())
            trial.tokens[positions[row]] = candidates[row, column]
            trial.log_prob[positions[row]] = log_probs[row, column]
            exchanges.append(trial)
        return exchanges

    def _retreat(self, sequence: "Sequence", decision: Decision, finished: Tensor) -> Decision:
        """Mask the flawed lines of a `finished` text (T,) again. After some times, replace all tokens."""
        self._retreats += 1
        self._search_at = int(sequence.holes.sum())
        written = sequence.holes & ~sequence.masked
        if self._retreats > MOST_RETREATS:
            fill = scaffold(self.document, self.checker, sequence.tokens, sequence.holes)
            if fill is None:
                return decision
            plain = Completion(fill, torch.full(fill.shape, NOT_SCORED))
            self._witness = plain
            return Decision(sequence.holes, *plain, revoked=written)
        flawed = self._flawed(finished) & sequence.holes
        if not flawed.any():
            flawed = sequence.holes
        return Decision(decision.committed & ~flawed, decision.tokens, decision.log_prob, revoked=flawed & written)

    def _flawed(self, tokens: Tensor) -> Tensor:
        """(T,) bool: the line of the first flaw, and a line more on each side for each earlier retreat."""
        flaw = self._flaw(tokens)
        assert flaw is not None
        text, _ = self.document.text(tokens)
        begin = end = flaw.at
        for _ in range(self._retreats):
            begin = text.rfind("\n", 0, max(0, begin - 1)) + 1
            line_end = text.find("\n", end + 1)
            end = line_end if line_end >= 0 else len(text)
        first, last = (self.document.position(tokens, at) for at in (begin, end))
        flawed = torch.zeros_like(tokens, dtype=torch.bool)
        if end == len(text):
            last += MARGIN
        flawed[first : last + 1] = True
        return flawed
