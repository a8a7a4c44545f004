"""The command line. Each command is one module, imported only when it is called, so `--help` is instant."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

# Section -> command -> (module, one line for `exporter --help`; a test compares it with the command's own).
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Make": {
        "quantize": ("exporter.cli.quantize", "Quantize, export and prove: the whole job."),
        "export": ("exporter.cli.export", "Make artifacts of numbers that are there already."),
        "plan": ("exporter.cli.plan", "Show what a profile would make, and what it weighs."),
    },
    "Check": {
        "validate": ("exporter.cli.validate", "Prove an artifact that is there already."),
        "fit": ("exporter.cli.fit", "Show whether a model fits a device, byte by byte."),
        "verify": ("exporter.cli.verify", "Judge anyone's artifact against a checkpoint."),
        "compare": ("exporter.cli.compare", "Show the reports of several artifacts side by side."),
        "bench": ("exporter.cli.bench", "Measure the speed and the memory of an artifact on this machine."),
        "serve": ("exporter.cli.serve", "Serve an artifact in its real runtime to anyone's harness."),
        "score": ("exporter.cli.score", "Score an artifact in tasks, in its real runtime."),
        "inspect": ("exporter.cli.inspect", "Describe a checkpoint."),
        "doctor": ("exporter.cli.doctor", "Look for everything that is wrong with a checkpoint."),
    },
    "Publish": {
        "card": ("exporter.cli.card", "Write the model card of one or several artifacts."),
        "sign": ("exporter.cli.sign", "Sign an artifact with a key of yours."),
        "publish": ("exporter.cli.publish", "Put proved artifacts on the Hugging Face Hub, in one commit."),
        "matrix": ("exporter.cli.matrix", "List, make and check every artifact of every profile."),
    },
    "Look up": {
        "profiles": ("exporter.cli.profiles", "List profiles and recipes, or print one."),
        "formats": ("exporter.cli.formats", "List formats and what each stores exactly."),
    },
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        for section in COMMANDS.values():
            if name in section:
                command: click.Command = importlib.import_module(section[name][0]).command
                return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.list_commands(ctx):
            from exporter.errors import UsageError, did_you_mean

            raise UsageError(f'no command "{name}".{did_you_mean(name, self.list_commands(ctx))}', "exporter --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in section.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "EXPORTER"},
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 a gate failed, 4 refused, 130 interrupted and resumable.",
)
@click.version_option(None, "-V", "--version", package_name="exporter", message="exporter %(version)s")
def cli() -> None:
    """Quantize released gpt-oss weights once, export them everywhere, prove every artifact.

    \b
    Examples:
      exporter quantize --profile 16gb openai/gpt-oss-20b
      exporter quantize --profile 16gb ./my-fine-tune --json
      exporter plan --profile 80gb openai/gpt-oss-120b
      exporter validate artifacts/gpt-oss-20b/16gb/gguf-mxfp4-q8
      exporter fit --profile 16gb --context 32768 20b
      exporter doctor ./my-fine-tune
    """


def main(argv: list[str] | None = None) -> None:
    """The entry point: run a command, turn every failure into a line and an exit code."""
    _open_standard_streams()
    from exporter.cli.failures import guarded

    arguments: list[str] = sys.argv[1:] if argv is None else argv
    sys.exit(guarded(lambda: _invoke(arguments), as_json="--json" in arguments))


def _open_standard_streams() -> None:
    """A stream that the caller closed goes nowhere; else the next file opened would become it."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115  # to the end


def _invoke(arguments: list[str]) -> Any:
    return cli.main(args=arguments, prog_name="exporter", standalone_mode=False)
