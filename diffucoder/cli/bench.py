"""`diffucoder bench`: measure the speed of a model on this machine."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from diffucoder.cli.common import AsJson, Device, DType, Model, load_model


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
    """Measure a model here: ms per forward pass, tokens per second, share of this machine's matmul."""
    from diffucoder.bench import bench as measure

    denoiser = load_model(model, dtype, device).model
    result = measure(denoiser, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
    if as_json:
        print(json.dumps(asdict(result) | {"share": result.share}))
        return
    machine = f"{result.dtype}, {result.device}, {result.threads} threads"
    achieved = result.flops_per_second / 1e9
    matmul = result.matmul_flops_per_second / 1e9
    print(f"model      {result.parameters / 1e6:.1f} M parameters, {machine}")
    print(f"canvas     {result.batch} x {result.positions} positions, {new_tokens} masked")
    print(f"forward    {result.forward_ms:.2f} ms, {result.forward_flops / 1e9:.2f} GFLOP")
    print(f"achieved   {achieved:.0f} GFLOP/s, {result.share:.0%} of the {matmul:.0f} GFLOP/s of a matmul here")
    print(f"decoding   {result.tokens_per_second:.0f} tokens/s at {result.tokens_per_forward:.2f} tokens per pass")
