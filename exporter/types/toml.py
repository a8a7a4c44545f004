"""Strict access to a TOML table: unknown keys, wrong types and missing keys are errors that name the file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from exporter.errors import UsageError, did_you_mean


def parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise UsageError(f"{where}: not valid TOML: {str(e)[:200]}", hint="see docs/profiles.md") from None


class Table:
    """One TOML table. `where` is what errors start with, e.g. "profiles/16gb.toml [hardware]"."""

    def __init__(self, raw: object, where: str, known: Iterable[str]) -> None:
        self.where, self.known = where, tuple(known)
        if not isinstance(raw, Mapping):
            raise UsageError(f"{where}: expected a table", hint="see docs/profiles.md")
        for key in raw:
            if key not in self.known:
                raise UsageError(
                    f'{where}: unknown key "{key}".{did_you_mean(key, self.known)}',
                    hint=f"known keys: {', '.join(self.known)}",
                )
        self.raw = raw

    def get(self, key: str, kind: type[Any] | tuple[type[Any], ...], default: Any = None) -> Any:
        """The value of `key`, checked; `default` where it is absent, an error where that is None too."""
        value = self.raw.get(key, default)
        if value is None:
            raise UsageError(f'{self.where}: "{key}" is missing', hint="see docs/profiles.md")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise UsageError(f'{self.where}: "{key}" must be {names}, not {value!r}', hint="see docs/profiles.md")
        return value
