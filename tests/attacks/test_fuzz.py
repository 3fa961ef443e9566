"""A short form of `make fuzz`, and every input that it has found: nothing breaks, and nothing is past its limits."""

from pathlib import Path

import fuzz
import pytest
import strategies

from diffucoder.decoding.params import DecodingParams


def counted(wanted: int) -> fuzz.Callable[[int], bool]:
    return lambda count: count >= wanted


@pytest.fixture
def report(tmp_path: Path) -> fuzz.Report:
    return fuzz.Report(tmp_path)


def test_hostile_files_are_read_or_rejected(report: fuzz.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CHUNK", 40)
    fuzz.fuzz_files(report, 7, counted(40))
    assert report.end()
    assert any(outcome.endswith("rejected") for outcome in report.outcomes)
    assert report.outcomes["model: read"]  # not everything is rejected for one reason


def test_hostile_requests_are_answered(report: fuzz.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CHUNK", 128)
    fuzz.fuzz_requests(report, 7, counted(128))
    assert report.end()
    assert report.outcomes["status 200"] > 20
    assert report.outcomes["status 400"] > 20


def test_what_was_found_once_stays_mended(report: fuzz.Report) -> None:
    fuzz.repeat(Path(__file__).with_name("found.jsonl"), report)
    assert report.end()


def test_requests_have_every_field() -> None:
    fields = {name for model, _ in strategies.ROUTES.values() for name in model.model_fields}
    assert fields - strategies.HONEST.keys() == BOOLEANS
    assert strategies.DECODING.keys() < DecodingParams.model_fields.keys()


BOOLEANS = {"echo", "add_special", "parse_special", "with_pieces", "decoding"}
"""Fields that `strategies.bodies` gives a value without an entry in `HONEST`."""
