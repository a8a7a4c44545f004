"""Write what the code can say about itself: docs/cli.md, and the blocks between markers in other pages.

    python scripts/make_docs.py

A block starts with `<!-- generated: NAME -->` and ends with `<!-- end -->`; what stands between them
is replaced. tests/unit/test_docs.py fails while a page differs from what this writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from exporter.cli import COMMANDS, cli
from exporter.formats import all_formats
from exporter.model import tensor_specs
from exporter.model.memory import fit
from exporter.model.released import RELEASED
from exporter.pipeline.plan import released_scheme
from exporter.pipeline.profiles import load_profile, load_recipe, profile_names, recipe_names
from exporter.types.gates import GATES
from exporter.types.recipe import METHODS
from exporter.types.sizes import format_size

DOCS = Path(__file__).resolve().parents[1] / "docs"
_WIDTH = 100  # of help text; the terminal's own would make the page differ from machine to machine
_BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SENSES = {"max": "at most the limit", "min": "at least the limit", "equal": "equal to the limit"}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def code(text: str) -> str:
    return f"`{text}`"


# docs/cli.md


def cli_page() -> str:
    """The help text of every command, as `exporter COMMAND --help` prints it."""
    root = _context(cli, "exporter")
    parts = [
        "# Commands\n\n<!-- Made by scripts/make_docs.py from the commands themselves: `make docs`. -->\n",
        "Every option can also be set in the environment as `EXPORTER_<COMMAND>_<PARAMETER>`, for example",
        "`EXPORTER_QUANTIZE_PROFILE=16gb`. `EXPORTER_DEBUG=1` shows the traceback of an error. `HF_HOME`,",
        "`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub.\n",
        _help(root),
    ]
    for commands in COMMANDS.values():
        for name in commands:
            command = cli.get_command(root, name)
            assert command is not None
            parts += [f"## exporter {name}\n", _help(_context(command, name, root))]
    return "\n".join(parts)


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return click.Context(command, parent, name, terminal_width=_WIDTH, **command.context_settings)


def _help(context: click.Context) -> str:
    text = re.sub(r"[ \t]+$", "", click.unstyle(context.get_help()), flags=re.MULTILINE)
    return f"```text\n{text}\n```\n"


# Blocks of docs/profiles.md


def gates() -> str:
    rows = [(code(name), code(g.metric), _SENSES[g.sense], g.meaning) for name, g in GATES.items()]
    return table(("gate", "value in report.json", "passes when", "meaning"), rows)


def profiles() -> str:
    rows = []
    for p in map(load_profile, profile_names()):
        hardware = (format_size(p.hardware.memory), format_size(p.hardware.usable), f"{p.hardware.context:,}")
        made = [", ".join(code(a.folder) for a in p.artifacts if a.default is default) for default in (True, False)]
        rows.append((code(p.name), p.title, *hardware, code(p.model), *made))
    columns = ("profile", "for", "memory", "usable", "context", "default model", "makes", "on request")
    return table(columns, rows)


def recipes() -> str:
    return table(("recipe", "numbers"), [(code(r.name), r.title) for r in map(load_recipe, recipe_names())])


def methods() -> str:
    return table(("method", "what it does"), [(code(name), meaning) for name, meaning in METHODS.items()])


def sizes() -> str:
    """Bytes of every shipped recipe for both releases, and with the KV cache and buffers of 32,768 tokens."""
    rows = []
    hardware = load_profile("16gb").hardware
    fmt = all_formats()["gguf"]
    for name in recipe_names():
        recipe, cells = load_recipe(name), []
        for config in RELEASED.values():
            steps = [recipe.step(s, released_scheme(s)) for s in tensor_specs(config)]
            weights = sum(fmt.target(s).nbytes for s in steps)
            cells += [format_size(weights), format_size(fit(config, weights, hardware, 32768).total)]
        rows.append((code(name), *cells))
    return table(("recipe", "20b weights", "20b total", "120b weights", "120b total"), rows)


# Blocks of docs/formats.md


def schemes() -> str:
    rows = [(f.name, code(scheme), kind) for f in all_formats().values() for scheme, kind in f.schemes().items()]
    return table(("format", "numbers", "stored exactly as"), rows)


def gguf_tensors() -> str:
    """Names, shapes and types of 20b's tensors; layer 1 stands for all layers."""
    config, recipe, fmt = RELEASED["openai/gpt-oss-20b"], load_recipe("mxfp4-q8"), all_formats()["gguf"]
    rows = []
    for spec in tensor_specs(config):
        if spec.layer not in (None, 1):
            continue
        target = fmt.target(recipe.step(spec, released_scheme(spec)))
        names = [
            code(n.replace("layers.1.", "layers.N.").replace("blk.1.", "blk.N.")) for n in (spec.name, target.name)
        ]
        bits = target.nbytes * 8 / spec.elements
        rows.append((*names, "x".join(map(str, target.shape)), target.type, f"{bits:g}"))
    return table(("canonical name", "GGUF name", "shape", "type", "bits a number"), rows)


BLOCKS = {
    "gates": gates,
    "profiles": profiles,
    "recipes": recipes,
    "methods": methods,
    "sizes": sizes,
    "schemes": schemes,
    "gguf-tensors": gguf_tensors,
}


def filled(text: str) -> str:
    """`text` with every block made anew. Raises KeyError for a block that nobody makes."""
    return _BLOCK.sub(lambda m: f"{m[1]}\n{BLOCKS[m['name']]()}\n{m[3]}", text)


def pages() -> dict[Path, str]:
    """Every generated page or page with generated blocks, as it should be."""
    found = {DOCS / "cli.md": cli_page()}
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if path not in found and _BLOCK.search(text):
            found[path] = filled(text)
    return found


def main() -> None:
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
