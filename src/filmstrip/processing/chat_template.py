"""Messages to prompt pieces through the checkpoint's chat template; text typed by people stays text.

Control tokens are recognised only where the template itself wrote them. Before rendering, every control token spelled
inside a message gets an invisible mark after its first character; after rendering the prompt is split at the unmarked
ones and the marks are taken out. The mark is a Unicode noncharacter that occurs in no message.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from filmstrip.errors import InvalidRequestError, ModelLoadError
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.tokenizer import Tokenizer

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_PROBE = "filmstrip"
"""A text to find out which contents a template shows: many look for strings only, some for parts only."""
_BETWEEN_PARTS = "\n"
"""Between the texts of a message whose parts become one string, as in vLLM."""
# What the renderer takes for itself; everything else is a variable of the template.
_RESERVED_KWARGS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}


class ChatTemplate:
    """Renders conversations with the template that came with the checkpoint, or another."""

    def __init__(self, tokenizer: Tokenizer, files: CheckpointFiles, given: str | None = None) -> None:
        """Take the template ``given``, a file or the template itself, in place of the checkpoint's own.

        That is the tokenizer's, ``chat_template.jinja`` or ``chat_template.json``, else that of the checkpoint's format.
        ModelLoadError if there is none, or it is not valid Jinja.
        """
        self._tokenizer = tokenizer
        self._media_marks = files.translation.media_marks
        template = (
            _given_template(given)
            if given is not None
            else tokenizer.hf.chat_template
            or files.text("chat_template.jinja")
            or files.json("chat_template.json").get("chat_template")
            or files.translation.chat_template
        )
        if isinstance(template, Mapping):  # several, by name
            template = template.get("default")
        if not template:
            raise ModelLoadError(
                f"{files.model!r} has no chat template, so it cannot answer messages; give one with --chat-template "
                "(chat_template), or put one beside it as chat_template.jinja",
                param="model",
            )
        self._template = template
        shows_strings, shows_parts = self._shows(_PROBE), self._shows(_as_parts(_PROBE))
        self._shows_parts_only = shows_parts and not shows_strings
        self._shows_strings_only = shows_strings and not shows_parts
        prefixes = {token[:end] for token in tokenizer.special_tokens for end in range(1, len(token))}
        self._prefixes = sorted(prefixes, key=len, reverse=True)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str | int]:
        """Text pieces and control token ids of the prompt, in order.

        Raises InvalidRequestError when the template refuses the messages or ``template_kwargs`` names a reserved variable.
        """
        reserved = sorted(_RESERVED_KWARGS & set(template_kwargs or ()))
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {', '.join(reserved)}", param="chat_template_kwargs"
            )
        mark = self._choose_mark(messages)
        if self._shows_parts_only:
            messages = [{**message, "content": _as_parts(message.get("content"))} for message in messages]
        try:
            rendered = self._tokenizer.hf.apply_chat_template(
                [self._join_parts(self._protect(message, mark)) for message in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(template_kwargs or {}),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        pieces = self._tokenizer.split_special(rendered)
        plain = [piece.replace(mark, "") if isinstance(piece, str) else piece for piece in pieces]
        if plain and isinstance(plain[0], str):
            plain[0] = self._tokenizer.opening(plain[0])
        return plain

    def _shows(self, content: Any) -> bool:
        """Whether the words of a message with this ``content`` get into the prompt, and not as code that spells a list."""
        try:
            rendered = self._tokenizer.hf.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=self._template, tokenize=False
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelLoadError(
                f"line {error.lineno} of the chat template is not valid Jinja: {error.message}", param="chat_template"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            return False
        return _PROBE in rendered and not any(quote + _PROBE + quote in rendered for quote in "'\"")

    def _choose_mark(self, messages: Sequence[Mapping[str, Any]]) -> str:
        used: set[str] = set()
        for text in _strings(messages):
            used.update(re.findall("[\ufdd0-\ufdef]", text))
        free = next((mark for mark in _NONCHARACTERS if mark not in used), None)
        if free is None:
            raise InvalidRequestError("messages use all Unicode noncharacters U+FDD0..U+FDEF", param="messages")
        return free

    def _join_parts(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its content as one string, for templates that take no list of parts."""
        content = message.get("content")
        if not (self._media_marks or self._shows_strings_only) or not isinstance(content, list):
            return message
        texts: list[str] = []
        for part in content:
            text = part["text"] if part["type"] == "text" else self._media_marks.get(part["type"])
            if text is None:
                raise InvalidRequestError(f"this model takes no {part['type'].replace('_', ' ')}", param="messages")
            texts.append(text)
        return message | {"content": ("" if self._media_marks else _BETWEEN_PARTS).join(texts)}

    def _protect(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._protect_text(value, mark)
        if isinstance(value, Mapping):
            return {key: self._protect(inner, mark) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._protect(inner, mark) for inner in value]
        return value

    def _protect_text(self, text: str, mark: str) -> str:
        text = self._tokenizer.special_pattern.sub(lambda match: match.group()[0] + mark + match.group()[1:], text)
        # The end of one part could complete a control token with the start of what the template puts behind it.
        tail = next((prefix for prefix in self._prefixes if text.endswith(prefix)), None)
        if tail is not None:
            at = len(text) - len(tail) + 1
            text = text[:at] + mark + text[at:]
        return text


def _given_template(given: str) -> str:
    """The template that ``given`` is, or that the file of this name holds."""
    if "{{" in given or "{%" in given:
        return given
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ModelLoadError(f"cannot read the chat template {given}: {reason}", param="chat_template") from error
    if not text.strip():
        raise ModelLoadError(f"the chat template {given} is empty", param="chat_template")
    return text


def _as_parts(content: Any) -> Any:
    """A message's content as a list of parts, also where it is a string."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _strings(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _strings(inner)]
    return []
