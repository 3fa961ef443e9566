"""Record docs/watch.svg: the live view of `--watch` at a few moments of one generation.

python docs/record_watch.py
"""

from pathlib import Path

from rich.console import Console

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.watch import CanvasView

PROMPT = "Write a function filter_numbers(nums) that keeps only the even numbers, then sums the numbers."
MOMENTS = (0.15, 0.4, 0.7, 1.0)  # shares of the passes


def main() -> None:
    coder = DiffuCoder.load()
    params = DecodingParams()
    canvas = coder.request(PROMPT, params).canvas
    passes = len(list(coder.stream(PROMPT, params)))
    wanted = {max(1, round(share * passes)) for share in MOMENTS}
    console = Console(record=True, width=96, force_terminal=True)
    console.print(f'[bold]$ diffucoder generate --watch [green]"{PROMPT}"[/green][/bold]')
    view = CanvasView(coder.tokenizer, canvas.masked[0])
    for step in coder.stream(PROMPT, params):
        view.update(step)
        if step.forward_passes in wanted:
            console.print(view.render(finished=step.forward_passes == passes))
    path = Path(__file__).with_name("watch.svg")
    console.save_svg(str(path), title="diffucoder generate --watch")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
