"""What a report says: labels, units, order and sentences, once for Markdown, HTML and the terminal."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.types.gates import GATES
from exporter.validate.report import figures
from exporter.validate.report.reading import at, flag, listed, number, table, words

FORMATS = {
    "gguf": "GGUF",
    "onnx": "ONNX",
    "tensorrt": "TensorRT-ready ONNX",
    "gptq": "GPTQ safetensors",
    "compressed-tensors": "compressed-tensors safetensors",
    "mxfp4": "MXFP4 safetensors",
}
CLASSES = {
    "exact": "exact: the checkpoint's numbers, moved and not rounded",
    "near": "near: 8 bits where the checkpoint has 16",
    "lossy": "lossy: 4 bits where the checkpoint has more",
}
# Key of the report -> what it is called wherever it is said.
THINGS = {
    "accuracy": "accuracy",
    "conversations": "conversations",
    "plain": "plain text",
    "long": "a long text",
    "twins": "nearest twin",
    "window": "the attention window",
    "floor": "noise floor",
    "generation": "generation",
    "generation.length_difference": "lengths of answers",
    "router": "the router's choices",
    "weights": "weights",
    "config": "what the file says of the model",
    "controls": "known-bad controls",
    "tasks": "tasks",
    "speed": "speed",
    "memory": "memory",
    "hardware": "hardware",
    "genai": "onnxruntime-genai",
    "genai.chat_equal": "conversations in onnxruntime-genai",
    "onnxruntime": "ONNX Runtime",
    "engines": "TensorRT engines",
    "gpu": "a GPU",
    "depth": "all layers",
    "tokenizer": "tokenizer",
    "cached": "decoding with the cache",
    "chunked": "prefill in pieces",
}
RELEASED = "as released"  # the twin that an artifact is to be nearest to
# Columns of accuracy, in order: (key, where an old report keeps its figures, label).
COLUMNS = {"conversations": "conversations", "plain": "plain text", "long": "long text"}
# One comparison each in reports of the first schema: dotted path -> label.
ARITHMETICS = {
    "release": "against the reference as released",
    "export": "against the reference in the runtime's arithmetic",
    "arithmetic": "against our forward on the same weights",
    "runtime_difference": "the runtime's arithmetic alone, against the release's",
    "cached.release": "decoding with the cache, past the window",
    "chunked.release": "prefill in pieces",
    "long.release": "past the length that it was trained on",
    "genai.prefill": "in onnxruntime-genai, prefill",
    "genai.cached": "in onnxruntime-genai, decoding",
    "gpu": "on the GPU, against our forward on the same weights",
}
_AS = {"exact": " as an exact artifact", "near": " as a near-exact artifact", "lossy": " as a lossy artifact"}
_ACRONYMS = {"kl": "KL", "ppl": "perplexity", "p99": "99%", "p999": "99.9%"}


@dataclass(frozen=True)
class Gate:
    """One gate of a report as it is said.

    share: of what the limit allows, the value takes; None: not of that kind. note: why else it did not pass.
    """

    name: str
    meaning: str
    value: str
    limit: str
    passed: bool
    share: float | None
    note: str = ""


def thing(key: str) -> str:
    """What a key of `not_run` is called."""
    return THINGS.get(key, words(key.replace("_", " ")))


def gates(report: Mapping[str, Any]) -> list[Gate]:
    """All gates, failed ones first, else in their order."""
    found = [_gate(table(each)) for each in listed(report, "gates")]
    return sorted(found, key=lambda gate: gate.passed)


def _gate(raw: Mapping[str, Any]) -> Gate:
    """A damaged one, and one whose value is not what it has to be, did not pass, whatever they say."""
    name = words(raw, "name") or "a gate without a name"
    kind = GATES.get(name)
    meaning = kind.meaning if kind else spoken(name)
    passed = flag(raw, "passed") is True
    value, limit = number(raw, "value"), number(raw, "limit")
    switch, note = flag(raw, "limit"), words(raw, "note")
    if switch is not None:  # a yes or a no
        found = flag(raw, "value")
        said = "not measured" if found is None else "yes" if found else "no"
        return Gate(name, meaning, said, "yes" if switch else "no", passed and found == switch, None, note)
    sense = kind.sense if kind else None
    if sense not in ("max", "min") and value is not None and limit is not None:
        sense = "max" if (value <= limit) == passed else "min"
    if value is None or limit is None or (value > limit if sense == "max" else value < limit):
        passed = False
    write = _writer(name, kind.metric if kind else "")
    bound = ("at least " if sense == "min" else "at most ") + write(limit)
    said = write(value) if value is not None else "not measured"
    return Gate(name, meaning, said, bound, passed, _of_limit(value, limit, sense, write is figures.ratio), note)


def _writer(name: str, metric: str) -> Callable[[float | None], str]:
    last = metric.rpartition(".")[2] or name
    if last.endswith(("top1", "share", "flips", "agreement", "same", "ended", "expansion")):
        return figures.share
    return figures.ratio if last.endswith("ratio") else figures.plain


def _of_limit(value: float | None, limit: float | None, sense: str | None, is_ratio: bool) -> float | None:
    """How much of what is allowed is taken: of the errors that a least share leaves, of what a ratio may be over 1."""
    if value is None or limit is None:
        return None
    if sense == "min":
        value, limit = 1 - value, 1 - limit
    elif is_ratio and limit > 1:
        value, limit = value - 1, limit - 1
    if limit > 0:
        return max(value, 0.0) / limit
    return None


def spoken(name: str) -> str:
    """A gate's or metric's name as words: "release_kl_mean" is "release KL mean"."""
    return " ".join(_ACRONYMS.get(part, part) for part in name.replace("_", " ").split()) or name


def passed(report: Mapping[str, Any]) -> bool | None:
    """The verdict; None where there is none. A report that says it passed beside a failed gate did not."""
    status, each = at(report, "status"), gates(report)
    if status not in ("passed", "gate failed") and not each:
        return None
    return status == "passed" and all(gate.passed for gate in each)


def name_of(report: Mapping[str, Any]) -> str:
    """A file's name for what anyone made; for an artifact of ours the model's, and which it is."""
    name, recipe = words(report, "subject.name"), words(report, "subject.recipe")
    which = "-".join(filter(None, (words(report, "subject.format"), recipe, words(report, "subject.target"))))
    return (name if not recipe or which in name else f"{name} {which}".strip()) or "an artifact"


def format_of(report: Mapping[str, Any]) -> str:
    name = words(report, "subject.format")
    return FORMATS.get(name, name)


def reference_of(report: Mapping[str, Any]) -> str:
    """ "openai/gpt-oss-20b" and the start of its revision."""
    name = words(report, "against.repo") or words(report, "against.name")
    revision = words(report, "against.revision", clip=64)
    return f"{name} at {revision[:12]}" if name and revision else name


def kl_of(report: Mapping[str, Any], column: str) -> float | None:
    """Mean KL of a column of text, nats; that of the plain text is the only one of the first schema."""
    return number(column_of(report, column), "kl_mean")


def column_of(report: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """The figures of a whole column of text; of the first schema those of its only text."""
    found = table(report, f"accuracy.{column}.all")
    return table(report, "release") if not found and column == "plain" and "accuracy" not in report else found


def sentence(report: Mapping[str, Any]) -> str:
    """What it is, whether it passed, and the gate that says most about it."""
    kind, against = format_of(report), reference_of(report)
    what = f"{name_of(report)}{f' ({kind})' if kind else ''}"
    state, each = passed(report), gates(report)
    if state is None:
        return f"{what} was not judged: the report holds no gates."
    of_class = _AS.get(words(report, "subject.class"), "")
    if state:
        return f"{what} passed{of_class}: {_close(report, against)}{_all_hold(each)}"
    failed = [gate for gate in each if not gate.passed]
    if not failed:
        return f"{what} failed{of_class}, and its report does not say at which gate."
    worst = max(failed, key=_badness)
    count = f"{len(failed)} of {figures.number_of(len(each), 'gate')} {'does' if len(failed) == 1 else 'do'} not hold"
    others = [gate.name for gate in failed if gate is not worst]
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    also = f" Also: {', '.join(others[:4])}{more}." if others else ""
    told = f"{what} failed{of_class}: {count}. The worst: {_said(worst)}.{also}"
    nearest = words(report, "twins.nearest")
    return f"{told} It behaves like the model with this mistake: {nearest}." if nearest not in ("", RELEASED) else told


def _badness(gate: Gate) -> float:
    """A wrong yes or no, and what was not measured, before any value."""
    return math.inf if gate.share is None else gate.share


def _said(gate: Gate) -> str:
    if gate.note:
        return f"{gate.name}: {gate.note}"
    if gate.value in ("no", "yes"):
        return f'it is not so that "{gate.meaning}" ({gate.name})' if gate.value == "no" else f"{gate.name} is yes"
    if gate.share is None:
        return f"{gate.name} is {gate.value}, and has to be {gate.limit}"
    return f"{gate.name} ({gate.meaning}) is {gate.value}, and has to be {gate.limit}"


def _close(report: Mapping[str, Any], against: str) -> str:
    for column, label in COLUMNS.items():
        if (kl := kl_of(report, column)) is not None:
            whom = f" from {against}" if against else " from the reference"
            return f"on {label} its predictions are a mean KL of {figures.plain(kl)} nats{whom}, and "
    return ""


def _all_hold(each: list[Gate]) -> str:
    if not each:
        return "no gate was asked for."
    hold = "the only gate holds" if len(each) == 1 else f"all {len(each)} gates hold"
    near = [gate for gate in each if gate.share is not None]
    if not near:
        return f"{hold}."
    nearest = max(near, key=_badness)
    return f"{hold}; nearest to its limit is {nearest.name}, {nearest.value} where {nearest.limit} is allowed."


def facts(report: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """A few figures at a glance: (label, figure, remark); those that were not measured are left out."""
    found: list[tuple[str, str, str]] = []

    def add(label: str, value: float | None, written: str, remark: str = "") -> None:
        if value is not None:
            found.append((label, written, remark))

    nbytes, bits = number(report, "subject.bytes"), number(report, "subject.bits_per_weight")
    add("size", nbytes, figures.size(nbytes), f"{bits:.3g} bits a weight" if bits is not None else "")
    for column, label in COLUMNS.items():
        if column != "long":
            kl, where = kl_of(report, column), f"accuracy.{column}.all.kl_ci95"
            between = figures.interval(at(report, where if "accuracy" in report else "release.kl_ci95"))
            add(f"KL, {label}", kl, figures.plain(kl), between or "nats")
    top1 = next((v for p in (*_tops(), "release.top1") if (v := number(report, p)) is not None), None)
    add("same top token", top1, figures.share(top1))
    decode, prompt = number(report, "speed.decode_tokens_per_second"), number(report, "speed.prefill_tokens_per_second")
    remark = f"prompt {figures.rate(prompt)}" if prompt is not None else ""
    add("tokens/s", decode, figures.rate(decode), remark)
    peak, predicted = number(report, "memory.peak_rss_bytes"), number(report, "predicted_memory.total")
    add("peak memory", peak, figures.size(peak), f"{figures.size(predicted)} predicted" if predicted else "")
    return tuple(found)


def _tops() -> list[str]:
    return [f"accuracy.{column}.all.top1" for column in COLUMNS]


def again(report: Mapping[str, Any]) -> str:
    """The command that makes this report anew, on any machine that has the files."""
    name, profile = words(report, "subject.name") or "ARTIFACT", words(report, "profile.name")
    repo, revision = words(report, "against.repo"), words(report, "against.revision")
    against = (f"{repo}@{revision}" if revision else repo) or words(report, "against.name")
    for_profile = f" --profile {shlex.quote(profile)}" if profile else ""
    recipe = words(report, "subject.recipe")
    if table(report, "subject") and not recipe:
        return f"exporter verify {shlex.quote(name)} --against {shlex.quote(against or 'CHECKPOINT')}{for_profile}"
    which = "-".join(filter(None, (words(report, "subject.format"), recipe, words(report, "subject.target"))))
    folder = f"artifacts/{name}/{profile}/{which}" if recipe and profile else name
    model = f" --model {shlex.quote(against)}" if against and not repo else ""
    return f"exporter validate {shlex.quote(folder)}{model}{for_profile}"
