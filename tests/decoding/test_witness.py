"""Text that keeps a rule: checkers, documents, plain completions, and laws of decoding with `syntax`."""

import ast
import io
import random
import re
import textwrap
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffucoder import DecodingParams, Denoiser, DiffuCoder, Generation
from diffucoder.decoding.checkers import compile_flaw, names_flaw, python_flaw
from diffucoder.decoding.document import Document, Part
from diffucoder.decoding.scaffold import scaffold
from diffucoder.decoding.step import decode
from diffucoder.errors import ConfigError, PromptError
from diffucoder.models.attention import Attention
from diffucoder.tokenizer import Tokenizer

ROWS = 520
ASK = "Write a function f(xs) that doubles each number."
SOURCES = sorted(Path(textwrap.__file__).parent.glob("*.py"))


@pytest.fixture(scope="module")
def random_coder(causal_lm: Callable[..., Any], tokenizer: Tokenizer) -> Callable[..., DiffuCoder]:
    """Coders on random weights, with full or block-causal attention."""
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    cached: dict[tuple[int, int | None], DiffuCoder] = {}

    def make(seed: int = 0, block: int | None = None) -> DiffuCoder:
        if (seed, block) not in cached:
            body = causal_lm(vocab_size=ROWS, seed=seed, max_position_embeddings=2048, **ids)
            attention = Attention(block=block)
            model = Denoiser.from_causal_lm(body, mask_id=tokenizer.mask_id, attention=attention)
            cached[seed, block] = DiffuCoder(model, tokenizer, name="random")
        return cached[seed, block]

    return make


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


# Checkers


@pytest.mark.parametrize(
    ("text", "at", "incomplete"),
    [
        ("return = x", 7, False),
        ("x = )", 4, False),
        ("def f(", None, True),
        ("def f():\n", None, True),
        ("x = [1,\n2", None, True),
        ('"""abc', None, True),
        ('x = "abc', 4, True),
        ("for", None, True),
        ("x = 1\nreturn = x\ny = 2\n", 13, False),
        ("a\0b", 1, False),
        ("(" * 300, None, False),
        ("x = " + "not " * 10_000 + "1", 0, False),
        ("x = " + "1 + " * 20_000 + "1", 0, False),
    ],
)
def test_the_parser_names_the_place_and_whether_more_text_could_mend_it(
    text: str, at: int | None, incomplete: bool
) -> None:
    flaw = python_flaw(text)
    assert flaw is not None
    assert flaw.incomplete == incomplete
    assert at is None or flaw.at == at


@given(st.text())
def test_a_checker_agrees_with_the_parser_on_any_text(text: str) -> None:
    assert (python_flaw(text) is None) == parses(text)


@given(st.sampled_from(SOURCES), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_a_program_that_is_cut_before_a_name_is_right_or_incomplete(path: Path, share: float) -> None:
    source = path.read_text(encoding="utf-8")
    begins = [0, *(end.end() for end in re.finditer("\n", source))]
    names = [
        token.start for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.NAME
    ]
    row, column = names[int(share * (len(names) - 1))]
    flaw = python_flaw(source[: begins[row - 1] + column])
    assert flaw is None or flaw.incomplete, flaw


def test_what_only_the_compiler_or_a_look_at_names_finds() -> None:
    assert python_flaw("return 1") is None
    assert compile_flaw("return 1") is not None
    program = (
        "import os\nevery = 1\ndef f(x):\n    def g():\n        return x + every\n    return g, len, os, f, __name__\n"
    )
    assert names_flaw(program) is None
    flaw = names_flaw(program.replace("return x +", "return y +"))
    assert flaw is not None
    assert flaw.message == "name 'y' is not defined"
    assert program.replace("return x +", "return y +")[flaw.at] == "y"


# Documents


def document_of(tokenizer: Tokenizer, reply: str, **fields: Any) -> tuple[Document, torch.Tensor]:
    ids = tokenizer.encode(reply)
    return Document((Part(0, len(ids), is_answer=True),), tokenizer, tokenizer.mask_id, **fields), torch.tensor(ids)


def test_programs_of_a_reply_are_its_blocks_of_python(tokenizer: Tokenizer) -> None:
    reply = "Here:\n```python\nx = (\n```\nand\n```bash\nls )\n```\n```\ny = 1\n```\n"
    document, tokens = document_of(tokenizer, reply, fenced=True)
    text, whole = document.text(tokens)
    assert (text, whole) == (reply, True)
    assert [text[begin:end] for begin, end in document.programs(text)] == ["x = (\n", "y = 1\n"]
    assert document.problem(tokens, python_flaw) == "line 3: incomplete input"
    assert [slice(*span) for span in document.programs("x = 1")] == [slice(0, 5)]
    open_fence = "```py\nx = 1"
    assert [open_fence[begin:end] for begin, end in document.programs(open_fence)] == ["x = 1"]


def test_a_document_ends_at_a_terminator_a_stop_string_or_before_a_mask(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_id
    document, tokens = document_of(tokenizer, "x = 1\ny = 2\n", terminators=(end,), stops=("y",))
    assert document.text(tokens) == ("x = 1\n", True)
    assert Document(document.pieces, tokenizer, tokenizer.mask_id, terminators=(end,)).text(
        torch.cat([tokens[:1], torch.tensor([end]), tokens[2:]])
    ) == (tokenizer.decode(tokens[:1].tolist()), True)
    masked = tokens.clone()
    masked[1] = tokenizer.mask_id
    assert document.text(masked) == (tokenizer.decode(tokens[:1].tolist()), False)


def test_the_position_of_a_character_is_that_of_the_token_that_wrote_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("xs = sorted(xs)")
    document = Document(("y = 1\n", Part(2, 2 + len(ids), False), "\n"), tokenizer, tokenizer.mask_id)
    tokens = torch.tensor([tokenizer.mask_id] * 2 + ids + [tokenizer.mask_id])
    text, _ = document.text(tokens)
    for at in range(len(text)):
        position = document.position(tokens, at)
        written = len("y = 1\n" + tokenizer.decode(ids[: position - 2]))
        if 6 <= at < len(text) - 1:
            assert written <= at < len("y = 1\n" + tokenizer.decode(ids[: position - 1]))
        else:
            assert position == (2 if at < 6 else 1 + len(ids))


# Plain completions


@pytest.mark.parametrize(
    "pieces",
    [
        ("x = ", 3, "\n"),
        ("def f(a, b):\n    return ", 4, "\n"),
        ("def f(", 3, "):\n    pass\n"),
        ("for x ", 4, "\n    pass\n"),
        ("if x:\n", 9, "\nelse:\n    y = 1\n"),
        ("try:\n    pass\n", 12, "\n"),
        ("class A:\n    def f(self):\n", 14, "\n    def g(self):\n        return 1\n"),
        ("x = [1, ", 4, " 3]\ny = {'a': ", 3, "}\n"),
        ('x = "abc', 5, 'def"\n'),
        ("while ", 2, ":\n    x", 3, "1\n"),
    ],
)
def test_a_plain_completion_of_holes_parses(tokenizer: Tokenizer, pieces: tuple[str | int, ...]) -> None:
    parts: list[str | Part] = []
    start = 0
    for piece in pieces:
        if isinstance(piece, int):
            parts.append(Part(start, start + piece, is_answer=False))
            start += piece
        else:
            parts.append(piece)
    document = Document(tuple(parts), tokenizer, tokenizer.mask_id)
    tokens = torch.full((start,), tokenizer.mask_id)
    filled = scaffold(document, python_flaw, tokens, torch.ones(start, dtype=torch.bool))
    assert filled is not None
    text, whole = document.text(filled)
    assert whole
    assert parses(text), text


def test_where_the_fixed_text_is_broken_there_is_no_plain_completion(tokenizer: Tokenizer) -> None:
    document = Document(("x = ", Part(0, 3, False), "\ny = )\n"), tokenizer, tokenizer.mask_id)
    tokens = torch.full((3,), tokenizer.mask_id)
    assert scaffold(document, python_flaw, tokens, torch.ones(3, dtype=torch.bool)) is None


# Decoding


DECODINGS = st.fixed_dictionaries(
    {"syntax": st.just("python"), "new_tokens": st.integers(1, 40)},
    optional={
        "steps": st.integers(1, 40),
        "temperature": st.sampled_from([0.5, 1.5]),
        "policy": st.sampled_from(["random", "max_prob"]),
        "block": st.integers(3, 20),
        "cache": st.sampled_from(["none", "delayed"]),
        "revoke": st.sampled_from([0.25, 0.5]),
        "threshold": st.sampled_from([0.05, 0.3]),
        "seed": st.integers(0, 9),
        "stop": st.sampled_from([("\n",), ("x", "def")]),
        "num_samples": st.integers(1, 3),
    },
)


@given(given_=DECODINGS, seed=st.integers(0, 3), block=st.sampled_from([None, None, 8]))
@settings(deadline=None, max_examples=60)
def test_every_finished_answer_parses(
    random_coder: Callable[..., DiffuCoder], given_: dict[str, Any], seed: int, block: int | None
) -> None:
    results = random_coder(seed, block).generate_batch([ASK, ASK + " Quickly."], **given_)
    for result in results:
        assert parses(result.text), (result.text, result.problem)
        assert not result.problem
        assert result.forward_passes <= 6 * given_["new_tokens"]


@given(
    path=st.sampled_from(SOURCES),
    seed=st.integers(0, 2**20),
    holes=st.integers(1, 4),
    steps=st.sampled_from([2, 8, None]),
)
@settings(deadline=None, max_examples=30)
def test_files_with_holes_parse_once_they_are_filled_or_the_result_says_why_not(
    random_coder: Callable[..., DiffuCoder], path: Path, seed: int, holes: int, steps: int | None
) -> None:
    drawn = random.Random(seed)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    begin = drawn.randrange(max(1, len(lines) - 12))
    source = textwrap.dedent("".join(lines[begin : begin + 12]))
    cuts = sorted(drawn.sample(range(1, max(holes + 2, len(source))), holes))
    text = ""
    position = 0
    for cut in cuts:
        text += source[position:cut] + f"<|hole:{drawn.randint(1, 6)}|>"
        position = cut + drawn.randint(1, 15)
    text += source[position:]
    result = random_coder().fill(text, syntax="python", steps=steps)
    assert bool(result.problem) != parses(result.text), (result.text, result.problem)


def test_rows_are_the_same_alone_and_in_a_batch(random_coder: Callable[..., DiffuCoder]) -> None:
    coder = random_coder()
    settings_ = {"syntax": "python", "temperature": 0.8, "steps": 7, "new_tokens": 24}
    asks = [ASK, "Reverse it.", ASK + " Then sort the list, and return its first three numbers."]
    together = coder.generate_batch(asks, **settings_)
    for ask, result in zip(asks, together, strict=True):
        alone = coder.generate(ask, **settings_)
        assert (alone.text, alone.trace.steps) == (result.text, result.trace.steps)


def test_a_stream_ends_with_the_text_of_the_whole_answer(random_coder: Callable[..., DiffuCoder]) -> None:
    coder = random_coder()
    settings_ = {"syntax": "python", "steps": 6, "new_tokens": 20, "seed": 3, "temperature": 1.0}
    *_, last = coder.stream(ASK, **settings_)
    assert coder.generate(ASK, **settings_).trace.tokens == last.canvas[0].tolist()


def test_settled_tokens_of_a_stream_never_change(random_coder: Callable[..., DiffuCoder]) -> None:
    coder = random_coder(1)
    for seed in range(8):
        params = DecodingParams(syntax="python", steps=10, new_tokens=24, seed=seed, temperature=1.0)
        request = coder.request(ASK, params)
        settled: list[list[int]] = []
        sequences = request.sequences()
        for _ in decode(coder.model, sequences):
            settled.append(request.settled_ids(sequences[0]))
        [result] = request.results(sequences, 1.0)
        final = settled[-1]
        assert all(final[: len(ids)] == ids for ids in settled)
        assert not result.problem


def test_text_after_a_hole_that_cannot_be_mended_is_named(random_coder: Callable[..., DiffuCoder]) -> None:
    coder = random_coder()
    before: Generation = coder.fill("def f(a, b:\n    return <|hole:4|>\n", syntax="python")
    assert before.problem.startswith("line 1: ") or before.problem.startswith("line 2: ")
    after = coder.fill("x = <|hole:2|>\ny = )\n", syntax="python")
    assert "unmatched ')'" in after.problem or not parses(after.text)
    assert after.problem


@pytest.mark.filterwarnings("ignore:the text is longer")
def test_windows_of_a_long_text_keep_the_whole_text(random_coder: Callable[..., DiffuCoder]) -> None:
    coder = random_coder()
    filler = "".join(f"value_{n} = {n}\n" for n in range(coder.model.max_length))
    text = f"def f(a):\n    return <|hole:3|>\n{filler}def g(b):\n    if b:\n        <|hole:4|>\n    return b\n"
    result = coder.fill(text, syntax="python")
    assert parses(result.text)
    assert not result.problem


def test_a_text_that_is_too_long_to_judge_is_an_error(random_coder: Callable[..., DiffuCoder]) -> None:
    text = "x = 1\n" * 20_000 + "y = <|hole:2|>\n"
    with pytest.raises(PromptError, match="120,005 characters, more than 100,000"):
        random_coder().fill(text, syntax="python")


def test_the_reference_preset_keeps_no_rule() -> None:
    with pytest.raises(ConfigError, match="syntax is not a setting of the reference preset"):
        DecodingParams(preset="reference", syntax="python")
