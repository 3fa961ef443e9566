"""The class of each token of an answer, by Python's tokenizer."""

import io
import keyword
import tokenize
from collections.abc import Iterator, Sequence

from diffucoder.grading.reading import read_limited
from diffucoder.grading.replies import program_blocks

CLASSES = ("keyword", "name", "operator", "literal", "indentation", "comment", "text", "end")


def token_classes(pieces: Sequence[str]) -> list[str]:
    """Return the class of each piece of an answer: that of its first character that is not white space.

    White space alone, line breaks included, is indentation. Text around the program, or that is not Python, is text.
    """
    text = "".join(pieces)
    of_characters = read_limited(_character_classes, text, otherwise=["text"] * len(text))
    classes = []
    start = 0
    for piece in pieces:
        blank = len(piece) - len(piece.lstrip())
        classes.append(of_characters[start + blank] if blank < len(piece) else "indentation")
        start += len(piece)
    return classes


def _character_classes(text: str) -> list[str]:
    """Return the class of each character, by Python's own tokenizer."""
    blocks = program_blocks(text, [])
    if not all(block in text for block in blocks):  # indented as a whole, or with other line ends
        blocks = [text]
    classes = ["text"] * len(text)
    for block in blocks:
        line_starts = [text.find(block)]
        for line in block.split("\n"):
            line_starts.append(line_starts[-1] + len(line) + 1)
        for token in _python_tokens(block):
            kind = _class_of(token)
            if kind is not None:
                begin = line_starts[token.start[0] - 1] + token.start[1]
                end = line_starts[token.end[0] - 1] + token.end[1]
                classes[begin:end] = [kind] * (end - begin)
    return classes


def _python_tokens(program: str) -> Iterator[tokenize.TokenInfo]:
    """Yield the tokens of Python. In broken code the lines from the error on are read one by one."""
    read_lines = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(program).readline):
            yield token
            read_lines = token.end[0]
    except (tokenize.TokenError, SyntaxError):
        lines = list(io.StringIO(program))
        if len(lines) == 1:
            return
        for row in range(read_lines, len(lines)):
            for token in _python_tokens(lines[row]):
                start = (token.start[0] + row, token.start[1])
                yield token._replace(start=start, end=(token.end[0] + row, token.end[1]))


def _class_of(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    if token.type in (tokenize.STRING, tokenize.NUMBER) or tokenize.tok_name[token.type].startswith("FSTRING"):
        return "literal"
    return {tokenize.OP: "operator", tokenize.COMMENT: "comment"}.get(token.type)
