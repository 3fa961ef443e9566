"""`diffucoder chat`: a conversation in the terminal."""

import sys
from functools import partial
from typing import TYPE_CHECKING

from diffucoder.cli.common import Device, DType, Model, load_model, with_options
from diffucoder.cli.generate import Watch, decode, note, print_answers
from diffucoder.config import load_settings
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError, DiffuCoderError, PromptError

if TYPE_CHECKING:
    from diffucoder.decoding.coder import DiffuCoder

COMMANDS = """/clear              forget the conversation
/set NAME=VALUE     change a decoding setting, such as /set temperature=0.5
/settings           show what was set
/help               show this list
/exit               leave; so does Ctrl-D or an empty line"""


@partial(with_options, without=("num_samples",))  # a conversation has one next answer
def chat(
    *, model: Model = None, watch: Watch = False, dtype: DType = None, device: Device = None, params: DecodingParams
) -> None:
    """Talk to a model. Type /help for commands; an empty line or Ctrl-D ends the conversation."""
    coder = load_model(model, dtype, device)
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() line editing and history

        print(f"{coder.name}: write a request, /help for commands, Ctrl-D to leave", file=sys.stderr)
        if coder.name == "tiny":
            note("tiny was trained on single requests; type /clear before each next one")
    conversation = Conversation(coder, params, watched=watch)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input is not UTF-8 ({error.reason}); write it as UTF-8") from None
        if line in ("", "/exit"):
            return
        if line.startswith("/"):
            conversation.command(line)
        else:
            conversation.answer(line)


class Conversation:
    """The messages so far, and the settings for the next answer."""

    def __init__(self, coder: "DiffuCoder", params: DecodingParams, *, watched: bool) -> None:
        self.coder = coder
        self.params = params
        self.watched = watched
        self.messages: list[dict[str, str]] = []

    def answer(self, text: str) -> None:
        """Print the answer to a message. A conversation that is too long begins again with it. Raises PromptError."""
        self.messages.append({"role": "user", "content": text})
        try:
            request = self.coder.request(self.messages, self.params)
        except PromptError:
            if len(self.messages) == 1:
                self.messages.clear()
                raise
            self.messages = self.messages[-1:]
            note("the conversation is longer than the model's context; it begins again here")
            request = self.coder.request(self.messages, self.params)
        [[result]] = decode(self.coder, [request], watched=self.watched)
        print_answers([result], self.coder, shown=self.watched)
        self.messages.append({"role": "assistant", "content": result.text})

    def command(self, line: str) -> None:
        """Run a line that begins with a slash."""
        name, _, setting = line.partition(" ")
        if name == "/clear":
            self.messages.clear()
            note("the conversation is forgotten")
        elif name == "/set":
            self._change(setting)
        elif name == "/settings":
            changed = self.params.model_dump(include=self.params.model_fields_set)
            print(", ".join(f"{name}={value}" for name, value in changed.items()) or "all settings are the defaults")
        else:
            if name != "/help":
                note(f"{name} is not a command")
            print(COMMANDS)

    def _change(self, setting: str) -> None:
        given = self.params.model_dump(include=self.params.model_fields_set)
        try:
            changed = load_settings(DecodingParams, overrides=[setting])
            params = DecodingParams(**given | changed.model_dump(include=changed.model_fields_set))
            if params.num_samples != 1:
                raise ConfigError("a conversation has one next answer; leave num_samples at 1")
        except DiffuCoderError as error:  # a slip ends no conversation
            note(str(error))
        else:
            self.params = params
