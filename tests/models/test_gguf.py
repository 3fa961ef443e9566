"""GGUF in and out: a parent equals itself after a journey through a file; what we write says what llama.cpp reads."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.models.denoiser import Denoiser
from diffucoder.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

from parents import TEMPLATE, TEXTS, encodings, splitter, tokenizer, write_parent  # noqa: E402  # needs gguf

from diffucoder.models.gguf import TYPES, read_gguf, write_gguf  # noqa: E402

MakeLM = Callable[..., Any]
IDS = {"vocab_size": 310, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
PARENTS = {
    "llama": {"kind": "llama"},
    "llama tied": {"kind": "llama", "tie_word_embeddings": True},
    "qwen2": {"kind": "qwen2"},
    "qwen2 tied": {"kind": "qwen2", "tie_word_embeddings": True},
}
CODE = [*TEXTS[:2], "x = 12345", "  don't\n\n\t日本 ²½ é 3.14\r\n", "<|im_start|>user\n<tool_call>1<|im_end|>", ""]


def mask_token(backend: Backend) -> Tokenizer:
    """`backend`, wrapped, with the mask at 300 and chat roles."""
    backend.add_special_tokens(["<|mask|>"])
    return Tokenizer(
        backend, config={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    )


def exported(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and dequantised tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return fields, tensors


# ---- reading ----


@pytest.mark.parametrize("parent", PARENTS)
def test_a_parent_read_from_gguf_scores_as_it_did(causal_lm: MakeLM, tmp_path: Path, parent: str) -> None:
    model = causal_lm(**PARENTS[parent], **IDS)
    read, _ = read_gguf(write_parent(tmp_path / "parent.gguf", model, tokenizer()))
    tokens = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(read(tokens).logits, model(tokens).logits)
    assert read.config.rms_norm_eps == model.config.rms_norm_eps
    assert read.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_a_parent_is_read_in_the_dtype_asked_for(causal_lm: MakeLM, tmp_path: Path) -> None:
    path = write_parent(tmp_path / "parent.gguf", causal_lm("llama", **IDS), tokenizer())
    assert {p.dtype for p in read_gguf(path, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_the_tokenizer_that_comes_out_is_the_one_that_went_in(causal_lm: MakeLM, tmp_path: Path, pre: str) -> None:
    backend = tokenizer(pre)
    _, read = read_gguf(write_parent(tmp_path / "parent.gguf", causal_lm("llama", **IDS), backend, pre=pre))
    assert encodings(read.backend, CODE) == encodings(backend, CODE)
    assert [read.decode(read.encode(text), skip_special=False) for text in CODE] == CODE
    assert [read.backend.id_to_token(id_) for id_ in read.encode("x = 123")][-3:] == ["1", "2", "3"]
    assert (read.mask_id, read.bos_id, read.eos_id, read.pad_id) == (300, 1, 2, 2)
    assert read.special_ids == {0, 1, 2, 300}
    assert read.chat_template == TEMPLATE


def test_digits_are_cut_although_merges_for_them_exist() -> None:
    assert encodings(tokenizer("smollm"), ["12345"]) != encodings(tokenizer("gpt2"), ["12345"])


def test_a_quantised_parent_is_dense_and_near(causal_lm: MakeLM, tmp_path: Path) -> None:
    model = causal_lm("llama", hidden_size=64, intermediate_size=64, head_dim=16, **IDS)
    plain = read_gguf(write_parent(tmp_path / "plain.gguf", model, tokenizer()))[0]
    packed = read_gguf(write_parent(tmp_path / "packed.gguf", model, tokenizer(), kind="Q4_1"))[0]
    for (name, weight), near in zip(plain.named_parameters(), packed.parameters(), strict=True):
        assert near.dtype == torch.float32
        torch.testing.assert_close(near, weight, rtol=0, atol=0.1, msg=name)
    assert not torch.equal(plain.lm_head.weight, packed.lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba' is not supported as a parent; use llama or qwen2"),
        ({"architecture": "dream"}, "architecture 'dream' is not supported as a parent"),
        ({"pre": "gpt-4o"}, "tokenizer.ggml.pre='gpt-4o' is not supported and would give wrong ids; use a GGUF of"),
        (
            {"tokenizer_model": "llama"},
            "tokenizer.ggml.model='llama' with tokenizer.ggml.pre='smollm' is not supported",
        ),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type='yarn' is not read from GGUF"),
        ({"extra": {"llama.rope.scaling.factor": 2.0}}, "llama.rope.scaling.factor=2.0 is not read from GGUF"),
        ({"extra": {"llama.rope.dimension_count": 4}}, "llama.rope.dimension_count=4 is not read from GGUF"),
        ({"extra": {"llama.attention.key_length": 16}}, "llama.attention.key_length=16 is not read"),
        ({"extra": {"llama.attention.sliding_window": 64}}, "llama.attention.sliding_window=64 is not read"),
        ({"extra": {"llama.attention.causal": False}}, "llama.attention.causal=False is not read"),
        ({"extra": {"llama.expert_count": 8}}, "llama.expert_count=8 is not read"),
        ({"extra": {"llama.attention.layer_norm_epsilon": 1e-5}}, "llama.attention.layer_norm_epsilon="),
        ({"extra": {"llama.logit_scale": 0.5}}, "llama.logit_scale=0.5 is not read"),
        ({"omitted": "attention.layer_norm_rms_epsilon"}, "lacks llama.attention.layer_norm_rms_epsilon"),
        ({"omitted": "context_length"}, "lacks llama.context_length; use the parent's own folder"),
        ({"without": "blk.1.ffn_up.weight"}, "lacks tensor blk.1.ffn_up.weight; use the parent's own folder"),
    ],
)
def test_what_cannot_be_read_is_refused(
    causal_lm: MakeLM, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_parent(tmp_path / "parent.gguf", causal_lm("llama", **IDS), tokenizer(), **changes)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_that_change_nothing_are_let_pass(causal_lm: MakeLM, tmp_path: Path) -> None:
    extra = {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.finetuned": False,
        "llama.rope.dimension_count": 8,
        "llama.attention.key_length": 8,
        "llama.attention.causal": True,
        "llama.expert_count": 0,
        "general.license": "mit",
    }
    model = causal_lm("llama", **IDS)
    read, _ = read_gguf(write_parent(tmp_path / "parent.gguf", model, tokenizer(), extra=extra))
    tokens = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(read(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "has unexpected tensor blk.0.attn_"),  # transformers would drop it in silence
        ({"head_dim": 16}, "metadata and weights do not make a llama model"),
    ],
)
def test_weights_that_the_metadata_does_not_explain_are_refused(
    causal_lm: MakeLM, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_parent(tmp_path / "parent.gguf", causal_lm("llama", **IDS, **changes), tokenizer())
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_a_file_that_is_missing_or_cut_short_is_refused(causal_lm: MakeLM, tmp_path: Path) -> None:
    path = write_parent(tmp_path / "parent.gguf", causal_lm("llama", **IDS), tokenizer())
    content = path.read_bytes()
    for length in (0, 3, 50, 5_000, len(content) // 2, len(content) - 64):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is damaged, cut short or not a GGUF file"):
            read_gguf(path)
    with pytest.raises(CheckpointError, match=r"GGUF file 'absent.gguf' does not exist; check the path"):
        read_gguf("absent.gguf")


def test_without_the_package_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"need the gguf package; run pip install -e '\.\[gguf\]'"):
        read_gguf(tmp_path / "parent.gguf")


# ---- writing ----


def test_an_exported_denoiser_says_what_llama_cpp_reads(causal_lm: MakeLM, tmp_path: Path) -> None:
    denoiser = Denoiser.from_causal_lm(causal_lm("llama", **IDS), mask_id=300)
    text = mask_token(tokenizer())
    write_gguf(denoiser, text, tmp_path / "small.gguf")
    fields, tensors = exported(tmp_path / "small.gguf")
    said = {key: value for key, value in fields.items() if not isinstance(value, list) and "GGUF." not in key}
    assert said == {
        "general.architecture": "dream",
        "general.name": "small",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "dream.context_length": 128,
        "dream.vocab_size": 310,
        "dream.embedding_length": 32,
        "dream.block_count": 2,
        "dream.feed_forward_length": 48,
        "dream.attention.head_count": 4,
        "dream.attention.head_count_kv": 2,
        "dream.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "dream.attention.causal": False,
        "dream.rope.freq_base": 10_000.0,
        "diffusion.shift_logits": True,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": text.pad_id,
        "tokenizer.ggml.mask_token_id": 300,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    kinds = fields["tokenizer.ggml.token_type"]
    assert [kinds[i] for i in (0, 2, 3, 299, 300, 301)] == [3, 3, 1, 4, 3, 5]
    assert fields["tokenizer.ggml.tokens"][299:302] == ["<tool_call>", "<|mask|>", "[PAD301]"]
    state = denoiser.model.state_dict()
    assert torch.equal(tensors["output.weight"], state["lm_head.weight"])
    assert torch.equal(tensors["blk.1.attn_k.weight"], state["model.layers.1.self_attn.k_proj.weight"])
    assert torch.equal(tensors["blk.1.attn_k.bias"], torch.zeros(16))
    assert len(tensors) == len(state) + 6  # q, k, v biases


def test_a_causal_export_reads_back_as_the_parent(causal_lm: MakeLM, tmp_path: Path) -> None:
    model = causal_lm("qwen2", **IDS)
    tokens = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
        denoiser = Denoiser.from_causal_lm(model, mask_id=300)
        write_gguf(denoiser, mask_token(tokenizer("qwen2")), tmp_path / "parent.gguf", causal=True)
        read, _ = read_gguf(tmp_path / "parent.gguf")
        torch.testing.assert_close(read(tokens).logits, expected)


@pytest.mark.parametrize("parent", PARENTS)
def test_every_weight_is_written_exactly(causal_lm: MakeLM, tmp_path: Path, parent: str) -> None:
    denoiser = Denoiser.from_causal_lm(causal_lm(**PARENTS[parent], **IDS), mask_id=300)
    write_gguf(denoiser, mask_token(tokenizer()), tmp_path / "out.gguf")
    _, tensors = exported(tmp_path / "out.gguf")
    written = sorted(float(t.double().sum()) for t in tensors.values() if t.any())
    assert written == sorted(float(t.double().sum()) for t in denoiser.model.state_dict().values())


@pytest.mark.parametrize("dtype", TYPES)
def test_matrices_take_the_dtype_asked_for_and_the_rest_stays_exact(
    causal_lm: MakeLM, tmp_path: Path, dtype: str
) -> None:
    denoiser = Denoiser.from_causal_lm(causal_lm("qwen2", **IDS), mask_id=300)
    write_gguf(denoiser, mask_token(tokenizer("qwen2")), tmp_path / "out.gguf", dtype=dtype)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == TYPES[dtype][0]
    assert kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == "F32"
    narrow = kinds["blk.0.ffn_down.weight"]  # 48 columns are no multiple of q8_0's 32
    assert narrow == ("F16" if dtype == "q8_0" else TYPES[dtype][0])
    fields, tensors = exported(tmp_path / "out.gguf")
    assert fields["general.file_type"] == int(gguf.LlamaFileType[TYPES[dtype][1]])
    near = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "q8_0": 2**-6}[dtype]
    weight = denoiser.model.lm_head.weight.detach()
    torch.testing.assert_close(tensors["output.weight"], weight, rtol=near, atol=near)


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_the_way_of_cutting_text_is_told_by_its_name(causal_lm: MakeLM, tmp_path: Path, pre: str) -> None:
    denoiser = Denoiser.from_causal_lm(causal_lm("llama", **IDS), mask_id=300)
    backend = tokenizer(pre)
    backend.normalizer = normalizers.NFC()  # llama.cpp composes nothing either way: Qwen2's is let pass
    write_gguf(denoiser, mask_token(backend), tmp_path / "out.gguf")
    fields, _ = exported(tmp_path / "out.gguf")
    assert fields["tokenizer.ggml.pre"] == pre
    assert fields["tokenizer.ggml.merges"] == [
        " ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]
    ]


def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused(causal_lm: MakeLM, tmp_path: Path) -> None:
    denoiser = Denoiser.from_causal_lm(causal_lm("llama", **IDS), mask_id=300)
    lower = tokenizer()
    lower.normalizer = normalizers.Lowercase()
    whole = tokenizer()
    whole.pre_tokenizer = splitter("gpt2")
    for backend in (lower, whole):
        with pytest.raises(CheckpointError, match=r"no name for \(known: qwen2, smollm\)"):
            write_gguf(denoiser, mask_token(backend), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_dream_cannot_say_is_not_exported(causal_lm: MakeLM, tmp_path: Path) -> None:
    text = mask_token(tokenizer())
    for changes in ({"kind": "qwen3"}, {"kind": "llama", "head_dim": 16}, {"kind": "llama", "hidden_act": "gelu"}):
        denoiser = Denoiser.from_causal_lm(causal_lm(**changes, **IDS), mask_id=300)
        with pytest.raises(CheckpointError, match="a dream GGUF cannot represent this"):
            write_gguf(denoiser, text, tmp_path / "out.gguf")
    plain = Denoiser.from_causal_lm(causal_lm("llama", **IDS), mask_id=300)
    with pytest.raises(ConfigError, match="dtype='int4' is not supported by GGUF export; use one of float32, float16"):
        write_gguf(plain, text, tmp_path / "out.gguf", dtype="int4")
    with pytest.raises(CheckpointError, match="use the tokenizer saved with the model"):
        write_gguf(Denoiser.from_causal_lm(causal_lm(**IDS), mask_id=305), text, tmp_path / "out.gguf")
