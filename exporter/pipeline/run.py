"""The main job: plan, quantize, export, validate. Each stage finds what an earlier run finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.pipeline.artifact import Maker
from exporter.pipeline.before import accepted_tokenizer, leaves_at_once, preflight, require_disk
from exporter.pipeline.calibrate import starved
from exporter.pipeline.plan import ArtifactPlan, Plan, require_fit
from exporter.pipeline.profiles import load_profile
from exporter.pipeline.progress import Progress
from exporter.pipeline.request import RunRequest, plan_request
from exporter.pipeline.source import OpenedModel, open_model


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

    def __init__(self, request: RunRequest, progress: Progress, maker: type[Maker] = Maker) -> None:
        self.request, self.progress = request, progress
        profile = load_profile(request.profile)
        preflight(request, profile)
        self.model: OpenedModel = open_model(request.model, progress)
        self.plan = plan_request(request, profile, self.model)
        folder = request.out / self.model.name
        if folder.resolve() == self.model.checkpoint.path.resolve():
            raise UsageError(f"{folder} is the checkpoint itself", hint="choose another --out")
        tokenizer = accepted_tokenizer(self.model.checkpoint, self.plan)
        workers = leaves_at_once(request, self.plan)
        self.maker = maker(request, self.plan, self.model, tokenizer, workers, progress)

    def run(self) -> RunResult:
        """Do the stages up to `request.until`."""
        results = [ArtifactResult(a) for a in self.plan.artifacts]
        if self.request.reaches("quantize"):
            require_fit(self.plan)
            with self.maker.alone():
                folders = {self.maker.folder_of(a): a for a in self.plan.artifacts}
                stores = {self.maker.store_of(a): a for a in self.plan.artifacts}
                require_disk(self.request, self.plan, folders, stores)
                for result in results:
                    self._make(result)
        return RunResult(self.plan, results)

    def _make(self, result: ArtifactResult) -> None:
        artifact = result.plan
        store = self.maker.open_store(artifact)
        try:
            if not self.request.reaches("export"):
                self.maker.fill(artifact, store)
                result.status = "quantized"
            else:
                result.path, names, facts = self.maker.export(artifact, store)
                result.files = [result.path / name for name in names]
                result.nbytes = sum(p.stat().st_size for p in result.files)
                result.status = "exported"
            shares = [store.exact_share(s) for s in artifact.steps if s.method in ("repack", "exact")]
            result.starved = starved(store, artifact.steps)
            result.repacked = (sum(e for e, _ in shares), sum(b for _, b in shares))
            if self.request.reaches("validate"):
                assert result.path is not None
                self.maker.seal(result.path, names)
                exact, blocks = result.repacked
                result.report = self.maker.prove(result.path, artifact, facts, rounded=exact < blocks)
                result.status = result.report["status"]
        finally:
            store.release()
