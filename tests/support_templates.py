# ruff: noqa: E501  templates are easier to read in their own lines
"""Short chat templates of our own, each as strict and as capable as a kind that models come with."""

from mlx_lm.tokenizer_utils import TokenizerWrapper
from support_answers import tokenizer, wrapper

__all__ = ["MARKERS", "TEMPLATES", "templated"]

_CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
_ROLES = (
    "{% set ns = namespace(user=true) %}{% for m in body %}{% if m.role == 'user' or (m.role == 'assistant' "
    "and not m.tool_calls) %}{% if (m.role == 'user') != ns.user %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% set ns.user = not ns.user %}{% endif %}{% endfor %}"
)
_SPLIT = (
    "{% if messages[0].role == 'system' %}{% set head = messages[0].content %}{% set body = messages[1:] %}"
    "{% else %}{% set head = '' %}{% set body = messages %}{% endif %}"
)

TEMPLATES = {
    # Everything: system anywhere, tools, thinking with a switch.
    "chatml": "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n"
    "{% endif %}" + _TOOLS + "<|im_end|>\n{% endif %}{% for m in messages %}"
    "{% if not (loop.first and tools and m.role == 'system') %}<|im_start|>"
    "{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
    "{% elif m.role == 'assistant' %}{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}"
    + _CALLS
    + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    # No tools, and a system message of its own where none is given.
    "small": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # Trims, refuses parallel calls, always opens the thinking.
    "headers": "<s>{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n"
    "{% if loop.first and tools %}" + _TOOLS + "{% endif %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n<think>\n{% endif %}",
    # System in the last user turn, strict roles, identifiers of nine letters, no user after a result.
    "inst": _SPLIT + _ROLES + "<s>{% for m in body %}{% if m.role == 'user' %}"
    "{% if tools and loop.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% elif tools and loop.first %}[TOOLS]"
    "{{ tools | tojson }}[/TOOLS]{% endif %}[INST] {% if loop.first and head %}{{ head }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('identifiers have nine letters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]</s>{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}"
    "[/TOOL_RESULTS]{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}",
    # Neither system nor tools, roles in turn.
    "turns": "<s>{% for m in messages %}{% if m.role not in ('user', 'assistant') or "
    "(m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}",
    # The identifier is all that tells a call's name; arguments are text.
    "ids": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<turn>{{ m.role }}\n"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }} {% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.id }} {{ '' + c.function.arguments }}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}",
}
MARKERS = {
    "special": (
        "<|im_start|>",
        "<|im_end|>",
        "<|start|>",
        "<|end|>",
        "<|eot|>",
        "[INST]",
        "[/INST]",
        "<turn>",
        "<end>",
    ),
    "plain": ("<tool_response>", "</tool_response>", "  "),
}


def templated(name: str | None, family: str | None = None, *, thinks: bool = False) -> TokenizerWrapper:
    """A wrapped byte tokenizer with one of the templates; None: without any."""
    plain = MARKERS["plain"]
    plain += ("<think>", "</think>") if thinks else ()
    plain += ("<tool_call>", "</tool_call>") if family == "json_tools" else ()
    made = tokenizer(special=MARKERS["special"], plain=plain)
    made.chat_template = TEMPLATES[name] if name is not None else None
    return wrapper(family, made=made)
