"""What long work tells whoever watches. The CLI draws it; the default says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.validate.child import OnProgress


class Progress:
    """A silent listener. Stages follow one another; `advance` may be called from any thread."""

    def stage(self, name: str, total: int, unit: str = "B") -> None:
        """A stage begins; `total` of work lies ahead (0: unknown), in bytes or in another unit."""

    def advance(self, amount: int, label: str = "") -> None:
        """`amount` more is done, `label` says on what."""

    def done(self) -> None:
        """The stage has ended."""


def worker_stages(progress: Progress, runtime: str) -> OnProgress:
    """What shows each stage of a runtime's worker as a stage of `progress`; the last is the caller's to end."""
    seen: dict[str, int] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        if what not in seen:
            progress.done()
            progress.stage(f"{runtime}: {what}", total, "steps")
        progress.advance(done - seen.get(what, 0))
        seen[what] = done

    return on_progress
