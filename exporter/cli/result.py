"""What a run answers with: one row an artifact, as a table or as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from exporter.cli.failures import stoppable
from exporter.cli.output import peak_rss, print_json, print_table, progress, say
from exporter.pipeline.progress import Progress
from exporter.types.profile import artifact_folder
from exporter.types.sizes import format_size


def run_and_answer(request: Any, quiet: bool, as_json: bool) -> int:
    """Do the main job and answer; 3 when a gate failed."""
    from exporter.pipeline.run import Run

    return answer(lambda watch: Run(request, watch).run(), quiet, as_json)


def answer(job: Callable[[Progress], Any], quiet: bool, as_json: bool) -> int:
    """Do a job that ends with a RunResult and answer; 3 when a gate failed."""
    stoppable()
    started = time.monotonic()
    result = job(progress(quiet or as_json))
    rows = [_row(a) for a in result.artifacts]
    seconds = time.monotonic() - started
    if as_json:
        head = {"model": result.plan.model_name, "profile": result.plan.profile.name, "artifacts": rows}
        print_json({**head, "peak_rss_bytes": peak_rss(), "seconds": round(seconds, 3)})
    else:
        _show(result.plan, rows, seconds)
    return 3 if any(row["status"] == "gate failed" for row in rows) else 0


def _row(result: Any) -> dict[str, Any]:
    """One artifact of the answer; keys that were not measured are absent."""
    report, plan = result.report, result.plan
    row: dict[str, Any] = {
        "format": plan.format.name,
        "recipe": plan.recipe.name,
        "target": plan.spec.target,
        "path": str(result.path) if result.path else None,
        "bytes": result.nbytes or None,
        "status": result.status,
    }
    if result.repacked[1]:
        row["repacked"] = {"exact_blocks": result.repacked[0], "blocks": result.repacked[1]}
    if result.starved:
        row["starved_experts"] = result.starved
    if report:
        row |= {
            "digests_equal": report["digests_equal"],
            "digests": report["digests"],
            "metrics": {**report["release"], "export": report["export"]},
            "tokenizer_equal": report["tokenizer_equal"],
            "runtime": report["runtime"],
            "gates": report["gates"],
        }
        # What only some runtimes measure.
        row |= {key: report[key] for key in _BESIDE if report.get(key)}
        row |= {"class": report["subject"]["class"], "hardware_target": report["target"]}
        row["metrics"]["texts"] = {name: column.get("all") for name, column in report["accuracy"].items()}
        extra = {name: report.get(key) for name, key in _FIGURES.items()}
        row["metrics"] |= {name: found for name, found in extra.items() if found}
    return row


# Keys of the report that are the answer's as well.
_BESIDE = ("speed", "memory", "twins", "floor", "generation", "controls", "not_run")
_LEGEND = {
    "llama.cpp": "KL and top-1 against the bf16 reference as released; "
    "* against the reference as llama.cpp computes it.",
    "onnxruntime": "KL and top-1 against the bf16 reference as released, of the graph as shipped; "
    "* with float32 activations.",
    "reference": "KL and top-1 against the bf16 reference as released, "
    "in its own arithmetic on the weights in the files.",
}
# Name in the answer -> key of the report.
_FIGURES = {
    "runtime": "runtime_difference",
    "cached": "cached",
    "long": "long",
    "router": "router",
    "genai": "genai",
    "optimizer": "optimizer",
    "engines": "engines",
    "gpu": "gpu",
    "rules": "rules",
    "depth": "depth",
}


def _show(plan: Any, rows: list[dict[str, Any]], seconds: float) -> None:
    if not any("metrics" in row for row in rows):
        for row in rows:
            size = format_size(row["bytes"]) if row["bytes"] else ""
            say(f"{_label(row)}  {row['status']}  {size}  {row['path'] or ''}".rstrip())
    else:
        columns = ("artifact", "size", "digests", "KL", "top-1", "tokens/s", "memory", "gates")
        print_table(columns, map(_cells, rows), f"{plan.model_name} for {plan.profile.name}")
    recipes: set[str] = set()
    for row in rows:
        _remarks(row, f"{_label(row)}: " if len(rows) > 1 else "", row["recipe"] not in recipes)
        recipes.add(row["recipe"])
    _legend(rows)
    say(f"{seconds:.1f} s, peak memory {format_size(peak_rss())}")


def _label(row: dict[str, Any]) -> str:
    return artifact_folder(row["format"], row["recipe"], row["target"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    m, digests = row["metrics"], row["digests"]
    failed = [g for g in row["gates"] if not g["passed"]]
    verdict = f"ok, all {len(row['gates'])}"
    if failed:
        every = (f"{g['name']} {_value(g['value'])} (limit {_value(g['limit'])})" for g in failed)
        verdict = "FAIL " + ",\n".join(every)
    kl, top1, speed, memory = f"{m['kl_mean']:.2e}", f"{m['top1']:.2%}", "not run", "not run"
    if _two_arithmetics(row):
        kl, top1 = f"{kl}\n{m['export']['kl_mean']:.2e} *", f"{top1}\n{m['export']['top1']:.2%} *"
    if each := row.get("speed"):
        speed = f"prompt {each['prefill_tokens_per_second']:.0f}\nanswer {each['decode_tokens_per_second']:.0f}"
        if not row["runtime"].get("executed_on_target", True):
            speed += "\non the CPU"
    if each := row.get("memory"):
        memory = format_size(each["peak_rss_bytes"])
    equal = f"{digests['equal']} of {digests['tensors']}"
    return _label(row), format_size(row["bytes"]), equal, kl, top1, speed, memory, verdict


def _two_arithmetics(row: dict[str, Any]) -> bool:
    """Whether "export" and "release" are two comparisons: a runtime computed them, not our own forward."""
    depth = row["metrics"].get("depth")
    return "speed" in row or (depth is not None and depth["layers"] == depth["of"])


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _remarks(row: dict[str, Any], of: str, first: bool) -> None:
    """Lines under the table that are of one artifact. `first` of its recipe: those of the numbers too."""
    if "repacked" in row and first:
        exact, blocks = row["repacked"]["exact_blocks"], row["repacked"]["blocks"]
        say(f"{of}experts: {exact / blocks:.2%} of {blocks:,} blocks were on the MXFP4 grid and moved without loss")
    if first and (starved := row.get("starved_experts")):
        more = f" and {len(starved) - 6} more (manifest.json)" if len(starved) > 6 else ""
        say(f"{of}calibrated on tokens of other experts too, for want of their own: {', '.join(starved[:6])}{more}")
    if "metrics" not in row:
        return
    if d := row["metrics"].get("runtime"):
        figures = f"KL {d['kl_mean']:.2e}, top-1 {d['top1']:.2%}"
        say(f"{of}llama.cpp's own part (it rounds the YaRN range): {figures}.")
    if e := row["metrics"].get("engines"):
        say_engines(of, e)
    if g := row["metrics"].get("gpu"):
        figures = f"KL {g['kl_mean']:.2e}, top-1 {g['top1']:.2%}" if "error" not in g else g["error"]
        say(f"{of}engines on {g['name']}: {figures}")
    if row.get("twins") and not row["twins"]["passed"]:
        say(f"{of}it behaves like: {row['twins']['nearest']}")
    _say_controls(of, row.get("controls", []))
    for reason in dict.fromkeys(row.get("not_run", {}).values()):
        say(f"{of}not run: {reason}")
    say(f"{row['path']}/report.html")


def _say_controls(of: str, controls: list[dict[str, Any]]) -> None:
    """How many known mistakes were caught, every one that was not, and those that it cannot have."""
    if not controls:
        return
    made = [c for c in controls if c["applies"]]
    caught = [c for c in made if c["caught"]]
    seen = sum(c["by_behaviour"] for c in caught)
    say(f"{of}known-bad copies: {len(caught)} of {len(made)} failed a gate, as they must; {seen} by how they behave")
    for control in controls:
        if not control["applies"]:
            say(f"{of}{control['name']}: not made, {control['why_not']}")
        elif not control["caught"]:
            say(f"{of}{control['name']}: NOT caught")


def say_engines(of: str, engines: dict[str, Any]) -> None:
    """What TensorRT-RTX made of the graphs, and every engine that it did not make."""
    built = [b for b in engines["builds"] if b["built"]]
    sms = ", ".join(dict.fromkeys(f"SM{b['sm']}" for b in built))
    largest = max((b["engine_bytes"] for b in built), default=0)
    say(
        f"{of}TensorRT-RTX {engines['version']} built {len(built)} of {len(engines['builds'])} engines"
        + (f" ({sms}), {format_size(largest)} at most" if built else "")
    )
    for b in engines["builds"]:
        if not b["built"]:
            say(f"{of}{b['graph']} for SM{b['sm']}: {b['error']}")


def _legend(rows: list[dict[str, Any]]) -> None:
    """What the figures of the table are against; a line for each kind of runtime."""
    formats: dict[str, list[str]] = {}
    for row in rows:
        if "metrics" in row:
            formats.setdefault(_kind(row), []).append(row["format"])
    for kind, names in formats.items():
        of = f"{', '.join(dict.fromkeys(names))}: " if len(formats) > 1 else ""
        say(f"{of}{_LEGEND[kind]}")


def _kind(row: dict[str, Any]) -> str:
    if not _two_arithmetics(row):
        return "reference"
    return "llama.cpp" if "runtime" in row["metrics"] else "onnxruntime"
