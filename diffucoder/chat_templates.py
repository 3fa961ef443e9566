"""Chat templates, Jinja programs that come with a checkpoint: rendered with limits on time, memory and output.

For: conversations as text. Not for: which template a checkpoint has, tokens (`tokenizer`).

Jinja's sandbox limits what a template may touch, not how long it runs or how much it writes. Templates are therefore
rendered in a process of their own; the usual one, ChatML, is written without Jinja.
"""

from diffucoder.errors import PromptError
from diffucoder.limited import Limited, LimitError
from diffucoder.model_files import one_line

Turns = list[dict[str, str]]

# As the shipped model and checkpoints made by the recipes have it
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_limited = Limited(seconds=5, memory=2**30)  # importing takes up to a second, and a fifth of the memory


def chatml(turns: Turns) -> str:
    """What the template `CHATML` makes of `turns`."""
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return text + "<|im_start|>assistant\n"


def render_chat(template: str, turns: Turns, names: dict[str, str]) -> str:
    """Return the prompt of `turns` by a Jinja template, which gets the special tokens by their `names`.

    PromptError if the template rejects the messages, fails, or goes over a limit.
    """
    if template == CHATML:
        return chatml(turns)
    try:
        text: str = _limited(render_unlimited, template, turns, names)
        return text
    except LimitError as error:
        raise PromptError(f"the checkpoint's chat template {one_line(error)}; use another one") from None
    except PromptError:
        raise
    except (TypeError, ValueError) as error:
        raise PromptError(f"messages cannot be written as JSON ({one_line(error)}); give texts") from None


def render_unlimited(template: str, turns: Turns, names: dict[str, str]) -> str:
    """As `render_chat`, in this process: only the output is limited."""
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
