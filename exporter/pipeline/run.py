"""The main job: plan, quantize, export, validate. Each stage finds what an earlier run finished."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.checkpoint.doctor import require_sound_files
from exporter.checkpoint.vocabulary import read_tokenizer
from exporter.errors import BadCheckpoint, ExporterError, Refused, UsageError
from exporter.formats.base import ExportJob, Provenance
from exporter.pipeline.export import clean, export, layout_key, publish
from exporter.pipeline.files import sha256_file
from exporter.pipeline.lock import locked
from exporter.pipeline.manifest import HashMemory, hash_files, manifest, provenance, seal
from exporter.pipeline.plan import ArtifactPlan, Plan, make_plan, require_fit, workers_for
from exporter.pipeline.profiles import load_profile, load_recipe
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import quantize
from exporter.pipeline.runtimes import require_runtimes, resolve_device
from exporter.pipeline.source import ModelOutline, OpenedModel, must_download, open_model, outline_model
from exporter.pipeline.store import Store, store_key
from exporter.types.profile import Profile
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
    overwrite: bool = False


@dataclass
class ArtifactResult:
    """One row of the answer. `report` is empty until the artifact was validated."""

    plan: ArtifactPlan
    path: Path | None = None
    nbytes: int = 0
    repacked: tuple[int, int] = (0, 0)
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
            if until < STAGES.index("export"):
                quantize(store, artifact.steps, self.model.checkpoint.read, self.workers, self.progress)
                result.status = "quantized"
            else:
                result.path, facts = self._export(artifact, store)
                result.nbytes = sum(p.stat().st_size for p in _model_files(result.path, artifact))
                result.status = "exported"
            shares = [store.exact_share(s) for s in artifact.steps if s.method == "repack"]
            result.repacked = (sum(e for e, _ in shares), sum(b for _, b in shares))
            if until >= STAGES.index("validate"):
                self._validate(result, facts)
        finally:
            store.release()

    def _open_store(self, artifact: ArtifactPlan) -> Store:
        about = {
            "model": self.model.name,
            "repo": self.model.checkpoint.repo,
            "revision": self.model.checkpoint.revision,
            "recipe": artifact.recipe.name,
        }
        return Store(self._store_folder(artifact), artifact.steps, self.model.checkpoint.read, about)

    def _store_folder(self, artifact: ArtifactPlan) -> Path:
        key = store_key(self._fingerprint, artifact.steps)
        return self.folder / "store" / f"{artifact.recipe.name}-{key[:12]}"

    def _export(self, artifact: ArtifactPlan, store: Store) -> tuple[Path, Provenance]:
        """The artifact's folder, made now or found finished, and what it holds."""
        folder = self._artifact_folder(artifact)
        job = self._job(artifact, provenance(self.model, artifact))
        layouts = artifact.format.layout(job)
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
                    return folder, facts
                raise Refused(
                    f"{folder} holds another artifact (of another checkpoint, tokenizer, recipe or version)",
                    hint="--overwrite replaces it, --out puts this one elsewhere",
                )
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = self.model.checkpoint.read
        partial = export(folder, artifact.format, job, layouts, store, source, self.workers, self.progress)
        facts = provenance(self.model, artifact, store.digests(artifact.steps))
        self._require_unchanged()
        body = manifest(self.model, artifact, store, facts, layout_key(layouts))
        publish(partial, folder, body, replace=folder.exists())
        return folder, facts

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
        )

    def _seal(self, folder: Path, artifact: ArtifactPlan) -> None:
        """Hash the source's files and the artifact's; source files that did not change are remembered."""
        if (folder / "SHA256SUMS").exists():
            if f"{sha256_file(folder / 'manifest.json')}  manifest.json" not in (folder / "SHA256SUMS").read_text():
                raise ExporterError(
                    f"{folder}/manifest.json is not the one in SHA256SUMS", hint="--overwrite makes the artifact again"
                )
            return
        made = _model_files(folder, artifact)
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
            "chat_template.jinja",
        )
        found = [self.model.checkpoint.find(n) for n in names]
        return [p for p in found if p is not None]

    def _validate(self, result: ArtifactResult, facts: Provenance) -> None:
        from exporter.pipeline.prove import prove

        assert result.path is not None
        self._seal(result.path, result.plan)
        heads = {f.filename: f.head for f in result.plan.format.layout(self._job(result.plan, facts))}
        result.report = prove(
            result.path,
            result.plan,
            heads,
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
        stores = {self._store_folder(a): a.steps for a in self.plan.artifacts}
        for folder, steps in stores.items():
            need += sum(s.stored_bytes for s in steps if not s.by_reference) - _blocks(folder)
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


def _workers(request: RunRequest, plan: Plan) -> int:
    """Leaves at once within the request's memory; Refused when not even one fits."""
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


def _model_files(folder: Path, artifact: ArtifactPlan) -> list[Path]:
    """The artifact's own files, without manifest and report."""
    return sorted(p for p in folder.iterdir() if p.suffix == artifact.format.extension)


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
