"""What the laboratory trains on: text files made of the tiny problems, and a tokenizer learnt from them.

    python recipes/tiny/data.py runs/tiny/data --problems 160000

Written are, as JSON lines: `corpus` (what a parent and stage 1 read: documents of several kinds, some of them wrong),
`clean` (stage 2: a request as a comment above its solution, nothing else), `chat` (stage 3: prompt and answer), and
`held_out_*` of the same kinds, from the dev split, for losses. No test-split problem is read here.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from diffucoder.problems import Problem, problems
from diffucoder.tokenizer import qwen2_words

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|dlm_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def base_prompt(problem: Problem) -> str:
    """What a model that knows no chat is asked with: the request as a comment, as `clean` documents begin."""
    return f"# {problem.prompt}\n"


def main(
    folder: Annotated[Path, typer.Argument(help="where the files go")],
    count: Annotated[int, typer.Option("--problems", help="distinct training problems")] = 160_000,
    vocabulary: Annotated[int, typer.Option(help="tokens of the byte-level BPE, special ones included")] = 1536,
    held_out: Annotated[int, typer.Option(help="problems of each held-out file")] = 1000,
    seed: Annotated[int, typer.Option(help="of the problems drawn")] = 0,
) -> None:
    """Make every file; a finished folder is left as it is."""
    if (folder / "tokenizer" / "tokenizer_config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    drawn = list(problems("train", count, seed=seed))
    dev = list(problems("dev", held_out, seed=seed))
    write(folder / "corpus.jsonl", ({"text": text} for text in corpus(drawn, random.Random(seed))))
    write(folder / "clean.jsonl", ({"text": clean(problem)} for problem in drawn))
    write(folder / "chat.jsonl", ({"prompt": p.prompt, "answer": p.solution} for p in drawn))
    write(folder / "held_out_clean.jsonl", ({"text": clean(problem)} for problem in dev))
    write(folder / "held_out_chat.jsonl", ({"prompt": p.prompt, "answer": p.solution} for p in dev))
    train_tokenizer(drawn[:20_000], vocabulary, folder / "tokenizer")


def clean(problem: Problem) -> str:
    return base_prompt(problem) + problem.solution


def corpus(drawn: Sequence[Problem], rng: random.Random) -> Iterator[str]:
    """One document for each problem, of the kinds a crawl of code has: most are good, a tenth are not."""
    for at, problem in enumerate(drawn):
        other = drawn[at - 1]
        kind = rng.random()
        if kind < 0.7:
            yield clean(problem)
        elif kind < 0.8:
            yield f"{problem.solution}\n\n{other.solution}"
        elif kind < 0.9:
            yield "\n".join([problem.solution, "", *problem.tests[:2]])
        elif kind < 0.95:  # a comment that belongs to other code
            yield base_prompt(other) + problem.solution
        else:  # a file cut off
            yield clean(problem)[: rng.randint(20, len(clean(problem)))]


def write(path: Path, records: Iterator[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def train_tokenizer(examples: Sequence[Problem], vocabulary: int, folder: Path) -> None:
    """Learn merges from requests and solutions; Qwen2's words, Dream's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = qwen2_words()  # a digit is a word of its own, and copied as such
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
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|dlm_pad|>",
        "mask_token": "<|mask|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
