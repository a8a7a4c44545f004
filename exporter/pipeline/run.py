"""The main job: plan, quantize, export, validate. Each stage finds what an earlier run finished."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporter.checkpoint.doctor import require_sound_files
from exporter.checkpoint.vocabulary import read_tokenizer
from exporter.errors import BadCheckpoint, ExporterError, Refused, UsageError
from exporter.formats.base import ExportJob, Provenance
from exporter.pipeline.calibrate import (
    Calibrated,
    calibrate,
    calibrated_steps,
    calibration_disk,
    require_memory,
    starved,
)
from exporter.pipeline.calibration import calibration_windows
from exporter.pipeline.export import clean, export, layout_key, publish
from exporter.pipeline.files import sha256_file
from exporter.pipeline.lock import locked
from exporter.pipeline.manifest import HashMemory, hash_files, manifest, provenance, seal
from exporter.pipeline.plan import ArtifactPlan, Plan, make_plan, require_fit, workers_for
from exporter.pipeline.profiles import load_profile, load_recipe
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import quantize
from exporter.pipeline.runtimes import require_calibration, require_runtimes, resolve_device
from exporter.pipeline.source import ModelOutline, OpenedModel, must_download, open_model, outline_model
from exporter.pipeline.store import Store, open_store, store_folder, store_key
from exporter.types.profile import Profile
from exporter.types.recipe import CalibrationSpec
from exporter.types.sizes import format_size
from exporter.validate.runtime import SCRATCH_PREFIX

STAGES = ("plan", "quantize", "export", "validate")


@dataclass(frozen=True)
class RunRequest:
    """What `exporter quantize` was asked for. `max_memory` in bytes; `out` the root of all artifacts."""

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


@dataclass
class ArtifactResult:
    """One row of the answer. `files`: its own, without manifest and report; `report` is empty until validated."""

    plan: ArtifactPlan
    path: Path | None = None
    files: list[Path] = field(default_factory=list)
    nbytes: int = 0
    repacked: tuple[int, int] = (0, 0)
    starved: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    status: str = "planned"


@dataclass
class RunResult:
    plan: Plan
    artifacts: list[ArtifactResult]


class Run:
    """One run on one model. Stages share the opened checkpoint, the stores and the reference."""

    def __init__(self, request: RunRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self.profile = load_profile(request.profile)
        preflight(request, self.profile)
        self.model: OpenedModel = open_model(request.model, progress)
        self.plan = _plan(request, self.profile, self.model)
        self.profile = self.plan.profile
        self.folder = request.out / self.model.name
        if self.folder.resolve() == self.model.checkpoint.path.resolve():
            raise UsageError(f"{self.folder} is the checkpoint itself", hint="choose another --out")
        self._fingerprint = self.model.fingerprint()
        self.tokenizer = self._tokenizer()
        self.workers = _workers(request, self.plan)
        self._calibrations: dict[str, Calibrated] = {}

    def _tokenizer(self) -> Mapping[str, Any]:
        """tokenizer.json, accepted by every format of the plan: found out before any work."""
        require_sound_files(self.model.checkpoint)
        path = self.model.checkpoint.tokenizer_file
        assert path is not None
        tokenizer = read_tokenizer(path)
        for artifact in self.plan.artifacts:
            if reason := artifact.format.refuse_tokenizer(tokenizer, self.plan.config):
                raise BadCheckpoint(f"{path}: {reason}", hint="copy tokenizer.json from the source model")
        return tokenizer

    def run(self) -> RunResult:
        """Do the stages up to `request.until`."""
        results = [ArtifactResult(a) for a in self.plan.artifacts]
        until = STAGES.index(self.request.until)
        if until:
            require_fit(self.plan)
            with locked(self.folder):
                for left in self.folder.glob(f"{SCRATCH_PREFIX}*"):
                    shutil.rmtree(left, ignore_errors=True)  # of a proof that was killed
                self._check_disk()
                for result in results:
                    self._make(result, until)
        return RunResult(self.plan, results)

    def _make(self, result: ArtifactResult, until: int) -> None:
        artifact = result.plan
        store = self._open_store(artifact)
        try:
            self._calibrate(artifact, store)
            if until < STAGES.index("export"):
                quantize(store, artifact.steps, self.model.checkpoint.read, self.workers, self.progress)
                result.status = "quantized"
            else:
                result.path, names, facts = self._export(artifact, store)
                result.files = [result.path / name for name in names]
                result.nbytes = sum(p.stat().st_size for p in result.files)
                result.status = "exported"
            shares = [store.exact_share(s) for s in artifact.steps if s.method in ("repack", "exact")]
            result.starved = starved(store, artifact.steps)
            result.repacked = (sum(e for e, _ in shares), sum(b for _, b in shares))
            if until >= STAGES.index("validate"):
                self._validate(result, facts)
        finally:
            store.release()

    def _open_store(self, artifact: ArtifactPlan) -> Store:
        key = self._store_key(artifact)
        return open_store(self.folder, self.model, artifact.recipe.name, artifact.steps, key)

    def _calibrated(self, artifact: ArtifactPlan) -> Calibrated | None:
        """What the artifact's recipe is calibrated on; None where nothing is."""
        recipe = artifact.recipe
        if not calibrated_steps(artifact.steps):
            return None
        if recipe.name not in self._calibrations:
            setting = calibration_setting(self.request, artifact)
            folder, device = self.folder / "calibration", resolve_device(self.request.device)
            windows = calibration_windows(setting, self.model.checkpoint, folder, device, self.progress)
            self._calibrations[recipe.name] = Calibrated(windows, recipe.gptq)
        return self._calibrations[recipe.name]

    def _calibration_facts(self, artifact: ArtifactPlan) -> dict[str, object] | None:
        calibrated = self._calibrated(artifact)
        return calibrated.json() if calibrated else None

    def _calibrate(self, artifact: ArtifactPlan, store: Store) -> None:
        if calibrated := self._calibrated(artifact):
            calibrate(
                store,
                artifact.steps,
                self.model.checkpoint.read,
                self.plan.config,
                calibrated,
                resolve_device(self.request.device),
                self.workers,
                self.progress,
            )

    def _store_key(self, artifact: ArtifactPlan) -> str:
        calibrated = self._calibrated(artifact)
        return store_key(self._fingerprint, artifact.steps, calibrated.key() if calibrated else "")

    def _export(self, artifact: ArtifactPlan, store: Store) -> tuple[Path, list[str], Provenance]:
        """The artifact's folder, made now or found finished, the names of its files, and what they hold."""
        folder = self._artifact_folder(artifact)
        job = self._job(artifact, provenance(self.model, artifact))
        layouts = artifact.format.layout(job)
        names = [layout.filename for layout in layouts]
        if folder.exists():
            clean(folder)
            found = _manifest(folder)
            if found is None:
                raise Refused(f"{folder} is not an artifact of ours", hint="move it away, or choose another --out")
            whole = all(_size(folder / f.filename) == f.size for f in layouts)
            if whole and not self.request.overwrite:
                # What is there is judged by its digests, so the numbers come first.
                quantize(store, artifact.steps, self.model.checkpoint.read, self.workers, self.progress)
                facts = provenance(self.model, artifact, store.digests(artifact.steps))
                if (found.get("digest"), found.get("layout")) == (facts.digest, layout_key(layouts)):
                    return folder, names, facts
                raise Refused(
                    f"{folder} holds another artifact (of another checkpoint, tokenizer, recipe or version)",
                    hint="--overwrite replaces it, --out puts this one elsewhere",
                )
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = self.model.checkpoint.read
        partial = export(folder, artifact.format, job, layouts, store, source, self.workers, self.progress)
        facts = provenance(self.model, artifact, store.digests(artifact.steps))
        self._require_unchanged()
        body = manifest(self.model, artifact, store, facts, layout_key(layouts), self._calibration_facts(artifact))
        publish(partial, folder, body, replace=folder.exists())
        return folder, names, facts

    def _artifact_folder(self, artifact: ArtifactPlan) -> Path:
        return self.folder / self.profile.name / artifact.spec.folder

    def _job(self, artifact: ArtifactPlan, facts: Provenance) -> ExportJob:
        checkpoint = self.model.checkpoint
        return ExportJob(
            model_name=self.model.name,
            config=self.plan.config,
            steps=artifact.steps,
            provenance=facts,
            tokenizer=self.tokenizer,
            tokenizer_config=checkpoint.tokenizer_config or {},
            generation_config=checkpoint.generation_config or {},
            chat_template=checkpoint.chat_template,
            split_size=artifact.spec.split_size,
            file=self._small_file,
        )

    def _small_file(self, name: str) -> bytes | None:
        path = self.model.checkpoint.find(name)
        return None if path is None else path.read_bytes()

    def _seal(self, folder: Path, made: list[Path]) -> None:
        """Hash the source's files and the artifact's; source files that did not change are remembered."""
        if (folder / "SHA256SUMS").exists():
            if f"{sha256_file(folder / 'manifest.json')}  manifest.json" not in (folder / "SHA256SUMS").read_text():
                raise ExporterError(
                    f"{folder}/manifest.json is not the one in SHA256SUMS", hint="--overwrite makes the artifact again"
                )
            return
        memory = HashMemory(self.folder / "source-hashes.json")
        sources = [*self.model.checkpoint.shards, *self._small_files()]
        known = {p: h for p in sources if (h := self.model.hashes.get(p.name) or memory.get(p))}
        new = hash_files([*(p for p in sources if p not in known), *made], self.workers, self.progress)
        self._require_unchanged()
        fresh = {p: new[p] for p in sources if p in new}
        if fresh:
            memory.add(fresh)
        seal(folder, {p.name: h for p, h in {**known, **fresh}.items()}, {p.name: new[p] for p in made})

    def _small_files(self) -> list[Path]:
        names = (
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
        )
        found = [self.model.checkpoint.find(n) for n in names]
        return [p for p in found if p is not None]

    def _validate(self, result: ArtifactResult, facts: Provenance) -> None:
        from exporter.pipeline.prove import prove

        assert result.path is not None
        self._seal(result.path, result.files)
        layouts = result.plan.format.layout(self._job(result.plan, facts))
        result.report = prove(
            result.path,
            result.plan,
            layouts,
            self.profile,
            self._reference,
            facts.tensor_digests,
            self.workers,
            _threads(),
            self.progress,
        )
        result.status = result.report["status"]

    @functools.cached_property
    def _reference(self) -> Any:
        from exporter.pipeline.prove import Reference

        device = resolve_device(self.request.device)
        made = Reference(self.model, self.profile, self.folder / "reference", device, self.progress)
        self._require_unchanged()
        return made

    def _require_unchanged(self) -> None:
        """What was read at different times must have been one checkpoint."""
        if self.model.fingerprint() != self._fingerprint:
            raise ExporterError(
                f"{self.model.checkpoint.path} changed while it was read", hint="run the same command again"
            )

    def _check_disk(self) -> None:
        """Refuse when what is still to be made cannot fit on the disk."""
        need = 0
        for artifact in self.plan.artifacts:
            folder = self._artifact_folder(artifact)
            if not folder.exists() or self.request.overwrite:
                need += artifact.nbytes - _blocks(folder.with_name(folder.name + ".partial"))
        stores = {store_folder(self.folder, a.recipe.name, self._store_key(a)): a for a in self.plan.artifacts}
        for folder, a in stores.items():
            need += sum(s.stored_bytes for s in a.steps if not s.by_reference) - _blocks(folder)
            if calibrated_steps(a.steps):
                setting = calibration_setting(self.request, a)
                need += calibration_disk(self.plan.config, setting.windows * setting.length)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise Refused(
                f"{self.request.out} has {format_size(free)} free, this needs {format_size(need)} more",
                hint="free some space, or choose another --out",
            )


def preflight(request: RunRequest, profile: Profile) -> None:
    """Everything that can be refused before a download: names, plan, fit, memory, device, libraries."""
    if request.recipe is not None:
        load_recipe(request.recipe)
    if request.until == "validate":
        require_runtimes(request.device)
    if not must_download(request.model):
        return
    plan = _plan(request, profile, outline_model(request.model))
    require_fit(plan)
    _workers(request, plan)
    request.out.mkdir(parents=True, exist_ok=True)


def _plan(request: RunRequest, profile: Profile, model: OpenedModel | ModelOutline) -> Plan:
    """What the request makes of a model, opened or known in outline only."""
    return make_plan(
        model.name,
        model.config,
        model.scheme_of,
        profile,
        formats=request.formats,
        recipe=request.recipe,
        context=request.context,
    )


def calibration_setting(request: RunRequest, artifact: ArtifactPlan) -> CalibrationSpec:
    """The recipe's own, with the text that the request names in its place."""
    own = artifact.recipe.calibration
    return replace(own, text=request.calibration) if request.calibration else own


def _workers(request: RunRequest, plan: Plan) -> int:
    """Leaves at once within the request's memory; Refused when not even one fits, or calibration does not."""
    for artifact in plan.artifacts:
        if not calibrated_steps(artifact.steps):
            continue
        require_calibration(request.device)
        setting = calibration_setting(request, artifact)
        require_memory(plan.config, setting, request.max_memory)
    return workers_for([s for a in plan.artifacts for s in a.steps], request.max_memory, usable_cpus())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _blocks(folder: Path) -> int:
    """Bytes that a folder takes on the disk."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0


def _manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json of an artifact; None when there is none that can be read."""
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def usable_cpus() -> int:
    """Logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def _threads() -> int:
    """Threads for a runtime: the physical cores we may use, at most 8 (more spin at barriers)."""
    import psutil

    physical = psutil.cpu_count(logical=False) or 1
    return max(1, min(physical, usable_cpus(), 8))
