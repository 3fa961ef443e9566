"""The live view: masks as placeholders, tokens coloured by their step, figures that agree with the result."""

import html
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.style import Style
from rich.text import Text

from diffucoder import Canvas, DecodingParams, Denoiser, DiffuCoder, Step
from diffucoder.decoding.coder import HOLE_LENGTHS
from diffucoder.decoding.requests import Request
from diffucoder.decoding.step import denoise
from diffucoder.ramp import ramp
from diffucoder.tokenizer import PLACEHOLDER, Tokenizer
from diffucoder.watch import CanvasView, progress, watch
from recipes.tiny.problems import problems


@pytest.fixture(scope="module")
def tokenizer(train_tokenizer: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(list(problems("train", 100, seed=0)), 320, folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def canvas(tokenizer: Tokenizer) -> Canvas:
    prompt = torch.tensor([tokenizer.encode("def f(x):")])
    return Canvas.from_prompts(prompt, new_tokens=8, mask_id=tokenizer.mask_id)


@pytest.fixture(scope="module")
def coder(causal_lm: Callable[..., Any], tokenizer: Tokenizer) -> DiffuCoder:
    model = Denoiser.from_causal_lm(causal_lm(vocab_size=320), mask_id=tokenizer.mask_id)
    return DiffuCoder(model, tokenizer)


@pytest.fixture(scope="module")
def steps(coder: DiffuCoder, canvas: Canvas) -> list[Step]:
    return list(denoise(coder.model, canvas, DecodingParams(steps=4)))


@pytest.fixture(scope="module")
def request_of_two(coder: DiffuCoder) -> Request:
    """The same prompt and settings as `steps`, and a second sample."""
    params = DecodingParams(steps=4, new_tokens=8, num_samples=2)
    return coder.request("def f(x):", params, chat=False)


@pytest.fixture
def view(tokenizer: Tokenizer, canvas: Canvas) -> CanvasView:
    return CanvasView(tokenizer, canvas.masked[0])


@pytest.fixture
def console() -> Console:
    return Console(record=True, file=io.StringIO(), force_terminal=True, width=80, color_system="truecolor")


def at(canvas: Canvas, index: int, written: dict[int, int]) -> Step:
    """A step that commits ids at places behind the prompt."""
    tokens, committed = canvas.tokens.clone(), torch.zeros_like(canvas.masked)
    first = int(canvas.masked[0].int().argmax())
    for place, token in written.items():
        tokens[0, first + place], committed[0, first + place] = token, True
    nothing = torch.zeros(tokens.shape)
    return Step(index, tokens, committed, None, nothing, index + 1, nothing)


def colours(text: Text) -> set[object]:
    styles = [span.style for span in text.spans if isinstance(span.style, Style)]
    return {style.color for style in styles if style.color is not None}


def test_masks_are_placeholders_until_they_are_tokens(view: CanvasView, steps: list[Step]) -> None:
    for step in steps:
        view.update(step)
        masks = int((step.canvas == view.tokenizer.mask_id).sum())
        assert view.text().plain.count(PLACEHOLDER) == masks
        assert len(view.step_of) == 8 - masks


def test_the_finished_text_is_what_was_generated(view: CanvasView, steps: list[Step], canvas: Canvas) -> None:
    for step in steps:
        view.update(step)
    tokens = steps[-1].canvas[0, canvas.masked[0]].tolist()
    assert view.tokenizer.terminator_ids.isdisjoint(tokens), "this test wants an answer that fills its canvas"
    assert view.text().plain == view.tokenizer.decode(tokens)


def test_a_character_of_several_tokens_is_shown_once_all_are_known(view: CanvasView, canvas: Canvas) -> None:
    ids = view.tokenizer.encode("日")
    assert len(ids) == 3
    view.update(at(canvas, 0, {0: ids[0], 2: ids[2]}))
    assert "日" not in view.text().plain
    view.update(at(canvas, 1, dict(enumerate(ids))))
    assert view.text().plain == "日" + PLACEHOLDER * 5


def test_each_step_has_a_colour_of_its_own(view: CanvasView, steps: list[Step]) -> None:
    for step in steps:
        view.update(step)
    assert len(colours(view.text())) == len(steps) == 4


def test_nothing_is_shown_behind_the_terminator_once_it_is_known(view: CanvasView, canvas: Canvas) -> None:
    one, two, three = view.tokenizer.encode("xyz")[:3]
    end = view.tokenizer.encode("<|im_end|>", special=True)[0]
    view.update(at(canvas, 0, {2: end, 3: three}))
    assert view.text().plain == f"{PLACEHOLDER * 2}·z{PLACEHOLDER * 4}"
    view.update(at(canvas, 1, {0: one, 1: two, 2: end, 3: three}))
    assert view.text().plain == "xy"


def test_a_revoked_token_is_a_mask_again_and_counts_no_more(view: CanvasView, canvas: Canvas, console: Console) -> None:
    one, two = view.tokenizer.encode("xy")[:2]
    view.update(at(canvas, 0, {0: one, 1: two}))
    taken_back = torch.zeros_like(canvas.masked)
    taken_back[0, int(canvas.masked[0].int().argmax()) + 1] = True
    last = at(canvas, 1, {0: one})
    view.update(replace(last, committed=torch.zeros_like(taken_back), revoked=taken_back))
    assert view.text().plain == "x" + PLACEHOLDER * 7
    assert view.step_of == {0: 0}
    console.print(view.render(console))
    assert "1 token, 2 passes" in console.export_text()


def test_figures_count_passes_and_the_tokens_before_the_terminator(
    view: CanvasView, canvas: Canvas, console: Console
) -> None:
    one, two, three = view.tokenizer.encode("xyz")[:3]
    view.update(at(canvas, 1, {0: one, 1: two, 2: view.tokenizer.encode("<|im_end|>", special=True)[0], 3: three}))
    console.print(view.render(console, finish_reason="stop"))
    shown = console.export_text()
    assert "2 tokens, 2 passes" in shown
    assert "finish reason: stop" in shown
    assert "first" in shown


def test_a_view_can_be_drawn_before_the_first_step(view: CanvasView, console: Console) -> None:
    console.print(view.render(console))
    assert "0 passes" in console.export_text()


@pytest.mark.parametrize(
    "more",
    [{"color_system": None}, {"no_color": True}, {"_environ": {"NO_COLOR": "1"}}, {"_environ": {"TERM": "dumb"}}],
    ids=str,
)
def test_without_colours_there_is_no_legend(view: CanvasView, steps: list[Step], more: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, **more)
    for step in steps:
        view.update(step)
    with console.capture() as capture:
        console.print(view.render(console))
    assert "first" not in capture.get()
    assert "8 tokens, 4 passes" in capture.get()


@pytest.mark.parametrize("width", [20, 59])
def test_a_narrow_terminal_shows_no_figures(view: CanvasView, steps: list[Step], width: int) -> None:
    console = Console(record=True, file=io.StringIO(), force_terminal=True, width=width)
    for step in steps:
        view.update(step)
    console.print(view.render(console, finish_reason="length"))
    shown = console.export_text()
    assert "passes" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert shown.endswith("\n")


def test_every_colour_of_the_ramp_reads_on_white_and_on_black() -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for step in range(11):
        bright = luminance(ramp(step / 10)) + 0.05
        assert 1.05 / bright > 3.4, "on white"
        assert bright / 0.05 > 3.4, "on black"


def test_watching_shows_the_first_sample_and_changes_nothing(
    coder: DiffuCoder, request_of_two: Request, steps: list[Step], view: CanvasView, console: Console
) -> None:
    with watch(request_of_two, coder.tokenizer, console) as on_step:
        results = coder.run([request_of_two], on_step=on_step)[0]
    plain = coder.run([request_of_two])[0]
    assert [result.trace for result in results] == [result.trace for result in plain]
    for step in steps:
        view.update(step)
    assert view.text().plain.strip().splitlines()[0] in console.export_text()


def test_the_shortest_length_that_a_hole_is_tried_at_is_shown_whole(coder: DiffuCoder, console: Console) -> None:
    request = coder.fill_request("x = <|hole|>", DecodingParams())
    with watch(request, coder.tokenizer, console) as on_step:
        coder.run([request], on_step=on_step)
    assert f"{HOLE_LENGTHS[0]} tokens, {HOLE_LENGTHS[0]} passes" in console.export_text()


def test_a_pipe_gets_the_finished_view_once(coder: DiffuCoder, request_of_two: Request) -> None:
    pipe = io.StringIO()
    with watch(request_of_two, coder.tokenizer, Console(file=pipe, width=80)) as on_step:
        coder.run([request_of_two], on_step=on_step)
    assert pipe.getvalue().count(" passes") == 1
    assert pipe.getvalue().endswith("\n")
    assert "\x1b" not in pipe.getvalue()


@pytest.mark.parametrize("more", [{"steps": 4}, {"steps": 4, "revoke": 0.9}], ids=str)
def test_a_progress_bar_counts_every_token_and_leaves_no_trace(
    coder: DiffuCoder, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    request = coder.request("def f(x):", DecodingParams(new_tokens=8, num_samples=2, **more), chat=False)
    counted: list[float] = []
    monkeypatch.setattr(
        "rich.progress.Progress.update", lambda self, task, *, completed, state: counted.append(completed)
    )
    terminal = io.StringIO()
    with progress([request], Console(file=terminal, width=80, force_terminal=True)) as on_step:
        [results] = coder.run([request], on_step=on_step)
    assert any(result.trace.revoked for result in results) == ("revoke" in more)
    assert counted[-1] == 2 * 8
    screen = terminal.getvalue()
    assert "decoding" in screen
    assert screen.endswith("\x1b[1A\x1b[2K")  # the line of the bar is erased
    pipe = io.StringIO()
    with progress([request], Console(file=pipe, width=80)) as on_step:
        coder.run([request], on_step=on_step)
    assert pipe.getvalue().strip() == ""


def test_the_view_can_be_saved_as_a_picture(
    view: CanvasView, steps: list[Step], console: Console, tmp_path: Path
) -> None:
    for step in steps:
        view.update(step)
    console.print(view.render(console, finish_reason="stop"))
    console.save_svg(str(tmp_path / "watch.svg"), title="diffucoder")
    assert "<svg" in (tmp_path / "watch.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["watch", "watch_light", "watch_narrow"])
def test_the_recorded_pictures_show_what_the_shipped_model_writes(name: str) -> None:
    picture = (Path(__file__).parents[1] / "docs" / f"{name}.svg").read_text(encoding="utf-8")
    shown = "".join(html.unescape(text) for text in re.findall(r">([^<]*)<", picture)).replace("\xa0", " ")
    prompt = re.search(r'--watch "(.*?)"', shown, re.DOTALL)
    assert prompt is not None
    answer = DiffuCoder.load().generate(" ".join(prompt[1].split()))
    last_canvas = "".join(shown.rpartition(" canvas ")[2].replace("│", "").split())
    assert "".join(answer.text.split()) in last_canvas


def test_the_view_of_an_open_hole_begins_where_the_hole_does(coder: DiffuCoder, console: Console) -> None:
    request = coder.fill_request("def f(x):\n  <|hole|>\n", DecodingParams())
    first = int(request.canvas.masked[0].sum())
    steps = []
    with watch(request, coder.tokenizer, console) as on_step:

        def show(sequence: Any, step: Step) -> None:
            on_step(sequence, step)
            if sequence.row == 0:
                steps.append(step)

        coder.run([request], on_step=show)
    view = CanvasView(coder.tokenizer, request.canvas.masked[0][request.canvas.valid[0]])
    for step in steps:
        view.update(step)
    assert sorted(view.step_of) == list(range(first))
