"""What a card is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Loss = Literal["", "exact", "near", "lossy"]
Status = Literal["", "passed", "gate failed"]


@dataclass(frozen=True)
class Picture:
    """`path`: in the repository. `caption`: what it shows, in words."""

    path: str
    title: str
    caption: str


@dataclass(frozen=True)
class Item:
    """One artifact. Texts are as its files have them, cleaned and not escaped; "" is what is not known.

    prefix: its folder in the repository, "" for the root. label: what it is called on the card. files: bytes by name.
    schemes: of its tensors, as "mxfp4". methods: how they were chosen, as "gptq". context: tokens that it was planned
    for, 0 unknown. status "": never proved. proof: Markdown of what the proof found, already escaped. reported: whether
    its report lies beside it. source: a Hub repository, "" for a folder. origin: more of where it comes from, by label.
    """

    prefix: str
    label: str
    model: str
    format: str
    kind: str
    target: str
    recipe: str
    recipe_title: str
    files: Mapping[str, int]
    schemes: frozenset[str]
    methods: frozenset[str]
    context: int = 0
    device: str = ""
    loss: Loss = ""
    status: Status = ""
    kl: str = ""
    top1: str = ""
    decode: str = ""
    machine: str = ""
    predicted: str = ""
    measured: str = ""
    runtime: str = ""
    sentence: str = ""
    proof: str = ""
    reported: bool = False
    pictures: tuple[Picture, ...] = ()
    source: str = ""
    revision: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    best: bool = False

    @property
    def size(self) -> int:
        return sum(self.files.values())

    def path(self, name: str) -> str:
        """Of one of its files, in the repository."""
        return f"{self.prefix}/{name}" if self.prefix else name


@dataclass(frozen=True)
class Repository:
    """name: "user/name", "" where it is not known yet. bases: repositories that the weights come from.

    overview: the picture of all artifacts. compared: a sentence on them. warnings: what cannot be compared.
    """

    name: str
    items: tuple[Item, ...]
    license: str = ""
    bases: tuple[str, ...] = ()
    overview: Picture | None = None
    compared: str = ""
    warnings: tuple[str, ...] = ()
