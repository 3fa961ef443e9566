"""Replies as models write them, and the program a person would see in each."""

import ast
import gzip
import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffucoder.grading.extract import answered, completed, future_first, program_from
from diffucoder.grading.syntax import parsed

CODE = "def f(x):\n    return x"


@pytest.mark.parametrize(
    "reply",
    [
        f"```python\n{CODE}\n```",
        f"Here is the code:\n```python\n{CODE}\n```\nIt returns x.",
        f"Here is the code: ```python\n{CODE}\n```",
        f"```py\n{CODE}\n```",
        f"```Python3\n{CODE}\n```",
        f"``` python \n{CODE}\n```",
        f"```python title='f.py'\n{CODE}\n```",
        f"```python\n{CODE}",
        f"```python\n{CODE}```\nDone.",
        f"```python\n\n{CODE}\n\n```",
        "1. So:\n   ```python\n   def f(x):\n       return x\n   ```",
        f"```python\n{CODE}\n```".replace("\n", "\r\n"),
        f"```python\n{CODE}\n```\n```python\nf(1)\n```",
        f"```bash\npip install f\n```\nand\n```python\n{CODE}\n```",
        f"```\n{CODE}\n```",
        f"```c\n{CODE}\n```",
        f"```java\nclass F {{\n}}\n```\n```python\n{CODE}\n```",
        f"The two\nclass methods are slow.\n```python\n{CODE}\n```\n```cpp\nclass F {{\n}};\n```",
        f"```python\n{CODE}\n```\n```python\nclass FTests:\n    x = f(1)\n```\n```python\ndef f_test():\n    f(1)\n```",
        f"```python\n{CODE}\n```\n```python\nclass F(unittest.TestCase):\n    x = f(1)\nunittest.main()\n```",
        f"```python\nfrom f import f\nf(1)\n```\n```python\n{CODE}\n```",
        f"```python\ndef f(x):\n    raise NotImplementedError('f')\n```\n```python\n{CODE}\n```",
        f"~ no fence below\n```\n{CODE}",
        "Here it is, as Markdown indents it:\n\n    def f(x):\n        return x\n\nIt returns x.",
        "Solution::\n\n.. code-block:: python\n\n    def f(x):\n        return x\n\nDone.",
        f"<analysis>\n```python\ndef f(x):\n    return 0\n```\n</analysis>\n```python\n{CODE}\n```",
        f"<scratchpad>\ndef f(x):\n    return 0\n</scratchpad>\n{CODE}",
        CODE,
        f"\n{CODE}\n",
    ],
)
def test_the_program_is_found(reply: str) -> None:
    assert program_from(reply) == CODE


@pytest.mark.parametrize("terminator", ["<|im_end|>", "<|endoftext|>", "<|dlm_pad|>"])
@pytest.mark.parametrize("reply", [CODE, f"```python\n{CODE}", f"```python\n{CODE}\n```"])
def test_a_terminator_ends_the_reply(reply: str, terminator: str) -> None:
    assert program_from(f"{reply}{terminator}```python\nevil()\n```<|dlm_pad|><|dlm_pad|>") == CODE


def test_backticks_within_a_line_are_the_programs_own() -> None:
    assert program_from('```python\nfence = "```" + "x"\n```') == 'fence = "```" + "x"'


def test_a_completion_keeps_its_indentation() -> None:
    assert program_from("    return x\n") == "    return x"


@pytest.mark.parametrize("reply", ["", "<|im_end|>", "```python\n```", "```python"])
def test_an_empty_reply_has_an_empty_program(reply: str) -> None:
    assert program_from(reply) == ""


def test_another_language_that_begins_with_py_is_not_python() -> None:
    assert program_from(f"```pyrex\nx\n```\n```python\n{CODE}\n```") == CODE


def test_imports_from_the_future_come_first() -> None:
    future = "from __future__ import annotations"
    reply = f"```python\n{CODE} + g(x)\n```\n```python\n{future}\ndef g(x):\n    return 0\n```"
    programs = [program_from(reply), answered(HEAD, f"```python\n{future}\n{CODE}\n```", "f")]
    programs.append(completed("import re\n", f"{future}\n{CODE}\n", "f"))
    for program in programs:
        assert program.startswith(future)
        compile(program, "program", "exec", dont_inherit=True)
    documented = f'"""F."""\n{future}\n{CODE}'
    assert future_first(documented) == documented


# --- prose without a fence -------------------------------------------------------------------------------------------

FUNCTION = "def f(x):\n    # twice\n\n    return x * 2"


@pytest.mark.parametrize("before", ["", "Here is the function:\n\n", "Sure!\nIt doubles.\n"])
@pytest.mark.parametrize("after", ["", "\n\nThis doubles x.", "\nExplanation:\n1. It's simple, isn't it?\n* Done"])
def test_prose_around_bare_code_is_no_part_of_it(before: str, after: str) -> None:
    assert program_from(before + FUNCTION + after) == FUNCTION


@pytest.mark.parametrize(
    "reply",
    [
        "def f(x):\n    return (x\n",
        "def f(x):\n    return x\nprint(f(1)",
        "def f(x):\n    return x\ndef g(",
        "Sorry, I cannot.",
        "import os\nand nothing else",
        "    return x\nThat is it.",
    ],
)
def test_broken_code_and_prose_alone_stay_as_they_are(reply: str) -> None:
    assert program_from(reply) == reply.strip("\n")


# --- continuations of a prompt ---------------------------------------------------------------------------------------

HEAD = 'from math import pi\n\n\ndef f(x):\n    """Double x."""\n'
BODY = "    return x * 2\n"
BABBLE = [
    "",
    "\n\nprint(f(2))\n",
    "\n\nif __name__ == '__main__':\n    print(f(2))\n",
    "\n\nassert f(1) == 2\n",
    "\n\nThis function doubles x. It's done.\n",
    "\nDone\n",
    "\n\ndef g(y):\n    return f(y",
    "\n\ndef g(y):\n    return f(y)\n",
    "\n\ndef f(x):\n    return None\n",
    "\n\nclass Solution:\n    def",
    "```\nSome words.",
    "\n```python\nevil()\n```",
    '\n\n"""\nWrite a function',
    "\n\nimport sys\nsys.exit()\n",
    "<|endoftext|>\n\nevil(",
    "\n\n\0\0",
    "\n\n" + "(" * 5000,
    "\n\nx = " + "-" * 100_000 + "1",
    "\n\nif x:\n" * 500,
]


def same(program: str, other: str) -> bool:
    return ast.dump(parsed(program)) == ast.dump(parsed(other))


@pytest.mark.parametrize("babble", BABBLE)
@pytest.mark.parametrize(
    "completion", [BODY, BODY.replace("\n", "\r\n"), HEAD + BODY], ids=["body", "CRLF", "whole function"]
)
def test_what_a_base_model_babbles_behind_the_function_is_cut(completion: str, babble: str) -> None:
    program = completed(HEAD, completion + babble, "f")
    assert same(program, HEAD + completion)
    assert program.endswith("return x * 2\n")


def test_helpers_that_the_function_needs_are_kept_wherever_they_stand() -> None:
    body = "    return g(x) + LIMIT + sqrt(x)\n"
    helpers = (
        "import re\nfrom math import sqrt\nLIMIT: int = 3\nOTHER = 4\n"
        "def unused():\n    pass\n@h\ndef g(y):\n    return f(y)\ndef h(z):\n    return z\n"
    )
    kept = (
        "from math import sqrt\nLIMIT: int = 3\n@h\ndef g(y):\n    return f(y)\ndef h(z):\n    return z\n"  # in order
    )
    assert completed(HEAD, body + helpers, "f") == HEAD + body + kept
    assert completed('"""Write f."""\n', helpers + "def f(x):\n" + body + helpers, "f").count("def g") == 1


@pytest.mark.parametrize(
    "reply",
    [
        f"```python\n{HEAD}{BODY}```\nDone.",
        f"Here it is:\n```python\ndef f(x):\n{BODY}```",
        f"```python\n{BODY}```",
        f"def f(x):\n{BODY}\nprint(f(1))",
    ],
)
@pytest.mark.parametrize("head", [HEAD, "from math import pi\ndef f(x):\n"])
def test_an_answer_in_place_of_a_continuation_is_read_as_one(reply: str, head: str) -> None:
    namespace: dict[str, Any] = {}
    exec(completed(head, reply, "f"), namespace)
    assert namespace["f"](2) == 4
    assert namespace["pi"] > 3


@pytest.mark.parametrize("completion", ["", "No idea.", "    return (", "def g(x):\n    return x\n"])
def test_a_continuation_without_the_function_is_left_to_fail(completion: str) -> None:
    assert completed(HEAD, completion, "f") == HEAD + completion


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_behind_a_function_changes_it(text: str) -> None:
    namespace: dict[str, Any] = {}
    exec(completed(HEAD, BODY + "\n" + text, "f"), namespace)
    assert namespace["f"](2) == 4 or text.startswith((" ", "\t", "\f"))


@pytest.mark.parametrize("file", ["HumanEvalPlus", "MbppPlus"])
def test_published_solutions_survive_whatever_follows_them(shared: Path, file: str) -> None:
    with gzip.open(shared / f"data/{file}.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    for at, row in enumerate(rows):
        prompt, solution, name = row["prompt"], row["canonical_solution"], row["entry_point"]
        babble = BABBLE[at % len(BABBLE)]
        for completion in (solution, prompt + solution, f"```python\n{prompt}{solution}\n```"):
            assert last(name, completed(prompt, completion + babble, name)) == last(name, prompt + solution), completion


def last(name: str, program: str) -> str:
    """The last function of that name, which is the one in force."""
    functions = [node for node in parsed(program).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return ast.dump(functions[-1])


def test_programs_parsed_in_threads_leave_the_filters_of_warnings_as_they_were(
    recwarn: pytest.WarningsRecorder,
) -> None:
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    program = 'pattern = "\\d"\n' * 200
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(parsed, [program] * 200))
    sys.setswitchinterval(interval)
    assert warnings.filters == before
    assert not recwarn.list
