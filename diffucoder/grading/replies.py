"""How `extract` reads a reply: fences and other marks of code, and which of the blocks between them are the program.

A reply is split at its code fences, and its blocks are chosen by what they define. Which fence opens a block and which
closes one does not matter: the prompt may have opened the first, and models forget some. These functions have no limit
on time. Not for: other rooms, which use `extract`.
"""

import ast
import html
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from diffucoder.grading.syntax import (
    NOT_PARSED,
    Function,
    Import,
    cut,
    defined_names,
    future_first,
    is_stub,
    longest_program,
    names_at_once,
    needed_names,
    parsed,
    statements_of,
)
from diffucoder.tokenizer import TERMINATORS

_TERMINATORS = re.compile("|".join(map(re.escape, TERMINATORS)))
_TAG = r"(?:(?:\w+:)?think(?:ing)?|thoughts?|reasoning|analysis|scratchpad)[>\]▷]"
_THINKING = re.compile(rf"^[ \t]*(?:[<\[◁]{_TAG}|<\|begin_of_thought\|>)", re.MULTILINE | re.IGNORECASE)
_END_OF_THINKING = re.compile(rf"[<\[◁]/{_TAG}|<\|end_of_thought\|>", re.IGNORECASE)
_QUOTED_FENCE = re.compile(r"^>[ \t]*(?:```|~~~)", re.MULTILINE)

# A fence begins a line. Within a line it closes a block, or opens one that is named: the method's own prompt does that.
_PYTHON = r"[^\w`\n]*i?(?:python|py)[\d.]*(?![\w.+-])"
_FENCE = (
    r"(?:^[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?(?:`{3,}(?!`)|~{3,})(?P<label>[^`\n]*)"
    rf"|(?<!`)`{{3,}}(?!`)(?P<inline>{_PYTHON}[^`\n]*|[ \t]*[\w+#.-]*[ \t]*))$"
)
_STRINGS = r"""'''(?:\\[\s\S]|[^\\])*?'''|'(?:\\[\s\S]|[^'\\\n])*'"""
_FLAGS = re.MULTILINE | re.IGNORECASE
_ANY_FENCE = re.compile(_FENCE, _FLAGS)
# strings and comments are matched first, because the fences within them belong to the program
_CODE_FENCE = re.compile("|".join([r"\\[\s\S]", _STRINGS, _STRINGS.replace("'", '"'), r"#[^\n]*", _FENCE]), _FLAGS)
_PYTHON_LABEL = re.compile(_PYTHON, re.IGNORECASE)
_FOREIGN = frozenset(
    "bash bat batch c c# c++ cc clojure cmd console cpp cs csharp css csv dart diff elixir erlang go golang haskell "
    "html java javascript js json jsx julia kotlin lua matlab output perl php plaintext powershell ps1 pseudo "
    "pseudocode r rb rs ruby rust scala sh shell sql swift text toml ts tsx txt typescript xml yaml yml zsh".split()
)
# other marks around code
_MARK = re.compile(r"^[ \t]*\[/?(?:BEGIN|DONE|PYTHON|ANSWER)\][ \t]*$", re.MULTILINE)
_CODE_ON_FENCE = re.compile(
    r"((?<!`)`{3,}|^[ \t]*~{3,})([ \t]*(?i:python|py)?[\d.]*)[ \t]*"
    r"((?:(?:async )?def|class) \w+[ \t]*[(:\[]|from [\w.]+ import |import \w|@\w)",
    re.MULTILINE,
)
_HTML_CODE = re.compile(r"</?(?:pre|code)\b[^<>\n]{0,200}>", re.IGNORECASE)
_INTERPRETER = re.compile(r"[ \t]*(?:>>>|\.\.\.|In ?\[\d+\]:|\.{3,}:)(?: |$)")

_DEFINITION = re.compile(r"(?:async )?def |class |@\w")
_DEFINED_NAME = re.compile(r"^(?:async +)?(?:def|class) +(\w+)", re.MULTILINE)
_TEST_NAME = re.compile(r"[Tt]est|(?:\w*_tests?|\w*Tests?|check)$")
# a line of code; prose may begin with spaces if it is an item of a list
_CODE = re.compile(
    rf"\s(?!\s*(?:[-*•]|\d+[.)])\s)|{_DEFINITION.pattern}"
    r"|(?:from|import|return|if|for|while|with|try|assert|print)\b|\w+ = "
)


def program_from(reply: str, names: Iterable[str]) -> str:
    return future_first("\n\n\n".join(program_blocks(reply, names)))


def program_blocks(reply: str, names: Iterable[str]) -> list[str]:
    readings = _without_thinking(_until_terminator(reply))
    for text in readings:
        chosen = _best_of(text, list(names))
        if chosen:
            return [block.code for block in chosen]
    return [max(_blocks(readings[0], _CODE_FENCE), key=_likeness).code]


def answered(prompt: str, reply: str, entry_point: str) -> str:
    return future_first(_answered(prompt, reply, entry_point) or program_from(reply, [entry_point]))


def completed(prompt: str, completion: str, entry_point: str) -> str:
    text = _until_terminator(completion)
    return future_first(cut(prompt + text, entry_point) or _answered(prompt, text, entry_point) or prompt + text)


def program_key(reply: str) -> str:
    program = program_from(reply, [])
    try:
        return ast.dump(parsed(program))
    except NOT_PARSED:
        return program.strip()


def called_names(tests: Iterable[str]) -> list[str]:
    return sorted(set().union(*(needed_names(statements_of(test)) for test in tests)))


def _answered(prompt: str, reply: str, entry_point: str) -> str | None:
    """The program of `answered` if the requested function is in it."""
    answer = _Block(program_from(reply, [entry_point]))
    head = re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", prompt, flags=re.MULTILINE)
    program = prompt[: head.start()] + answer.code if head else answer.code
    whole = cut(program, entry_point, last=True)  # of two functions the later one is in force
    if whole is None and entry_point in answer.ranks:  # a class, or another name of a function
        return program
    body = textwrap.indent(textwrap.dedent(answer.code), "    ")
    return whole or cut(f"{prompt.rstrip()}\n{body}", entry_point)


# --- text ------------------------------------------------------------------------------------------------------------


def _until_terminator(reply: str) -> str:
    text = re.sub(r"\r\n?", "\n", _TERMINATORS.split(reply, maxsplit=1)[0])
    return re.sub(r"^> ?", "", text, flags=re.MULTILINE) if _QUOTED_FENCE.search(text) else text


def _without_thinking(text: str) -> list[str]:
    """The text without thinking sections, the first of which the prompt may have opened; else as it is.

    A section that is never closed is read as an answer.
    """
    *sections, answer = _END_OF_THINKING.split(text)
    kept = ""
    for section in sections:
        opening = _THINKING.search(section)
        kept += section[: opening.start()] if opening else ""
    if all(map(_THINKING.search, sections)):
        return [kept + answer]
    return [kept + answer, text]  # the tag may be the program's own


def _forms(text: str) -> Iterator[str]:
    """The text, and what it is if it is HTML, the record of an interpreter, or has code only where it is indented."""
    yield text
    if _HTML_CODE.search(text):
        yield html.unescape("\n```\n".join(_HTML_CODE.split(text)))
    typed = []
    for line in text.split("\n"):
        prompt = _INTERPRETER.match(line)
        if prompt:
            typed.append(line[prompt.end() :])
        elif _ANY_FENCE.match(line):
            typed.append(line)
    yield "\n".join(typed)
    indented = []
    for line in _THINKING.sub("", text).split("\n"):
        if not line.strip() or line[0].isspace():
            indented.append(line)
        elif _CODE.match(line):  # which the indented lines may belong to
            return
    yield textwrap.dedent("\n".join(indented))


# --- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Block:
    """Text between two fences, in or out of a fence."""

    code: str
    label: str = ""  # of the fence before it

    @cached_property
    def statements(self) -> list[ast.stmt] | None:
        """None: this is not Python."""
        return statements_of(self.code)

    @cached_property
    def definitions(self) -> dict[str, bool]:
        """The functions and classes, and whether each is more than a head."""
        if self.statements is None:
            return dict.fromkeys(_DEFINED_NAME.findall(self.code), False)
        found = [node for node in self.statements if isinstance(node, Function | ast.ClassDef)]
        return {node.name: not is_stub(node) for node in found}

    @cached_property
    def tests(self) -> set[str]:
        """The definitions that are tests."""
        names = set(filter(_TEST_NAME.match, self.definitions))
        for node in self.statements or ():
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if "TestCase" in (getattr(base, "id", ""), getattr(base, "attr", "")):
                        names.add(node.name)
        return names

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The global names that it gives a value, and how good a source of each it is.

        It defines the name (3), assigns it (2), imports it (1; "*" may be any name), or has only its head (0).
        """
        statements = self.statements or ()
        ranks = dict.fromkeys(defined_names(*statements), 2)
        ranks |= dict.fromkeys(defined_names(*(node for node in statements if isinstance(node, Import))), 1)
        for name, is_whole in self.definitions.items():
            ranks[name] = 3 * is_whole
        return ranks

    @property
    def is_foreign(self) -> bool:
        """Whether its fence names another language, or the output of a program."""
        return self.label.lower().strip("{}. \t").partition(" ")[0] in _FOREIGN

    def supplies(self, names: set[str]) -> bool:
        """Whether it is Python that gives a value to one of `names`, or imports alone that may do so."""
        if self.statements is None or not names:
            return False
        may_be_any = "*" in self.ranks and all(isinstance(node, Import) for node in self.statements)
        return may_be_any or not names.isdisjoint(self.ranks)


def _blocks(text: str, fence: re.Pattern[str]) -> list[_Block]:
    """Split a reply at its fences."""
    blocks = []
    start = 0
    label: str | None = None
    for match in fence.finditer(text):
        info = match["label"] if match["inline"] is None else match["inline"]
        if info is not None:  # else a string or a comment
            blocks.append(_block(text[start : match.start()], label))
            start = match.end()
            label = info.strip()
    return [*blocks, _block(text[start:], label)]


def _block(text: str, label: str | None) -> _Block:
    """The block after a fence with this label; None: before any fence."""
    code = text.strip("\n")
    # only if it is needed, since dedent also empties blank lines, which may be part of a string; without a fence
    # spaces stay: the indentation is part of a completion
    if label is not None and code[:1].isspace():
        code = textwrap.dedent(code)
    return _Block(_without_prose(code), label or "")


def _best_of(text: str, names: Sequence[str]) -> list[_Block]:
    """The chosen blocks of the first form of the text in which all of them are Python, else in which there are any."""
    best: list[_Block] = []
    for form in _forms(text):
        # other marks around code become fences, and code on a fence's line begins after it
        fenced = _CODE_ON_FENCE.sub(r"\1\2\n\3", _MARK.sub("```", form))
        # any fence may count if a quote in prose, or in broken code, hides the real one
        for fence in (_CODE_FENCE, _ANY_FENCE):
            chosen = _chosen(_blocks(fenced, fence), names)
            if chosen and all(block.statements is not None for block in chosen):
                return chosen
            best = best or chosen
    return best


def _chosen(blocks: Sequence[_Block], names: Sequence[str]) -> list[_Block]:
    """The blocks that define `names`, or something new, and those that these need, in order; none if there are none."""
    blocks = [_without_imports(block, blocks) for block in blocks]
    wanted, blocks = _wanted_names(blocks, names)
    is_named = bool(wanted)
    everything = set().union(*(block.ranks for block in blocks))
    if not is_named:
        wanted = _new_names(blocks)
    chosen: set[_Block] = set()
    defined: set[str] = set()
    for name in wanted:
        if name not in defined:
            candidates = [block for block in blocks if name in block.ranks]
            best = max(candidates, key=lambda block: block.ranks[name])
            is_new = defined.isdisjoint(best.definitions)
            if is_new and defined and "*" not in everything:  # an alternative may use a package that is not imported
                is_new = names_at_once(best.statements or ()) <= everything
            if is_named or is_new:
                chosen.add(best)
                defined.update(best.ranks)
    while True:
        missing = set().union(*(needed_names(block.statements) for block in chosen)) - defined
        others = []
        for block in blocks:
            if block not in chosen and defined.isdisjoint(block.definitions) and block.supplies(missing):
                others.append(block)
        if not others:
            return [block for block in blocks if block in chosen]
        best = max(others, key=lambda block: max((block.ranks.get(name, 0) for name in missing), default=0))
        chosen.add(best)
        defined.update(best.ranks)


def _wanted_names(blocks: Sequence[_Block], names: Sequence[str]) -> tuple[list[str], Sequence[_Block]]:
    """Those of `names` that blocks define, and the blocks to choose from: of other languages only if no other does."""
    own = [block for block in blocks if not block.is_foreign]
    for group in (own, blocks):
        bound = set().union(*(block.ranks for block in group))
        wanted = [name for name in names if name in bound]
        if wanted:
            return wanted, group
    return [], own if any(block.definitions for block in own) else blocks


def _new_names(blocks: Sequence[_Block]) -> list[str]:
    """What the blocks define, without tests unless there is nothing else."""
    blocks = [block for block in blocks if block.statements is not None and block.definitions] or blocks
    every = list(chain.from_iterable(block.definitions for block in blocks))
    tests = set().union(*(block.tests for block in blocks))
    return [name for name in every if name not in tests] or every


def _without_imports(block: _Block, blocks: Sequence[_Block]) -> _Block:
    """The block without imports such as `from helpers import h` where another part of the answer defines `h`."""
    lines = block.code.split("\n")
    for node in reversed(block.statements or ()):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] not in sys.stdlib_module_names:
            for other in blocks:
                is_other_part = block.definitions.keys().isdisjoint(other.definitions)
                if is_other_part and all(map(other.definitions.get, defined_names(node))):
                    del lines[node.lineno - 1 : node.end_lineno]
                    break
    code = "\n".join(lines)
    return block if code == block.code else _Block(code.strip("\n"), block.label)


def _likeness(block: _Block) -> tuple[bool, ...]:
    """How likely a block that defines nothing is the program."""
    is_python = bool(_PYTHON_LABEL.match(block.label))
    does_something = False
    for node in block.statements or ():
        alone = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call)  # as in the output of a program
        does_something |= not alone and not (isinstance(node, ast.AnnAssign) and node.value is None)
    is_other = bool(block.label) and not is_python
    return does_something and not is_other, is_python, not is_other, bool(block.code)


def _without_prose(text: str) -> str:
    """The code in `text` if the rest is only prose; else the text, since it may be broken code."""
    lines = text.split("\n")
    start = next((number for number, line in enumerate(lines) if _CODE.match(line) and not line[0].isspace()), 0)
    code, tree = longest_program(lines[start:])
    around = [line for line in lines[:start] + lines[start + len(code) :] if line.strip()]
    if any(map(_CODE.match, around)) or not any(isinstance(node, Function | ast.ClassDef) for node in tree.body):
        return text
    return "\n".join(code).strip("\n")
