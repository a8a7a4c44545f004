"""Renders conversations with a checkpoint's chat template, alone in a child process.

A template is a program from the internet. The sandbox keeps it from the machine, but limits neither
memory nor time; this process has limits of its own. Run by path: it needs nothing but jinja2.

Input: {"template", "tokens"} on the first line, then a conversation on each line. Output: a JSON string
for each; {"error", "number"} ends it, number -1 when the template itself cannot be read.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from typing import Any

MEMORY = 1 << 30  # bytes of address space beyond what is in use at the start
OUTPUT = 1 << 30  # bytes
# A template that asks for today's date gets this one, so that the tokens do not change from day to
# day: when gpt-oss was released.
TODAY = datetime.datetime(2025, 8, 5)
_REASONING = ("reasoning_content", "thinking", "reasoning")


def compiled(template: str, tokens: dict[str, str]) -> Any:
    """The template with what transformers offers one (utils/chat_template_utils.py)."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson  # jinja's own escapes for HTML
    environment.globals.update(tokens)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(template)


def with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under the names that templates look for it, as transformers does."""
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def limit() -> None:
    """Memory and output of this process, where the system can limit them."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT, OUTPUT))
        with open("/proc/self/statm") as f:
            used = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main() -> None:
    number = -1
    try:
        settings = json.loads(sys.stdin.readline())
        limit()  # before the template is compiled: that already computes its constants
        template = compiled(settings["template"], settings["tokens"])
        for line in sys.stdin:
            number += 1
            chat = json.loads(line)
            messages = [with_reasoning(m) for m in chat.pop("messages")]
            print(json.dumps(template.render(**{"add_generation_prompt": False, **chat}, messages=messages)))
    except Exception as error:  # the template's own, of any kind
        kind = type(error).__name__
        reason = str(error) if kind == "TemplateError" else f"{kind}: {error}"
        print(json.dumps({"error": reason, "number": number}))


if __name__ == "__main__":
    main()
