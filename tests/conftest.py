"""The demo checkpoint, and one run of the main job on it that many tests look at."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

DEMO = Path(__file__).parent / "data" / "tiny-gpt-oss"


@dataclass(frozen=True)
class Done:
    """A finished command. `json` is its stdout parsed, or None."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def run_exporter(*arguments, env=None, timeout=120, cwd=None) -> Done:
    """The real command in a process of its own."""
    command = [sys.executable, "-m", "exporter", *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class DemoRun:
    """`exporter quantize --profile 16gb --json` on the demo checkpoint."""

    done: Done
    out: Path
    folder: Path


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory) -> DemoRun:
    out = tmp_path_factory.mktemp("demo")
    done = run_exporter("quantize", "--profile", "16gb", DEMO, "--out", out, "--json")
    assert done.code == 0, done.err
    return DemoRun(done, out, out / "tiny-gpt-oss" / "16gb" / "gguf-mxfp4-q8")


@pytest.fixture(scope="session")
def demo_checkpoint():
    from exporter.checkpoint import open_checkpoint

    with open_checkpoint(DEMO) as checkpoint:
        yield checkpoint
