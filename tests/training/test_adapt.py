"""Packed rows, law by law, and small real runs: a parent becomes a denoiser that loads and writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import parents
import pytest
import torch
from safetensors.torch import load_file
from stores import Lab, counting

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer
from diffucoder.models.convert import convert
from diffucoder.training.adapt import PackedRows, adapt
from diffucoder.training.data import TokenStore
from diffucoder.training.masked import HELD_OUT, Row
from diffucoder.training.settings import AdaptSettings

CONTEXT, BATCH = 40, 5
QUICK = DecodingParams(new_tokens=6, steps=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Thirty windows, and a rest that fills none."""
    return counting(tmp_path_factory.mktemp("store") / "store", 30 * CONTEXT + 11)


def rows_of(store: TokenStore, **shares: float) -> PackedRows:
    return PackedRows(store, context=CONTEXT, batch=BATCH, seed=shares.pop("seed", 0), **shares)  # type: ignore[arg-type]


def drawn(rows: PackedRows, count: int) -> list[Row]:
    return [rows.row(index // BATCH, index % BATCH) for index in range(count)]


def windows(rows: PackedRows, steps: range) -> list[int]:
    """Which window each row of the steps is."""
    return [int(rows.row(step, index).tokens[0]) // CONTEXT for step in steps for index in range(BATCH)]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_a_window_of_consecutive_tokens_all_of_which_may_be_hidden(store: TokenStore) -> None:
    for row in drawn(rows_of(store), 30):
        first = int(row.tokens[0])
        assert first % CONTEXT == 0
        assert row.tokens.tolist() == list(range(first, first + CONTEXT))
        assert row.maskable.tolist() == [True] * CONTEXT


def test_every_epoch_reads_every_window_once_in_an_order_of_its_own(store: TokenStore) -> None:
    rows = rows_of(store)
    epochs = [windows(rows, range(6 * epoch, 6 * epoch + 6)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(30))]}) == 4
    assert windows(rows_of(store, seed=1), range(6)) != epochs[0]


def test_a_row_is_a_function_of_step_and_number(store: TokenStore) -> None:
    shares = {"random_length": 0.3, "clean_prefix": 0.3, "infill": 0.3}
    ahead = rows_of(store, **shares)
    drawn(ahead, 50)
    for left, right in zip(ahead.row(7, 2), rows_of(store, **shares).row(7, 2), strict=True):
        assert torch.equal(left, right)


def test_a_cut_row_has_any_length_from_two_on(store: TokenStore) -> None:
    found = drawn(rows_of(store, random_length=1.0), 4000)
    lengths = np.array([len(row.tokens) for row in found])
    counts = np.bincount(lengths, minlength=CONTEXT + 1)
    assert (counts[:2] == 0).all()
    expected = 4000 / (CONTEXT - 1)
    assert np.abs(counts[2:] - expected).max() < 5 * expected**0.5
    assert all(len(row.maskable) == len(row.tokens) and row.maskable.all() for row in found)


def test_a_clean_prefix_has_any_length_and_all_behind_it_may_be_hidden(store: TokenStore) -> None:
    found = drawn(rows_of(store, clean_prefix=1.0), 1000)
    prefixes = [CONTEXT - int(row.maskable.sum()) for row in found]
    assert set(prefixes) == set(range(2, CONTEXT + 1))
    for row, prefix in zip(found, prefixes, strict=True):
        assert torch.equal(row.maskable, torch.arange(CONTEXT) >= prefix)


def test_infill_rows_hide_spans_alone(store: TokenStore) -> None:
    found = drawn(rows_of(store, infill=1.0), 500)
    shares = [float(row.maskable.float().mean()) for row in found]
    assert 0.3 < sum(shares) / 500 < 0.6  # one to three spans of a third each, which overlap
    stretches = [int((row.maskable.int().diff() > 0).sum() + row.maskable[0]) for row in found]
    assert {1, 2, 3} <= set(stretches) <= {0, 1, 2, 3}


def test_rows_are_cut_begun_clean_or_noised_in_spans_by_their_shares(store: TokenStore) -> None:
    found = drawn(rows_of(store, random_length=0.2, clean_prefix=0.3, infill=0.1), 6000)
    cut = [row for row in found if len(row.tokens) < CONTEXT]
    plain = [row for row in found if len(row.tokens) == CONTEXT and row.maskable.all()]
    begun = [row for row in found if torch.equal(row.maskable, row.maskable.sort().values) and not row.maskable.all()]
    assert len(cut) / 6000 == pytest.approx(0.2, abs=0.02)
    assert len(plain) / 6000 == pytest.approx(0.4, abs=0.03)  # and a row cut at its very end
    assert len(begun) / 6000 == pytest.approx(0.3, abs=0.03)  # and spans that happen to end the row


def test_held_out_rows_are_plain_windows_in_their_order_over_and_over(store: TokenStore) -> None:
    rows = rows_of(store)
    for index in (0, 3, 29, 30):
        row = rows.row(HELD_OUT, index)
        assert int(row.tokens[0]) == index % 30 * CONTEXT
        assert row.maskable.all()


def test_rows_may_be_as_long_as_all_the_data_but_no_longer(store: TokenStore) -> None:
    whole = PackedRows(store, context=store.tokens, batch=2, seed=0)
    assert whole.row(5, 1).tokens.tolist() == list(range(store.tokens))
    with pytest.raises(ConfigError, match=r"has 1,211 tokens, no row of 1212; lower context or add data"):
        PackedRows(store, context=store.tokens + 1, batch=2, seed=0)


# --- runs ------------------------------------------------------------------------------------------------------------


def settings(lab: Lab, model: Path, run: Path, **changes: Any) -> AdaptSettings:
    given = {**lab.common, "model": str(model), "data": (str(lab.corpus),), "context": 32, **changes}
    return AdaptSettings(run=run, **given)


def write(folder: Path) -> str:
    """What the model of a folder continues a prompt with."""
    coder = DiffuCoder.load(folder, dtype=torch.float32, device="cpu")
    return coder.generate("def f(xs):", QUICK, chat=False).text


@pytest.mark.parametrize("bf16", [False, True])
def test_a_parent_becomes_a_dream_checkpoint_that_writes(lab: Lab, parent: Path, tmp_path: Path, bf16: bool) -> None:
    before = (parent / "model.safetensors").read_bytes()
    shares = {"random_length": 0.3, "clean_prefix": 0.3, "infill": 0.2}
    held_out = {"held_out": (str(lab.corpus),), "log_every": 1}
    folder = adapt(settings(lab, parent, tmp_path / "run", bf16=bf16, anneal_steps=2, **shares, **held_out))
    assert folder == tmp_path / "run" / "model"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "Dream"
    assert isinstance(write(folder), str)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 < line["loss"] < 100 for line in lines)
    assert 0 < lines[-1]["held_out_loss"] < 20
    assert (parent / "model.safetensors").read_bytes() == before


def test_the_shipped_model_is_where_a_run_begins_if_none_is_named(lab: Lab, tmp_path: Path) -> None:
    chosen = settings(lab, tmp_path, tmp_path / "run", steps=1, batch=1)
    folder = adapt(chosen.model_copy(update={"model": None}))
    assert load_denoiser(folder, device="cpu").config.hidden_size == 256


@pytest.mark.parametrize(("kind", "tied"), [("qwen2", False), ("llama", True), ("qwen3", False)])
def test_parents_from_elsewhere_are_adapted_as_they_come(
    lab: Lab, causal_lm: Callable[..., Any], tmp_path: Path, kind: str, tied: bool
) -> None:
    model = causal_lm(kind, vocab_size=300, tie_word_embeddings=tied)
    source = parents.write_folder(tmp_path / "parent", model, parents.tokenizer())
    folder = adapt(settings(lab, source, tmp_path / "run", export_dtype="float32"))
    assert isinstance(write(folder), str)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.mask_id, tokenizer.pad_id) == (300, 2)  # the mask is new, pads are still an end of text
    # Dream cannot say Qwen3's norms; and a tied head is written out
    assert (folder / "diffucoder.json").exists() == (kind == "qwen3")
    weights = load_file(folder / "model.safetensors")
    assert weights["lm_head.weight"].shape == weights["model.embed_tokens.weight"].shape == (301, 32)
    if tied:
        assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        assert not torch.equal(weights["lm_head.weight"][:300], model.lm_head.weight)  # it has learned


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_leave_a_model_that_loads_like_any_other(lab: Lab, parent: Path, tmp_path: Path, bf16: bool) -> None:
    chosen = settings(lab, parent, tmp_path / "run", bf16=bf16, lora_rank=2, export_dtype="float32")
    folder = adapt(chosen)
    assert isinstance(write(folder), str)
    before, after = (load_file(place / "model.safetensors") for place in (parent, folder))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.allclose(before[name], after[name], rtol=1e-2)}
    assert changed
    assert all(name.endswith("proj.weight") for name in changed)


def test_unshifted_rows_survive_saving_loading_and_another_stage(lab: Lab, parent: Path, tmp_path: Path) -> None:
    first = adapt(settings(lab, parent, tmp_path / "first", shifted=False))
    second = adapt(settings(lab, first, tmp_path / "second"))
    for folder in (first, second):
        assert not load_denoiser(folder, device="cpu").shifted
        assert not DiffuCoder.load(folder).model.shifted
        assert isinstance(write(folder), str)
    back = adapt(settings(lab, first, tmp_path / "back", shifted=True))
    assert load_denoiser(back, device="cpu").shifted
    assert not (back / "diffucoder.json").exists()


def test_a_finished_run_writes_its_model_again(lab: Lab, parent: Path, tmp_path: Path) -> None:
    chosen = settings(lab, parent, tmp_path / "run", ema=0.9)
    weights = (adapt(chosen) / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    again = adapt(chosen.model_copy(update={"resume": True}))
    assert (again / "model.safetensors").read_bytes() == weights


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("nowhere",)}, "'nowhere' is not a folder or a file; check the path"),
        ({"held_out": ("nowhere",)}, "'nowhere' is not a folder or a file; check the path"),
        ({"context": 129}, "context=129 exceeds the model's context of 128; lower it to 128 or less"),
        ({"batch": 4, "micro_batch": 3}, "batch=4 does not split into micro-batches of 3 rows"),
        ({"normaliser": "mean"}, "normaliser='mean': input should be 'length', 'masked' or 'masked_micro'"),
        ({"time": "late"}, "time='late': input should be 'uniform', 'stratified' or 'antithetic'"),
        ({"seed": 2**63}, "seed=9223372036854775808: input should be less than"),
        ({"eps": 0}, "eps=0: input should be greater than 0"),
        ({"anneal": 3}, "unknown setting 'anneal'; did you mean 'anneal_steps'"),
        ({"lora_rank": 2, "lora_targets": ("qkv",)}, "lora_targets=.* are not in this model"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    lab: Lab, parent: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        adapt(settings(lab, parent, tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "settings.json").exists()


def test_data_that_fill_no_row_are_one_line(lab: Lab, parent: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ConfigError, match=r"has \d tokens, no row of 32; lower context or add data"):
        adapt(settings(lab, parent, tmp_path / "run", data=(str(tmp_path / "short.jsonl"),)))


def test_a_model_that_is_none_is_one_line(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'/no/such/folder' is not a folder"):
        adapt(settings(lab, Path("/no/such/folder"), tmp_path / "run"))


# --- one matrix for embeddings and head ------------------------------------------------------------------------------


@pytest.fixture
def start(causal_lm: Callable[..., Any], tmp_path: Path) -> Path:
    """A denoiser of a Llama whose head is its embeddings, as Dream stores it: twice."""
    model = causal_lm("llama", vocab_size=300, tie_word_embeddings=True)
    source = parents.write_folder(tmp_path / "tied", model, parents.tokenizer())
    convert(source, tmp_path / "start")
    return tmp_path / "start"


def ends(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    weights = load_file(folder / "model.safetensors")
    return weights["model.embed_tokens.weight"], weights["lm_head.weight"]


def test_what_is_trained_tied_is_tied_at_the_end_and_what_is_not_is_not(lab: Lab, start: Path, tmp_path: Path) -> None:
    tied = adapt(settings(lab, start, tmp_path / "a", tied=True, export_dtype="float32"))
    assert torch.equal(*ends(tied))
    assert not torch.equal(ends(tied)[0], ends(start)[0])
    apart = adapt(settings(lab, start, tmp_path / "b", export_dtype="float32"))
    assert not torch.equal(*ends(apart))
    with pytest.raises(ConfigError, match="tied=true but the model's embeddings and head differ"):
        adapt(settings(lab, apart, tmp_path / "c", tied=True))


def test_a_tied_run_that_was_cut_goes_on_to_the_same_bytes(lab: Lab, start: Path, tmp_path: Path) -> None:
    def chosen(run: str, **changes: Any) -> AdaptSettings:
        return settings(lab, start, tmp_path / run, tied=True, steps=4, save_every=2, keep=3, **changes)

    whole = adapt(chosen("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "cut" / "model")
    again = adapt(chosen("cut", resume=True))
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
