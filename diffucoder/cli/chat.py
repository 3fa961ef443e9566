"""`diffucoder chat`: talk to a model."""

import sys
from functools import partial

from diffucoder.cli.common import Device, DType, Model, Watch, decode, load_model, print_answer
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import PromptError
from diffucoder.options import with_options


@partial(with_options, without=("num_samples",))  # a conversation has one next answer
def chat(
    *, model: Model = None, watch: Watch = False, dtype: DType = None, device: Device = None, params: DecodingParams
) -> None:
    """Talk to a model; an empty line or end of file ends the conversation."""
    coder = load_model(model, dtype, device)
    messages: list[dict[str, str]] = []
    while True:
        line = _read_line()
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        try:
            request = coder.request(messages, params)
        except PromptError:
            if len(messages) == 1:
                raise
            messages = messages[-1:]
            print("(the conversation outgrew the model's context; starting again)", file=sys.stderr)
            request = coder.request(messages, params)
        [result] = decode(coder, request, watched=watch)
        print_answer(result, coder, as_json=False)
        messages.append({"role": "assistant", "content": result.text})


def _read_line() -> str:
    """Return the next line of the user; "" at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""
