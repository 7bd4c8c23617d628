"""A tiny tokenizer of the kind that SentencePiece makes: words bring the space before them, and the first one drops it."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
WORDS = tuple(SPACE + word for word in ("Hello", "world", "the", "a"))
TEMPLATE = """\
{%- for message in messages -%}
{{- '<s>' + message.role + ':' + message.content -}}{%- if message.role == 'assistant' -%}</s>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<s>assistant:{%- endif -%}
"""


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As those of Llama and Mistral: four words, single characters, and bytes for all others."""
    characters = (SPACE, *string.ascii_letters, *string.digits, *string.punctuation)
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    pieces += [*((character, -10.0) for character in characters), *((word, -1.0) for word in WORDS)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"call_token": "<|call|>"},
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
