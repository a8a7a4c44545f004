"""The checks before a run: what can be refused is refused before any work, most of it before a download."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint
from exporter.checkpoint.doctor import require_sound_files
from exporter.checkpoint.vocabulary import read_tokenizer
from exporter.errors import BadCheckpoint, Refused
from exporter.pipeline.calibrate import calibrated_steps, calibration_disk, require_memory
from exporter.pipeline.machine import usable_cpus
from exporter.pipeline.plan import ArtifactPlan, Plan, require_fit, wanted, workers_for
from exporter.pipeline.profiles import load_recipe
from exporter.pipeline.request import RunRequest, calibration_setting, plan_request
from exporter.pipeline.runtimes import require_calibration, require_runtimes, require_writers
from exporter.pipeline.source import must_download, outline_model
from exporter.types.profile import Profile
from exporter.types.sizes import format_size


def preflight(request: RunRequest, profile: Profile) -> None:
    """Everything that can be refused before a download: names, plan, fit, memory, device, libraries."""
    if request.recipe is not None:
        load_recipe(request.recipe)
    formats = sorted({a.format for a in wanted(profile, request.formats, request.targets, request.recipe)})
    if request.reaches("export"):
        require_writers(formats)
    if request.reaches("validate"):
        require_runtimes(request.device, formats)
    if not must_download(request.model):
        return
    if not request.quantize:
        raise Refused(
            f"{request.model} is not here, and what a store does not copy is read from it",
            hint=f"first: {request.quantize_command()}",
        )
    plan = plan_request(request, profile, outline_model(request.model))
    require_fit(plan)
    leaves_at_once(request, plan)
    request.out.mkdir(parents=True, exist_ok=True)


def leaves_at_once(request: RunRequest, plan: Plan) -> int:
    """Leaves at once within the request's memory; Refused when not even one fits, or calibration does not."""
    for artifact in plan.artifacts:
        if not (request.quantize and calibrated_steps(artifact.steps)):
            continue
        require_calibration(request.device)
        setting = calibration_setting(request, artifact)
        require_memory(plan.config, setting, request.max_memory)
    return workers_for([s for a in plan.artifacts for s in a.steps], request.max_memory, usable_cpus())


def accepted_tokenizer(checkpoint: Checkpoint, plan: Plan) -> Mapping[str, Any]:
    """tokenizer.json, accepted by every format of the plan."""
    require_sound_files(checkpoint)
    path = checkpoint.tokenizer_file
    assert path is not None
    tokenizer = read_tokenizer(path)
    for artifact in plan.artifacts:
        if reason := artifact.format.refuse_tokenizer(tokenizer, plan.config):
            raise BadCheckpoint(f"{path}: {reason}", hint="copy tokenizer.json from the source model")
    return tokenizer


def require_disk(
    request: RunRequest, plan: Plan, folders: Mapping[Path, ArtifactPlan], stores: Mapping[Path, ArtifactPlan]
) -> None:
    """Refuse when what is still to be made cannot fit on the disk. `folders`: of artifacts; `stores`: of numbers."""
    need = 0
    for folder, artifact in folders.items():
        if not folder.exists() or request.overwrite:
            need += artifact.nbytes - _blocks(folder.with_name(folder.name + ".partial"))
    for folder, artifact in stores.items():
        need += sum(s.stored_bytes for s in artifact.steps if not s.by_reference) - _blocks(folder)
        if request.quantize and calibrated_steps(artifact.steps):
            setting = calibration_setting(request, artifact)
            need += calibration_disk(plan.config, setting.windows * setting.length)
    free = shutil.disk_usage(request.out).free
    if need > free:
        raise Refused(
            f"{request.out} has {format_size(free)} free, this needs {format_size(need)} more",
            hint="free some space, or choose another --out",
        )


def _blocks(folder: Path) -> int:
    """Bytes that a folder takes on the disk."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0
