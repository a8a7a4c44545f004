"""Examines a checkpoint and says everything that is wrong with it, not only the first thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.checkpoint.contents import examine
from exporter.checkpoint.findings import Finding, Findings, Level
from exporter.checkpoint.folder import find_beside, find_weights
from exporter.checkpoint.headers import read_json, shown
from exporter.checkpoint.source import Checkpoint, open_checkpoint, parse_config, read_template
from exporter.checkpoint.vocabulary import examine_texts
from exporter.errors import BadCheckpoint, ExporterError
from exporter.model import ModelConfig


@dataclass(frozen=True)
class Diagnosis:
    """`findings`, errors first; `checkpoint` when it could be opened (the caller closes it).

    `tokenizer` holds plain facts about the vocabulary; `deep` says whether every tensor was read.
    """

    path: Path
    findings: list[Finding]
    checkpoint: Checkpoint | None
    deep: bool
    tokenizer: dict[str, Any] = field(default_factory=dict)

    def count(self, level: Level) -> int:
        return sum(f.level == level for f in self.findings)

    @property
    def sound(self) -> bool:
        """No errors: the artifacts made from it can be right."""
        return not self.count("error")


def diagnose(path: Path, deep: bool = True, on_progress: Callable[[int, int], None] | None = None) -> Diagnosis:
    """Examine a checkpoint folder; a bad one gives findings and no exception.

    `deep` reads every tensor, a leaf at a time, for NaN, zero experts and the like; else headers and
    small files only. `on_progress(done, total)` counts bytes.
    """
    path, findings = Path(path), Findings()
    try:
        checkpoint = open_checkpoint(path)
    except ExporterError as e:
        findings.add("error", e.message, str(path), e.hint or "")
        facts = _small_files(path, findings)
        return Diagnosis(path, findings.sorted(), None, False, facts)
    tokenizer: dict[str, Any] = {}
    read = False
    try:
        tokenizer = _examine_small(checkpoint, findings)
        if deep:
            examine(checkpoint, findings, on_progress)
            read = True
    except ExporterError as e:
        findings.add("error", e.message, str(path), e.hint or "")
    except OSError as e:
        findings.add("error", f"cannot be read ({e.strerror})", str(path), "check its permissions")
    return Diagnosis(path, findings.sorted(), checkpoint, read, tokenizer)


def require_sound_files(checkpoint: Checkpoint) -> None:
    """Raises BadCheckpoint with the first error that configuration, tokenizer and template show."""
    findings = Findings()
    _examine_small(checkpoint, findings)
    errors = [f for f in findings.sorted() if f.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        cure = f"{errors[0].cure}; exporter doctor says all" if errors[0].cure else "exporter doctor says all"
        raise BadCheckpoint(f"{errors[0].where}: {errors[0].what}{more}", cure)


def _examine_small(c: Checkpoint, findings: Findings) -> dict[str, Any]:
    _check_config(c, findings)
    _check_files(c, findings)
    texts = c.generation_config, c.tokenizer_config, c.chat_template
    return examine_texts(c.config, c.tokenizer_file, *texts, findings, c.path)


def _small_files(path: Path, findings: Findings) -> dict[str, Any]:
    """The tokenizer's examination when the weights could not be opened: still worth a look."""
    try:
        weights = find_weights(path)
        config = _config_of(path, weights)
        if config is None:
            return {}
        texts = [_json_of(path, weights, n) for n in ("generation_config.json", "tokenizer_config.json")]
        tokenizer = find_beside(path, weights, "tokenizer.json")
        template = read_template(find_beside(path, weights, "chat_template.jinja"), texts[1])
    except (ExporterError, OSError):
        return {}  # already said, or the folder cannot be read at all
    return examine_texts(config, tokenizer, texts[0], texts[1], template, findings, path)


def _config_of(path: Path, weights: Path) -> ModelConfig | None:
    file = find_beside(path, weights, "config.json")
    return None if file is None else parse_config(read_json(file), str(file))


def _json_of(path: Path, weights: Path, name: str) -> dict[str, Any] | None:
    file = find_beside(path, weights, name)
    return None if file is None else read_json(file)


def _check_config(c: Checkpoint, findings: Findings) -> None:
    where = str(c.config_file)
    quantization = c.config_raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    mxfp4 = any(c.scheme(s.name).name == "mxfp4" for s in c.specs)
    original = "model_type" not in c.config_raw
    if method not in (None, "mxfp4"):
        what = f"says quant_method {shown(method)}, but the tensors are {'MXFP4' if mxfp4 else 'plain floats'}"
        findings.add("warning", what, where, "remove quantization_config: other tools believe it")
    elif method == "mxfp4" and not mxfp4:
        what = "says quant_method mxfp4, but the experts are plain floats"
        findings.add("warning", what, where, "remove quantization_config: other tools believe it")
    elif method is None and mxfp4 and not original:
        what = "has no quantization_config, but the experts are MXFP4: transformers will not load them"
        findings.add("warning", what, where, 'add {"quant_method": "mxfp4"} as quantization_config')
    if c.config.rope.kind == "yarn" and c.config.rope.truncate:
        what = "YaRN with truncate on; the release has truncate: false, and logits differ"
        findings.add("warning", what, where, "set truncate to false unless the model was trained so")
    if c.config.rope.kind == "default":
        what = "plain RoPE without YaRN; the release uses YaRN with factor 32"
        findings.add("warning", what, where, "restore rope_scaling from the source model")
    if c.config.tie_word_embeddings and not c.head_is_tied:
        what = "tie_word_embeddings is true, but lm_head.weight is stored; the stored one is used"
        findings.add("warning", what, where, "set it to false, or remove lm_head.weight")


def _check_files(c: Checkpoint, findings: Findings) -> None:
    if c.index_total is not None and c.index_total != c.tensor_bytes:
        what = f"the index says {c.index_total:,} bytes of tensors, the shards hold {c.tensor_bytes:,}"
        findings.add("warning", what, str(c.path), "harmless here; take the index of these shards")
    for note in c.notes:
        findings.add("note", note, str(c.path))
    if c.unused:
        findings.group("note", "stored but not part of the model, not used", c.unused[0])
    pickles = [p.name for p in c.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        findings.add("note", f"pickle files lie beside the weights; they are never read: {pickles[0]}", str(c.path))
    if (c.path / "adapter_config.json").exists():
        what = "a LoRA adapter lies beside the model; it is not applied"
        findings.add("warning", what, str(c.path), "merge it if it is meant to be part of the model")
