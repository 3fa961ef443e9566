"""Take the pictures of the documentation: the server's page, a report on order, and the live view of a terminal.

    python docs/screenshots.py                          all of them, into docs (some minutes)
    python docs/screenshots.py page_written order       some
    python docs/screenshots.py --to /tmp/pictures       elsewhere

It needs Chromium and the extras `serve`, `report` and `dev`. It ends with 1 if a page logs an error or scrolls
sideways.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.watch import CanvasView

DOCS = Path(__file__).parent
PROMPT = "Write a function filter_numbers(nums) that keeps only the even numbers, then sums the numbers."
TERMINALS = {  # columns and colours of the live view; 48 columns are as wide as a telephone
    "watch": (96, SVG_EXPORT_THEME),
    "watch_light": (96, DEFAULT_TERMINAL_THEME),
    "watch_narrow": (48, SVG_EXPORT_THEME),
}
MOMENTS = (0.15, 0.4, 0.7, 1.0)  # of the live view: shares of the passes
BROWSER = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
PATIENCE = 300_000  # milliseconds
COLOURS = 256  # of a picture


# --- what is shown. Any: playwright's page --------------------------------------------------------------------------


def empty(page: Any) -> None:
    page.wait_for_selector("#model:has-text('Model')")


def written(page: Any) -> None:
    page.click("#go")
    page.wait_for_selector("#status:has-text('Done')")


def holes(page: Any) -> None:
    page.click("#examples button:has-text('fill two holes')")
    page.wait_for_selector("#status:has-text('Done')")


def compared(page: Any) -> None:
    page.check("#compare")
    written(page)


def report(page: Any) -> None:
    page.wait_for_selector("body[data-shown]")


def viewer(page: Any) -> None:
    report(page)
    for _ in range(24):
        page.locator("#step").press("ArrowLeft")
    page.evaluate("document.querySelector('#viewer').scrollIntoView()")


@dataclass(frozen=True)
class Picture:
    show: Callable[[Any], None]
    width: int = 1200
    height: int = 820
    scheme: str = "light"
    of_report: bool = False


PICTURES = {
    "page_empty": Picture(empty),
    "page_written": Picture(written),
    "page_holes": Picture(holes),
    "page_compared": Picture(compared),
    "page_dark": Picture(written, scheme="dark"),
    "page_narrow": Picture(written, width=390),
    "page_narrow_dark": Picture(written, width=390, scheme="dark"),
    "order": Picture(report, height=1250, of_report=True),
    "order_dark": Picture(report, height=1250, scheme="dark", of_report=True),
    "order_viewer": Picture(viewer, height=960, of_report=True),
    "order_narrow": Picture(report, width=390, height=1250, of_report=True),
    "order_narrow_dark": Picture(viewer, width=390, height=1250, scheme="dark", of_report=True),
}


def take(browser: Any, names: Iterable[str], folder: Path, *, server: str, report: str) -> list[str]:
    """Write NAME.png for each name. Return what is wrong: errors in the console, and pages that scroll sideways."""
    wrong: list[str] = []
    for name in names:
        picture = PICTURES[name]
        page = browser.new_page(
            viewport={"width": picture.width, "height": picture.height},
            color_scheme=picture.scheme,
            reduced_motion="reduce",
        )
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error, name=name: wrong.append(f"{name}: {error}"))
        page.on("console", lambda line, name=name: line.type == "error" and wrong.append(f"{name}: {line.text}"))
        page.goto(report if picture.of_report else server)
        picture.show(page)
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > picture.width:
            wrong.append(f"{name}: {width} pixels wide, the window has {picture.width}")
        path = folder / f"{name}.png"
        page.screenshot(path=path)
        page.close()
        Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    return wrong


def record_watch(path: Path) -> None:
    """Write the live view of `--watch` at a few moments of one generation, as SVG, in one of the `TERMINALS`."""
    width, theme = TERMINALS[path.stem]
    coder = DiffuCoder.load()
    request = coder.request(PROMPT, DecodingParams())
    passes = coder.run([request])[0][0].forward_passes
    wanted = {max(1, round(share * passes)) for share in MOMENTS}
    console = Console(record=True, width=width, force_terminal=True, file=io.StringIO())
    console.print(f'[bold]$ diffucoder generate --watch [green]"{PROMPT}"[/green][/bold]')
    view = CanvasView(coder.tokenizer, request.canvas.masked[0])

    def show(sequence: Any, step: Any) -> None:
        view.update(step)
        if step.forward_passes in wanted or sequence.finish_reason is not None:
            console.print(view.render(console, finish_reason=sequence.finish_reason))

    coder.run([request], on_step=show)
    console.save_svg(str(path), title="diffucoder generate --watch", theme=theme)


# --- what is pictured ------------------------------------------------------------------------------------------------


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server of the shipped model."""
    command = [sys.executable, "-m", "diffucoder.cli", "serve", "--port", "0", "--dtype", "float32"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if address := re.search(r"listening on (http://\S+),", line):
                yield address[1]
                break
        process.terminate()


def make_report(folder: Path) -> str:
    """Analyse the shipped model on some of its problems. Return the address of the page."""
    options = "tiny --limit 12 --temperature 0.2,1.2 --num-samples 3 --dtype float32 --run".split()
    subprocess.run([sys.executable, "-m", "diffucoder.cli", "order", *options, str(folder)], check=True)
    return (folder / "index.html").as_uri()


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as run:
        browser = run.chromium.launch(executable_path=path, args=BROWSER.split())
        yield browser
        browser.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="take the pictures of the documentation")
    known = [*TERMINALS, *PICTURES]
    parser.add_argument("names", nargs="*", help=f"which ones: {', '.join(known)}; all if left out")
    parser.add_argument("--to", type=Path, default=DOCS, help="the folder for them")
    options = parser.parse_args()
    names = options.names or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{', '.join(unknown)}: not a picture; choose from {', '.join(known)}")
    options.to.mkdir(parents=True, exist_ok=True)
    for name in TERMINALS:
        if name in names:
            record_watch(options.to / f"{name}.svg")
    names = [name for name in names if name in PICTURES]
    wrong: list[str] = []
    if names:
        with tempfile.TemporaryDirectory() as scratch, serving() as server, chromium() as browser:
            address = ""
            if any(PICTURES[name].of_report for name in names):
                address = make_report(Path(scratch) / "order")
            wrong = take(browser, names, options.to, server=server, report=address)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
