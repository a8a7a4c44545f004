"""The documentation agrees with the code: generated parts are fresh, links resolve, commands exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from exporter.cli import cli
from exporter.errors import ExporterError

ROOT = Path(__file__).resolve().parents[2]
PROSE = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "artifacts" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
MADE = {".venv", ".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", "build", "dist"}
TEXTS = {"", ".cfg", ".hex", ".jinja", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
# A home or a mount of one machine, or a Windows drive. /tmp, /etc and /path/to are examples and system files.
MACHINE_PATH = re.compile(
    r"(?<![\w.}/:])(?:/(?:home|root|Users|work|mnt|media|Volumes)/[\w.-]+|[A-Z]:\\\\?(?:Users|work)\b)"
)


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def make_docs():
    path = ROOT / "scripts" / "make_docs.py"
    spec = importlib.util.spec_from_file_location("make_docs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Generated parts


def test_generated_parts_are_fresh(make_docs):
    stale = [p for p, text in make_docs.pages().items() if not p.exists() or p.read_text() != text]
    assert [relative(p) for p in stale] == [], "run `make docs`"


def test_pages_do_not_depend_on_the_terminal(make_docs, monkeypatch):
    page = make_docs.cli_page()
    monkeypatch.setenv("COLUMNS", "47")
    assert make_docs.cli_page() == page


def test_every_block_is_used_and_a_stale_one_is_renewed(make_docs):
    pages = "".join(p.read_text() for p in PROSE)
    used = set(re.findall(r"<!-- generated: (\S+) -->", pages))
    assert used == set(make_docs.BLOCKS)
    stale = "a\n<!-- generated: gates -->\nold\n<!-- end -->\nb\n"
    renewed = make_docs.filled(stale)
    assert "old" not in renewed
    assert renewed.startswith("a\n")
    assert renewed.endswith("\nb\n")
    assert make_docs.filled(renewed) == renewed


# Links


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page, text):
    """Relative links of `text` that lead to no file, or to no heading of it."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PROSE, ids=relative)
def test_relative_links_resolve(page):
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_found():
    text = "[a](docs/cli.md) [b](docs/none.md) [c](docs/cli.md#exporter-plan) [d](docs/cli.md#none) [e](https://x.y)"
    assert broken_links(ROOT / "README.md", text) == ["docs/none.md", "docs/cli.md#none"]


# Commands


def commands_in(text):
    """Lines of `sh` blocks that call exporter, without what follows a pipe or a redirection."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    cut = [line[: next((i for i, word in enumerate(line) if word in ("|", ">")), len(line))] for line in lines]
    return [line[1:] for line in cut if line[:1] == ["exporter"]]


def parse(words):
    """Parse a command line as Click does, and run nothing."""
    with click.Context(cli, info_name="exporter") as parent:
        command = cli.resolve_command(parent, words)[1]
        command.make_context(words[0], words[1:], parent=parent)


CALLS = [(relative(page), words) for page in PROSE for words in commands_in(page.read_text())]


@pytest.mark.parametrize(("page", "words"), CALLS, ids=[" ".join(w) for _, w in CALLS])
def test_commands_in_the_text_parse(page, words):
    parse(words)


@pytest.mark.parametrize("line", ["fit --profil 16gb", "plan 20b", "quantise --profile 16gb", "doctor"])
def test_a_wrong_command_does_not_parse(line):
    with pytest.raises((click.UsageError, ExporterError)):
        parse(line.split())


# House rules


def text_files():
    """Files of the repository that people or programs read as text, without what tools and runs made."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if MADE & set(parts) or (parts[0] == "artifacts" and parts != ("artifacts", "README.md")):
            continue
        if path.suffix in TEXTS and path.is_file() and path.stat().st_size < 1 << 20:
            yield path


def test_no_file_names_a_path_of_one_machine():
    texts = {relative(p): p.read_text("utf-8", "replace") for p in text_files()}
    assert {"README.md", "Makefile", ".ci/run", "exporter/errors.py", "tests/unit/test_docs.py"} <= texts.keys()
    assert {name: m[0] for name, text in texts.items() if (m := MACHINE_PATH.search(text))} == {}


@pytest.mark.parametrize("folder", ["home/ann/models", "Users/ann/models", "root/.cache", "work/main", "mnt/disk1"])
def test_a_planted_path_is_found(folder):
    assert MACHINE_PATH.search(f"see /{folder}/x.gguf")
    assert MACHINE_PATH.search(f'"/{folder}"')


@pytest.mark.parametrize("text", ["/var/syn", "/etc/passwd", "https://example.org/home/x", "docs/work/x", "a/root/b"])
def test_examples_and_relative_paths_are_not(text):
    assert not MACHINE_PATH.search(text)


def test_decisions_are_numbered_and_complete():
    assert [p.name[:5] for p in DECISIONS] == [f"{n:04d}-" for n in range(1, len(DECISIONS) + 1)]
    for number, page in enumerate(DECISIONS, 1):
        text = page.read_text()
        assert text.startswith(f"# {number}. "), page.name
        assert [part for part in ("Decision", "Why", "Left") if f"**{part}.**" not in text] == [], page.name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
