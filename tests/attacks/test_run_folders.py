"""Run folders that strangers made: resuming one runs no code of theirs, and is one line of error."""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from diffucoder import files
from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.files import write_json
from diffucoder.training import checkpoints
from diffucoder.training.settings import TrainSettings

DEEP = "[" * 100_000


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


UNPICKLE = r"import (pickle|dill|joblib|shelve|yaml)|torch\.load\(|pickle\.load|allow_pickle=|trust_remote_code="


def test_no_file_of_the_package_unpickles() -> None:
    """Nothing that runs code of a file that it reads; `marshal`, into the sandbox, does not."""
    for path in Path(files.__file__).parent.rglob("*.py"):
        assert not re.search(UNPICKLE, path.read_text()), path


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    """A run folder with one checkpoint, of step 1."""
    run = tmp_path / "run"
    checkpoints.save(run, 1, _state(), _accelerator(), keep=2)
    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def _accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def _state() -> checkpoints.State:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return checkpoints.State(model, torch.optim.AdamW(model.parameters(), lr=1e-3), {}, {})


def _load(run: Path) -> int:
    return checkpoints.load_newest(run, _state(), _accelerator())


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], sharding: object = None) -> None:
    """Change the tensors of a checkpoint, and let whole.json agree."""
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    where = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in tensors.items()}
    information = json.dumps(where if sharding is None else sharding)
    save_file(tensors, path, metadata={"format": "pt", "DCP_SHARDING_INFO": information})
    _agree(folder)


def _agree(folder: Path) -> None:
    write_json(folder / "whole.json", {"step": 1, "files": checkpoints._sizes_and_checksums(folder)})


def test_a_checkpoint_of_ones_own_is_read(saved: Path) -> None:
    assert _load(saved) == 1
    assert {path.suffix for path in (saved / "checkpoints/step-00000001").iterdir()} == {".safetensors", ".json"}


def test_a_checkpoint_of_many_files_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_FILE_SIZE", 20)
    state = _state()
    state.model(torch.ones(1, 4)).sum().backward()
    state.optimizer.step()
    checkpoints.save(tmp_path, 1, state, _accelerator(), keep=2)
    assert len(list((tmp_path / "checkpoints/step-00000001").glob("*.safetensors"))) > 2
    other = _state()
    assert checkpoints.load_newest(tmp_path, other, _accelerator()) == 1
    for one, same in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, same)
        assert torch.equal(state.optimizer.state[one]["exp_avg"], other.optimizer.state[same]["exp_avg"])
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_checkpoint_that_is_a_pickle_runs_no_code(saved: Path, tmp_path: Path) -> None:
    folder = saved / "checkpoints" / "step-00000001"
    (folder / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "marker")))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Harmful(tmp_path / "marker")))
    _agree(folder)
    with pytest.raises(CheckpointError, match="has the format of an earlier version"):
        _load(saved)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "listed",
    [
        "[]",
        "{}",
        DEEP,
        "",
        '{"files": []}',
        '{"files": {"../../../secret": [1, 1]}}',
        '{"files": {"/dev/zero": [0, 0]}}',
        '{"files": {"a\\u0000b": [0, 0]}}',
        '{"files": {"\\u001b[2J": [0, 0]}}',
    ],
)
def test_a_hostile_list_of_files_is_a_torn_checkpoint(saved: Path, capsys: Any, listed: str) -> None:
    (saved / "checkpoints/step-00000001/whole.json").write_text(listed)
    assert _load(saved) == 0
    err = capsys.readouterr().err
    assert "is torn" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("name", ["whole.json", "shard-00001-model-00001-of-00001.safetensors", "x.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_file_is_a_torn_checkpoint(saved: Path, name: str, kind: str) -> None:
    path = saved / "checkpoints/step-00000001" / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert _load(saved) == 0


MOMENT = "optimizer.weight.exp_avg"
CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "a shape": lambda tensors: tensors.update({MOMENT: torch.zeros(1000, 1000)}),
    "more dimensions": lambda tensors: tensors.update({MOMENT: torch.zeros(4, 3, 1)}),
    "no dimensions": lambda tensors: tensors.update({MOMENT: torch.zeros(())}),
    "a tensor that is lost": lambda tensors: tensors.pop(MOMENT),
    "nothing": lambda tensors: tensors.clear(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_are_not_this_runs_are_one_line(saved: Path, name: str) -> None:
    _rewrite(saved / "checkpoints/step-00000001", CHANGES[name])
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be read \(.*\); delete it") as caught:
        _load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float16, torch.float8_e4m3fn, torch.complex64])
def test_tensors_of_another_dtype_are_numbers_or_one_line(saved: Path, dtype: torch.dtype) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        for each in list(tensors):
            tensors[each] = tensors[each].to(dtype)

    _rewrite(saved / "checkpoints/step-00000001", convert)
    with suppress(CheckpointError):
        assert _load(saved) == 1


@pytest.mark.parametrize(
    "sharding",
    [
        [],
        {},
        {MOMENT: 5},
        {MOMENT: {"saved_offsets": ["a", "b"]}},
        {MOMENT: {"saved_offsets": [10**15, 0]}},
        {MOMENT: {"saved_offsets": [-1, 0]}},
        {MOMENT: {"saved_offsets": [10**30, 0]}},
    ],
)
def test_offsets_that_lie_are_one_line(saved: Path, sharding: Any) -> None:
    folder = saved / "checkpoints/step-00000001"
    if MOMENT in sharding:
        [path] = folder.glob("*.safetensors")
        honest = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in load_file(path).items()}
        sharding = honest | sharding
    _rewrite(folder, lambda tensors: None, sharding)
    with pytest.raises(CheckpointError, match="cannot be read"):
        _load(saved)


@pytest.mark.parametrize(
    "content",
    [
        b"junk",
        (2**63).to_bytes(8, "little") + b"{}",
        b"".join(
            [(70).to_bytes(8, "little"), b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,8]}}      ']
        ),
    ],
)
def test_a_file_of_tensors_that_lies_about_its_size_is_one_line(saved: Path, content: bytes) -> None:
    folder = saved / "checkpoints/step-00000001"
    next(folder.glob("*.safetensors")).write_bytes(content)
    _agree(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        _load(saved)


def test_folders_that_only_look_like_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for name in ("step-²", "step-٣٣٣٣٣٣٣٣", "step-99999999999999999999", "step--0000001", "step-00000007", "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoints.checkpoint_steps(tmp_path) == [7]


SETTINGS = [
    "[]",
    DEEP,
    "1" * 5000,
    '{"steps": "9"}',
    '{"steps": null}',
    '{"steps": [1]}',
    '{"seed": "\u001b[2J"}',
    "\xff",
]


@pytest.mark.parametrize("content", SETTINGS)
def test_hostile_settings_of_a_run_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError) as caught:
        checkpoints.open_run_folder(TrainSettings(run=tmp_path, steps=5, lr=1e-3, resume=True), write=True)
    assert "\n" not in str(caught.value)


def test_hostile_logs_of_a_run_lose_their_lines(saved: Path) -> None:
    lines = ["{}", '{"step": "x"}', '{"step": [1]}', '{"step": 1}', '{"step": 99}', "x"]
    (saved / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert _load(saved) == 1
    assert (saved / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_links_in_a_run_folder_lead_nothing_that_is_written(saved: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (saved / "metrics.jsonl").symlink_to(elsewhere / "new")
    (saved / "checkpoints/step-00000000.partial").symlink_to(elsewhere)
    (saved / "model").symlink_to(elsewhere)
    (saved / "settings.json").symlink_to(elsewhere / "settings")
    files.write_json(saved / "settings.json", {})
    assert _load(saved) == 1
    files.append_jsonl(saved / "metrics.jsonl", [{"step": 2}])
    checkpoints.save(saved, 2, _state(), _accelerator(), keep=1)
    with files.written_folder(saved / "model") as partial:
        (partial / "config.json").write_text("{}")
    assert list(elsewhere.iterdir()) == []
    assert (saved / "model" / "config.json").read_text() == "{}"
    assert not (saved / "model").is_symlink()


def test_hostile_lines_of_a_run_that_is_continued_are_made_again(tmp_path: Path) -> None:
    from diffucoder.evaluation.judge import _is_verdict
    from diffucoder.evaluation.samples import _has_answer

    verdict = {"passed": True, "base": True, "plus": None, "status": "ok", "detail": "", "trusted": True}
    assert _is_verdict(verdict)
    for name, value in (("passed", "x"), ("base", 1), ("plus", 1), ("status", None), ("detail", []), ("trusted", None)):
        assert not _is_verdict({**verdict, name: value})
    assert _has_answer({"completion": ""})
    assert not _has_answer({"solution": None, "completion": "x"})
