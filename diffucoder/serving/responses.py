"""Answers: what a route sends for a request, as one JSON object or as a stream of server-sent events.

For: the JSON of answers and of stream events. Not for: routes (`app`), the fields of requests (`protocol`).

Each route of the OpenAI kind has a subclass of `Answer`, which makes both the whole answer and the stream, so that the
two agree. The index of a choice is that of its result, `Generation.index`.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from diffucoder.decoding.coder import HOLE_LENGTHS, DiffuCoder
from diffucoder.decoding.diffs import unified_diff
from diffucoder.decoding.repair import Repair
from diffucoder.decoding.requests import Generation, Request, SettledText
from diffucoder.decoding.trace import as_json
from diffucoder.errors import DiffuCoderError, PromptError
from diffucoder.grading.extract import program_from
from diffucoder.serving import protocol
from diffucoder.serving.edge import api_error
from diffucoder.serving.engine import Event, Job

log = logging.getLogger(__name__)

Json = dict[str, Any]  # Any: what is sent as JSON


def ids_of(coder: DiffuCoder, prompt: Sequence[int | str]) -> list[int]:
    """The ids of a prompt of token ids and text. Raises PromptError for an id that is none of the vocabulary."""
    known = min(coder.model.vocab_size, coder.tokenizer.vocab_size)
    ids: list[int] = []
    for part in prompt:
        if isinstance(part, str):
            ids += coder.tokenizer.encode(part)
            continue
        if not 0 <= part < known or part == coder.model.mask_id:
            raise PromptError(f"token id {part} is not one of 0 to {known - 1}, or is the mask; use /tokenize")
        ids.append(part)
    return ids


def text_or_bytes(content: bytes) -> str | list[int]:
    """The text of a token if its bytes are UTF-8, else the bytes."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return list(content)


class Answer:
    """The answer of a route to one request. Each route has a subclass, which says what a choice holds."""

    id_prefix: str
    kind: str
    chunk_kind: str
    first_piece: ClassVar[Json] = {}  # what each choice of a stream begins with
    body: protocol.SamplingRequest

    def __init__(self, coder: DiffuCoder, request: Request, body: protocol.SamplingRequest) -> None:
        """Answer `body`, which `request` decodes."""
        self.coder = coder
        self.request = request
        self.body = body
        self.options = body.stream_options
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def choice(self, result: Generation) -> Json:
        """What a whole choice holds, besides its index and finish reason."""
        raise NotImplementedError

    def piece(self, text: str) -> Json:
        """What a streamed choice holds for a piece of its text; nothing if a stream holds whole choices."""
        return {}

    def whole(self, results: Sequence[Generation]) -> Json:
        """The answer as one JSON object."""
        choices = [_finished(result, self.choice(result)) for result in results]
        return {**self._head(self.kind), "choices": choices, "usage": self._usage(results)}

    async def events(self, job: Job) -> AsyncIterator[str]:
        """The answer as server-sent events: text as it settles. An error is one: it is too late for a status."""
        job.claim()
        try:
            async for chunk in self._chunks(job):
                yield f"data: {json.dumps({**self._head(self.chunk_kind), 'choices': [], **chunk})}\n\n"
                await asyncio.sleep(0)  # other connections have their turn, however much is ready to be sent
        except Exception as error:  # whatever it is, the client must hear of it
            if not isinstance(error, DiffuCoderError):
                log.exception("a stream broke")
            yield f"data: {json.dumps(api_error(error).body)}\n\n"
        except BaseException:  # the client has left, perhaps before the first step
            job.leave()
            raise
        yield "data: [DONE]\n\n"

    async def _chunks(self, job: Job) -> AsyncIterator[Json]:
        """What a stream holds, besides what is in each of its chunks."""
        params = self.request.params
        sent: list[SettledText] = []  # the text of each choice until now
        for index in range(self.request.result_count):
            sent.append(SettledText(self.request.tokenizer, params.stop))
            if self.first_piece:
                yield {"choices": [_choice(index, self.first_piece)]}
        if self.options.denoise:
            for row in range(len(job.sequences)):
                yield {"denoise": {"row": row, "canvas": self._canvas(job, row)}}
        settles = self.piece("") and len(sent) == len(job.sequences) and not params.revoke  # each row is a choice
        async for event in job.events():
            await asyncio.sleep(0)
            if self.options.denoise:
                yield {"denoise": self._committed(job, event)}
            text = sent[event.row].add(event.settled) if settles else ""
            if text:
                yield {"choices": [_choice(event.row, self.piece(text))]}
        results = await job.made_results()
        for result in results:
            rest = result.text[sent[result.index].length :]
            content = self.piece(rest) or self.choice(result)
            if self.options.denoise:
                content |= {"row": self._row(job, result), "trace": as_json(result.trace)}
            yield {"choices": [_finished(result, content)]}
        if self.options.include_usage:
            yield {"usage": self._usage(results)}

    def _canvas(self, job: Job, row: int) -> list[str | None]:
        """The text of each token before the first step, from the first hole on; None for a mask."""
        canvas = self.request.canvas
        return self._texts(canvas.tokens[row, canvas.valid[row]][job.sequences[row].first_hole :].tolist())

    def _texts(self, tokens: list[int]) -> list[str | None]:
        mask_id = self.request.canvas.mask_id
        return [None if token == mask_id else self.coder.tokenizer.pieces([token])[0] for token in tokens]

    def _committed(self, job: Job, event: Event) -> Json:
        """What a step did to a row. Positions count from the row's first hole."""
        step = event.step
        tokenizer = self.coder.tokenizer
        start = job.sequences[event.row].first_hole
        committed = []
        for position in step.committed[0, start:].nonzero()[:, 0].tolist():
            token = int(step.canvas[0, start + position])
            log_prob = round(float(step.log_prob[0, start + position]), 4)
            text = tokenizer.pieces([token])[0]
            entry = {"position": position, "token": token, "text": text, "log_prob": log_prob}
            content = text_or_bytes(tokenizer.token_bytes(token))
            if isinstance(content, list):  # a part of a character
                entry["bytes"] = content
            committed.append(entry)
        revoked = []
        if step.revoked is not None:
            revoked = step.revoked[0, start:].nonzero()[:, 0].tolist()
        change: Json = {"row": event.row, "step": step.index, "passes": step.forward_passes}
        change |= {"committed": committed, "revoked": revoked}
        if step.resized is not None:
            change["canvas"] = self._texts(step.resized[0, start:].tolist())
        return change

    def _row(self, job: Job, result: Generation) -> int:
        """The row that a result was made of: the only one, or that of the length that was kept."""
        rows = range(result.index, len(job.sequences), self.request.params.num_samples)
        return next(row for row in rows if job.sequences[row].trace(self.coder.name) == result.trace)

    def _head(self, kind: str) -> Json:
        """What an answer and each chunk of a stream begin with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.coder.name}

    def _usage(self, results: Sequence[Generation]) -> Json:
        """Tokens of each prompt, once, and of the answers before their ends."""
        prompts = range(0, self.request.result_count, self.request.params.num_samples)
        prompt = sum(map(self.request.prompt_tokens, prompts))
        completion = sum(len(result.tokens) for result in results)
        passes = sum(result.forward_passes for result in results)
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {**counts, "forward_passes": passes}

    def _token_logprobs(self, result: Generation) -> list[Json]:
        """Each token with its log-probability. Their bytes together are those of the text: special tokens have none."""
        tokenizer = self.coder.tokenizer
        pieces = iter(tokenizer.pieces([token for token in result.tokens if token not in tokenizer.special_ids]))
        entries = []
        for token, log_prob in zip(result.tokens, result.trace.log_probs, strict=False):
            text = tokenizer.pieces([token])[0]
            content = b""
            if token not in tokenizer.special_ids:
                text = next(pieces)
                content = tokenizer.token_bytes(token)
            entries.append({"token": text, "logprob": log_prob, "bytes": list(content), "top_logprobs": []})
        return entries


def _choice(index: int, content: Json, finish_reason: str | None = None) -> Json:
    return {"index": index, "finish_reason": finish_reason, **content}


def _finished(result: Generation, content: Json) -> Json:
    choice = _choice(result.index, content, result.finish_reason)
    if result.problem:
        choice["problem"] = result.problem
    return choice


class ChatAnswer(Answer):
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    first_piece: ClassVar[Json] = {"delta": {"role": "assistant", "content": ""}}
    body: protocol.ChatRequest

    def choice(self, result: Generation) -> Json:
        logprobs = None
        if self.body.logprobs:
            logprobs = {"content": self._token_logprobs(result), "refusal": None}
        message = {"role": "assistant", "content": result.text, "refusal": None}
        return {"message": message, "logprobs": logprobs}

    def piece(self, text: str) -> Json:
        return {"delta": {"content": text}}


class CompletionAnswer(Answer):
    """`/v1/completions`."""

    id_prefix = "cmpl"
    kind = chunk_kind = "text_completion"
    body: protocol.CompletionRequest

    def choice(self, result: Generation) -> Json:
        echoed = self._prompt(result.index) if self.body.echo else ""
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self._logprob_columns(result, offset=len(echoed))
        return {"text": echoed + result.text, "logprobs": logprobs}

    def piece(self, text: str) -> Json:
        return {"text": text, "logprobs": None}

    def _prompt(self, index: int) -> str:
        """The text of the prompt that the choice `index` answers."""
        prompt = protocol.prompts_of(self.body.prompt)[index // self.request.params.num_samples]
        if isinstance(prompt, str):
            return prompt
        return self.coder.tokenizer.decode(ids_of(self.coder, prompt), skip_special=False)

    def _logprob_columns(self, result: Generation, offset: int) -> Json:
        """The log-probabilities as `/v1/completions` has them; the answer begins at character `offset`."""
        columns: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in self._token_logprobs(result):
            columns["tokens"].append(entry["token"])
            columns["token_logprobs"].append(entry["logprob"])
            columns["top_logprobs"].append({entry["token"]: entry["logprob"]})
            columns["text_offset"].append(offset)
            if entry["bytes"]:
                offset += len(entry["token"])
        if self.body.logprobs == 0:
            columns["top_logprobs"] = None
        return columns


class FillAnswer(Answer):
    """`/v1/fill`."""

    id_prefix = kind = chunk_kind = "fill"

    def choice(self, result: Generation) -> Json:
        return {"text": result.text, "holes": result.pieces}


class EditAnswer(Answer):
    """`/v1/edit`."""

    id_prefix = kind = chunk_kind = "edit"
    body: protocol.EditRequest

    def choice(self, result: Generation) -> Json:
        text = result.text if self.body.instruction is None else program_from(result.text)
        return {"text": text, "diff": unified_diff(self.body.text, text)}


def repair_answer(coder: DiffuCoder, before: str, repair: Repair) -> Json:
    """What `/v1/repair` answers."""
    return {
        "id": f"repair-{uuid.uuid4().hex}",
        "object": "repair",
        "created": int(time.time()),
        "model": coder.name,
        "text": repair.text,
        "diff": unified_diff(before, repair.text),
        "changed": repair.changed,
        **repair.figures(),
    }


# --- llama.cpp's /infill and /completion -----------------------------------------------------------------------------


def fit_into_context(coder: DiffuCoder, body: protocol.InfillRequest) -> tuple[str, str]:
    """Return prefix and suffix, cut to what the model can read: the text next to the cursor comes first."""
    tokenizer = coder.tokenizer
    room = coder.model.max_length - max(HOLE_LENGTHS) - 2
    suffix = tokenizer.encode(body.input_suffix)[: room // 4]
    before = tokenizer.encode("".join(extra.text for extra in body.input_extra))
    before += tokenizer.encode(body.input_prefix + body.prompt)
    text = tokenizer.decode(before[len(suffix) - room :]).lstrip("\ufffd")  # where a character was cut
    return text or "\n", tokenizer.decode(suffix).rstrip("\ufffd")


def llama_answer(coder: DiffuCoder, result: Generation | None, known: int) -> Json:
    """An answer in llama.cpp's form to a prompt of `known` tokens; `result` is None if nothing was to be written."""
    text = ""
    stop_type = "limit"
    written = 0
    seconds = 0.0
    if result is not None:
        text = result.text
        written = len(result.tokens)
        seconds = result.seconds
        if result.finish_reason == "stop":
            stop_type = "word"
    return {
        "content": text,
        "model": coder.name,
        "stop": True,
        "stop_type": stop_type,
        "truncated": False,
        "tokens_predicted": written,
        "tokens_evaluated": known,
        "tokens_cached": known + written,
        "generation_settings": {"n_ctx": coder.model.max_length},
        "timings": {
            "prompt_n": known,
            **dict.fromkeys(("prompt_ms", "prompt_per_token_ms", "prompt_per_second"), 0.0),
            "predicted_n": written,
            "predicted_ms": 1e3 * seconds,
            "predicted_per_token_ms": 1e3 * seconds / max(1, written),
            "predicted_per_second": written / max(1e-9, seconds),
        },
    }


def only_fields(answer: Json, fields: Sequence[str]) -> Json:
    """These fields of an answer, all without `fields`; `timings/predicted_n` is a nested one."""
    if not fields:
        return answer
    flat = dict(answer)
    for group in ("generation_settings", "timings"):
        flat |= {f"{group}/{name}": value for name, value in answer[group].items()}
    return {name: flat[name] for name in fields if name in flat}


def llama_events(answers: Sequence[Json], fields: Sequence[str]) -> str:
    """Answers as llama.cpp streams them: for each an event with the text, then one with the figures."""
    events = ""
    for index, answer in enumerate(answers):
        text = {"index": index, "content": answer["content"], "stop": False}
        end = only_fields({**answer, "index": index, "content": ""}, fields)
        events += f"data: {json.dumps(text)}\n\ndata: {json.dumps(end)}\n\n"
    return events
