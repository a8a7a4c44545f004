"""What a client asks, checked: OpenAI's completions and chat completions, as far as one model can answer them.

What would be ignored is refused by name: a harness must not believe in a setting that does nothing.
Source: OpenAI API reference, "Completions" and "Chat".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.validate.endpoint.vocabulary import Vocabulary

# Settings that do nothing at these values, so nothing is lost; at any other they are refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "min_p": (0,),
    "top_k": (0, -1),
    "do_sample": (True, False),
}
# They say nothing about the answer.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"}
_SHARED = {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"}
_COMPLETION = _SHARED | {"prompt", "echo", "logprobs", "skip_special_tokens"}
_CHAT = _SHARED | {"messages", "max_completion_tokens", "tools", "tool_choice", "reasoning_effort", "logprobs"}
_CHAT |= {"top_logprobs", "chat_template_kwargs"}
_TEMPLATE = ("reasoning_effort", "model_identity", "builtin_tools")
WORD = 16384  # characters
_RUNS = re.compile(r"\w+|\s+|[^\w\s]+")
_PROMPTS, _STOPS, _LOGPROBS = 256, 64, 20


class ApiError(Exception):
    """An answer that is an error. Statuses as OpenAI uses them; `param` is the setting at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Sampling:
    """max_tokens None: as many as the context leaves. seed None: another text each time. stop: never in the text."""

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Completion:
    """logprobs: how many of the likeliest tokens to give, None for no log-probabilities. special: written out."""

    prompts: tuple[str | tuple[int, ...], ...]
    sampling: Sampling
    echo: bool
    logprobs: int | None
    special: bool
    stream: bool
    usage: bool


@dataclass(frozen=True)
class Chat:
    """`template`: what the chat template is given: messages, tools and the settings that it knows."""

    template: Mapping[str, Any]
    sampling: Sampling
    stream: bool
    usage: bool


def completion(asked: Mapping[str, Any]) -> Completion:
    """Raises ApiError."""
    _require_known(asked, _COMPLETION)
    logprobs = _number(asked, "logprobs", None, 0, _LOGPROBS, whole=True)
    return Completion(
        _prompts(asked.get("prompt")),
        _sampling(asked, _number(asked, "max_tokens", 16, 0, 1 << 30, whole=True)),
        _flag(asked, "echo"),
        None if logprobs is None else int(logprobs),
        not _flag(asked, "skip_special_tokens", True),
        *_streaming(asked),
    )


def chat(asked: Mapping[str, Any]) -> Chat:
    """Raises ApiError."""
    _require_known(asked, _CHAT)
    for name in ("logprobs", "top_logprobs"):
        if asked.get(name) not in (None, False, 0):
            raise ApiError(400, f"{name} is given for completions only, not for chat completions", name)
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is not a list with messages", "messages")
    template: dict[str, Any] = {"messages": [_message(m, i) for i, m in enumerate(messages)]}
    more = asked.get("chat_template_kwargs") or {}
    if not isinstance(more, dict) or more.keys() - set(_TEMPLATE):
        raise ApiError(400, f"chat_template_kwargs takes {', '.join(_TEMPLATE)}", "chat_template_kwargs")
    template |= more
    if asked.get("reasoning_effort") is not None:
        if not isinstance(asked["reasoning_effort"], str):
            raise ApiError(400, "reasoning_effort is low, medium or high", "reasoning_effort")
        template["reasoning_effort"] = asked["reasoning_effort"]
    if tools := _tools(asked):
        template["tools"] = tools
    name = "max_completion_tokens" if asked.get("max_completion_tokens") is not None else "max_tokens"
    return Chat(template, _sampling(asked, _number(asked, name, None, 1, 1 << 30, whole=True)), *_streaming(asked))


def text(asked: Mapping[str, Any]) -> str:
    """What is to be tokenized. Raises ApiError."""
    if not isinstance(asked.get("prompt"), str):
        raise ApiError(400, "prompt is not a text", "prompt")
    return splittable(str(asked["prompt"]))


def splittable(prompt: str) -> str:
    """The prompt, if a tokenizer can take it: llama.cpp's recurses over each word and ends at tens of thousands.

    Raises ApiError.
    """
    if any(run.end() - run.start() > WORD for run in _RUNS.finditer(prompt)):
        raise ApiError(400, f"the prompt has a word or gap of more than {WORD:,} characters", "prompt")
    return prompt


def tokens(asked: Mapping[str, Any], vocabulary: Vocabulary) -> list[int]:
    """What is to be written as text. Raises ApiError."""
    found = asked.get("tokens")
    if not isinstance(found, list) or not all(type(t) is int and 0 <= t < len(vocabulary.pieces) for t in found):
        raise ApiError(400, f"tokens is not a list of numbers below {len(vocabulary.pieces):,}", "tokens")
    return found


def _require_known(asked: Mapping[str, Any], known: set[str]) -> None:
    for name, value in asked.items():
        if name in known or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f"unknown setting {name[:60]!a}", name[:60], "unknown_parameter")
        if value not in _NEUTRAL[name]:
            raise ApiError(400, f"{name} is not supported here", name, "unsupported_parameter")
    if not isinstance(asked.get("model", ""), str | None):
        raise ApiError(400, "model is not a name", "model")


def _sampling(asked: Mapping[str, Any], max_tokens: float | None) -> Sampling:
    seed = _number(asked, "seed", None, -(1 << 63), 1 << 63, whole=True)
    stop = asked.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > _STOPS or not all(isinstance(s, str | None) for s in stops):
        raise ApiError(400, f"stop is not a text or a list of at most {_STOPS}", "stop")
    return Sampling(
        None if max_tokens is None else int(max_tokens),
        float(_number(asked, "temperature", 1.0, 0, 100) or 0),
        float(_number(asked, "top_p", 1.0, 0, 1) or 1e-9),  # 0: the likeliest token alone
        None if seed is None else int(seed),
        tuple(s for s in stops if s),
    )


def _streaming(asked: Mapping[str, Any]) -> tuple[bool, bool]:
    options = asked.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options is not an object", "stream_options")
    return _flag(asked, "stream"), bool(options.get("include_usage"))


def _number(
    asked: Mapping[str, Any], name: str, default: float | None, low: float, high: float, whole: bool = False
) -> float | None:
    value = asked.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) == math.inf:
        raise ApiError(400, f"{name} is not a number", name)
    if (whole and value != int(value)) or not low <= value <= high:
        raise ApiError(
            400, f"{name} is {str(value)[:40]}, not a{' whole' if whole else ''} number in [{low}, {high}]", name
        )
    return value


def _flag(asked: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = asked.get(name)
    if not isinstance(value, bool | None):
        raise ApiError(400, f"{name} is not true or false", name)
    return default if value is None else value


def _prompts(prompt: Any) -> tuple[str | tuple[int, ...], ...]:
    """One text, some texts, the tokens of one, or of some."""
    if isinstance(prompt, str):
        return (prompt,)
    if _is_tokens(prompt):
        return (tuple(prompt),)
    if not isinstance(prompt, list) or not 1 <= len(prompt) <= _PROMPTS:
        raise ApiError(400, f"prompt is not a text, a list of tokens, or at most {_PROMPTS} of them", "prompt")
    if not all(isinstance(p, str) or _is_tokens(p) for p in prompt):
        raise ApiError(400, "prompt holds something that is neither a text nor a list of tokens", "prompt")
    return tuple(p if isinstance(p, str) else tuple(p) for p in prompt)


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(t) is int for t in prompt)


def _tools(asked: Mapping[str, Any]) -> list[Any]:
    tools, choice = asked.get("tools") or [], asked.get("tool_choice")
    sound = isinstance(tools, list) and all(
        isinstance(t, dict) and t.get("type") == "function" and isinstance(t.get("function"), dict) for t in tools
    )
    if not sound:
        raise ApiError(400, 'tools is not a list of {"type": "function", "function": {...}}', "tools")
    if choice not in (None, "auto", "none"):
        raise ApiError(400, 'tool_choice is "auto" or "none": a call cannot be forced here', "tool_choice")
    return [] if choice == "none" else tools


def _message(message: Any, number: int) -> dict[str, Any]:
    """As chat templates take it: content as one text, arguments of calls as objects."""
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f'{where} has no "role"', where)
    out = {key: value for key, value in message.items() if value is not None}
    content = out.get("content", "")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        if not all(isinstance(p, str) for p in parts):
            raise ApiError(400, f"{where}.content holds something other than text", where)
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.content is not a text", where)
    if content or message["role"] != "assistant":
        out["content"] = content
    if "tool_calls" in out:
        out["tool_calls"] = [_call(each, where) for each in _listed(out["tool_calls"], where)]
    return out


def _listed(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list):
        raise ApiError(400, f"{where}.tool_calls is not a list", where)
    return calls


def _call(call: Any, where: str) -> dict[str, Any]:
    """Arguments come as JSON in a text; a template writes them as JSON itself."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}.tool_calls holds a call without a function's name", where)
    arguments = function.get("arguments", "")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            raise ApiError(400, f"{where}: the arguments of {function['name'][:60]!a} are not JSON", where) from None
    return {**call, "function": {**function, "arguments": arguments}}
