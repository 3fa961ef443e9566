"""Windows around holes: which lines are read, and that everything else stays as it is."""

import re
import warnings
from collections.abc import Callable

import pytest
import torch

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.decoding.coder import Span
from diffucoder.decoding.requests import HoleRequest, WindowedRequest
from diffucoder.decoding.windows import MOST_WINDOWS, windows_of
from diffucoder.errors import PromptError
from diffucoder.tokenizer import Hole, split_holes

QUICK = DecodingParams(steps=2)


@pytest.fixture(scope="module")
def tiny() -> DiffuCoder:
    return DiffuCoder.load(dtype=torch.float32)


def numbered(count: int, line_end: str = "\n") -> list[str]:
    return [f"value_{number} = {number}{line_end}" for number in range(count)]


def with_holes(lines: list[str], *places: int, hole: str = "<|hole:3|>") -> str:
    return "".join(line.replace(" = ", f" = {hole}", 1) if n in places else line for n, line in enumerate(lines))


def assert_only_holes_changed(text: str, filled: str, pieces: tuple[str, ...]) -> None:
    around = re.split(r"<\|hole(?::\d+)?\|>", text)
    assert filled == "".join(part for pair in zip(around, (*pieces, ""), strict=True) for part in pair)


@pytest.mark.parametrize(
    "places",
    [(2500,), (100, 4900), (0,), (4999,), (0, 2500, 4999), (2500, 2501, 2503)],
    ids=["middle", "far apart", "first line", "last line", "three", "near each other"],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_long_file_changes_in_its_holes_alone(tiny: DiffuCoder, places: tuple[int, ...], line_end: str) -> None:
    text = with_holes(numbered(5000, line_end), *places)
    with pytest.warns(UserWarning, match="longer than the model's context; it reads lines"):
        result = tiny.fill(text, QUICK)
    assert len(result.pieces) == len(places)
    assert_only_holes_changed(text, result.text, result.pieces)


def test_a_window_is_read_as_the_same_lines_alone(tiny: DiffuCoder) -> None:
    lines = numbered(5000)
    text = with_holes(lines, 2500)
    request = tiny.fill_request(text, QUICK)
    assert isinstance(request, WindowedRequest)
    first, last = map(int, re.findall(r"\d+", request.remark))
    assert first < 2501 < last
    alone = tiny.fill("".join(text.splitlines(keepends=True)[first - 1 : last]), QUICK)
    [[result]] = tiny.run([request])
    assert result.pieces == alone.pieces


def test_holes_without_a_length_and_samples_have_a_result_each(tiny: DiffuCoder) -> None:
    text = with_holes(numbered(3000), 10, 2900, hole="<|hole|>")
    request = tiny.fill_request(text, DecodingParams(steps=2, num_samples=2, temperature=1.0))
    [results] = tiny.run([request])
    assert [result.index for result in results] == [0, 1] == list(range(request.result_count))
    for result in results:
        assert_only_holes_changed(text, result.text, result.pieces)
    assert request.prompt_tokens(0) > 100


def test_edits_and_infills_of_long_texts_have_windows_too(tiny: DiffuCoder) -> None:
    lines = numbered(2000)
    text = "".join(lines)
    start = text.index("value_1000")
    span = Span(start, start + len("value_1000 = 1000"), 4)
    with pytest.warns(UserWarning, match="it reads lines"):
        edited = tiny.edit(text, [span], QUICK)
    assert edited.text == text[: span.start] + edited.pieces[0] + text[span.end :]
    with pytest.warns(UserWarning, match="it reads lines"):
        infilled = tiny.infill(text, text, length=4, params=QUICK)
    assert infilled.text == infilled.pieces[0]


def test_a_text_that_fits_is_read_whole(tiny: DiffuCoder) -> None:
    assert isinstance(tiny.fill_request(with_holes(numbered(10), 5), QUICK), HoleRequest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [" + "1, " * 1000 + "<|hole|>]\n", "line 1 has a hole and over 192 tokens.*break the line"),
        (with_holes(numbered(9000), *range(0, 9000, 200)), f"at 45 places.*fill at most {MOST_WINDOWS} at once"),
        ("<|hole|>\n" + "".join(numbered(2000)), "begins with a hole"),
        ("x = <|hole:600|>\n" + "".join(numbered(2000)), "exceed the model's context of 512"),
    ],
)
def test_what_no_window_helps_is_one_line(tiny: DiffuCoder, text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message) as error:
        tiny.fill(text, QUICK)
    assert "\n" not in str(error.value)


# --- the lines of a window -------------------------------------------------------------------------------------------


def spans(text: str, budget: int) -> list[tuple[int, int]]:
    """First and last line of each window, a token for each character."""
    windows = windows_of(split_holes(text), budget, tokens)
    return [(lines.start, lines.stop - 1) for lines, _ in windows]


def tokens(piece: str | Hole) -> int:
    return len(piece) if isinstance(piece, str) else piece.length or 2


def test_lines_before_and_after_are_taken_in_turn_within_the_budget() -> None:
    text = "aaa\n" * 10 + "<|hole:3|>\n" + "bbb\n" * 10
    assert spans(text, 4) == [(10, 10)]
    assert spans(text, 8) == [(9, 10)]
    assert spans(text, 12) == [(9, 11)]
    assert spans(text, 400) == [(0, 21)]


def test_near_holes_share_a_window_and_far_ones_do_not() -> None:
    text = "<|hole:3|>\n" + "aaa\n" * 2 + "<|hole:3|>\n" + "aaa\n" * 50 + "<|hole:3|>\n"
    windows = spans(text, 40)
    assert len(windows) == 2
    assert windows[0][0] == 0
    assert windows[1][1] in (54, 55)


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_the_pieces_of_a_window_are_its_lines(ending: str) -> None:
    [(_, pieces)] = windows_of(["a = ", Hole(3), f"\n\x0c# form feed{ending}"], 100, tokens)
    assert pieces == ["a = ", Hole(3), f"\n\x0c# form feed{ending}"]


# --- the length a model was trained on -------------------------------------------------------------------------------


def test_more_than_the_trained_length_is_a_warning(tiny: DiffuCoder) -> None:
    assert tiny.model.trained_length == 192
    with pytest.warns(UserWarning, match="tiny was trained on at most 192: .* ask for fewer new tokens") as caught:
        tiny.generate("Given a number, double the number.", new_tokens=300, steps=1)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "ask", [lambda coder: coder.generate("Given a number, double the number.", new_tokens=150, steps=1)]
)
def test_up_to_the_trained_length_there_is_none(tiny: DiffuCoder, ask: Callable[[DiffuCoder], object]) -> None:
    with warnings.catch_warnings(action="error"):
        ask(tiny)


def test_a_window_that_begins_with_a_hole_has_a_token_before_it() -> None:
    text = ["x" * 60 + "\n", Hole(2), "\n" + "y" * 60]
    [(lines, own)] = windows_of(text, 20, lambda piece: len(piece) if isinstance(piece, str) else 2)
    assert lines == range(1, 2)
    assert own[:2] == ["\n", Hole(2)]
