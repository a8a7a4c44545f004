"""The demo checkpoint, and one run of the main job on it that many tests look at."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Threads that wait give their processor up, as in exporter itself (model/torch.py): read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A proof's longer tests of the speed are tested by themselves (test_speed.py, test_bench.py).
os.environ.setdefault("EXPORTER_SPEED_SECONDS", "0")

DEMO = Path(__file__).parent / "data" / "tiny-gpt-oss"


def pytest_configure(config):
    """Without -m, what takes minutes is left out."""
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@dataclass(frozen=True)
class Done:
    """A finished command. `json` is its stdout parsed, or None."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def run_exporter(*arguments, env=None, timeout=300, cwd=None) -> Done:
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


def make_artifact(root, fmt, recipe, target="", *, until="export", more="") -> Path:
    """The folder of the demo checkpoint as the only artifact of a profile, proved on a short text if at all.

    The text is long enough for known mistakes to be told from the release: half of it lies past the window.
    """
    from exporter.pipeline.profiles import source_text

    text = source_text("cpu")
    hardware, rest = text[: text.index("[[artifact]]")], text[text.index("[validate]") :]
    artifact = f'[[artifact]]\nformat = "{fmt}"\nrecipe = "{recipe}"\ntarget = "{target}"\n{more}\n\n'
    short = rest.replace("windows = 4", "windows = 2").replace("length = 512", "length = 256")
    profile = root / f"one-{target}.toml"
    profile.write_text(hardware + artifact + short)
    done = run_exporter("quantize", "-p", profile, DEMO, "--out", root, "--until", until, "--json")
    assert done.code == 0, done.err
    return Path(done.json["artifacts"][0]["path"])


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory) -> Iterator[Path]:
    """Where the reference of the demo is kept, once for all tests and workers; the user's own cache stays as it is."""
    made = tmp_path_factory.getbasetemp()
    folder = (made.parent if os.environ.get("PYTEST_XDIST_WORKER") else made) / "exporter-cache"
    before = os.environ.get("EXPORTER_CACHE")
    os.environ["EXPORTER_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["EXPORTER_CACHE"]
    else:
        os.environ["EXPORTER_CACHE"] = before


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
