"""Text to tokens and back, for models that see masks: special ids, chat prompts, holes, partial decoding.

For: everything that knows how a checkpoint spells things. Not for: canvases (`decoding.canvas`), models (`models`).

A newcomer needs to know that DiffuCoder ships no `tokenizer.json`, only Qwen2's `vocab.json` and `merges.txt` plus a
list of added tokens; `Tokenizer.load` rebuilds the fast byte-level BPE from those. Ids never stand in code: they come
from the checkpoint, by the tokens' names.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from diffucoder.errors import CheckpointError, PromptError

MASK_TOKEN, PAD_TOKEN = "<|mask|>", "<|dlm_pad|>"
PLACEHOLDER = "░"  # how a token still masked, or half a character, is shown
DEFAULT_SYSTEM = "You are a helpful assistant."  # Qwen2.5's, which DiffuCoder was tuned with
TERMINATORS = ("<|endoftext|>", "<|im_end|>", PAD_TOKEN)

# Qwen2's: contractions; letters with one leading mark; single digits; punctuation; line ends; spaces
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What Dream adds to Qwen2's vocabulary, in id order, where a checkpoint lists nothing itself. `<|dlm_pad|>` would be
# next, but only some checkpoints have it, and those list it.
_DREAM_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|beginoftext|>", MASK_TOKEN),
)
_DREAM_TEXT = frozenset(_DREAM_SPECIAL[14:22])  # tools, FIM, repository: text to Qwen2.5, so decoding shows them

Json = dict[str, Any]  # Any: whatever a JSON file holds
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Hole:
    """A gap to fill: `length` masks, or as many as the decoder sees fit (None)."""

    length: int | None = None


def split_holes(text: str) -> list[str | Hole]:
    """Cut `text` at `<|hole|>` and `<|hole:12|>`; empty pieces are left out. PromptError for a malformed hole."""
    pieces: list[str | Hole] = []
    end = 0
    for match in re.finditer(r"<\|hole(.*?)\|>", text):
        spec = re.fullmatch(r"(?::([1-9][0-9]{0,5}))?", match[1])
        if spec is None:
            raise PromptError(f"hole {match[0]!r} is malformed; write <|hole|>, or <|hole:12|> for 12 tokens")
        pieces += [text[end : match.start()], Hole(int(spec[1]) if spec[1] else None)]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece != ""]


class Tokenizer:
    """A fast tokenizer that knows its mask, its terminators and its chat format."""

    def __init__(self, backend: tokenizers.Tokenizer, *, config: Mapping[str, Any] | None = None) -> None:
        """Wrap `backend`. `config` is a `tokenizer_config.json`: special tokens by role, and the chat template.

        CheckpointError where there is no mask token: neither `config["mask_token"]` nor `<|mask|>`.
        """
        self.backend = backend
        self.config: Json = dict(config or {})
        mask = self._named("mask_token") or MASK_TOKEN
        mask_id = backend.token_to_id(mask)
        if mask_id is None:
            raise CheckpointError(f"tokenizer has no mask token {mask!r}; use the tokenizer saved with the model")
        self.mask_token = mask
        self.mask_id: int = mask_id
        ends = dict.fromkeys(filter(None, (self._named("eos_token"), *TERMINATORS)))
        ids = {token: backend.token_to_id(token) for token in ends}
        self.terminator_ids = frozenset(id_ for id_ in ids.values() if id_ is not None)
        self.eos_id: int | None = next((id_ for id_ in ids.values() if id_ is not None), None)
        # Dream pads with its own token where it has one, older parents with their end of text
        pads = (self._named("pad_token"), PAD_TOKEN, "<|endoftext|>", self._named("eos_token"), mask)
        found = (backend.token_to_id(token) for token in pads if token)
        self.pad_id = int(next(id_ for id_ in found if id_ is not None))

    @classmethod
    def load(cls, folder: str | Path, *, add_mask: bool = False) -> "Tokenizer":
        """Read `tokenizer.json`, or build it from `vocab.json` and `merges.txt` as DiffuCoder ships them.

        `add_mask` gives a parent that has no mask token one, at the next free id. CheckpointError where files are
        missing, damaged or disagree on ids.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        for name in ("special_tokens_map.json", "added_tokens.json"):
            listed = _read_json(folder / name)
            config = {**listed, **config} if "special" in name else {**config, "added_tokens": listed}
        if "chat_template" not in config and (folder / "chat_template.jinja").exists():
            config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        try:
            if (folder / "tokenizer.json").exists():
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            else:
                backend = _build(folder, config)
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} has no tokenizer.json, nor vocab.json and merges.txt") from error
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exceptions, whatever is wrong with a file
            raise CheckpointError(f"{folder}: tokenizer cannot be read ({error}); fetch it again") from error
        if add_mask and not config.get("mask_token"):
            add_special(backend, MASK_TOKEN)
        return cls(backend, config=config)

    def with_own_pad(self) -> "Tokenizer":
        """This tokenizer, with `<|dlm_pad|>` at the next free id where it padded with an end of text so far.

        Padding behind an answer is what a denoiser learns to write there; a token of its own keeps it apart from the
        end of a turn.
        """
        if self.pad_id not in (*self.terminator_ids, self.mask_id):
            return self
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        add_special(backend, PAD_TOKEN)
        return Tokenizer(backend, config={**self.config, "pad_token": PAD_TOKEN})

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, readable by transformers too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        roles = {role: self._named(role) for role in ("bos_token", "eos_token", "unk_token")}
        written = {
            **{role: token for role, token in roles.items() if token},
            "clean_up_tokenization_spaces": False,
            "mask_token": self.mask_token,
            "pad_token": self.backend.id_to_token(self.pad_id),
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        text = json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        template = folder / "chat_template.jinja"
        if self.chat_template is not None:
            template.write_text(self.chat_template, encoding="utf-8")
        else:
            template.unlink(missing_ok=True)

    @property
    def vocab_size(self) -> int:
        """Ids below this are tokens; a model's rows from here on are spare, and must never be proposed."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are not text: what decoding skips."""
        return frozenset(id_ for id_, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @property
    def bos_id(self) -> int | None:
        """The id that `tokenizer_config.json` calls the beginning of text; None where it names none."""
        token = self._named("bos_token")
        return None if token is None else self.backend.token_to_id(token)

    @property
    def turn_end_id(self) -> int | None:
        """The id that ends a turn of a chat: `<|im_end|>`, or where there is none the end of text."""
        found = self.backend.token_to_id("<|im_end|>")
        return self.eos_id if found is None else found

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own Jinja template, or None: then chats are written the way of Qwen2.5."""
        template = self.config.get("chat_template")
        if isinstance(template, list):  # some checkpoints name several
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

    def check_fits(self, *, mask_id: int, rows: int) -> None:
        """CheckpointError unless a model with this mask id and this many rows can use this vocabulary."""
        if self.mask_id != mask_id:
            has = self.backend.id_to_token(mask_id)
            raise CheckpointError(
                f"tokenizer has mask {self.mask_token!r} at {self.mask_id}, but the model's mask_token_id={mask_id} "
                f"is {has!r} there; use the tokenizer saved with the model"
            )
        if self.vocab_size > rows:
            raise CheckpointError(
                f"tokenizer has {self.vocab_size} tokens, but the model only {rows} rows; "
                "use the tokenizer saved with the model"
            )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, nothing added. `special=False` reads `<|mask|>` and its like as plain characters.

        PromptError for a string that is no text: Python puts lone surrogates where bytes were not UTF-8.
        """
        backend = self.backend if special else self._plain
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        except TypeError:
            raise PromptError(f"text {text[:40]!r} is not Unicode; give it as UTF-8") from None

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """`encode` of many texts at once, on all cores. PromptError where any of them is no text."""
        backend = self.backend if special else self._plain
        try:
            return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            for text in texts:
                self.encode(text, special=special)  # names the one that is not Unicode
            raise

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD, spare ids nothing."""
        return str(self.backend.decode([int(id_) for id_ in ids], skip_special_tokens=skip_special))

    def decode_partial(self, ids: Iterable[int], *, placeholder: str = PLACEHOLDER) -> str:
        """Text of a canvas in the making: a placeholder for every mask, and for a character only half there."""
        text = ""
        for masked, run in groupby((int(id_) for id_ in ids), lambda id_: id_ == self.mask_id):
            if masked:
                text += placeholder * len(list(run))
                continue
            piece = self.decode(run)
            whole = piece.strip("\ufffd")  # a character split over tokens breaks only at the ends of a run
            if whole == "":
                text += placeholder if piece else ""
                continue
            start = placeholder if piece[0] == "\ufffd" else ""
            end = placeholder if piece[-1] == "\ufffd" else ""
            text += start + whole + end
        return text

    def chat(
        self,
        messages: str | Messages,
        *,
        system: str | None = None,
        style: Literal["template", "readme"] = "template",
        prefill: str = "",
    ) -> str:
        """The prompt of a conversation (a lone string is one user turn), up to and including the assistant's header.

        `system` replaces the default; a first message with role "system" does too. `style="readme"` is the form of
        DiffuCoder's README: stripped user text, then a newline before `<|im_end|>`; "template" is the checkpoint's own
        template, else Qwen2.5's. `prefill` starts the answer. PromptError for messages without role and content.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
        for turn in turns:
            if not isinstance(turn.get("content"), str) or turn.get("role") not in ("system", "user", "assistant"):
                raise PromptError(f"message {turn!r} needs a text content and a role: system, user or assistant")
        if not turns:
            raise PromptError("messages=[] holds nothing to answer; give at least one user message")
        if system is not None:
            if turns[0]["role"] == "system":
                raise PromptError("system is given twice, as an argument and as the first message; keep one")
            turns.insert(0, {"role": "system", "content": system})
        if style == "template" and self.chat_template is not None:
            return self._render(turns) + prefill
        return _qwen_chat(turns, readme=style == "readme") + prefill

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A second backend for text that is only quoted: the switch is a property of the whole tokenizer."""
        plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _templates(self) -> Any:  # Any: transformers is not followed by mypy
        """What runs chat templates, in the sandbox transformers has for it. Only names of tokens matter there, so it
        holds an empty vocabulary: a copy of the backend would take a second."""
        from transformers import PreTrainedTokenizerFast  # late: slow to import, and most chats do not need it

        roles = {role: self._named(role) for role in ("bos_token", "eos_token")}
        named = {role: token for role, token in roles.items() if token}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(models.BPE()), **named)

    def _render(self, turns: list[dict[str, str]]) -> str:
        """Run the checkpoint's template."""
        from jinja2.exceptions import TemplateError  # late, as above

        try:
            return str(
                self._templates.apply_chat_template(
                    turns, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:
            raise PromptError(f"the checkpoint's chat template refuses these messages: {error}") from error

    def _named(self, role: str) -> str | None:
        """The token that `tokenizer_config.json` names for a role: a string, or an object with its content."""
        token = self.config.get(role)
        return token.get("content") if isinstance(token, Mapping) else token


def add_special(backend: tokenizers.Tokenizer, token: str) -> None:
    """Give `backend` a special `token` at the next free id, unless it has that token already."""
    if backend.token_to_id(token) is None:
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def qwen2_words() -> pre_tokenizers.PreTokenizer:
    """How Qwen2 cuts text into the words that its merges stay within."""
    split = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _qwen_chat(turns: Messages, *, readme: bool) -> str:
    """Qwen2.5's template without tools. `readme`: a newline ends the user's text, as in DiffuCoder's README."""
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": DEFAULT_SYSTEM}, *turns]
    text = ""
    for turn in turns:
        content = turn["content"].strip() + "\n" if readme and turn["role"] == "user" else turn["content"]
        text += f"<|im_start|>{turn['role']}\n{content}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


def _build(folder: Path, config: Json) -> tokenizers.Tokenizer:
    """Qwen2's byte-level BPE from `vocab.json` and `merges.txt`, plus the tokens the checkpoint adds."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).exists():
            raise FileNotFoundError(name)
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = qwen2_words()
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    for id_, token in sorted(_added_tokens(config, backend.get_vocab_size()).items()):
        special = config.get("added_tokens_decoder", {}).get(str(id_), {}).get("special", token not in _DREAM_TEXT)
        backend.add_tokens([AddedToken(token, special=special, normalized=False)])
        if backend.token_to_id(token) != id_:  # ids are given out in order: a gap or a clash shifts all that follow
            found = backend.token_to_id(token)
            raise CheckpointError(f"{folder}: {token!r} should be token {id_}, is {found}; fetch vocab.json again")
    return backend


def _added_tokens(config: Json, first: int) -> dict[int, str]:
    """Id to added token, from whichever file lists them; else Dream's own list, from id `first` on."""
    described = {int(id_): entry["content"] for id_, entry in config.get("added_tokens_decoder", {}).items()}
    listed = {int(id_): token for token, id_ in config.get("added_tokens", {}).items()}
    return {**listed, **described} or dict(enumerate(_DREAM_SPECIAL, start=first))


def _read_json(path: Path) -> Json:
    """The object in `path`, empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return content
