"""`exporter publish`, the real command: what it shows and asks, and what is on the Hub when it is killed anywhere."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Done, run_exporter
from tests.loopback_hub import LoopbackHub, Lost, Then
from tests.loopback_repos import Fault
from tests.publishing import REPO, TOKEN, contents, holds, small_artifact

FILES = {"model.onnx": b"\x08\x0a" * 500, "model.onnx.data": b"\0" * 50_000, "second.onnx": b"\x08\x0b" * 90}


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def env(hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HUB_OFFLINE": "0",
        "HF_OIDC_RESOURCE": "",
        "GITHUB_ACTIONS": "",
    }


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_artifact(tmp_path_factory.mktemp("artifact"), "onnx", "int4-q8", files=FILES)


Command = Callable[..., Done]


@pytest.fixture
def publish(env: dict[str, str], artifact: Path) -> Command:
    def run(*more: str) -> Done:
        done = run_exporter("publish", artifact, "--repo", REPO, *more, env=env)
        assert TOKEN not in done.out + done.err
        return done

    return run


def test_a_dry_run_shows_everything_and_asks_nothing(hub: LoopbackHub, publish: Command, artifact: Path) -> None:
    done = publish("--dry-run", "--private", "--tag", "v1")
    assert (done.code, done.err) == (0, "")
    for name in (*FILES, "README.md", "manifest.json", "SHA256SUMS", "report.html"):
        assert f"{name} " in done.out
    assert f"to main of {REPO} (private), tag v1" in done.out
    planned = publish("--dry-run", "--json").json
    sizes = {each["name"]: each["bytes"] for each in planned["files"]}
    assert sizes.items() >= {name: len(data) for name, data in FILES.items()}.items()
    assert planned["bytes"] == sum(sizes.values())
    assert not hub.requests


def test_nobody_there_to_answer(hub: LoopbackHub, publish: Command) -> None:
    done = publish()
    assert done.code == 2
    assert "hint: --yes" in done.err
    assert not hub.requests


def test_published_and_said_so(hub: LoopbackHub, publish: Command, artifact: Path) -> None:
    done = publish("--yes", "--json", "--tag", "v1")
    assert (done.code, done.err) == (0, "")
    assert done.json["status"] == "published"
    assert done.json["commit"] == hub.repos[REPO].refs["main"] == hub.repos[REPO].tags["v1"]
    assert done.json["verify"] == f"exporter verify {REPO}@v1"
    assert holds(hub, artifact)
    again = publish("--yes")
    assert again.code == 0
    assert "are there already" in again.out
    assert f"check it anywhere: exporter verify {REPO}" in again.out
    assert again.err == ""


def at_a_terminal(command: list[str], env: dict[str, str], answer: str) -> tuple[int, str]:
    """Exit code and screen of a command that a person answers."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **env}) as process:
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        screen = b""
        while True:
            try:
                screen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        code = process.wait(60)
    os.close(ours)
    return code, screen.decode()


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_person_is_asked(hub: LoopbackHub, env: dict[str, str], artifact: Path, answer: str) -> None:
    command = [sys.executable, "-m", "exporter", "publish", str(artifact), "--repo", REPO]
    code, screen = at_a_terminal(command, {**env, "TERM": "dumb"}, answer)
    assert code == 0
    assert f"Publish to {REPO}? [y/N]" in screen
    assert screen.index("model.onnx.data") < screen.index("Publish to")
    assert TOKEN not in screen
    assert (REPO in hub.repos) == (answer == "y")
    assert ("nothing was published" in screen) == (answer == "n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--repo", "nobody"], 2, '"nobody" is no name of a repository'),
        (["--repo", "me/x y"], 2, "is no name of a repository"),
        (["--repo", REPO, "--tag", "a..b"], 2, '--tag: "a..b" is no name of a tag'),
        (["--repo", REPO, "--revision", "refs/heads/x"], 2, "is no name of a branch"),
        (["--repo", REPO, "--create-pr", "--tag", "v1"], 2, "--tag does not go with --create-pr"),
        (["--repo", REPO, "--base-model", "x"], 2, "--base-model"),
    ],
)
def test_names_that_cannot_be(
    hub: LoopbackHub, env: dict[str, str], artifact: Path, arguments: list[str], code: int, says: str
) -> None:
    done = run_exporter("publish", artifact, *arguments, "--yes", env=env)
    assert done.code == code
    assert done.err.startswith("error: ")
    assert says in done.err
    assert done.err.count("\n") == 2
    assert not hub.requests


def test_errors_are_one_line_without_a_token(hub: LoopbackHub, env: dict[str, str], publish: Command) -> None:
    hub.tokens = ()
    done = publish("--yes")
    assert done.code == 4
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["error", "  hint"]
    env["HF_TOKEN"] = ""
    done = publish("--yes", "--json")
    assert done.code == 4
    assert done.json["hint"] == "hf auth login"


KILLS: dict[str, tuple[str, str, Callable[[Callable[[], Any]], list[Fault]]]] = {
    "when the repository was made": ("POST", "/repos/create", lambda kill: [Lost(kill)]),
    "before the first file": ("PUT", "/_objects/", lambda kill: [Then(kill)]),
    "after the first file": ("PUT", "/_objects/", lambda kill: [Lost(kill)]),
    "before the last file": ("PUT", "/_objects/", lambda kill: [Then(bool), Then(bool), Then(kill)]),
    "before the commit": ("POST", "validate-yaml", lambda kill: [Then(bool), Then(kill)]),
    "after the commit": ("POST", "/commit/", lambda kill: [Lost(kill)]),
    "before the last look": ("GET", "/tree/", lambda kill: [Then(bool), Then(kill)]),
    "before the tag": ("POST", "/tag/", lambda kill: [Then(kill)]),
    "after the tag": ("POST", "/tag/", lambda kill: [Lost(kill)]),
}


@pytest.mark.parametrize("case", KILLS)
def test_killed_and_run_again(
    hub: LoopbackHub, env: dict[str, str], publish: Command, artifact: Path, case: str
) -> None:
    method, path, faults = KILLS[case]
    running: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        os.kill(running[0].pid, signal.SIGKILL)

    hub.inject(method, path, *faults(kill))
    command = [sys.executable, "-m", "exporter", "publish", str(artifact), "--repo", REPO, "--yes", "--tag", "v1"]
    with subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        running.append(process)
        assert process.wait(60) == -signal.SIGKILL
    arrived = set(hub.objects)
    committed = len(hub.repos[REPO].made()) - 1
    hub.requests.clear()
    done = publish("--yes", "--json", "--tag", "v1")
    assert done.code == 0, done.err
    assert done.json["made"] == (not committed)
    assert holds(hub, artifact)
    assert len(hub.repos[REPO].made()) == 2
    assert hub.repos[REPO].tags == {"v1": hub.repos[REPO].refs["main"]}
    sent = {request.path.rpartition("/")[2] for request in hub.asked("PUT")}
    assert not sent & arrived, "what had arrived was sent again"


def test_interrupted_and_run_again(hub: LoopbackHub, env: dict[str, str], publish: Command, artifact: Path) -> None:
    running: list[subprocess.Popen[str]] = []
    hub.inject("PUT", "/_objects/", Then(lambda: running[0].send_signal(signal.SIGINT)), Then(bool))
    command = [sys.executable, "-m", "exporter", "publish", str(artifact), "--repo", REPO, "--yes", "--json"]
    with subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        running.append(process)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["exit_code"] == 130
    assert "run the same command" in err
    assert len(hub.repos[REPO].made()) == 1
    assert publish("--yes").code == 0
    assert holds(hub, artifact)
    assert len(hub.repos[REPO].made()) == 2


def test_a_real_artifact_comes_back_the_same(hub: LoopbackHub, env: dict[str, str], demo_run: Any) -> None:
    """What the main job leaves behind goes to the Hub, and the command that is told there checks it elsewhere."""
    done = run_exporter("publish", demo_run.folder, "--repo", REPO, "--yes", "--json", env=env)
    assert done.code == 0, done.err
    assert holds(hub, demo_run.folder)
    command = done.json["verify"].split()[1:]
    assert run_exporter(*command, env=env).code == 0
    weights = next(name for name in contents(hub) if name.endswith(".gguf"))
    blob = hub.repos[REPO].tree()[weights]
    hub.objects[blob.sha256 or ""] = b""
    hub.repos[REPO].tree()[weights] = replace(blob, data=blob.data[:-1] + b"?")
    elsewhere = {**env, "HF_HOME": env["HF_HOME"] + "-elsewhere"}
    assert run_exporter(*command, env=elsewhere).code == 1
