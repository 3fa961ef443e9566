"""The routes that take a body: its class, and the smallest body that does something. For tests, and for `fuzz.py`."""

from typing import Any

from diffucoder.serving import protocol

CHAT = [{"role": "user", "content": "Given a number, double the number."}]
ROUTES: dict[str, tuple[type[protocol.Body], dict[str, Any]]] = {
    "/v1/chat/completions": (protocol.ChatRequest, {"messages": CHAT, "max_tokens": 2}),
    "/v1/completions": (protocol.CompletionRequest, {"prompt": "def f(x):\n", "max_tokens": 2}),
    "/v1/fill": (protocol.FillRequest, {"text": "x = <|hole:2|>\n"}),
    "/v1/edit": (protocol.EditRequest, {"text": "x = 1\n", "spans": [{"start": 4, "end": 5, "tokens": 1}]}),
    "/v1/repair": (protocol.RepairRequest, {"text": "x = (1\n", "passes": 8}),
    "/infill": (protocol.InfillRequest, {"input_prefix": "x =", "input_suffix": "\n", "n_predict": 2}),
    "/completion": (protocol.ContinueRequest, {"prompt": "def f(x):\n", "n_predict": 2}),
    "/tokenize": (protocol.TokenizeRequest, {"content": "x = 1"}),
}
