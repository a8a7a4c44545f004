"""What TensorRT-RTX compiles for which GPUs: a target is the oldest of those that an artifact is for.

Measured with TensorRT-RTX 1.7.1 by building engines (tests/oracle): Turing has no bfloat16, no INT4 and no float32
matrix products; FP4 begins with SM120. It compiles for SM80; NVIDIA's support matrix lists RTX cards, not A100.
NVIDIA's names of the cards: https://developer.nvidia.com/cuda-gpus.
"""

from __future__ import annotations

from dataclasses import dataclass

from exporter.formats.onnx.arrays import kept_wide
from exporter.types import Scheme, TensorSpec

GPUS = {
    75: "GeForce RTX 20, Quadro RTX, T4",
    80: "A100, A30",
    86: "GeForce RTX 30, A10, RTX A6000",
    89: "GeForce RTX 40, L4, L40S, RTX 6000 Ada",
    120: "GeForce RTX 50, RTX PRO 6000 Blackwell",
    121: "DGX Spark (GB10)",
}


@dataclass(frozen=True)
class Target:
    """Engines build for every compute capability from `oldest` on. `router`: the type in which experts are chosen."""

    name: str
    oldest: int
    router: str

    @property
    def sms(self) -> tuple[int, ...]:
        return tuple(sm for sm in GPUS if sm >= self.oldest)

    def refuse(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        """Why engines for it cannot hold this tensor as `scheme`, or None."""
        if scheme.kind == "e2m1" and self.oldest < 120:
            recipe = "exact-f16" if self.oldest < 80 else "exact-bf16"
            same = f"recipe {recipe} holds the same numbers as INT8" if spec.role == "expert" else "int8-g32 is near"
            return f"FP4 begins with SM120; {same} for {self.name}, or --target sm120"
        if scheme.name == "bf16" and self.oldest < 80 and not kept_wide(spec):
            return "bfloat16 begins with SM80; float16 (recipe exact-f16), or --target sm80"
        if scheme.kind != "int":
            return None
        if not scheme.symmetric:
            return f"{scheme.name} has zero points, which TensorRT does not take"
        if scheme.bits == 4 and self.oldest < 80:
            return "INT4 begins with SM80; 8-bit integers, or --target sm80"
        if scheme.bits == 8 and scheme.signed_scales:
            return "some of its scales are negative; TensorRT takes only positive ones for INT8"
        return None


TARGETS = {
    "sm75": Target("sm75", 75, "float16"),
    "sm80": Target("sm80", 80, "float"),
    "sm120": Target("sm120", 120, "float"),
}


def fuses(scheme: Scheme) -> bool:
    """Whether TensorRT-RTX 1.7 multiplies by it as it is stored: INT4 is decoded inside the product, INT8 and FP4 are
    written out in float16 before it (tests/oracle)."""
    return scheme.kind == "float" or (scheme.kind == "int" and scheme.bits == 4)
