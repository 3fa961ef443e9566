"""Every family: a random checkpoint in its published layout scores as a plain transformer does, and survives saving."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import plain
import pytest
import torch
from parents import tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor

from diffucoder.decoding.coder import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import CheckpointError
from diffucoder.models.attention import Attention
from diffucoder.models.checkpoint import find_checkpoint, load_denoiser, load_tokenizer, save_denoiser
from diffucoder.models.convert import convert, export
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.families import FAMILIES
from diffucoder.models.hub import known_models
from diffucoder.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]
ROWS, HIDDEN, FEED, HEADS, KEY_HEADS, LENGTH = 310, 32, 48, 4, 2, 70
SIZES = {
    **{"vocab_size": ROWS, "hidden_size": HIDDEN, "intermediate_size": FEED, "num_hidden_layers": 2},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 128},
    **{"rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu", "torch_dtype": "float32"},
}
LLADA_SIZES = {
    **{"embedding_size": ROWS, "vocab_size": 305, "d_model": HIDDEN, "mlp_hidden_size": FEED, "n_layers": 2},
    **{"n_heads": HEADS, "n_kv_heads": KEY_HEADS, "max_sequence_length": 128, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
    **{"block_type": "llama", "include_bias": False, "alibi": False, "rope": True, "layer_norm_type": "rms"},
    **{"activation_type": "silu", "multi_query_attention": None, "clip_qkv": None, "init_device": "cuda"},
}
# What is published: config, kind of layers, and what their papers and code say of shift, blocks and mask
Case = dict[str, Any]
CASES: dict[str, Case] = {
    "Dream": {
        "type": "Dream",
        "class": "DreamModel",
        "bias": True,
        "mask_token": "<|mask|>",
        "config": {"mask_token_id": 300},
    },
    "DreamReasoner": {
        **{"type": "Dream", "class": "DreamForCausalLM", "qk_norm": True, "shifted": False, "block": 32},
        "config": {"mask_token_id": 300, "block_size": 32},
    },
    "Open-dCoder": {"type": "qwen2", "class": "Qwen2ForCausalLM", "bias": True, "tied": True, "mask_token": "<M>"},
    "Tiny-A2D qwen2": {
        "type": "a2d-qwen2",
        "class": "A2DQwen2LMHeadModel",
        "bias": True,
        "shifted": False,
        "mask_token": "<|mask|>",
    },
    "Tiny-A2D qwen3": {
        "type": "a2d-qwen3",
        "class": "A2DQwen3LMHeadModel",
        "qk_norm": True,
        "shifted": False,
        "mask_token": "<|mask|>",
    },
    "Tiny-A2D llama": {
        "type": "a2d-llama",
        "class": "A2DLlamaLMHeadModel",
        "tied": True,
        "shifted": False,
        "mask_token": "<|mask|>",
    },
    "Tiny-A2D block": {
        **{"type": "a2d-qwen3", "class": "A2DQwen3LMHeadModel", "qk_norm": True, "shifted": False, "block": 32},
        **{"mask_token": "<|mask|>", "folder": "Qwen3-0.6B-diffusion-bd3lm-v0.1"},
    },
    "LLaDA": {
        "type": "llada",
        "class": "LLaDAModelLM",
        "shifted": False,
        "key_heads": 4,
        "config": {"mask_token_id": 300},
    },
    "LLaDA with GQA": {"type": "llada", "class": "LLaDAModelLM", "shifted": False, "config": {"mask_token_id": 300}},
    "LLaDA tied": {
        "type": "llada",
        "class": "LLaDAModelLM",
        "shifted": False,
        "tied": True,
        "config": {"mask_token_id": 300},
    },
    "iLLaDA": {"type": "llada", "class": "LLaDAModelLM", "shifted": False, "mask": 5, "folder": "iLLaDA-8B-Instruct"},
    "Stable-DiffCoder": {
        "type": "llama",
        "class": "StableDiffcoderForCausalLM",
        "shifted": False,
        "mask": 5,
        "block": 4,
    },
    "SDAR": {
        "type": "sdar",
        "class": "SDARForCausalLM",
        "qk_norm": True,
        "shifted": False,
        "block": 4,
        "config": {"mask_token_id": 300},
    },
    "SDAR b8": {
        **{"type": "sdar", "class": "SDARForCausalLM", "qk_norm": True, "shifted": False, "block": 8},
        **{"folder": "SDAR-8B-Chat-b8", "mask_token": "<|MASK|>"},
    },
    "Fast-dLLM v2": {
        **{"type": "Fast_dLLM_Qwen", "class": "Fast_dLLM_QwenForCausalLM", "bias": True, "tied": True, "block": 8},
        **{"config": {"bd_size": 8, "layer_types": ["full_attention"] * 2}, "mask_token": "|<MASK>|"},
    },
    "CoDA": {"type": "CoDA", "class": "CoDALanguageModel", "qk_norm": True, "config": {"mask_token_id": 300}},
    "CoDA tied in silence": {
        **{"type": "CoDA", "class": "CoDALanguageModel", "qk_norm": True, "tied": True},
        "config": {"mask_token_id": 300, "tie_word_embeddings": None},
    },
}


def random_weights(case: Case) -> dict[str, Tensor]:
    """Weights by their published names."""
    names = plain.LLADA if case["type"] == "llada" else plain.QWEN
    size = 16 if case.get("qk_norm") else HIDDEN // HEADS
    key_heads = case.get("key_heads", KEY_HEADS)
    shapes = {"q_proj": (HEADS * size, HIDDEN), "o_proj": (HIDDEN, HEADS * size)}
    shapes |= dict.fromkeys(("k_proj", "v_proj"), (key_heads * size, HIDDEN))
    shapes |= {"gate": (FEED, HIDDEN), "up": (FEED, HIDDEN), "down": (HIDDEN, FEED)}
    norms = {
        "norm1": HIDDEN,
        "norm2": HIDDEN,
        **(dict.fromkeys(("q_norm", "k_norm"), size) if case.get("qk_norm") else {}),
    }
    generator = torch.Generator().manual_seed(1)
    weights = {f"{names['embed']}.weight": torch.randn(ROWS, HIDDEN, generator=generator) / 9}
    if not case.get("tied"):
        weights[f"{names['head']}.weight"] = torch.randn(ROWS, HIDDEN, generator=generator) / 9
    weights[f"{names['norm']}.weight"] = 1 + torch.randn(HIDDEN, generator=generator) / 5
    for layer in range(2):
        prefix = names["layer"].format(layer)
        for name, shape in shapes.items():
            weights[f"{prefix}{names[name]}.weight"] = torch.randn(shape, generator=generator) / 5
            if case.get("bias") and name in ("q_proj", "k_proj", "v_proj"):
                weights[f"{prefix}{names[name]}.bias"] = torch.randn(shape[0], generator=generator) / 5
        for name, length in norms.items():
            weights[f"{prefix}{names[name]}.weight"] = 1 + torch.randn(length, generator=generator) / 5
    return weights


def published(case: Case, place: Path, **config: Any) -> Path:
    """A checkpoint as its authors write it: config, two shards and their index, and a tokenizer."""
    folder = place / case.get("folder", "checkpoint")
    folder.mkdir()
    sizes = LLADA_SIZES if case["type"] == "llada" else SIZES
    tied = "weight_tying" if case["type"] == "llada" else "tie_word_embeddings"
    fields = {**sizes, "model_type": case["type"], "architectures": [case["class"]], tied: case.get("tied", False)}
    fields |= {
        **({"n_kv_heads": 4} if case.get("key_heads") else {}),
        **({"head_dim": 16} if case.get("qk_norm") else {}),
    }
    fields |= {**case.get("config", {}), **config}
    fields = {key: value for key, value in fields.items() if value is not None or key == "clip_qkv"}
    (folder / "config.json").write_text(json.dumps(fields))
    weights = random_weights(case)
    weight_map = {}
    for number, name in enumerate(sorted(weights)):
        weight_map[name] = f"model-0000{number % 2 + 1}-of-00002.safetensors"
    for file in set(weight_map.values()):
        save_file(
            {name: weights[name] for name in weights if weight_map[name] == file}, folder / file, {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_tokenizer(folder, case)
    return folder


def write_tokenizer(folder: Path, case: Case) -> None:
    """300 tokens, then the mask; a family whose mask is a known id has a mask there, without a role."""
    backend = tokenizer()
    mask_token = case.get("mask_token", "<|published mask|>")
    backend.add_special_tokens([AddedToken(mask_token, special=True, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    roles = {"eos_token": "<|im_end|>", **({"mask_token": mask_token} if "mask_token" in case else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(10, 290, shape, generator=torch.Generator().manual_seed(0))


def expected(case: Case, tokens: Tensor) -> Tensor:
    """What the family scores for one row of tokens: row i is for token i."""
    names = plain.LLADA if case["type"] == "llada" else plain.QWEN
    rows = plain.logits(random_weights(case), names, tokens, HEADS, theta=5e5, eps=1e-5, block=case.get("block", 0))
    return torch.cat([rows[:1], rows[:-1]]) if case.get("shifted", True) else rows


def load(folder: Path) -> Denoiser:
    return load_denoiser(folder, dtype=torch.float32, device="cpu")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", CASES)
def test_a_published_checkpoint_scores_as_described_and_survives_saving(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = published(case, tmp_path)
    denoiser = load(folder)
    assert name.startswith(find_checkpoint(folder).published.family.title)
    assert denoiser.mask_id == case.get("mask", 300)
    assert denoiser.shifted == case.get("shifted", True)
    assert denoiser.attention == Attention(case.get("block"))
    save_denoiser(denoiser, tmp_path / "saved")
    again = load(tmp_path / "saved")
    save_denoiser(again, tmp_path / "again")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name

    tokens = random_tokens(2, LENGTH)
    lengths = (LENGTH, 41)
    valid = torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths)[:, None]
    for model in (denoiser, again):
        batch = model(tokens, valid=valid)
        for row, length in enumerate(lengths):
            own = tokens[row, -length:]
            torch.testing.assert_close(batch[row, -length:], expected(case, own), rtol=0, atol=1e-5)
            torch.testing.assert_close(model(own[None])[0], expected(case, own), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "Dream"])
def test_a_family_is_saved_under_its_own_names(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = published(case, tmp_path)
    save_denoiser(load(folder), tmp_path / "saved")
    before, after = random_weights(case), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "saved"))
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    assert changed <= {"tie_word_embeddings", "torch_dtype", "pad_token_id", "bos_token_id", "eos_token_id"}


def with_weights(folder: Path, *, remove: str = "", rename: Callable[[str], str] = str, **added: Tensor) -> None:
    """Write the weights again in one file, without those whose name contains `remove`, renamed."""
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        weights |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    kept = {rename(name): tensor for name, tensor in weights.items() if not remove or remove not in name}
    save_file({**kept, **added}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["Dream", "LLaDA", "Stable-DiffCoder"])
@pytest.mark.parametrize("rename", [lambda name: f"model.{name}", lambda name: name.removeprefix("model.")])
def test_a_prefix_may_be_missing_or_doubled(name: str, rename: Callable[[str], str], tmp_path: Path) -> None:
    folder = published(CASES[name], tmp_path)
    with_weights(folder, rename=rename)
    tokens = random_tokens(1, 30)
    torch.testing.assert_close(load(folder)(tokens)[0], expected(CASES[name], tokens[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["Dream", "LLaDA", "SDAR"])
def test_a_head_that_is_stored_counts_and_is_saved_whatever_the_config_says(name: str, tmp_path: Path) -> None:
    tied = "weight_tying" if name == "LLaDA" else "tie_word_embeddings"
    folder = published(CASES[name], tmp_path, **{tied: True})
    tokens = random_tokens(1, 30)
    torch.testing.assert_close(load(folder)(tokens)[0], expected(CASES[name], tokens[0]), rtol=0, atol=1e-5)
    save_denoiser(load(folder), tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(tokens), load(folder)(tokens))


# ---- what does not fit ----


# name: family, changes of its config, changes of its weights, what the error says
WRONG: dict[str, tuple[str, Case, Case, str]] = {
    "an unknown type": (
        "SDAR",
        {"model_type": "nemotron_labs_diffusion"},
        {"encoder.embed_tokens.weight": torch.zeros(2, 2)},
        "'nemotron_labs_diffusion' is not supported; .*nearest is DreamReasoner, which has no weight encoder.embed",
    ),
    "an unknown type with known weights": (
        "LLaDA",
        {"model_type": "llada3"},
        {},
        "'llada3' is not supported; .*; the nearest is iLLaDA, which has these weights",
    ),
    "a list of types": ("SDAR", {"model_type": ["sdar"]}, {}, r"model_type \['sdar'\] is not supported"),
    "ReFusion": (
        "SDAR",
        {"model_type": "qwen3", "mask_token_id": 151670},
        {},
        "'qwen3' is not supported: ReFusion reorders slots of tokens .* nearest is SDAR",
    ),
    "WeDLM": (
        "SDAR",
        {"model_type": "wedlm"},
        {},
        "WeDLM attends causally over reordered tokens, nearest is SDAR; its licence is not for use in the EU",
    ),
    "DiffusionGemma": (
        "SDAR",
        {"model_type": "diffusion_gemma"},
        {},
        "DiffusionGemma denoises random tokens .* nearest is LLaDA",
    ),
    "LLaDA-MoE": ("LLaDA", {"model_type": "lladamoe"}, {}, "a mixture of experts has .* nearest is LLaDA"),
    "LLaDA2": ("LLaDA", {"model_type": "llada2_moe"}, {}, "a mixture of experts has feed-forward layers that are not"),
    "RND1": ("SDAR", {"model_type": "rnd1", "num_experts": 128}, {}, "'rnd1' is not supported: a mixture of experts"),
    "experts in a known type": ("SDAR", {"n_routed_experts": 8}, {}, "'sdar' is not supported: a mixture of experts"),
    "LLaDA of other blocks": (
        "LLaDA",
        {"block_type": "sequential"},
        {},
        "is not a LLaDA config: block_type='sequential' is not supported; it must be 'llama'",
    ),
    "LLaDA with ALiBi": ("LLaDA", {"alibi": True}, {}, "alibi=True is not supported; it must be False"),
    "LLaDA with clipping": ("LLaDA", {"clip_qkv": 8.0}, {}, "clip_qkv=8.0 is not supported; it must be False"),
    "LLaDA with norms of queries": (
        "LLaDA",
        {},
        {"model.transformer.blocks.0.q_norm.weight": torch.ones(8)},
        r"has unexpected model.transformer.blocks.0.q_norm.weight; config.json and weights .*, nearest is LLaDA$",
    ),
    "LLaDA without a projection": (
        "LLaDA",
        {},
        {"remove": "blocks.1.ff_proj"},
        "lacks model.transformer.blocks.1.ff_proj.weight; .*, nearest is LLaDA$",
    ),
    "LLaDA of another width": (
        "LLaDA with GQA",
        {"mlp_hidden_size": 64},
        {},
        r"has wrong shapes for model.transformer.blocks.0.ff_out.weight \(32, 48\) instead of \(32, 64\) and 5 more",
    ),
    "LLaDA with a weight of two names": (
        "LLaDA",
        {},
        {"model.embed_tokens.weight": torch.zeros(ROWS, HIDDEN)},
        "has model.embed_tokens.weight and model.transformer.wte.weight, one weight of LLaDA; remove one",
    ),
    "LLaDA with more layers than weights": ("LLaDA", {"n_layers": 900}, {}, "num_hidden_layers=900, but there are 21"),
    "SDAR without norms of keys": (
        "SDAR",
        {},
        {"remove": "k_norm"},
        "lacks model.layers.0.self_attn.k_norm.weight and",
    ),
    "DreamReasoner without norms": (
        "DreamReasoner",
        {},
        {"remove": "_norm."},
        "lacks model.layers.0.self_attn.k_proj.bias and 5 more; .*, nearest is Dream$",
    ),
    "Stable-DiffCoder with biases": (
        "Stable-DiffCoder",
        {},
        {"model.layers.0.self_attn.q_proj.bias": torch.zeros(HIDDEN)},
        "has unexpected model.layers.0.self_attn.q_proj.bias; .*, nearest is Stable-DiffCoder$",
    ),
    "blocks of no size": (
        "Fast-dLLM v2",
        {"bd_size": 0},
        {},
        "block_size=0 is not a positive whole number; correct it",
    ),
    "no blocks in a family that has none": ("CoDA", {"block_size": 0}, {}, "block_size=0 is not a positive"),
    "windows of attention": (
        "SDAR",
        {"layer_types": ["sliding_attention"] * 2},
        {},
        "is not a SDAR config: a model with sliding_attention layers cannot see a canvas; use full attention",
    ),
    "an unshifted model as Dream": (
        "Tiny-A2D qwen2",
        {"model_type": "Dream", "mask_token_id": 300},
        {},
        "model_type 'Dream' is not supported with architectures of Tiny-A2D.*, the nearest; correct one of them",
    ),
    "WeDLM by its class": (
        "SDAR",
        {"model_type": "qwen3", "architectures": ["WeDLMForCausalLM"]},
        {},
        "'qwen3' is not supported: WeDLM attends causally",
    ),
    "blocks of text": ("SDAR", {"block_size": "4"}, {}, "block_size='4' is not a positive whole number; correct it"),
    "a mask that the vocabulary lacks": (
        "SDAR",
        {"mask_token_id": None},
        {},
        "mask_token_id=151669 is not an id below vocab_size=310",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layout_is_one_line_that_names_the_family(name: str, tmp_path: Path) -> None:
    family, config, weights, message = WRONG[name]
    folder = published(CASES[family], tmp_path, **config)
    with_weights(folder, **weights)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_family_without_any_mask_is_rejected(tmp_path: Path) -> None:
    folder = published(CASES["Tiny-A2D qwen2"], tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="json: Tiny-A2D needs a mask_token_id; add it"):
        load(folder)


# ---- what a checkpoint says of itself ----


def extras(folder: Path, **fields: Any) -> Path:
    (folder / "diffucoder.json").write_text(json.dumps(fields))
    return folder


def test_the_blocks_of_a_checkpoint_overrule_those_of_its_family(tmp_path: Path) -> None:
    folder = published(CASES["SDAR"], tmp_path)
    assert find_checkpoint(folder).attention == Attention(4)
    extras(folder, block_size=16, block_origin="prompt")
    assert find_checkpoint(folder).attention == Attention(16, "prompt")
    extras(folder, block_origin="middle")
    with pytest.raises(CheckpointError, match="block_origin='middle' is not 'start' or 'prompt'; correct it"):
        find_checkpoint(folder)


def test_a_family_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = extras(published(CASES["Open-dCoder"], tmp_path), family="LLaDA")
    with pytest.raises(CheckpointError, match=r"the family 'LLaDA' of diffucoder.json, nearest is Open-dCoder$"):
        load(folder)


@pytest.mark.parametrize("name", ["SDAR", "CoDA"])
def test_a_model_without_blocks_is_saved_so(name: str, tmp_path: Path) -> None:
    folder = extras(published(CASES[name], tmp_path, block_size=16), block_size=None)
    save_denoiser(load(folder), tmp_path / "saved")
    assert load(tmp_path / "saved").attention == Attention(None)


@pytest.mark.parametrize(("field", "block"), [("block_size", 16), ("bd_size", 2), ("block_length", 64)])
@pytest.mark.parametrize("family", ["SDAR", "CoDA"])
def test_a_config_may_have_the_size_of_blocks(family: str, field: str, block: int, tmp_path: Path) -> None:
    assert find_checkpoint(published(CASES[family], tmp_path, **{field: block})).attention == Attention(block)


def test_a_name_in_the_hubs_cache_counts(tmp_path: Path) -> None:
    cache = tmp_path / "models--dllm-hub--Qwen3-0.6B-diffusion-bd3lm-v0.1" / "snapshots"
    cache.mkdir(parents=True)
    folder = published({**CASES["Tiny-A2D qwen3"], "folder": "1a2b"}, cache)
    assert find_checkpoint(folder).attention == Attention(32)
    adapters = tmp_path / "models--SJTU-Deng-Lab--D2F_DiffuCoder_Instruct_7B_Lora" / "snapshots"
    adapters.mkdir(parents=True)
    write_adapter(adapters / "3c4d", str(published(CASES["Dream"], tmp_path)), MODULES["Dream"])
    assert find_checkpoint(adapters / "3c4d").attention == Attention(32, "prompt")


def test_a_class_of_the_auto_map_counts(tmp_path: Path) -> None:
    classes = {"AutoModelForCausalLM": "modeling.StableDiffcoderForCausalLM"}
    folder = published(CASES["Stable-DiffCoder"], tmp_path, architectures=["LlamaForCausalLM"], auto_map=classes)
    assert find_checkpoint(folder).attention == Attention(4)


def test_a_mask_token_may_be_described(tmp_path: Path) -> None:
    folder = published(CASES["Open-dCoder"], tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    token = {"content": "<M>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": token}))
    assert load(folder).mask_id == load_tokenizer(folder).mask_id == 300


def test_a_parent_is_not_a_denoiser_because_its_tokenizer_has_a_mask(tmp_path: Path) -> None:
    folder = published({**CASES["Open-dCoder"], "mask_token": "<|mask|>"}, tmp_path)
    assert find_checkpoint(folder).mask_id is None


def test_a_mask_that_only_we_name_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    folder = published(CASES["Open-dCoder"], tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    extras(folder, mask_token_id=300, family="Open-dCoder")
    assert load(folder).mask_id == load_tokenizer(folder).mask_id == 300


@pytest.mark.parametrize("name", ["LLaDA", "iLLaDA", "Open-dCoder", "SDAR b8"])
def test_a_tokenizer_has_the_mask_of_its_model(name: str, tmp_path: Path) -> None:
    folder = published(CASES[name], tmp_path)
    assert load_tokenizer(folder).mask_id == load(folder).mask_id


def test_an_answer_ends_at_the_end_of_a_familys_turns(tmp_path: Path) -> None:
    folder = published(CASES["LLaDA"], tmp_path)
    assert load_tokenizer(folder).terminator_ids == {0, 2}
    assert Tokenizer.load(folder, mask_id=300, end_ids=(1, 50, 999)).terminator_ids == {0, 1, 2}  # 50 is text


# ---- the rest of the project ----


@pytest.mark.parametrize("name", ["Dream", "Open-dCoder", "Tiny-A2D llama", "LLaDA", "SDAR", "Fast-dLLM v2", "CoDA"])
def test_a_family_decodes(name: str, tmp_path: Path) -> None:
    coder = DiffuCoder.load(published(CASES[name], tmp_path), dtype=torch.float32, device="cpu")
    answer = coder.generate("x = 1", DecodingParams(new_tokens=8, steps=8), chat=False)
    assert 0 < answer.forward_passes <= 8


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LLaDA", "rows that are not shifted"),
        ("Fast-dLLM v2", "block-causal attention"),
        ("CoDA", "norms of queries and keys"),
    ],
)
def test_a_denoiser_is_not_converted_and_a_gguf_says_what_it_cannot_hold(
    name: str, reason: str, tmp_path: Path
) -> None:
    folder = published(CASES[name], tmp_path)
    with pytest.raises(CheckpointError, match="is a diffusion model already"):
        convert(folder, tmp_path / "converted")
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match=f"a dream GGUF cannot represent this .* model: it has {reason}; export"):
        export(folder, tmp_path / "out.gguf")


def test_open_dcoder_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export(published(CASES["Open-dCoder"], tmp_path), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").stat().st_size > 0


# ---- the table ----


def test_each_row_is_stated_and_small() -> None:
    for family in FAMILIES:
        if family.diffusion:
            assert family.licence, family.title
            assert family.source, family.title
            DecodingParams(**{"steps": 1, **family.defaults})
    assert len({(family.title, family.model_type) for family in FAMILIES}) == len(FAMILIES)


def test_the_page_of_models_has_the_facts_of_each_row() -> None:
    text = (REPOSITORY / "docs" / "models.md").read_text()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    for family in FAMILIES:
        if family.diffusion:
            line = next(line for name, line in lines.items() if name.split(" (")[0] == family.title)
            attention = f"blocks of {family.attention.block}" if family.attention.block else "full"
            for fact in (f"| {'yes' if family.shifted else 'no'} | {attention} |", f"| {family.licence} |"):
                assert fact in line, (family.title, fact)
            assert family.mask_id is None or f"| {family.mask_id} |" in line
            assert family.architecture.capitalize() in line


def test_known_models_are_described_and_load_by_name() -> None:
    for known in known_models():
        assert known.hub_id.count("/") == 1
        assert known.licence
        assert known.note
        assert 1.7 < known.size_gb / float(known.parameters.removesuffix("B")) < 2.3  # two bytes for each


# ---- adapters ----


def write_adapter(folder: Path, base: str, modules: list[str], **settings: Any) -> dict[str, Tensor]:
    """An adapter in peft's layout over `modules` (by their published names); what it adds to each of their weights."""
    folder.mkdir()
    fields = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 4, "lora_alpha": 6, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    generator = torch.Generator().manual_seed(2)
    tensors, changes = {}, {}
    for module in modules:
        down, up = (torch.randn(shape, generator=generator) / 9 for shape in ((4, HIDDEN), (HIDDEN, 4)))
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        changes[f"{module}.weight"] = 1.5 * up @ down
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return changes


MODULES = {
    "Dream": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"],
    "LLaDA": ["model.transformer.blocks.0.k_proj", "model.transformer.blocks.1.attn_out"],
}


@pytest.mark.parametrize("name", MODULES)
def test_an_adapter_is_merged_into_its_base(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = published(case, tmp_path)
    changes = write_adapter(tmp_path / "adapter", str(base), MODULES[name])
    names = plain.LLADA if name == "LLaDA" else plain.QWEN
    weights = random_weights(case)
    merged = {key: weight + changes.get(key, 0) for key, weight in weights.items()}
    tokens = random_tokens(1, 20)
    rows = plain.logits(merged, names, tokens[0], HEADS, theta=5e5, eps=1e-5, block=0)
    shift = int(case.get("shifted", True))
    denoiser = load(tmp_path / "adapter")
    torch.testing.assert_close(denoiser(tokens)[0, shift:], rows[: 20 - shift], rtol=0, atol=1e-5)
    assert load_tokenizer(tmp_path / "adapter").mask_id == 300
    save_denoiser(denoiser, tmp_path / "merged")
    assert torch.equal(load(tmp_path / "merged")(tokens), denoiser(tokens))


def test_d2f_sees_its_whole_prompt_and_then_blocks(tmp_path: Path) -> None:
    base = published(CASES["Dream"], tmp_path)
    folder = tmp_path / "D2F_DiffuCoder_Instruct_7B_Lora"
    write_adapter(folder, str(base), MODULES["Dream"])
    assert load(folder).attention == Attention(32, "prompt")
    save_denoiser(load(folder), tmp_path / "merged")
    assert load(tmp_path / "merged").attention == Attention(32, "prompt")
    extras(folder, block_size=8)
    assert load(folder).attention == Attention(8, "prompt")


def test_an_adapter_merges_as_by_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    base = published(CASES["Dream"], tmp_path)
    write_adapter(tmp_path / "adapter", str(base), MODULES["Dream"], use_rslora=True, target_modules=MODULES["Dream"])
    theirs = load(base)
    theirs.model = PeftModel.from_pretrained(theirs.model, str(tmp_path / "adapter")).merge_and_unload()
    tokens = random_tokens(1, 20)
    torch.testing.assert_close(load(tmp_path / "adapter")(tokens), theirs(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"use_dora": True},
            "json: use_dora=True: .*; use a plain LoRA adapter",
        ),
        ({"init_lora_weights": "pissa"}, "json: init_lora_weights='pissa': .*; use a plain LoRA adapter"),
        ({"peft_type": "IA3"}, "json: peft_type='IA3': "),
        ({"bias": "all"}, "json: bias='all': "),
        ({"alpha_pattern": {"q_proj": 2}}, "json: alpha_pattern={'q_proj': 2}: "),
        ({"modules_to_save": ["lm_head"]}, r"json: modules_to_save=\['lm_head'\]: "),
        ({"r": 0}, "json: r=0: "),
        ({"r": 8}, "layers.0.self_attn.q_proj.lora_A.weight does not fit a matrix of the base; .* with rank 8"),
        (
            {"base_model_name_or_path": "who/what"},
            "base_model_name_or_path='who/what' is not on this machine; fetch it, or write where it is",
        ),
        ({"base_model_name_or_path": "/a/DiffuCoder-7B-Instruct"}, "path='/a/DiffuCoder-7B-Instruct' is not on this"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_line(settings: Case, message: str, tmp_path: Path) -> None:
    base = published(CASES["Dream"], tmp_path)
    write_adapter(tmp_path / "adapter", str(base), MODULES["Dream"], **settings)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_the_base_of_a_local_adapter_is_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options["local_files_only"]))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write_adapter(tmp_path / "adapter", "/home/author/DiffuCoder-7B-Instruct", MODULES["Dream"])
    with pytest.raises(CheckpointError, match="is not on this machine; fetch it"):
        find_checkpoint(tmp_path / "adapter")
    assert asked == [("apple/DiffuCoder-7B-Instruct", True)]


def test_an_adapter_without_weights_is_rejected(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", str(published(CASES["Dream"], tmp_path)), [])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors has no weights; fetch it again$"):
        load(tmp_path / "adapter")


def test_an_adapter_for_another_layer_is_rejected(tmp_path: Path) -> None:
    base = published(CASES["Dream"], tmp_path)
    write_adapter(tmp_path / "adapter", str(base), ["model.layers.7.self_attn.q_proj"])
    with pytest.raises(CheckpointError, match=r"layers.7.self_attn.q_proj.lora_A.weight does not fit a matrix of the"):
        load(tmp_path / "adapter")
    write_adapter(tmp_path / "second", str(tmp_path / "adapter"), MODULES["Dream"])
    with pytest.raises(CheckpointError, match="is an adapter itself; merge that one first"):
        load(tmp_path / "second")
