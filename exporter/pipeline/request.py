"""What a run was asked for, and the plan that this makes of a model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.pipeline.plan import ArtifactPlan, Plan, make_plan
from exporter.pipeline.profiles import load_profile
from exporter.pipeline.source import ModelOutline, OpenedModel, outline_model
from exporter.types.profile import ArtifactSpec, Profile
from exporter.types.recipe import CalibrationSpec

STAGES = ("plan", "quantize", "export", "validate")


@dataclass(frozen=True)
class RunRequest:
    """What `exporter quantize` was asked for. `max_memory` in bytes; `out` the root of all artifacts.

    `text`: what to measure on, None for the default. `quantize`: whether numbers may be made; else every one of them
    must be in the store (`exporter export`).
    """

    model: str
    profile: str
    formats: tuple[str, ...] = ()
    recipe: str | None = None
    out: Path = Path("artifacts")
    until: str = "validate"
    max_memory: int = 4 * 10**9
    device: str = "auto"
    context: int | None = None
    calibration: str | None = None
    overwrite: bool = False
    quantize: bool = True
    targets: tuple[str, ...] = ()
    text: str | None = None

    def reaches(self, stage: str) -> bool:
        """Whether the run goes as far as `stage`."""
        return STAGES.index(self.until) >= STAGES.index(stage)

    def quantize_command(self) -> str:
        """The command that fills the stores of this request."""
        words = ["exporter", "quantize", self.model, "--profile", self.profile]
        words += [word for name in self.formats for word in ("--format", name)]
        words += [word for name in self.targets for word in ("--target", name)]
        words += ["--recipe", self.recipe] if self.recipe else []
        words += ["--context", str(self.context)] if self.context else []
        words += ["--out", str(self.out)] if self.out != RunRequest.out else []
        return shlex.join([*words, "--until", "quantize"])

    def artifact_command(self, model: str, profile: Profile, spec: ArtifactSpec) -> str:
        """What makes this artifact alone, of `model`. It names no place on this machine."""
        words = ["exporter", "quantize", model, "--profile", profile.name, "--format", spec.format]
        words += ["--target", spec.target] if spec.target else []
        of_profile = [a.recipe for a in profile.artifacts if (a.format, a.target) == (spec.format, spec.target)]
        words += ["--recipe", Path(spec.recipe).stem] if of_profile != [spec.recipe] else []
        words += ["--context", str(self.context)] if self.context else []
        if self.calibration:
            path = Path(self.calibration)
            words += ["--calibration", path.name if path.exists() else self.calibration]
        return shlex.join(words)


def plan_request(request: RunRequest, profile: Profile, model: OpenedModel | ModelOutline) -> Plan:
    """What the request makes of a model, opened or known in outline only."""
    return make_plan(
        model.name,
        model.config,
        model.scheme_of,
        profile,
        formats=request.formats,
        targets=request.targets,
        recipe=request.recipe,
        context=request.context,
    )


def plan_outline(request: RunRequest) -> tuple[ModelOutline, Plan]:
    """The model as its headers, or a list of released models, describe it, and what the request makes of it."""
    outline = outline_model(request.model)
    return outline, plan_request(request, load_profile(request.profile), outline)


def calibration_setting(request: RunRequest, artifact: ArtifactPlan) -> CalibrationSpec:
    """The recipe's own, with the text that the request names in its place."""
    own = artifact.recipe.calibration
    return replace(own, text=request.calibration) if request.calibration else own
