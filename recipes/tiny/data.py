"""Files made of the tiny problems: what the laboratory trains on, and the held-out problems that the package ships.

    python recipes/tiny/data.py training runs/tiny/data --problems 160000
    python recipes/tiny/data.py held-out diffucoder/data/tiny_problems.jsonl.gz

The training files are JSON lines: `corpus` (parent and stage 1), `clean` (stage 2), `chat` (stage 3), and `held_out_*`
of the same kinds, from the dev split, for losses. No problem of the test split is among them.
"""

import gzip
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from diffucoder.files import write_json, write_jsonl
from diffucoder.tokenizer_files import qwen2_words

sys.path.append(str(Path(__file__).parents[2]))  # last, so that PYTHONPATH may name another copy of the package

from recipes.tiny.problems import Problem, problems

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|dlm_pad|>")
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|dlm_pad|>",
    "mask_token": "<|mask|>",
    "chat_template": "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "clean_up_tokenization_spaces": False,
}

app = typer.Typer(add_completion=False)


@app.command()
def training(
    folder: Annotated[Path, typer.Argument(help="folder for the files")],
    count: Annotated[int, typer.Option("--problems", help="distinct training problems")] = 160_000,
) -> None:
    """Write the training files and a tokenizer; leave a finished folder as it is."""
    if (folder / "tokenizer" / "tokenizer_config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    train = list(problems("train", count, seed=0))
    dev = list(problems("dev", 1000, seed=0))
    write_jsonl(folder / "corpus.jsonl", ({"text": text} for text in corpus(train, random.Random(0))))
    for prefix, drawn in (("", train), ("held_out_", dev)):
        write_jsonl(folder / f"{prefix}clean.jsonl", ({"text": clean(problem)} for problem in drawn))
        write_jsonl(folder / f"{prefix}chat.jsonl", ({"prompt": p.prompt, "answer": p.solution} for p in drawn))
    train_tokenizer(train[:20_000], 1536, folder / "tokenizer")


@app.command()
def held_out(path: Annotated[Path, typer.Argument(help="gzipped JSON lines to write")]) -> None:
    """Write the held-out problems of the benchmark `tiny`, the same bytes every time."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file:
        for number, problem in enumerate(problems("test", 500, seed=1)):
            row = {"id": f"tiny/{number}", "prompt": problem.prompt, "tests": problem.tests}
            row |= {"entry_point": problem.name, "solution": problem.solution}
            file.write((json.dumps(row) + "\n").encode())


def clean(problem: Problem) -> str:
    """A document: the request as a comment, then the solution."""
    return f"# {problem.prompt}\n{problem.solution}"


def corpus(train: Sequence[Problem], rng: random.Random) -> Iterator[str]:
    """Yield one document for each problem, of the kinds that a crawl of code has: most are good, a tenth are not."""
    for index, problem in enumerate(train):
        other = train[index - 1]
        kind = rng.random()
        if kind < 0.7:
            yield clean(problem)
        elif kind < 0.8:
            yield f"{problem.solution}\n\n{other.solution}"
        elif kind < 0.9:
            yield "\n".join([problem.solution, "", *problem.tests[:2]])
        elif kind < 0.95:  # a comment that belongs to other code
            yield f"# {other.prompt}\n{problem.solution}"
        else:  # a truncated file
            yield clean(problem)[: rng.randint(20, len(clean(problem)))]


def train_tokenizer(examples: Sequence[Problem], vocabulary: int, folder: Path) -> None:
    """Learn merges from requests and solutions; Qwen2's words, Dream's special tokens, which count as well."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = qwen2_words()  # each digit is a word, and copied as such
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for p in examples for text in (p.prompt, p.solution)), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)


if __name__ == "__main__":
    app()
