"""What an examination has to say: one finding a fault, however many tensors show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from exporter.checkpoint.headers import shown_list

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """`level` "error": no right artifact can be made; "warning": look before using it; "note": worth knowing.

    `what` is the fault, `where` the tensors or the file, `cure` the change that mends it or "".
    """

    level: Level
    what: str
    where: str
    cure: str = ""


@dataclass
class Findings:
    """Collects findings; the same fault of many tensors becomes one."""

    every: list[Finding] = field(default_factory=list)
    _grouped: dict[tuple[Level, str, str], list[str]] = field(default_factory=dict)

    def add(self, level: Level, what: str, where: str, cure: str = "") -> None:
        self.every.append(Finding(level, what, where, cure))

    def group(self, level: Level, what: str, where: str, cure: str = "") -> None:
        """Like `add`, for faults that may repeat over hundreds of tensors."""
        self._grouped.setdefault((level, what, cure), []).append(where)

    def sorted(self) -> list[Finding]:
        """Errors first, then in the order of discovery."""
        grouped = [
            Finding(level, what, shown_list(places), cure) for (level, what, cure), places in self._grouped.items()
        ]
        return sorted(self.every + grouped, key=lambda f: LEVELS.index(f.level))
