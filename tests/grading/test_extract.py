"""Replies as models write them, and the program a person would see in each."""

import pytest

from diffucoder.grading.extract import program_from

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
        f"~ no fence below\n```\n{CODE}",
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
