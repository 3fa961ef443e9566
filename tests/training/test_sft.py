"""Chat rows, law by law, and small real runs: a model that answers, with a pad of its own."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parents
import pytest
import torch
from stores import Lab, chats

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.errors import ConfigError
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer
from diffucoder.tokenizer import PAD_TOKEN
from diffucoder.training.data import TokenStore
from diffucoder.training.masked import HELD_OUT, Row
from diffucoder.training.settings import SftSettings
from diffucoder.training.sft import ChatRows, sft

PAD, BATCH, LENGTH, ANSWER = 1, 4, 40, 4
LENGTHS = [8 + at * 7 % 29 for at in range(64)]  # one group of 16 steps; 8 to 36 tokens, in no order
QUICK = DecodingParams(new_tokens=6, steps=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return chats(tmp_path_factory.mktemp("store") / "store", LENGTHS, answer=ANSWER)


def rows_of(store: TokenStore, **changes: Any) -> ChatRows:
    given = {"steps": 160, "batch": BATCH, "lr": 1e-3, "length": LENGTH, **changes}
    return ChatRows(store, SftSettings(run="x", data=("x",), **given), pad_id=PAD)


def step_of(rows: ChatRows, step: int) -> list[Row]:
    return [rows.row(step, index) for index in range(rows.settings.batch)]


def example(row: Row) -> int:
    """Which example of the store a row is."""
    return int(row.tokens[0]) - 10


def longest(rows: list[Row]) -> int:
    return max(LENGTHS[example(row)] for row in rows)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_an_example_and_pads_which_may_be_hidden_like_its_answer(store: TokenStore) -> None:
    for row in step_of(rows_of(store, ramp=0), 0):
        size = LENGTHS[example(row)]
        assert row.tokens.tolist() == [10 + example(row)] * size + [PAD] * (LENGTH - size)
        assert row.maskable.tolist() == [False] * ANSWER + [True] * (LENGTH - ANSWER)


@pytest.mark.parametrize("padding", ["fixed", "flexible"])
def test_every_epoch_reads_every_example_once_in_an_order_of_its_own(store: TokenStore, padding: str) -> None:
    rows = rows_of(store, padding=padding)
    epochs = [[example(row) for step in range(at, at + 16) for row in step_of(rows, step)] for at in (0, 16, 32)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("padding", ["fixed", "flexible"])
def test_a_row_is_a_function_of_step_and_number(store: TokenStore, padding: str) -> None:
    ahead = rows_of(store, padding=padding, infill=0.5)
    for step in range(0, 100, 9):
        step_of(ahead, step)
    for left, right in zip(ahead.row(37, 2), rows_of(store, padding=padding, infill=0.5).row(37, 2), strict=True):
        assert torch.equal(left, right)


def test_fixed_rows_are_as_long_as_the_setting(store: TokenStore) -> None:
    rows = rows_of(store)
    assert {rows.width(step) for step in (*range(20), HELD_OUT)} == {LENGTH}
    assert {len(row.tokens) for row in step_of(rows, 3)} == {LENGTH}


def test_flexible_rows_are_as_long_as_the_longest_of_their_step(store: TokenStore) -> None:
    rows = rows_of(store, padding="flexible")
    for step in range(16):
        found = step_of(rows, step)
        assert {len(row.tokens) for row in found} == {rows.width(step)} == {longest(found)}


def test_steps_of_a_group_are_sorted_stretches_of_it_in_any_order(store: TokenStore) -> None:
    rows = rows_of(store, padding="flexible")
    sizes = [sorted(LENGTHS[example(row)] for row in step_of(rows, step)) for step in range(16)]
    assert [size for step in sorted(sizes) for size in step] == sorted(LENGTHS)
    assert sizes != sorted(sizes)


def test_spare_pads_stand_behind_a_share_of_the_steps_and_never_beyond_the_length(store: TokenStore) -> None:
    rows = rows_of(store, padding="flexible", spare=3, spare_share=0.5)
    spare = Counter(rows.width(step) - longest(step_of(rows, step)) for step in range(800))
    assert set(spare) == {0, 1, 2, 3}
    for pads in (1, 2, 3):  # an eighth each: a half of the steps draws from 0 to 3
        assert spare[pads] == pytest.approx(100, abs=50)
    many = rows_of(store, padding="flexible", spare=1000, spare_share=1.0)
    widths = [many.width(step) for step in range(50)]
    assert max(widths) == LENGTH
    assert all(len(row.tokens) == widths[7] for row in step_of(many, 7))


def test_requests_come_to_be_left_clean_over_the_first_part_of_the_run(store: TokenStore) -> None:
    rows = rows_of(store, steps=100, ramp=0.2, batch=400)

    def clean(step: int) -> float:
        found = step_of(rows, step)
        assert all(row.maskable[ANSWER:].all() for row in found)
        assert all(row.maskable[:ANSWER].all() or not row.maskable[:ANSWER].any() for row in found)
        return sum(not row.maskable[0] for row in found) / 400

    assert clean(0) == 0
    for step, share in ((5, 0.25), (10, 0.5), (15, 0.75)):
        assert clean(step) == pytest.approx(share, abs=5 * (share * (1 - share) / 400) ** 0.5)
    assert [clean(step) for step in (20, 21, 99)] == [1, 1, 1]


def test_without_a_ramp_requests_are_clean_from_the_start(store: TokenStore) -> None:
    assert not any(row.maskable[:ANSWER].any() for row in step_of(rows_of(store, ramp=0), 0))


def test_infill_rows_hide_spans_of_the_answer_alone(store: TokenStore) -> None:
    rows = rows_of(store, infill=1.0)
    found = [row for step in range(30) for row in step_of(rows, step)]
    for row in found:
        size = LENGTHS[example(row)]
        assert not row.maskable[:ANSWER].any()
        assert not row.maskable[size:].any()
    shares = [float(row.maskable.sum()) / (LENGTHS[example(row)] - ANSWER) for row in found]
    assert 0.3 < sum(shares) / len(shares) < 0.6
    mixed = rows_of(store, infill=0.3, batch=500, ramp=0)
    spans = sum(not row.maskable[LENGTHS[example(row)] :].any() for row in step_of(mixed, 0))
    assert spans / 500 == pytest.approx(0.3, abs=5 * (0.21 / 500) ** 0.5)


@pytest.mark.parametrize("padding", ["fixed", "flexible"])
def test_held_out_requests_are_clean_and_come_in_their_order(store: TokenStore, padding: str) -> None:
    rows = rows_of(store, padding=padding, infill=1.0)
    found = [rows.row(HELD_OUT, index) for index in range(70)]
    assert [example(row) for row in found] == [*range(64), *range(6)]
    width = rows.width(HELD_OUT)
    assert width == (LENGTH if padding == "fixed" else max(LENGTHS))
    assert all(torch.equal(row.maskable, torch.arange(width) >= ANSWER) for row in found)


def test_examples_that_are_too_long_are_left_out_and_those_that_just_fit_are_not(store: TokenStore) -> None:
    rows = rows_of(store, length=20, batch=1)
    fitting = [at for at, size in enumerate(LENGTHS) if size <= 20]
    read = [example(rows.row(step, 0)) for step in range(len(fitting))]
    assert sorted(read) == fitting
    assert 20 in {LENGTHS[at] for at in read}
    assert {example(rows.row(HELD_OUT, index)) for index in range(64)} == set(fitting)


def test_an_epoch_is_of_the_examples_that_fit(store: TokenStore) -> None:
    assert rows_of(store, steps=0, epochs=2.5).steps == 40
    fitting = sum(size <= 20 for size in LENGTHS)
    assert rows_of(store, steps=0, epochs=2, length=20).steps == 2 * fitting // BATCH
    assert rows_of(store, steps=0, epochs=0.01).steps == 1
    assert rows_of(store, steps=7, epochs=2).steps == 7


def test_a_length_that_nothing_fits_is_refused(store: TokenStore) -> None:
    assert rows_of(store, length=8).fitting.tolist() == [at for at, size in enumerate(LENGTHS) if size == 8]
    short = chats(store.folder.with_name("long"), [20, 30])
    with pytest.raises(ConfigError, match="length=19 is shorter than every example; raise it"):
        rows_of(short, length=19)


# --- runs ------------------------------------------------------------------------------------------------------------


def settings(lab: Lab, model: Path, run: Path, **changes: Any) -> SftSettings:
    given = {**lab.common, "model": str(model), "data": (str(lab.chats),), "length": 64, **changes}
    return SftSettings(run=run, **given)


def answer(folder: Path) -> str:
    return DiffuCoder.load(folder, dtype=torch.float32, device="cpu").generate("Add 1.", QUICK).text


@pytest.mark.parametrize(
    "changes",
    [{"bf16": False}, {"bf16": True, "padding": "flexible", "spare": 8, "infill": 0.3, "gradient_checkpointing": True}],
)
def test_a_denoiser_learns_to_answer(lab: Lab, adapted: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run = tmp_path / "run"
    chosen = settings(
        lab, adapted, run, steps=12, log_every=1, held_out=(str(lab.chats),), normaliser="length", **changes
    )
    assert isinstance(answer(sft(chosen)), str)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert lines[-1]["unweighted"] < lines[0]["unweighted"] - 1
    assert 0 < lines[-1]["held_out_loss"] < 20


def test_epochs_say_how_many_steps_there_are(lab: Lab, adapted: Path, tmp_path: Path) -> None:
    sft(settings(lab, adapted, tmp_path / "run", steps=0, epochs=1.4))  # 30 chats, 4 a step
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["steps"] == 10
    again = settings(lab, adapted, tmp_path / "run", steps=0, epochs=1.4, resume=True)
    assert sft(again) == tmp_path / "run" / "model"


def test_a_parent_that_pads_with_its_end_of_text_gets_a_pad_of_its_own(
    lab: Lab, causal_lm: Callable[..., Any], tmp_path: Path
) -> None:
    source = parents.write_folder(tmp_path / "parent", causal_lm(vocab_size=300), parents.tokenizer())
    assert load_tokenizer(source).pad_id in load_tokenizer(source).terminator_ids
    folder = sft(settings(lab, source, tmp_path / "run"))
    tokenizer, denoiser = load_tokenizer(folder), load_denoiser(folder, device="cpu")
    assert tokenizer.backend.id_to_token(tokenizer.pad_id) == PAD_TOKEN
    assert (tokenizer.mask_id, tokenizer.pad_id) == (300, 301)
    assert (denoiser.mask_id, denoiser.config.pad_token_id, denoiser.vocab_size) == (300, 301, 302)
    assert isinstance(answer(folder), str)
    assert load_tokenizer(sft(settings(lab, folder, tmp_path / "again"))).pad_id == 301


def test_a_pad_of_its_own_is_kept(lab: Lab, adapted: Path, tmp_path: Path) -> None:
    folder = sft(settings(lab, adapted, tmp_path / "run"))
    assert load_tokenizer(folder).pad_id == load_tokenizer(adapted).pad_id
    assert load_denoiser(folder, device="cpu").vocab_size == 300


def test_examples_that_are_too_long_are_counted_on_one_line(
    lab: Lab, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft(settings(lab, adapted, tmp_path / "all", steps=1))
    assert "left out" not in capsys.readouterr().err
    sft(settings(lab, adapted, tmp_path / "some", steps=1, length=40, held_out=(str(lab.chats),)))
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    for line, source in zip(said, ("data", "held_out"), strict=True):
        rule = rf"left out (\d+) of 30 examples of {source}, which are longer than length=40; "
        match = re.fullmatch(rule + r"the first is number \d+, with (\d+) tokens", line)
        assert match is not None, line
        assert 0 < int(match[1]) < 30
        assert int(match[2]) > 40


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("nowhere",)}, "'nowhere' is not a folder or a file; check the path"),
        ({"length": 10}, "length=10 is shorter than every example; raise it"),
        ({"length": 129}, "length=129 exceeds the model's context of 128; lower it to 128 or less"),
        ({"spare": 4}, "^spare=4 needs padding='flexible'; fixed rows are always padded to length"),
        ({"epochs": 0}, "epochs=0: input should be greater than 0"),
        ({"ramps": 0.1}, "unknown setting 'ramps'; did you mean 'ramp'"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    lab: Lab, adapted: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        sft(settings(lab, adapted, tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_documents_are_no_chats(lab: Lab, adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of 30 records of .* can be used; the first: .*:1: has neither"):
        sft(settings(lab, adapted, tmp_path / "run", data=(str(lab.corpus),)))
