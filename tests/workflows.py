"""What is wrong with a workflow of GitHub's: its commands, its names, its rights; by what `exporter` really takes."""

import re
import shlex
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest import mock

import click
import yaml

from exporter.cli import cli
from exporter.cli.matrix import job_of
from exporter.errors import ExporterError

ROOT = Path(__file__).parent.parent
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}")
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_SHELL = re.compile(r"\n|;|&|\||`|\$\(|<|>|\b(?:if|for|while|case)\b")
_GIVEN = ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")  # by the runner
_PROOF = {"manifest.json", "provenance.json", "report.json", "report.md", "report.html", "SHA256SUMS"}


@dataclass(frozen=True)
class Workflow:
    """rows: for each job with a matrix of `fromJSON(needs.plan.outputs.NAME)`, by NAME, what exporter prints."""

    text: str
    rows: dict[str, list[dict]]

    @cached_property
    def body(self):
        return yaml.safe_load(self.text)

    @property
    def triggers(self):
        return self.body[True]  # YAML 1.1 reads "on" as a truth

    @property
    def jobs(self):
        return self.body["jobs"]


def findings(workflow):
    """Every fault that is found, in words."""
    return [
        *_rights(workflow),
        *_inputs(workflow, workflow.body.get("env", {})),
        *(f"{name}: {each}" for name, job in workflow.jobs.items() for each in _of_job(workflow, name, job)),
    ]


def _rights(workflow):
    body = workflow.body
    if body.get("permissions") != {"contents": "read"}:
        yield "permissions are not contents: read"
    if "pull_request_target" in workflow.triggers:
        yield "pull_request_target runs a fork's code with our rights"
    if "secrets." in workflow.text:
        yield "a secret"
    for name, job in body["jobs"].items():
        rights = job.get("permissions", {})
        writes = {key for key, value in rights.items() if value != "read"}
        if writes and (writes != {"id-token"} or "environment" not in job):
            yield f"{name}: may write {', '.join(sorted(writes))}"
        if "pull_request" in workflow.triggers and job["runs-on"] != "ubuntu-latest":
            yield f"{name}: a pull request runs on {job['runs-on']}"


def _of_job(workflow, name, job):
    yield from _names(workflow, name, job)
    for number, step in enumerate(job["steps"], 1):
        where = f"step {number}"
        if "uses" in step:
            yield from (f"{where}: {each}" for each in _action(step))
        else:
            yield from (f"{where}: {each}" for each in _command(workflow, job, step))


def _action(step):
    name, _, version = step["uses"].partition("@")
    if not re.fullmatch(r"[0-9a-f]{40}", version):
        yield f"{name} is not pinned to a commit"
    given = step.get("with", {})
    if name == "actions/checkout" and given.get("persist-credentials") is not False:
        yield "checkout leaves its token behind"
    if name == "actions/upload-artifact":
        names = {path.rsplit("/", 1)[-1] for path in given["path"].splitlines()}
        if names != _PROOF:
            yield f"uploads {sorted(names ^ _PROOF)} too much or too little"


# Names that expressions use


def _names(workflow, name, job):
    needs = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
    yield from (f"needs {each}, which is no job" for each in needs if each not in workflow.jobs)
    ids = {step["id"] for step in job["steps"] if "id" in step}
    keys = _matrix_keys(workflow, job)
    for expression in EXPRESSION.findall(yaml.safe_dump(job, width=1 << 16)):
        for key in re.findall(r"\bmatrix\.([\w-]+)", expression):
            if key not in keys:
                yield f"matrix.{key} is no key of its matrix"
        for other, output in re.findall(r"\bneeds\.([\w-]+)\.outputs\.([\w-]+)", expression):
            if other not in needs or output not in workflow.jobs.get(other, {}).get("outputs", {}):
                yield f"needs.{other}.outputs.{output} is not there"
        for other in re.findall(r"\bneeds\.([\w-]+)\.result", expression):
            if other not in needs:
                yield f"needs.{other} is not there"
        for step, output in re.findall(r"\bsteps\.([\w-]+)\.outputs\.([\w-]+)", expression):
            if step not in ids or output not in workflow.rows:
                yield f"steps.{step}.outputs.{output} is not there"
        for step in re.findall(r"\bsteps\.([\w-]+)\.(?:outcome|conclusion)", expression):
            if step not in ids:
                yield f"steps.{step} is not there"
        for given in re.findall(r"\benv\.([\w-]+)", expression):
            if given not in {**workflow.body.get("env", {}), **job.get("env", {})}:
                yield f"env.{given} is not there"
    yield from _inputs(workflow, job)


def _inputs(workflow, part):
    known = (workflow.triggers.get("workflow_dispatch") or {}).get("inputs", {})
    for expression in EXPRESSION.findall(yaml.safe_dump(part, width=1 << 16)):
        for given in re.findall(r"\binputs\.([\w-]+)", expression):
            if given not in known:
                yield f"inputs.{given} is not there"


def _matrix(workflow, job):
    """(name of the rows or None, the matrix as it is written)."""
    matrix = job.get("strategy", {}).get("matrix", {})
    if isinstance(matrix, str):
        return re.search(r"outputs\.([\w-]+)", matrix)[1], {}
    return None, matrix


def _matrix_keys(workflow, job):
    name, written = _matrix(workflow, job)
    return set(written) if name is None else {key for row in workflow.rows.get(name, []) for key in row}


# Commands


def _command(workflow, job, step):
    line = step["run"].strip()
    if _SHELL.search(line):
        yield f"more than one command: {line!r}"
        return
    if "${{" in line:
        yield f"an expression in a command: {line!r}"
        return
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.M)
        yield from (f"make has no target {each}" for each in words[1:] if each not in targets)
    elif words[0] == ".ci/run":
        if not (ROOT / words[0]).is_file():
            yield f"there is no {words[0]}"
    elif words[:4] == ["python", "-m", "pip", "install"]:
        yield from _extras(words[4:])
    elif words[0].rsplit("/", 1)[-1] == "exporter":
        yield from _exporter(workflow, job, step, words[1:])
    else:
        yield f"no command of ours: {line!r}"


def _extras(words):
    """Only of this project, at the versions that are tried."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if words[:2] != ["--constraint", "constraints.txt"] or len(words) != 3:
        yield f"pip installs {' '.join(words)}"
        return
    asked = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
    known = project["optional-dependencies"]
    yield from ([] if asked else [f"pip installs {words[2]}"])
    extras = asked[1].split(",") if asked and asked[1] else []
    yield from (f"there is no extra {each}" for each in extras if each not in known)


def _exporter(workflow, job, step, words):
    """Parse a command as exporter does, once for each cell, with the variables that it would have."""
    name, _ = _matrix(workflow, job)
    text = {**workflow.body.get("env", {}), **job.get("env", {}), **step.get("env", {})}
    for variable in _VARIABLE.findall(" ".join(words)):
        if variable not in text and variable not in _GIVEN:
            yield f"${variable} is not set"
            return
    said = set()
    for row in workflow.rows.get(name, [{}]):
        variables = {key: _value(str(value), row) for key, value in text.items()}
        variables |= {key: f"/{key}" for key in _GIVEN}
        filled = [_VARIABLE.sub(lambda m: variables[m[1]], word) for word in words]  # noqa: B023  # used at once
        with environment(variables):
            said |= set(refusals(filled, variables))
    yield from sorted(said)


def _value(text, row):
    """Where expressions are of the cell: as it is; else a value of the first kind that they name."""

    def one(match):
        expression = match[1].strip()
        if key := re.fullmatch(r"matrix\.([\w-]+)", expression):
            return str(row.get(key[1], ""))
        literal = re.findall(r"\|\| '([^']+)'", expression)
        return literal[-1] if literal else "" if "inputs." in expression else "somebody"

    return EXPRESSION.sub(one, text)


@contextmanager
def environment(variables):
    with mock.patch.dict("os.environ", {k: v for k, v in variables.items() if k.startswith("EXPORTER_")}):
        yield


def refusals(words, variables):
    """What exporter says of a command line before it works, and of variables that none of its options reads."""
    try:
        with cli.make_context("exporter", ["matrix", "--help"], resilient_parsing=True) as group:
            command = cli.get_command(group, words[0])
            if command is None:
                yield f"no command {words[0]}"
                return
            options = {f"EXPORTER_{words[0].upper()}_{p.name.upper()}" for p in command.params if p.name}
            mine = [key for key in variables if key.startswith(f"EXPORTER_{words[0].upper()}_")]
            yield from (f"{key} is no option's" for key in mine if key not in options)
            with command.make_context(words[0], list(words[1:]), parent=group) as context:
                if words[0] == "matrix":
                    job_of(context.params)
    except click.ClickException as error:
        yield error.format_message()
    except ExporterError as error:
        yield error.message
