"""Replies in the styles of instruct models: right ones are graded as right, and wrong ones as wrong, everywhere."""

import html
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffucoder import DiffuCoder
from diffucoder.evaluation.benchmarks import PREFILL
from diffucoder.evaluation.run import evaluate
from diffucoder.evaluation.settings import EvaluateSettings
from diffucoder.grading.sandbox import Sandbox
from diffucoder.training.rewards import reward

HEAD = "from typing import List\n\n\ndef spread(xs: List[int]) -> str:\n"
DOC = '    """How far apart the ends are.\n\n    >>> spread([1, 4])\n    \'apart: 3\'\n    """\n'
BODY = '    width = max(xs) OPERATOR min(xs)\n    return f"apart: {width}"'
PROGRAM = HEAD + DOC + BODY
BARE = (HEAD + BODY).removeprefix("from typing import List\n\n\n").replace("List", "list")
FENCED_DOC = (
    '    """How far apart.\n\n    ```python\n    spread([1, 4])\n    ```\n\n~~~\nno indentation\n~~~\n    """\n'
)
IN_DOC = HEAD + FENCED_DOC + BODY
IN_STRINGS = BARE.replace("    width", '    fence = "```"\n    other = """\n```bash\nls\n```\n"""  # ```\n    width')
DRAFT = "```python\ndef spread(xs):\n    return None\n```"
SHELL = "```bash\npip install numpy\n```"
USAGE = "```python\nprint(spread([1, 4]))\n```"
OUTPUT = "```\napart: 3\n```"
HELPER = "def gap(low: int, high: int) -> int:\n    return high OPERATOR low"
MAIN = 'def spread(xs: list[int]) -> str:\n    return f"apart: {gap(min(xs), max(xs))}"'
CLASS = "class Gap:\n    def __init__(self, low, high):\n        self.width = high OPERATOR low"
WITH_CLASS = 'def spread(xs):\n    return f"apart: {Gap(min(xs), max(xs)).width}"'
WITH_MATH = BARE.replace("max", "math.floor(1) * max")
TYPED = BARE.replace("{", "{{").replace("}", "}}").replace("\n", "\n{0}")
TESTS = "```python\ndef test_spread():\n    assert spread([1, 4]) == 'apart: 3'\n\n\ntest_spread()\n```"
OTHER_TESTS = (
    "```python\nimport unittest\n\n\nclass Spread(unittest.TestCase):\n    def test(self):\n        self.fail()\n\n\n"
    "unittest.main()\n```\n"
    "```python\ndef check(candidate):\n    assert candidate([1, 4]) == 0\n\n\ncheck(spread)\n```\n"
    "```python\ndef run_tests():\n    assert spread([1, 4]) == 0\n\n\nrun_tests()\n```"
)

FENCED = {  # whatever the prompt's end is
    "fence": f"```python\n{PROGRAM}\n```",
    "prose before and after": f"Sure! Here's what you're after:\n\n```python\n{PROGRAM}\n```\n\nIt's \"simple\".",
    "py": f"```py\n{BARE}\n```",
    "python3": f"```python3\n{BARE}\n```",
    "label with a title": f'```python title="spread.py"\n{BARE}\n```',
    "label in braces": f"```{{.python}}\n{BARE}\n```",
    "no language": f"The code:\n```\n{BARE}\n```\nDone.",
    "tildes": f"~~~python\n{BARE}\n~~~\nDone.",
    "longer": f"````python\n{BARE}\n````\nDone.",
    "within Markdown": f"````markdown\n# Answer\n```python\n{BARE}\n```\n````",
    "indented in a list": "1. So:\n\n"
    + f"```python\n{BARE}\n```".replace("\n", "\n   ").replace("```py", "   ```py", 1),
    "on the line of an item": f"- ```python\n{BARE}\n```",
    "at the end of a line": f"Here is the code: ```python\n{BARE}\n```",
    "unclosed": f"```python\n{BARE}\n",
    "closed at the end of a line": f"```python\n{BARE}```\nDone.",
    "CRLF": f"Sure:\n```python\n{PROGRAM}\n```\nDone.".replace("\n", "\r\n"),
    "shell first": f"Install it:\n{SHELL}\nThen:\n```\n{BARE}\n```\n",
    "usage first": f"Usage:\n{USAGE}\nImplementation:\n```python\n{BARE}\n```\n",
    "output first": f"It prints:\n{OUTPUT}\nwith\n```\n{BARE}\n```\n",
    "doctest first": f"```python\n>>> spread([1, 4])\n'apart: 3'\n```\n```python\n{BARE}\n```\n",
    "tests first": f"{TESTS}\n```python\n{BARE}\n```\n",
    "signature first": f"```python\ndef spread(xs):\n    ...\n```\n```python\n{BARE}\n```",
    "everything after": f"```python\n{BARE}\n```\nUsage:\n{USAGE}\nOutput:\n{OUTPUT}\nTests:\n{TESTS}\n{SHELL}",
    "helper first": f"```python\n{HELPER}\n```\nand\n```python\n{MAIN}\n```",
    "helper last": f"```python\n{MAIN}\n```\nwith\n```python\n{HELPER}\n```",
    "class of its own": f"First:\n```python\n{CLASS}\n```\nThen:\n```python\n{WITH_CLASS}\n```\n{USAGE}",
    "usage that imports it first": f"```python\nfrom solution import spread\nspread([1])\n```\n```python\n{BARE}\n```",
    "star import of its own": f"```python\nfrom math import *\n```\n```python\n{WITH_MATH.replace('math.', '')}\n```",
    "Java too": f"```java\nclass Gap {{\n}}\n```\nclass methods are not needed:\n```python\n{BARE}\n```",
    "tests by other names": f"{OTHER_TESTS}\n```python\n{BARE}\n```\n{OTHER_TESTS}",
    "stub that raises": f"```python\ndef spread(xs):\n    raise NotImplementedError\n```\n```python\n{BARE}\n```",
    "thinking in rare tags": f"<seed:think>{DRAFT}</seed:think>\n<thoughts>{DRAFT}</thoughts>\n"
    f"<|begin_of_thought|>\n{DRAFT}\n<|end_of_thought|>\n```python\n{BARE}\n```",
    "imports of its own": f"```python\nimport math\n```\n```python\n{WITH_MATH}\n```",
    "thinking": f"<think>\nFirst try:\n{DRAFT}\nwrong</think>\n```python\n{BARE}\n```",
    "thinking that the prompt opened": f"First try:\n{DRAFT}\nwrong\n</think>\n\nSo:\n```python\n{BARE}\n```",
    "thinking in other tags": f"[THINK]{DRAFT}[/THINK]\n◁think▷{DRAFT}\n◁/think▷\n```python\n{BARE}\n```",
    "quoted": "> Sure:\n>\n" + f"```python\n{BARE}\n```".replace("\n", "\n> ").replace("```py", "> ```py"),
    "thinking that is not closed": f"<think>\nIt's max and min.\n```python\n{BARE}\n```",
    "fences in a docstring": f"Sure:\n```python\n{IN_DOC}\n```\nDone.",
    "fences in strings": f"Sure:\n```python\n{IN_STRINGS}\n```\nDone.",
    "quotes in prose": f'With a docstring (""") it is:\n```python\n{PROGRAM}\n```\nDone.',
    "code on the fence's line": f"```python {BARE}\n```",
    "code on the fence's line, no language": f"Here it is: ```{BARE}```",
    "HTML": f'<p>So:</p>\n<pre><code class="language-python">{html.escape(BARE)}</code></pre>\n<p>Done.</p>',
    "HTML on lines of its own": f"So:\n<pre>\n{html.escape(BARE)}\n</pre>\nDone &amp; dusted.",
    "prompts": f"In the shell:\n\n>>> {TYPED.format('... ')}\n>>> spread([1, 4])\n'apart: 3'\n",
    "prompts in a fence": f"```python\n>>> {TYPED.format('... ')}\n>>> spread([1, 4])\n'apart: 3'\n```\nDone.",
    "IPython": f"```\nIn [1]: {TYPED.format('   ...: ')}\n\nIn [2]: spread([1, 4])\nOut[2]: 'apart: 3'\n```",
    "indented as a whole": textwrap.indent(BARE, "    "),
    "BEGIN and DONE": f"[BEGIN]\n{BARE}\n[DONE]\nThat is it.",
    "PYTHON": f"[PYTHON]\n{BARE}\n[/PYTHON]\n[TESTS]\nassert spread([1]) == 0\n[/TESTS]",
    "a faster one": f"```python\n{BARE}\n```\nFaster:\n```python\n@numba.jit\ndef fast_spread(xs):\n    return 0\n```",
    "files": f"spread.py:\n```python\nfrom helpers import gap\n\n{MAIN}\n```\nhelpers.py:\n```python\n{HELPER}\n```",
    "pseudocode first": f"```text\ndef spread(xs):\n    return max - min\n```\nIn Python:\n```python\n{BARE}\n```",
    "another language": f"```js\nspread = Math.max\n```\n```python\n{BARE}\n```\n```java\nspread = 1\n```",
    "a bare answer": f"Here is the function:\n\n{BARE}\n\nThis is how it works:\n  - it is simple\n",
    "a bare answer with fences": f"{IN_DOC}\n",
}
PREFILLED = {  # for a prompt that has opened a fence
    "closed": f"{PROGRAM}\n```",
    "closed and words": f"{PROGRAM}\n```\n\nIt's simple.",
    "closed and a block": f"{BARE}\n```\n\nUsage:\n{USAGE}\nOutput:\n{OUTPUT}",
    "closed on the line": f"{BARE}```",
    "not closed": BARE,
    "not closed, and words": f"{BARE}\n\nThis is how it works.",
    "opened again": f"```python\n{BARE}\n```",
    "opened again without a name": f"```\n{BARE}\n```\nDone.",
    "words, and opened again": f"Here it is:\n```python\n{BARE}\n```\nDone.",
    "fences in the docstring": f"{IN_DOC}\n```\nDone.",
    "draft": f"<think>\n{DRAFT}\n</think>\n{BARE}\n```",
}
BODIES = {  # completions, for tasks whose prompt has the head
    "body": f"{BODY}\n```\nDone.",
    "body in a fence": f"```python\n{BODY}\n```",
    "body without indentation": "```python\n" + BODY.replace("    ", "") + "\n```",
    "without the import": BARE.replace("list[int]", "List[int]") + "\n```",
    "future": f"```python\nfrom __future__ import annotations\n\n{BARE}\n```",
    "after which things run": BARE
    + "\n\nwidth = int(input())\nassert spread([width]) == 'apart: 9'\nraise SystemExit\n```",
}
ROW = {
    "prompt": HEAD + DOC,
    "entry_point": "spread",
    "canonical_solution": BODY.replace("OPERATOR", "-"),
    "base_input": [[[1, 4]], [[2, 2, 9]]],
    "plus_input": [[[-3, 5]]],
    "atol": 0,
}
LINES = ["assert spread([1, 4]) == 'apart: 3'", "assert spread([2, 2, 9]) == 'apart: 7'"]


class Scripted:
    """A coder that gives the answers of a script, one a request."""

    name = "scripted"
    model = SimpleNamespace(dtype="float32")
    tokenizer = SimpleNamespace(chat=lambda request: request)

    def __init__(self, replies: Sequence[str]) -> None:
        self.replies = list(replies)
        self.prompts: list[str] = []

    def request(self, prompt: str, params: object, *, prefill: str) -> str:
        self.prompts.append(prompt + prefill)
        return prompt

    def run(self, requests: Sequence[str], *, entropies: int) -> list[list[Any]]:
        texts = [self.replies.pop(0) for _ in requests]
        fields = {
            "index": 0,
            "tokens": (1,),
            "forward_passes": 1,
            "finish_reason": "stop",
            "seconds": 1.0,
            "trace": None,
        }
        return [[SimpleNamespace(text=text, **fields)] for text in texts]


Solved = Callable[..., dict[str, bool]]


@pytest.fixture
def solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> Solved:
    """`diffucoder evaluate` on one task a style: which styles pass."""

    def solve(name: str, rows: Sequence[dict[str, Any]], styles: dict[str, str], operator: str) -> dict[str, bool]:
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)))
        coder = Scripted([text.replace("OPERATOR", operator) for text in styles.values()])
        monkeypatch.setattr(DiffuCoder, "load", lambda *_, **__: coder)
        benchmark = "humaneval+" if name.startswith("HumanEval") else str(path)
        settings = EvaluateSettings(benchmark=benchmark, data=tmp_path, run=tmp_path / f"run{operator}", workers=2)
        ((report, _),) = list(evaluate(settings))
        assert report["tasks"] == len(styles)
        assert all(prompt.endswith(rows[0].get("prefill", PREFILL)) for prompt in coder.prompts)
        passed = [verdict["passed"] for verdict in report["verdicts"].values()]
        assert report["pass@1"] == sum(passed) / len(passed)
        return dict(zip(styles, passed, strict=True))

    return solve


@pytest.mark.parametrize(("operator", "right"), [("-", True), ("+", False)])
def test_a_prefilled_answer_in_any_style_gets_its_due(solved: Solved, operator: str, right: bool) -> None:
    styles = FENCED | PREFILLED | BODIES
    rows = [ROW | {"task_id": f"HumanEval/{900 + number}"} for number in range(len(styles))]
    assert solved("HumanEvalPlus.jsonl", rows, styles, operator) == dict.fromkeys(styles, right)


@pytest.mark.parametrize("prefill", ["", "```python\n", "<think>\n"])
@pytest.mark.parametrize(("operator", "right"), [("-", True), ("+", False)])
def test_an_answer_to_a_task_of_ones_own_does_too(solved: Solved, prefill: str, operator: str, right: bool) -> None:
    styles = FENCED | PREFILLED
    rows = [{"prompt": "Say how far apart.", "tests": LINES, "prefill": prefill}] * len(styles)
    assert solved("own.jsonl", rows, styles, operator) == dict.fromkeys(styles, right)


@pytest.mark.parametrize(("operator", "right"), [("-", 1.0), ("+", 0.0)])
def test_a_reward_does_too(sandbox: Sandbox, operator: str, right: float) -> None:
    styles = FENCED | PREFILLED
    rates = {
        name: reward(text.replace("OPERATOR", operator), LINES, sandbox).pass_rate for name, text in styles.items()
    }
    assert rates == dict.fromkeys(styles, right)
