"""Regular languages over characters and over tokens, and the constraint that each hole matches one.

A `Pattern` describes a language: `text`, `characters`, `sequence`, `either`, `repeated`. `automaton_of` makes its
deterministic automaton. `TokenAutomaton` follows whole tokens. `Patterns` is the constraint of a sequence: it limits
the proposals of each open position to ids that leave the hole a match, so each finished hole is one.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffucoder.decoding.constraints import Decision, IdLimits
from diffucoder.errors import PromptError
from diffucoder.tokenizer import Tokenizer

if TYPE_CHECKING:
    from diffucoder.decoding.sequence import Proposals, Sequence

LONGEST = 32  # characters of a token; no hole has a longer one
MOST_STATES = 256  # of an automaton: each has an entry for every token
MOST_NODES = 4096  # of a graph
MOST_MASKS = 64  # kept for each automaton

Bools = NDArray[np.bool_]
Ints = NDArray[np.int32]
States = NDArray[np.int16]


class Graph:
    """A nondeterministic automaton under construction: the edges of each state."""

    def __init__(self) -> None:
        self.edges: list[list[tuple[frozenset[str], bool, int]]] = []  # characters, whether all others, next state
        self.free: list[list[int]] = []  # next states that need no character

    def add(self) -> int:
        """Return a new state. PromptError if there are too many."""
        if len(self.free) >= MOST_NODES:
            raise PromptError(f"a value has a pattern of over {MOST_NODES} parts; shorten its lengths or lists")
        self.edges.append([])
        self.free.append([])
        return len(self.free) - 1

    def closure(self, states: Collection[int]) -> frozenset[int]:
        """The states that are reached from `states` without a character."""
        reached = set(states)
        pending = list(states)
        while pending:
            for state in self.free[pending.pop()]:
                if state not in reached:
                    reached.add(state)
                    pending.append(state)
        return frozenset(reached)


Pattern = Callable[[Graph, int], int]
"""Adds a language to a graph after a state, and returns the state that ends it."""


def characters(chosen: str, *, others: bool = False) -> Pattern:
    """One of the `chosen` characters, or one of all `others`."""

    def build(graph: Graph, start: int) -> int:
        end = graph.add()
        graph.edges[start].append((frozenset(chosen), others, end))
        return end

    return build


def sequence(*parts: Pattern) -> Pattern:
    """All parts, one after the other."""
    return lambda graph, start: reduce(lambda state, part: part(graph, state), parts, start)


def text(content: str) -> Pattern:
    """Exactly this text."""
    return sequence(*map(characters, content))


def either(*choices: Pattern) -> Pattern:
    """One of the choices."""

    def build(graph: Graph, start: int) -> int:
        end = graph.add()
        for choice in choices:
            begin = graph.add()
            graph.free[start].append(begin)
            graph.free[choice(graph, begin)].append(end)
        return end

    return build


def repeated(part: Pattern, least: int = 0, most: int | None = None) -> Pattern:
    """The part, `least` to `most` times; None: without limit."""

    def build(graph: Graph, start: int) -> int:
        state = sequence(*[part] * least)(graph, start)
        if most is None:
            loop = graph.add()
            end = graph.add()
            graph.free[state] += [loop, end]
            graph.free[part(graph, loop)] += [loop, end]
            return end
        end = graph.add()
        graph.free[state].append(end)
        for _ in range(most - least):
            begin = graph.add()
            graph.free[state].append(begin)
            state = part(graph, begin)
            graph.free[state].append(end)
        return end

    return build


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton over characters. State 0 is the start, and the last one has no way out."""

    classes: dict[str, int]  # the column of a character; all others have the last one
    table: States  # (S + 1, C) next state
    final: Bools  # (S + 1,)


def automaton_of(pattern: Pattern) -> Automaton:
    """Return the automaton of a pattern. PromptError if it is too large."""
    graph = Graph()
    end = pattern(graph, graph.add())
    known = sorted(set().union(*(chosen for edges in graph.edges for chosen, _, _ in edges)))
    states = {graph.closure([0]): 0}
    rows: list[list[frozenset[int]]] = []
    for state in (pending := list(states)):
        row = []
        for character in [*known, ""]:
            targets = set()
            for origin in state:
                targets |= {to for chosen, others, to in graph.edges[origin] if (character in chosen) != others}
            row.append(graph.closure(targets))
            if row[-1] and row[-1] not in states:
                states[row[-1]] = len(states)
                pending.append(row[-1])
        rows.append(row)
        if len(states) > MOST_STATES:
            raise PromptError(f"a value has a pattern of over {MOST_STATES} states; shorten its lengths or lists")
    dead = len(states)
    table = np.full((dead + 1, len(known) + 1), dead, np.int16)
    for number, row in enumerate(rows):
        table[number] = [states.get(target, dead) for target in row]
    final = np.array([end in state for state in states] + [False])
    return Automaton({character: column for column, character in enumerate(known)}, table, final)


@lru_cache(maxsize=4)
def _characters_of(tokenizer: Tokenizer, rows: int) -> Ints:
    """(rows, LONGEST) code points of each token, -1 after its end; -2 first if it is not made of whole characters."""
    points = np.full((rows, LONGEST), -1, np.int32)
    points[:, 0] = -2
    for id_ in range(min(rows, tokenizer.vocab_size)):
        content = tokenizer.token_bytes(id_)
        try:
            letters = content.decode()
        except UnicodeDecodeError:
            continue
        if id_ not in tokenizer.special_ids and id_ != tokenizer.mask_id and 0 < len(letters) <= LONGEST:
            points[id_, : len(letters)] = [ord(letter) for letter in letters]
    return points


class TokenAutomaton:
    """An automaton over the tokens of a tokenizer, for a model with `rows` ids."""

    def __init__(self, automaton: Automaton, tokenizer: Tokenizer, rows: int) -> None:
        points = _characters_of(tokenizer, rows)  # (V, LONGEST)
        columns = np.full(points.shape, automaton.table.shape[1] - 1)
        for character, column in automaton.classes.items():
            columns[points == ord(character)] = column
        dead = len(automaton.table) - 1
        state = np.repeat(np.arange(dead + 1, dtype=np.int16)[:, None], rows, 1)  # (S + 1, V)
        state[:, points[:, 0] == -2] = dead
        for place in range(LONGEST):
            given = points[:, place] >= 0  # (V,)
            state[:, given] = automaton.table[state[:, given], columns[given, place]]
        self.table = state  # (S + 1, V) the state after a token
        self.final = automaton.final
        self.links = np.zeros((dead + 1, dead + 1), np.bool_)  # whether a token leads from one state to another
        for origin in range(dead):
            self.links[origin, np.unique(state[origin])] = True
        self.links[:, dead] = False
        self._masks: dict[bytes, Bools] = {}

    def forward(self, states: Bools, token: int | None) -> Bools:
        """The states (S + 1,) after a token, or after any one (None)."""
        if token is None:
            return states @ self.links
        after = np.zeros_like(states)
        after[self.table[states, token]] = True
        after[-1] = False
        return after

    def backward(self, states: Bools, token: int | None) -> Bools:
        """The states (S + 1,) from which a token, or any one (None), leads to one of `states`."""
        return self.links @ states if token is None else states[self.table[:, token]]

    def ways(self, tokens: list[int | None]) -> tuple[list[Bools], list[Bools]]:
        """Of each place between tokens (None: open), the states that the start reaches, and that reach the end."""
        start = np.zeros(len(self.final), np.bool_)
        start[0] = True
        before = [start]
        for token in tokens:
            before.append(self.forward(before[-1], token))
        after = [self.final]
        for token in reversed(tokens):
            after.append(self.backward(after[-1], token))
        return before, after[::-1]

    def matches(self, tokens: list[int | None]) -> bool:
        """Whether the open places (None) can be filled so that the tokens are in the language."""
        before, _ = self.ways(tokens)
        return bool((before[-1] & self.final).any())

    def allowed(self, before: Bools, after: Bools) -> Bools:
        """(V,) the ids that lead from one of the states `before` to one of `after`."""
        key = np.packbits(np.concatenate([before, after])).tobytes()
        if key not in self._masks:
            if len(self._masks) >= MOST_MASKS:
                self._masks.clear()
            self._masks[key] = np.asarray(after[self.table[before]].any(0))
        return self._masks[key]

    def least_tokens(self) -> int:
        """The number of tokens of the shortest match."""
        states = np.zeros(len(self.final), np.bool_)
        states[0] = True
        count = 0
        while not (states & self.final).any():
            after = self.forward(states, None) | states
            if (after == states).all():
                raise PromptError("the tokenizer has no tokens for a value of the schema; use another model")
            states = after
            count += 1
        return count


@dataclass(frozen=True, eq=False)
class HolePattern:
    """The positions of a hole in a sequence, and its language."""

    start: int
    length: int
    automaton: TokenAutomaton

    def tokens(self, sequence_tokens: Tensor, mask_id: int) -> list[int | None]:
        """The tokens in the hole; None where one is masked."""
        ids: list[int] = sequence_tokens[self.start : self.start + self.length].tolist()
        return [None if id_ == mask_id else id_ for id_ in ids]


class Patterns:
    """The constraint that each of the `holes` matches its pattern. Every open position belongs to one of them."""

    takes_back = False

    def __init__(self, holes: list[HolePattern]) -> None:
        self.holes = holes

    def candidates(self, sequence: "Sequence") -> int:
        """None: the limits leave only what may be proposed."""
        return 0

    def move(self, places: Tensor) -> None:
        """Holes with a pattern are not resized."""

    def problem(self, sequence: "Sequence") -> str:
        """Every finished hole matches its pattern."""
        return ""

    def limits(self, sequence: "Sequence") -> IdLimits:
        """Return the ids that each open position may have, so that a match remains."""
        which = torch.full((len(sequence.tokens),), -1)
        numbers: dict[int, int] = {}
        masks: list[Bools] = []
        for hole in self.holes:
            tokens = hole.tokens(sequence.tokens, sequence.canvas.mask_id)
            before, after = hole.automaton.ways(tokens)
            for place, token in enumerate(tokens):
                if token is None:
                    mask = hole.automaton.allowed(before[place], after[place + 1])
                    if id(mask) not in numbers:
                        numbers[id(mask)] = len(masks)
                        masks.append(mask)
                    which[hole.start + place] = numbers[id(mask)]
        return IdLimits(which, torch.from_numpy(np.stack(masks)))

    def allow(self, sequence: "Sequence", proposals: "Proposals", decision: Decision) -> Decision:
        """Accept the chosen tokens, most confident first; postpone one that leaves its hole without a match."""
        committed = torch.zeros_like(decision.committed)
        for hole in self.holes:
            tokens = hole.tokens(sequence.tokens, sequence.canvas.mask_id)
            end = hole.start + hole.length
            order = proposals.confidence[hole.start : end].argsort(descending=True, stable=True)
            chosen = decision.committed[hole.start : end]
            for place in order[chosen[order]].tolist():
                tokens[place] = int(decision.tokens[hole.start + place])
                if hole.automaton.matches(tokens):
                    committed[hole.start + place] = True
                else:
                    tokens[place] = None
        return replace(decision, committed=committed)
