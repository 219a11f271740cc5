"""Thinking, as templates let one choose it: switched by their own variables, or closed behind their back.

Knows nothing of conversations. Used by ``prompt``.
"""

import re
from typing import Any, Literal

from mlx_optiq_ext.engine.render_form import REFUSALS
from mlx_optiq_ext.types.chat import ReasoningOptions

__all__ = ["Thinking"]

_CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_STRING = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
_NEAREST = {"minimal": "low", "xhigh": "high"}


class Thinking:
    """What one template offers.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        template: Its text.
        default: Where a request says nothing.
    """

    def __init__(self, tokenizer: Any, template: str, *, default: Literal["auto", "on", "off"]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._default = {"auto": None, "on": True, "off": False}[default]
        code = _STRING.sub("''", " ".join(_CODE.findall(template)))
        self._variables = {
            name
            for name in ("thinking", "reasoning_effort", "thinking_budget")
            if re.search(rf"(?<![\w.]){name}\b", code)
        }
        self._switches = tokenizer.has_chat_template and self._prompt(True) != self._prompt(False)

    @property
    def is_offered(self) -> bool:
        """Whether the template has thinking: a switch or a variable for it, or the family's own tags in it.

        A vocabulary may have the tags without the model ever having learnt them.
        """
        tags = (self._tokenizer.think_start, self._tokenizer.think_end)
        has_tags = self._tokenizer.has_thinking and any(tag and tag in self._template for tag in tags)
        return self._switches or bool(self._variables) or has_tags

    def keywords(self, options: ReasoningOptions) -> dict[str, Any]:
        """Arguments of the template for a request."""
        keywords: dict[str, Any] = {}
        enabled = self._enabled(options)
        if enabled is not None:
            keywords |= self._switch(enabled)
        if "reasoning_effort" in self._variables:
            effort = options.effort if enabled is not False else "minimal"
            if effort is not None:
                is_known = re.search(rf"['\"]{effort}['\"]", self._template)
                keywords["reasoning_effort"] = effort if is_known else _NEAREST.get(effort, effort)
        if "thinking_budget" in self._variables and options.budget is not None:
            keywords["thinking_budget"] = options.budget
        return keywords

    def closed(self, text: str, options: ReasoningOptions) -> str:
        """A prompt without thinking, where that is wanted and the template has no switch for it."""
        if not self._tokenizer.has_thinking or self._switches or self._enabled(options) is not False:
            return text
        start, end = self._tokenizer.think_start, self._tokenizer.think_end
        opened = text.rstrip().endswith(start)
        return f"{text.rstrip() if opened else text + start}\n\n{end}\n\n"

    def is_open(self, tokens: list[int]) -> bool:
        """Whether a prompt ends inside an open thinking tag."""
        if not self._tokenizer.has_thinking:
            return False
        start, end = self._tokenizer.rfind_think_start(tokens), self._tokenizer.rfind_think_end(tokens)
        return bool(start > end)

    def _enabled(self, options: ReasoningOptions) -> bool | None:
        if options.enabled is not None:
            return options.enabled
        return True if options.effort is not None else self._default

    def _switch(self, enabled: bool) -> dict[str, Any]:
        return {"enable_thinking": enabled} | ({"thinking": enabled} if "thinking" in self._variables else {})

    def _prompt(self, enabled: bool) -> Any:
        turns = [{"role": "user", "content": "Ask"}]
        try:
            return self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self._switch(enabled)
            )
        except REFUSALS:
            return None
