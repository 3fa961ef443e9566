"""The report on order in a browser, from disk: many traces at once, step by step, by keyboard, without a network."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffucoder.analysis.report import write
from diffucoder.analysis.settings import Conventions
from diffucoder.decoding.trace import Trace, write_traces
from diffucoder.files import write_jsonl
from diffucoder.models.checkpoint import load_tokenizer

SECONDS = 2.0  # in which all is to be drawn


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of 100 samples of 256 tokens, the second from left to right; a token of the first was taken back."""
    folder = tmp_path_factory.mktemp("report")
    tokenizer = load_tokenizer(None)
    program = tokenizer.encode("def f(x):\n    return [x + 1 for _ in range(3)]  # </script> in a comment\n\n" * 20)[
        :255
    ]
    draw = np.random.default_rng(0)
    traces = []
    for number in range(100):
        order = draw.permutation(256).tolist()
        entropy = -np.log(np.clip(draw.random(256), 0.01, 1))
        trace = Trace(
            tokens=[
                *tokenizer.encode_chat(f"Request {number} <b>"),
                *program,
                min(tokenizer.terminator_ids),
            ],
            prompt_length=len(tokenizer.encode_chat(f"Request {number} <b>")),
            steps=order,
            confidence=(-entropy).tolist(),
            log_probs=(-entropy).tolist(),
            forward_passes=256,
            params={"policy": "random", "temperature": 0.5},
            model="tiny",
            id=f"synthetic/{number}#0",
        )
        traces.append(trace)
        traces.append(replace(trace, steps=list(range(256)), params={"policy": "entropy", "temperature": 1.0}))
    traces[0] = replace(traces[0], revoked=[[traces[0].steps.index(9), program[0], 3, 5]])
    write_traces(folder / "some.jsonl", traces)
    write(folder, [folder / "some.jsonl"], Conventions())
    return folder / "index.html"


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report, opened from disk; at the end nothing was wrong and nothing else was asked for."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    made = context.new_page()
    wrong, asked = list[str](), list[str]()
    made.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("request", lambda request: asked.append(request.url))
    made.goto(report.as_uri())
    made.wait_for_selector("body[data-shown='100']")
    yield made
    context.close()
    assert not wrong
    assert [each for each in asked if not each.startswith("data:")] == [report.as_uri()]


def test_a_hundred_traces_of_256_tokens_are_there_in_two_seconds(browser: Any, report: Path) -> None:
    took = []
    for _ in range(3):  # of which the quickest counts: other programs may run beside this one
        page = browser.new_page()
        page.goto(report.as_uri(), wait_until="commit")
        page.wait_for_selector("body[data-shown='100']")
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")  # painted
        took.append(page.evaluate("performance.now()") / 1000)
        assert page.locator("#samples canvas").count() == 100
        assert page.locator("#panels .canvas").first.locator("span").count() == 256
        page.close()
    assert min(took) <= SECONDS, took


def test_tokens_appear_in_the_order_in_which_they_were_decided(page: Any) -> None:
    page.focus("#samples")
    page.keyboard.press("Home")
    left, right = page.locator("#panels .canvas").all()
    assert set(left.inner_text()) == {"▢"}
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert page.locator("#at").inner_text() == "4 of 256"
    assert right.locator("span").nth(3).get_attribute("class") == "token new"
    assert [right.locator("span").nth(at).get_attribute("class") for at in (0, 4)] == ["token", "mask"]
    left, right = page.locator("#panels .canvas").all()
    assert left.locator(".token").count() == 5  # one of them is taken back two steps later
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert page.locator("#panels .canvas").first.locator(".token").count() == 6
    page.keyboard.press("End")
    assert page.locator("#panels .canvas .mask").count() == 0
    assert (
        page.locator("#panels .canvas").first.inner_text().startswith("def f(x):\n    return [x + 1 for _ in range(3)]")
    )


def test_the_keyboard_does_it_all(page: Any) -> None:
    for _ in range(30):  # by tabs alone
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "samples":
            break
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.locator("#samples [aria-selected=true]").inner_text().startswith("synthetic/2#0")
    assert "Request 2 <b>" in page.locator("#prompt").inner_text()
    page.keyboard.press("Home")
    page.keyboard.press("Space")
    page.wait_for_timeout(600)
    assert not page.locator("#at").inner_text().startswith(("0 ", "256 "))
    page.keyboard.press("Space")
    stopped = page.locator("#at").inner_text()
    page.wait_for_timeout(200)
    assert page.locator("#at").inner_text() == stopped


def test_two_runs_are_compared_over_the_prompts_they_share(page: Any, report: Path) -> None:
    text = page.locator("#differences").inner_text()
    assert "over 100 prompts" in text
    assert "0.99" in page.locator("#differences td").first.inner_text() or "1.0" in text
    page.select_option("#b", "")
    assert not page.locator("#differences").is_visible()
    assert page.locator("#panels .canvas").count() == 1
    page.select_option("#colour", "kind")
    assert "keyword" in page.locator("#legend").inner_text()
    for name in ("ar_ness", "classes", "positions"):
        assert page.locator(f"#figure-{name} svg").is_visible()
        assert (report.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (report.parent / f"{name}.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_holds_all(browser: Any, report: Path, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-shown]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    inside = "[...document.querySelectorAll('section *')].filter((each) => each.scrollWidth > each.clientWidth + 1)"
    assert page.evaluate(f"{inside}.filter((each) => getComputedStyle(each).overflowX !== 'visible').length") == 0
    page.close()


@pytest.mark.parametrize("width", [390, 1200])
def test_labels_of_figures_are_readable_and_shares_reach_from_0_to_1(browser: Any, report: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-shown]")
    sizes = (
        "[...document.querySelectorAll('figure svg')].map((each) => 9 * each.clientWidth / each.viewBox.baseVal.width)"
    )
    assert min(page.evaluate(sizes)) >= 11
    assert {"0.0", "1.0"} <= set(page.locator("#figure-ar_ness svg text").all_text_contents())
    columns = page.evaluate(
        "new Set([...document.querySelectorAll('.drawings figure')].map((each) => each.offsetLeft)).size"
    )
    assert columns == (1 if width == 390 else 3)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_everybody_can_read_it(browser: Any, report: Path, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the dev extra brings axe").Axe()
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce")
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-shown]")
    found = axe.run(page).response["violations"]
    page.close()
    serious = [
        (each["id"], [node["html"][:80] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert not serious


def test_a_run_of_training_shows_its_step_its_failures_first_and_equal_answers_once(
    browser: Any, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(None)
    prompt = tokenizer.encode_chat("Double it.")
    end = min(tokenizer.terminator_ids)
    traces = []
    verdicts = []
    for number, text in enumerate(["return 2 * x", "return 2 * x", "return x", "return 2 * x"]):
        tokens = [*tokenizer.encode(text), end]
        score = [-0.1] * len(tokens)
        trace = Trace(
            tokens=[*prompt, *tokens],
            prompt_length=len(prompt),
            steps=list(range(len(tokens))),
            confidence=score,
            log_probs=score,
            forward_passes=len(tokens),
            model="tiny",
            id=f"double#{number}",
        )
        traces.append(trace)
        verdicts.append({"task_id": "double", "sample": number, "passed": text != "return x", "after_step": 3})
    write_traces(tmp_path / "traces.jsonl", traces)
    write_jsonl(tmp_path / "verdicts.jsonl", verdicts)
    write(tmp_path / "report", [tmp_path], Conventions())
    page = browser.new_page()
    page.goto((tmp_path / "report/index.html").as_uri())
    page.wait_for_selector("body[data-shown='4']")
    assert "wrote 4 answers to 1 prompt" in page.locator(".lead").inner_text()
    assert "after training step 3" in page.locator(".lead").inner_text()
    assert page.locator("#prompt").inner_text() == "Double it."
    assert [text.split() for text in page.locator("#samples li").all_inner_texts()] == [
        ["✗", "double#2"],
        ["✓", "double#0", "×3"],
    ]
    page.uncheck("#fold")
    assert page.locator("#samples li").count() == 4
    page.close()
