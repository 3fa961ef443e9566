"""Adapters: the exported model is the adapted one, rounded once; peft loads them; tied matrices come apart."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parents
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from stores import Lab
from torch import Tensor

from diffucoder.errors import ConfigError
from diffucoder.models.checkpoint import load_denoiser
from diffucoder.models.convert import convert
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.layers import FastLayers
from diffucoder.training.adapt import adapt
from diffucoder.training.adapters import add_adapters, merged
from diffucoder.training.run import rounded
from diffucoder.training.settings import AdaptSettings, TrainSettings

ENDS = [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head")]
MakeLM = Callable[..., Any]


def adapted(
    model: Denoiser, targets: tuple[str, ...], size: float, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Any]:
    """The state of a model whose weights have adapters on `targets` of about `size` times the weights."""
    model.to(dtype)
    settings = TrainSettings(run=Path("x"), steps=1, lr=1, lora_rank=3, lora_alpha=6.0, lora_targets=targets)
    add_adapters(model, settings)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32
            torch.nn.init.normal_(parameter, std=(size * 0.3 / 2 / 3**0.5) ** 0.5)  # weights have a deviation of 0.3
    return {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}, settings


def exact(state: dict[str, Tensor], layer: str) -> Tensor:
    """The adapted weight of a layer in float64."""
    down = state[f"{layer}.lora_A.default.weight"].double()
    return state[f"{layer}.base_layer.weight"].double() + 2 * (state[f"{layer}.lora_B.default.weight"].double() @ down)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("export", [torch.bfloat16, torch.float32])
def test_an_exported_weight_is_the_adapted_one_rounded_once(
    tiny: Denoiser, size: float, stored: torch.dtype, export: torch.dtype
) -> None:
    state, settings = adapted(tiny, ("q_proj", "down_proj"), size, stored)
    weights, kept = rounded(merged(state, settings), export)
    assert not any("lora" in name or "base_layer" in name for name in weights)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        wanted = exact(state, layer)
        update = wanted - state[f"{layer}.base_layer.weight"].double()
        assert 0.3 * size < float(update.norm() / wanted.norm()) < 3 * size
        half_a_step = torch.finfo(export).eps / 2 * wanted.abs()
        sums = torch.finfo(torch.float32).eps * (wanted.abs() + 10 * update.abs().max())  # of float32, before that
        assert ((weights[f"{layer}.weight"].double() - wanted).abs() <= half_a_step + sums).all()
    assert torch.equal(weights["model.norm.weight"], state["model.norm.weight"].to(export))
    assert kept is not None
    if export == torch.float32:
        assert kept == pytest.approx(1, abs=0.02)
    elif stored == torch.bfloat16:
        low, high = {1e-5: (0, 0.1), 1e-4: (0, 0.4), 1e-3: (0.2, 0.9), 1e-2: (0.9, 1.1)}[size]
        assert low <= kept <= high


def test_a_rounded_update_is_measured_along_the_exact_one() -> None:
    before = torch.full((1000,), 1.0)
    after = before + torch.where(torch.arange(1000) < 250, 2**-6, 2**-10)  # one step of bfloat16 at 1 is 2^-7
    weights, kept = rounded([("a", before, after), ("b", None, before)], torch.bfloat16)
    assert weights["a"].float().tolist() == [1 + 2**-6] * 250 + [1.0] * 750
    assert kept == pytest.approx(250 * 2**-12 / (250 * 2**-12 + 750 * 2**-20))
    assert rounded([("b", None, before)], torch.bfloat16)[1] is None


def test_float16_keeps_more_of_an_update_and_no_weight_that_it_cannot_hold() -> None:
    before = torch.full((1000,), 1.0)
    after = before + torch.where(torch.arange(1000) < 250, 2**-6, 2**-10)  # one step of float16 at 1 is 2^-10
    weights, kept = rounded([("a", before, after)], torch.float16)
    assert torch.equal(weights["a"].float(), after)
    assert kept == 1
    after[3] = -70_000
    assert rounded([("a", before, after)], torch.bfloat16)[0]["a"].isfinite().all()
    with pytest.raises(
        ConfigError, match="holds numbers up to 65504, and a has 70000; use --resume --set export_dtype"
    ):
        rounded([("a", before, after)], torch.float16)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def start(causal_lm: MakeLM, tmp_path: Path) -> Callable[..., Path]:
    """Make a denoiser to start from: `start(torch.bfloat16, tied=True)` is a Qwen3 whose head is its embeddings."""

    def make(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Path:
        model = causal_lm("qwen3", vocab_size=300, tie_word_embeddings=tied).to(dtype)
        source = parents.write_folder(tmp_path / "parent", model, parents.tokenizer())
        convert(source, tmp_path / "start")
        return tmp_path / "start"

    return make


def settings(lab: Lab, model: Path, run: Path, **changes: Any) -> AdaptSettings:
    given = {**lab.common, "model": str(model), "data": (str(lab.corpus),), "context": 32, "lora_rank": 2, **changes}
    return AdaptSettings(run=run, **given)


def logits(model: Denoiser) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(torch.arange(1, 49).view(2, 24))
    return scores


def in_peft(base: Path, run: Path) -> Denoiser:
    """The model that a run started from, with the run's adapters, as peft loads them."""
    denoiser = load_denoiser(base, dtype=torch.float32, device="cpu")
    with warnings.catch_warnings(action="ignore"):  # that embeddings and head are tied
        model = PeftModel.from_pretrained(denoiser.model, run / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(base)
    return denoiser


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}])
def test_an_exported_model_is_the_one_that_peft_loads(
    lab: Lab, start: Callable[..., Path], tmp_path: Path, stored: torch.dtype, bf16: bool, changes: dict[str, Any]
) -> None:
    base = start(stored)
    chosen = settings(lab, base, tmp_path / "run", bf16=bf16, export_dtype="float32", lr=1e-3, **changes)
    ours = load_denoiser(adapt(chosen), dtype=torch.float32, device="cpu")
    theirs = in_peft(base, tmp_path / "run")
    before = load_denoiser(base, dtype=torch.float32, device="cpu")
    learnt = (logits(theirs) - logits(before)).abs().max()
    assert learnt > 1e-3
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-5)
    merged_on_load = load_denoiser(tmp_path / "run" / "adapter", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(merged_on_load), logits(theirs), atol=1e-4, rtol=1e-5)
    for name, weight in before.model.state_dict().items():  # what has no adapter is what it was
        if "norm" in name or name.startswith(("lm_head", "model.embed")):
            assert torch.equal(ours.model.state_dict()[name], weight), name


@pytest.mark.parametrize("targets", ENDS)
def test_adapters_on_one_of_two_tied_matrices_leave_the_other_alone(
    lab: Lab, start: Callable[..., Path], tmp_path: Path, targets: tuple[str, ...]
) -> None:
    base = start(tied=True)
    chosen = settings(lab, base, tmp_path / "run", bf16=False, export_dtype="float32", lora_targets=targets)
    folder = adapt(chosen)
    before, after = (load_file(place / "model.safetensors") for place in (base, folder))
    assert "lm_head.weight" not in before
    for layer, name in (("lm_head", "lm_head.weight"), ("embed_tokens", "model.embed_tokens.weight")):
        assert torch.equal(after[name], before["model.embed_tokens.weight"]) == (layer not in targets)
    ours = load_denoiser(folder, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(ours), logits(in_peft(base, tmp_path / "run")), atol=1e-4, rtol=1e-5)


def test_adapters_elsewhere_leave_tied_matrices_tied(lab: Lab, start: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapt(settings(lab, start(tied=True), tmp_path / "run"))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load_denoiser(folder, device="cpu").config.tie_word_embeddings


def test_matrices_that_shall_stay_one_cannot_be_adapted_apart(
    lab: Lab, start: Callable[..., Path], tmp_path: Path
) -> None:
    chosen = settings(lab, start(tied=True), tmp_path / "run", tied=True, lora_targets=("q_proj", "lm_head"))
    with pytest.raises(ConfigError, match=r"tied=true trains .* as one matrix, but lora_targets=.* adapts one"):
        adapt(chosen)
    assert not chosen.run.exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lr": 1e-6}, "run/adapter with peft"),
        ({"lr": 1e-6, "lora_rank": 0}, "--set export_dtype=float32, and load the model with --dtype float32\n"),
        ({"lr": 1e-6, "export_dtype": "float32"}, "export_dtype=float32 keeps 100% of what training changed"),
        ({"lr": 1e-1, "lora_rank": 0}, "what training changed in the weights\n"),
    ],
)
def test_the_share_of_the_update_that_survives_is_printed(
    lab: Lab,
    start: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    told: str,
) -> None:
    adapt(settings(lab, start(torch.bfloat16), tmp_path / "run", **changes))
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("targets", [*ENDS, ("q_proj",)])
def test_fast_layers_do_not_pass_over_adapters(tiny: Denoiser, targets: tuple[str, ...]) -> None:
    assert FastLayers.of(tiny.model) is not None
    adapted(tiny, targets, 1e-2, torch.float32)
    assert FastLayers.of(tiny.model) is None
    with tiny.fast_snapshot(torch.bfloat16):
        assert tiny.fast is None
