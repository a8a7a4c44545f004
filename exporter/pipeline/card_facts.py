"""What a card says of one artifact: its manifest.json and report.json as texts, and the pictures of its proof."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.pipeline.card_proof import proof, runtime_of, sealed_proof
from exporter.publish.card import Item, Picture
from exporter.publish.card.facts import Loss, Status
from exporter.types.profile import artifact_folder
from exporter.validate.report import blocks, document, figures, sentence, words
from exporter.validate.report.html import alone
from exporter.validate.report.reading import listed, number, table
from exporter.validate.report.reading import words as said

HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_COMMAND = re.compile(r"exporter quantize( [A-Za-z0-9@%+=:,./_-]+)+")
PLOTS = "plots"  # the folder of a repository that pictures of cards lie in
# Pictures of a report that a card shows: title there -> name of the file here. Tables say the rest.
_SHOWN = {"KL of all positions, in order": "kl", "KL along the text": "position"}


@dataclass(frozen=True)
class Entry:
    """An artifact for the card. prefix: its folder in the repository, "" for the root. report: None if not proved."""

    prefix: str
    manifest: Mapping[str, Any]
    report: Mapping[str, Any] | None


def artifact_name(manifest: Mapping[str, Any]) -> str:
    """What an artifact's folder is called: "gguf-mxfp4-q8", "onnx-gptq-int4-g64-webgpu"."""
    return artifact_folder(said(manifest, "format"), said(manifest, "recipe.name"), said(manifest, "target"))


def item_of(entry: Entry, drawn: dict[str, bytes]) -> Item:
    """The facts of one artifact; its pictures are added to `drawn`, by path."""
    made, report = entry.manifest, entry.report or {}
    recipe = said(made, "recipe.name")
    label = entry.prefix or artifact_name(made)
    tensors = [table(each) for each in table(made, "tensors").values()]
    column = words.column_of(report, "conversations") or words.column_of(report, "plain")
    kl, top1 = number(column, "kl_mean"), number(column, "top1")
    decode = number(report, "speed.decode_tokens_per_second")
    peak, predicted = number(report, "memory.peak_rss_bytes"), number(report, "predicted_memory.total")
    fmt = said(made, "format")
    return Item(
        prefix=entry.prefix,
        label=label,
        model=said(made, "model"),
        format=fmt,
        kind=words.FORMATS.get(fmt, fmt),
        target=said(made, "target"),
        recipe=recipe,
        recipe_title=said(made, "recipe.title"),
        files={str(name): int(number(each, "bytes") or 0) for name, each in table(made, "files").items()},
        schemes=frozenset(said(each, "scheme") for each in tensors),
        methods=frozenset(said(each, "method") for each in tensors),
        context=int(number(report, "predicted_memory.context") or 0),
        device=_device(report, said(made, "target")),
        loss=_loss(said(report, "subject.class") or said(made, "proof.class")),
        status=_status(entry),
        kl="" if kl is None else figures.plain(kl) + _spread(column),
        top1="" if top1 is None else figures.share(top1),
        decode="" if decode is None else figures.rate(decode),
        machine=_machine(report),
        predicted=figures.size(predicted) if predicted else "",
        measured=figures.size(peak) if peak else "",
        runtime=runtime_of(report),
        sentence=sentence(report) if report else "",
        reported=bool(report),
        proof=proof(report) if report else sealed_proof(made),
        pictures=_pictures(report, entry.prefix, drawn),
        source=repo if HUB_ID.fullmatch(repo := said(made, "source.repo")) else "",
        revision=said(made, "source.revision"),
        origin=_origin(made, report),
        command=_command(made),
    )


def _loss(name: str) -> Loss:
    known: tuple[Loss, ...] = ("exact", "near", "lossy")
    return next((loss for loss in known if loss == name), "")


def _status(entry: Entry) -> Status:
    """A report that passed beside a manifest that did not, or the other way round, is a failure."""
    sealed = said(entry.manifest, "proof.status")
    verdict = words.passed(entry.report) if entry.report is not None else None
    if verdict is False or sealed == "gate failed":
        return "gate failed"
    return "passed" if verdict or (entry.report is None and sealed == "passed") else ""


def _device(report: Mapping[str, Any], target: str) -> str:
    """ "GPU with 15.9 GiB"."""
    kind, memory = said(report, "target.device"), number(report, "target.memory_bytes")
    kind = "CPU" if "cpu" in (kind, target) else "GPU" if kind == "gpu" else ""
    return f"{kind} with {memory / 2**30:.3g} GiB" if kind and memory else kind


def _spread(column: Mapping[str, Any]) -> str:
    """ " ± 0.0006": half of the 95% interval of the mean KL."""
    ends = [number(each) for each in listed(column, "kl_ci95")]
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return ""
    return figures.deviation((ends[1] - ends[0]) / 2) if ends[1] > ends[0] else ""


def _machine(report: Mapping[str, Any]) -> str:
    """What computed: the GPU where one did, else the CPU."""
    gpus = [said(gpu, "name") for gpu in listed(report, "hardware.gpus")]
    on_gpu = said(report, "runtime.device") not in ("", "cpu") or (number(report, "runtime.gpu_layers") or 0) > 0
    if gpus and on_gpu:
        return gpus[0]
    cpu, cores = said(report, "hardware.cpu"), number(report, "hardware.cores")
    return f"a CPU ({cpu}{f', {figures.count(cores)} cores' if cores else ''})" if cpu else "a machine it does not name"


def _pictures(report: Mapping[str, Any], prefix: str, drawn: dict[str, bytes]) -> tuple[Picture, ...]:
    """Those of a proof in which something differs: a line at zero shows nothing."""
    if not any(words.kl_of(report, column) for column in words.COLUMNS):
        return ()
    found = {
        block.title: block
        for section in document(report).sections
        for block in section.blocks
        if isinstance(block, blocks.Picture)
    }
    pictures = []
    for title, name in _SHOWN.items():
        if title in found:
            path = f"{PLOTS}/{'-'.join(filter(None, (prefix, name)))}.svg"
            drawn[path] = alone(found[title].svg).encode()
            pictures.append(Picture(path, title, found[title].caption))
    return tuple(pictures)


def _command(made: Mapping[str, Any]) -> str:
    """The command that makes it; "" where what stands there could do anything else in a shell."""
    command = said(made, "command", clip=400)
    return command if _COMMAND.fullmatch(command) else ""


def _origin(made: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, str]:
    profile = table(report, "profile") or table(made, "proof.profile")
    sources, versions = table(made, "source.files"), table(made, "versions")
    written = ", ".join(f"{said(str(name))} {said(version)}" for name, version in list(versions.items())[:16])
    found = {
        "recipe, SHA-256": said(made, "recipe.sha256"),
        "files of the source, each with its SHA-256 in manifest.json": figures.count(len(sources)) if sources else "",
        "calibrated on": said(made, "calibration.text"),
        "calibration text, SHA-256": said(made, "calibration.sha256"),
        "digest of all tensors, BLAKE3": said(made, "digest"),
        "planned and proved for profile": said(profile, "name"),
        "profile, SHA-256": said(profile, "sha256"),
        "exporter": said(made, "exporter"),
        "computed with": written,
    }
    return {label: value for label, value in found.items() if value}
