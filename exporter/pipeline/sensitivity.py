"""How much each group of tensors minds each scheme, measured on the checkpoint, and the recipe that follows.

One group at a time takes other numbers while all else stays as released, and the forward is compared with
the released one on held-out text. The parts are added up to choose; what is chosen is then measured as a whole,
on the very numbers that `exporter quantize --recipe` will export.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporter.checkpoint.doctor import require_sound_files
from exporter.errors import ExporterError, Refused, UsageError
from exporter.model import tensor_specs
from exporter.model.weights import Read
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline.calibrate import (
    Calibrated,
    StoreNumbers,
    calibrate,
    calibrated_steps,
    calibration_disk,
    require_memory,
)
from exporter.pipeline.calibration import calibration_windows
from exporter.pipeline.candidates import Candidate, Choice, Option, Survey, recipe_text, steps_of, survey
from exporter.pipeline.files import write_whole
from exporter.pipeline.lock import locked
from exporter.pipeline.machine import usable_cpus
from exporter.pipeline.plan import Plan, make_plan, workers_for
from exporter.pipeline.profiles import load_profile, load_recipe
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import make
from exporter.pipeline.reference import REFERENCE_TOP_K, Reference
from exporter.pipeline.runtimes import require_calibration, resolve_device
from exporter.pipeline.source import ModelOutline, OpenedModel, must_download, open_model, outline_model
from exporter.pipeline.store import open_store, store_folder, store_key
from exporter.types.profile import Profile
from exporter.types.recipe import CalibrationSpec, GptqSpec, Recipe, Step
from exporter.types.sizes import format_size
from exporter.validate.metrics import between, summary

_MARK = "Made by `exporter plan --sensitivity`"
_NOTHING = {"kl_mean": 0.0, "kl_ci95": [0.0, 0.0], "top1": 1.0}  # where every number is the released one


@dataclass(frozen=True)
class SensitivityRequest:
    """What was asked for. `recipe`: its formats, [calibration] and [gptq] are used, its rules are not.

    `write`: where the recipe goes, None for OUT/<model>/<profile>-sensitivity.toml. Sizes in bytes.
    """

    model: str
    profile: str
    formats: tuple[str, ...] = ()
    recipe: str | None = None
    context: int | None = None
    out: Path = Path("artifacts")
    calibration: str | None = None
    target_bytes: int | None = None
    max_memory: int = 4 * 10**9
    device: str = "auto"
    write: Path | None = None


@dataclass(frozen=True)
class Sensitivities:
    """The answer. `figures`: kl_mean, kl_ci95 and top1 of each option that a format can hold."""

    plan: Plan
    survey: Survey
    figures: Mapping[Candidate, Mapping[str, Any]]
    choice: Choice
    measured: Mapping[str, Any]
    text: Mapping[str, Any]
    calibration: Mapping[str, Any]
    recipe: Path

    @property
    def predicted(self) -> float:
        """The sum of the parts' mean KL."""
        return math.fsum(self.figures[o.candidate]["kl_mean"] for o in self.choice.options)


@dataclass(frozen=True)
class _Stored:
    """A store by name, and the steps of the whole model that it is for."""

    name: str
    steps: tuple[Step, ...]


@dataclass
class _Memory:
    """What was measured before, kept in a file: a run that was stopped does no forward twice."""

    path: Path
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.path.read_text())
            self.known = found if isinstance(found, dict) else {}

    def add(self, key: str, figures: dict[str, Any]) -> None:
        self.known[key] = figures
        write_whole(self.path, json.dumps(self.known, indent=1) + "\n")


class Sensitivity:
    """One measurement of one model for one profile; what an earlier run did is taken up."""

    def __init__(self, request: SensitivityRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        profile = load_profile(request.profile)
        base = load_recipe(request.recipe) if request.recipe else None
        self.gptq = base.gptq if base else GptqSpec()
        setting = base.calibration if base else CalibrationSpec()
        self.setting = replace(setting, text=request.calibration) if request.calibration else setting
        self._require_name()
        require_calibration(request.device)
        if must_download(request.model):
            self._surveyed(profile, outline_model(request.model))  # refuses before any download
        self.model: OpenedModel = open_model(request.model, progress)
        self.plan, self.survey = self._surveyed(profile, self.model)
        require_sound_files(self.model.checkpoint)
        self._fingerprint = self.model.fingerprint()
        self.device = resolve_device(request.device)
        self.folder = request.out / self.model.name
        if self.folder.resolve() == self.model.checkpoint.path.resolve():
            raise UsageError(f"{self.folder} is the checkpoint itself", hint="choose another --out")
        self.recipe_path = request.write or self.folder / f"{profile.name}-sensitivity.toml"
        self._require_ours()
        steps = [s for o in self.survey.options for s in o.steps]
        self.workers = workers_for(steps, request.max_memory, usable_cpus())
        self._memory = _Memory(self.folder / "sensitivity.json")

    def _surveyed(self, profile: Profile, model: OpenedModel | ModelOutline) -> tuple[Plan, Survey]:
        """The plan and what could become of the model in its formats; everything that headers can refuse."""
        r = self.request
        plan = make_plan(
            model.name,
            model.config,
            model.scheme_of,
            profile,
            formats=r.formats,
            recipe=r.recipe,
            context=r.context,
        )
        require_memory(plan.config, self.setting, r.max_memory)
        return plan, survey(plan, model.scheme_of, r.target_bytes)

    def _require_name(self) -> None:
        path = self.request.write
        if path and path.suffix != ".toml":
            raise UsageError(f"--write {path} is not a .toml file", hint=f"--write {path}.toml")

    def _require_ours(self) -> None:
        """What is at the recipe's place is the user's unless an earlier run made it."""
        path = self.recipe_path
        if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
            raise Refused(f"{path} is a recipe of your own", hint="--write names another file")

    def run(self) -> Sensitivities:
        """Measure every option, choose, write the recipe, and measure what was chosen."""
        with locked(self.folder):
            figures = {o.candidate: self._figures(o) for o in self._in_order() if not o.refused}
            choice = self.survey.least(lambda c: float(figures[c]["kl_mean"]))
            self.recipe_path.parent.mkdir(parents=True, exist_ok=True)
            measured = self._measured_whole(choice)
            answer = Sensitivities(
                self.plan,
                self.survey,
                figures,
                choice,
                measured,
                self._text(),
                self._calibrated.json(),
                self.recipe_path,
            )
            if self.model.fingerprint() != self._fingerprint:
                raise ExporterError(
                    f"{self.model.checkpoint.path} changed while it was read", hint="run the same command again"
                )
            write_whole(self.recipe_path, self._recipe(choice, _comments(answer, self._fingerprint)))
        return answer

    def _in_order(self) -> list[Option]:
        """Those that need no calibration first, then one store after another."""
        held = [o for o in self.survey.options if not o.refused]
        return sorted(held, key=lambda o: (o.candidate.method == "gptq", o.candidate.scheme))

    @functools.cached_property
    def _calibrated(self) -> Calibrated:
        checkpoint, folder = self.model.checkpoint, self.folder / "calibration"
        return Calibrated(calibration_windows(self.setting, checkpoint, folder, self.device, self.progress), self.gptq)

    @functools.cached_property
    def _reference(self) -> Reference:
        return Reference(self.model, self.plan.profile, self.folder / "reference", self.device, self.progress)

    # One option

    def _figures(self, option: Option) -> Mapping[str, Any]:
        c = option.candidate
        if c.exact:
            return _NOTHING
        store = self._together(c.scheme) if c.method == "gptq" else None
        return self._measure(option.steps, f"{c.group} as {c.scheme}", store)

    def _together(self, scheme: str) -> _Stored:
        """The store of every group that `scheme` is calibrated for: one pass makes them all.

        A group is so rounded beside others that are rounded too. Alone it comes out a little different, by no
        more than the measurement can tell: docs/sensitivity.md.
        """
        chosen: dict[str, Candidate] = {}
        for option in self.survey.options:
            c = option.candidate
            wanted = c.method == "gptq" and c.scheme == scheme and not option.refused
            if wanted or c.group not in chosen:  # the first of a group is what it is in the release
                chosen[c.group] = c
        specs = tensor_specs(self.plan.config)
        return _Stored(f"sensitivity-{scheme}", steps_of(chosen.values(), specs, self.model.scheme_of))

    # The choice

    def _measured_whole(self, choice: Choice) -> Mapping[str, Any]:
        chosen = [o.candidate for o in choice.options]
        if all(c.exact for c in chosen):
            return _NOTHING
        # The same steps, name and calibration as `quantize --recipe` has: it finds this store and goes on from it.
        recipe = Recipe.from_toml(self._recipe(choice), self.recipe_path.stem, str(self.recipe_path))
        steps = tuple(recipe.step(s, self.model.scheme_of(s)) for s in tensor_specs(self.plan.config))
        return self._measure(steps, "the choice", _Stored(recipe.name, steps))

    def _recipe(self, choice: Choice, comments: Sequence[str] = ()) -> str:
        title = f"The least KL of {self.model.name} within {format_size(self.survey.limit)}, by measurement"
        return recipe_text(
            [o.candidate for o in choice.options],
            title,
            formats=list(dict.fromkeys(a.format.name for a in self.plan.artifacts)),
            calibration=self.setting,
            gptq=self.gptq,
            comments=comments,
        )

    # Measuring

    def _measure(self, steps: Sequence[Step], stage: str, store: _Stored | None) -> Mapping[str, Any]:
        """Figures of the model with `steps` done and all else as released; calibrated numbers are in `store`."""
        store = store if calibrated_steps(steps) else None
        h = hashlib.sha256(store_key(self._fingerprint, steps, self._key(store)).encode())
        h.update(f" {REFERENCE_TOP_K} {self.device}\n".encode() + self._reference.windows.tokens.tobytes())
        name = h.hexdigest()[:32]
        if name not in self._memory.known:
            with self._numbers(store) if store else contextlib.nullcontext() as numbers:
                made = self._reference.predict(self._read(steps, numbers), stage)
            found = summary(between(self._reference.release, made))
            self._memory.add(name, {k: found[k] for k in _NOTHING})
        return self._memory.known[name]

    def _key(self, store: _Stored | None) -> str:
        return store_key(self._fingerprint, store.steps, self._calibrated.key()) if store else ""

    def _read(self, steps: Sequence[Step], numbers: StoreNumbers | None) -> Read:
        source, by_name = self.model.checkpoint.read, {s.name: s for s in steps}

        def read(name: str, start: int, stop: int) -> F32:
            step = by_name.get(name)
            if step is not None and step.method == "gptq":
                assert numbers is not None
                return numbers.final(name, start, stop)
            q = source(name, start, stop)
            return decode.values(q if step is None else make(step, q)[0])

        return read

    @contextlib.contextmanager
    def _numbers(self, stored: _Stored) -> Iterator[StoreNumbers]:
        """The store, filled with what is calibrated in it."""
        source, key = self.model.checkpoint.read, self._key(stored)
        self._require_disk(store_folder(self.folder, stored.name, key), stored.steps)
        store = open_store(self.folder, self.model, stored.name, stored.steps, key)
        try:
            calibrate(
                store,
                stored.steps,
                source,
                self.plan.config,
                self._calibrated,
                self.device,
                self.workers,
                self.progress,
            )
            yield StoreNumbers(store, source)
        finally:
            store.release()

    def _require_disk(self, folder: Path, steps: Sequence[Step]) -> None:
        if folder.exists():  # its space is reserved
            return
        need = sum(s.stored_bytes for s in steps if not s.by_reference)
        need += calibration_disk(self.plan.config, self._calibrated.windows.tokens.size)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise Refused(
                f"{self.request.out} has {format_size(free)} free, {folder.name} needs {format_size(need)}",
                hint="free some space, or choose another --out",
            )

    def _text(self) -> dict[str, Any]:
        windows = self._reference.windows
        count, length = windows.tokens.shape
        return {"source": windows.source, "sha256": windows.sha256, "windows": count, "length": length}


def rows(answer: Sensitivities) -> list[tuple[str, ...]]:
    """Every option as text: chosen or not, group, scheme, method, bytes in each artifact, KL, top-1."""
    found = []
    for o in answer.survey.options:
        c, figures = o.candidate, answer.figures.get(o.candidate)
        sizes = [format_size(n) for n in o.nbytes] or ["-"] * len(answer.survey.labels)
        kl, top1 = ("refused", "-") if figures is None else _as_text(figures)
        mark = "*" if o in answer.choice.options else ""
        found.append((mark, c.group, c.scheme, c.method, *sizes, kl, top1))
    return found


def refusals(answer: Sensitivities) -> list[str]:
    """Why some options are refused, each reason once."""
    found: dict[str, list[str]] = {}
    for o in answer.survey.options:
        if o.refused:
            found.setdefault(o.refused, []).append(f"{o.candidate.group} {o.candidate.scheme}")
    return [f"{reason} ({', '.join(which)})" for reason, which in found.items()]


def _as_text(figures: Mapping[str, Any]) -> tuple[str, str]:
    """Mean KL and top-1 agreement."""
    return f"{figures['kl_mean']:.6f}", f"{figures['top1']:.2%}"


def _comments(answer: Sensitivities, fingerprint: str) -> list[str]:
    """What was measured, for the head of the recipe."""
    text, seen = answer.text, answer.calibration
    table = [("", "group", "scheme", "method", *answer.survey.labels, "KL", "top-1"), *rows(answer)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in table]
    sizes = ", ".join(
        f"{label} {format_size(n)}" for label, n in zip(answer.survey.labels, answer.choice.nbytes, strict=True)
    )
    kl, top1 = _as_text(answer.measured)
    return [
        f"{_MARK} of {answer.plan.model_name} (checkpoint {fingerprint[:12]}) for {answer.plan.profile.name}.",
        f"Weights at most {format_size(answer.survey.limit)}; this choice (*) is {sizes}.",
        f"Mean KL to the released numbers, one group changed at a time, on {text['windows']} x {text['length']} tokens",
        f"of the {text['source']} (sha256 {text['sha256'][:12]}).",
        f"Calibrated on {seen['windows']} x {seen['length']} tokens of the {seen['text']}",
        f"(sha256 {str(seen['sha256'])[:12]}).",
        "",
        *lines,
        *refusals(answer),
        "",
        f"Sum of the parts {answer.predicted:.6f}; measured together {kl}, top-1 {top1}.",
    ]
