"""The proof without a runtime: our own forward on the weights as they are read back from an artifact's files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import exporter
from exporter.errors import ExporterError
from exporter.formats.base import Located
from exporter.model import ModelConfig
from exporter.model.generate import generate
from exporter.model.reference import ReferenceLogits, Routes
from exporter.model.weights import Read, Weights
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline import regions
from exporter.pipeline.conversations import Questions, answers_in
from exporter.pipeline.plan import ArtifactPlan
from exporter.pipeline.reference import Reference
from exporter.types.qtensor import U8
from exporter.types.recipe import Step
from exporter.validate import text
from exporter.validate.accuracy import Further, further_report
from exporter.validate.metrics import between, flips, summary
from exporter.validate.onnxruntime import compare_tokenizers

_AGAIN = "exporter quantize ... --overwrite makes it again"
_NO_RUNTIME = "computed by exporter's own forward, whose speed and memory say nothing of a runtime's"


def read_back(descriptor: int, place: Located, step: Step, start: int, stop: int) -> list[U8]:
    """The arrays of some leading indices of a tensor, from the open file that has them."""
    arrays = regions.read_all(descriptor, place.parts, start, stop)
    if arrays is None:
        raise ExporterError(f"{place.path.name}: ends inside {step.name}", hint=_AGAIN)
    return arrays


@contextmanager
def reading(folder: Path, artifact: ArtifactPlan) -> Iterator[Read]:
    """Reads float32 rows of the artifact's tensors from its files."""
    located = artifact.format.locate(folder, artifact.steps)
    steps = {step.name: step for step in artifact.steps}
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {p.path for p in located.values()}}

    def read(name: str, start: int, stop: int) -> F32:
        step, place = steps[name], located[name]
        arrays = read_back(descriptors[place.path], place, step, start, stop)
        try:
            return decode.values(artifact.format.unpack(step, arrays))
        except ValueError as error:
            raise ExporterError(f"{place.path}: {name} is damaged: {error}", hint=_AGAIN) from error

    try:
        yield read
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def own_forward(folder: Path, artifact: ArtifactPlan, reference: Reference) -> ReferenceLogits:
    """What the reference's arithmetic predicts on the windows with an artifact's weights."""
    with reading(folder, artifact) as read:
        return reference.predict(read, f"{artifact.format.name}: logits")


def in_our_forward(
    read: Read,
    name: str,
    tokenizer_file: Path | None,
    reference: Reference,
    config: ModelConfig | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """The report on weights that `read` gives, of a format called `name`, computed as `config` says.

    There is no second arithmetic, so "export" and "release" are one comparison. No speed, no memory. `tokenizer_file`:
    the artifact's; `config`: where it is not the checkpoint's; `quick`: see Reference.further.
    """
    further = reference.further(quick=quick)  # first: the reference's weights then leave the device
    weights = reference.weights_of(read)
    routes = Routes(config or reference.config, reference.windows.tokens.size)
    made = reference.predict(weights, f"{name}: logits", routed=routes, config=config)
    positions = between(reference.release, made)
    figures = summary(positions)
    found = {}
    for column in further.columns:
        of_text = reference.predict(weights, f"{name}: {column.name}", column.reference.tokens, config=config)
        found[column.name] = {"release": between(column.reference, of_text)}
    first = made.first(len(further.base.tokens))
    beside = {twin: between(logits, first) for twin, logits in further.twins.items()}
    answers = _answers(weights, config or reference.config, further, reference.device) if further.prompts else None
    more = further_report(further, (reference.release, positions), found, positions, beside, answers)
    report: dict[str, Any] = {
        "export": figures,
        "release": figures,
        "runtime": {
            "name": "exporter reference",
            "version": exporter.__version__,
            "arithmetic": "float32",
            "device": reference.device.partition(":")[0],
        },
        "router": {"choices": int(routes.experts.shape[0] * routes.experts.shape[1])},
        **more,
    }
    no_runtime = dict.fromkeys(("speed", "memory"), _NO_RUNTIME)
    report["not_run"] = {**further.not_run, **no_runtime, **more.get("not_run", {})}
    report["router"]["release"] = flips(reference.routes, routes.experts, positions)
    if tokenizer_file is not None:
        tokenizer = text.load_tokenizer(reference.tokenizer_file)
        own = text.load_tokenizer(tokenizer_file)
        report |= compare_tokenizers(tokenizer, own, text.pieces(tokenizer, reference.sample))
    return report


def _answers(weights: Weights, config: ModelConfig, further: Further, device: str) -> list[list[int]]:
    prompts: Sequence[list[int]] = further.prompts
    length = max(map(len, prompts)) + further.answer
    script = Questions(list(prompts))
    tokens = generate(config, weights, script, len(prompts), length, temperature=0.0, device=device)
    return answers_in(tokens, prompts, further.answer, further.ends)
