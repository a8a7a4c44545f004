"""What long work tells whoever watches. The CLI draws it; the default says nothing."""

from __future__ import annotations


class Progress:
    """A silent listener. Stages follow one another; `advance` may be called from any thread."""

    def stage(self, name: str, total_bytes: int) -> None:
        """A stage begins; `total_bytes` of work lie ahead."""

    def advance(self, nbytes: int, label: str = "") -> None:
        """`nbytes` more are done, `label` says on what."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def done(self) -> None:
        """The stage has ended."""
