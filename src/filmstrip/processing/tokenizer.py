"""Text to token ids and back, where special tokens are only what the chat template wrote; knows no media.

A user's text may contain ``<|im_end|>`` or ``<|video_pad|>``. Tokenizers turn such strings into control tokens wherever
they stand, so prompts are split at the control tokens *of the template* first (:mod:`filmstrip.processing.chat_template`)
and everything between is encoded here with control tokens switched off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from filmstrip.errors import ModelLoadError
from filmstrip.formats.source import Source

_SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space."""
_MAX_CONTEXT_TOKENS = 8
"""Of a text that is continued: more than a character's bytes."""


class Tokenizer:
    """A checkpoint's tokenizer, seen from both sides."""

    def __init__(self, model: str, revision: str | None = None, control_tokens: Sequence[str] = ()) -> None:
        """Load from a directory or hub id; raises ModelLoadError.

        ``control_tokens`` get ids behind all others where the tokenizer lacks them: no model has an embedding for those.
        """
        try:
            self.hf: Any = _load(model, revision)
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(f"cannot load the tokenizer of {model!r}: {error}", param="model") from error
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None:
            raise ModelLoadError(f"{model!r} has no tokenizer.json (a fast tokenizer), which is needed", param="model")
        # In a fixed order, so that ids are the same in every run.
        missing = [token for token in control_tokens if token not in self.hf.get_vocab()]
        self.hf.add_tokens(
            [tokenizers.AddedToken(t, special=True, normalized=False) for t in missing], special_tokens=True
        )
        # A copy of our own: the switch is a state of the tokenizer, and the shared one must keep its default.
        self._plain, self._begins_with_space = _without_opening_space(backend)
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()
        added = self.hf.added_tokens_decoder
        self.special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
        self._strips = {
            token_id: (bool(token.lstrip), bool(token.rstrip)) for token_id, token in added.items() if token.special
        }
        self._special_ids = frozenset(self.special_tokens.values())
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a turn, if the tokenizer names one."""
        return self.hf.eos_token_id

    @property
    def named_tokens(self) -> dict[str, str]:
        """Control tokens by the role that the checkpoint's tokenizer gives them, e.g. ``video_token``."""
        return {role: str(token) for role, token in self.hf.special_tokens_map.items() if isinstance(token, str)}

    @property
    def first_ids(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text (Llama: the begin-of-sequence token); often none."""
        whole, text = self.hf("a").input_ids, self.hf("a", add_special_tokens=False).input_ids
        return whole[: len(whole) - len(text)] if whole[-len(text) :] == text else whole[: whole.index(text[0])]

    def opening(self, text: str) -> str:
        """``text`` as it is when a prompt begins with it: Llama's tokenizers put a space there, and only there."""
        return f" {text}" if self._begins_with_space and not text.startswith((" ", _SPACE_MARK)) else text

    def encode_text(self, text: str) -> list[int]:
        """Ids of ``text``, in which control tokens are spelled out like any other text."""
        return self._plain.encode(text, add_special_tokens=False).ids if text else []

    def split_special(self, rendered: str) -> list[str | int]:
        """Split a rendered prompt at its control tokens: text pieces and token ids in order.

        White space beside a token that says it swallows it (``lstrip``, ``rstrip``) is dropped, as tokenizers do.
        """
        pieces: list[str | int] = []
        start = 0
        strip_next = False
        for match in self.special_pattern.finditer(rendered):
            token_id = self.special_tokens[match.group()]
            strip_before, strip_after = self._strips[token_id]
            self._append_text(pieces, rendered[start : match.start()], strip_next, strip_before)
            pieces.append(token_id)
            start, strip_next = match.end(), strip_after
        self._append_text(pieces, rendered[start:], strip_next, False)
        return pieces

    @staticmethod
    def _append_text(pieces: list[str | int], text: str, strip_left: bool, strip_right: bool) -> None:
        if strip_left:
            text = text.lstrip()
        if strip_right:
            text = text.rstrip()
        if text:
            pieces.append(text)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that are not UTF-8 become U+FFFD."""
        if skip_special_tokens:
            token_ids = self.without_special(token_ids)
        return self._plain.decode(token_ids, skip_special_tokens=False)

    def without_special(self, token_ids: Sequence[int]) -> list[int]:
        """``token_ids`` but the special ones."""
        return [token_id for token_id in token_ids if token_id not in self._special_ids]


def _load(model: str, revision: str | None) -> Any:
    """Transformers' tokenizer; raises what Transformers raises, and ModelLoadError for one that only code can read."""
    # Without the word on remote code Transformers would ask on the terminal whether to run it.
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    kind: Any = PreTrainedTokenizerFast if _needs_code(model, revision) else AutoTokenizer
    try:
        return kind.from_pretrained(model, **options)
    except StrictDataclassError:
        # A field of config.json is of another type than Transformers declares by now. Whoever reads that field judges it;
        # of a plain configuration, which AutoTokenizer falls back to for other faults, it takes the model's type alone.
        config = PreTrainedConfig.from_pretrained(model, revision=revision or "main")
        return kind.from_pretrained(model, config=config, **options)


def _needs_code(model: str, revision: str | None) -> bool:
    """Whether the tokenizer's class comes with the checkpoint, which is never run: its tokenizer.json can be read without.

    ModelLoadError if there is no such file.
    """
    source = Source(model, revision)
    code = (source.json("tokenizer_config.json").get("auto_map") or {}).get("AutoTokenizer")
    if not code:
        return False
    if source.text("tokenizer.json") is None:
        raise ModelLoadError(
            f"the tokenizer of {model!r} is code that comes with the checkpoint, which is never run; put a tokenizer.json "
            "(a fast tokenizer) beside it",
            param="model",
        )
    return True


def _without_opening_space(backend: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, bool]:
    """A copy that puts no space before what it takes for the first text, and whether ``backend`` does.

    Prompts are encoded in pieces, each of which a tokenizer would take for the first.
    """
    values = json.loads(backend.to_str())
    outer = values.get("pre_tokenizer") or {}
    steps = [step for step in outer.get("pretokenizers", [outer]) if step.get("prepend_scheme") == "first"]
    for step in steps:
        step["prepend_scheme"] = "never"
    return tokenizers.Tokenizer.from_str(json.dumps(values)), bool(steps)


class StreamingDecoder:
    """Turns tokens that arrive one by one into text that only ever grows.

    A token may hold part of a character, and its text may depend on the token before it, so each step decodes a short
    window twice (with and without the new tokens) and emits the difference once it ends in a whole character.

    Of ``continued``, ids whose text the tokens go on from, nothing is emitted; without them the tokens begin a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continued: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        context = list(continued[-_MAX_CONTEXT_TOKENS:])
        if self._skip:
            context = tokenizer.without_special(context)
        # A beginning that was cut inside a character would take the bytes of whole ones behind it for broken, too.
        while tokenizer.decode(context, skip_special_tokens=self._skip).startswith("�"):
            del context[0]
        self._ids = context
        self._window_start = 0
        self._emitted = len(context)

    def push(self, token_ids: list[int]) -> str:
        """Text that became certain by adding ``token_ids``."""
        # A skipped token takes no place: what stands before it is the context of what stands behind it.
        self._ids.extend(self._tokenizer.without_special(token_ids) if self._skip else token_ids)
        before, now = self._window()
        if now.endswith("�"):
            return ""
        text = now[len(before) :]
        if text:  # else the window would hold no text, and a tokenizer that drops a text's first space drops the next
            self._window_start = self._emitted
        self._emitted = len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end, with U+FFFD for an unfinished character."""
        before, now = self._window()
        self._window_start = self._emitted = len(self._ids)
        return now[len(before) :]

    def _window(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        before = decode(self._ids[self._window_start : self._emitted], skip_special_tokens=self._skip)
        now = decode(self._ids[self._window_start :], skip_special_tokens=self._skip)
        return before, now


class StopStrings:
    """Finds stop strings in text that arrives in pieces, and holds back what might become one."""

    def __init__(self, stop: tuple[str, ...], *, include: bool = False) -> None:
        self._stop, self._include = stop, include
        self._held = ""
        self._max_held = max(map(len, stop), default=1) - 1

    def push(self, delta: str, *, last: bool = False) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string found (None while there is none).

        With ``last`` nothing is held back. After a stop string was found the rest of the text is dropped.
        """
        text = self._held + delta
        found = min(
            ((text.find(stop), stop) for stop in self._stop if stop in text), key=lambda hit: hit[0], default=None
        )
        if found is not None:
            position, stop = found
            self._held = ""
            return text[: position + (len(stop) if self._include else 0)], stop
        keep = 0 if last else self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(self._max_held, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
