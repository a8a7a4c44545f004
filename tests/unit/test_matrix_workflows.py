"""The workflows say what `exporter` takes, and nothing of their own: seeded faults are each found."""

import pytest

from exporter.pipeline.cells import planned
from exporter.pipeline.matrix import include, jobs
from tests.workflows import ROOT, Workflow, findings

FOLDER = ROOT / ".github" / "workflows"
NAMES = sorted(path.name for path in FOLDER.glob("*.yml"))


@pytest.fixture(scope="module")
def rows():
    """What `exporter matrix --output` writes, of the released models."""
    made = jobs(planned())
    published = [job for job in made if job.repo]
    return {"matrix": include(made)["include"], "publish": include(published)["include"]}


def workflow(name, rows, old="", new=""):
    text = (FOLDER / name).read_text()
    assert old in text
    return Workflow(text.replace(old, new, 1) if old else text, rows)


def test_there_are_two():
    assert NAMES == ["artifacts.yml", "ci.yml"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong(name, rows):
    assert findings(workflow(name, rows)) == []


def test_the_order_of_the_jobs(rows):
    """Nothing is published that the gate did not see, and the gate sees what every cell's job left."""
    made = workflow("artifacts.yml", rows).jobs
    assert list(made) == ["plan", "build", "gate", "publish"]
    assert made["build"]["needs"] == "plan"
    assert made["gate"]["needs"] == ["plan", "build"]
    assert made["publish"]["needs"] == ["plan", "build", "gate"]
    assert made["build"]["strategy"]["fail-fast"] is False
    assert made["publish"]["strategy"]["max-parallel"] == 1
    for job in ("build", "publish"):
        assert made[job]["runs-on"] == "${{ matrix.runs_on }}"
    # Without a word on it, a job with needs runs only after all of them passed.
    assert "!cancelled()" in made["gate"]["if"]
    assert not {"always()", "failure()", "cancelled()"} & set(made["publish"]["if"].split())


def test_a_disk_that_stays_is_that_of_our_own_runners(rows):
    """On one of GitHub's own, nobody can write to /data: cells that run there keep to the checkout."""
    made = workflow("artifacts.yml", rows)
    place = "${{ contains(matrix.runs_on, 'self-hosted') && vars.EXPORTER_OUT || 'artifacts' }}"
    assert "EXPORTER_MATRIX_OUT" not in made.body["env"]
    assert all(made.jobs[name]["env"]["EXPORTER_MATRIX_OUT"] == place for name in ("build", "publish"))


FAULTS = [
    ("artifacts.yml", "matrix --run --again", "matrix --run --once-more", "No such option"),
    ("artifacts.yml", "--check proofs", "--chek proofs", "No such option"),
    ("artifacts.yml", "exporter matrix --table", "exporter matrixx --table", "matrixx"),
    ("artifacts.yml", "inputs.runner || 'auto'", "inputs.runner || 'any'", "'any' is not one of"),
    ("artifacts.yml", "--summary", "--again --summary", "--again goes with --run"),
    ("artifacts.yml", "--approved approved", "", "--publish needs"),
    ("artifacts.yml", "EXPORTER_MATRIX_MODELS", "EXPORTER_MATRIX_MODEL", "EXPORTER_MATRIX_MODEL is no option's"),
    ("artifacts.yml", "CELL: ${{ matrix.cell }}", "CELLS: ${{ matrix.cell }}", "$CELL is not set"),
    ("artifacts.yml", "matrix.runs_on", "matrix.runs-on", "matrix.runs-on is no key"),
    ("artifacts.yml", "needs.plan.outputs.publish", "needs.plan.outputs.published", "outputs.published is not there"),
    ("artifacts.yml", "steps.cells.outputs.matrix", "steps.list.outputs.matrix", "steps.list.outputs.matrix"),
    ("artifacts.yml", "needs: [plan, build, gate]", "needs: [gate]", "needs.plan.outputs.publish is not there"),
    ("artifacts.yml", "needs: [plan, build]\n", "needs: [plan, builds]\n", "needs builds"),
    ("artifacts.yml", "inputs.profiles", "inputs.profile", "inputs.profile is not there"),
    ("artifacts.yml", "- id: prove", "- id: proved", "steps.prove is not there"),
    ("artifacts.yml", "env:\n      EXPORTER_MATRIX_OUT", "env:\n      OUT", "env.EXPORTER_MATRIX_OUT is not there"),
    ("artifacts.yml", '--again "$CELL"', "--again ${{ matrix.cell }}", "an expression in a command"),
    ("artifacts.yml", "run: make .venv/ready", "run: make .venv/ready && ls", "more than one command"),
    ("artifacts.yml", "'.[hub]'", "'.[hubs]'", "there is no extra hubs"),
    ("artifacts.yml", "'.[hub]'", "requests", "pip installs requests"),
    ("artifacts.yml", "--constraint constraints.txt ", "", "pip installs .[hub]"),
    ("artifacts.yml", "run: make .venv/ready", "run: make ready", "no target ready"),
    ("artifacts.yml", "run: make .venv/ready", "run: curl example.org", "no command of ours"),
    ("artifacts.yml", "@3d3c42e5aac5ba805825da76410c181273ba90b1", "@v7", "actions/checkout is not pinned"),
    ("artifacts.yml", "persist-credentials: false", "clean: true", "leaves its token"),
    ("artifacts.yml", "contents: read", "contents: write", "permissions are not"),
    ("artifacts.yml", "environment: hub", "name: hub", "may write id-token"),
    ("artifacts.yml", "id-token: write", "packages: write", "may write packages"),
    ("artifacts.yml", "  release:", "  pull_request:", "a pull request runs on"),
    ("artifacts.yml", "/report.html", "/*.gguf", "uploads"),
    ("artifacts.yml", "vars.HF_NAMESPACE", "secrets.HF_NAMESPACE", "a secret"),
    ("ci.yml", "pull_request:", "pull_request_target:", "pull_request_target"),
    ("ci.yml", "runs-on: ubuntu-latest", "runs-on: [self-hosted, gpu]", "a pull request runs on"),
    ("ci.yml", "run: .ci/run", "run: .ci/all", "no command of ours"),
    ("ci.yml", "matrix.python", "matrix.version", "matrix.version is no key"),
]


@pytest.mark.parametrize(("name", "old", "new", "said"), FAULTS, ids=[f"{n} {new[:40]}" for n, _, new, _ in FAULTS])
def test_a_fault_is_found(name, old, new, said, rows):
    found = findings(workflow(name, rows, old, new))
    assert any(said in each for each in found), found


def test_ci_can_run_what_everyone_runs():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
