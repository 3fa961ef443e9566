"""Denoising: rows independent of company, every mask committed once, exact ends."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import MASK, PAD, Scripted, canvas, rugged, sure_of
from torch import Tensor

from diffucoder.decoding.caching import NoCache
from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams, Policy
from diffucoder.decoding.step import Sequence, Step, advance, denoise
from diffucoder.errors import CheckpointError, PromptError
from diffucoder.models.denoiser import Denoiser

left_to_right = sure_of(lambda place: place)  # proposes place % 8


def finish(model: Any, states: list[Sequence]) -> list[Sequence]:
    while active := [state for state in states if state.finish_reason is None]:
        advance(model, active)
    return states


# --- a row's result does not depend on who else is there (oracle 3)

MIX = [
    DecodingParams(),
    DecodingParams(steps=3, policy="margin"),
    DecodingParams(policy="max_prob", temperature=0.9, top_p=0.8, seed=1),
    DecodingParams(steps=5, temperature=0.5, policy_temperature=0.2, seed=2),
    DecodingParams(steps=4, policy="random", top_k=5, temperature=1.2, seed=3),
    DecodingParams(threshold=0.2, policy="max_prob"),
    DecodingParams(block=4, cache="dual"),
    DecodingParams(block=3, cache="prefix", entropy_bound=2.5),
    DecodingParams(block=5, cache="dual", temperature=0.6, seed=4),
    DecodingParams(cache="delayed", entropy_bound=2.5),
    DecodingParams(cache="delayed", temperature=0.4, seed=6),
    DecodingParams(factor=1.5, policy="margin"),
    DecodingParams(preset="fast", policy="margin", temperature=0.4, seed=7),
    DecodingParams(block=3, threshold=0.3, policy="max_prob"),
    DecodingParams(revoke=0.6, policy="max_prob", steps=4),
    DecodingParams(threshold=0.01, stable=1, revoke=0.6, policy="max_prob"),
    DecodingParams(revoke=0.6, cache="delayed", steps=4),
    DecodingParams.from_dream(steps=6, alg="entropy"),
    DecodingParams.from_dream(steps=6, alg="origin", temperature=0.7),
    DecodingParams.from_dream(steps=3, alg="topk_margin", temperature=0.4, top_p=0.9, alg_temp=0.5),
]


def requests(tiny: Denoiser) -> list[Sequence]:
    """One request for each of MIX, of its own prompt and length."""
    generator = torch.Generator().manual_seed(5)
    return [
        Sequence(
            Canvas.from_prompts(
                torch.randint(2, 60, (1, 2 + 3 * i), generator=generator), new_tokens=max(18 - i, 4), mask_id=66
            ),
            params,
        )
        for i, params in enumerate(MIX)
    ]


def test_a_mixed_batch_equals_its_requests_alone(tiny: Denoiser) -> None:
    together = finish(tiny, requests(tiny))
    for shared, alone in zip(together, requests(tiny), strict=True):
        finish(tiny, [alone])
        assert shared.tokens.tolist() == alone.tokens.tolist()
        assert shared.forward_passes == alone.forward_passes


def test_requests_that_join_and_leave_change_nothing_for_others(tiny: Denoiser) -> None:
    expected = [state.tokens.tolist() for state in finish(tiny, requests(tiny))]
    waiting, active, states = requests(tiny), [], []
    while waiting or active:
        if waiting:
            states.append(waiting.pop(0))
        active = [state for state in states if state.finish_reason is None]
        if active:
            advance(tiny, active)
    assert [state.tokens.tolist() for state in states] == expected


def changed(params: DecodingParams) -> str:
    """The settings that are not as they are by default."""
    return "-".join(f"{name}={value}" for name, value in params.model_dump(exclude_defaults=True).items())


@pytest.mark.parametrize("params", MIX, ids=changed)
def test_padding_changes_nothing(tiny: Denoiser, params: DecodingParams) -> None:
    prompts = [[5, 6, 7, 8], [9, 10]]
    ids = {"mask_id": tiny.mask_id, "pad_id": 1}
    *_, close = denoise(tiny, canvas(*prompts, new_tokens=8, **ids), params)
    *_, wide = denoise(tiny, canvas(*prompts, new_tokens=8, pad=5, **ids), params)
    assert torch.equal(close.canvas, wide.canvas[:, 5:])
    for row, prompt in enumerate(prompts):
        *_, alone = denoise(tiny, canvas(prompt, new_tokens=8, **ids), params)
        assert alone.canvas[0].tolist() == close.canvas[row, 4 - len(prompt) :].tolist()


# --- the end of an answer


@pytest.mark.parametrize(
    "params", [params for params in MIX if params.preset != "reference" and not params.revoke], ids=changed
)
def test_with_end_last_no_mask_is_left_before_an_end(tiny: Denoiser, params: DecodingParams) -> None:
    ids = {"mask_id": tiny.mask_id, "pad_id": 1, "terminators": tuple(range(0, 66, 3))}
    start = canvas([5, 6, 7, 8], [9, 10], new_tokens=12, **ids)
    ended = 0
    for step in denoise(tiny, start, params.replace(end_last=True)):
        is_end = step.committed & torch.isin(step.canvas, torch.tensor(ids["terminators"]))
        for row, position in is_end.nonzero().tolist():
            ended += 1
            assert not (step.canvas[row, :position] == tiny.mask_id).any()
    assert ended


def test_a_penalty_of_ends_makes_them_less_likely_and_nothing_else(tiny: Denoiser) -> None:
    ids = {"mask_id": tiny.mask_id, "pad_id": 1, "terminators": (3, 5)}
    start = canvas([5, 6, 7, 8], new_tokens=40, **ids)
    never = DecodingParams(temperature=3.0, end_penalty=1e4)
    *_, last = denoise(tiny, start, never)
    assert not torch.isin(last.canvas[:, 4:], torch.tensor([3, 5])).any()
    without = replace(start, terminators=(), forbidden=(3, 5))
    *_, same = denoise(tiny, without, DecodingParams(temperature=3.0))
    assert torch.equal(last.canvas, same.canvas)


# --- every masked position is committed exactly once (oracle 5)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Canvas, DecodingParams]:
    """Any canvas and any way to decode it."""
    ids = st.sampled_from([0, 1, 2, 3, MASK])
    prompts = [[1, *draw(st.lists(ids, max_size=6))] for _ in range(draw(st.integers(1, 4)))]
    params = DecodingParams(
        policy=draw(st.sampled_from(get_args(Policy))),
        steps=draw(st.none() | st.integers(1, 12)),
        temperature=draw(st.sampled_from([0.0, 0.7])),
        top_p=draw(st.sampled_from([None, 0.9])),
        policy_temperature=draw(st.sampled_from([0.0, 1e-30, 0.4])),
        seed=draw(st.integers(0, 3)),
        num_samples=draw(st.integers(1, 2)),
    )
    exact = draw(st.booleans())
    params = params.replace(**draw(extras(params.policy))) if exact else params.replace(preset="reference")
    return canvas(*prompts, new_tokens=draw(st.integers(1, 9)), pad=draw(st.integers(0, 2))), params


@st.composite
def extras(draw: st.DrawFn, policy: str) -> dict[str, Any]:
    """What the exact preset can do beyond the release, but for caches, which need a real model."""
    rules: list[dict[str, Any]] = [{}, {"threshold": 0.3}, {"factor": 1.0}]
    rules += [{"entropy_bound": 1.0}] if policy == "entropy" else []
    return {
        **draw(st.sampled_from(rules)),
        **draw(st.sampled_from([{}, {"revoke": 0.5}])),
        "block": draw(st.none() | st.integers(1, 5)),
    }


@settings(max_examples=80, deadline=None)
@given(problems())
def test_every_masked_position_is_committed_once_and_a_seed_fixes_the_result(
    problem: tuple[Canvas, DecodingParams],
) -> None:
    start, params = problem
    steps = list(denoise(Scripted(rugged), start, params))
    start = start.repeat(params.num_samples)
    nothing = torch.zeros_like(start.masked)
    taken_back = [nothing if step.revoked is None else step.revoked for step in steps]
    net = sum(step.committed.int() - back.int() for step, back in zip(steps, taken_back, strict=True))
    assert torch.equal(net, start.masked.int())  # each once, net of revocations
    before = start.tokens
    for index, (step, back) in enumerate(zip(steps, taken_back, strict=True)):
        assert step.index == index
        assert step.forward_passes == index + 1
        assert torch.equal(step.canvas != before, step.committed | back)
        assert not (step.committed & back).any()
        assert bool((back.sum(-1) <= (step.committed.sum(-1) - 1).clamp(min=0)).all())  # every step gets on
        assert not (step.confidence * ~step.committed).any()
        assert not (step.log_prob * ~step.committed).any()
        before = step.canvas
    again = list(denoise(Scripted(rugged), *problem))
    assert torch.equal(torch.stack([s.canvas for s in steps]), torch.stack([s.canvas for s in again]))


@given(masked=st.integers(1, 20), steps=st.integers(1, 25))
@settings(max_examples=40, deadline=None)
def test_the_exact_preset_spends_its_steps_evenly(masked: int, steps: int) -> None:
    counts = [
        int(step.committed.sum())
        for step in denoise(Scripted(rugged), canvas([1], new_tokens=masked), DecodingParams(steps=steps))
    ]
    assert len(counts) == min(steps, masked)
    assert max(counts) - min(counts) <= 1


def test_quotas_are_each_rows_own() -> None:
    start = canvas([1, MASK, MASK, MASK, MASK], [1, 2, 3, 4, 5], new_tokens=2)  # 6 and 2 masks
    counts = [step.committed.sum(-1).tolist() for step in denoise(Scripted(rugged), start, DecodingParams(steps=3))]
    assert counts == [[2, 1], [2, 1], [2, 0]]


def test_samples_differ_and_depend_on_their_number_alone() -> None:
    params = DecodingParams(temperature=1.5, num_samples=4)
    start = canvas([1, 2], new_tokens=10)
    *_, four = denoise(Scripted(rugged), start, params)
    *_, two = denoise(Scripted(rugged), start, params.replace(num_samples=2))
    assert len({tuple(row) for row in four.canvas.tolist()}) == 4
    assert torch.equal(four.canvas[:2], two.canvas)
    *_, other = denoise(Scripted(rugged), start, params.replace(seed=1))
    assert not torch.equal(four.canvas, other.canvas)


def test_the_log_probability_is_that_of_the_committed_token() -> None:
    model = Scripted(rugged)
    start = canvas([1, 2], new_tokens=4)
    step = next(iter(denoise(model, start, DecodingParams(steps=1, policy="max_prob"))))
    logits = model.logits(start.tokens)
    logits[..., MASK] = -torch.inf
    expected = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(step.log_prob[start.masked], expected[start.masked])
    torch.testing.assert_close(step.confidence, step.log_prob.exp() * step.committed)


# --- what the model is asked for


def test_only_rows_with_work_left_are_fed() -> None:
    model = Scripted(rugged)
    list(denoise(model, canvas([1, MASK, MASK, 1], [1], new_tokens=2), DecodingParams()))
    assert model.fed == [(2, 6), (2, 6), (1, 6), (1, 6)]  # the second row is done after two steps


def test_padding_all_rows_share_is_not_computed() -> None:
    model = Scripted(rugged)
    list(denoise(model, canvas([1, 2], [1], new_tokens=1, pad=50), DecodingParams()))
    assert model.fed == [(2, 3)]


def test_a_row_of_padding_is_finished_before_it_starts() -> None:
    tokens = torch.tensor([[1, MASK, MASK], [PAD, PAD, PAD], [1, 2, 3]])
    start = Canvas(tokens=tokens, valid=tokens != PAD, sample=torch.zeros(3).long(), mask_id=MASK)
    *_, last = denoise(Scripted(rugged), start, DecodingParams())
    assert last.canvas[1:].tolist() == tokens[1:].tolist()
    assert Sequence(start, DecodingParams(), row=1).finish_reason == "length"


def test_a_finished_request_cannot_be_advanced() -> None:
    [state] = finish(Scripted(rugged), [Sequence(canvas([1], new_tokens=1), DecodingParams())])
    with pytest.raises(AssertionError):
        advance(Scripted(rugged), [state])


def test_the_reference_takes_all_its_steps_even_with_nothing_left() -> None:
    params = DecodingParams.from_dream(steps=50, alg="origin", eps=0.999)  # all but certain to end in the last step
    assert len(list(denoise(Scripted(rugged), canvas([1], new_tokens=2), params))) == 50
    early = params.replace(eps=1e-3, steps=9, seed=1)
    counts = [int(step.committed.sum()) for step in denoise(Scripted(rugged), canvas([1], new_tokens=1), early)]
    assert len(counts) == 9
    assert sum(counts) == 1


def test_forbidden_unused_and_mask_ids_are_not_proposed() -> None:
    model = Scripted(lambda tokens, place: rugged(tokens, place) + torch.arange(12).float())
    *_, free = denoise(model, canvas([1, 2], new_tokens=8, proposable=11), DecodingParams())
    *_, bound = denoise(model, canvas([1, 2], new_tokens=8, proposable=11, forbidden=(10, 7)), DecodingParams())
    assert 10 in free.canvas
    assert not {9, 11} & set(free.canvas[0].tolist())
    assert not {7, 9, 10, 11} & set(bound.canvas[0].tolist())


def test_what_one_request_forbids_another_may_propose() -> None:
    model = Scripted(lambda tokens, place: rugged(tokens, place) + torch.arange(12).float())
    states = [
        Sequence(canvas([1, 2], new_tokens=4, proposable=11, forbidden=forbidden), DecodingParams())
        for forbidden in ((10, 7), ())
    ]
    finish(model, states)
    assert 10 not in states[0].tokens
    assert 10 in states[1].tokens


def test_a_canvas_of_another_models_mask_is_refused() -> None:
    with pytest.raises(PromptError, match="marks holes with 3, the model with 9"):
        next(denoise(Scripted(rugged), canvas([1], new_tokens=2, mask_id=3), DecodingParams()))


# --- where a row ends


def reason(model: Scripted, start: Canvas, params: DecodingParams, **more: Any) -> tuple[Any, list[int], int]:
    """Finish reason, tokens and forward passes of the one row of a canvas."""
    [state] = finish(model, [Sequence(start, params, **more)])
    return state.finish_reason, state.tokens.tolist(), state.forward_passes


def test_a_row_stops_when_nothing_is_masked_before_its_terminator() -> None:
    start = canvas([7, 1], new_tokens=8, terminators=(5, 6))
    assert reason(Scripted(left_to_right), start, DecodingParams()) == (
        "stop",
        [7, 1, 2, 3, 4, 5, PAD, PAD, PAD, PAD],
        4,
    )


def test_what_is_filled_behind_a_terminator_counts_as_nobodys_commitment() -> None:
    steps = list(denoise(Scripted(left_to_right), canvas([1, 1], new_tokens=8, terminators=(5,)), DecodingParams()))
    assert sum(int(step.committed.sum()) for step in steps) == 4
    assert steps[-1].committed[0].nonzero().tolist() == [[5]]


def test_what_was_committed_behind_a_terminator_stays() -> None:
    model = Scripted(sure_of(lambda place: (place - 8).abs()))  # 8 first, then 7 and 9, ...; proposes place % 8
    start = canvas([1, 1], new_tokens=8, terminators=(7, 3))
    assert reason(model, start, DecodingParams()) == ("stop", [1, 1, 2, 3, 4, 5, 6, 7, 0, 1], 8)


def test_a_terminator_in_the_prompt_or_behind_a_mask_stops_nothing() -> None:
    backwards = Scripted(sure_of(lambda place: -place))
    assert reason(backwards, canvas([5, 1], new_tokens=4, terminators=(5,)), DecodingParams())[2] == 4


def test_a_terminator_that_comes_last_is_a_stop_and_none_is_length() -> None:
    for terminators, expected in (((5,), "stop"), ((), "length")):
        start = canvas([1, 1], new_tokens=4, terminators=terminators)
        assert reason(Scripted(left_to_right), start, DecodingParams())[0] == expected


def test_without_a_pad_id_the_masks_stay() -> None:
    start = canvas([1, 1], new_tokens=6, terminators=(3,), pad_id=None)
    assert reason(Scripted(left_to_right), start, DecodingParams())[1] == [1, 1, 2, 3] + [MASK] * 4


def test_the_reference_knows_no_terminators_but_reports_one() -> None:
    start = canvas([1, 1], new_tokens=6, terminators=(3,))
    finished = reason(Scripted(left_to_right), start, DecodingParams.from_dream(steps=6, alg="entropy"))
    assert finished == ("stop", [1, 1, 2, 3, 4, 5, 6, 7], 6)


@pytest.mark.parametrize("preset", ["exact", "reference"])
def test_until_sees_the_settled_text_as_it_grows_and_ends_the_row(preset: str) -> None:
    seen = []

    def until(settled: Tensor) -> bool:
        seen.append(settled.tolist())
        return len(settled) >= 3

    start = canvas([1, 1], new_tokens=6)
    params = DecodingParams(preset=preset, steps=6)
    finish_reason, tokens, _ = reason(Scripted(left_to_right), start, params, until=until)
    assert (finish_reason, tokens) == ("stop", [1, 1, 2, 3, 4, PAD, PAD, PAD])
    assert seen == [[2], [2, 3], [2, 3, 4]]


def test_until_is_asked_of_each_row_and_only_about_news() -> None:
    seen = []

    def until(settled: Tensor) -> bool:
        seen.append(settled.tolist())
        return False

    backwards = Scripted(sure_of(lambda place: -place))
    list(denoise(backwards, canvas([1, 1], [1], new_tokens=3), DecodingParams(), until=until))
    assert seen == [[2, 3, 4], [1, 2, 3]]


def test_steps_are_lazy() -> None:
    model = Scripted(rugged)
    steps = denoise(model, canvas([1], new_tokens=4), DecodingParams())
    assert not model.fed
    assert isinstance(next(steps), Step)
    assert len(model.fed) == 1


# --- several commitments a step


def counts(score: Any, **settings: Any) -> list[int]:
    steps = denoise(Scripted(score), canvas([1, 1], new_tokens=8), DecodingParams(**settings))
    return [int(step.committed.sum()) for step in steps]


def test_a_threshold_commits_what_is_sure_and_always_one() -> None:
    def score(tokens: Tensor, place: Tensor) -> Tensor:  # sure of even places, at once; of odd ones never
        height = torch.where(place % 2 == 0, 9.0, 1.0)
        return torch.nn.functional.one_hot(place % 8, 12) * height[..., None]

    assert counts(score, threshold=0.9, policy="max_prob") == [4, 1, 1, 1, 1]
    assert counts(score, threshold=0.9, policy="margin") == [4, 1, 1, 1, 1]
    assert counts(score, factor=1.0, policy="max_prob") == [4, 1, 1, 1, 1]
    assert counts(score, entropy_bound=0.1) == [5, 1, 1, 1]  # the largest entropy does not count
    assert counts(score, threshold=0.9, policy="max_prob", steps=2) == [4, 4]  # what is due is committed all the same
    for rule in ({"threshold": 0.9}, {"factor": 1.0}):
        assert counts(score, **rule, stable=1) == [1, 3, 1, 1, 1, 1]  # the first step has none before it
        assert counts(score, **rule, stable=2) == [1, 1, 2, 1, 1, 1, 1]


def test_a_proposal_that_changes_is_not_stable() -> None:
    def score(tokens: Tensor, place: Tensor) -> Tensor:  # sure of everything, of other tokens at each step
        masked = (tokens == MASK).sum(-1, keepdim=True)
        return torch.nn.functional.one_hot((place + masked) % 8, 12) * 9.0

    assert counts(score, threshold=0.9) == [8]
    assert counts(score, threshold=0.9, stable=1) == [1] * 8


# --- part of the canvas


def test_blocks_are_filled_from_left_to_right() -> None:
    backwards = Scripted(sure_of(lambda place: -place))
    steps = denoise(backwards, canvas([1, 1], new_tokens=6), DecodingParams(block=2))
    assert [step.committed[0].nonzero().flatten().tolist() for step in steps] == [[3], [2], [5], [4], [7], [6]]


def test_only_the_block_at_work_is_scored() -> None:
    asked = []

    class Asked(Scripted):
        def score(self, tokens: Tensor, **more: Any) -> Any:
            asked.append(more["wanted"][:, 1].tolist())
            return super().score(tokens, **more)

    list(denoise(Asked(left_to_right), canvas([1, 1], new_tokens=4), DecodingParams(block=2, steps=2)))  # type: ignore
    assert asked == [[2, 3], [4, 5]]


class Everything(NoCache):
    """A cache plan that keeps keys and values, and computes all of them again at each step."""

    uses_cache = True


@pytest.mark.parametrize("more", [{}, {"threshold": 0.1}, {"revoke": 0.5}], ids=str)
def test_a_cache_computed_again_at_every_step_is_no_cache(
    tiny: Denoiser, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14]]
    start = canvas(*prompts, new_tokens=11, mask_id=tiny.mask_id, pad_id=1)
    params = DecodingParams(block=4, policy="max_prob", **more)
    plain = list(denoise(tiny, start, params))
    monkeypatch.setattr("diffucoder.decoding.sequence.cache_plan_of", lambda params, _: Everything())
    fresh = list(denoise(tiny, start, params))
    assert tiny.cache.in_use == 0
    assert len(plain) == len(fresh)
    for one, other in zip(plain, fresh, strict=True):
        assert torch.equal(one.canvas, other.canvas)
        torch.testing.assert_close(one.confidence, other.confidence, rtol=0, atol=1e-5)


class Watched:
    """A Denoiser that counts the positions that it is fed."""

    def __init__(self, model: Denoiser) -> None:
        self.model, self.fed = model, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def score(self, tokens: Tensor, **more: Any) -> Any:
        self.fed.append(int(more["feed"].sum()))
        return self.model.score(tokens, **more)


@pytest.mark.parametrize(
    ("more", "widths"),
    [
        ({"cache": "dual"}, [12, 5, 5, 5, 12, 5, 5, 5]),  # the block and the position before it
        ({"cache": "prefix"}, [12, 9, 9, 9, 12, 5, 5, 5]),  # and all after it
        # masks, the positions before them, and what was committed one step ago
        ({"cache": "delayed", "block": 1}, [12, 8, 7, 6, 5, 4, 3, 2]),
        ({"cache": "delayed", "block": 2, "steps": 4}, [12, 8, 6, 4]),
    ],
    ids=str,
)
def test_a_cached_pass_feeds_only_what_is_not_kept(tiny: Denoiser, more: dict[str, Any], widths: list[int]) -> None:
    model: Any = Watched(tiny)
    list(
        denoise(model, canvas([5, 6, 7, 8], new_tokens=8, mask_id=tiny.mask_id), DecodingParams(**{"block": 4, **more}))
    )
    assert model.fed == widths


# --- other ways


def test_revoked_tokens_are_those_that_lost_most() -> None:
    def score(tokens: Tensor, place: Tensor) -> Tensor:  # token 2 at place 2 is sure until place 3 is known, then 5 is
        known = tokens[:, 3] != MASK
        token = torch.where((place == 2) & known[:, None], 5, place % 8)
        height = torch.where(place == 2, 9.0, 8 - 0.1 * place.float())
        return torch.nn.functional.one_hot(token, 12) * height[..., None]

    params = DecodingParams(revoke=0.5, policy="max_prob", steps=4)
    steps = list(denoise(Scripted(score), canvas([1, 1], new_tokens=8), params))
    taken_back = [step.revoked[0].nonzero().flatten().tolist() for step in steps if step.revoked is not None]
    assert [2] in taken_back
    assert steps[-1].canvas.tolist() == [[1, 1, 5, 3, 4, 5, 6, 7, 0, 1]]


def test_a_model_of_other_layers_keeps_no_cache(tiny: Denoiser) -> None:
    tiny.model.config.hidden_act = "gelu"
    with pytest.raises(CheckpointError, match="no cache"):
        list(denoise(tiny, canvas([5], new_tokens=4, mask_id=66), DecodingParams(block=2, cache="dual")))


def test_random_numbers_of_other_seeds_and_samples_are_others(tiny: Denoiser) -> None:
    """Also of seeds beyond 32 bits, whose upper half must not be read as the number of a sample."""
    seeds = [*range(8), 2**31, 2**32 - 1, 2**32, 2**32 + 5, 5 * 2**32, 2**40 + 3, 2**63 - 1]
    start = canvas([5, 6], new_tokens=4, mask_id=tiny.mask_id).repeat(8)
    drawn = set()
    for seed in seeds:
        for row in range(8):
            drawn.add(tuple(Sequence(start, DecodingParams(temperature=1.0, seed=seed), row=row).uniform[0].tolist()))
    assert len(drawn) == len(seeds) * 8
    assert len({number for numbers in drawn for number in numbers}) > 0.999 * len(seeds) * 8 * 6
