"""Chat templates of formats whose checkpoints bring none: messages whose content is one string in, the prompt out.

The words are those that the models were trained with (``conversation.py`` of haotian-liu/LLaVA and of 01-ai/Yi, VL); any
others make answers worse.
"""

from __future__ import annotations

_ROLES = """\
{%- if messages[0].role == 'system' -%}
{%- set system, turns = messages[0].content, messages[1:] -%}
{%- else -%}
{%- set system, turns = default_system, messages -%}
{%- endif -%}
"""

VICUNA_V1 = (
    """\
{%- set default_system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives \
helpful, detailed, and polite answers to the user's questions." -%}
"""
    + _ROLES
    + """\
{{- system + ' ' -}}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{{- 'USER: ' + message.content + ' ' -}}
{%- elif message.role == 'assistant' -%}
{{- 'ASSISTANT: ' + message.content + eos_token -}}
{%- else -%}
{{- raise_exception('this conversation has the roles system (first), user and assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""
)
"""``vicuna_v1``, LLaVA 1.5's and 1.6's on Vicuna."""

YI_VL = (
    """\
{%- set default_system = "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI \
assistant. Read all the images carefully, and respond to the human's questions with informative, helpful, detailed and \
polite answers. 这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。仔细阅读所有的图像，\
并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。" -%}
"""
    + _ROLES
    + """\
{{- system + '\\n\\n' -}}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{{- '### Human: ' + message.content + '\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '### Assistant: ' + message.content + '\\n' -}}
{%- else -%}
{{- raise_exception('this conversation has the roles system (first), user and assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '### Assistant:' -}}
{%- endif -%}
"""
)
"""``mm_default``, Yi-VL's; a turn ends where the next one's ``###`` would begin."""
