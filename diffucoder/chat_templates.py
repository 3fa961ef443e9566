"""Chat templates, Jinja programs that come with a checkpoint: rendered with limits on time, memory and output.

For: conversations as text. Not for: which template a checkpoint has, tokens (`tokenizer`).

Jinja's sandbox limits what a template may touch, not how long it runs or how much it writes. Templates are therefore
rendered in a process of their own; the usual one, ChatML, is written without Jinja.
"""

import os
from functools import cache

from diffucoder.errors import PromptError
from diffucoder.limited import Limited, LimitError
from diffucoder.model_files import one_line

Turns = list[dict[str, str]]

# As the shipped model and checkpoints made by the recipes have it
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SECONDS = 5  # of a processor; importing takes up to one of them
_MEMORY = 2**30  # of address space; importing takes a fifth


def chatml(turns: Turns) -> str:
    """What the template `CHATML` makes of `turns`."""
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return text + "<|im_start|>assistant\n"


def render_chat(template: str, turns: Turns, names: dict[str, str]) -> str:
    """The prompt of `turns` by a Jinja template, which sees the special tokens by their `names`.

    PromptError if the template rejects the messages, fails, or goes over a limit.
    """
    if template == CHATML:
        return chatml(turns)
    try:
        text: str = _renderer(os.getpid())(render_unlimited, template, turns, names)
    except LimitError as error:
        raise PromptError(
            f"the checkpoint's chat template {one_line(error)}; use another chat_template.jinja"
        ) from None
    except (TypeError, ValueError) as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(f"messages cannot be written as JSON ({one_line(error)}); give texts") from None
    return text


def render_unlimited(template: str, turns: Turns, names: dict[str, str]) -> str:
    """As `render_chat`, in this process: no limit but that of the output."""
    # late: slow to import, and ChatML does not need them
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        prompts, _ = render_jinja_template([turns], chat_template=template, add_generation_prompt=True, **names)
    except TemplateError as error:
        raise PromptError(f"the checkpoint's chat template rejects these messages: {one_line(error)}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PromptError(f"the checkpoint's chat template fails ({one_line(error)}); use another one") from error
    text = str(prompts[0])
    limit = 2**20 + 4 * sum(len(str(turn)) for turn in turns)
    if len(text) > limit:
        raise PromptError(f"the checkpoint's chat template wrote {len(text):,} characters, over {limit:,}; use another")
    return text


@cache
def _renderer(process: int) -> Limited:
    """The children of a process; a fork must not share those of its parent."""
    return Limited(seconds=_SECONDS, memory=_MEMORY)
