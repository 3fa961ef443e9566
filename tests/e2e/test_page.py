"""The page in a real browser: writing, holes, replay, comparison, keyboard, a narrow screen; nothing from elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import PATIENCE, figure, stream, wait


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Any]:
    """The page, freshly loaded; at the end nothing was wrong and nothing came from elsewhere."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    made = context.new_page()
    wrong, asked = list[str](), list[str]()
    made.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("request", lambda request: asked.append(request.url))
    made.set_default_timeout(1000 * PATIENCE)
    made.goto(server)
    yield made
    context.close()
    assert not wrong
    assert not [each for each in asked if not each.startswith((server, "data:", "blob:"))]


def write(page: Any) -> None:
    page.click("#go")
    page.wait_for_selector("#status:has-text('Done')")


def test_a_request_is_written_and_replayed(page: Any) -> None:
    write(page)
    canvas = page.locator(".canvas")
    whole = canvas.inner_text()
    assert whole.startswith("def filter_numbers(nums):")
    assert "▢" not in whole.split("return")[0]
    assert "tokens in" in page.locator(".figures").inner_text()
    slider = page.locator("[name=step]")
    last = int(slider.get_attribute("max"))
    slider.focus()
    page.keyboard.press("Home")
    assert set(canvas.inner_text()) <= {"▢", "\n"}
    page.keyboard.press("ArrowRight")
    assert page.locator(".replay output").inner_text() == f"1 of {last}"
    assert page.locator(".canvas .token, .canvas .end").count() == 1
    page.keyboard.press("End")
    assert canvas.inner_text() == whole


def test_two_holes_are_filled(page: Any) -> None:
    request = "# Write a function total(nums) that keeps only the even numbers, then sums the numbers.\n"
    page.fill(
        "#text", f"{request}def total(nums):\n    nums = [n for n in nums if<|hole:7|>]\n    return<|hole:1|>(nums)\n"
    )
    write(page)
    assert page.locator(".canvas .token").count() == 8
    assert "▢" not in page.locator(".canvas").inner_text()


def test_two_settings_side_by_side(page: Any) -> None:
    page.check("#compare")
    write(page)
    assert page.locator(".panel").count() == 2
    passes = [text.split(" passes")[0].split()[-1] for text in page.locator(".figures").all_inner_texts()]
    assert int(passes[0]) > int(passes[1])
    page.uncheck("#compare")
    assert page.locator(".panel").count() == 1


def test_the_text_before_a_hole_is_shown_and_an_example_is_a_click_away(page: Any) -> None:
    page.click("#examples button:has-text('fill two holes')")
    page.wait_for_selector("#status:has-text('Done')")
    assert page.locator(".canvas").inner_text().splitlines() == [
        "# Write a function total(nums) that keeps only the even numbers, then sums the numbers.",
        "def total(nums):",
        "    nums = [n for n in nums if n % 2 == 0]",
        "    return sum(nums)",
    ]


def test_the_legend_follows_the_colours(page: Any) -> None:
    page.select_option("#colour", "sure")
    assert page.locator(".legend").inner_text().split() == ["sure", "unsure"]


def test_nothing_moves_when_an_answer_comes(page: Any) -> None:
    def places() -> list[float]:
        return [page.locator(where).bounding_box()["y"] for where in ("#go", ".canvas", "[name=play]")]

    before = places()
    write(page)
    assert places() == before


@contextmanager
def busy(url: str) -> Iterator[None]:
    """Have the server decode something else meanwhile, so that what is asked of it takes seconds."""
    body = {"prompt": "def f(x):\n", "max_tokens": 400, "n": 8, "stream": True}
    with stream(f"{url}/v1/completions", body):
        wait(lambda: figure(url, "running") > 0)
        yield


def test_the_keyboard_does_it_all(page: Any, server: str) -> None:
    page.focus("#text")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("Given a number, double the number.")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status:has-text('Done')")
    assert "return" in page.locator(".canvas").inner_text()
    page.select_option("#colour", "sure")
    page.fill("#text", "Write a function that takes a string and removes the vowels.")
    page.locator("[name=tokens]").fill("256")
    with busy(server):
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".canvas .token, .canvas .end")
        page.keyboard.press("Escape")
        page.wait_for_selector("#status:has-text('Stopped')")


def test_a_trace_can_be_kept(page: Any, tmp_path: Path) -> None:
    from diffucoder.decoding.trace import read_traces

    write(page)
    with page.expect_download() as download:
        page.click("[name=save]")
    download.value.save_as(tmp_path / "trace.jsonl")
    trace = read_traces(tmp_path / "trace.jsonl")[0]
    assert trace.model == "tiny"
    assert len(trace.steps) == 64


def test_what_is_wrong_is_said(browser: Any, server: str) -> None:
    page = browser.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(server)
    page.fill("#text", "<|hole|> first")
    page.click("#go")
    page.wait_for_selector("#status.error:has-text('begins with a hole')")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_everybody_can_use_it(browser: Any, server: str, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the dev extra brings axe").Axe()
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce")
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(server)
    write(page)
    found = axe.run(page).response["violations"]
    page.close()
    serious = [
        (each["id"], [node["html"][:80] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert not serious


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_holds_all(browser: Any, server: str, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(server)
    page.check("#compare")
    write(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for button in page.locator("button:visible").all():
        box = button.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    page.close()
