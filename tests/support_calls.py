"""The same calls as every family writes them; our own words in each family's form."""

from typing import Any

CITY: tuple[str, dict[str, Any]] = ("get_weather", {"city": 'Zürich, "Altstadt"', "days": 3})
FILE: tuple[str, dict[str, Any]] = (
    "write_file",
    {"path": "a/b.py", "content": "if x < 1:\n\tprint('é')\n    # </b>", "lines": [1, 2], "force": True},
)
CALLS = [CITY, FILE]

_JSON = (
    '{"name": "get_weather", "arguments": {"city": "Zürich, \\"Altstadt\\"", "days": 3}}',
    '{"name": "write_file", "arguments": {"path": "a/b.py", "content": '
    '"if x < 1:\\n\\tprint(\'\\u00e9\')\\n    # </b>", "lines": [1, 2], "force": true}}',
)
_CITY_JSON, _FILE_JSON = (text[text.index(', "arguments": ') + 15 : -1] for text in _JSON)
_CODE = "if x < 1:\n\tprint('é')\n    # </b>"


def _glm(prefix: str) -> str:
    def argument(key: str, value: str) -> str:
        return f"<{prefix}arg_key>{key}</{prefix}arg_key>\n<{prefix}arg_value>{value}</{prefix}arg_value>\n"

    block = "<{0}tool_call>{1}\n{2}</{0}tool_call>"
    return (
        block.format(prefix, "get_weather", argument("city", 'Zürich, "Altstadt"') + argument("days", "3"))
        + "\n"
        + block.format(
            prefix,
            "write_file",
            argument("path", "a/b.py")
            + argument("content", _CODE)
            + argument("lines", "[1, 2]")
            + argument("force", "true"),
        )
    )


def _xml(call: str, call_end: str, argument: str, argument_end: str, *, line: str = "") -> list[str]:
    values = [
        {"city": 'Zürich, "Altstadt"', "days": "3"},
        {"path": "a/b.py", "content": _CODE, "lines": "[1, 2]", "force": "true"},
    ]
    return [
        call.format(name)
        + "\n"
        + "".join(f"{argument.format(key)}{line}{value}{line}{argument_end}\n" for key, value in each.items())
        + call_end
        for (name, _), each in zip(CALLS, values, strict=True)
    ]


_GEMMA = [
    'call:get_weather{city:<|"|>Zürich, "Altstadt"<|"|>,days:3}',
    f'call:write_file{{path:<|"|>a/b.py<|"|>,content:<|"|>{_CODE}<|"|>,lines:[1, 2],force:true}}',
]
_KIMI3 = [
    '<|open|>call tool="get_weather" index="1"<|sep|>'
    '<|open|>argument key="city" type="string"<|sep|>Zürich, "Altstadt"<|close|>argument<|sep|>'
    '<|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|><|close|>call<|sep|>',
    '<|open|>call tool="write_file" index="2"<|sep|>'
    '<|open|>argument key="path" type="string"<|sep|>a/b.py<|close|>argument<|sep|>'
    f'<|open|>argument key="content" type="string"<|sep|>{_CODE}<|close|>argument<|sep|>'
    '<|open|>argument key="lines" type="array"<|sep|>[1, 2]<|close|>argument<|sep|>'
    '<|open|>argument key="force" type="boolean"<|sep|>true<|close|>argument<|sep|><|close|>call<|sep|>',
]

ANSWERS: dict[str, str] = {
    "json_tools": "".join(f"<tool_call>\n{text}\n</tool_call>\n" for text in _JSON),
    "mistral": f"[TOOL_CALLS]get_weather[ARGS]{_CITY_JSON}[TOOL_CALLS]write_file[ARGS]{_FILE_JSON}",
    "kimi_k2": "<|tool_calls_section_begin|>"
    f"<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{_CITY_JSON}<|tool_call_end|>"
    f"<|tool_call_begin|>functions.write_file:1<|tool_call_argument_begin|>{_FILE_JSON}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "kimi_k3": "<|open|>tools<|sep|>" + "\n".join(_KIMI3) + "<|close|>tools<|sep|>",
    "glm47": _glm(""),
    "longcat": _glm("longcat_"),
    "qwen3_coder": "\n".join(
        f"<tool_call>\n{text}\n</tool_call>"
        for text in _xml("<function={}>", "</function>", "<parameter={}>", "</parameter>", line="\n")
    ),
    "minimax_m2": "<minimax:tool_call>\n"
    + "\n".join(_xml('<invoke name="{}">', "</invoke>", '<parameter name="{}">', "</parameter>"))
    + "\n</minimax:tool_call>",
    "minicpm5": "\n".join(_xml('<function name="{}">', "</function>", '<param name="{}">', "</param>")),
    "muse_spark": "<atem:function_calls>\n"
    + "\n".join(
        _xml('<atem:invoke name="{}">', "</atem:invoke>", '<atem:parameter name="{}">', "</atem:parameter>")
    )
    + "\n</atem:function_calls>",
    "gemma4": "".join(f"<|tool_call>{text}<tool_call|>" for text in _GEMMA),
    "function_gemma": "".join(
        f"<start_function_call>{text.replace('<|' + chr(34) + '|>', '<escape>')}<end_function_call>"
        for text in (_GEMMA[0], _GEMMA[1].replace(",lines:[1, 2]", ""))
    ),
    "pythonic": "<|tool_call_start|>[get_weather(city='Zürich, \"Altstadt\"', days=3), "
    'write_file(path="a/b.py", content="if x < 1:\\n\\tprint(\'é\')\\n    # </b>", lines=[1, 2], '
    "force=True)]<|tool_call_end|>",
}
ANSWERS["laguna"] = ANSWERS["glm47"]
JSON_CALLS = _JSON
