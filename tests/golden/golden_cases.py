"""What the golden fixtures are recorded from: prompts, settings, training data and requests, as plain data.

Not for code that calls the package: that is in `golden_adapter.py`. A case is dropped or changed only together with
its fixture (`record.py`).
"""

from typing import Any

Case = dict[str, Any]

# --- decoding --------------------------------------------------------------------------------------------------------

COLLATZ = (
    "Define collect_string(tokens) to return the length of the longest word, then count how many Collatz steps lead "
    "to 1."
)
VOWELS = "Write a function that takes a string and removes the vowels."
DIGITS = (
    "Write a function that takes a list of integers and removes duplicates keeping the first occurrences and then "
    "replaces each number by its digit sum."
)
ENTRIES = (
    "Please write transform_entries(s), a function that takes a text and keeps every other character and then rotates "
    "the string right by one and then returns the length of the longest word in the string."
)
SUMS = (
    "Write a Python function solve_digits(values) that computes the sum of the absolute values and then lists the "
    "powers of two below it."
)
SEARCH = "Explain how a binary search works."
CHAT = [
    {"role": "system", "content": "You write short programs."},
    {"role": "user", "content": "Add two numbers."},
    {"role": "assistant", "content": "def add(a, b):\n    return a + b\n"},
    {"role": "user", "content": "Now multiply each number by three."},
]
DOUBLE = "def double(n):\n    return"
STACK = "class Stack:\n    def push(self, item):\n"
LOOP = "def total(nums):\n    out = []\n    for n in nums:\n"
TOTAL = "def total(nums):\n    nums = [n for n in nums if "


def _prompts(name: str, prompts: Any, entropies: int = 0, chat: bool = True, **params: Any) -> Case:
    prompts = prompts if isinstance(prompts, list) else [prompts]
    return {"name": name, "prompts": prompts, "chat": chat, "entropies": entropies, "params": params}


def _reference(name: str, prompts: Any, **params: Any) -> Case:
    return _prompts(f"reference-{name}", prompts, preset="reference", **params)


def _infill(name: str, prefix: str, suffix: str, length: int | None = None, **params: Any) -> Case:
    return {"name": f"infill-{name}", "prefix": prefix, "suffix": suffix, "length": length, "params": params}


def _fill(name: str, text: str, **params: Any) -> Case:
    return {"name": f"fill-{name}", "text": text, "params": params}


HOLES = "def total(nums):\n    nums = [n for n in nums if <|hole:5|>]\n    return <|hole:4|>\n"
OPEN_HOLES = "def total(nums):\n    nums = [n for n in nums if <|hole|>]\n    return sum(<|hole|>)\n"

DECODING: list[Case] = [
    # the released sampler, with fewer steps than tokens, as many, and more
    _reference("max_prob", COLLATZ, policy="max_prob", new_tokens=24, steps=12),
    _reference("margin", ENTRIES, policy="margin", new_tokens=24, steps=24),
    _reference("entropy", COLLATZ, policy="entropy", new_tokens=24, steps=30, entropies=4),
    _reference("entropy-few-steps", [SUMS, COLLATZ, SEARCH], policy="entropy", new_tokens=24, steps=6),
    _reference("random", ENTRIES, policy="random", new_tokens=24, steps=16, seed=3),
    _reference("random-hot", SEARCH, policy="random", temperature=0.7, new_tokens=24, steps=24, seed=4),
    _reference("max_prob-hot", SEARCH, policy="max_prob", temperature=1.0, new_tokens=24, steps=16, seed=5),
    _reference("margin-hot", COLLATZ, policy="margin", temperature=1.0, top_p=0.9, new_tokens=24, steps=16, seed=6),
    _reference("entropy-warm", ENTRIES, temperature=0.4, top_p=0.95, new_tokens=24, steps=24, seed=7),
    _reference("entropy-hot-top-k", SEARCH, temperature=1.0, top_k=8, new_tokens=24, steps=16, seed=8),
    _reference("order-noise", COLLATZ, temperature=0.4, policy_temperature=0.5, new_tokens=24, steps=16, seed=9),
    _reference("greedy-order-noise", SUMS, policy="max_prob", policy_temperature=0.3, new_tokens=20, steps=20, seed=2),
    _reference("samples", SUMS, temperature=0.9, num_samples=3, new_tokens=20, steps=12, seed=10),
    _reference("raw", LOOP, chat=False, policy="max_prob", new_tokens=20, steps=14),
    _reference("eps", SEARCH, policy="margin", eps=0.2, new_tokens=20, steps=8),
    # the preset exact, policies and schedules
    _prompts("exact-entropy", COLLATZ, new_tokens=32, entropies=6),
    _prompts("exact-max_prob", ENTRIES, policy="max_prob", new_tokens=24),
    _prompts("exact-margin", COLLATZ, policy="margin", new_tokens=24),
    _prompts("exact-random", SUMS, policy="random", new_tokens=24, seed=1),
    _prompts("exact-early-stop", VOWELS, new_tokens=40),
    _prompts("exact-few-steps", ENTRIES, steps=9, new_tokens=32),
    _prompts("exact-more-steps", SUMS, steps=40, new_tokens=24),
    _prompts("exact-lengths", [VOWELS, ENTRIES, SEARCH, COLLATZ], steps=12, new_tokens=24, entropies=3),
    _prompts("exact-messages", [CHAT], new_tokens=24),
    _prompts("exact-raw", [DOUBLE, STACK, LOOP], chat=False, new_tokens=12),
    _prompts("exact-raw-margin", LOOP, chat=False, policy="margin", new_tokens=24),
    # the preset exact, randomness
    _prompts("exact-warm", SEARCH, temperature=0.4, new_tokens=24, seed=11),
    _prompts("exact-hot", COLLATZ, temperature=1.0, top_p=0.9, new_tokens=24, seed=12),
    _prompts("exact-hot-top-k", ENTRIES, temperature=0.8, top_k=5, policy="margin", new_tokens=24, seed=13),
    _prompts("exact-order-noise", SUMS, policy_temperature=0.5, new_tokens=24, seed=14),
    _prompts("exact-random-hot", SEARCH, policy="random", temperature=0.7, new_tokens=24, seed=15),
    _prompts("exact-samples", COLLATZ, temperature=0.9, num_samples=3, steps=12, new_tokens=24, seed=16),
    _prompts("exact-samples-of-two", [VOWELS, SUMS], temperature=1.0, num_samples=3, steps=10, new_tokens=20, seed=17),
    # the preset exact, rules
    _prompts("threshold-max_prob", COLLATZ, policy="max_prob", threshold=0.9, new_tokens=48),
    _prompts("threshold-entropy", ENTRIES, threshold=0.95, new_tokens=48, entropies=4),
    _prompts("threshold-margin", COLLATZ, policy="margin", threshold=0.8, new_tokens=48),
    _prompts("threshold-random", SUMS, policy="random", threshold=0.9, new_tokens=32, seed=18),
    _prompts("threshold-hot", SEARCH, threshold=0.7, temperature=0.6, new_tokens=32, seed=19),
    _prompts("threshold-lengths", [SEARCH, COLLATZ, DIGITS], threshold=0.9, new_tokens=32),
    _prompts("factor", COLLATZ, factor=1.0, new_tokens=48),
    _prompts("factor-max_prob", SUMS, policy="max_prob", factor=0.5, new_tokens=48),
    _prompts("entropy_bound", ENTRIES, entropy_bound=0.1, new_tokens=48, entropies=4),
    _prompts("entropy_bound-samples", SUMS, entropy_bound=0.2, temperature=0.8, num_samples=3, new_tokens=32, seed=20),
    _prompts("revoke", SUMS, revoke=0.5, steps=8, new_tokens=32),
    _prompts("revoke-threshold", COLLATZ, revoke=0.3, threshold=0.6, policy="max_prob", new_tokens=32),
    _prompts("revoke-hot", ENTRIES, revoke=0.5, temperature=0.7, steps=8, new_tokens=24, seed=21),
    # the preset exact, blocks
    _prompts("block-8", COLLATZ, block=8, new_tokens=32),
    _prompts("block-16", [SEARCH, SUMS], block=16, steps=16, new_tokens=40),
    _prompts("block-8-threshold", ENTRIES, block=8, threshold=0.9, new_tokens=40),
    _prompts("block-8-entropy_bound", SUMS, block=8, entropy_bound=0.1, new_tokens=40),
    _prompts("block-8-revoke", SEARCH, block=8, revoke=0.5, steps=10, new_tokens=32),
    _prompts("block-8-hot", COLLATZ, block=8, temperature=0.8, new_tokens=24, seed=22),
    # the preset exact, caches
    _prompts("prefix-8", COLLATZ, cache="prefix", block=8, new_tokens=32),
    _prompts("prefix-16-threshold", ENTRIES, cache="prefix", block=16, threshold=0.9, new_tokens=48),
    _prompts("prefix-8-margin-hot", SEARCH, cache="prefix", block=8, policy="margin", temperature=0.6, new_tokens=24),
    _prompts("dual-8", ENTRIES, cache="dual", block=8, new_tokens=32),
    _prompts("dual-16-threshold", COLLATZ, cache="dual", block=16, threshold=0.9, policy="max_prob", new_tokens=48),
    _prompts("dual-8-factor", SUMS, cache="dual", block=8, factor=1.0, new_tokens=48),
    _prompts("dual-32-entropy_bound", [COLLATZ, SEARCH], cache="dual", block=32, entropy_bound=0.1, new_tokens=48),
    _prompts("dual-8-revoke", SEARCH, cache="dual", block=8, revoke=0.5, steps=12, new_tokens=32),
    _prompts("dual-16-samples", SUMS, cache="dual", block=16, temperature=0.9, num_samples=3, steps=12, new_tokens=24),
    _prompts("delayed", COLLATZ, cache="delayed", new_tokens=32),
    _prompts("delayed-entropy_bound", ENTRIES, cache="delayed", entropy_bound=0.01, new_tokens=48),
    _prompts(
        "delayed-entropy_bound-lengths", [VOWELS, COLLATZ, SUMS], cache="delayed", entropy_bound=0.01, new_tokens=32
    ),
    _prompts("delayed-threshold", SUMS, cache="delayed", threshold=0.99, policy="max_prob", new_tokens=48),
    _prompts("delayed-revoke", SEARCH, cache="delayed", revoke=0.5, steps=10, new_tokens=32),
    _prompts("delayed-block-16", ENTRIES, cache="delayed", block=16, threshold=0.9, new_tokens=40),
    _prompts(
        "delayed-samples", SEARCH, cache="delayed", temperature=0.8, num_samples=3, steps=10, new_tokens=24, seed=23
    ),
    _prompts("delayed-raw", LOOP, chat=False, cache="delayed", entropy_bound=0.05, new_tokens=24),
    # stop strings
    _prompts("stop", COLLATZ, stop=["while"], new_tokens=40),
    _prompts("stop-two", SUMS, stop=["return", "\n\n"], threshold=0.9, new_tokens=40),
    _prompts("stop-samples", ENTRIES, stop=["["], temperature=0.7, num_samples=3, block=8, steps=12, new_tokens=24),
    _prompts("stop-delayed", ENTRIES, stop=["return"], cache="delayed", entropy_bound=0.01, new_tokens=40),
    # holes
    _infill("given", TOTAL, "]\n    return sum(nums)\n", 5),
    _infill("open", TOTAL, "]\n    return sum(nums)\n"),
    _infill("open-steps", "def double(n):\n", "\n\n\ndouble(4)\n", steps=6),
    _infill("hot", "def f(text):\n", "    return text\n", 12, temperature=0.7, seed=24),
    _infill("stop", "def f(text):\n    text = text", "\n    return text\n", 10, stop=["("]),
    _infill("threshold", "def f(xs):\n    ys = []\n", "\n    return ys\n", 16, threshold=0.9),
    _infill("delayed", "def f(xs):\n    ys = []\n", "\n    return ys\n", 14, cache="delayed", entropy_bound=0.01),
    _infill("open-delayed", TOTAL, "]\n    return sum(nums)\n", cache="delayed", entropy_bound=0.01),
    _fill("two", HOLES),
    _fill("two-open", OPEN_HOLES),
    _fill("three", "def <|hole:2|>(words):\n    words = <|hole:6|>\n    return <|hole:5|>\n", policy="margin"),
    _fill("at-the-end", "def f(x):\n    return x<|hole:6|>\n"),  # where a model would end, which a hole must not
    _fill("only-the-end", "def f(x):\n    return x\n<|hole:8|>"),
    _fill("block", "def f(x):\n    <|hole:9|>\n    <|hole:9|>\n", block=8, cache="dual"),
    _fill("hot", HOLES, temperature=0.8, top_p=0.9, seed=25),
    _fill("reference", HOLES, preset="reference", steps=6),
    _fill("revoke", "def f(xs):\n    <|hole:12|>\n    return <|hole:6|>\n", revoke=0.5, steps=6),
]

# --- training --------------------------------------------------------------------------------------------------------
# All rows of a data set are equal, so that the order in which a loader reads them is of no importance.

# with its end of text as many tokens as a row of `pretrain` and `adapt` has, so that all packed rows are equal
DOCUMENT = (
    "def transform(values):\n    values = [n * n for n in values if n > 3]\n    return sum(values) % 10\n\n\n"
    "print(transform([1, 5, 9]))\n"
)
CHAT_ROW = {
    "prompt": SUMS,
    "answer": "def solve_digits(values):\n    n = sum(abs(n) for n in values)\n    return [n]\n",
}
PROBLEM = {  # so vague that answers and rewards differ
    "id": "golden/0",
    "prompt": "Write a function that takes a list of integers.",
    "tests": [
        "assert solve([3, 1, 2]) == [1, 2, 3]",
        "assert solve([]) == []",
        "assert solve([0]) == [0]",
        "assert solve([5, -2, 4]) == [5, 4]",
    ],
}
KEEP = {**PROBLEM, "id": "golden/1", "prompt": "Write a function that takes a list of integers and keeps some of them."}

_COMMON = """
steps = 20
seed = 7
log_every = 1
save_every = 20
bf16 = false
export_dtype = "float32"
"""

TRAINING: dict[str, Case] = {
    "pretrain": {
        "stage": "pretrain",
        "rows": [{"text": DOCUMENT}] * 6,
        "settings": _COMMON
        + """
batch = 4
micro_batch = 2
lr = 3e-3
warmup = 4
hidden = 64
layers = 2
intermediate = 96
context = 52
positions = 64
""",
    },
    "adapt": {
        "stage": "adapt",
        "rows": [{"text": DOCUMENT}] * 6,
        "settings": _COMMON
        + """
batch = 4
lr = 3e-4
context = 52
anneal_steps = 10
random_length = 0.2
clean_prefix = 0.2
infill = 0.2
ema = 0.9
""",
    },
    "adapt-released": {
        "stage": "adapt",
        "rows": [{"text": DOCUMENT}] * 6,
        "settings": _COMMON
        + """
batch = 4
micro_batch = 2
lr = 3e-4
context = 52
time = "antithetic"
normaliser = "masked_micro"
""",
    },
    "sft": {
        "stage": "sft",
        "rows": [CHAT_ROW] * 6,
        "settings": _COMMON
        + """
batch = 4
lr = 2e-4
length = 72
ramp = 0.5
normaliser = "length"
time = "uniform"
""",
    },
    "sft-flexible": {
        "stage": "sft",
        "rows": [CHAT_ROW] * 6,
        "settings": _COMMON
        + """
batch = 4
lr = 2e-4
length = 72
padding = "flexible"
spare = 8
spare_share = 0.5
infill = 0.3
lora_rank = 4
""",
    },
    "grpo": {
        "stage": "grpo",
        "rows": [PROBLEM],
        "settings": _COMMON.replace(
            "seed = 7", "seed = 3"
        )  # whose first batch has rewards that differ: a gradient beyond rounding
        + """
batch = 8
micro_batch = 4
group = 4
iterations = 2
lr = 5e-5
kl = 0.02
reference_every = 8
reference_mix = 0.6
prompt_tokens = 60
workers = 1
samples_every = 100

[decoding]
new_tokens = 20
steps = 10
temperature = 1.2
top_p = 0.98
""",
    },
    "grpo-blocks": {
        "stage": "grpo",
        "rows": [KEEP],
        "settings": _COMMON.replace("= 20", "= 10")  # the first four of them on completions that are all worth nothing
        + """
batch = 8
group = 8
iterations = 1
estimator = "decoupled"
advantage = "leave_one_out"
scale_rewards = true
reduction = "sequence"
lr = 5e-5
kl = 0.0
prompt_tokens = 60
workers = 1
samples_every = 100

[decoding]
new_tokens = 20
temperature = 0.9
policy = "max_prob"
threshold = 0.9
block = 8
cache = "dual"
""",
    },
}

# --- server ----------------------------------------------------------------------------------------------------------

USER = [{"role": "user", "content": COLLATZ}]
TEXT = "def double(n):\n    return n + 1\n"


def _post(name: str, path: str, **body: Any) -> Case:
    return {"name": name, "method": "POST", "path": path, "body": body}


def _chat(name: str, **body: Any) -> Case:
    return _post(f"chat-{name}", "/v1/chat/completions", **{"messages": USER, "max_tokens": 24, **body})


def _completion(name: str, **body: Any) -> Case:
    return _post(f"completion-{name}", "/v1/completions", **{"prompt": DOUBLE, "max_tokens": 12, **body})


INFILL: Case = {"input_prefix": "def double(n):\n", "prompt": "    return", "input_suffix": "\n", "n_predict": 4}
WATCHED = {"stream": True, "stream_options": {"denoise": True, "include_usage": True}}

REQUESTS: list[Case] = [
    {"name": "models", "method": "GET", "path": "/v1/models"},
    {"name": "model", "method": "GET", "path": "/v1/models/tiny"},
    {"name": "health", "method": "GET", "path": "/health"},
    {"name": "ready", "method": "GET", "path": "/ready"},
    _chat("plain", model="tiny", max_tokens=32),
    _chat("conversation", messages=CHAT, logprobs=True),
    _chat("samples", n=3, temperature=0.9, seed=5, decoding={"steps": 12}),
    _chat("stop", stop=["while"], max_tokens=32),
    _chat(
        "settings", max_completion_tokens=32, max_tokens=None, decoding={"block": 8, "threshold": 0.9, "cache": "dual"}
    ),
    _chat("reference", decoding={"preset": "reference", "steps": 10, "policy": "max_prob"}),
    _chat("stream", stream=True, decoding={"block": 4}, stream_options={"include_usage": True}),
    _chat("stream-stop", stream=True, stop=["while"], decoding={"block": 8}, max_tokens=32),
    _chat("stream-samples", stream=True, n=2, temperature=0.9, seed=6, decoding={"block": 8, "steps": 12}),
    _chat("stream-watched", **WATCHED, decoding={"threshold": 0.9}),
    _chat(
        "stream-watched-revoke",
        **WATCHED,
        decoding={"revoke": 0.5, "steps": 8},
        messages=[{"role": "user", "content": SEARCH}],
    ),
    _completion("plain"),
    _completion("echo", echo=True, logprobs=1),
    _completion("logprobs-0", logprobs=0, stop="return", prompt=STACK),
    _completion("samples", prompt=LOOP, n=3, temperature=1.0, top_p=0.9, seed=2, best_of=3),
    _completion("suffix", prompt=TOTAL, suffix="]\n    return sum(nums)\n", max_tokens=5, logprobs=1),
    _completion("suffix-open", prompt=TOTAL, suffix="]\n    return sum(nums)\n", max_tokens=None),
    _completion("stream", **WATCHED, prompt=STACK),
    _completion("stream-suffix", **WATCHED, prompt=TOTAL, suffix="]\n    return sum(nums)\n", max_tokens=5),
    _post("fill", "/v1/fill", text=HOLES),
    _post("fill-open", "/v1/fill", text=OPEN_HOLES, temperature=0.5, seed=3),
    _post("fill-stream", "/v1/fill", text=HOLES, **WATCHED),
    _post(
        "edit-spans",
        "/v1/edit",
        text=TEXT,
        spans=[{"start": 4, "end": 10, "tokens": 2}, {"start": 26, "end": 31, "tokens": 3}],
    ),
    _post("edit-open-span", "/v1/edit", text=TEXT, spans=[{"start": 26, "end": 31}]),
    _post("edit-instruction", "/v1/edit", text=TEXT, instruction="Triple the number instead.", max_tokens=24),
    _post("infill", "/infill", **INFILL, top_k=40, cache_prompt=True, samplers=["top_k"]),
    _post(
        "infill-extra",
        "/infill",
        **{**INFILL, "n_predict": -1},
        input_extra=[{"text": "def triple(n):\n    return n * 3\n"}],
    ),
    _post("infill-fields", "/infill", **INFILL, response_fields=["content", "timings/prompt_n", "tokens_predicted"]),
    _post("infill-nothing", "/infill", **{**INFILL, "n_predict": 0}),
    _post("tokenize", "/tokenize", content="def f(x):\n    return x<|mask|>", with_pieces=True),
    _post("tokenize-plain", "/tokenize", content="<|mask|> é", parse_special=False),
    # refused: the words of the messages are not compared
    _chat("error-model", model="gpt-4"),
    _chat("error-temperature", temperature=7),
    _chat("error-unknown", mirostat=2),
    _chat("error-setting", decoding={"treshold": 0.9}),
    _chat("error-own-name", decoding={"seed": 1}),
    _chat("error-two-rules", decoding={"threshold": 0.9, "factor": 1}),
    _chat("error-no-messages", messages=[]),
    _chat("spelled-mask", messages=[{"role": "user", "content": "<|mask|>"}]),
    _chat("error-too-long", max_tokens=10**6),
    _completion("error-best-of", best_of=3),
    _completion("error-stream-echo", stream=True, echo=True),
    _post("fill-error-no-hole", "/v1/fill", text="x = 1\n"),
    _post("edit-error-nothing", "/v1/edit", text=TEXT),
    {"name": "error-json", "method": "POST", "path": "/v1/completions", "raw": '{"prompt": "a",'},
    {"name": "error-path", "method": "GET", "path": "/v1/embeddings"},
]
