"""The parts of a report that are the same for every artifact, ours or anyone's, and the verdict on it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import exporter
from exporter.checkpoint import Checkpoint
from exporter.numerics import decode
from exporter.pipeline.files import write_whole
from exporter.pipeline.reference import REFERENCE_TOP_K, Reference
from exporter.pipeline.report import remove_pages, write_pages
from exporter.pipeline.seal import OWN_CAP
from exporter.pipeline.target import target
from exporter.types.gates import GATES, LossClass, Verdict
from exporter.types.profile import Profile
from exporter.validate import gates
from exporter.validate.hardware import hardware

SCHEMA = 2
# Left out of the gates where it could not be measured: it takes a GPU for a large model, answers that end, or more
# context than there is.
_OPTIONAL = ("generation", "generation.length_difference", "long")


def begin(folder: Path) -> dict[str, Any]:
    """Whatever the reports in `folder` said, its artifact is judged anew; what the last one was."""
    path, before = folder / "report.json", None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        plain = path.is_file() and path.stat().st_size < OWN_CAP  # opening a pipe waits for whoever writes it
        before = json.loads(path.read_bytes()) if plain else None
    path.unlink(missing_ok=True)
    remove_pages(folder)
    return before if isinstance(before, dict) else {}


def tasks_of(before: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """`tasks` of the last report, where it was of the same numbers: scores take hours and do not change."""
    of = before.get("subject")
    same = digest and isinstance(of, Mapping) and of.get("digest") == digest
    return {"tasks": before["tasks"]} if same and isinstance(before.get("tasks"), list) else {}


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Tells checkpoints apart by some of their numbers, wherever they lie and however they are stored."""
    config = checkpoint.config
    h = hashlib.sha256(repr(config).encode())
    for layer in (0, config.num_hidden_layers - 1):
        for name in ("self_attn.q_proj.weight", "self_attn.sinks", "mlp.router.weight", "mlp.experts.down_proj.weight"):
            values = decode.values(checkpoint.read(f"model.layers.{layer}.{name}", 0, 1))
            h.update(np.ascontiguousarray(values, "<f4").tobytes())
    return h.hexdigest()


def subject(
    name: str,
    form: str,
    files: Sequence[Path],
    loss: LossClass,
    parameters: int,
    *,
    recipe: str = "",
    to: str = "",
    tool: str = "",
    digest: str = "",
) -> dict[str, Any]:
    """What is judged. `parameters`: of the model, for the bits of each; `digest`: of all its numbers."""
    sizes = {path.name: path.stat().st_size for path in files}
    total = sum(sizes.values())
    return {
        "name": name,
        "format": form,
        "recipe": recipe,
        "target": to,
        "bytes": total,
        "files": [{"name": each, "bytes": size} for each, size in sizes.items()],
        "tool": tool,
        "digest": digest,
        "class": loss,
        "bits_per_weight": 8 * total / parameters,
    }


def against(reference: Reference, name: str) -> dict[str, Any]:
    """What it is judged by: `against`, `text` and `made` of a report."""
    checkpoint, windows = reference.checkpoint, reference.windows
    return {
        "schema": SCHEMA,
        "made": {
            "exporter": exporter.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "against": {
            "name": name,
            "repo": checkpoint.repo or "",
            "revision": checkpoint.revision or "",
            "sha256": checkpoint_digest(checkpoint),
            "top_k": min(REFERENCE_TOP_K, reference.config.vocab_size),
            "tail_mass": float(np.exp(reference.release.tail_logprob.astype(np.float64)).mean()),
            "device": reference.device,
            "precision": "float32",
        },
        "text": {
            "source": windows.source,
            "sha256": windows.sha256,
            "tokens": int(windows.tokens.size),
            "windows": list(windows.tokens.shape),
        },
    }


def finish(
    folder: Path, report: dict[str, Any], profile: Profile, limits: Mapping[str, float | bool], no_limit: str = ""
) -> dict[str, Any]:
    """The report with hardware, target, gates and verdict, written to report.json, report.md and report.html.

    `no_limit`: why no limit of memory was enforced, where none was.
    """
    here = hardware()
    used = str(report["runtime"].get("device", "cpu"))
    report["hardware"] = here
    report["target"] = target(profile, used, here, report.get("memory", {}), no_limit)
    report["profile"] = {"name": profile.name, "sha256": profile.sha256}
    found = verdicts(report, limits)
    report["gates"] = [{k: v for k, v in asdict(verdict).items() if k != "note" or v} for verdict in found]
    report["status"] = "passed" if found and all(v.passed for v in found) else "gate failed"
    write_whole(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_pages(folder, report)
    return report


def verdicts(report: Mapping[str, Any], limits: Mapping[str, float | bool]) -> list[Verdict]:
    """One for each limit, but for what `not_run` says could not be measured and need not be."""
    not_run = report.get("not_run", {})
    optional = tuple(key if "." in key else f"{key}." for key in _OPTIONAL if key in not_run)
    optional += ("accuracy.long.",) if "long" in not_run else ()
    return gates.evaluate(report, {name: limit for name, limit in limits.items() if not _left_out(name, optional)})


def _left_out(gate: str, optional: tuple[str, ...]) -> bool:
    return bool(optional) and gate in GATES and GATES[gate].metric.startswith(optional)
