"""HTTP request bodies: the OpenAI protocol, llama.cpp's `/infill`, and this project's own `/v1/fill` and `/v1/edit`.

For: the fields of a request, and the decoding settings they stand for. Not for: answering requests (`app`). No torch.

An unknown field is an error: a server that ignores a penalty gives another answer than the client asked for. Fields
that clients always send are accepted with the value that changes nothing (`presence_penalty=0`). What the usual fields
mean when tokens are written in any order is in docs/serving.md.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a character (a lone surrogate at {error.start}); send whole ones") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
NonEmpty = Annotated[str, Field(min_length=1)]
Stops = NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)]


class Body(BaseModel):
    """Base of everything clients send: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    """What a stream holds besides text."""

    include_usage: bool = Field(default=False, description="a last chunk with the usage")
    denoise: bool = Field(default=False, description="a chunk without choices for each step, with what it committed")


class SamplingRequest(Body):
    """Fields that all requests for text share."""

    model: str | None = Field(default=None, description="name in /v1/models; may be left out")
    max_tokens: int | None = Field(default=None, ge=1, description="length of the canvas; the server's if left out")
    temperature: Temperature | None = Field(
        default=None, description="randomness of tokens and, above 0, of their order; the server's if left out"
    )
    top_p: TopP | None = Field(
        default=None, description="propose only the likeliest tokens that together reach this probability"
    )
    n: int = Field(default=1, ge=1, le=64, description="number of answers")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="fixes the answers; 0 if left out")
    stop: Stops | None = Field(default=None, description="end an answer before the first of these")
    stream: bool = Field(default=False, description="send text as it settles, from the left, as server-sent events")
    stream_options: StreamOptions | None = Field(default=None, description="only with stream")
    decoding: dict[str, Any] = Field(
        default_factory=dict, description="other settings: policy, steps, threshold, cache, ... (docs/decoding.md)"
    )
    user: str | None = Field(default=None, description="accepted and ignored")
    presence_penalty: Literal[0] = Field(default=0, description="only 0: penalties are not supported")
    frequency_penalty: Literal[0] = Field(default=0, description="only 0: penalties are not supported")
    logit_bias: dict[str, float] | None = Field(
        default=None, max_length=0, description="only empty: biases are not supported"
    )

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams; add stream=true, or leave them out")
        return self

    def params(self, default: DecodingParams) -> DecodingParams:
        """Return the server's settings with those of this request on top. Raises ConfigError."""
        fields = {
            "new_tokens": self.max_tokens,
            "num_samples": self.n,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": _stop_strings(self.stop),
        }
        return _merge(default, fields, self.decoding, {"new_tokens": "max_tokens", "num_samples": "n"})


class CompletionRequest(SamplingRequest):
    """`/v1/completions`: text to be continued or, with a suffix, text with one hole."""

    prompt: Text = Field(description="the text before the answer, as it is, without a chat template")
    suffix: Text | None = Field(
        default=None,
        description="the text after a hole of max_tokens tokens; lengths are tried if that is left out",
    )
    echo: bool = Field(default=False, description="repeat the prompt before the answer")
    logprobs: int | None = Field(
        default=None, ge=0, le=1, description="with the log-probability of each token when it was committed"
    )
    best_of: int | None = Field(default=None, description="only the same as n: answers are not sorted out")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of} is not supported beyond n={self.n}; leave it out")
        if self.stream and (self.echo or self.logprobs is not None):
            raise ValueError("echo and logprobs come with the whole answer; leave out stream")
        if self.suffix is not None and self.echo:
            raise ValueError("the answer to a prompt with a suffix is the hole alone; leave out echo")
        return self


class TextPart(Body):
    """A part of a message: text alone."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(SamplingRequest):
    """`/v1/chat/completions`: the next turn of a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the newer name of max_tokens")
    logprobs: bool = Field(default=False, description="with the log-probability of each token when it was committed")
    top_logprobs: Literal[0] | None = Field(default=None, description="only 0: alternatives are not kept")
    response_format: dict[Literal["type"], Literal["text"]] | None = Field(default=None, description="only text")
    cache_prompt: Any = Field(default=None, description="a hint of llama.cpp about speed: accepted and ignored")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.stream and self.logprobs:
            raise ValueError("logprobs come with the whole answer; leave out stream")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
            self.max_tokens = self.max_completion_tokens
        return self


class FillRequest(SamplingRequest):
    """`/v1/fill`: text with holes, marked `<|hole|>` or `<|hole:12|>`, which are filled jointly."""

    text: Text

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.stop or self.max_tokens:
            raise ValueError("a hole says how long it is, <|hole:12|>, and ends there; leave out stop and max_tokens")
        return self


class Span(Body):
    """The characters from start to end of a text, which are to be rewritten."""

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    tokens: int | None = Field(default=None, ge=1, le=4096, description="new length; lengths are tried if left out")


class EditRequest(SamplingRequest):
    """`/v1/edit`: a text to change, either in some spans while the rest is frozen, or by an instruction."""

    text: Text
    spans: list[Span] = Field(default_factory=list, max_length=64)
    instruction: Text | None = Field(default=None, min_length=1, description="what to change; only without spans")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if bool(self.spans) == (self.instruction is not None):
            raise ValueError("give either spans to rewrite or an instruction")
        end = 0
        for span in self.spans:
            if not end <= span.start <= span.end <= len(self.text):
                place = f"span {span.start} to {span.end}"
                raise ValueError(f"{place} is not in order inside the {len(self.text)} characters")
            end = span.end
        if self.stream:
            raise ValueError("an edit comes as a whole; leave out stream")
        if self.spans and (self.stop or self.max_tokens):
            raise ValueError("spans say how long they are; leave out stop and max_tokens")
        return self


class Extra(Body):
    """Context from another file, as llama.cpp sends it."""

    text: Text
    filename: str | None = None
    time: Any = None  # Vim sends a pair of numbers


class InfillRequest(Body):
    """llama.cpp's `/infill`, as editor plug-ins send it. Hints about speed are accepted and ignored."""

    input_prefix: Text
    input_suffix: Text
    prompt: Text = Field(default="", description="what has been typed after the prefix already")
    input_extra: list[Extra] = Field(
        default_factory=list, description="context, put before the prefix as far as it fits"
    )
    n_predict: int | None = Field(
        default=None, ge=-1, description="the most tokens that are tried; 0 writes nothing, -1 is as if left out"
    )
    n_cmpl: int = Field(default=1, ge=1, le=64, description="number of answers; more than one come as a list")
    stop: Stops | None = Field(default=None, description="end an answer before the first of these")
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=-1, lt=2**63)
    stream: Literal[False] = False
    decoding: dict[str, Any] = Field(default_factory=dict)
    response_fields: list[str] = Field(
        default_factory=list, max_length=64, description="send only these fields, such as timings/prompt_n; empty: all"
    )
    model: str | None = None

    samplers: Any = None  # from here on: accepted and ignored
    n_indent: Any = None
    id_slot: Any = None
    cache_prompt: Any = None
    t_max_prompt_ms: Any = None
    t_max_predict_ms: Any = None

    def params(self, default: DecodingParams) -> DecodingParams:
        """Return the server's settings with those of this request on top. Raises ConfigError."""
        fields = {
            "new_tokens": None,  # n_predict bounds the lengths that are tried, it is not the length of a canvas
            "num_samples": self.n_cmpl,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or None,
            "seed": None if self.seed == -1 else self.seed,
            "stop": _stop_strings(self.stop),
        }
        return _merge(default, fields, self.decoding, {"new_tokens": "n_predict", "num_samples": "n_cmpl"})


class TokenizeRequest(Body):
    """`/tokenize`: text to ids."""

    content: Text
    add_special: bool = Field(default=True, description="read names of special tokens as tokens, not as characters")
    with_pieces: bool = Field(default=False, description="with the text of each token")


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    if isinstance(stop, str):
        return (stop,)
    return tuple(stop or ())


def _merge(
    default: DecodingParams, fields: dict[str, Any], decoding: dict[str, Any], names: dict[str, str]
) -> DecodingParams:
    """Return `default` with the `fields` of a request that are not None, and with its `decoding`, on top.

    `decoding` must not repeat a setting that the request has a field for; `names` says how such a field is called
    where its name is not the setting's.
    """
    for setting in fields:
        if setting in decoding:
            field = names.get(setting, setting)
            raise ConfigError(f"decoding.{setting} is the request's own {field}; set it there")
    changes = {setting: value for setting, value in fields.items() if value is not None}
    return default.replace(**changes, **decoding)
