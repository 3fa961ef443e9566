"""Values that files of models and of data must not choke on: parts of tokenizers, templates, names, pickles."""

from typing import Any

Json = Any  # whatever JSON can hold

GROWS = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 200}
BACKTRACKS = {"type": "Split", "pattern": {"Regex": "(a+)+$|(a|a)*b"}, "behavior": "Isolated", "invert": False}
COMPONENTS: list[Json] = [
    *(
        {"type": kind}
        for kind in ("NFC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel", "Fuse", "Whitespace")
    ),
    *({"type": kind} for kind in ("WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "ByteFallback", "Nothing")),
    {
        "type": "Sequence",
        "normalizers": [GROWS] * 6,
        "pretokenizers": [BACKTRACKS] * 2,
        "decoders": [],
        "processors": [],
    },
    {"type": "Sequence", "normalizers": [], "pretokenizers": []},
    BACKTRACKS,
    {**BACKTRACKS, "pattern": {"Regex": "(?=x)*((a{0,65535}){0,65535})"}},
    {**BACKTRACKS, "pattern": {"String": ""}},
    {"type": "Replace", "pattern": {"Regex": "$|^"}, "content": "y"},
    {"type": "Prepend", "prepend": "x" * 1000},
    {"type": "Strip", "strip_left": True, "strip_right": True, "content": "x", "start": 2**63, "stop": 1},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Digits", "individual_digits": True},
    {"type": "FixedLength", "length": 0},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "BPEDecoder", "suffix": ""},
    {
        "type": "WordPiece",
        "prefix": "##",
        "cleanup": True,
        "vocab": {},
        "unk_token": "x",
        "max_input_chars_per_word": 0,
    },
    {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0], ["a", -1e308]], "byte_fallback": True},
    {"type": "WordLevel", "vocab": {"<|mask|>": 3, "a": 2**31}, "unk_token": "none"},
    {"type": "BPE", "vocab": {}, "merges": []},
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    {"type": "BertProcessing", "sep": ["x", 2**31], "cls": ["y", 1]},
    {
        "strategy": {"Fixed": 10**12},
        "direction": "Left",
        "pad_to_multiple_of": 0,
        "pad_id": 9,
        "pad_type_id": 0,
        "pad_token": "",
    },
    {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 10},
]
TEMPLATES = (
    *(
        "{{ 1 / 0 }}",
        "{{ 1 + 'a' }}",
        "{{ 'x' * 10000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ x.y.z }}",
    ),
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    *(
        "{% include 'x' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends 'x' %}",
        "{% if",
        "{{",
        "{# ",
        "{% raw %}",
        "\udc80",
    ),
    *(
        "{{ messages[99].content }}",
        "{{ messages[0]['x']['y'] }}",
        "{{ raise_exception('no') }}",
        "{{ raise_exception(1) }}",
    ),
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    *(
        "{{ strftime_now('%Y') }}",
        "{{ strftime_now(0) }}",
        "{{ messages | tojson(indent=100000000) }}",
        "{{ messages | tojson }}",
    ),
    *(
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ range(10000000) | list }}",
        "{{ [0] * 1000000000 }}",
    ),
    "{% set x = namespace(t='x' * 1000) %}{% for i in range(40) %}{% set x.t = x.t ~ x.t %}{% endfor %}{{ x.t }}",
    *(
        "{{ messages | map(attribute='x.y') | list }}",
        "{{ messages | sort(attribute='x') }}",
        "{{ messages | groupby('x') }}",
    ),
    *(
        "{{ 'ab' | batch(0) | list }}",
        "{{ 'ab' | slice(0) | list }}",
        "{{ 5 | filesizeformat }}",
        "{{ lipsum(n=100000) }}",
    ),
    *(
        "{% set messages = 5 %}{{ messages | length }}",
        "{% generation %}x{% endgeneration %}",
        "{% break %}",
        "{% do 1 %}",
    ),
    *(
        "{{ messages.append(messages) }}{{ messages }}",
        "{% for m in messages %}{{ messages.append(m) }}{% endfor %}",
        "<|mask|>",
    ),
)
WORDS = [
    "Dream",
    "qwen2",
    "qwen3",
    "llama",
    "LLaDA",
    "gelu",
    "silu",
    "nothing",
    "load",
    "float16",
    "float8",
    "int8",
    "auto",
]
WORDS += [
    "torch.float32",
    "someone/kernel",
    "yarn",
    "linear",
    "dynamic",
    "longrope",
    "llama3",
    "proportional",
    "F32",
    "I64",
]
VALUES: list[Json] = [
    {"quant_method": "gptq", "bits": 4},
    {"rope_type": "yarn", "factor": 0},
    {"rope_type": "llama3", "factor": 8.0},
    {"rope_type": "dynamic", "factor": "x", "rope_theta": 0},
    {"rope_type": "default", "rope_theta": -1.0},
    ["full_attention", "x"],
    [{"name": "default", "template": "{{ 1 / 0 }}"}, {"x": 1}],
    {"0": {"content": "<|mask|>"}},
    {"99999999999": {"content": "x", "special": "no"}},
    {"content": None},
    {"AutoConfig": "x--y.Z"},
]
NAMES = (
    "quantization_config",
    "attn_implementation",
    "head_dim",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "dtype",
)
NAMES += (
    "model_type",
    "mask_token_id",
    "tie_word_embeddings",
    "trust_remote_code",
    "chat_template",
    "added_tokens_decoder",
)
NAMES += (
    "extra_special_tokens",
    "additional_special_tokens",
    "image_token",
    "unk_token",
    "tokenizer_class",
    "add_bos_token",
)
NAMES += (
    "partial_rotary_factor",
    "num_experts",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "is_encoder_decoder",
    "",
)
DATA_NAMES = ("prompt", "question", "text", "tests", "test_cases", "test_list", "test", "entry_point", "id", "task_id")
DATA_NAMES += (
    "messages",
    "instruction",
    "output",
    "input",
    "content",
    "solution",
    "completion",
    "answer",
    "code",
    "source",
)
PICKLES = (
    "cposix\nsystem\n(S'touch fell-to-a-pickle'\ntR.",
    'cbuiltins\nexec\n(S\'open("fell-to-a-pickle", "w")\'\ntR.',
    "ctorch.distributed.checkpoint.metadata\nMetadata\n)R.",
    "(lp0\ng0\na.",
    "\x80\x04N.",
    "X\xff\xff\xff\x7f.",
)
"""Pickles that run code, that are of another class, and that are damaged."""
