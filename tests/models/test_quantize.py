"""Checkpoints in eight bits: what is lost, how large files are, what loading holds, and every refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffucoder.errors import CheckpointError
from diffucoder.models import checkpoint, quantize
from diffucoder.models.checkpoint import INDEX, load_denoiser, save_denoiser
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.quantize import packed, unpacked

MakeLM = Callable[..., Any]


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def again(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    stored = packed(state)
    return dict(unpacked({name: tensor.shape for name, tensor in state.items()}, stored.__getitem__, dtype))


def small_files(monkeypatch: pytest.MonkeyPatch, size: int = 3000) -> None:
    """Files so small that a tiny model has several."""
    monkeypatch.setattr(quantize, "SHARD", size)
    monkeypatch.setattr(checkpoint, "SHARD", size)


@pytest.fixture
def saved(causal_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Denoiser, Path]:
    """A denoiser of a tied Llama, and its folder in eight bits."""
    small_files(monkeypatch)
    denoiser = Denoiser.from_causal_lm(causal_lm("llama", tie_word_embeddings=True), mask_id=66)
    save_denoiser(denoiser, tmp_path / "int8", int8=True)
    return denoiser, tmp_path / "int8"


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_no_weight_moves_by_more_than_half_a_step_of_its_output() -> None:
    matrix = weights(50, 40) * torch.logspace(-3, 3, 50)[:, None]  # outputs of very different size
    found = again({"w": matrix}, torch.float32)["w"]
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((found - matrix).abs() <= step * 0.51 + step / 2**8 * 128 * (matrix.abs() > 126 * step)).all()


def test_what_was_rounded_once_is_not_rounded_again() -> None:
    once = again({"w": weights(20, 30)}, torch.float32)
    twice = again(once, torch.float32)
    assert torch.equal(once["w"], twice["w"])


def test_a_row_of_zeros_stays_one() -> None:
    assert not again({"w": torch.zeros(3, 4)}, torch.bfloat16)["w"].any()


def test_bfloat16_differs_from_float32_by_one_rounding() -> None:
    matrix = weights(20, 30)
    assert torch.equal(again({"w": matrix}, torch.float32)["w"].bfloat16(), again({"w": matrix}, torch.bfloat16)["w"])


def test_vectors_stay_bfloat16() -> None:
    vector = weights(9)
    assert torch.equal(again({"v": vector}, torch.float32)["v"], vector.bfloat16().float())


def test_parts_of_a_matrix_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = weights(50, 40)
    whole = again({"w": matrix}, torch.float32)["w"]
    monkeypatch.setattr(quantize, "SHARD", 1000)
    assert len(packed({"w": matrix})) > 3
    assert torch.equal(again({"w": matrix}, torch.float32)["w"], whole)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_in_eight_bits_scores_as_its_rounded_weights_do(
    kind: str, tied: bool, causal_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_files(monkeypatch)
    denoiser = Denoiser.from_causal_lm(causal_lm(kind, tie_word_embeddings=tied), mask_id=66)
    save_denoiser(denoiser, tmp_path, int8=True)
    rounded = again(denoiser.model.state_dict(), torch.float32)
    loaded = load_denoiser(tmp_path, dtype=torch.float32, device="cpu")
    denoiser.model.load_state_dict(rounded)
    tokens = torch.randint(0, 66, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), denoiser(tokens))
    assert loaded.mask_id == 66
    assert loaded.config.model_type == kind


def test_a_head_that_equals_the_embeddings_is_stored_once(causal_lm: MakeLM, tmp_path: Path) -> None:
    model = causal_lm("qwen2", tie_word_embeddings=False)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    save_denoiser(Denoiser.from_causal_lm(model, mask_id=66), tmp_path, int8=True)
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "model.safetensors"))
    loaded = load_denoiser(tmp_path, dtype=torch.float32, device="cpu")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_unshifted_rows_stay_so(causal_lm: MakeLM, tmp_path: Path) -> None:
    save_denoiser(Denoiser.from_causal_lm(causal_lm(), mask_id=66, shifted=False), tmp_path, int8=True)
    assert not load_denoiser(tmp_path, dtype=torch.float32, device="cpu").shifted


def test_saving_what_was_loaded_gives_the_same_bytes(saved: tuple[Denoiser, Path], tmp_path: Path) -> None:
    loaded = load_denoiser(saved[1], dtype=torch.float32, device="cpu")
    save_denoiser(loaded, tmp_path / "again", int8=True)
    files = sorted(path.name for path in saved[1].iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((saved[1] / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


def test_files_stay_under_their_size(saved: tuple[Denoiser, Path]) -> None:
    files = list(saved[1].glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 3000


def test_a_shard_and_its_header_stay_under_16_mib() -> None:
    assert quantize.SHARD < 2**24 - 2**16


def test_an_ordinary_save_replaces_eight_bits_and_the_other_way_round(
    saved: tuple[Denoiser, Path], tmp_path: Path
) -> None:
    denoiser, folder = saved
    save_denoiser(denoiser, folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(load_denoiser(folder, dtype=torch.float32, device="cpu")(tokens), denoiser(tokens))
    save_denoiser(denoiser, folder, int8=True)
    with torch.no_grad():
        assert not torch.equal(load_denoiser(folder, dtype=torch.float32, device="cpu")(tokens), denoiser(tokens))


class _Largest(TorchDispatchMode):
    """The largest float32 tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor) and each.dtype == torch.float32 and each.device.type != "meta":
                self.elements = max(self.elements, each.numel())
        return out


def test_loading_in_bfloat16_never_holds_a_matrix_in_float32(causal_lm: MakeLM, tmp_path: Path) -> None:
    save_denoiser(Denoiser.from_causal_lm(causal_lm("llama", hidden_size=64), mask_id=66), tmp_path, int8=True)
    with _Largest() as largest:
        load_denoiser(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert largest.elements <= 64  # the frequencies of RoPE, at most


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(folder, dtype=torch.float32, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_named(saved: tuple[Denoiser, Path]) -> None:
    gone = sorted(saved[1].glob("*.safetensors"))[1]
    gone.unlink()
    assert f"lacks weight file {gone.name}" in refusal(saved[1])


def test_a_file_cut_short_is_named(saved: tuple[Denoiser, Path]) -> None:
    cut = sorted(saved[1].glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-7])
    assert f"{cut.name} is damaged or cut short" in refusal(saved[1])


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change what the first file with a matrix holds."""
    for path in sorted(folder.glob("*.safetensors")):
        held = load_file(path)
        if any(name.endswith(".0") for name in held):
            change(held)
            save_file(held, path)
            return


def test_a_matrix_without_its_scale_is_refused(saved: tuple[Denoiser, Path]) -> None:
    index = json.loads((saved[1] / INDEX).read_text())["weight_map"]
    name = next(name for name in index if name.endswith(".scale"))
    held = load_file(saved[1] / index[name])
    del held[name]
    save_file(held, saved[1] / index[name])
    assert f"lacks {name}" in refusal(saved[1])


def test_a_part_of_another_shape_is_refused(saved: tuple[Denoiser, Path]) -> None:
    def cut(held: dict[str, Tensor]) -> None:
        name = next(name for name in held if name.endswith(".0"))
        held[name] = held[name][:-1].contiguous()

    spoil(saved[1], cut)
    assert "has wrong shapes for" in refusal(saved[1])


def test_a_part_in_float32_is_refused(saved: tuple[Denoiser, Path]) -> None:
    def widen(held: dict[str, Tensor]) -> None:
        name = next(name for name in held if name.endswith(".0"))
        held[name] = held[name].float()

    spoil(saved[1], widen)
    assert "is float32, not int8" in refusal(saved[1])


def test_an_unknown_form_of_weights_is_refused(saved: tuple[Denoiser, Path]) -> None:
    path = saved[1] / "diffucoder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights": "int3"}))
    assert "weights 'int3' are not understood" in refusal(saved[1])
