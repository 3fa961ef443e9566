"""Families of models, one row each: how to recognise a checkpoint, and what its config and weights are called.

A new family whose layers transformers has is a row here, with a test against its original, and in `docs/models.md`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffucoder.errors import CheckpointError
from diffucoder.files import Json
from diffucoder.model_files import one_line, shown
from diffucoder.models.attention import FULL, Attention


@dataclass(frozen=True)
class Signs:
    """What tells families of the same model type apart."""

    folder: Path
    fields: Json  # of its config.json
    mask_token: object = None  # what the config of its tokenizer names
    weights: frozenset[str] = frozenset()  # the names of the stored weights; none if they are not on this machine

    @property
    def name(self) -> str:
        """The name of the model, in lower case: of its folder, or after the last -- in the Hub's cache."""
        in_cache = self.folder.parent.name == "snapshots"
        return (self.folder.parents[1] if in_cache else self.folder.resolve()).name.lower().rpartition("--")[2]


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one family have in common."""

    model_type: str  # in their config.json
    architecture: str  # the model type of transformers whose layers these are
    name: str = ""  # as people call it; by default the model type
    sign: Callable[[Signs], bool] | None = None  # whether a checkpoint of this model type is one; None: each is
    shifted: bool = True  # row i - 1 of the model scores token i
    attention: Attention = FULL
    diffusion: bool = True  # they are denoisers, so they need a mask id
    mask_id: int | None = None  # if neither their config nor their tokenizer names one
    end_ids: tuple[int, ...] = ()  # tokens that end an answer, besides the tokenizer's end of text
    defaults: Mapping[str, object] = field(default_factory=dict)  # decoding as released, by our settings' names
    config_names: Mapping[str, str] = field(default_factory=dict)  # their keys -> transformers' keys
    config_values: Mapping[str, object] = field(default_factory=dict)  # what their keys have to be, if they are there
    weight_names: Mapping[str, str] = field(default_factory=dict)  # part of their name -> part of transformers' name
    licence: str = ""
    source: str = ""  # where the facts of the row are from

    @property
    def title(self) -> str:
        """How messages and tables call it."""
        return self.name or self.model_type

    @property
    def keeps_format(self) -> bool:
        """Whether a model is written as it was read. Parents become Dream's, or keep the type of their layers."""
        return self.diffusion and self.title != "Dream"

    def weight_name(self, stored: str) -> str:
        """The name that transformers has for a stored weight, whose prefix may be missing or there twice."""
        if not stored.startswith(tuple(self.weight_names)):
            stored = re.sub(r"^(model\.)*", "model.", stored).replace("model.lm_head.", "lm_head.")
        for theirs, ours in self.weight_names.items():
            stored = stored.replace(theirs, ours)
        return stored

    def stored_name(self, name: str) -> str:
        """The name under which the family stores the weight that transformers calls `name`."""
        for theirs, ours in reversed(list(self.weight_names.items())):
            name = name.replace(ours, theirs)
        return name


@dataclass(frozen=True)
class Published:
    """How a checkpoint was written, so that it can be written so again."""

    family: Family
    fields: Json  # its config.json

    def key(self, name: str) -> str:
        """The checkpoint's own key for what transformers' configs call `name`."""
        return {ours: theirs for theirs, ours in self.family.config_names.items()}.get(name, name)


_A2D = Family(
    "a2d-qwen3",
    "qwen3",
    "Tiny-A2D",
    shifted=False,
    defaults={"steps": 256, "temperature": 0.0, "policy": "max_prob"},
    licence="not stated; parents Apache-2.0",
    source="github.com/ZHZisZZ/dllm: pipelines/a2d/models, core/samplers",
)
_A2D_BLOCK = replace(_A2D, name="Tiny-A2D block", attention=Attention(32), sign=lambda signs: "bd3lm" in signs.name)
_LLADA = Family(
    "llada",
    "llama",
    "LLaDA",
    shifted=False,
    mask_id=126336,
    end_ids=(126081, 126348),  # end of text, end of turn
    defaults={"policy": "max_prob", "block": 32},
    config_names={
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "embedding_size": "vocab_size",  # rows; their vocab_size counts the used ones
        "max_sequence_length": "max_position_embeddings",
        "weight_tying": "tie_word_embeddings",
    },
    config_values={
        **{"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True},
        **dict.fromkeys(("alibi", "include_bias", "include_qkv_bias", "attention_layer_norm"), False),
        **dict.fromkeys(("scale_logits", "input_emb_norm", "multi_query_attention", "clip_qkv"), False),
    },
    weight_names={  # in this order: `ff_out` is the head outside the blocks, and a projection inside
        "model.transformer.wte.": "model.embed_tokens.",
        "model.transformer.ln_f.": "model.norm.",
        "model.transformer.ff_out.": "lm_head.",
        "model.transformer.blocks.": "model.layers.",
        **{f".{name}_proj.": f".self_attn.{name}_proj." for name in "qkv"},
        ".attn_out.": ".self_attn.o_proj.",
        **{".ff_proj.": ".mlp.gate_proj.", ".up_proj.": ".mlp.up_proj.", ".ff_out.": ".mlp.down_proj."},
        **{".attn_norm.": ".input_layernorm.", ".ff_norm.": ".post_attention_layernorm."},
    },
    licence="MIT",
    source="github.com/ML-GSAI/LLaDA; its modelling code in github.com/ZHZisZZ/dllm: pipelines/llada/models",
)

FAMILIES = (  # of several rows that fit a checkpoint, the first counts
    Family(
        "Dream",
        "qwen3",
        "DreamReasoner",
        sign=lambda signs: "block_size" in signs.fields if not signs.weights else ".q_norm." in str(signs.weights),
        shifted=False,
        attention=Attention(32),
        mask_id=151669,
        end_ids=(151643, 151645),
        defaults={"policy": "max_prob", "threshold": 0.9, "block": 32},
        licence="Apache-2.0",
        source="huggingface.co/Dream-org/DreamReasoner-8B; github.com/zhijie-group/Diffulex: model/dream_reasoner.py",
    ),
    Family(  # Dream, Dream-Coder, DreamOn, DiffuCoder: Qwen2 that attends both ways
        "Dream",
        "qwen2",
        defaults={"policy": "entropy", "temperature": 0.2, "top_p": 0.95},
        licence="Apache-2.0; DiffuCoder: apple-amlr",
        source="github.com/apple/ml-diffucoder; github.com/DreamLM",
    ),
    Family(
        "qwen2",
        "qwen2",
        "Open-dCoder",
        sign=lambda signs: signs.mask_token == "<M>",
        defaults={"steps": 200, "temperature": 0.7},
        licence="Apache-2.0",
        source="github.com/pengzhangzhi/Open-dLLM: generation_utils.py, tasks/train_torch.py",
    ),
    Family("qwen2", "qwen2", diffusion=False),
    Family("qwen3", "qwen3", diffusion=False),
    Family(
        "llama",
        "llama",
        "Stable-DiffCoder",
        sign=lambda signs: "StableDiffcoder" in f"{signs.fields.get('architectures')} {signs.fields.get('auto_map')}",
        shifted=False,
        attention=Attention(4),
        mask_id=5,
        end_ids=(2,),
        defaults={"policy": "max_prob", "steps": 512, "block": 4},
        licence="MIT",
        source="github.com/ByteDance-Seed/Stable-DiffCoder; github.com/zhijie-group/Diffulex: config/stable_diffcoder",
    ),
    Family("llama", "llama", diffusion=False),
    *(replace(_A2D_BLOCK, model_type=f"a2d-{layers}", architecture=layers) for layers in ("qwen2", "qwen3", "llama")),
    *(replace(_A2D, model_type=f"a2d-{layers}", architecture=layers) for layers in ("qwen2", "qwen3", "llama")),
    replace(
        _LLADA,
        name="iLLaDA",
        sign=lambda signs: signs.fields.get("mask_token_id") == 5 or "illada" in signs.name,
        mask_id=5,
        end_ids=(),
        licence="Apache-2.0",
    ),
    _LLADA,
    Family(
        "sdar",
        "qwen3",
        "SDAR",  # and TraDo
        shifted=False,
        attention=Attention(4),
        mask_id=151669,
        end_ids=(151643, 151645),
        defaults={"policy": "max_prob", "threshold": 0.9, "temperature": 1.0, "block": 4},
        licence="Apache-2.0, code MIT",
        source="github.com/JetAstra/SDAR: generate.py; huggingface.co/JetLM/SDAR-4B-Chat",
    ),
    Family(
        "Fast_dLLM_Qwen",
        "qwen2",
        "Fast-dLLM v2",
        attention=Attention(32),
        mask_id=151665,
        end_ids=(151643, 151645),
        defaults={"policy": "max_prob", "threshold": 0.9, "block": 32},
        licence="Apache-2.0",
        source="huggingface.co/Efficient-Large-Model/Fast_dLLM_v2_7B; github.com/zhijie-group/Diffulex: fast_dllm_v2",
    ),
    Family(
        "CoDA",
        "qwen3",
        mask_id=151669,
        end_ids=(151643, 151645),
        defaults={"policy": "entropy", "policy_temperature": 0.1, "steps": 128, "block": 32},
        licence="CC-BY-NC-4.0",
        source="github.com/SalesforceAIResearch/CoDA: CoDALanguageModel",
    ),
)

_REJECTED = {  # in model types or classes, and what their nearest family does not do
    "refusion": "ReFusion reorders slots of tokens before each pass and fills each left to right, nearest is SDAR",
    "wedlm": "WeDLM attends causally over reordered tokens, nearest is SDAR; its licence is not for use in the EU",
    "diffusiongemma": "DiffusionGemma denoises random tokens and has no mask token, nearest is LLaDA",
    "moe": "a mixture of experts has feed-forward layers that are not dense, nearest is LLaDA",
}
_LAYERS = re.compile(  # the weights of the layers that are supported, as transformers calls them
    r"(lm_head|model\.(embed_tokens|norm|layers\.\d+\.(self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj|"
    r"input_layernorm|post_attention_layernorm)))\.(weight|bias)"
)


def family_of(signs: Signs, named: object = None) -> Family:
    """The family of a checkpoint: of the rows that fit, the one `named` or the first. CheckpointError if none fits."""
    kind = signs.fields.get("model_type")
    names = re.sub("[_-]", "", f"{kind} {signs.fields.get('architectures')}".lower())
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if any(signs.fields.get(name) not in (None, 0, 1) for name in experts):
        names += " moe"
    if kind == "qwen3" and (signs.fields.get("mask_token_id") == 151670 or "refusion" in signs.name):
        names += " refusion"
    place = f"{signs.folder}/config.json: model_type {shown(kind)} is not supported"
    for name, reason in _REJECTED.items():
        if name in names:
            raise CheckpointError(f"{place}: {reason}")
    rows = [family for family in FAMILIES if family.model_type == kind]
    for other in FAMILIES if rows else ():
        beginning = re.sub("[_-]", "", f"'{other.model_type}".lower())  # of a class
        if beginning in names and other.model_type not in (other.architecture, kind):
            raise CheckpointError(f"{place} with architectures of {other.title}, the nearest; correct one of them")
    for family in rows:
        if named == family.title or (named is None and (family.sign is None or family.sign(signs))):
            return family
    if rows:
        raise CheckpointError(f"{place} with the family {shown(named)} of diffucoder.json, nearest is {rows[0].title}")
    known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
    raise CheckpointError(f"{place}; use one of {known}; {_nearest(signs)}")


def attention_of(signs: Signs, extras: Json, default: Attention) -> Attention:
    """The attention that a checkpoint was trained for.

    The size of its blocks is in `diffucoder.json` (`extras`), in its config or in its name, else it is the `default`.
    CheckpointError for a size that is none.
    """
    block: object = default.block
    for size in re.findall(r"-b(\d{1,5})\b", signs.name if block else ""):
        block = int(size)
    for key in ("block_length", "bd_size", "block_size"):
        if signs.fields.get(key) is not None:
            block = signs.fields[key]
    block = extras.get("block_size", block)
    origin = extras.get("block_origin", default.origin)
    if block is not None and (type(block) is not int or not 0 < block < 2**31):
        raise CheckpointError(f"{signs.folder}: block_size={shown(block)} is not a positive whole number; correct it")
    if origin not in ("start", "prompt"):
        raise CheckpointError(f"{signs.folder}: block_origin={shown(origin)} is not 'start' or 'prompt'; correct it")
    return Attention(block, origin)


def _nearest(signs: Signs) -> str:
    """Which family explains most of the config and of the weights, and the first weight that it does not explain."""
    names = sorted(signs.weights)[:2000]
    strange = {}
    for family in sorted(FAMILIES, key=lambda family: -len(signs.fields.keys() & family.config_names)):
        strange[family.title] = [name for name in names if not _LAYERS.fullmatch(family.weight_name(name))]
    nearest = min(strange, key=lambda title: len(strange[title]))
    lacks = f"has no weight {one_line(strange[nearest][0])}" if strange[nearest] else "has these weights"
    return f"the nearest is {nearest}, which {lacks}"
