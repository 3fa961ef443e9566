"""Oracle 9 (save, load, same bytes), what a saved checkpoint looks like to others, and every refusal's message."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.models import families
from diffucoder.models import hub as hub_module
from diffucoder.models.checkpoint import (
    default_device_and_dtype,
    find_checkpoint,
    load_denoiser,
    load_tokenizer,
    load_with_tokenizer,
    save_denoiser,
)
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.hub import known_models

MakeLM = Callable[..., Any]

# What the release's own `DreamModel` names its weights, for one layer (Dream's modelling code)
RELEASED_LAYER = {
    *(f"self_attn.{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")),
    "self_attn.o_proj.weight",
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
}
RELEASED_WEIGHTS = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *(f"model.layers.{layer}.{name}" for layer in range(2) for name in RELEASED_LAYER),
}
# the released code, less `transformers_version`, which would tie the bytes to an installation
RELEASED_CONFIG = {
    *("architectures", "model_type", "auto_map", "vocab_size", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "num_hidden_layers", "hidden_size", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "attention_dropout", "initializer_range", "tie_word_embeddings", "use_cache"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "use_mrope", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "mask_token_id", "torch_dtype"),
}


def load(folder: Path, **options: Any) -> Denoiser:
    return load_denoiser(folder, **{"dtype": torch.float32, "device": "cpu", **options})


def scores(denoiser: Denoiser) -> Tensor:
    tokens = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(tokens)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def saved(tiny: Denoiser, tmp_path: Path) -> Path:
    save_denoiser(tiny, tmp_path / "saved")
    return tmp_path / "saved"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


# ---- round trips ----

PARENTS = {
    "qwen2": {"kind": "qwen2"},
    "qwen2 tied": {"kind": "qwen2", "tie_word_embeddings": True},
    "llama": {"kind": "llama"},
    "llama tied": {"kind": "llama", "tie_word_embeddings": True},
    "qwen3": {"kind": "qwen3"},
    "qwen3 tied": {"kind": "qwen3", "tie_word_embeddings": True},
    "llama, all biases": {"kind": "llama", "attention_bias": True},
    "llama, wide heads": {"kind": "llama", "head_dim": 16},
    "qwen2, scaled rope": {
        "kind": "qwen2",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    },
}
OTHERS = {"qwen3", "qwen3 tied", "llama, all biases", "llama, wide heads", "qwen2, scaled rope"}


@pytest.mark.parametrize("parent", PARENTS)
def test_save_load_save_gives_the_same_scores_and_bytes(causal_lm: MakeLM, tmp_path: Path, parent: str) -> None:
    denoiser = Denoiser.from_causal_lm(causal_lm(**PARENTS[parent]), mask_id=66)
    save_denoiser(denoiser, tmp_path / "one")
    loaded = load(tmp_path / "one")
    torch.testing.assert_close(scores(loaded), scores(denoiser), rtol=0, atol=1e-5)
    save_denoiser(loaded, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    kind = json.loads((tmp_path / "one" / "config.json").read_text())["model_type"]
    assert (kind == "Dream") == (parent not in OTHERS)
    assert (loaded.mask_id, loaded.config.pad_token_id, loaded.config.eos_token_id) == (66, 1, 1)


def test_unshifted_is_remembered(causal_lm: MakeLM, tmp_path: Path) -> None:
    denoiser = Denoiser.from_causal_lm(causal_lm(), mask_id=66, shifted=False)
    save_denoiser(denoiser, tmp_path)
    assert not load(tmp_path).shifted
    assert torch.equal(scores(load(tmp_path)), scores(denoiser))


def test_a_family_is_one_row(causal_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama whose config and weights have other names, which is not shifted and whose config names no mask."""
    original = Denoiser.from_causal_lm(causal_lm("llama"), mask_id=66, shifted=False)
    save_denoiser(original, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"model_type": "renamed", "n_layers": fields.pop("num_hidden_layers")}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "diffucoder.json").unlink()
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.layers.", "transformer.blocks."): weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    row = families.Family(
        "renamed",
        "llama",
        shifted=False,
        diffusion=True,
        mask_id=66,
        config_names={"n_layers": "num_hidden_layers"},
        weight_names={"transformer.blocks.": "model.layers."},
    )
    with pytest.raises(CheckpointError, match="model_type 'renamed' is not supported"):
        load(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, row))
    loaded = load(tmp_path)
    assert not loaded.shifted
    assert loaded.mask_id == 66
    assert torch.equal(scores(loaded), scores(original))


def test_whoever_may_read_the_config_may_read_the_weights(saved: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in saved.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_what_is_saved_is_what_the_release_reads(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert set(config) == RELEASED_CONFIG
    assert config["architectures"] == ["DreamModel"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    }
    assert (config["model_type"], config["mask_token_id"], config["torch_dtype"]) == ("Dream", 66, "float32")
    assert config["tie_word_embeddings"] is False
    assert set(load_file(saved / "model.safetensors")) == RELEASED_WEIGHTS
    assert json.loads((saved / "generation_config.json").read_text())["mask_token_id"] == 66


def test_the_recorded_release_survives_a_round_trip(shared: Path, tmp_path: Path) -> None:
    folder = shared / "parity" / "dream-tiny"
    save_denoiser(load(folder), tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path))
    assert {name: new[name] for name in old} == old


def test_other_types_say_nothing_bidirectional_to_other_tools(causal_lm: MakeLM, tmp_path: Path) -> None:
    save_denoiser(Denoiser.from_causal_lm(causal_lm("qwen3"), mask_id=66), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert "is_causal" not in config
    assert json.loads((tmp_path / "diffucoder.json").read_text()) == {"mask_token_id": 66, "shifted": True}


def test_shards_load_and_replace_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = load(saved)  # its weights are mapped from the very file that is now replaced
    before = scores(denoiser)
    split = huggingface_hub.split_torch_state_dict_into_shards

    def small(state: dict[str, Tensor], **_: Any) -> Any:
        return split(state, max_shard_size=9_000)

    monkeypatch.setattr(huggingface_hub, "split_torch_state_dict_into_shards", small)
    save_denoiser(denoiser, saved)
    assert not (saved / "model.safetensors").exists()
    assert len(list(saved.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(scores(load(saved)), before)
    monkeypatch.undo()
    save_denoiser(denoiser, saved)
    assert {path.name for path in saved.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_bf16_files_load_into_fp32_and_back(tiny: Denoiser, tmp_path: Path) -> None:
    save_denoiser(tiny.to(torch.bfloat16), tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    wide = load(tmp_path)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.model.lm_head.weight, tiny.model.lm_head.weight.float())
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert not wide.training


def test_an_autoregressive_parent_loads_with_a_mask_named(causal_lm: MakeLM, tmp_path: Path) -> None:
    causal_lm("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds an autoregressive model"):
        load(tmp_path)
    denoiser = load(tmp_path, mask_id=67)
    assert (denoiser.mask_id, denoiser.vocab_size) == (67, 68)


def test_device_and_dtype_are_chosen_in_one_place(saved: Path) -> None:
    device, dtype = default_device_and_dtype()
    assert dtype in (torch.float32, torch.bfloat16)
    assert default_device_and_dtype("cpu", torch.float16) == (torch.device("cpu"), torch.float16)
    denoiser = load_denoiser(saved)
    assert (denoiser.device.type, denoiser.dtype) == (device.type, dtype)
    with pytest.raises(ConfigError, match="device='abacus' is not on this machine"):
        default_device_and_dtype("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device='cuda' is not on this machine"):
            load_denoiser(saved, device="cuda")


@pytest.mark.parametrize(
    ("onednn", "avx512", "amx", "machine", "expected"),
    [
        (True, True, False, "x86_64", torch.bfloat16),
        (True, False, True, "x86_64", torch.bfloat16),
        (True, False, False, "x86_64", torch.float32),  # oneDNN would emulate it
        (True, False, False, "aarch64", torch.bfloat16),
        (False, True, True, "x86_64", torch.float32),
    ],
)
def test_a_cpu_gets_bfloat16_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, avx512: bool, amx: bool, machine: str, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert default_device_and_dtype("cpu") == (torch.device("cpu"), expected)


# ---- refusals ----


def refusal(source: str | Path | None, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ", ".join(model.name for model in known_models())
    assert names.startswith("base, instruct, cpgrpo, d2f, dream-base, dream, dream-coder, ")
    assert refusal("nonsense") == f"model 'nonsense' is not a folder, a Hub id (owner/name) or one of {names}, tiny"
    assert "is not a folder" in refusal(tmp_path / "absent")
    assert "is not a folder" in refusal("./a/b")
    assert "not a valid Hub id; write owner/name" in refusal("what is/this?")
    monkeypatch.setattr(hub_module, "SHIPPED", tmp_path / "absent")
    assert refusal(None) == "no model ships with this installation; name a folder or a Hub id"


def test_a_name_with_two_meanings_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert find_checkpoint("tiny").folder == hub_module.SHIPPED
    (saved.parent / "base").mkdir()  # not a model: the name means the known one
    assert "model 'apple/DiffuCoder-7B-Base' is not on this machine" in refusal("base")
    for name, known in (("dream", "Dream-org/Dream-v0-Instruct-7B"), ("tiny", str(hub_module.SHIPPED))):
        (saved.parent / name).symlink_to(saved)
        assert refusal(name) == (
            f"model {name!r} is both a known name and a folder here; write './{name}' for the folder, or "
            f"{known!r} for the known model"
        )
        assert load(f"./{name}").mask_id == load(Path(name)).mask_id == 66  # type: ignore[arg-type]


def test_files_in_place_of_a_folder(saved: Path) -> None:
    weights = saved / "model.safetensors"
    assert refusal(str(weights)) == f"model {str(weights)!r} is a file; name the folder that it is in"
    for name in ("m.gguf", saved / "other/m.Q4_K_M.gguf"):
        assert f"model {str(name)!r} is a GGUF file, which has to be converted first: diffucoder" in refusal(name)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} has no config.json; is it a model's folder?"
    (tmp_path / "settings.json").write_text("{}")
    told = f"{tmp_path} is the folder of a training run; name its finished model: {tmp_path / 'model'}"
    assert refusal(tmp_path) == told
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "holds no JSON object" in refusal(tmp_path)


def test_configs_that_make_no_sense(saved: Path) -> None:
    edit_config(saved, model_type="mamba")
    assert "model_type 'mamba' is not supported; use one of Dream, qwen2, qwen3, llama" in refusal(saved)
    edit_config(saved, model_type="Dream", mask_token_id="absent")
    assert "Dream needs a mask_token_id" in refusal(saved)
    for mask_id in (67, -1, "66"):
        edit_config(saved, mask_token_id=mask_id)
        assert f"mask_token_id={mask_id!r} is not an id below vocab_size=67" in refusal(saved)
    edit_config(saved, mask_token_id=66, hidden_size="wide")
    assert "is not a Dream config" in refusal(saved)
    edit_config(saved, hidden_size=32, hidden_act="unheard of")
    assert "impossible model: " in refusal(saved)


SETTINGS_OF_OTHERS = [  # in a config.json, about other things than layers
    *({"attn_implementation": name} for name in ("flash_attention_2", "eager", {"": "flash_attention_3"})),
    {"_attn_implementation": "flash_attention_2"},
    {"_attn_implementation_internal": "flex_attention", "experts_implementation": "none"},
    {"auto_map": {"AutoConfig": "elsewhere.Config"}, "architectures": "X", "trust_remote_code": True},
    {"return_dict": False, "output_attentions": True, "output_hidden_states": True, "use_return_dict": False},
    {"quantization_config": None, "torch_dtype": None, "head_dim": None, "rope_theta": None},
    {"id2label": {"a": "b"}, "num_labels": 1, "sub_configs": 1, "attribute_map": {"hidden_size": "x"}, "to_dict": 3},
    {"pad_token_id": 1.0, "eos_token_id": [1.0, 2], "bos_token_id": None, "mask_token_id": 66.0},
    {"text_config": {}, "per_layer_config": [], "transformers_weights": "other.safetensors", "is_causal": True},
    {"temperature": "hot", "max_length": 7, "name_or_path": None, "transformers_version": 7},
    {"layer_types": ["full_attention"] * 2, "sliding_window": 8, "use_sliding_window": False, "use_cache": True},
    {"rope_scaling": {"type": "default"}, "torch_dtype": "torch.bfloat16"},
]


@pytest.mark.parametrize("changes", SETTINGS_OF_OTHERS, ids=lambda changes: next(iter(changes)))
def test_settings_of_other_programs_change_nothing(saved: Path, changes: dict[str, Any]) -> None:
    before = scores(load(saved))
    edit_config(saved, **changes)
    loaded = load(saved)
    assert torch.equal(scores(loaded), before)
    assert loaded.mask_id == 66
    assert type(loaded.mask_id) is int
    assert find_checkpoint(saved).dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"rope_theta": 500.0},
        {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
)
def test_every_form_of_rope_is_read_as_by_transformers(causal_lm: MakeLM, tmp_path: Path, rope: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    causal_lm().save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters="absent", attn_implementation="eager")
    edit_config(tmp_path, **rope)
    tokens = torch.randint(2, 60, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits
        own = load(tmp_path, mask_id=66)(tokens, attention=torch.ones(48, 48, dtype=torch.bool).tril())
    torch.testing.assert_close(own[:, 1:], theirs[:, :-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, "the weights are quantised"),
        ({"torch_dtype": "auto"}, "dtype 'auto' is not one of float32, bfloat16, float16, float64; write one"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"dtype": {"": "float32"}}, "is not one of float32"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "factor=0.5 is not"),
        ({"layer_types": ["chunked_attention"] * 2}, "with chunked_attention layers cannot see a canvas"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "with sliding_attention layers"),
        ({"mask_token_id": True}, "mask_token_id=True is not an id below"),
        ({"mask_token_id": 66.5}, "mask_token_id=66.5 is not an id below"),
        ({"mask_token_id": [66]}, r"mask_token_id=\[66\] is not an id below"),
        ({"pad_token_id": [1]}, "is not a Dream config"),
    ],
)
def test_configs_that_cannot_be_followed(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_an_adapter_beside_a_model_is_not_added_in_silence(saved: Path) -> None:
    (saved / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "other/model"}')
    assert "holds an adapter (adapter_config.json); merge it, or move it elsewhere" in refusal(saved)


def test_weights_in_numbers_that_are_not_read(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    save_file(weights, saved / "model.safetensors")
    assert "model.safetensors: lm_head.weight is I8, quantised; use the model with dense weights" in refusal(saved)


def test_an_index_without_files(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    for content in ("{}", '{"weight_map": ["model.safetensors"]}'):
        (saved / "model.safetensors.index.json").write_text(content)
        assert "model.safetensors.index.json has no weight_map; fetch it again" in refusal(saved)


def test_missing_weight_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "model.safetensors").rename(saved / "elsewhere")
    assert "lacks weight file model.safetensors; fetch it again (safetensors only)" in refusal(saved)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks weight file model-00001-of-00002.safetensors" in refusal(saved)


@pytest.mark.parametrize("size", [0, 5, 500, 30_000])
def test_a_truncated_file(saved: Path, size: int) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert "model.safetensors is damaged or cut short" in refusal(saved)


def test_weights_that_do_not_match_the_config(saved: Path) -> None:
    good = load_file(saved / "model.safetensors")

    def with_weights(weights: dict[str, Tensor]) -> str:
        save_file(weights, saved / "model.safetensors")
        return refusal(saved)

    fewer = {name: tensor for name, tensor in good.items() if "layers.1.mlp" not in name}
    message = with_weights(fewer)
    assert f"{saved} lacks model.layers.1.mlp." in message
    assert "and 2 more; config.json and weights do not match" in message
    assert "has unexpected model.extra" in with_weights({**good, "model.extra": torch.zeros(2)})
    message = with_weights({**good, "lm_head.weight": torch.zeros(3, 32)})
    assert "has wrong shapes for lm_head.weight (3, 32) instead of (67, 32)" in message
    save_file({**good, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, saved / "model.safetensors")
    load(saved)  # some old checkpoints store this buffer: it says nothing


def test_adapters_must_be_merged_before_saving(tiny: Denoiser, tmp_path: Path) -> None:
    tiny.model.lm_head.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"lm_head.lora_A; merge adapters first"):
        save_denoiser(tiny, tmp_path)


# ---- the Hub ----


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[int, str], None]]:
    """A local server in the Hub's place; call it to set the status and error code of every answer."""
    answer = {"status": 404, "code": "RepoNotFound"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"])
            self.send_header("X-Error-Code", answer["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815  # the name is http.server's

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield lambda status, code: answer.update(status=status, code=code)
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_the_hub_refuses(hub: Callable[[int, str], None]) -> None:
    hub(404, "RepoNotFound")
    assert "model 'who/what' is neither a folder here nor on the Hub" in refusal("who/what")
    hub(403, "GatedRepo")
    assert "is gated; accept its terms at https://huggingface.co/who/what" in refusal("who/what")
    hub(404, "RevisionNotFound")
    assert "has no revision 'v9'" in refusal("who/what", revision="v9")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    unreachable = "model 'apple/DiffuCoder-7B-cpGRPO' is not on this machine and the Hub cannot be reached"
    assert unreachable in refusal("cpgrpo")  # HF_HUB_OFFLINE is set for all tests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert unreachable in refusal("cpgrpo")


def test_known_models_have_one_name_each() -> None:
    names = [model.name for model in known_models()]
    assert len(set(names)) == len(names) == 28
    assert all(model.hub_id.count("/") == 1 for model in known_models())


# ---- the tokenizer beside a model ----


@pytest.fixture
def spelled(saved: Path) -> Path:
    """A saved model with a tokenizer that fits: 66 characters, then the mask."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({chr(40 + i): i for i in range(66)}, unk_token=chr(40)))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(["<|mask|>"])
    backend.save(str(saved / "tokenizer.json"))
    return saved


def test_a_fitting_tokenizer_loads(spelled: Path) -> None:
    assert load_tokenizer(spelled).mask_id == 66


def test_a_wrong_vocabulary_is_refused(spelled: Path) -> None:
    edit_config(spelled, mask_token_id=65)
    with pytest.raises(CheckpointError, match=r"'<\|mask\|>' at 66, but the model's mask_token_id=65 is 'i' there"):
        load_tokenizer(spelled)
    edit_config(spelled, mask_token_id=66)
    tokenizer = load_tokenizer(spelled)
    tokenizer.backend.add_tokens(["one too many"])
    tokenizer.save(spelled)
    with pytest.raises(CheckpointError, match="has 68 tokens, but the model only 67 rows"):
        load_tokenizer(spelled)


def test_a_tokenizer_without_a_mask_is_refused_beside_a_model_with_one(spelled: Path) -> None:
    text = (spelled / "tokenizer.json").read_text().replace("<|mask|>", "<|other|>")
    (spelled / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer has no mask token '<\|mask\|>'"):
        load_tokenizer(spelled)


@pytest.fixture
def parent(spelled: Path, causal_lm: MakeLM, tmp_path: Path) -> Path:
    """An autoregressive model with a tokenizer that has no mask."""
    causal_lm().save_pretrained(tmp_path / "parent")
    text = (spelled / "tokenizer.json").read_text().replace("<|mask|>", "<|other|>")
    (tmp_path / "parent" / "tokenizer.json").write_text(text)
    return tmp_path / "parent"


def test_a_parents_tokenizer_gets_a_mask(parent: Path) -> None:
    assert load_tokenizer(parent).mask_id == 67


def test_model_and_tokenizer_load_together(spelled: Path) -> None:
    denoiser, tokenizer = load_with_tokenizer(spelled, dtype=torch.float32, device="cpu")
    assert tokenizer.mask_id == denoiser.mask_id == 66
    assert torch.equal(scores(denoiser), scores(load(spelled)))


def test_a_parent_loads_together_with_the_mask_of_its_tokenizer(parent: Path) -> None:
    denoiser, tokenizer = load_with_tokenizer(parent, add_mask=True)
    assert tokenizer.mask_id == denoiser.mask_id == 67
    with pytest.raises(CheckpointError, match="holds an autoregressive model"):
        load_with_tokenizer(parent)


def test_a_checkpoint_that_was_found_is_loaded_without_finding_it_again(spelled: Path) -> None:
    checkpoint = find_checkpoint(spelled)
    (spelled / "config.json").unlink()
    assert load_tokenizer(checkpoint).mask_id == 66
    first = load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    second = load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    assert torch.equal(scores(first), scores(second))
