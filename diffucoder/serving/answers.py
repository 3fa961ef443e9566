"""Parts of answers: usage, log-probabilities, what a step did, edits as holes, text that fits.

For: pure functions from requests and Generations to what is sent. Not for: routes (`app`), requests (`protocol`).
"""

from collections.abc import Sequence
from typing import Any

from diffucoder.decoding import generate
from diffucoder.decoding.canvas import leftmost
from diffucoder.decoding.generate import DiffuCoder, Generation
from diffucoder.decoding.trace import as_json
from diffucoder.errors import PromptError
from diffucoder.serving.engine import Event, Job
from diffucoder.serving.protocol import EditRequest, InfillRequest

Json = dict[str, Any]  # what is sent as JSON


def usage(request: generate.Request, results: Sequence[Generation]) -> Json:
    """Tokens of what was given, once, and of the answers before their ends."""
    given = int((request.canvas.valid[0] & ~request.canvas.masked[0]).sum())
    written = sum(len(result.tokens) for result in results)
    passes = sum(result.forward_passes for result in results)
    counts = {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}
    return {**counts, "forward_passes": passes}


def denoise(coder: DiffuCoder, request: generate.Request, event: Event) -> Json:
    """What one step did to a row: positions count from its first hole."""
    step, row = event.step, event.row
    start = int(leftmost(request.canvas.masked[row, request.canvas.valid[row]][None]))
    tokens, committed = step.canvas[0, start:], step.committed[0, start:]
    places = committed.nonzero()[:, 0].tolist()
    return {
        "row": row,
        "step": step.index,
        "passes": step.forward_passes,
        "committed": [
            {
                "position": at,
                "token": int(tokens[at]),
                "text": piece(coder, int(tokens[at])),
                "log_prob": round(float(step.log_prob[0, start + at]), 4),
            }
            for at in places
        ],
        "revoked": [] if step.revoked is None else step.revoked[0, start:].nonzero()[:, 0].tolist(),
    }


def shown_canvas(coder: DiffuCoder, request: generate.Request, row: int) -> Json:
    """A row as it is before the first step, from its first hole on: the text of each token, null where masked."""
    valid = request.canvas.valid[row]
    tokens, masked = request.canvas.tokens[row, valid], request.canvas.masked[row, valid]
    start = int(leftmost(masked[None]))
    pairs = zip(tokens[start:].tolist(), masked[start:].tolist(), strict=True)
    return {"row": row, "canvas": [None if hidden else piece(coder, token) for token, hidden in pairs]}


def traced(job: Job, result: Generation) -> Json:
    """Which row of a request a result is, and its trace as it is written to files."""
    row = next(at for at, trace in enumerate(job.traces) if trace is result.trace)
    return {"row": row, "trace": as_json(result.trace)}


def piece(coder: DiffuCoder, token: int) -> str:
    return coder.tokenizer.decode([token], skip_special=False)


def token_logprobs(coder: DiffuCoder, result: Generation) -> list[Json]:
    """Each token of an answer with its log-probability when it was committed."""
    told = zip((piece(coder, token) for token in result.tokens), result.trace.log_probs, strict=False)
    return [{"token": text, "logprob": log, "bytes": list(text.encode()), "top_logprobs": []} for text, log in told]


def completion_logprobs(coder: DiffuCoder, result: Generation, most: int, echoed: str = "") -> Json:
    """Of the answer's tokens; what is `echoed` before it has none, since nothing was proposed there."""
    told = token_logprobs(coder, result)
    offsets, at = [], len(echoed)
    for each in told:
        offsets.append(at)
        at += len(each["token"])
    best = [{each["token"]: each["logprob"]} for each in told] if most else None
    return {
        "tokens": [each["token"] for each in told],
        "token_logprobs": [each["logprob"] for each in told],
        "top_logprobs": best,
        "text_offset": offsets,
    }


def with_holes(coder: DiffuCoder, asked: EditRequest) -> str:
    """The text with holes in the place of its spans."""
    if "<|hole" in asked.text:
        raise PromptError("the text has a hole already; use /v1/fill, or spans without holes")
    parts, at = [], 0
    for span in asked.spans:
        parts += [asked.text[at : span.start], f"<|hole:{span.tokens}|>" if span.tokens else "<|hole|>"]
        at = span.end
    return "".join([*parts, asked.text[at:]])


def fitting(coder: DiffuCoder, asked: InfillRequest) -> tuple[str, str]:
    """Prefix and suffix as long as the canvas allows, the text next to the cursor first, then text from elsewhere."""
    prefix, suffix = asked.input_prefix + asked.prompt, asked.input_suffix
    room = coder.model.max_length - max(generate.HOLE_LENGTHS) - 2
    behind = coder.tokenizer.encode(suffix)[: room // 4]
    before = coder.tokenizer.encode(prefix)
    if len(before) + len(behind) > room:
        before = before[len(before) + len(behind) - room :]
    elsewhere = "".join(each.text for each in asked.input_extra)
    extra = coder.tokenizer.encode(elsewhere)[-max(room - len(before) - len(behind), 0) :] if elsewhere else []
    if len(extra) + len(before) + len(behind) > room:
        extra = []
    prefix = coder.tokenizer.decode([*extra, *before], skip_special=False)
    return prefix or "\n", coder.tokenizer.decode(behind, skip_special=False)


def infilled(coder: DiffuCoder, result: Generation | None, fields: Sequence[str]) -> Json:
    """An answer in llama.cpp's form, or of it these fields, unnested as it does; None: nothing was to be written.

    What is given is read again in every pass: it has no time of its own.
    """
    written = 0 if result is None else len(result.tokens)
    given = 0 if result is None else len(result.trace.tokens) - written
    milliseconds = 0.0 if result is None else 1e3 * result.seconds
    answer: Json = {
        "content": "" if result is None else result.text,
        "model": coder.name,
        "stop": True,
        "stop_type": "word" if result is not None and result.finish_reason == "stop" else "limit",
        "truncated": False,
        "tokens_predicted": written,
        "tokens_evaluated": given,
        "tokens_cached": given + written,
        "generation_settings": {"n_ctx": coder.model.max_length},
        "timings": {
            **{"prompt_n": given, "prompt_ms": 0.0, "prompt_per_token_ms": 0.0, "prompt_per_second": 0.0},
            **{"predicted_n": written, "predicted_ms": milliseconds},
            "predicted_per_token_ms": milliseconds / max(1, written),
            "predicted_per_second": 0.0 if result is None else result.tokens_per_second,
        },
    }
    if not fields:
        return answer
    parts = {name: told for name, told in answer.items() if isinstance(told, dict)}
    flat = answer | {f"{name}/{key}": told for name, part in parts.items() for key, told in part.items()}
    return {name: flat[name] for name in fields if name in flat}
