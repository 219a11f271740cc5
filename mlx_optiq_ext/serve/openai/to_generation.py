"""From requests of the OpenAI dialect to our own request type.

Knows the dialect and our types; neither templates nor HTTP beyond the names of headers. Called by the routes
on a worker thread, since pictures may be fetched.
"""

from collections.abc import Mapping, Sequence

import msgspec

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.serve.openai import schema
from mlx_optiq_ext.serve.openai.to_messages import to_messages
from mlx_optiq_ext.serve.openai.tools import to_tools
from mlx_optiq_ext.types.chat import Constraint, Generation, ReasoningOptions, Sampling

__all__ = ["chat_generations", "completion_generations", "prompts_of", "session_of"]

MAX_ANSWERS = 64


def chat_generations(
    request: schema.ChatRequest, images: ImageReader, headers: Mapping[str, str]
) -> list[Generation]:
    """Translate a chat request: one generation per answer it asks for.

    Raises:
        RequestError: It cannot be served; the message says which field and why.
    """
    if request.functions:
        raise RequestError(
            "functions are given as tools: {type: function, function: {...}}", param="functions"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    tools, tool_choice = to_tools(request)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    generation = Generation(
        model=request.model,
        adapter=request.adapter,
        messages=to_messages(request.messages, images),
        tools=tools,
        tool_choice=tool_choice,
        constraint=_constraint(request),
        reasoning=_reasoning(request),
        sampling=_sampling(request, logprobs),
        stop=_stop(request),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        session=session_of(request, headers),
    )
    return _seeded(generation, request.n or 1)


def completion_generations(request: schema.CompletionRequest, headers: Mapping[str, str]) -> list[Generation]:
    """Translate a legacy completion: ``n`` generations for each prompt, in order of the prompts.

    Raises:
        RequestError: It cannot be served; the message says which field and why.
    """
    prompts = prompts_of(request.prompt, "prompt")
    num_answers = request.n or 1
    if request.suffix:
        raise RequestError("a suffix (fill in the middle) is not supported", param="suffix")
    if request.best_of is not None and request.best_of != num_answers:
        raise RequestError("best_of must equal n, or be left out", param="best_of")
    if request.echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("echo needs prompts of text", param="echo")
    if request.echo and request.logprobs is not None:
        raise RequestError("log-probabilities of the prompt are not supported", param="echo")
    if len(prompts) * num_answers > MAX_ANSWERS:
        raise RequestError(
            f"{len(prompts)} prompts x {num_answers} answers; at most {MAX_ANSWERS}", param="prompt"
        )
    generation = Generation(
        model=request.model,
        adapter=request.adapter,
        constraint=_constraint(request),
        sampling=_sampling(request, request.logprobs),
        stop=_stop(request),
        max_tokens=request.max_tokens,
        session=session_of(request, headers),
    )
    return [
        each
        for prompt in prompts
        for each in _seeded(msgspec.structs.replace(generation, prompt=prompt), num_answers)
    ]


def prompts_of(given: str | Sequence[str | int | list[int]], param: str) -> tuple[str | tuple[int, ...], ...]:
    """Tell the four forms apart: a text, texts, token ids, lists of them.

    Raises:
        RequestError: They are mixed, or one is empty.
    """
    if isinstance(given, str):
        prompts: tuple[str | tuple[int, ...], ...] = (given,)
    elif all(isinstance(each, int) for each in given):
        prompts = (tuple(each for each in given if isinstance(each, int)),)
    elif all(isinstance(each, str) for each in given) or all(isinstance(each, list) for each in given):
        prompts = tuple(each if isinstance(each, str) else _ids(each) for each in given)
    else:
        raise RequestError("texts and token ids cannot be mixed", param=param)
    for prompt in prompts:
        if not prompt:
            raise RequestError("is empty; give at least one token", param=param)
        if not isinstance(prompt, str) and min(prompt) < 0:
            raise RequestError("token ids cannot be negative", param=param)
    return prompts


def session_of(request: schema.SamplingFields, headers: Mapping[str, str]) -> str:
    """Tell the session that a request belongs to: by header, else by its cache key or user; empty if none."""
    named = headers.get("x-session-affinity") or headers.get("x-session-id")
    return named or request.prompt_cache_key or request.user or ""


def _ids(given: str | int | list[int]) -> tuple[int, ...]:
    assert isinstance(given, list)
    return tuple(given)


def _seeded(generation: Generation, num_answers: int) -> list[Generation]:
    """The same request several times; answers of one seed still differ from each other."""
    seed = generation.sampling.seed
    if num_answers == 1 or seed is None:
        return [generation] * num_answers
    return [
        msgspec.structs.replace(
            generation, sampling=msgspec.structs.replace(generation.sampling, seed=seed + index)
        )
        for index in range(num_answers)
    ]


def _stop(request: schema.SamplingFields) -> tuple[str, ...]:
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def _sampling(request: schema.SamplingFields, logprobs: int | None) -> Sampling:
    return Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=None if request.top_k is None else max(request.top_k, 0),
        min_p=request.min_p,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        logit_bias=_logit_bias(request.logit_bias or {}),
        seed=request.seed,
        logprobs=logprobs,
    )


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    bias = {}
    for token, value in given.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            raise RequestError(f"{token[:40]!r} is no token id", param="logit_bias")
        bias[int(token)] = value
    return bias


def _constraint(request: schema.SamplingFields) -> Constraint | None:
    found: dict[str, Constraint] = {}
    form = request.response_format
    if form is not None and form.type == "json_object":
        found["response_format"] = Constraint(kind="json_object")
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise RequestError("json_schema needs a schema", param="response_format.json_schema")
        found["response_format"] = Constraint(
            kind="json_schema",
            value=form.json_schema.schema,
            param="response_format.json_schema.schema",
        )
    if request.guided_regex is not None:
        found["guided_regex"] = Constraint(kind="regex", value=request.guided_regex, param="guided_regex")
    if request.guided_grammar is not None:
        found["guided_grammar"] = Constraint(
            kind="lark", value=request.guided_grammar, param="guided_grammar"
        )
    if request.grammar is not None:
        found["grammar"] = Constraint(kind="lark", value=request.grammar, param="grammar")
    if len(found) > 1:
        raise RequestError(f"{' and '.join(found)} exclude each other", param=list(found)[-1])
    return next(iter(found.values()), None)


def _reasoning(request: schema.ChatRequest) -> ReasoningOptions:
    enabled = (request.chat_template_kwargs or {}).get("enable_thinking")
    if not (enabled is None or isinstance(enabled, bool)):
        raise RequestError("expected true or false", param="chat_template_kwargs.enable_thinking")
    effort = request.reasoning_effort
    if effort == "none":
        return ReasoningOptions(enabled=False)
    if effort is None:
        return ReasoningOptions(enabled=enabled)
    return ReasoningOptions(enabled=True if enabled is None else enabled, effort=effort)
