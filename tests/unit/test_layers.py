"""Imports go down only, and siblings never import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = [
    {"cli"},
    {"pipeline"},
    {"checkpoint", "quantize", "formats", "validate", "publish"},
    {"hub"},
    {"model"},
    {"numerics"},
    {"types"},
    {"errors"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted((ROOT / "exporter").rglob("*.py"))


def imported(source: str) -> set[str]:
    """The parts of `exporter` that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "exporter":
                names = [f"exporter.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("exporter.")}
    return found & RANK.keys()


def breaches(own: str, source: str) -> list[str]:
    """Imports that a module of part `own` must not have."""
    return [other for other in sorted(imported(source)) if other != own and RANK[other] <= RANK[own]]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT / "exporter").parts[0].removesuffix(".py")
    if own in RANK:
        assert breaches(own, path.read_text()) == []


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("numerics", "from exporter.model import ModelConfig"),
        ("formats", "from exporter.checkpoint import open_checkpoint"),
        ("types", "def f():\n    import exporter.numerics.bits"),
    ],
)
def test_a_planted_upward_import_is_found(own, line):
    assert breaches(own, line)


def test_help_imports_nothing_heavy():
    code = "import sys; from exporter.cli import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    heavy = {"numpy", "torch", "rich", "gguf", "huggingface_hub", "tokenizers", "psutil", "exporter.pipeline"}
    loaded = {name for name in heavy if f"'{name}'" in done.stdout}
    assert "Usage: exporter" in done.stdout
    assert loaded == set()
