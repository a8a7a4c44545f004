"""One artifact: its numbers, its files, their hashes, its proof. What the artifacts of a run share is opened once."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, Refused
from exporter.formats.base import ExportJob, Provenance
from exporter.pipeline.calibrate import Calibrated, calibrate, calibrated_steps
from exporter.pipeline.calibration import calibration_windows
from exporter.pipeline.export import clean, export, layout_key, publish
from exporter.pipeline.lock import locked
from exporter.pipeline.machine import runtime_threads
from exporter.pipeline.manifest import HashMemory, hash_files, manifest, provenance
from exporter.pipeline.plan import ArtifactPlan, Plan
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import quantize
from exporter.pipeline.request import RunRequest, calibration_setting
from exporter.pipeline.runtimes import resolve_device
from exporter.pipeline.seal import require_sealed, seal, seal_proof
from exporter.pipeline.source import OpenedModel
from exporter.pipeline.store import Store, find_stores, open_store, read_about, store_folder, store_key
from exporter.pipeline.workers import wait_for_workers
from exporter.validate.runtime import SCRATCH_PREFIX

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Maker:
    """Makes the artifacts of one plan in the model's output folder `folder`."""

    def __init__(
        self,
        request: RunRequest,
        plan: Plan,
        model: OpenedModel,
        tokenizer: Mapping[str, Any],
        workers: int,
        progress: Progress,
    ) -> None:
        self.request, self.plan, self.model, self.tokenizer = request, plan, model, tokenizer
        self.workers, self.progress = workers, progress
        self.folder = request.out / model.name
        self._fingerprint = model.fingerprint()
        self._calibrations: dict[str, Calibrated] = {}

    # Numbers

    def store_of(self, artifact: ArtifactPlan) -> Path:
        """The folder of the artifact's store. Raises Refused where it must be there and is not."""
        if not self.request.quantize:
            return self._finished_store(artifact)
        return store_folder(self.folder, artifact.recipe.name, self._store_key(artifact))

    def open_store(self, artifact: ArtifactPlan) -> Store:
        """The artifact's store, with everything in it that needs calibration; whole where nothing may be made."""
        if not self.request.quantize:
            folder = self._finished_store(artifact)
            store = Store(folder, artifact.steps, self.model.checkpoint.read, read_about(folder) or {})
            if not store.complete(artifact.steps):
                store.release()
                raise self._incomplete(artifact)
            return store
        calibrated = self._calibrated(artifact)
        facts = calibrated.json() if calibrated else None
        key = self._store_key(artifact)
        store = open_store(self.folder, self.model, artifact.recipe.name, artifact.steps, key, facts)
        try:
            self._calibrate(artifact, store)
        except BaseException:
            store.release()
            raise
        return store

    def fill(self, artifact: ArtifactPlan, store: Store) -> None:
        """Quantize what the store lacks."""
        quantize(store, artifact.steps, self.model.checkpoint.read, self.workers, self.progress)

    def _finished_store(self, artifact: ArtifactPlan) -> Path:
        name = artifact.recipe.name
        found = find_stores(self.folder, name, store_key(self._fingerprint, artifact.steps))
        if not found:
            raise self._incomplete(artifact)
        if len(found) > 1:
            texts = ", ".join(f"{folder.name} ({_text(folder)})" for folder in found)
            raise Refused(
                f"recipe {name} was calibrated on several texts: {texts}",
                hint=f"move all but one out of {self.folder / 'store'}",
            )
        return found[0]

    def _incomplete(self, artifact: ArtifactPlan) -> Refused:
        return Refused(
            f"the store of recipe {artifact.recipe.name} for {self.model.name} is not complete in {self.request.out}",
            hint=f"first: {self.request.quantize_command()}",
        )

    def _store_key(self, artifact: ArtifactPlan) -> str:
        calibrated = self._calibrated(artifact)
        return store_key(self._fingerprint, artifact.steps, calibrated.key() if calibrated else "")

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

    # Files

    def export(self, artifact: ArtifactPlan, store: Store) -> tuple[Path, list[str], Provenance]:
        """The artifact's folder, made now or found finished, the names of its files, and what they hold."""
        folder = self.folder_of(artifact)
        job = self.job(artifact, provenance(self.model, artifact))
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
                self.fill(artifact, store)
                facts = provenance(self.model, artifact, store.digests(artifact.steps))
                if (found.get("digest"), found.get("layout")) == (facts.digest, layout_key(layouts)):
                    return folder, names, facts
                raise Refused(
                    f"{folder} holds another artifact (of another checkpoint, tokenizer, recipe, context or version)",
                    hint="--overwrite replaces it, --out puts this one elsewhere",
                )
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = self.model.checkpoint.read
        partial = export(folder, artifact.format, job, layouts, store, source, self.workers, self.progress)
        facts = provenance(self.model, artifact, store.digests(artifact.steps))
        self.require_unchanged()
        calibration = (read_about(store.folder) or {}).get("calibration")
        command = self.request.artifact_command(self.model.named, self.plan.profile, artifact.spec)
        body = manifest(self.model, artifact, store, facts, layout_key(layouts), command, calibration)
        publish(partial, folder, body, replace=folder.exists())
        return folder, names, facts

    def folder_of(self, artifact: ArtifactPlan) -> Path:
        return self.folder / self.plan.profile.name / artifact.spec.folder

    def job(self, artifact: ArtifactPlan, facts: Provenance) -> ExportJob:
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
            context=artifact.fit.context,
            file=self._small_file,
        )

    def _small_file(self, name: str) -> bytes | None:
        path = self.model.checkpoint.find(name)
        return None if path is None else path.read_bytes()

    def seal(self, folder: Path, names: list[str]) -> None:
        """Hash the source's files and the artifact's; source files that did not change are remembered."""
        if (folder / "SHA256SUMS").exists():
            require_sealed(folder)
            return
        made = {name: folder / name for name in names}
        sources, new = self._hash(self.sources(), made.values())
        seal(folder, sources, {name: new[path] for name, path in made.items()})

    def sources(self) -> list[Path]:
        """Every file of the checkpoint that an artifact is made of."""
        found = [self.model.checkpoint.find(name) for name in _SMALL_FILES]
        return [*self.model.checkpoint.shards, *(path for path in found if path is not None)]

    def source_hashes(self, sources: Sequence[Path]) -> dict[str, str]:
        """SHA-256 by name of some of `sources`: those that did not change are not read again."""
        return self._hash(sources, ())[0]

    def _hash(self, sources: Sequence[Path], others: Iterable[Path]) -> tuple[dict[str, str], dict[Path, str]]:
        """SHA-256 of source files by name, and of every file that was read now by path."""
        memory = HashMemory(self.folder / "source-hashes.json")
        known = {p: h for p in sources if (h := self.model.hashes.get(p.name) or memory.get(p))}
        unread = [*(p for p in sources if p not in known), *others]
        new = hash_files(unread, self.workers, self.progress) if unread else {}
        self.require_unchanged()
        fresh = {p: new[p] for p in sources if p in new}
        if fresh:
            memory.add(fresh)
        return {p.name: h for p, h in {**known, **fresh}.items()}, new

    # The proof

    def prove(
        self, folder: Path, artifact: ArtifactPlan, facts: Provenance, rounded: bool, controls: bool = False
    ) -> dict[str, Any]:
        """The report on a sealed artifact in `folder`, of the digests in `facts`; see prove.Proof.

        Its verdict goes into manifest.json too.
        `rounded`: whether blocks off the MXFP4 grid were rounded; `controls`: also on known-bad copies of it.
        """
        from exporter.pipeline.prove import Proof

        job = self.job(artifact, facts)
        proof = Proof(
            artifact=artifact,
            layouts=artifact.format.layout(job),
            profile=self.plan.profile,
            name=self.model.name,
            reference=self._reference,
            expected=facts.tensor_digests,
            workers=self.workers,
            threads=runtime_threads(),
            progress=self.progress,
            rounded=rounded,
        )
        report = proof.prove(folder)
        if controls:
            from exporter.pipeline.controls import run_controls

            failing = [gate["name"] for gate in report["gates"] if not gate["passed"]]
            report["controls"] = made = run_controls(folder, job, proof, failing)
            if caught := [control["caught"] for control in made if control["applies"]]:
                report["controls_caught"] = all(caught)
            report = proof.finish(folder, report)
        seal_proof(folder, report)
        return report

    @functools.cached_property
    def _reference(self) -> Any:
        from exporter.pipeline.measured import measured_text
        from exporter.pipeline.reference import Reference

        device = resolve_device(self.request.device)
        profile, texts = self.plan.profile, None
        if self.request.text:
            texts = measured_text(self.request.text, self.model.checkpoint, profile.validate, self.progress)
        made = Reference(self.model, profile, self.folder / "reference", device, self.progress, texts=texts)
        self.require_unchanged()
        return made

    def alone(self) -> AbstractContextManager[None]:
        """Hold the model's output folder."""
        return alone(self.folder)

    def require_unchanged(self) -> None:
        """What was read at different times must have been one checkpoint."""
        if self.model.fingerprint() != self._fingerprint:
            raise ExporterError(
                f"{self.model.checkpoint.path} changed while it was read", hint="run the same command again"
            )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a model's output folder, free of workers of a run that ended and of what a killed proof left there."""
    with locked(folder):
        wait_for_workers(folder)
        for left in folder.glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _text(store: Path) -> str:
    calibration = (read_about(store) or {}).get("calibration")
    return str(calibration.get("text")) if isinstance(calibration, dict) else "no text"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json of an artifact; None when there is none that can be read."""
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
