"""Prove an artifact that is there already, from its files.

Its numbers are not made again: manifest.json says what they are, SHA256SUMS that manifest.json and the files
are as they were sealed, and the checkpoint must be the one that they were made of.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import psutil

import exporter
from exporter.errors import BadCheckpoint, ExporterError, Refused, UsageError
from exporter.pipeline.artifact import Maker
from exporter.pipeline.before import accepted_tokenizer, leaves_at_once
from exporter.pipeline.export import layout_key
from exporter.pipeline.manifest import hash_files, provenance, total_digest
from exporter.pipeline.plan import ArtifactPlan, require_fit, wanted
from exporter.pipeline.profiles import load_profile, load_recipe, profile_names, recipe_names
from exporter.pipeline.progress import Progress
from exporter.pipeline.request import RunRequest, plan_request
from exporter.pipeline.run import ArtifactResult, RunResult
from exporter.pipeline.runtimes import require_runtimes, require_writers
from exporter.pipeline.seal import OWN_CAP, require_sealed
from exporter.pipeline.source import open_model
from exporter.types.profile import ArtifactSpec, Profile, artifact_folder
from exporter.validate.onnx_file import printable
from exporter.validate.runtime import SCRATCH_PREFIX

_AGAIN = "download it again, or exporter quantize ... --overwrite makes it again"
T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """An artifact's folder, and what it does not say itself or is to be taken otherwise.

    model: a folder or a Hub id. profile, recipe: a name or a file. context: tokens. text: what to measure on, None
    for the default. controls: whether known-bad copies are proved too.
    """

    folder: Path
    model: str | None = None
    profile: str | None = None
    recipe: str | None = None
    context: int | None = None
    device: str = "auto"
    text: str | None = None
    controls: bool = False


@dataclass(frozen=True)
class Made:
    """What manifest.json says.

    layout: export.layout_key. sources: SHA-256 by file of the checkpoint. files, sizes: SHA-256 and bytes by file of
    the artifact. digests: by tensor. rounded: whether some blocks of floats were not on the MXFP4 grid. body: all.
    """

    exporter: str
    model: str
    format: str
    target: str
    recipe: str
    recipe_sha256: str
    repo: str
    revision: str
    layout: str
    digest: str
    sources: Mapping[str, str]
    files: Mapping[str, str]
    sizes: Mapping[str, int]
    digests: Mapping[str, str]
    rounded: bool
    body: Mapping[str, Any] = field(repr=False)

    @property
    def hub_id(self) -> str | None:
        """The checkpoint that it was made of, where that came from the Hub."""
        return f"{self.repo}@{self.revision}" if self.repo and self.revision else self.repo or None


def validate(ask: Ask, progress: Progress) -> RunResult:
    """Prove an artifact from its files, as the run that made it did, and write report.json anew.

    Raises UsageError for what is not said, ExporterError for an artifact that is not as it was sealed, Refused where it
    cannot be told what it should be: another checkpoint, recipe or layout.
    """
    made = read_made(ask.folder)
    model = ask.model or made.hub_id
    if model is None:
        raise UsageError(
            f"{ask.folder} was made of a folder, {made.model}, and does not say where that is", hint="--model FOLDER"
        )
    profile = _profile(ask)
    profile = replace(profile, artifacts=(_spec(ask, made, profile),))
    require_writers([made.format])
    require_runtimes(ask.device, [made.format])
    require_files(ask.folder, made, progress)
    with _output(ask.folder, made) as out:
        request = RunRequest(
            model=model,
            profile=profile.name,
            formats=(made.format,),
            out=out,
            context=ask.context,
            device=ask.device,
            quantize=False,
            text=ask.text,
        )
        # Its name is in the files, whatever the folder of the checkpoint is called here.
        opened = replace(open_model(model, progress), name=made.model)
        plan = plan_request(request, profile, opened)
        require_fit(plan)
        (artifact,) = plan.artifacts
        tokenizer, workers = accepted_tokenizer(opened.checkpoint, plan), leaves_at_once(request, plan)
        maker = Maker(request, plan, opened, tokenizer, workers, progress)
        with maker.alone():
            _require_source(ask.folder, made, maker)
            report = maker.prove(ask.folder, artifact, _facts(ask, made, maker, artifact), made.rounded, ask.controls)
    files = [ask.folder / name for name in made.files]
    nbytes = sum(made.sizes.values())
    return RunResult(
        plan, [ArtifactResult(artifact, ask.folder, files, nbytes, report=report, status=report["status"])]
    )


# What the folder says


def read_made(folder: Path) -> Made:
    """manifest.json of a sealed artifact, whose files are all there and as long as they were.

    Raises UsageError for a folder that is no artifact, ExporterError for a damaged one, Refused for one that was
    exported only.
    """
    body = _json(folder / "manifest.json")
    if not isinstance(body, dict) or not {"exporter", "layout", "tensors"} <= set(body):
        raise UsageError(
            f"{folder}/manifest.json is not one that exporter wrote",
            hint="a folder that `exporter quantize` made; an .onnx file is looked at alone",
        )
    made = _made(folder, body)
    sums = folder / "SHA256SUMS"
    if not made.files or not sums.exists():
        raise Refused(
            f"{folder} was exported and never proved: nothing says that its files are as they were written",
            hint="the `exporter quantize` that made it, without --until, hashes and proves it",
        )
    _require_small(sums)
    require_sealed(folder)
    for name, size in made.sizes.items():
        path = folder / name
        if not path.is_file():
            raise ExporterError(f"{path} is missing", hint=_AGAIN)
        if path.stat().st_size != size:
            raise ExporterError(f"{path} has {path.stat().st_size:,} bytes, not the {size:,} it had", hint=_AGAIN)
    if total_digest(made.digests) != made.digest:
        raise ExporterError(f"{folder}/manifest.json: its digest is not that of its tensors", hint=_AGAIN)
    return made


def _made(folder: Path, body: Mapping[str, Any]) -> Made:
    try:
        source, recipe = body["source"], body["recipe"]
        files = {name: (_is(each["sha256"], str), _is(each["bytes"], int)) for name, each in body["files"].items()}
        made = Made(
            **{key: _is(body[key], str) for key in ("exporter", "model", "format", "target", "layout", "digest")},
            recipe=_is(recipe["name"], str),
            recipe_sha256=_is(recipe["sha256"], str),
            repo=_is(source["repo"] or "", str),
            revision=_is(source["revision"] or "", str),
            sources={_is(name, str): _is(digest, str) for name, digest in source["files"].items()},
            files={name: digest for name, (digest, _) in files.items()},
            sizes={name: size for name, (_, size) in files.items()},
            digests={_is(name, str): _is(each["digest"], str) for name, each in body["tensors"].items()},
            rounded=any(each.get("exact_blocks", 0) < each.get("blocks", 0) for each in body["tensors"].values()),
            body=body,
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else "not as exporter writes it"
        raise ExporterError(f"{folder}/manifest.json is damaged: {what}", hint=_AGAIN) from None
    # It names folders and files here.
    for name in (made.model, *made.files):
        path = PurePosixPath(name)
        inside = name.isprintable() and name == str(path) and not path.is_absolute() and ".." not in path.parts
        if not inside or name == "." or (name == made.model and len(path.parts) > 1):
            raise ExporterError(f"{folder}/manifest.json is damaged: {name[:96]!r} is no name", hint=_AGAIN)
    return made


def _is(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError
    if isinstance(value, str):
        value.encode()  # half a character, which JSON can spell, is no text: ValueError
    return value


def _json(path: Path) -> Any:
    """A JSON file of ours. Raises ExporterError for one that is none."""
    _require_small(path)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ExporterError(f"{path} is damaged: no JSON", hint=_AGAIN) from None


def _require_small(path: Path) -> None:
    if not path.is_file():
        raise ExporterError(f"{path} is no file", hint=_AGAIN)
    if path.stat().st_size > OWN_CAP:
        raise ExporterError(f"{path} is damaged: {path.stat().st_size:,} bytes", hint=_AGAIN)


def _profile(ask: Ask) -> Profile:
    """As asked; else the one that the last report names, else the one that the folder lies in."""
    if ask.profile is not None:
        return load_profile(ask.profile)
    name, sha256 = ask.folder.resolve().parent.name, None
    with contextlib.suppress(ExporterError, LookupError, TypeError):
        told = _json(ask.folder / "report.json")["profile"]
        name, sha256 = str(told["name"]), told["sha256"]
    if name not in profile_names():
        raise UsageError(
            f'{ask.folder} was made for profile "{printable(name)}", which is not one of ours'
            if sha256
            else f"{ask.folder} does not say for which profile it was made",
            hint="--profile NAME or FILE; `exporter profiles` lists those with a name",
        )
    found = load_profile(name)
    if sha256 not in (None, found.sha256):
        raise UsageError(
            f'{ask.folder} was made for another profile "{name}" than the one that is here now',
            hint=f"--profile {name} takes this one, --profile FILE another",
        )
    return found


def _spec(ask: Ask, made: Made, profile: Profile) -> ArtifactSpec:
    """The profile's artifact that this one is. Raises Refused where its recipe is not the one that made it."""
    same = [a for a in profile.artifacts if (a.format, a.target) == (made.format, made.target)]
    spec = next((a for a in same if not ask.recipe and load_recipe(a.recipe).name == made.recipe), None)
    if spec is None:  # as `exporter quantize --recipe` makes it
        if not ask.recipe and made.recipe not in recipe_names():
            raise UsageError(
                f'{ask.folder} is of recipe "{printable(made.recipe)}", which profile {profile.name} does not have',
                hint="--recipe FILE, or another --profile",
            )
        targets = (made.target,) if made.target else ()
        every = wanted(profile, (made.format,), targets, ask.recipe or made.recipe)
        spec = next((a for a in every if (a.format, a.target) == (made.format, made.target)), None)
    if spec is None:
        raise UsageError(f"profile {profile.name} makes no {made.format} without a target", hint="another --profile")
    if load_recipe(spec.recipe).sha256 != made.recipe_sha256:
        raise Refused(
            f"{ask.folder} was made by another recipe {printable(made.recipe)} than {spec.recipe} is now",
            hint=f"--recipe FILE: the one whose SHA-256 is {printable(made.recipe_sha256, 64)}",
        )
    return spec


# What must be the same


def require_files(folder: Path, made: Made, progress: Progress) -> None:
    """Raises ExporterError for a file whose bytes are not those that were sealed."""
    paths = {folder / name: digest for name, digest in made.files.items()}
    # Two at once keep a disk busy.
    hashes = hash_files(list(paths), 2, progress)
    for path, digest in paths.items():
        if hashes[path] != digest:
            raise ExporterError(f"{path} is not the file that SHA256SUMS names: its bytes changed", hint=_AGAIN)


def _require_source(folder: Path, made: Made, maker: Maker) -> None:
    """Raises BadCheckpoint where the artifact was made of other files; the small ones are looked at first."""
    checkpoint = maker.model.checkpoint
    shards = {path.name for path in checkpoint.shards}
    found = {path.name: path for path in maker.sources()}
    wrong = sorted(made.sources.keys() - found.keys()) + sorted(shards - made.sources.keys())
    for names in (found.keys() - shards, shards):
        if not wrong:
            known = [found[name] for name in sorted(names) if name in made.sources]
            wrong = [name for name, digest in maker.source_hashes(known).items() if made.sources[name] != digest]
    if wrong:
        raise BadCheckpoint(
            f"{checkpoint.path} is not the checkpoint that {folder} was made of: {printable(wrong[0], 96)} differs",
            hint=f"--model {made.hub_id or 'FOLDER, the one that it was made of'}",
        )


def _facts(ask: Ask, made: Made, maker: Maker, artifact: ArtifactPlan) -> Any:
    """The provenance in the artifact's files. Raises Refused where they are laid out otherwise than it is planned."""
    plain = provenance(maker.model, artifact)
    facts = replace(
        plain, exporter_version=made.exporter, source_repo=made.repo, source_revision=made.revision, recipe=made.recipe
    )
    layouts = artifact.format.layout(maker.job(artifact, facts))
    same = [step.name for step in artifact.steps] == list(made.digests)
    if not same or layout_key(layouts) != made.layout or {each.filename for each in layouts} != set(made.files):
        other = f", or exporter ({printable(made.exporter)} made it)" if made.exporter != exporter.__version__ else ""
        raise Refused(
            f"{ask.folder} is not laid out as profile {maker.plan.profile.name} plans it: "
            f"another context (here {artifact.fit.context:,}) or split size{other}",
            hint="--context TOKENS or --profile NAME as it was made",
        )
    return replace(facts, digest=made.digest, tensor_digests=made.digests)


@contextlib.contextmanager
def _output(folder: Path, made: Made) -> Iterator[Path]:
    """The output folder that the artifact lies in, where a run would look; else one for the time of the proof."""
    if not os.access(folder, os.W_OK):
        raise ExporterError(f"{folder} cannot be written, and report.json goes there", hint="copy it, or chmod u+w")
    place = folder.resolve()
    above = place.parents[1] if len(place.parents) > 2 else place
    named = artifact_folder(made.format, made.recipe, made.target)
    if (above.name, place.name) == (made.model, named) and os.access(above, os.W_OK):
        yield above.parent
        return
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}pid*"):  # of a proof that was killed
        owner = left.name.removeprefix(f"{SCRATCH_PREFIX}pid").partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}pid{os.getpid()}-") as out:
        yield Path(out)
