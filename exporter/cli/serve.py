"""exporter serve: an artifact behind OpenAI's HTTP interface."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli import options
from exporter.cli.bench import Threads
from exporter.cli.failures import stoppable

if TYPE_CHECKING:
    from exporter.pipeline.serve import Served
    from exporter.validate.endpoint.server import Server


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--host", metavar="NAME", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on; 0, the default, a free one.")
@click.option(
    "-c",
    "--context",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Tokens of prompt and answer together; by default what the model takes, at most 32,768.",
)
@click.option("--threads", type=Threads(), default="auto", show_default=True, help="Threads of the runtime, or auto.")
@click.option("--name", metavar="NAME", default="", help="The model's name in answers; by default the artifact's.")
@options.as_json
def command(artifact: Path, host: str, port: int, context: int | None, threads: int, name: str, as_json: bool) -> None:
    """Serve an artifact in its real runtime to anyone's harness.

    ARTIFACT is a GGUF (run in llama.cpp), an ONNX folder or graph with a KV cache (ONNX Runtime), or a folder
    of safetensors (exporter's own float32 forward: slow, for small models), ours or another tool's. Answers
    /v1/completions, with log-probabilities of the prompt too, /v1/chat/completions by the model's own chat
    template with its reasoning and tool calls taken apart, and /v1/models; one request at a time, weights
    as shipped. Only this machine can ask, unless --host says otherwise: there is no password. Ctrl-C ends it.

    \b
    Examples:
      exporter serve artifacts/gpt-oss-20b/16gb/gguf-mxfp4-q8 --port 8080
      exporter serve ./model.gguf --context 8192
    """
    from exporter.pipeline.serve import Ask, serve

    def ready(server: Server, served: Served) -> None:
        facts = {
            "url": server.url,
            "model": served.name,
            "runtime": server.service.worker.runtime,
            "context": served.context,
            "chat": served.template is not None,
        }
        if as_json:
            # One line, at once: who starts this reads it to know where to ask.
            click.echo(json.dumps(facts))
        else:
            click.echo(f"{served.name} in {facts['runtime']}, {served.context:,} tokens of context")
            click.echo(f"{server.url}  (Ctrl-C ends it)")
            if served.template is None:
                click.echo("no chat template: /v1/completions only", err=True)

    stoppable()
    with contextlib.suppress(KeyboardInterrupt):
        serve(Ask(artifact, host, port, context or 0, threads, name), ready)
