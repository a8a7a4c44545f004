"""What long work tells whoever watches. The CLI draws it; the default says nothing."""

from __future__ import annotations


class Progress:
    """A silent listener. Stages follow one another; `advance` may be called from any thread."""

    def stage(self, name: str, total: int, unit: str = "B") -> None:
        """A stage begins; `total` of work lies ahead (0: unknown), in bytes or in another unit."""

    def advance(self, amount: int, label: str = "") -> None:
        """`amount` more is done, `label` says on what."""

    def done(self) -> None:
        """The stage has ended."""
