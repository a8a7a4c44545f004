"""Judge anyone's artifact against a checkpoint: what it says it is, every number it holds, how it behaves."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import BadCheckpoint, Refused, UsageError
from exporter.model import parameter_count
from exporter.pipeline.bench import find_subject
from exporter.pipeline.foreign import Foreign, compare_config, open_foreign
from exporter.pipeline.judge import against, begin, finish, subject
from exporter.pipeline.lock import locked
from exporter.pipeline.machine import runtime_threads, usable_cpus
from exporter.pipeline.manners import compare_manners
from exporter.pipeline.measured import MeasuredText, measured_text
from exporter.pipeline.own import in_our_forward
from exporter.pipeline.profiles import load_profile
from exporter.pipeline.progress import Progress, worker_stages
from exporter.pipeline.prove import in_llama_cpp
from exporter.pipeline.prove_onnx import in_foreign_onnxruntime
from exporter.pipeline.reference import Reference
from exporter.pipeline.runtimes import require_runtimes, resolve_device
from exporter.pipeline.source import OpenedModel, open_model
from exporter.pipeline.target import limit_for
from exporter.pipeline.weights import compare_weights
from exporter.types.gates import CLASSES, LossClass
from exporter.types.profile import Profile
from exporter.validate.limits import Limit
from exporter.validate.runtime import SCRATCH_PREFIX
from exporter.validate.text import load_tokenizer

_NEAR_BITS = 8.0  # of a weight
# What only the files of exporter's own making are held against.
_OURS = ("digests_equal", "head_equal")
_REPORTS = {"report.json", "report.md", "report.html", "reference", "written", ".lock"}
_RUNTIME = {"gguf": "gguf", "onnx": "onnx", "folder": ""}


@dataclass(frozen=True)
class Ask:
    """path: a file or a folder of anyone's. model: the checkpoint, a folder or a Hub id. out: where reports go.

    loss: the class to hold it to, "" for the one that its own types make it. text: what to measure on, "" for the
    default.
    """

    path: Path
    model: str
    profile: str = "16gb"
    loss: str = ""
    text: str = ""
    out: Path | None = None
    device: str = "auto"


def verify(ask: Ask, progress: Progress) -> dict[str, Any]:
    """The report on an artifact, written into `folder_of(ask)`.

    Raises UsageError for what is no artifact, Refused where it is of another model, ExporterError where it is damaged.
    """
    if ask.loss and ask.loss not in CLASSES:
        raise UsageError(f'no class "{ask.loss}"', hint=f"one of {', '.join(CLASSES)}")
    profile = load_profile(ask.profile)
    foreign = open_foreign(ask.path)
    try:
        require_runtimes(ask.device, [_RUNTIME[foreign.kind]] if _RUNTIME[foreign.kind] else [])
        return _verify(ask, foreign, profile, progress)
    finally:
        foreign.close()


def folder_of(ask: Ask) -> Path:
    """Where the reports go."""
    return ask.out or Path("artifacts") / "verified" / ask.path.absolute().name


def _verify(ask: Ask, foreign: Foreign, profile: Profile, progress: Progress) -> dict[str, Any]:
    folder = _require_own(folder_of(ask))
    model = open_model(ask.model, progress)
    checkpoint = model.checkpoint
    if checkpoint.tokenizer_file is None:
        raise BadCheckpoint(f"{checkpoint.path}: tokenizer.json is missing", hint="copy it from the source model")
    if foreign.kind == "folder" and foreign.path.resolve() == checkpoint.path.resolve():
        raise UsageError(f"{ask.path} is the checkpoint itself", hint="--against another")
    if foreign.tokenizer_file is not None:
        load_tokenizer(foreign.tokenizer_file)  # one that cannot be read is said before hours of work
    differs = compare_config(foreign, checkpoint.config)
    chat = compare_manners(foreign.manners, checkpoint) if foreign.manners is not None else None
    weights = compare_weights(foreign, checkpoint, usable_cpus(), progress) if foreign.read is not None else None
    with locked(folder):
        begin(folder)
        for left in folder.glob(f"{SCRATCH_PREFIX}*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        reference = _reference(ask, model, profile, folder, progress)
        loss: LossClass = next((name for name in CLASSES if name == ask.loss), _class_of(foreign))
        parameters = parameter_count(checkpoint.config)
        report = {
            **against(reference, model.name),
            "subject": subject(
                ask.path.absolute().name, foreign.format, foreign.files, loss, parameters, tool=foreign.tool
            ),
            **({"config_equal": not differs, "config_differs": differs} if _says_which(foreign) else {}),
            **({"weights": weights} if weights is not None else {}),
            **({"chat": chat} if chat is not None else {}),
        }
        report |= _run(foreign, reference, limit_for(profile, foreign.files), progress)
        if weights is None:
            report["not_run"]["weights"] = "the numbers in graphs of other tools are not read: only how they behave"
        if foreign.tokenizer_file is None and foreign.kind != "gguf":
            report["not_run"]["tokenizer"] = "there is no tokenizer.json beside it"
        if chat is None:
            report["not_run"]["chat"] = "nothing beside the weights says how a conversation is rendered"
        if not _says_which(foreign):
            report["not_run"]["config"] = "the graph has no config.json and no genai_config.json beside it"
        return finish(folder, report, profile, _limits(profile, loss, foreign, report))


def _require_own(folder: Path) -> Path:
    """The folder for reports. Raises Refused where it holds what no earlier run, killed or not, can have left there."""
    names = {path.name.removesuffix(".partial") for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if any(name not in _REPORTS and not name.startswith(SCRATCH_PREFIX) for name in names):
        raise Refused(f"{folder} holds other files than reports", hint="--out: a folder of its own")
    return folder


def _reference(ask: Ask, model: OpenedModel, profile: Profile, folder: Path, progress: Progress) -> Reference:
    text: MeasuredText | None = None
    if ask.text:
        text = measured_text(ask.text, model.checkpoint, profile.validate, progress)
    device = resolve_device(ask.device)
    return Reference(model, profile, folder / "reference", device, progress, texts=text)


def _run(foreign: Foreign, reference: Reference, limit: Limit, progress: Progress) -> dict[str, Any]:
    threads = runtime_threads()
    if foreign.kind == "gguf":
        return in_llama_cpp(foreign.path, reference, threads, limit, progress)
    if foreign.kind == "onnx":
        made_for = find_subject(foreign.path)
        told = worker_stages(progress, "onnxruntime")
        report = in_foreign_onnxruntime(
            foreign.path,
            made_for.device,
            made_for.head_size or reference.config.head_dim,
            foreign.tokenizer_file,
            reference,
            threads,
            limit,
            told,
        )
        progress.done()
        return report
    assert foreign.read is not None  # a folder has both
    assert foreign.config is not None
    report = in_our_forward(foreign.read, foreign.format, foreign.tokenizer_file, reference, foreign.config)
    report["not_run"]["runtime"] = "no runtime of its own: our own forward computed the weights in the folder"
    return report


def _says_which(foreign: Foreign) -> bool:
    """Whether it says anything of the model that can be compared; a graph alone does not."""
    return foreign.config is not None or bool(foreign.said)


def _class_of(foreign: Foreign) -> LossClass:
    """The class that its types make it: exact where each can hold the release, near where the others have 8 bits."""
    if foreign.read is None:
        return "lossy"
    rounded = [stored.bits for stored in foreign.stored.values() if not stored.exact]
    if not rounded:
        return "exact"
    return "near" if min(rounded) >= _NEAR_BITS else "lossy"


def _limits(profile: Profile, loss: LossClass, foreign: Foreign, report: Mapping[str, Any]) -> dict[str, float | bool]:
    limits: dict[str, float | bool] = {}
    if "config_equal" in report:
        limits["config_equal"] = True
    if "limit_held" in report.get("memory", {}):
        limits["memory_limit_held"] = True
    if "chat" in report:
        limits["chat_equal"] = True
    if "weights" in report:
        limits["weights_sound"] = True
    limits |= {name: limit for name, limit in profile.gates.of(loss).items() if name not in _OURS}
    if foreign.tokenizer_file is None and foreign.kind != "gguf":
        limits.pop("tokenizer_equal", None)  # it has none to be wrong
    return limits
