"""The chat templates that mergekit 0.1.5 has by name, in texts of our own: same conversations, same prompts.

To the letter, with the spaces and line breaks that some of its texts leave between messages; `user_context` is its
name for the role of Alpaca's input.
"""

from __future__ import annotations

TEMPLATES = {
    "alpaca": r"""
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list %}
{{- (system[-1] | trim if system else '') ~ '\n\n' }}
{%- set titles = {'user': '### Instruction:\n', 'assistant': '### Response:\n', 'user_context': '### Input:\n'} %}
{%- for message in messages %}
    {%- if message.role in titles %}
        {{- titles[message.role] ~ message.content | trim ~ ('' if loop.last else '\n\n') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'assistant' %}{{- '### Response:\n' }}{%- endif %}
""",
    "chatml": r"""
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""",
    "exaone": r"""
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}{{- '        [|system|][|endofturn|]\n\n' }}{%- endif %}
    {{- '    [|' ~ message.role ~ '|]' ~ message.content ~ '\n' }}
    {{- '        ' ~ ('\n' if message.role == 'user' else '[|endofturn|]\n') ~ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '    [|assistant|]\n' }}{%- endif %}
""",
    "llama3": r"""
{%- for message in messages %}
    {{- (bos_token if loop.first else '') ~ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' }}
    {{- message.content | trim ~ '<|eot_id|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
""",
    "mistral": r"""
{%- set system = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}
{{- bos_token }}
{%- for message in (messages[1:] if system else messages) %}
    {%- if message.role != ('user', 'assistant')[loop.index0 % 2] %}
        {{- raise_exception('After a system message, if any, user and assistant must take turns.') }}
    {%- elif message.role == 'user' %}
        {{- ' [INST] ' ~ (system if loop.first else '') ~ message.content ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ message.content ~ eos_token }}
    {%- endif %}
{%- endfor %}
""",
}
