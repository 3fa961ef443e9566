"""HTTP request bodies: the OpenAI protocol, llama.cpp's `/infill`, and this project's own `/v1/fill` and `/v1/edit`.

For: the fields of a request, and the decoding settings they stand for. Not for: answering requests (`app`). No torch.

An unknown field is an error: a server that ignores a penalty gives another answer than the client asked for. A field
that asks for nothing is as if left out, in every body: null, a hint (`HINTS`), a value that changes nothing (`OFF`).
What the usual fields mean when tokens are written in any order is in docs/serving.md.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    model_validator,
)

from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError

# Fields that do not change what is written: labels, hints about speed, and settings of a sampler that is off.
HINTS = frozenset(
    """
    user metadata safety_identifier prompt_cache_key prompt_cache_retention service_tier parallel_tool_calls
    cache_control keep_alive cache_prompt id_slot samplers n_indent t_max_prompt_ms t_max_predict_ms
    repeat_last_n penalty_last_n penalize_nl mirostat_tau mirostat_eta dynatemp_exponent xtc_threshold
    dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers
    """.split()
)

MOST_FIELDS = 256  # of an object; each that is unknown costs an error
MOST_ITEMS = 1024  # messages, parts of one, texts from other files: objects that are checked one by one

# Values by which clients leave a field out, besides null.
OFF: dict[str, tuple[Any, ...]] = {  # Any: JSON
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p", "top_logprobs", "n_probs", "min_keep"), (0,)),
    **dict.fromkeys(("mirostat", "dynatemp_range", "xtc_probability", "dry_multiplier", "min_tokens"), (0,)),
    **dict.fromkeys(("repeat_penalty", "repetition_penalty", "length_penalty", "typical_p", "typ_p", "tfs_z"), (1,)),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict", "seed"), (-1,)),
    **dict.fromkeys(("top_k", "n_keep", "top_n_sigma"), (0, -1)),
    **dict.fromkeys(("store", "logprobs", "echo", "ignore_eos", "include_obfuscation", "return_tokens"), (False,)),
    **dict.fromkeys(("timings_per_token", "return_progress", "post_sampling_probs", "use_beam_search"), (False,)),
    **dict.fromkeys(("include_stop_str_in_output", "continue_final_message"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("tools", "functions", "tool_calls", "annotations", "lora", "image_data", "stop_token_ids"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("logit_bias", "json_schema", "chat_template_kwargs"), ({}, [])),
    **dict.fromkeys(("model", "grammar", "refusal", "reasoning", "reasoning_content"), ("",)),
    **dict.fromkeys(("think", "prefix", "separate_reasoning", "continuous_usage_stats"), (False,)),
    **dict.fromkeys(("include_reasoning", "stream_reasoning", "spaces_between_special_tokens"), (True, False)),
    **dict.fromkeys(("documents", "citations", "reasoning_details", "thinking_blocks"), ([],)),
    **dict.fromkeys(("options", "extra_body", "provider_specific_fields"), ({},)),
    **dict.fromkeys(("priority", "top_a", "n_discard", "n_cache_reuse"), (0,)),
    **dict.fromkeys(("slot_id", "adaptive_target", "sse_ping_interval"), (-1,)),
    "best_of": (1,),
    "thinking": ({"type": "disabled"},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}


def _asks_nothing(field: str, value: Any) -> bool:  # Any: JSON
    if value is None or field in HINTS:
        return True
    # in Python 0 equals False
    return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in OFF.get(field, ()))


def _without_empty(given: Any) -> Any:  # Any: JSON
    """Stop strings without empty ones, which ask for nothing; None if there are no others."""
    if isinstance(given, list) and "" in given:
        return [stop for stop in given if stop != ""] or None
    return None if given == "" else given


def _as_list(stop: str | list[str] | None) -> list[str] | None:
    return [stop] if isinstance(stop, str) else stop


# Lists stop at their first error: a body of 1 MiB has room for half a million of them
Stop = Annotated[str, Field(max_length=1000)]
Stops = Annotated[
    Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None,
    BeforeValidator(_without_empty),
    AfterValidator(_as_list),
]
Ids = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]
Prompt = str | Ids
Prompts = str | Ids | Annotated[list[Prompt], Field(min_length=1, max_length=64, fail_fast=True)]
Length = Annotated[int, Field(ge=1, lt=2**31)]  # tokens, where the model's context is the limit
Count = Annotated[int, Field(ge=1, le=64)]  # answers


class TextPrompt(BaseModel):
    """llama.cpp's object for a prompt, without images."""

    model_config = ConfigDict(extra="forbid")

    prompt_string: str


Mixed = Annotated[list[StrictInt | str], Field(min_length=1, fail_fast=True)]  # ids and text, one prompt
LlamaPrompt = str | TextPrompt | Mixed
LlamaPrompts = LlamaPrompt | Annotated[list[LlamaPrompt], Field(min_length=1, max_length=64, fail_fast=True)]


def prompts_of(given: Any) -> list[str | list[int | str]]:  # Any: Prompts or LlamaPrompts
    """The prompts of a field: each is text, or a list of token ids and text."""
    if not isinstance(given, list) or any(isinstance(part, int) for part in given):  # a list of texts has several
        given = [given]
    return [prompt.prompt_string if isinstance(prompt, TextPrompt) else prompt for prompt in given]


class Body(BaseModel):
    """Base of everything clients send: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_nothing(cls, given: Any) -> Any:  # Any: JSON
        if not isinstance(given, dict):
            return given
        if len(given) > MOST_FIELDS:
            raise ValueError(f"{len(given)} fields are over {MOST_FIELDS}; leave out those that are not supported")
        return {field: value for field, value in given.items() if not _asks_nothing(field, value)}


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
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="fixes the answers")
    stop: Stops = Field(default=None, description="end an answer before the first of these; empty: none")
    decoding: dict[str, Any] = Field(
        default_factory=dict, max_length=MOST_FIELDS, description="other settings, see docs/decoding.md"
    )

    def params(self, default: DecodingParams) -> DecodingParams:
        """Return the server's settings with those of this request on top. Raises ConfigError."""
        changes = {}
        for setting, value in self.decoding.items():
            known = DecodingParams.model_fields.get(setting)
            if value is not None or known is None or known.default is None:  # null is a value of some settings
                changes[setting] = value
        for setting, field in self.own_fields.items():
            if changes.get(setting) is not None:
                raise ConfigError(f"decoding.{setting} is the request's own {field}; set it there")
            if getattr(self, field) is not None:
                changes[setting] = getattr(self, field)
        return default.replace(**changes)


class SamplingRequest(DecodingRequest):
    """Fields that all requests of the OpenAI kind share."""

    own_fields = {**DecodingRequest.own_fields, "new_tokens": "max_tokens", "num_samples": "n"}

    max_tokens: Length | None = Field(default=None, description="length of the canvas; the server's if left out")
    n: Count | None = Field(default=None, description="number of answers to each prompt")
    stream: bool = Field(default=False, description="send text as it settles, from the left, as server-sent events")
    stream_options: StreamOptions = Field(default_factory=StreamOptions, description="only with stream")

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options != StreamOptions() and not self.stream:
            raise ValueError("stream_options are for streams; add stream=true, or leave them out")
        return self


class CompletionRequest(SamplingRequest):
    """`/v1/completions`: text to be continued or, with a suffix, text with one hole."""

    prompt: Prompts = Field(
        description="the text before the answer, as it is, without a chat template; or token ids, or several prompts"
    )
    suffix: str | None = Field(
        default=None, description="the text after a hole of max_tokens tokens; lengths are tried if that is left out"
    )
    echo: bool = Field(default=False, description="repeat the prompt before the answer")
    logprobs: int | None = Field(default=None, ge=0, le=1, description="with each token's log-probability")
    best_of: Count | None = Field(default=None, description="only the same as n: answers are not sorted out")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError(f"best_of={self.best_of} is not supported beyond n={self.n or 1}; leave it out")
        if self.stream and (self.echo or self.logprobs is not None):
            raise ValueError("echo and logprobs come with the whole answer; leave out stream")
        if self.suffix is not None and self.echo:
            raise ValueError("the answer to a prompt with a suffix is the hole alone; leave out echo")
        prompts = prompts_of(self.prompt)
        if self.suffix is not None and (len(prompts) > 1 or not isinstance(prompts[0], str)):
            raise ValueError("a suffix belongs to one prompt of text; send a request for each hole")
        return self


class TextPart(Body):
    """A part of a message: text alone."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_ITEMS, fail_fast=True)] | None = Field(
        default=None, description="may be null in an assistant's message"
    )
    name: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"the {self.role} message has no content; give a string or a list of text parts")
        return self

    def plain(self) -> dict[str, str]:
        """Return role and text."""
        text = self.content or ""
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(SamplingRequest):
    """`/v1/chat/completions`: the next turn of a conversation."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)
    max_completion_tokens: Length | None = Field(default=None, description="the newer name of max_tokens")
    logprobs: bool = Field(default=False, description="with each token's log-probability when it was committed")

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

    start: int = Field(ge=0, lt=2**31)
    end: int = Field(ge=0, lt=2**31)
    tokens: int | None = Field(default=None, ge=1, le=4096, description="new length; lengths are tried if left out")


class EditRequest(SamplingRequest):
    """`/v1/edit`: a text to change, either in some spans while the rest is frozen, or by an instruction."""

    text: str
    spans: list[Span] = Field(default_factory=list, max_length=64, fail_fast=True, description="in order, no overlaps")
    instruction: str | None = Field(default=None, min_length=1, description="what to change; only without spans")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if bool(self.spans) == (self.instruction is not None):
            raise ValueError("give either spans to rewrite or an instruction")
        if self.spans and self.max_tokens:
            raise ValueError("spans say how long they are; leave out max_tokens")
        return self


class RepairRequest(DecodingRequest):
    """`/v1/repair`: a program in which something is to be found and written again."""

    text: str
    tests: list[Annotated[str, Field(max_length=10_000)]] = Field(
        default_factory=list,
        max_length=64,
        fail_fast=True,
        description="asserts that the program has to pass; only where the server runs programs",
    )
    passes: int = Field(default=512, ge=1, le=8192, description="forward passes of a row that it may take")


class Extra(Body):
    """Context from another file, as llama.cpp sends it."""

    text: str
    filename: str | None = None
    time: Any = None  # Vim sends a pair of numbers


class LlamaRequest(DecodingRequest):
    """Fields that llama.cpp's routes share."""

    own_fields = {**DecodingRequest.own_fields, "new_tokens": "n_predict", "num_samples": "n_cmpl", "top_k": "top_k"}

    n_predict: int | None = Field(default=None, ge=0, lt=2**31, description="the most tokens; 0 writes nothing")
    n_cmpl: Count | None = Field(
        default=None,
        validation_alias=AliasChoices("n_cmpl", "n"),
        description="number of answers, or `n`; several come as a list",
    )
    top_k: int | None = Field(default=None, ge=1, lt=2**31, description="propose only so many of the likeliest tokens")
    stream: bool = Field(default=False, description="as events: the text of each answer at once, then its figures")
    response_fields: list[str] = Field(
        default_factory=list, max_length=64, description="send only these fields, such as timings/prompt_n; empty: all"
    )


class InfillRequest(LlamaRequest):
    """llama.cpp's `/infill`, as editor plug-ins send it."""

    input_prefix: str
    input_suffix: str
    prompt: str = Field(default="", description="what has been typed after the prefix already")
    input_extra: list[Extra] = Field(
        default_factory=list,
        max_length=MOST_ITEMS,
        fail_fast=True,
        description="put before the prefix as far as it fits",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_no_text(cls, given: Any) -> Any:  # Any: JSON
        if not isinstance(given, dict):
            return given
        nulls = [name for name in ("input_prefix", "input_suffix") if name in given and given[name] is None]
        return {**given, **dict.fromkeys(nulls, "")}


class ContinueRequest(LlamaRequest):
    """llama.cpp's `/completion`: text or token ids to be continued."""

    prompt: LlamaPrompts = Field(description="text, ids, both in a list, {prompt_string: text}, or a list of these")


class TokenizeRequest(Body):
    """`/tokenize`: text to ids."""

    content: str
    add_special: bool = Field(default=False, description="put the beginning-of-text token before, if there is one")
    parse_special: bool = Field(default=True, description="read names of special tokens as tokens, not as characters")
    with_pieces: bool = Field(default=False, description="with the text of each token; its bytes if it is not UTF-8")
