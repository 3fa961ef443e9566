"""What a run wrote, for people: completions with their verdicts as JSON lines, and the latest of them as a page.

For: `grpo`. Not for: figures (`metrics.jsonl`), or traces of decoding in general (`decoding.trace`).
"""

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffucoder.tokenizer import Tokenizer
from diffucoder.training.rollouts import Graded

Line = dict[str, Any]  # Any: JSON

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
  article {{ border-top: 1px solid #8888; padding: .5rem 0 }}
  pre {{ white-space: pre-wrap; margin: .3rem 0 }}
  pre span {{ color: #111 }}
  .solved {{ color: #0a7d36 }} .failed {{ color: #b3261e }}
</style>
<h1>{title}</h1>
<p>Behind each answer its reward, advantage and verdict. Tokens are coloured by the step that decided them, from
<span style="background:hsl(210 90% 80%);color:#111">early</span> to
<span style="background:hsl(30 90% 80%);color:#111">late</span>.</p>
{articles}
</html>
"""


def lines(step: int, graded: Graded, advantages: Sequence[float], tokenizer: Tokenizer) -> Iterator[Line]:
    """What samples.jsonl holds of each completion of the batch that `step` is the first to learn from."""
    for completion, given, advantage in zip(graded.completions, graded.rewards, advantages, strict=True):
        local, overall = completion.ar_ness
        own = completion.length
        yield {
            "step": step,
            "id": completion.exercise.id,
            "prompt": completion.exercise.prompt,
            "completion": completion.text,
            "reward": given.total,
            "format": given.format,
            "pass_rate": given.pass_rate,
            "status": given.status,
            "detail": given.detail,
            "advantage": round(advantage, 6),
            "forward_passes": completion.forward_passes,
            "local_ar_ness": None if local != local else round(local, 4),  # nan is no JSON
            "global_ar_ness": None if overall != overall else round(overall, 4),
            "tokens": [tokenizer.decode([token], skip_special=False) for token in completion.tokens[:own]],
            "steps": completion.steps[:own],
        }


def write(run: Path, found: Sequence[Line]) -> None:
    """Add the lines to samples.jsonl, and make samples.html of them."""
    with (run / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in found)
    (run / "samples.html").write_text(page(found), encoding="utf-8")


def page(found: Sequence[Line]) -> str:
    """A self-contained page of completions."""
    title = f"Completions behind step {found[0]['step']}" if found else "No completions"
    return _PAGE.format(title=title, articles="\n".join(map(_article, found)))


def _article(line: Line) -> str:
    last = max(1, *line["steps"])
    tokens = "".join(
        f'<span style="background:hsl({210 - 180 * max(0, step) / last:.0f} 90% 80%)">{html.escape(token)}</span>'
        for token, step in zip(line["tokens"], line["steps"], strict=True)
    )
    verdict = f"reward {line['reward']:.2f}, advantage {line['advantage']:+.2f}, {line['status']}"
    kind = "solved" if line["pass_rate"] == 1 else "failed"
    detail = html.escape(line["detail"])
    prompt = html.escape(line["prompt"])
    return f'<article><p>{prompt}</p><pre>{tokens}</pre><p class="{kind}">{verdict} {detail}</p></article>'
