"""Text to tokens and back, for models with masks: special ids, chat prompts, holes, unfinished text.

A text that spells a special token means the characters, everywhere: only a chat template, `<|hole|>` in a text to fill,
and `encode(text, special=True)` give control tokens.

The code holds no token ids: it looks them up in the checkpoint by the tokens' names.
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from diffucoder.chat_templates import chatml, render_chat
from diffucoder.errors import CheckpointError, PromptError
from diffucoder.files import Json, write_json
from diffucoder.model_files import one_line, shown
from diffucoder.tokenizer_checks import is_panic
from diffucoder.tokenizer_files import CONTROL, ROLES, add_special, read_backend, read_config, role_tokens, token_name

MASK_TOKEN = "<|mask|>"
PAD_TOKEN = "<|dlm_pad|>"
END_OF_TEXT = "<|endoftext|>"
EXPAND_TOKEN = "<|expand|>"
DELETE_TOKEN = "<|delete|>"
END_OF_TURN = "<|im_end|>"
TERMINATORS = (END_OF_TEXT, END_OF_TURN, PAD_TOKEN)  # an answer ends at the first of them
PLACEHOLDER = "░"  # printed for a masked token, or for half a character
DEFAULT_SYSTEM = "You are a helpful assistant."  # Qwen2.5's, which DiffuCoder was tuned with

_FIRST_STAND_IN = 0xDC00  # a lone surrogate, which no Unicode text has
_NO_CHARACTER = "\ufdd0"
_LONG = 4096  # characters; while a longer text is encoded, other threads go on

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Hole:
    """A gap to fill: `length` masks, or as many as the decoder chooses (None)."""

    length: int | None = None


def split_holes(text: str) -> list[str | Hole]:
    """Cut `text` at `<|hole|>` and `<|hole:12|>`; empty pieces are left out. PromptError for a malformed hole."""
    pieces: list[str | Hole] = []
    position = 0
    for hole in re.finditer(r"<\|hole([^|\n]*)\|>", text):  # [^|] keeps it linear in the length of the text
        length = re.fullmatch(r"(?::([1-9][0-9]{0,5}))?", hole[1])
        if length is None:
            raise PromptError(f"hole {hole[0]!r} is malformed; write <|hole|>, or <|hole:12|> for 12 tokens")
        pieces += [text[position : hole.start()], Hole(int(length[1]) if length[1] else None)]
        position = hole.end()
    pieces.append(text[position:])
    return [piece for piece in pieces if piece != ""]


def with_texts(pieces: Iterable[str | Hole], texts: Iterator[str]) -> str:
    """The text of `pieces`, with the next of `texts` in place of each hole."""
    return "".join(next(texts) if isinstance(piece, Hole) else piece for piece in pieces)


class Tokenizer:
    """A fast tokenizer that knows its mask, its terminators and its chat format."""

    def __init__(self, backend: tokenizers.Tokenizer, *, config: Mapping[str, Any] | None = None) -> None:
        """Wrap `backend`. `config` is a `tokenizer_config.json`: special tokens by role, and the chat template.

        In `config["end_tokens"]` are further tokens that end an answer. CheckpointError if there is no mask token:
        neither `config["mask_token"]` nor `<|mask|>`.
        """
        self.backend = backend
        self.config: Json = dict(config or {})
        for role in ROLES:
            if role in self.config:
                self.config[role] = token_name(self.config[role])
        self.mask_token: str = self.config.get("mask_token") or MASK_TOKEN
        mask_id = backend.token_to_id(self.mask_token)
        if mask_id is None:
            mask = self.mask_token
            raise CheckpointError(f"tokenizer has no mask token {mask!r}; use the tokenizer saved with the model")
        self.mask_id: int = mask_id
        eos_token = self.config.get("eos_token")
        terminators = self._ids_of(eos_token, *TERMINATORS, *self.config.get("end_tokens", ()))
        self.terminator_ids = frozenset(terminators)
        self.eos_id = next(iter(terminators), None)
        # Dream pads with a token for it if the checkpoint has one; older parents pad with their end of text
        pads = self._ids_of(self.config.get("pad_token"), PAD_TOKEN, END_OF_TEXT, eos_token, self.mask_token)
        self.pad_id = pads[0]

    @classmethod
    def load(
        cls, folder: str | Path, *, add_mask: bool = False, mask_id: int | None = None, end_ids: Iterable[int] = ()
    ) -> "Tokenizer":
        """Read a tokenizer's files. If they name no mask token it is the one at `mask_id`, or `add_mask` adds one.

        Special tokens at `end_ids` end an answer. CheckpointError if files are missing, damaged or disagree on ids.
        """
        folder = Path(folder)
        config = read_config(folder)
        backend = read_backend(folder, config)
        if not config.get("mask_token") and mask_id is not None:
            config["mask_token"] = backend.id_to_token(mask_id)
        if not config.get("mask_token") and add_mask:
            add_special(backend, MASK_TOKEN)
        added = backend.get_added_tokens_decoder()
        config["end_tokens"] = [added[id_].content for id_ in end_ids if id_ in added and added[id_].special]
        return cls(backend, config=config)

    def with_own_pad(self) -> "Tokenizer":
        """Return this tokenizer, with `<|dlm_pad|>` at the next free id if it pads with its end of text."""
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
        roles = self._role_names()
        config: Json = {
            "clean_up_tokenization_spaces": False,
            "mask_token": self.mask_token,
            "pad_token": self.backend.id_to_token(self.pad_id),
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{role: roles[role] for role in ("bos_token", "eos_token", "unk_token") if role in roles},
        }
        write_json(folder / "tokenizer_config.json", dict(sorted(config.items())))
        template = folder / "chat_template.jinja"
        if self.chat_template is not None:
            template.write_text(self.chat_template, encoding="utf-8")
        else:
            template.unlink(missing_ok=True)

    @cached_property
    def vocab_size(self) -> int:
        """Ids below this are tokens. A model's rows from here on are spare, and decoding must never propose them."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are not text. `decode` skips them."""
        return frozenset(id_ for id_, token in self._added_tokens.items() if token.special)

    @property
    def expand_id(self) -> int | None:
        """The id of the token that becomes two masks, of models that decide how long a hole is (DreamOn), else None."""
        return self.backend.token_to_id(EXPAND_TOKEN)

    @property
    def delete_id(self) -> int | None:
        """The id of the token by which such a model ends a hole."""
        found = self.backend.token_to_id(DELETE_TOKEN)
        return self.backend.token_to_id(END_OF_TEXT) if found is None else found

    @property
    def bos_id(self) -> int | None:
        """The id of the token that `tokenizer_config.json` names as beginning of text; None if it names none."""
        return next(iter(self._ids_of(self.config.get("bos_token"))), None)

    @property
    def turn_end_id(self) -> int | None:
        """The id that ends a turn of a chat: `<|im_end|>`, or the end of text in a vocabulary without it."""
        end_of_turn = self.backend.token_to_id(END_OF_TURN)
        return self.eos_id if end_of_turn is None else end_of_turn

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's Jinja template, of several the default one; None: as Qwen2.5. Raises CheckpointError."""
        template = self.config.get("chat_template")
        if isinstance(template, list):
            named = [each for each in template if isinstance(each, Mapping) and isinstance(each.get("name"), str)]
            template = {each["name"]: each.get("template") for each in named}
        if isinstance(template, Mapping):
            names = one_line(", ".join(template) or "none")[:80]
            template = template.get("default")
            if template is None:
                raise CheckpointError(f"of several chat templates ({names}) none is 'default'; give one that name")
        if template is not None and not isinstance(template, str):
            raise CheckpointError(f"chat_template={shown(template)} is not text; give a Jinja template")
        return template

    def check_fits(self, *, mask_id: int, rows: int) -> None:
        """Raise CheckpointError unless a model with this mask id and number of rows can use this vocabulary."""
        if self.mask_id != mask_id:
            token = self.backend.id_to_token(mask_id)
            raise CheckpointError(
                f"tokenizer has mask {self.mask_token!r} at {self.mask_id}, but the model's mask_token_id={mask_id} "
                f"is {token!r} there; use the tokenizer saved with the model"
            )
        if self.vocab_size > rows:
            raise CheckpointError(
                f"tokenizer has {self.vocab_size} tokens, but the model only {rows} rows; "
                "use the tokenizer saved with the model"
            )

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; `special` reads names of control tokens as such. PromptError if it is not Unicode."""
        return list(self._encoded(self.backend if special else self._plain_backend, text).ids)

    def _encoded(self, backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
        try:
            if len(text) > _LONG:
                return backend.encode_batch([text], add_special_tokens=False)[0]
            return backend.encode(text, add_special_tokens=False)
        except TypeError:
            raise PromptError(f"text {text[:40]!r} is not Unicode; give it as UTF-8") from None
        except BaseException as error:
            if not is_panic(error):
                raise
            reason = one_line(error)
            raise PromptError(f"text {text[:40]!r} cannot be cut by this tokenizer ({reason})") from None

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Encode many texts at once, on all cores. Raises PromptError as `encode` does."""
        backend = self.backend if special else self._plain_backend
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except BaseException:
            for text in texts:
                self.encode(text, special=special)  # raises for the text that cannot be encoded
            raise

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that form no character become U+FFFD, spare ids nothing. PromptError if it fails."""
        try:
            return str(self.backend.decode(list(ids), skip_special_tokens=skip_special))
        except BaseException as error:
            if not is_panic(error):
                raise
            raise PromptError(f"this tokenizer's decoder cannot decode the answer ({one_line(error)})") from None

    def encode_chat(self, messages: str | Messages, *, prefill: str = "") -> list[int]:
        """Token ids of `chat(messages)` and a `prefill`; control tokens that a message spells are plain characters."""
        turns = _checked_turns(messages)
        for turn in turns:
            for name, value in turn.items():
                if isinstance(value, str):
                    turn[name] = self._with_stand_ins(value)
        text = self._render(turns) + self._with_stand_ins(prefill)
        plain = text.translate(self._stood_in)
        if plain == text:  # no message spells a control token
            return self.encode(text, special=True)
        ids = []
        position = 0
        unspelled = self._encoded(self.backend, text.translate(dict.fromkeys(self._stood_in, _NO_CHARACTER)))
        for id_, (start, end) in zip(unspelled.ids, unspelled.offsets, strict=True):
            if id_ in self._control_tokens:
                ids += [*self.encode(plain[position:start]), id_]
                position = end
        return ids + self.encode(plain[position:])

    def token_bytes(self, id_: int) -> bytes:
        """Return the bytes of a token: perhaps a part of a character, or the name of an added token."""
        token = self.backend.id_to_token(id_) or ""
        if id_ in self._added_tokens:
            return token.encode()
        if self._is_byte_level and _BYTE_OF_CHARACTER.keys() >= set(token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):  # SentencePiece's byte fallback
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()  # its blank

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each token. A character of several tokens belongs to the last of them, the others have ""."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces = [decoder.decode(self.token_bytes(id_)) for id_ in ids]
        if pieces:
            pieces[-1] += decoder.decode(b"", final=True)
        return pieces

    def decode_partial(self, ids: Iterable[int]) -> str:
        """Return the text of a canvas during decoding, with a placeholder for each mask and incomplete character."""
        text = ""
        for is_mask, group in groupby(ids, lambda id_: id_ == self.mask_id):
            run = list(group)
            if is_mask:
                text += PLACEHOLDER * len(run)
            else:  # masks cut a character of several tokens at the ends of a run only
                text += re.sub(r"\A\ufffd+|\ufffd+\Z", PLACEHOLDER, self.decode(run))
        return text

    def chat(self, messages: str | Messages) -> str:
        """The prompt of a conversation with the assistant's header; a string is one user turn. Raises PromptError."""
        return self._render(_checked_turns(messages))

    @cached_property
    def _added_tokens(self) -> dict[int, AddedToken]:
        return dict(self.backend.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self.backend.decoder)  # it may be one of a sequence

    @cached_property
    def _control_tokens(self) -> dict[int, str]:
        """Tokens that control the model and are not text: their ids and names."""
        roles = {self.pad_id, self.bos_id, *self.terminator_ids}
        controls = {self.mask_id: self.mask_token}
        for id_, token in self._added_tokens.items():
            if token.special or id_ in roles or CONTROL.fullmatch(token.content):
                controls[id_] = token.content
        return controls

    @cached_property
    def _control_start(self) -> re.Pattern[str]:
        """Matches the first character of each control token that a text spells."""
        names = sorted(self._control_tokens.values(), key=len, reverse=True)
        return re.compile(rf"(?={'|'.join(map(re.escape, names))}).", re.DOTALL)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        """What a control token may begin with, the rest of it following."""
        names = self._control_tokens.values()
        return frozenset(name[:length] for name in names for length in range(1, len(name)))

    @cached_property
    def _stand_ins(self) -> dict[str, str]:
        """A stand-in for each character that a control token begins with."""
        first = sorted({name[0] for name in self._control_tokens.values()})
        return {character: chr(_FIRST_STAND_IN + number) for number, character in enumerate(first)}

    @cached_property
    def _stood_in(self) -> dict[int, str]:
        return {ord(stand_in): character for character, stand_in in self._stand_ins.items()}

    def _with_stand_ins(self, text: str) -> str:
        """`text` with a stand-in at the start of each control token that it spells, or that a template may complete."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError(f"text {text[:40]!r} is not Unicode; give it as UTF-8") from None
        characters = list(text)
        starts = {match.start() for match in self._control_start.finditer(text)}
        for ending in (text, text.rstrip()):  # templates strip
            for length in range(1, max(map(len, self._beginnings), default=0) + 1):
                if ending[-length:] in self._beginnings:
                    starts.add(max(0, len(ending) - length))
        for start in starts:
            characters[start] = self._stand_ins[characters[start]]
        return "".join(characters)

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A copy of the backend that reads control tokens as text: the switch is a property of a whole tokenizer."""
        plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
        names = self._control_tokens.values()
        plain.add_special_tokens([AddedToken(name, special=True) for name in names])  # all known: flags
        plain.encode_special_tokens = True
        return plain

    def _render(self, turns: list[dict[str, str]]) -> str:
        """The prompt of `turns`, by the checkpoint's template or as Qwen2.5 has it."""
        if self.chat_template is None:
            if turns[0]["role"] != "system":
                turns = [{"role": "system", "content": DEFAULT_SYSTEM}, *turns]
            return chatml(turns)
        return render_chat(self.chat_template, turns, self._role_names())

    def _role_names(self) -> dict[str, str]:
        """The special tokens that the config names, by name."""
        names = {role: token_name(token) for role, token in role_tokens(self.config).items()}
        return {role: name for role, name in names.items() if name}

    def _ids_of(self, *tokens: str | None) -> list[int]:
        ids = [self.backend.token_to_id(token) for token in tokens if token]
        return [id_ for id_ in ids if id_ is not None]


def _checked_turns(messages: str | Messages) -> list[dict[str, str]]:
    """Return a copy of the messages; a string is one user turn. Raises PromptError without role and content."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    turns = [dict(message) for message in messages]
    if not turns:
        raise PromptError("messages=[] holds nothing to answer; give at least one user message")
    for turn in turns:
        if not isinstance(turn.get("content"), str) or turn.get("role") not in ("system", "user", "assistant"):
            raise PromptError(f"message {turn!r} needs a text content and a role: system, user or assistant")
    return turns


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes, with the byte of each: printable ones are themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    for number, byte in enumerate(others):
        alphabet[chr(256 + number)] = byte
    return alphabet


_BYTE_OF_CHARACTER = _byte_alphabet()
