"""Passes: what the model is shown of each canvas, and what it says of the positions that are asked for.

For: between `denoise`, which thinks in whole canvases, and `Denoiser.forward`, which is fed some of their positions.
Not for: what is committed (`policies`, `denoise`).

A pass sees a whole canvas unless it is narrowed. A *horizon* leaves far masks out altogether: they carry little but the
length, which the canvas's last position tells as well (suffix pruning: DPad, Streaming-dLLM). A *cache* leaves out what
stands outside the block at work, and keeps its keys and values as they were when the block began (Fast-dLLM, arXiv
2505.22618): `prefix` what stands to the left, `dual` what stands to the right too. Or it keeps every token's, once they
have been computed from it (`delayed`: dKV-Cache, arXiv 2505.15781). The position before a block, or a mask, is fed as
well: shifted models score a position from its left neighbour.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from diffucoder.decoding.canvas import leftmost
from diffucoder.decoding.sampling import Rules, entropy, propose
from diffucoder.decoding.state import DecodeState, Slot
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.lean import CanvasCache, Place, compiled


@dataclass(frozen=True, eq=False)
class Rows:
    """The R canvases of a pass, left-padded to T: of each request the one it has come to, then its guesses."""

    states: list[DecodeState]  # whose row it is
    ahead: list[int]  # steps between the request and the row
    tokens: Tensor  # (R, T)
    padding: Tensor  # (R,)
    valid: Tensor  # (R, T) bool
    masked: Tensor  # (R, T) bool
    uniform: Tensor  # (2, R, T)

    @classmethod
    def of(cls, states: Sequence[DecodeState]) -> "Rows":
        """Lay out what `states` bring to a pass."""
        whose, ahead, canvases = [], [], []
        for state in states:
            for at, canvas in enumerate([state.tokens, *state.guesses]):
                whose.append(state)
                ahead.append(at if state.params.drafts else 0)  # branches are alternatives, not steps
                canvases.append(canvas)
        tokens = pad_sequence(canvases, batch_first=True, padding_side="left")  # (R, T)
        padding = tokens.shape[1] - torch.tensor([len(canvas) for canvas in canvases])  # (R,)
        valid = torch.arange(tokens.shape[1]) >= padding[:, None]  # (R, T)
        masked = valid & (tokens == torch.tensor([[state.canvas.mask_id] for state in whose]))
        uniform = torch.zeros(2, *tokens.shape)
        for row, (state, steps) in enumerate(zip(whose, ahead, strict=True)):
            if state.params.stochastic:
                uniform[:, row, int(padding[row]) :] = state.uniform(steps)
        return cls(whose, ahead, tokens, padding, valid, masked, uniform)

    def own(self, row: int) -> slice:
        """Where the row's canvas is: without its padding."""
        return slice(int(self.padding[row]), None)

    def column(self, values: Callable[[DecodeState], float]) -> Tensor:
        """(R,) a number of each row's request."""
        return torch.tensor([values(state) for state in self.states])


@dataclass(frozen=True, eq=False)
class Found:
    """What a pass says of its rows: 0 where nothing was asked."""

    open: Tensor  # (R, T) bool: masked, and may be committed now
    looked_at: Tensor  # (R, T) bool: commitments that may be revoked
    tokens: Tensor  # (R, T) the proposal where open, else what stands there
    confidence: Tensor  # (R, T) by the row's policy
    log_prob: Tensor  # (R, T) of the proposal, or of what stands there
    entropy: Tensor  # (R, T) nats, of what is open; nan elsewhere, and where nobody asks for it
    slots: list[Slot | None]  # each row's keys and values, where there is a cache


def score(model: Denoiser, rows: Rows) -> Found:
    """Show every row to the model, as narrowly as its request says, and ask for what may be committed or revoked."""
    shown = _shown(rows)  # (R, T)
    scored = shown & pad(shown[:, :-1], (1, 0))  # (R, T) the left neighbour, which scores it, is shown too
    open_ = rows.masked & scored & _at_work(rows)
    looked_at = ~rows.masked & scored & _revocable(rows)
    asked = open_ | looked_at
    tokens, slots = rows.tokens.clone(), [state.slot for state in rows.states]
    confidence, log_prob = torch.zeros(2, *tokens.shape)
    unsure = torch.full(tokens.shape, torch.nan)
    for group in _groups(rows.states):
        results = _pass(model, rows, group, shown, asked, slots)  # (M,) each
        here = torch.zeros_like(asked)
        here[group] = asked[group]
        for whole, result in zip((tokens, confidence, log_prob, unsure), results, strict=False):  # the last if asked
            whole.masked_scatter_(here, result.cpu())
    return Found(open_, looked_at, tokens, confidence, log_prob, unsure.masked_fill(~open_, torch.nan), slots)


# --- what is shown ---------------------------------------------------------------------------------------------------


def _shown(rows: Rows) -> Tensor:
    """The positions that the model is fed of each row: (R, T) bool."""
    shown = rows.valid.clone()
    place = torch.arange(shown.shape[1])
    first = leftmost(rows.masked).tolist()
    for row, state in enumerate(rows.states):
        if state.params.horizon is not None:
            near = (place < first[row] + state.params.horizon) | (place == len(place) - 1)
            shown[row] &= near | ~rows.masked[row]
        elif state.params.cache == "delayed" and not state.stale():
            own = rows.own(row)
            shown[row, own] = state.unkept(rows.tokens[row, own])
        elif state.cached and not state.stale():
            shown[row] &= _between(rows, row, state.window())
    return shown


def _at_work(rows: Rows) -> Tensor:
    """The positions of each row's block at work: (R, T) bool."""
    inside = torch.ones_like(rows.masked)
    for row, state in enumerate(rows.states):
        if state.params.block is not None:
            inside[row] = _between(rows, row, state.bounds(state.block_of(rows.tokens[row, rows.own(row)])))
    return inside


def _revocable(rows: Rows) -> Tensor:
    """The positions that decoding fills, in the rows that may take a commitment back: (R, T) bool."""
    filled = torch.zeros_like(rows.masked)
    for row, state in enumerate(rows.states):
        if state.params.revoke:
            filled[row, rows.own(row)] = state.holes
    return filled


def _between(rows: Rows, row: int, bounds: tuple[int, int]) -> Tensor:
    """(T,) bool: the positions of a row from and to those of its canvas."""
    place = torch.arange(rows.tokens.shape[1]) - rows.padding[row]
    return (place >= bounds[0]) & (place < bounds[1])


# --- what is said ----------------------------------------------------------------------------------------------------


def _groups(states: Sequence[DecodeState]) -> list[list[int]]:
    """Rows that share a call: by the released arithmetic, without a cache, with one."""
    groups: dict[str, list[int]] = {}
    for row, state in enumerate(states):
        kind = "released" if state.params.preset == "reference" else "cached" if state.cached else "plain"
        groups.setdefault(kind, []).append(row)
    return list(groups.values())


def _pass(
    model: Denoiser, rows: Rows, group: list[int], shown: Tensor, asked: Tensor, slots: list[Slot | None]
) -> tuple[Tensor, ...]:
    """One call for the rows of a group: ids, confidence and log-probability of the M positions asked for, (M,) each.

    Notes in `slots` where the keys and values of each row are, if they are kept.
    """
    states = [rows.states[row] for row in group]
    shown, asked, tokens = shown[group], asked[group], rows.tokens[group]  # (r, T)
    wanted = asked.nonzero()  # (M, 2)
    count = len(wanted)
    if model.compiled and count:
        wanted = torch.cat([wanted, wanted[:1].expand(-count % _ROWS, -1)])
    known = tokens.masked_fill(rows.masked[group], -1)[tuple(wanted.T)]  # (M,)
    sample = _sampler(model, states, wanted[:, 0], rows.uniform[0, group][tuple(wanted.T)], known)
    released = states[0].params.preset == "reference"
    if not states[0].cached and bool((shown == rows.valid[group]).all()):
        (fed, present), which = _different(tokens, shown)
        where = torch.stack([which[wanted[:, 0]], wanted[:, 1]], -1)  # (M, 2)
        positions, cache, places = None, None, None
    else:
        place, width = _places(shown)
        row, at = shown.nonzero()[:, 0], place[shown]
        fed, positions = torch.zeros(2, len(group), width, dtype=torch.long)
        present = torch.zeros(fed.shape, dtype=torch.bool)
        fed[row, at], present[row, at] = tokens[shown], True
        positions[row, at] = (torch.arange(tokens.shape[1]) - rows.padding[group][:, None])[shown]
        cache, places = _kept(model, rows, group, slots) if states[0].cached else (None, None)
        where = torch.stack([wanted[:, 0], place[tuple(wanted.T)]], -1)  # (M, 2)
    if model.compiled and not released:
        left = -fed.shape[1] % _WIDTH
        below = 0 if cache else (1 << (len(fed) - 1).bit_length()) - len(fed)  # a cache has its own number of rows
        fed, present = (pad(each, (left, 0, 0, below)) for each in (fed, present))
        positions = None if positions is None else pad(positions, (left, 0, 0, below))
        where = where + torch.tensor([0, left])
    found = model(
        fed,
        valid=present,
        positions=positions,
        cache=cache,
        places=places,
        rows=where,
        reduce=sample,
        released=released,
    )
    return tuple(column[:count] for column in found)


_ROWS, _WIDTH = 32, 32  # a compiled step is fed multiples of these, and powers of two of canvases


def _sampler(
    model: Denoiser, states: Sequence[DecodeState], whose: Tensor, uniform: Tensor, known: Tensor
) -> Callable[[Tensor, slice], tuple[Tensor, ...]]:
    """`propose` for M positions of the states `whose` (M,), given what is `known` (M,) of them, -1 where masked."""
    device, first = model.device, states[0]
    if all(state.params is first.params and torch.equal(state.barred, first.barred) for state in states):
        rules = Rules.of([first.params], first.barred[None]).expand(len(whose))  # one request, or its samples
    else:
        barred = pad_sequence([state.barred for state in states], batch_first=True, padding_value=-1)  # (r, K)
        barred = barred.where(barred >= 0, barred[:, :1])  # fewer ids than others: the mask again
        rules = Rules.of([state.params for state in states], barred)[whose]
    rules, uniform = rules.to(device), uniform.to(device)
    given = known.to(device) if (known >= 0).any() else None
    decide = _compiled_propose(device) if model.compiled and rules.needs.released is False else propose
    told = any(state.tells_entropy for state in states)

    def sample(logits: Tensor, chunk: slice) -> tuple[Tensor, ...]:
        there = None if given is None else given[chunk]
        found = decide(logits, rules[chunk], uniform[chunk], proposable=model.proposable, given=there)
        return (*found, entropy(logits, rules.barred[chunk], model.proposable)) if told else found

    return sample


@cache
def _compiled_propose(device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    return compiled(propose, device)


def _different(tokens: Tensor, shown: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The rows (r, T) that differ, each once, and which of them each row is, (r,): samples of a prompt begin alike."""
    unique, which = torch.unique(torch.cat([tokens, shown.long()], 1), dim=0, return_inverse=True)
    if len(unique) == len(tokens):
        return (tokens, shown), torch.arange(len(tokens))
    return (unique[:, : tokens.shape[1]], unique[:, tokens.shape[1] :].bool()), which


def _places(shown: Tensor) -> tuple[Tensor, int]:
    """Where each shown position stands among those fed, right-aligned, (r, T), and how many are fed at most."""
    counts = shown.sum(-1, keepdim=True)  # (r, 1)
    width = int(counts.max())
    return shown.long().cumsum(-1) - 1 + (width - counts), width


def _kept(model: Denoiser, rows: Rows, group: list[int], slots: list[Slot | None]) -> tuple[CanvasCache, list[int]]:
    """The cache that a group's canvases share, and which row of it each has; notes in `slots` what they hold now.

    Each goes where its request is already; who is new there, or brings another canvas, gets a row of its own.
    """
    states = [rows.states[row] for row in group]
    caches = Counter(state.slot.place.cache for state in states if state.slot is not None)
    if caches:
        cache = caches.most_common(1)[0][0]
    else:
        cache = model.new_cache(torch.tensor([len(state.tokens) for state in states]))
    at, used = [], set[Place]()
    for index, state in zip(group, states, strict=True):
        before = None if state.stale() else state.slot
        place = None if state.slot is None else state.slot.place
        if place is None or place.cache is not cache or place in used:
            place = cache.take(len(state.tokens))
            if before is not None:
                place.copy(before.place, len(state.tokens))
        used.add(place)
        at.append(place.row)
        made = (state.block, state.age) if before is None else (before.block, before.age)
        slots[index] = Slot(place, *made, rows.tokens[index, rows.own(index)])
    return cache, at
