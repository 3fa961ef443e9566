"""A converted parent is the parent: the same scores under a causal mask, the same text, and it loads as Dream does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parents import TEMPLATE, encodings, tokenizer, write_folder, write_parent
from torch import Tensor

from diffucoder.cli import main
from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer
from diffucoder.models.convert import convert, export
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.hub import SHIPPED

MakeLM = Callable[..., Any]
IDS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
PARENTS = {
    "llama": {"kind": "llama"},
    "llama tied": {"kind": "llama", "tie_word_embeddings": True},
    "qwen2": {"kind": "qwen2"},
    "qwen2 tied": {"kind": "qwen2", "tie_word_embeddings": True},
}
TOKENS = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["folder", "gguf"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Write a parent, as a folder and as a GGUF file in turn."""
    if request.param == "folder":
        return lambda model, backend: write_folder(tmp_path / "parent", model, backend)
    pytest.importorskip("gguf")
    return lambda model, backend: write_parent(tmp_path / "parent.gguf", model, backend)


@pytest.fixture
def parent(causal_lm: MakeLM, tmp_path: Path) -> Path:
    return write_folder(tmp_path / "parent", causal_lm("llama", **IDS), tokenizer())


def causal_scores(denoiser: Denoiser) -> Tensor:
    """Next-token scores of the autoregressive model inside: row i of ours is row i - 1 of the parent's."""
    with torch.no_grad():
        scores = denoiser(TOKENS, attention=torch.ones(12, 12, dtype=torch.bool).tril())
    return scores[:, 1:, :300]


@pytest.mark.parametrize("kind", PARENTS)
def test_under_a_causal_mask_a_converted_parent_scores_as_it_did(
    causal_lm: MakeLM, written: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    model = causal_lm(**PARENTS[kind], **IDS)
    source = written(model, tokenizer())
    with torch.no_grad():
        before = model(TOKENS).logits[:, :-1]
    denoiser = convert(source, tmp_path / "out")
    loaded = load_denoiser(tmp_path / "out", dtype=torch.float32, device="cpu")
    for converted in (denoiser, loaded):
        torch.testing.assert_close(causal_scores(converted), before, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), denoiser(TOKENS))
    assert (loaded.mask_id, loaded.config.pad_token_id, loaded.config.eos_token_id) == (300, 2, 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "Dream"
    if "llama" in kind:
        biases = [p for name, p in loaded.model.named_parameters() if name.endswith("proj.bias")]
        assert len(biases) == 6
        assert not any(bias.any() for bias in biases)


def test_the_tokenizer_goes_along_with_a_mask(causal_lm: MakeLM, written: Callable[..., Path], tmp_path: Path) -> None:
    backend = tokenizer()
    convert(written(causal_lm("llama", **IDS), backend), tmp_path / "out")
    read = load_tokenizer(tmp_path / "out")
    texts = ["x = 12345", "def f(x):\n\treturn  x\r\n", "<|im_start|>user\n日本é<|im_end|>"]
    assert encodings(read.backend, texts) == encodings(backend, texts)
    assert read.backend.id_to_token(300) == "<|mask|>"
    assert (read.mask_id, read.bos_id, read.eos_id, read.pad_id) == (300, 1, 2, 2)
    assert read.chat_template == TEMPLATE
    assert read.chat("hi") == "<|im_start|>user\nhi<|im_end|>\n"


def test_the_new_row_is_the_mean_of_the_others(causal_lm: MakeLM, parent: Path, tmp_path: Path) -> None:
    weight = convert(parent, tmp_path / "out").model.get_input_embeddings().weight
    assert weight.shape[0] == 301
    torch.testing.assert_close(weight[300], weight[:300].mean(0))


def test_spare_rows_are_used_before_new_ones_are_made(causal_lm: MakeLM, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = causal_lm("qwen2", **{**IDS, "vocab_size": 320})
    denoiser = convert(write_parent(tmp_path / "parent.gguf", model, tokenizer()), tmp_path / "out", pad=True)
    assert (denoiser.vocab_size, denoiser.mask_id, denoiser.config.pad_token_id) == (320, 300, 301)


def test_a_pad_of_its_own_is_given_on_request(written: Callable[..., Path], causal_lm: MakeLM, tmp_path: Path) -> None:
    convert(written(causal_lm("llama", **IDS), tokenizer()), tmp_path / "out", pad=True)
    denoiser, read = load_denoiser(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    assert (denoiser.vocab_size, denoiser.mask_id, denoiser.config.pad_token_id) == (302, 300, 301)
    assert (read.pad_id, read.eos_id, read.backend.id_to_token(301)) == (301, 2, "<|dlm_pad|>")
    assert read.terminator_ids == {0, 2, 301}


def test_a_pad_that_is_no_end_of_text_is_kept(causal_lm: MakeLM, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "parent", causal_lm("llama", **IDS), tokenizer(), pad_token="<tool_call>")
    assert convert(source, tmp_path / "out", pad=True).config.pad_token_id == 299
    assert load_tokenizer(tmp_path / "out").vocab_size == 301


def test_the_dtype_is_the_parents_unless_told(causal_lm: MakeLM, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "parent", causal_lm("llama", **IDS).to(torch.bfloat16), tokenizer())
    assert convert(source, tmp_path / "kept").dtype == torch.bfloat16
    assert convert(source, tmp_path / "wide", dtype=torch.float32).dtype == torch.float32


def test_what_dream_cannot_say_keeps_its_own_type(causal_lm: MakeLM, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "parent", causal_lm("qwen3", **IDS), tokenizer())
    denoiser = convert(source, tmp_path / "out")
    loaded = load_denoiser(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert torch.equal(causal_scores(loaded), causal_scores(denoiser))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"


def test_a_folder_that_holds_a_model_is_left_alone(parent: Path, tmp_path: Path) -> None:
    convert(parent, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"out holds a model already \(config.json\); remove it or name another"):
        convert(parent, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be created"):
        convert(parent, tmp_path / "file")


def test_a_refused_source_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a diffusion model already \(its mask is token 3\)"):
        convert(SHIPPED, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- export and the command line ----


def test_a_converted_parent_is_exported_with_its_weights(parent: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    denoiser = convert(parent, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "deep" / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "deep" / "out.gguf")
    assert reader.fields["general.architecture"].contents() == "dream"
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    assert torch.equal(tensors["token_embd.weight"], denoiser.model.get_input_embeddings().weight)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out.gguf"]


def test_only_a_diffusion_model_is_exported_and_nothing_is_overwritten(parent: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match="holds an autoregressive model, which a dream GGUF cannot be"):
        export(parent, tmp_path / "out.gguf")
    (tmp_path / "out.gguf").touch()
    with pytest.raises(ConfigError, match=r"out.gguf exists already; remove it or choose another name"):
        export(SHIPPED, tmp_path / "out.gguf")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["diffucoder", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_converts_and_exports(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    assert run(monkeypatch, parent, out, "--pad", "--dtype", "bfloat16") == 0
    assert capsys.readouterr().out == f"{out}: denoiser, untrained, 0.0 M parameters, mask at 300 of 302 tokens\n"
    assert load_denoiser(out).mask_id == 300
    assert run(monkeypatch, out, file, "--dtype", "q8_0") == 0
    assert capsys.readouterr().out == f"{file}: dream GGUF, 0.0 M parameters, mask at 300 of 302 tokens\n"
    assert file.stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SOURCE", "x.gguf", "--pad"], "--pad adds a token to a parent, and a .gguf file gets a model as it is"),
        (["SOURCE", "x", "--dtype", "int3"], "dtype='int3' is not known; use one of float32, bfloat16, float16"),
        (["nobody", "x"], "model 'nobody' is not a folder"),
        (["absent.gguf", "x"], "GGUF file 'absent.gguf' does not exist; check the path"),
        (["SOURCE"], "Missing argument 'out'; see diffucoder convert --help"),
    ],
)
def test_a_bad_command_is_one_line(
    parent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(str(parent) if a == "SOURCE" else a for a in arguments)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), message in err) == ("", 1, True), err
    assert [p.name for p in tmp_path.iterdir()] == ["parent"]
