"""The wire: what clients may ask in the OpenAI protocol, llama.cpp's `/infill`, and our own two requests. No torch.

For: shapes of requests, and what they mean for any-order decoding. Not for: answering them (`app`).

Whatever is not understood is refused with its name: a client that asks for a penalty and gets none has been lied to.
Settings that such clients send as a matter of course are taken where they ask for nothing (`presence_penalty=0`).

What the usual words mean here:

    temperature, top_p   of the token at each position when it is proposed; above 0 they change the order too
    seed                 fixes the answer, alone or among strangers; 0 if left out
    logprobs             of each token when it was committed, given what was known then: they depend on the order and do
                         not add up to a likelihood
    usage                tokens of the prompt, and of the answers before their ends; forward passes beside them
    stop                 ends an answer once nothing is masked before it
    max_tokens           the length of the canvas: an answer may end earlier, never later
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError

_OWN_NAMES = {name: name for name in ("temperature", "top_p", "seed", "stop")}  # settings that requests have names for


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a character (a lone surrogate at {error.start}); send whole ones") from None
    return text


def _settings(
    default: DecodingParams, decoding: dict[str, Any], own: dict[str, str], given: dict[str, Any]
) -> DecodingParams:
    """`default` with what is `given` by a request's `own` names, and with `decoding`, which must not name the same."""
    for name, other in (_OWN_NAMES | own).items():
        if name in decoding:
            raise ConfigError(f"decoding.{name} is the request's own {other}; give it there")
    return default.replace(**{name: value for name, value in given.items() if value is not None}, **decoding)


Text = Annotated[str, AfterValidator(_encodable)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Stops = Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


class Wire(BaseModel):
    """Base of what clients send: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class StreamOptions(Wire):
    """What a stream holds besides text."""

    include_usage: bool = False
    """a last chunk with the usage"""

    denoise: bool = False
    """a chunk for every step, with what it committed where: `denoise`, in chunks without choices"""


class Sampling(Wire):
    """What all requests for text share."""

    model: str | None = None
    """the name that /v1/models gives; the one model there is if left out"""

    max_tokens: int | None = Field(default=None, ge=1)
    """length of the canvas behind the prompt; the server's if left out"""

    temperature: Finite | None = Field(default=None, ge=0, le=2)
    """randomness of tokens and, above 0, of their order; the server's if left out, which is 0"""

    top_p: Finite | None = Field(default=None, gt=0, le=1)
    """propose only the likeliest tokens that together reach this probability"""

    n: int = Field(default=1, ge=1, le=64)
    """answers"""

    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """fixes the answers; 0 if left out"""

    stop: Stops | None = None
    """end an answer before the first of these"""

    stream: bool = False
    """send the answer as it settles, from the left, as server-sent events"""

    stream_options: StreamOptions | None = None
    """only with stream"""

    decoding: dict[str, Any] = Field(default_factory=dict)
    """settings of this project: policy, steps, threshold, block, cache, ... (docs/decoding.md)"""

    user: str | None = None
    """taken and not looked at"""

    presence_penalty: Literal[0] = 0
    """only 0: penalties are not supported"""

    frequency_penalty: Literal[0] = 0
    """only 0: penalties are not supported"""

    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    """only empty: biases are not supported"""

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams; add stream=true, or leave them out")
        return self

    def params(self, default: DecodingParams) -> DecodingParams:
        """What the request asks for, on top of the server's settings. Raises ConfigError."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "stop": _stops(self.stop)}
        given |= {"new_tokens": self.max_tokens, "num_samples": self.n}
        return _settings(default, self.decoding, {"new_tokens": "max_tokens", "num_samples": "n"}, given)


class CompletionRequest(Sampling):
    """`/v1/completions`: text to be continued or, with a suffix, text with one hole."""

    prompt: Text
    """what stands before the answer, as it is, without a chat template"""

    suffix: Text | None = None
    """what stands behind it; then max_tokens is the hole's length, or lengths are tried if it is left out"""

    echo: bool = False
    """repeat the prompt before the answer"""

    logprobs: int | None = Field(default=None, ge=0, le=1)
    """0 or 1: with the log-probability of each token when it was committed; alternatives are not kept"""

    best_of: int | None = None
    """only the same as n: answers are not sorted out"""

    @model_validator(mode="after")
    def _what_fits(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of} is not supported beyond n={self.n}; leave it out")
        if self.stream and (self.echo or self.logprobs is not None):
            raise ValueError("echo and logprobs come with the whole answer; leave out stream")
        if self.suffix is not None and self.echo:
            raise ValueError("what fills a hole is told alone; leave out echo")
        return self


class TextPart(Wire):
    """A part of a message: text alone."""

    type: Literal["text"]
    text: Text


class Message(Wire):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Sampling):
    """`/v1/chat/completions`: the next turn of a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """the newer name of max_tokens"""

    logprobs: bool = False
    """with the log-probability of each token when it was committed"""

    top_logprobs: Literal[0] | None = None
    """only 0: alternatives are not kept"""

    response_format: dict[Literal["type"], Literal["text"]] | None = None
    """only text"""

    cache_prompt: Any = None
    """llama.cpp's, a hint about speed: taken and not looked at"""

    @model_validator(mode="after")
    def _what_fits(self) -> Self:
        if self.stream and self.logprobs:
            raise ValueError("logprobs come with the whole answer; leave out stream")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
            self.max_tokens = self.max_completion_tokens
        return self


class FillRequest(Sampling):
    """`/v1/fill`: text with holes, marked `<|hole|>` or `<|hole:12|>`, which are filled jointly."""

    text: Text

    @model_validator(mode="after")
    def _what_fits(self) -> Self:
        if self.stop or self.max_tokens:
            raise ValueError("holes say how long they are, <|hole:12|>, and end there; leave out stop and max_tokens")
        return self


class Span(Wire):
    """Characters start to end of a text, which are to be written anew."""

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    tokens: int | None = Field(default=None, ge=1, le=4096)
    """length of what takes their place; several are tried if left out"""


class EditRequest(Sampling):
    """`/v1/edit`: a text of which some spans are written anew while the rest is frozen, or that is changed as told."""

    text: Text
    spans: list[Span] = Field(default_factory=list, max_length=64)
    instruction: Annotated[Text, Field(min_length=1)] | None = None
    """what to do to the text, for a model that follows instructions; only without spans"""

    @model_validator(mode="after")
    def _what_fits(self) -> Self:
        if bool(self.spans) == (self.instruction is not None):
            raise ValueError("give spans to write anew, or an instruction; one of them")
        end = 0
        for span in self.spans:
            if not end <= span.start <= span.end <= len(self.text):
                raise ValueError(
                    f"span {span.start} to {span.end} is not in order inside the {len(self.text)} characters"
                )
            end = span.end
        if self.stream:
            raise ValueError("an edit comes as a whole; leave out stream")
        if self.spans and (self.stop or self.max_tokens):
            raise ValueError("spans say how long they are; leave out stop and max_tokens")
        return self


class Extra(Wire):
    """llama.cpp's context from other files."""

    text: Text
    filename: str | None = None
    time: Any = None  # vim's is a pair


class InfillRequest(BaseModel):
    """llama.cpp's `/infill`, as editor plug-ins send it. Hints about its speed are taken and not looked at."""

    model_config = ConfigDict(extra="forbid")

    input_prefix: Text
    input_suffix: Text
    prompt: Text = ""
    """what has been typed behind the prefix already"""
    input_extra: list[Extra] = Field(default_factory=list)
    """text from elsewhere, put before the prefix as far as there is room"""
    n_predict: int | None = Field(default=None, ge=-1)
    """the most tokens that are tried; 0 writes nothing, -1 is as if left out"""
    n_cmpl: int = Field(default=1, ge=1, le=64)
    """answers; more than one come as a list"""
    stop: Stops | None = None
    """end an answer before the first of these"""
    temperature: Finite | None = Field(default=None, ge=0, le=2)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=-1, lt=2**63)
    stream: Literal[False] = False
    decoding: dict[str, Any] = Field(default_factory=dict)
    response_fields: list[str] = Field(default_factory=list, max_length=64)
    """tell only these of an answer, "timings/prompt_n" under that name; everything if there are none"""

    samplers: Any = None
    n_indent: Any = None
    id_slot: Any = None
    cache_prompt: Any = None
    t_max_prompt_ms: Any = None
    t_max_predict_ms: Any = None
    model: str | None = None

    def params(self, default: DecodingParams) -> DecodingParams:
        """What the request asks for, on top of the server's settings. Raises ConfigError."""
        given: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k or None}
        given |= {"seed": None if self.seed == -1 else self.seed, "stop": _stops(self.stop), "num_samples": self.n_cmpl}
        own = {"top_k": "top_k", "new_tokens": "n_predict", "num_samples": "n_cmpl"}
        return _settings(default, self.decoding, own, given)


class TokenizeRequest(Wire):
    """`/tokenize`: text to ids."""

    content: Text
    add_special: bool = True
    """read the names of special tokens as these tokens; false: as plain characters"""
    with_pieces: bool = False
    """with the text of each"""
