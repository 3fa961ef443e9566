"""The commands about models: `diffucoder models`, `convert` and `bench`."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from diffucoder.cli.common import AsJson, Device, DType, Model, load_model, torch_dtype
from diffucoder.errors import ConfigError


def models(*, as_json: AsJson = False) -> None:
    """List the models that load by name."""
    from diffucoder.models.hub import SHIPPED, KnownModel, known_models

    known = list(known_models())
    if SHIPPED.is_dir():
        stored = (SHIPPED / "model.safetensors").stat().st_size
        parameters = f"{stored / 2e6:.1f}M"  # of two bytes
        place = "shipped with the package; the default"
        note = "short functions; see docs/models.md"
        known.insert(0, KnownModel("tiny", place, parameters, round(stored / 1e9, 3), "Apache-2.0", note))
    rows = []
    for model in known:
        row = asdict(model) | {"memory_gb": math.ceil(1.2 * model.size_gb + 1)}  # and a short batch
        source = row.pop("hub_id")
        rows.append({"name": row.pop("name"), "source": source, **row, "here": model.name == "tiny" or model.cached})
    for row in rows:
        if as_json:
            print(json.dumps(row))
            continue
        print(f"{row['name']:21} {row['source']}")
        print(f"    {row['note']}; {row['licence']}")
        here = "here" if row["here"] else "not downloaded"
        needs = f"needs {row['memory_gb']} GB of GPU or main memory"
        print(f"    {row['parameters']}, {row['size_gb']} GB, {here}; {needs}")


def convert(
    source: Annotated[str, typer.Argument(help="folder, Hub id or .gguf file of the model")],
    out: Annotated[Path, typer.Argument(help="folder to write, or a .gguf file for llama.cpp")],
    *,
    pad: Annotated[
        bool, typer.Option("--pad", help="add <|dlm_pad|> where the parent pads with its end of text")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, for .gguf also q8_0; the model's own if left out")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a Hub id")] = None,
) -> None:
    """Turn a causal model into a denoiser.

    The denoiser is to be trained by `diffucoder train adapt`. With an OUT that ends with .gguf, writes a denoiser as a
    GGUF file for llama.cpp.
    """
    from diffucoder.models.convert import convert as convert_parent
    from diffucoder.models.convert import export

    if out.suffix == ".gguf":
        if pad:
            raise ConfigError("--pad adds a token to a parent, and a .gguf file gets a model as it is; convert first")
        kind = "dream GGUF"
        denoiser = export(source, out, dtype=dtype, revision=revision)
    else:
        kind = "denoiser, untrained"
        denoiser = convert_parent(source, out, pad=pad, dtype=torch_dtype(dtype), revision=revision)
    size = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
    print(f"{out}: {kind}, {size:.1f} M parameters, mask at {denoiser.mask_id} of {denoiser.vocab_size} tokens")


def bench(
    *,
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of the prompt")] = 32,
    new_tokens: Annotated[int, typer.Option(help="masked tokens after it")] = 64,
    batch: Annotated[int, typer.Option(help="rows decoded together")] = 1,
    as_json: AsJson = False,
    dtype: DType = None,
    device: Device = None,
) -> None:
    """Measure the speed of a model on this machine.

    Prints ms per forward pass, tokens per second and the share of the machine's matmul.
    """
    from diffucoder.bench import bench as measure

    denoiser = load_model(model, dtype, device).model
    result = measure(denoiser, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    machine = f"{result.dtype}, {result.device}, {result.threads} threads"
    achieved = result.flops_per_second / 1e9
    matmul = result.matmul_flops_per_second / 1e9
    print(f"model      {result.parameters / 1e6:.1f} M parameters, {machine}")
    print(f"canvas     {result.batch} x {result.positions} positions, {new_tokens} masked")
    print(f"forward    {result.forward_ms:.2f} ms, {result.forward_flops / 1e9:.2f} GFLOP")
    print(f"achieved   {achieved:.0f} GFLOP/s, {result.share:.0%} of the {matmul:.0f} GFLOP/s of a matmul here")
    print(f"decoding   {result.tokens_per_second:.0f} tokens/s at {result.tokens_per_forward:.2f} tokens per pass")
