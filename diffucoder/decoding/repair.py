"""Repair: find the tokens of a program that are probably wrong, mask them, and fill them again until a judge accepts.

A repair is a few rounds. Each is one request of many rows, and each row is the text with one hole. The first round
masks every token alone: where the model prefers another token, the given one is a suspect. Later rounds replace the
suspects and their neighbours by holes of other lengths, the likeliest first.

Who decodes a request decides the caller: `DiffuCoder.repair` here, the server its engine. Not for: running programs,
which a judge does (`Judge`).
"""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.requests import Generation, JoinedRequest, Span
from diffucoder.decoding.sequence import Sequence as DecodingSequence
from diffucoder.errors import PromptError
from diffucoder.grading.grade import grade
from diffucoder.grading.reading import read_limited
from diffucoder.grading.sandbox import Sandbox
from diffucoder.grading.syntax import fault_of

if TYPE_CHECKING:
    from diffucoder.decoding.coder import DiffuCoder

ROWS = 32  # of a round
PASSES = 1024  # forward passes of a row that a repair may take
LONGEST = 6  # tokens that an edit removes or writes
SUSPECTS = 12  # tokens that are drawn at random, too
DRAWS = 8
AT_FAULT = 0.3  # added to how suspect tokens are on the line where the parser stops or a name is not defined


@dataclass(frozen=True, order=True)
class Judgement:
    """How good a text is. Judgements are compared by what is true of the text, then by how many tests it passes."""

    parses: bool
    passed_tests: int
    defined: bool  # every name that it looks up
    passed: bool = field(compare=False)  # nothing is known to be wrong, and the tests pass
    fault: str = field(compare=False, default="")  # what is wrong first
    line: int = field(compare=False, default=0)  # where, from 1; 0 if that is not known


class Judge:
    """Judges texts by Python's parser, by names that nothing defines, and by tests, which run in the sandbox."""

    def __init__(self, tests: Sequence[str] = (), sandbox: Sandbox | None = None) -> None:
        """Without `tests` no program runs. Without `sandbox`, each text has one of its own."""
        self.tests = list(tests)
        self.sandbox = sandbox

    def __call__(self, text: str) -> Judgement:
        line, fault, parses = read_limited(fault_of, text, otherwise=(0, "it takes too long to read", False))
        if not parses or not self.tests:
            return Judgement(parses, 0, not fault, not fault, fault, line)
        verdict = grade(text, self.tests, sandbox=self.sandbox)
        return Judgement(True, verdict.passed_tests, not fault, verdict.passed, fault or verdict.detail, line)


@dataclass(frozen=True)
class Repair:
    """The best text that was found; the given one if no other is better."""

    text: str
    changed: bool
    judgement: Judgement
    given: Judgement  # of the given text
    passes: int  # forward passes of a row, all rounds together

    def figures(self) -> dict[str, Any]:  # Any: JSON
        """What a program reads of it, besides the text."""
        return {
            "passed": self.judgement.passed,
            "passed_tests": self.judgement.passed_tests,
            "fault": self.given.fault,
            "line": self.given.line or None,
            "left": self.judgement.fault,
            "passes": self.passes,
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundRequest(JoinedRequest):
    """Several texts with holes, and the results of all of them."""

    @property
    def result_count(self) -> int:
        return sum(part.result_count for part in self.parts)

    def results(self, sequences: list[DecodingSequence], seconds: float) -> list[Generation]:
        """The results of all parts, in order."""
        return list(chain.from_iterable(self.results_of_parts(sequences, seconds)))


Rounds = Generator[RoundRequest, list[Generation], Repair]


def next_step(rounds: Rounds, results: list[Generation] | None = None) -> RoundRequest | Repair:
    """The next request of a repair, given the `results` of the one before, if there was one; the repair at its end."""
    try:
        return next(rounds) if results is None else rounds.send(results)
    except StopIteration as end:
        repair: Repair = end.value
        return repair


def repair_rounds(
    coder: "DiffuCoder",
    text: str,
    judge: Judge,
    params: DecodingParams,
    *,
    passes: int = PASSES,
    rows: int = ROWS,
) -> Rounds:
    """Yield the request of each round, take its results, and return the repair. Raises PromptError.

    It ends with the first text that the judge accepts, or before it would take more than `passes`. A round has at most
    `rows`.
    """
    params = params.replace(num_samples=1, stop=())
    search = _Search(coder, text, judge, params, left=passes, rows=rows)
    holes: Iterator[Span] | None = None
    for kept in (passes // 2, 0):  # the second half goes on from what was better in the first
        if search.best.passed:
            break
        search.kept = kept
        if holes is None or search.best_text != search.text:
            search.text = search.best_text
            holes = yield from search.probe()
        yield from search.fill(holes)
    return search.repair()


class _Search:
    """The best text so far, and what it took."""

    def __init__(
        self, coder: "DiffuCoder", text: str, judge: Judge, params: DecodingParams, *, left: int, rows: int
    ) -> None:
        self.coder = coder
        self.text = self.given_text = text  # to repair from now on, and from the beginning
        self.judge = judge
        self.params = params
        self.left = left  # passes
        self.kept = 0  # of them, for later
        self.rows = rows
        self.spent = 0
        self.given = self.best = judge(text)
        self.best_text = text
        self.seen = {text}

    def probe(self) -> Generator[RoundRequest, list[Generation], Iterator[Span]]:
        """Try one other token in each place, several where the model prefers another. Return what to try next."""
        tokens = _tokens_of(self.coder, self.text, self.left + self.spent)
        probes = yield from self.fill([Span(start, end, 1) for start, end in tokens])
        if len(probes) < len(tokens) or self.best.passed:
            return iter(())
        suspicion = suspicions(self.text, tokens, probes, self.judge(self.text).line)
        suspects = sorted(range(len(tokens)), key=lambda index: -suspicion[index])[:SUSPECTS]
        drawn = self.params.replace(temperature=self.params.temperature or 1.0, num_samples=min(DRAWS, self.rows))
        yield from self.fill([Span(*tokens[index], 1) for index in suspects], drawn)
        return edits(tokens, suspicion)

    def fill(
        self, holes: Iterable[Span], params: DecodingParams | None = None
    ) -> Generator[RoundRequest, list[Generation], list[Generation]]:
        """Fill each hole, and judge the texts, the likeliest first."""
        params = params or self.params
        remaining = iter(holes)
        results: list[Generation] = []
        while not self.best.passed and (batch := self._affordable(remaining, params.num_samples)):
            filled = yield round_of(self.coder, self.text, batch, params)
            self.spent += sum(result.forward_passes for result in filled)
            results += filled
            for result in sorted(filled, key=lambda result: -result.trace.mean_log_prob):
                if result.text not in self.seen and not self.best.passed:
                    self.seen.add(result.text)
                    judgement = self.judge(result.text)
                    if judgement > self.best:
                        self.best = judgement
                        self.best_text = result.text
        return results

    def _affordable(self, holes: Iterator[Span], samples: int) -> list[Span]:
        """The next holes, as many as fit into a round and into what is left of the passes."""
        batch = []
        for span in islice(holes, self.rows // samples):
            needed = (span.tokens or 1) * samples
            if needed > self.left - self.kept:
                break
            self.left -= needed
            batch.append(span)
        return batch

    def repair(self) -> Repair:
        return Repair(self.best_text, self.best_text != self.given_text, self.best, self.given, self.spent)


def round_of(coder: "DiffuCoder", text: str, spans: Sequence[Span], params: DecodingParams) -> RoundRequest:
    """The request that writes each of these spans again, alone."""
    parts = [coder.edit_request(text, [span], params) for span in spans]
    return RoundRequest(
        canvas=Canvas.stacked([part.canvas for part in parts]),
        params=params,
        tokenizer=coder.tokenizer,
        model_name=coder.name,
        remark=parts[0].remark,
        parts=parts,
    )


def _tokens_of(coder: "DiffuCoder", text: str, most: int) -> list[tuple[int, int]]:
    """The characters of each token, without the first one and lines of comments. PromptError for more than `most`."""
    ids = coder.tokenizer.encode(text)
    if len(ids) > most:
        raise PromptError(f"the text has {len(ids)} tokens, each takes a pass, and passes={most}; raise it")
    position = 0
    tokens = []
    for piece in coder.tokenizer.pieces(ids):
        start = position
        position += len(piece)
        line_start = text.rfind("\n", 0, start) + 1
        if start and piece and not text[line_start:position].lstrip().startswith("#"):
            tokens.append((start, position))
    if not tokens:
        raise PromptError("the text has no code to repair; give a program")
    return tokens


def suspicions(
    text: str, tokens: Sequence[tuple[int, int]], probes: Sequence[Generation], line: int = 0
) -> list[float]:
    """How sure the model is that each token is another one, from 0 to 1; more on the `line` at fault and above it."""
    scores = []
    for (start, end), probe in zip(tokens, probes, strict=True):
        probability = math.exp(probe.trace.mean_log_prob)
        score = 1 - probability if probe.pieces[0] == text[start:end] else probability
        if line - 1 <= text.count("\n", 0, start) + 1 <= line:
            score += AT_FAULT
        scores.append(score)
    return scores


def edits(tokens: Sequence[tuple[int, int]], suspicion: Sequence[float]) -> Iterator[Span]:
    """Yield holes in place of runs of tokens, those first that are short and among suspects."""
    ranked = []
    for first in range(len(tokens) + 1):
        for removed in range(min(LONGEST, len(tokens) - first) + 1):
            for written in range(max(1, removed - 3), removed + 4):
                if (removed, written) == (1, 1) or written > LONGEST:
                    continue
                near = suspicion[max(0, first - 1) : first + removed + 1]
                value = (max(near) + sum(near) / len(near)) / 2 - 0.08 * written - 0.04 * removed
                ranked.append((-value, first, removed, written))
    for _, first, removed, written in sorted(ranked):
        start = tokens[first][0] if first < len(tokens) else tokens[-1][1]
        end = tokens[first + removed - 1][1] if removed else start
        yield Span(start, end, written)
