"""What docs/editors.md configures works: its commands as they stand, and the requests that the plug-ins send.

Bodies and fields are those of llama.vim (commit 381730b), llama.vscode (its sources of 2026) and Continue (the requests
of `siliconflow` and `openai` in @continuedev/core 1.1.0, recorded).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving import PATIENCE, post, stream

ADDRESS = "http://127.0.0.1:8000"
PAGE = (Path(__file__).parents[2] / "docs" / "editors.md").read_text(encoding="utf-8")
Json = dict[str, Any]


def block(section: str, language: str) -> str:
    """The fenced block of this language in this section of the page."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return text.partition(f"```{language}\n")[2].partition("```")[0]


def outputs(section: str, server: str, **environment: str) -> list[str]:
    """What the commands of a section print, with the server's address in the place of the page's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = []
    commands = block(section, "bash").replace("\\\n", " ").replace(ADDRESS, server)
    for line in commands.splitlines():
        if not line.startswith("#"):
            env = {**os.environ, "PATH": path, **environment}
            ended = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=PATIENCE)
            assert ended.returncode == 0, ended.stderr
            printed.append(ended.stdout)
    return printed


def asked(url: str, body: Json) -> Any:
    """The answer to a request that is taken."""
    answer = post(url, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks(url: str, body: Json) -> list[Json]:
    """The events of a stream, as plug-ins read them: every line of data but the last is JSON."""
    with stream(url, body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# --- clients ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")
def test_the_pages_curl_commands_are_answered(server: str) -> None:
    chat, hole, stream, infilled = outputs("curl", server)
    assert json.loads(chat)["choices"][0]["message"]["content"].startswith("def solve(n):")
    assert json.loads(hole)["choices"][0]["text"]
    assert stream.count("data: {") > 2
    assert stream.rstrip().endswith("data: [DONE]")
    assert json.loads(infilled)["content"]


def test_the_pages_openai_program_runs(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("openai", "python").replace(ADDRESS, server), "editors.md", "exec"), {})
    assert capsys.readouterr().out.count("def solve(n):") == 2  # whole, and as a stream


def test_the_pages_llm_commands_are_answered(server: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    settings = block("llm", "yaml").replace(ADDRESS, server)
    (tmp_path / "extra-openai-models.yaml").write_text(settings, encoding="utf-8")
    streamed, whole, text = outputs("llm", server, LLM_USER_PATH=str(tmp_path))
    assert streamed.startswith("def solve(n):")
    assert whole.startswith("def solve")
    assert text.strip()


# --- llama.vim -------------------------------------------------------------------------------------------------------

FLAT = ["prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second"]
FLAT += ["predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second"]
VIM_FIELDS = ["content", *(f"timings/{name}" for name in FLAT), "truncated", "tokens_cached"]
RELTIME = [1795645604, 719270]  # Vim's clock is a pair
CHUNK = {"text": "def triple(n):\n    return n * 3\n", "time": RELTIME, "filename": "a.py"}


def vim(**changed: Any) -> Json:
    """What llama.vim sends at a cursor, configured as the page says."""
    n_predict = re.search(r"'n_predict': (\d+)", block("llama.vim", "vim"))
    assert n_predict is not None
    return {
        "id_slot": 0,
        "input_prefix": "def double(n):\n",
        "input_suffix": "\n\ndouble(3)\n",
        "input_extra": [CHUNK],
        "prompt": "    return",
        "n_predict": int(n_predict[1]),
        "stop": [],
        "n_cmpl": 1,
        "n_indent": 4,
        "top_k": 40,
        "top_p": 0.90,
        "samplers": ["top_k", "top_p", "infill"],
        "stream": False,
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 250,
        "response_fields": VIM_FIELDS,
        **changed,
    }


def vim_url(server: str) -> str:
    configured = re.search(r"'endpoint_fim': '(.*)'", block("llama.vim", "vim"))
    assert configured is not None
    return configured[1].replace(ADDRESS, server)


def test_llama_vim_is_told_every_field_it_reads(server: str) -> None:
    answer = httpx.post(vim_url(server), json=vim(), timeout=120)
    assert re.match(r'\{.*"content"\s*:"', answer.text)  # it looks before it decodes
    assert "\n" not in answer.text  # Vim is called line by line
    told = answer.json()
    assert sorted(told) == sorted(VIM_FIELDS)
    assert told["content"]
    assert told["truncated"] is False
    assert told["tokens_cached"] == told["timings/prompt_n"] + told["timings/predicted_n"]
    assert all(told[f"timings/{name}"] > 0 for name in FLAT[4:])


def test_llama_vim_warms_its_context_and_is_told_nothing(server: str) -> None:
    body = vim(input_prefix="", input_suffix="", prompt="", n_predict=0, temperature=0.0, samplers=[])
    for unsent in ("stop", "n_cmpl", "n_indent", "top_k", "top_p"):
        del body[unsent]
    assert asked(vim_url(server), {**body, "t_max_prompt_ms": 1, "response_fields": [""]}) == {}


def test_stop_strings_keep_a_suggestion_to_a_line(server: str) -> None:
    whole = asked(f"{server}/infill", vim(response_fields=[]))
    cut = asked(f"{server}/infill", vim(response_fields=[], stop=["\n"]))
    assert cut["content"] == whole["content"].partition("\n")[0]
    assert cut["stop_type"] == ("limit" if cut["content"] == whole["content"] else "word")


@pytest.mark.parametrize("most", [1, 3, 10, 128])
def test_no_suggestion_is_longer_than_asked_for(server: str, most: int) -> None:
    told = asked(f"{server}/infill", vim(n_predict=most))
    assert 0 < told["timings/predicted_n"] <= min(most, 24)


def test_a_long_file_is_cut_to_what_the_model_reads(server: str) -> None:
    line = "    total = total + number * factor\n"
    told = asked(f"{server}/infill", vim(input_prefix=line * 256, input_suffix=line * 64, input_extra=[CHUNK] * 16))
    assert told["content"]
    assert told["tokens_cached"] <= 512


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/infill", vim(lora=[{"id": 0, "scale": 0.5}]), "lora is not supported here"),
        ("/infill", vim(decoding={"top_k": 3}), "decoding.top_k is the request's own top_k"),
        ("/v1/completions", {"prompt": "x", "min_p": 0.1}, "min_p is not supported here"),
    ],
    ids=["lora", "twice", "min_p"],
)
def test_what_would_change_the_answer_is_refused_by_name(server: str, path: str, body: Json, said: str) -> None:
    answer = post(f"{server}{path}", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


# --- llama.vscode ----------------------------------------------------------------------------------------------------


def vscode(**changed: Any) -> Json:
    """What llama.vscode sends at a cursor, configured as the page says."""
    settings = json.loads(block("llama.vscode", "json"))
    return {
        "id_slot": 0,
        "input_prefix": "def double(n):\n",
        "input_suffix": "\n\n",
        "input_extra": [{**CHUNK, "time": 1795645604719}],
        "prompt": "    return",
        "n_predict": settings["llama-vscode.n_predict"],
        "n_cmpl": settings["llama-vscode.max_parallel_completions"],
        "top_k": 40,
        "top_p": 0.99,
        "stream": False,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "n_indent": 4,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 2500,
        **changed,
    }


def test_llama_vscode_is_told_every_field_it_reads(server: str) -> None:
    endpoint = json.loads(block("llama.vscode", "json"))["llama-vscode.endpoint"].replace(ADDRESS, server)
    told = asked(f"{endpoint}/infill", vscode())
    assert told["content"]
    assert told["truncated"] is False
    assert told["generation_settings"]["n_ctx"] == 512
    assert told["tokens_cached"] > 0
    assert set(told["timings"]) == set(FLAT)


def test_parallel_suggestions_come_as_a_list(server: str) -> None:
    told = asked(f"{server}/infill", vscode(n_cmpl=3, n_predict=4, temperature=1.0))
    assert len(told) == 3
    assert all("content" in each for each in told)


def test_llama_vscode_prepares_its_context(server: str) -> None:
    body = vscode(input_prefix="", input_suffix="", prompt="", n_predict=0, samplers=[], t_max_predict_ms=1)
    for unsent in ("n_cmpl", "top_k", "top_p", "stream", "n_indent"):
        del body[unsent]
    assert asked(f"{server}/infill", body)["content"] == ""


def test_llama_vscode_edits_by_chat(server: str) -> None:
    turns = [("system", "You are an expert coder."), ("user", "Given a number, double the number.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    more = {"stream": False, "cache_prompt": True, "temperature": 0.8, "top_p": 0.95, "model": "tiny"}
    told = asked(f"{server}/v1/chat/completions", {"messages": messages, **more})
    assert told["choices"][0]["message"]["content"]


# --- Continue --------------------------------------------------------------------------------------------------------


def continues(role: str) -> Json:
    """The model that the page configures for a role."""
    models: list[Json] = yaml.safe_load(block("Continue", "yaml"))["models"]
    return next(model for model in models if role in model["roles"])


def test_continue_completes_at_a_cursor(server: str) -> None:
    model = continues("autocomplete")
    body = {
        "model": model["model"],
        "prompt": "\n# a.py\ndef double(n):\n    return n * 2\n\n\ndef triple(n):\n    return ",
        "suffix": "\n\n\nprint(triple(3))\n",
        "max_tokens": 4096,
        "temperature": 0.01,
        "stop": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>", "<|endoftext|>", "</fim_middle>"],
        "stream": True,
    }
    body["stop"] += ["</code>", "/src/", "#- coding: utf-8", "```"]
    body |= model["requestOptions"]["extraBodyProperties"]
    told = chunks(model["apiBase"].replace(ADDRESS, server) + "/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in told)


def test_a_streamed_hole_ends_before_its_stop_string(server: str) -> None:
    body = {"prompt": "def double(n):\n", "suffix": "\n", "max_tokens": 24}
    whole = asked(f"{server}/v1/completions", body)["choices"][0]["text"]
    assert "\n" in whole
    told = chunks(f"{server}/v1/completions", {**body, "stream": True, "stop": ["\n"]})
    assert "".join(chunk["choices"][0]["text"] for chunk in told) == whole.partition("\n")[0]
    assert told[-1]["choices"][0]["finish_reason"] == "stop"


def test_continue_chats(server: str) -> None:
    model = continues("chat")
    turns = [("system", model["chatOptions"]["baseSystemMessage"]), ("user", "Given a number, double the number.")]
    body = {
        "messages": [{"role": role, "content": content} for role, content in turns],
        "model": model["model"],
        "max_tokens": model["defaultCompletionOptions"]["maxTokens"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    told = chunks(model["apiBase"].replace(ADDRESS, server) + "/chat/completions", body)
    assert "".join(choice["delta"].get("content") or "" for chunk in told for choice in chunk["choices"])
    assert told[-1]["usage"]["completion_tokens"] > 0
