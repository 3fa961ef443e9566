"""Autoregressive parents as they come from elsewhere: tiny, random, as a folder of transformers or as a GGUF file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXTS = ("def area(width, height):\n    return width * height\n", "for x in range(12345):\n\tprint(x, 3.14)\n") * 9
_QWEN2 = (  # written out a second time on purpose: the tests' own word on how Qwen2 cuts text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitter(pre: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging: as SmolLM does, as Qwen2 does, or as GPT-2 does."""
    byte_level = pre_tokenizers.ByteLevel
    if pre == "qwen2":
        split = pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated")
        return pre_tokenizers.Sequence([split, byte_level(add_prefix_space=False, use_regex=False)])
    words = byte_level(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if pre == "smollm" else words


def tokenizer(pre: str = "smollm") -> Tokenizer:
    """A byte-level BPE of 300 tokens: three special ones first, and a last one that is added but is plain text.

    Its merges are learned without regard to digits, so that numbers merge unless they are cut.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splitter("gpt2")
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=299, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.pre_tokenizer = splitter(pre)
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return backend


def encodings(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text."""
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def write_folder(folder: Path, model: Any, backend: Tokenizer, **config: Any) -> Path:
    """Model and tokenizer as transformers saves them; `config` adds to `tokenizer_config.json`."""
    model.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**roles, "chat_template": TEMPLATE, **config}))
    return folder


def write_parent(
    path: Path,
    model: Any,
    backend: Tokenizer,
    *,
    pre: str = "smollm",
    kind: str = "F32",
    architecture: str | None = None,
    without: str | None = None,
    tokenizer_model: str = "gpt2",
    extra: Mapping[str, str | float] | None = None,
    omitted: str = "",
) -> Path:
    """Model and tokenizer as llama.cpp's converter writes them, matrices quantised to `kind`.

    The last five arguments spoil the file: another architecture, a tensor left out, another kind of tokenizer, further
    keys, a key left out.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, architecture or config.model_type)
    writer.add_name(path.stem)
    _write_sizes(writer, config, omitted)
    _write_tokenizer(writer, backend, pre, tokenizer_model, config.vocab_size)
    types = gguf.GGUFValueType
    kinds = {str: types.STRING, bool: types.BOOL, int: types.UINT32, float: types.FLOAT32}
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, kinds[type(value)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed == without or (renamed == "output.weight" and config.tie_word_embeddings):
            continue
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = _interleaved(tensor, tensor.shape[0] // _heads(config, name))
        type_ = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        writer.add_tensor(renamed, gguf.quants.quantize(tensor.numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _heads(config: Any, name: str) -> int:
    return int(config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)


def _write_sizes(writer: Any, config: Any, omitted: str) -> None:
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if name != omitted:
            writer.add_uint32(f"{config.model_type}.{name}", size)
    if omitted != "attention.layer_norm_rms_epsilon":
        writer.add_float32(f"{config.model_type}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{config.model_type}.rope.freq_base", config.rope_parameters["rope_theta"])


def _write_tokenizer(writer: Any, backend: Tokenizer, pre: str, model: str, rows: int) -> None:
    spelt = {id_: token for token, id_ in backend.get_vocab(with_added_tokens=True).items()}
    added = {id_: 3 if token.special else 4 for id_, token in backend.get_added_tokens_decoder().items()}
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([spelt.get(id_, f"[PAD{id_}]") for id_ in range(rows)])
    writer.add_token_types([added.get(id_, 1 if id_ in spelt else 5) for id_ in range(rows)])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]])
    for role, id_ in {"bos": 1, "eos": 2, "padding": 2, "unknown": 0}.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", id_)
    writer.add_chat_template(TEMPLATE)


def _interleaved(weight: Tensor, head: int) -> Tensor:
    """Rows of q or k as llama.cpp's RoPE for Llama wants them: the two halves of every head take turns."""
    halves = weight.reshape(-1, 2, head // 2, *weight.shape[1:])
    return torch.stack((halves[:, 0], halves[:, 1]), dim=2).reshape(weight.shape).contiguous()
