"""The chat template (Jinja) of exported models: it renders conversations exactly as chat/native.py does.

Text is always between special tokens, so that token ids are the same too. Consecutive parts of plain text become one text. Text
that contains a special token is refused, because a template cannot mark it as plain text.

`generation` blocks mark what is supervised: one block for all of it up to the next tool output. A block should end with a special
token: if it ends with a character of several tokens, transformers counts only the first of these. It does end with one, unless
tool output follows plain text without a call.
"""

from __future__ import annotations

import json

from chattrain.tokenizer import Tokenizer

CHAT_TEMPLATE = """\
{%- macro text(content, i) -%}
{%- for name in [SPECIAL_TOKENS] -%}
{%- if name in content -%}
{{- raise_exception('message ' ~ i ~ ' holds the text ' ~ name ~ ', which the tokenizer would take for the special token') -}}
{%- endif -%}
{%- endfor -%}
{{- content -}}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] is not defined or message['content'] is not defined or message['content'] is none -%}
{{- raise_exception('message ' ~ loop.index0 ~ ' needs `role` and `content`') -}}
{%- endif -%}
{%- endfor -%}
{%- if messages[0]['role'] == 'system' -%}
{%- if messages | length < 2 or messages[1]['role'] != 'user' -%}
{{- raise_exception('a system message must be followed by a user message') -}}
{%- endif -%}
{%- if messages[0]['content'] is not string -%}
{{- raise_exception('system and first user message must be strings') -}}
{%- endif -%}
{%- set system = messages[0]['content'] ~ '\\n\\n' -%}
{%- set first = 1 -%}
{%- else -%}
{%- set system = '' -%}
{%- set first = 0 -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in messages[first:] -%}
{%- set i = loop.index0 + first -%}
{%- set expected = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
{%- set content = message['content'] -%}
{%- if message['role'] != expected -%}
{{- raise_exception('message ' ~ i ~ ' is from ' ~ message['role'] ~ ' where ' ~ expected ~ ' must speak') -}}
{%- endif -%}
{%- if expected == 'user' -%}
{%- if content is not string -%}
{{- raise_exception('message ' ~ i ~ ': the content of a user must be a string') -}}
{%- endif -%}
{{- '<|user_start|>' ~ text((system if loop.first else '') ~ content, i) ~ '<|user_end|>' -}}
{%- else -%}
{%- if content is string -%}
{%- set content = [{'type': 'text', 'text': content}] -%}
{%- elif content is mapping or content is not iterable or not content -%}
{{- raise_exception('message ' ~ i ~ ': the content of an assistant must be a string or a list of parts') -}}
{%- endif -%}
{{- '<|assistant_start|>' -}}
{%- set run = namespace(done='', plain='') -%}
{%- for part in content -%}
{%- if part is not mapping or part['text'] is not string -%}
{{- raise_exception('message ' ~ i ~ ': a part must have a `type` and a string `text`') -}}
{%- endif -%}
{%- if part['type'] == 'text' -%}
{%- set run.plain = run.plain ~ part['text'] -%}
{%- else -%}
{%- set run.done = run.done ~ text(run.plain, i) -%}
{%- set run.plain = '' -%}
{%- if part['type'] == 'python' -%}
{%- set run.done = run.done ~ '<|python_start|>' ~ text(part['text'], i) ~ '<|python_end|>' -%}
{%- elif part['type'] == 'python_output' -%}
{%- generation -%}{{- run.done -}}{%- endgeneration -%}
{%- set run.done = '' -%}
{{- '<|output_start|>' ~ text(part['text'], i) ~ '<|output_end|>' -}}
{%- else -%}
{{- raise_exception('message ' ~ i ~ ': unknown part type; known are text, python, python_output') -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- generation -%}{{- run.done ~ text(run.plain, i) ~ '<|assistant_end|>' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if messages[-1]['role'] == 'assistant' -%}
{{- raise_exception('nobody waits for a reply: the last message is from the assistant already') -}}
{%- endif -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
"""


def chat_template(tokenizer: Tokenizer) -> str:
    """The template of a tokenizer, with the names of all its special tokens filled in."""
    return CHAT_TEMPLATE.replace("[SPECIAL_TOKENS]", json.dumps(sorted(tokenizer.encoding._special_tokens)))
