"""How numbers are stored: the one value that recipes, formats and reports all name alike."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from exporter.errors import UsageError, did_you_mean

Kind = Literal["int", "e2m1", "float"]

_FLOATS = {"f32": 32, "f16": 16, "bf16": 16}
_INT = re.compile(r"int([48])-g(\d+)(-asym)?")


@dataclass(frozen=True)
class Scheme:
    """A storage form: `value[..., k] = scale[..., k // group] * (level[code] - zero)`.

    `kind` "int": level[code] = code; "e2m1": the eight magnitudes of OCP MX FP4 with a sign bit
    (OCP Microscaling Formats v1.0, table 5); "float": plain numbers, no groups.
    `scale` names the type that scales are stored in; scales are rounded to it before codes are chosen.
    `scale_rule` says how the scales were chosen: "released" for bits taken as they came.
    """

    kind: Kind
    bits: int
    group: int = 0
    scale: Literal["f16", "bf16", "e8m0", "none"] = "none"
    symmetric: bool = True
    scale_rule: str = "none"
    float_type: str = ""

    @property
    def name(self) -> str:
        if self.kind == "float":
            return self.float_type
        if self.kind == "e2m1":
            return "mxfp4"
        return f"int{self.bits}-g{self.group}" + ("" if self.symmetric else "-asym")

    @staticmethod
    def parse(name: str, scale_rule: str | None = None) -> Scheme:
        """The scheme called `name`: "mxfp4", "int8-g32", "int4-g64-asym", "bf16", "f16", "f32"."""
        if name in _FLOATS:
            return Scheme("float", _FLOATS[name], float_type=name)
        if name == "mxfp4":
            return Scheme("e2m1", 4, 32, "e8m0", scale_rule=scale_rule or "released")
        if m := _INT.fullmatch(name):
            bits, group = int(m[1]), int(m[2])
            if group >= 8 and group % 8 == 0:
                return Scheme("int", bits, group, "f16", m[3] is None, scale_rule or "absmax")
        known = ["mxfp4", "bf16", "f16", "f32", "int4-g32", "int4-g64", "int8-g32", "int8-g64"]
        raise UsageError(
            f'unknown scheme "{name}".{did_you_mean(name, known)}',
            hint=f"schemes: {', '.join(known)} (any group that is a multiple of 8)",
        )

    def with_rule(self, scale_rule: str) -> Scheme:
        return dataclasses.replace(self, scale_rule=scale_rule)

    @property
    def zero(self) -> int:
        """The code that means 0.0 where zeros are not stored."""
        return 1 << (self.bits - 1) if self.kind == "int" else 0

    @property
    def signed_scales(self) -> bool:
        """Whether scales may be negative, so that the largest magnitude can take the level without an opposite."""
        return self.kind == "int" and self.scale_rule.startswith("signed")

    def data_bytes(self, k: int) -> int:
        """Bytes that `k` packed codes take."""
        return k * self.bits // 8

    def scale_bytes(self, k: int) -> int:
        """Bytes that the scales of `k` numbers take."""
        if self.kind == "float":
            return 0
        return k // self.group * (1 if self.scale == "e8m0" else 2)

    def row_bytes(self, k: int) -> int:
        """Bytes of one row of `k` numbers, scales and zeros included."""
        zeros = 0 if self.symmetric or self.kind == "float" else k // self.group
        return self.data_bytes(k) + self.scale_bytes(k) + zeros

    def refuse(self, k: int) -> str | None:
        """Why a row of `k` numbers cannot be stored so, or None."""
        if self.kind != "float" and k % self.group:
            return f"last axis is {k}, which {self.group} does not divide ({k / self.group:g} groups)"
        return None
