"""How the golden cases are run by the package: the one file here that knows its names.

Each of `decode`, `train` and `ask` takes plain data of `golden_cases.py` and returns plain JSON data. What they need of
the package is imported where it is used, so that one room of it can be tested while another is being rebuilt.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from starlette.testclient import TestClient

from diffucoder.decoding.coder import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.requests import Generation

Json = dict[str, Any]


def load_coder() -> DiffuCoder:
    """The shipped model in float32."""
    return DiffuCoder.load(dtype=torch.float32)


# --- decoding --------------------------------------------------------------------------------------------------------


def decode(coder: DiffuCoder, case: Json) -> list[Json]:
    """The finished rows of a case, in order."""
    params = DecodingParams(**case["params"])
    if "text" in case:
        results = [coder.fill(case["text"], params)]
    elif "prefix" in case:
        results = [coder.infill(case["prefix"], case["suffix"], length=case["length"], params=params)]
    else:
        requests = [coder.request(prompt, params, chat=case["chat"]) for prompt in case["prompts"]]
        results = [result for results in coder.run(requests, entropies=case["entropies"]) for result in results]
    return [_row(result) for result in results]


def _row(result: Generation) -> Json:
    trace = result.trace
    row = {
        "text": result.text,
        "pieces": list(result.pieces),
        "finish_reason": result.finish_reason,
        "forward_passes": trace.forward_passes,
        "prompt_length": trace.prompt_length,
        "tokens": trace.tokens,
        "steps": trace.steps,
        "revoked": trace.revoked,
        "log_probs": trace.log_probs,
        "confidence": trace.confidence,
    }
    if trace.entropies:
        row["entropies"] = [
            [None if value != value else round(value, 4) for value in step] for step in trace.entropy_map.tolist()
        ]
    return row


# --- training --------------------------------------------------------------------------------------------------------

def train(case: Json, folder: Path) -> list[Json]:
    """The lines of metrics.jsonl of a run in `folder`, an empty one."""
    from diffucoder.models.hub import SHIPPED
    from diffucoder.training.adapt import adapt
    from diffucoder.training.grpo import grpo
    from diffucoder.training.pretrain import pretrain
    from diffucoder.training.settings import STAGES
    from diffucoder.training.sft import sft

    stage, data = case["stage"], folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in case["rows"]), encoding="utf-8")
    settings = tomllib.loads(case["settings"])
    if stage != "grpo":
        settings["cache"] = folder / "cache"
    if stage == "pretrain":
        settings["tokenizer"] = SHIPPED
    run = {"pretrain": pretrain, "adapt": adapt, "sft": sft, "grpo": grpo}[stage]
    run(STAGES[stage](run=folder / "run", data=(str(data),), **settings))  # type: ignore[operator]
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- server ----------------------------------------------------------------------------------------------------------


@contextmanager
def server(coder: DiffuCoder) -> Iterator[TestClient]:
    """A client of a server in this process."""
    from diffucoder.serving.app import create_app

    with TestClient(create_app(coder)) as client:
        yield client


def ask(client: TestClient, request: Json) -> Json:
    """Status and answer of a request; of a stream its events. What varies from run to run is masked."""
    content = request.get("raw")
    if "body" in request:
        content = json.dumps({name: value for name, value in request["body"].items() if value is not None})
    answer = client.request(
        request["method"], request["path"], content=content, headers={"content-type": "application/json"}
    )
    if answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        told: Any = [masked(json.loads(line)) if line.startswith("{") else line for line in lines]
    else:
        told = masked(answer.json())
    return {"status": answer.status_code, "answer": told}


_VARIES = {"created", "params", "predicted_ms", "predicted_per_token_ms", "predicted_per_second"}
_ID = re.compile(r"([a-z]+)-[0-9a-f]{32}")


def masked(value: Any) -> Any:
    """`value` without ids, times, speeds, settings of traces, and the words of errors."""
    if isinstance(value, dict):
        kept = {name: "*" if name in _VARIES else masked(each) for name, each in value.items()}
        if isinstance(kept.get("error"), dict):
            assert value["error"]["message"]
            kept["error"]["message"] = "*"
        return kept
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [masked(each) for each in value]
    if isinstance(value, str) and (match := _ID.fullmatch(value)):
        return f"{match[1]}-*"
    return value
