"""The chat template (Jinja) of exported models: it renders conversations exactly as chat/native.py does.

Text is always between special tokens, so that token ids are the same too. Consecutive parts of plain text become one text. Text
that contains a special token is refused, because a template cannot mark it as plain text. Null padding is not removed, and fields
that the format has no place for, such as thoughts, are left out without a word.

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
{%- macro plain(content, i) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is mapping or content is not iterable or not content -%}
{{- raise_exception('message ' ~ i ~ ': content must be a string or a list of parts') -}}
{%- else -%}
{%- for part in content -%}
{%- if part is not mapping or part['text'] is not string -%}
{{- raise_exception('message ' ~ i ~ ': a part must have a `type` and a string `text`') -}}
{%- elif part['type'] != 'text' -%}
{{- raise_exception('message ' ~ i ~ ': unknown part type; known are text') -}}
{%- endif -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro role_of(message) -%}
{%- if message['role'] in ['function', 'ipython', 'observation'] -%}
tool
{%- elif message['role'] == 'developer' -%}
system
{%- else -%}
{{- message['role'] -}}
{%- endif -%}
{%- endmacro -%}
{%- macro written(call, i) -%}
{%- set function = call['function'] if call['function'] else call -%}
{%- set arguments = function['arguments'] if function['arguments'] else {} -%}
{{- '<|python_start|>' -}}
{{- text(function['name'] ~ '(' ~ (arguments if arguments is string else arguments | tojson) ~ ')', i) -}}
{{- '<|python_end|>' -}}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] is not defined
    or (message['content'] is not defined or message['content'] is none)
    and not message['tool_calls'] and not message['function_call'] -%}
{{- raise_exception('message ' ~ loop.index0 ~ ' needs `role` and `content`') -}}
{%- endif -%}
{%- endfor -%}
{%- set talk = namespace(before='', system='', results=0, called=false) -%}
{%- set first = 0 -%}
{%- if role_of(messages[0]) == 'system' -%}
{%- if messages | length < 2 or messages[1]['role'] != 'user' -%}
{{- raise_exception('a system message must be followed by a user message') -}}
{%- endif -%}
{%- set talk.system = plain(messages[0]['content'], 0) ~ '\\n\\n' -%}
{%- set first = 1 -%}
{%- endif -%}
{%- if tools -%}
{%- for tool in tools -%}
{%- set talk.system = talk.system ~ (tool | tojson) ~ ('\\n\\n' if loop.last else '\\n') -%}
{%- endfor -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in messages[first:] -%}
{%- set i = loop.index0 + first -%}
{%- set role = role_of(message) -%}
{%- set allowed = ['assistant'] if talk.before == 'user' else ['assistant', 'tool'] if talk.before == 'tool'
    else ['user', 'tool'] if talk.before == 'assistant' else ['user'] -%}
{%- if role not in allowed -%}
{{- raise_exception('message ' ~ i ~ ' is from ' ~ message['role'] ~ ' where ' ~ allowed[0] ~ ' must speak') -}}
{%- endif -%}
{%- if role == 'user' -%}
{{- '<|user_start|>' ~ text(talk.system ~ plain(message['content'], i), i) ~ '<|user_end|>' -}}
{%- set talk.system = '' -%}
{%- elif role == 'tool' -%}
{%- set talk.results = talk.results - 1 -%}
{%- if talk.results < 0 -%}
{{- raise_exception('message ' ~ i ~ ' is from tool, but no call before it waits for a result') -}}
{%- elif not talk.called -%}
{{- '<|output_start|>' ~ text(plain(message['content'], i), i) ~ '<|output_end|>' -}}
{%- endif -%}
{%- else -%}
{%- set content = message['content'] if message['content'] else '' -%}
{%- set calls = message['tool_calls'] if message['tool_calls']
    else [message['function_call']] if message['function_call'] else [] -%}
{%- if content is string -%}
{%- set content = [{'type': 'text', 'text': content}] -%}
{%- endif -%}
{%- if content is mapping or content is not iterable or not (content or calls)
    or (message['content'] is not string and message['content'] is iterable and not message['content'] and not calls) -%}
{{- raise_exception('message ' ~ i ~ ': content must be a string or a list of parts') -}}
{%- endif -%}
{%- if talk.before == 'user' -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
{%- set run = namespace(done='', plain='', waiting=0, found=none, open=true) -%}
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
{%- set run.waiting = run.waiting + 1 -%}
{%- set run.done = run.done ~ '<|python_start|>' ~ text(part['text'], i) ~ '<|python_end|>' -%}
{%- elif part['type'] == 'python_output' -%}
{%- set run.waiting = run.waiting - 1 -%}
{%- generation -%}{{- run.done -}}{%- endgeneration -%}
{%- set run.done = '' -%}
{{- '<|output_start|>' ~ text(part['text'], i) ~ '<|output_end|>' -}}
{%- else -%}
{{- raise_exception('message ' ~ i ~ ': unknown part type; known are text, python, python_output') -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- set run.done = run.done ~ text(run.plain, i) -%}
{%- set run.plain = '' -%}
{%- for call in calls -%}
{%- set k = loop.index0 -%}
{%- set run.found = none -%}
{%- set run.open = true -%}
{%- for result in messages[i + 1:] -%}
{%- set run.open = run.open and role_of(result) == 'tool' -%}
{%- set by_id = call['id'] and result['tool_call_id'] -%}
{%- if run.open and (call['id'] == result['tool_call_id'] if by_id else loop.index0 == k) -%}
{%- set run.found = result -%}
{%- endif -%}
{%- endfor -%}
{%- set run.done = run.done ~ written(call, i) -%}
{%- if run.found is not none -%}
{%- generation -%}{{- run.done -}}{%- endgeneration -%}
{%- set run.done = '' -%}
{{- '<|output_start|>' ~ text(plain(run.found['content'], i), i) ~ '<|output_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- set talk.called = calls | length > 0 -%}
{%- set talk.results = calls | length if calls else run.waiting -%}
{%- if loop.last or role_of(messages[i + 1]) != 'tool' -%}
{%- generation -%}{{- run.done ~ '<|assistant_end|>' -}}{%- endgeneration -%}
{%- else -%}
{%- generation -%}{{- run.done -}}{%- endgeneration -%}
{%- endif -%}
{%- endif -%}
{%- set talk.before = role -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if talk.before == 'assistant' -%}
{{- raise_exception('nobody waits for a reply: the last message is from the assistant already') -}}
{%- elif talk.before == 'user' -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
{%- endif -%}
"""


def chat_template(tokenizer: Tokenizer) -> str:
    """The template of a tokenizer, with the names of all its special tokens filled in."""
    return CHAT_TEMPLATE.replace("[SPECIAL_TOKENS]", json.dumps(sorted(tokenizer.encoding._special_tokens)))
