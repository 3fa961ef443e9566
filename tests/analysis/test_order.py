"""Figures of the order of generation: the published vectors, a slow obvious implementation, models of a known order."""

import math
from collections.abc import Callable
from collections.abc import Sequence as Sequences
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffucoder import Canvas, DecodingParams, Denoiser, DiffuCoder
from diffucoder.analysis.order import analyse, mean_map
from diffucoder.analysis.runs import GLOBAL, LOCAL, Answer, Run, ar_ness, labelled, read_runs
from diffucoder.analysis.settings import Conventions
from diffucoder.analysis.tokens import token_classes
from diffucoder.decoding.step import Sequence, Step, decode, denoise
from diffucoder.decoding.trace import Trace, write_traces
from diffucoder.errors import ConfigError
from diffucoder.tokenizer import Tokenizer
from recipes.tiny.problems import problems

STEPS = st.lists(st.integers(-1, 12), min_size=1, max_size=24)
CONVENTIONS = st.builds(
    Conventions,
    boundary=st.sampled_from(["exclude", "include", "prompt"]),
    ordered=st.booleans(),
    several=st.sampled_from(["left_to_right", "surest_first", "at_once"]),
)


def obvious(
    steps: Sequences[int], sure: Sequences[float], how: Conventions, end: int = 99
) -> tuple[list[float], list[float]]:
    """AR-ness as the paper defines it, commitment by commitment, with sets and no cleverness."""
    committed = [at for at, step in enumerate(steps) if step >= 0]
    if how.several == "surest_first":
        order = sorted(committed, key=lambda at: (steps[at], -sure[at], at))
    else:
        order = sorted(committed, key=lambda at: (steps[at], at))

    def earlier(t: int) -> list[int]:
        if how.several == "at_once":
            return [at for at in order if steps[at] < steps[order[t]]]
        return order[:t]

    local, overall = [], []
    for k in range(1, 10):
        counted = hits = 0
        for t, position in enumerate(order):
            if position >= end:
                continue
            past = ([*range(-k, 0)] if how.boundary == "prompt" else []) + earlier(t)
            if len(past) < k:
                counted += how.boundary == "include"
                continue
            counted += 1
            last, wanted = past[-k:], [position - n for n in range(k, 0, -1)]
            hits += last == wanted if how.ordered else set(last) == set(wanted)
        local.append(hits / counted if counted else math.nan)
    for k in range(1, 5):
        hits = 0
        for t, position in enumerate(order):
            if position >= end:
                continue
            masked = sorted(set(order) - set(earlier(t)))
            hits += position in masked[:k]
        own = [position for position in order if position < end]
        overall.append(hits / len(own) if own else math.nan)
    return local, overall


@given(STEPS, st.data(), CONVENTIONS)
def test_ar_ness_equals_the_obvious_implementation(steps: list[int], data: st.DataObject, how: Conventions) -> None:
    sure = data.draw(st.lists(st.floats(0, 1), min_size=len(steps), max_size=len(steps)))
    for end in (None, data.draw(st.integers(0, 24))):
        expected = obvious(steps, sure, how, 99 if end is None else end)
        for found, wanted in zip(ar_ness(steps, how, sure, end=end), expected, strict=True):
            assert found == pytest.approx(wanted, nan_ok=True)


def test_padding_is_skipped_interrupts_or_counts(tokenizer: Tokenizer) -> None:
    """An answer of three tokens and a terminator, with a pad committed between each two of them."""
    tokens = [*tokenizer.encode("xyz")[:3], tokenizer.encode("<|im_end|>", special=True)[0], *[tokenizer.pad_id] * 3]
    recorded = Trace(
        tokens=tokens,
        prompt_length=0,
        steps=[0, 2, 4, 6, 5, 3, 1],
        confidence=[0.0] * 7,
        log_probs=[0.0] * 7,
        forward_passes=7,
    )
    answer = Answer.of(recorded, tokenizer, task="x")
    local = {span: answer.ar_ness(Conventions(span=span))[0][0] for span in ("answer", "interrupted", "canvas")}
    assert local == {"answer": 1, "interrupted": 0, "canvas": 0}
    assert answer.ar_ness(Conventions(span="interrupted"))[1] == answer.ar_ness(Conventions())[1] == [1] * 4


@given(st.permutations(range(12)))
def test_local_ar_ness_of_runs_in_order_never_rises_with_k_and_global_never_falls(order: list[int]) -> None:
    local, overall = ar_ness(order, Conventions(boundary="include", ordered=True))
    assert local == sorted(local, reverse=True)
    assert overall == sorted(overall)


@pytest.mark.parametrize("boundary", ["exclude", "prompt"])
@pytest.mark.parametrize("ordered", [False, True])
def test_left_to_right_is_1_by_every_k(boundary: Literal["exclude", "prompt"], ordered: bool) -> None:
    local, overall = ar_ness(range(12), Conventions(boundary=boundary, ordered=ordered))
    assert local == [1] * 9
    assert overall == [1] * 4


def test_the_published_mixed_order() -> None:
    steps = [6, 3, 4, 5, 0, 1, 2]  # of the positions 1 to 7 in the order 5 6 7 2 3 4 1
    local, overall = ar_ness(steps, Conventions())
    assert (local[:2], overall[:2]) == ([4 / 6, 2 / 5], [1 / 7, 4 / 7])


def test_tokens_of_one_step_may_follow_each_other_or_not() -> None:
    steps = [0, 0, 1, 1]
    assert ar_ness(steps, Conventions())[0][0] == 1
    assert ar_ness(steps, Conventions(several="surest_first"), [0.1, 0.9, 0.9, 0.1])[0][0] == 1 / 3
    local, overall = ar_ness(steps, Conventions(several="at_once"))
    assert local[0] == 1 / 2
    assert overall[:2] == [2 / 4, 1]


# --- on recorded Steps -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(train_tokenizer: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(list(problems("train", 100, seed=0)), 320, folder)
    return Tokenizer.load(folder)


class Known:
    """A model that writes `text` and is surest where `sureness` is highest: its order is known beforehand."""

    first_scorable = 0
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, tokenizer: Tokenizer, first: int, text: str, sureness: Callable[[int], float]) -> None:
        self.mask_id = tokenizer.mask_id
        self.scores = torch.zeros(512, tokenizer.vocab_size)
        ids = [*tokenizer.encode(text), min(tokenizer.terminator_ids)]
        self.length = len(ids)
        for at, token in enumerate(ids):
            self.scores[first + at, token] = 8 + sureness(at)

    def scorable(self, fed: torch.Tensor) -> torch.Tensor:
        return fed

    def score(self, tokens: torch.Tensor, *, wanted: torch.Tensor, reduce: Any, **_: Any) -> Any:
        return reduce(self.scores[wanted[:, 1]], slice(0, len(wanted)))


def traces_of(model: Any, canvas: Canvas, params: DecodingParams, entropies: int = 0, name: str = "") -> list[Trace]:
    """The trace of each row of a canvas."""
    sequences = [Sequence(canvas, params, row=row, entropies=entropies) for row in range(len(canvas.tokens))]
    for _ in decode(model, sequences):
        pass
    return [sequence.trace(name) for sequence in sequences]


TEXT = "def f(x):\n    return x + 1  # one more\n"


def known(tokenizer: Tokenizer, sureness: Callable[[int], float], *, steps: int | None = None) -> Answer:
    first = len(tokenizer.encode("a"))
    model: Any = Known(tokenizer, first, TEXT, sureness)
    canvas = Canvas.from_prompts(
        torch.tensor([tokenizer.encode("a")]),
        new_tokens=model.length,
        mask_id=tokenizer.mask_id,
        terminators=tuple(tokenizer.terminator_ids),
    )
    params = DecodingParams(policy="max_prob", steps=steps)
    [trace] = traces_of(model, canvas, params, entropies=99, name="known")
    return Answer.of(trace, tokenizer, task="known")


def test_a_model_that_writes_left_to_right_has_ar_ness_1_and_backwards_near_0(tokenizer: Tokenizer) -> None:
    forwards, backwards = (known(tokenizer, lambda at, s=sign: s * 0.05 * at) for sign in (-1, 1))
    assert forwards.ar_ness(Conventions()) == ([1] * 9, [1] * 4)
    local, overall = backwards.ar_ness(Conventions())
    assert local == [0] * 9
    assert overall == [pytest.approx(k / backwards.length) for k in GLOBAL]
    assert "".join(forwards.pieces).startswith(TEXT)
    assert np.array_equal(forwards.ranks, backwards.ranks[::-1])


def test_what_a_model_commits_first_is_seen_by_class_and_position(tokenizer: Tokenizer) -> None:
    answer = known(tokenizer, lambda at: 0.05 * at)
    figures = analyse(labelled([Run({"model": "known"}, [answer])]), Conventions())["runs"][0]
    rank = {kind: figures["figures"][f"rank_{kind}"]["mean"] for kind in ("end", "comment", "literal", "keyword")}
    assert 0 == rank["end"] < rank["comment"] < rank["literal"] < rank["keyword"]
    by_position = [each["mean"] for each in figures["rank_by_position"]]
    assert by_position == pytest.approx(np.linspace(1, 0, answer.length), abs=1e-6)
    unsure = [each["mean"] for each in figures["first_pass_entropy_by_position"]]
    assert unsure == sorted(unsure, reverse=True)  # surest at the end


def test_entropies_are_those_of_what_was_masked_before_each_step(tokenizer: Tokenizer) -> None:
    answer = known(tokenizer, lambda at: 0.1 * math.sin(9 * at))
    entropies = answer.trace.entropy_map
    assert entropies.shape == (answer.length, answer.length)
    for step, row in enumerate(entropies):
        assert np.isnan(row).tolist() == [made < step for made in answer.trace.steps]
    for at, step in enumerate(answer.trace.steps):
        p = answer.trace.confidence[at]  # of its token; the others share the rest evenly
        others = (1 - p) / (320 - 2)
        assert entropies[step, at] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(others), rel=0.02)


def test_traces_with_entropies_and_revisions_are_written_and_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trace = known(tokenizer, lambda at: 0.05 * at).trace
    write_traces(tmp_path / "traces.jsonl", [trace])
    from diffucoder.decoding.trace import read_traces

    assert read_traces(tmp_path / "traces.jsonl") == [trace]


def test_revisions_are_recorded_with_what_stood_there(causal_lm: Callable[..., Any]) -> None:
    model = Denoiser.from_causal_lm(causal_lm(), mask_id=66)
    canvas = Canvas.from_prompts(torch.tensor([[5, 6], [7, 8]]), new_tokens=24, mask_id=66)
    params = DecodingParams(threshold=0.3, revoke=0.6, policy="max_prob", steps=4)
    steps: list[Step] = list(denoise(model, canvas, params))
    traces = traces_of(model, canvas, params)
    taken_back = [(s.index, *at) for s in steps if s.revoked is not None for at in s.revoked.nonzero().tolist()]
    assert taken_back, "a test of revisions needs some"
    found = [(step, row, at + 2) for row, trace in enumerate(traces) for at, _, _, step in trace.revoked]
    assert sorted(found) == sorted(taken_back)
    for row, trace in enumerate(traces):
        for at, token, made, revoked in trace.revoked:
            assert made < revoked
            assert steps[made].committed[row, at + 2]
            assert int(steps[made].canvas[row, at + 2]) == token


@pytest.mark.parametrize("policy", ["entropy", "max_prob", "margin", "random"])
def test_an_unshifted_model_is_analysed_like_any(causal_lm: Callable[..., Any], policy: Any) -> None:
    """LLaDA's convention: row i of its scores is token i."""
    model = Denoiser.from_causal_lm(causal_lm(), mask_id=66, shifted=False)
    canvas = Canvas.from_prompts(torch.tensor([[5, 6, 7]]), new_tokens=12, mask_id=66)
    params = DecodingParams(policy=policy)
    [trace] = traces_of(model, canvas, params, entropies=12)
    assert ar_ness(trace.steps, Conventions()) == obvious(trace.steps, [], Conventions())
    logits = model(canvas.tokens)[0, 3:].detach()  # (12, V)
    logits[:, 66] = -torch.inf
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    assert trace.entropy_map[0] == pytest.approx(entropy.numpy(), rel=1e-2)


def test_recording_entropies_changes_nothing_else(causal_lm: Callable[..., Any]) -> None:
    model = Denoiser.from_causal_lm(causal_lm(), mask_id=66)
    canvas = Canvas.from_prompts(torch.tensor([[5, 6], [7, 8]]), new_tokens=12, mask_id=66)
    several = [{}, {"threshold": 0.5}, {"block": 4, "cache": "dual"}, {"cache": "delayed"}]
    for changes in several:
        params = DecodingParams(temperature=0.8, **changes)  # type: ignore[arg-type]
        plain, told = (list(denoise(model, canvas, params, entropies=n)) for n in (0, 3))
        assert [step.entropy is None for step in told] == [step.index >= 3 for step in told]
        assert all(step.entropy is None for step in plain)
        for one, other in zip(plain, told, strict=True):
            assert torch.equal(one.canvas, other.canvas)
            assert torch.equal(one.log_prob, other.log_prob)


# --- classes of tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "classes"),
    [
        (["def", " f", "(x", "):", "\n    "], ["keyword", "name", "operator", "operator", "indentation"]),
        (["x", " =", " 'a", " b'", "  # c", " d"], ["name", "operator", "literal", "literal", "comment", "comment"]),
        (["return", " not", " 1", "2"], ["keyword", "keyword", "literal", "literal"]),
        (["x", " = ", "(", "1", "\n", "$$"], ["name", "operator", "operator", "literal", "indentation", "text"]),
        (
            ["Here:", "\n```python\n", "x", " = 1", "\n```"],
            ["text", "text", "name", "operator", "text"],
        ),
        (
            ["if", " x", ":\n", "\t\ty\n", " ", "(", "z", " ="],
            [*"keyword name operator name".split(), "indentation", *"operator name operator".split()],
        ),
        (
            ["x", " = ", "1", "\n\f\n", "y", " = ", "'\u2028'"],
            [*"name operator literal".split(), "indentation", *"name operator literal".split()],
        ),
        ([], []),
    ],
)
def test_tokens_are_classed_by_pythons_tokenizer(pieces: list[str], classes: list[str]) -> None:
    assert token_classes(pieces) == classes


def test_a_character_split_over_tokens_is_the_last_ones(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x = 'é'\n")
    trace = Trace(
        tokens=[0, *ids],
        prompt_length=1,
        steps=list(range(len(ids))),
        confidence=[1.0] * len(ids),
        log_probs=[0.0] * len(ids),
        forward_passes=len(ids),
    )
    answer = Answer.of(trace, tokenizer, task="x")
    assert "".join(answer.pieces) == "x = 'é'\n"
    assert answer.classes[0] == "name"
    assert answer.classes[-1] in ("literal", "indentation")


# --- runs ------------------------------------------------------------------------------------------------------------


def trace_of(steps: list[int], *, prompt: int = 1, **more: Any) -> Trace:
    size = len(steps)
    return Trace(
        tokens=[prompt, *range(5, 5 + size)],
        prompt_length=1,
        steps=steps,
        confidence=[0.5] * size,
        log_probs=[-0.7] * size,
        forward_passes=size,
        **{"model": "tiny", **more},
    )


def answers(tokenizer: Tokenizer, passes: dict[str, list[bool]], steps: Callable[[], list[int]]) -> list[Answer]:
    return [
        Answer.of(trace_of(steps()), tokenizer, task=task, passed=passed)
        for task, own in passes.items()
        for passed in own
    ]


def test_figures_are_means_over_prompts_with_counts(tokenizer: Tokenizer) -> None:
    draw = np.random.default_rng(0)
    passes = {"a": [True, False], "b": [False, False], "c": [True, True]}
    own = answers(tokenizer, passes, lambda: draw.permutation(6).tolist())
    told = analyse(labelled([Run({"model": "m"}, own)]), Conventions())["runs"][0]
    assert (told["prompts"], told["samples"], told["graded"]) == (3, 6, 6)
    figures = told["figures"]
    assert figures["pass@1"]["mean"] == pytest.approx(0.5)
    assert figures["pass@2"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    by_task = [np.mean([answer.ar_ness(Conventions())[1][0] for answer in own[at : at + 2]]) for at in (0, 2, 4)]
    found = figures["global_ar_ness@1"]
    assert found["mean"] == pytest.approx(np.mean(by_task), abs=1e-6)
    assert min(by_task) - 1e-6 <= found["low"] <= found["mean"] <= found["high"] <= max(by_task) + 1e-6
    assert found["prompts"] == 3
    assert [f"local_ar_ness@{k}" in figures for k in LOCAL] == [True] * 9
    assert figures["local_ar_ness@9"] == {"mean": None, "low": None, "high": None, "prompts": 0}  # six tokens


def test_a_run_that_solves_nothing_has_wilsons_interval_and_its_other_figures_a_bootstrap(tokenizer: Tokenizer) -> None:
    own = answers(tokenizer, {"a": [False], "b": [False], "c": [False]}, lambda: [0, 1, 2, 3])
    report = analyse(labelled([Run({"model": "m"}, own)] * 2), Conventions())
    figures = report["runs"][0]["figures"]
    assert figures["pass@1"] == {"mean": 0, "low": 0, "high": pytest.approx(0.5615, abs=1e-4), "prompts": 3}
    assert figures["revisions"] == {"mean": 0, "low": 0, "high": 0, "prompts": 3}
    assert report["differences"][0]["figures"]["pass@1"]["high"] == 0  # not a share


def test_runs_are_compared_prompt_by_prompt(tokenizer: Tokenizer) -> None:
    one = answers(tokenizer, {"a": [True], "b": [True], "c": [False]}, lambda: [0, 1, 2, 3])
    other = answers(tokenizer, {"b": [True], "c": [True], "d": [True]}, lambda: [3, 2, 1, 0])
    runs = labelled([Run({"model": "m", "steps": 64}, one), Run({"model": "m", "steps": 32}, other)])
    assert [run.label for run in runs] == ["steps 64", "steps 32"]
    [difference] = analyse(runs, Conventions())["differences"]
    assert (difference["a"], difference["b"], difference["prompts"]) == ("steps 64", "steps 32", 2)
    assert difference["figures"]["pass@1"]["mean"] == 0.5
    assert difference["figures"]["global_ar_ness@1"]["mean"] == 1 / 4 - 1


def test_the_same_traces_give_the_same_report(tokenizer: Tokenizer) -> None:
    own = answers(tokenizer, {"a": [True], "b": [False]}, lambda: [2, 0, 1])
    first, again = (analyse(labelled([Run({"model": "m"}, own)]), Conventions()) for _ in range(2))
    assert first == again


def test_files_of_traces_are_runs_by_model_and_setting(tmp_path: Path) -> None:
    traces = [trace_of([0, 1], params={"temperature": heat, "seed": n}) for heat in (0.2, 1.2) for n in range(3)]
    write_traces(tmp_path / "some.jsonl", traces[:4])
    write_traces(tmp_path / "more.jsonl", traces[4:])
    runs = read_runs([tmp_path / "some.jsonl", tmp_path / "more.jsonl"])
    assert [(run.label, len(run.answers)) for run in runs] == [("temperature 0.2", 3), ("temperature 1.2", 3)]
    assert {answer.task for run in runs for answer in run.answers} == {runs[0].answers[0].task}


def test_what_holds_no_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no traces"):
        read_runs([tmp_path])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="there is no trace"):
        read_runs([tmp_path / "empty.jsonl"])


def test_the_mean_map_is_of_what_was_scored() -> None:
    one, other = np.array([[1.0, 2.0], [np.nan, 3.0]]), np.array([[3.0, 4.0, 5.0], [1.0, np.nan, 7.0]])
    found = mean_map([one, other])
    assert np.array_equal(found, [[2, 3, 5], [1, 3, 7]])
    assert mean_map([np.ones((128, 256))]).shape == (64, 64)
    assert mean_map([np.ones((1, 4))]).size == 0  # the first pass alone is no map


def test_the_shipped_model_is_read_with_its_text(tmp_path: Path) -> None:
    coder = DiffuCoder.load(dtype=torch.float32)
    result = coder.generate("Given a number, double the number.", DecodingParams(new_tokens=24, steps=24))
    write_traces(tmp_path / "one.jsonl", [result.trace])
    [run] = read_runs([tmp_path / "one.jsonl"])
    [answer] = run.answers
    assert "".join(answer.pieces).startswith(result.text)
    assert answer.length == len(result.tokens) + 1
    assert {"keyword", "name", "operator", "indentation", "end"} <= set(answer.classes)
