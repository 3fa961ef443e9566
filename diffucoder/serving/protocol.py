"""HTTP request bodies: the OpenAI protocol, llama.cpp's `/infill`, and this project's own `/v1/fill` and `/v1/edit`.

For: the fields of a request, and the decoding settings they stand for. Not for: answering requests (`app`). No torch.

An unknown field is an error: a server that ignores a penalty gives another answer than the client asked for. Fields
that clients always send are accepted with the value that changes nothing (`presence_penalty=0`). What the usual fields
mean when tokens are written in any order is in docs/serving.md.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError


def _as_list(stop: str | list[str] | None) -> list[str]:
    if isinstance(stop, str):
        return [stop]
    return stop or []


NonEmpty = Annotated[str, Field(min_length=1)]
Stops = Annotated[NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)] | None, AfterValidator(_as_list)]


class Body(BaseModel):
    """Base of everything clients send: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    """What a stream holds besides text."""

    include_usage: bool = Field(default=False, description="a last chunk with the usage")
    denoise: bool = Field(default=False, description="a chunk without choices for each step, with what it committed")


class DecodingRequest(Body):
    """Fields that all requests to decode share. Settings that are left out are the server's."""

    own_fields: ClassVar = {"temperature": "temperature", "top_p": "top_p", "seed": "seed", "stop": "stop"}
    """decoding settings that have a field of their own, and the field's name"""

    model: str | None = Field(default=None, description="name in /v1/models; may be left out")
    temperature: float | None = Field(
        default=None, ge=0, le=2, allow_inf_nan=False, description="randomness of tokens and, above 0, of their order"
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="propose only the likeliest tokens that together reach this probability"
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="fixes the answers; 0 if left out")
    stop: Stops = Field(default_factory=list, description="end an answer before the first of these")
    decoding: dict[str, Any] = Field(default_factory=dict, description="other settings, see docs/decoding.md")

    def params(self, default: DecodingParams) -> DecodingParams:
        """Return the server's settings with those of this request on top. Raises ConfigError."""
        changes = {}
        for setting, field in self.own_fields.items():
            if setting in self.decoding:
                raise ConfigError(f"decoding.{setting} is the request's own {field}; set it there")
            if getattr(self, field) is not None:
                changes[setting] = getattr(self, field)
        return default.replace(**changes, **self.decoding)


class SamplingRequest(DecodingRequest):
    """Fields that all requests of the OpenAI kind share."""

    own_fields = {**DecodingRequest.own_fields, "new_tokens": "max_tokens", "num_samples": "n"}

    max_tokens: int | None = Field(default=None, ge=1, description="length of the canvas; the server's if left out")
    n: int = Field(default=1, ge=1, le=64, description="number of answers")
    stream: bool = Field(default=False, description="send text as it settles, from the left, as server-sent events")
    stream_options: StreamOptions | None = Field(default=None, description="only with stream")
    user: str | None = Field(default=None, description="accepted and ignored")
    presence_penalty: Literal[0] = Field(default=0, description="only 0: penalties are not supported")
    frequency_penalty: Literal[0] = Field(default=0, description="only 0: penalties are not supported")
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0, description="only empty: not supported")

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams; add stream=true, or leave them out")
        return self


class CompletionRequest(SamplingRequest):
    """`/v1/completions`: text to be continued or, with a suffix, text with one hole."""

    prompt: str = Field(description="the text before the answer, as it is, without a chat template")
    suffix: str | None = Field(
        default=None, description="the text after a hole of max_tokens tokens; lengths are tried if that is left out"
    )
    echo: bool = Field(default=False, description="repeat the prompt before the answer")
    logprobs: int | None = Field(default=None, ge=0, le=1, description="with each token's log-probability")
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
    text: str


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(SamplingRequest):
    """`/v1/chat/completions`: the next turn of a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the newer name of max_tokens")
    logprobs: bool = Field(default=False, description="with each token's log-probability when it was committed")
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

    text: str

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.max_tokens:
            raise ValueError("a hole says how long it is, <|hole:12|>; leave out max_tokens")
        return self


class Span(Body):
    """The characters from start to end of a text, which are to be rewritten."""

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    tokens: int | None = Field(default=None, ge=1, le=4096, description="new length; lengths are tried if left out")


class EditRequest(SamplingRequest):
    """`/v1/edit`: a text to change, either in some spans while the rest is frozen, or by an instruction."""

    text: str
    spans: list[Span] = Field(default_factory=list, max_length=64, description="in order, without overlaps")
    instruction: str | None = Field(default=None, min_length=1, description="what to change; only without spans")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if bool(self.spans) == (self.instruction is not None):
            raise ValueError("give either spans to rewrite or an instruction")
        if self.spans and self.max_tokens:
            raise ValueError("spans say how long they are; leave out max_tokens")
        return self


class Extra(Body):
    """Context from another file, as llama.cpp sends it."""

    text: str
    filename: str | None = None
    time: Any = None  # Vim sends a pair of numbers


class InfillRequest(DecodingRequest):
    """llama.cpp's `/infill`, as editor plug-ins send it. Hints about speed are accepted and ignored."""

    own_fields = {**DecodingRequest.own_fields, "new_tokens": "n_predict", "num_samples": "n_cmpl", "top_k": "top_k"}

    input_prefix: str
    input_suffix: str
    prompt: str = Field(default="", description="what has been typed after the prefix already")
    input_extra: list[Extra] = Field(default_factory=list, description="put before the prefix as far as it fits")
    n_predict: int | None = Field(
        default=None, ge=-1, description="the most tokens that are tried; 0 writes nothing, -1 is as if left out"
    )
    n_cmpl: int = Field(default=1, ge=1, le=64, description="number of answers; more than one come as a list")
    top_k: int | None = Field(default=None, ge=0, description="0 is as if left out")
    seed: int | None = Field(default=None, ge=-1, lt=2**63, description="-1 is as if left out")
    stream: Literal[False] = False
    response_fields: list[str] = Field(
        default_factory=list, max_length=64, description="send only these fields, such as timings/prompt_n; empty: all"
    )

    samplers: Any = None  # from here on: accepted and ignored
    n_indent: Any = None
    id_slot: Any = None
    cache_prompt: Any = None
    t_max_prompt_ms: Any = None
    t_max_predict_ms: Any = None

    @model_validator(mode="after")
    def _leave_out_defaults(self) -> Self:
        """Replace the values by which llama.cpp's clients leave a field out."""
        if self.n_predict == -1:
            self.n_predict = None
        if self.seed == -1:
            self.seed = None
        self.top_k = self.top_k or None
        return self


class TokenizeRequest(Body):
    """`/tokenize`: text to ids."""

    content: str
    add_special: bool = Field(default=True, description="read names of special tokens as tokens, not as characters")
    with_pieces: bool = Field(default=False, description="with the text of each token")
