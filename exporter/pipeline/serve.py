"""An artifact as an OpenAI-compatible endpoint: found, looked at, loaded in a process of its own, and served."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.checkpoint.headers import read_json
from exporter.checkpoint.source import read_template
from exporter.errors import ExporterError, Refused, UsageError
from exporter.formats.gguf.foreign_tables import read_tables
from exporter.formats.onnx.external import read_initializers
from exporter.model.released import RELEASED
from exporter.pipeline.bench import find_subject
from exporter.pipeline.calibration.chat import rendered
from exporter.pipeline.calibration.rows import row
from exporter.pipeline.foreign import Foreign, open_foreign
from exporter.pipeline.machine import runtime_threads
from exporter.pipeline.prove_onnx import PROVIDERS
from exporter.pipeline.serve_worker import Request
from exporter.validate import harmony
from exporter.validate.endpoint.generation import Limits
from exporter.validate.endpoint.server import Server
from exporter.validate.endpoint.service import Render, Service
from exporter.validate.endpoint.worker import Worker
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_rules import require_runnable
from exporter.validate.onnx_session import import_onnxruntime

CONTEXT = 32768  # tokens; keys and values of gpt-oss-20b take 0.8 GB
_WORKER = "exporter.pipeline.serve_worker"
_CONFIG_CAP = 1 << 24  # bytes


@dataclass(frozen=True)
class Ask:
    """context 0: what the model takes, at most CONTEXT. threads 0: as many as suit the machine. port 0: a free one.

    no_answer: see Service.
    """

    artifact: Path
    host: str = "127.0.0.1"
    port: int = 0
    context: int = 0
    threads: int = 0
    name: str = ""
    no_answer: str = ""


@dataclass(frozen=True)
class Served:
    """What is known of an artifact before it is loaded. context: tokens that the model takes; 0: it does not say.

    released: "gpt-oss-20b" where it has the shape of that model.
    """

    name: str
    request: Request
    context: int
    stops: frozenset[int]
    template: str | None
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    released: str | None = None


def look(ask: Ask) -> Served:
    """Open the artifact's small parts. Raises UsageError, Refused or ExporterError for what cannot be served."""
    found = open_foreign(ask.artifact)
    try:
        threads = ask.threads or runtime_threads()
        request = Request(found.kind, str(found.path.absolute()), 0, threads, str(found.tokenizer_file or ""))
        served = {"gguf": _gguf, "onnx": _onnx, "folder": _folder}[found.kind](found, request, ask.artifact)
    finally:
        found.close()
    most = served.context or CONTEXT
    if ask.context > most:
        raise UsageError(f"the model takes {most:,} tokens, {ask.context:,} are asked for", hint="a smaller --context")
    context = ask.context or min(most, CONTEXT)
    request = dataclasses.replace(served.request, context=context)
    name = ask.name or re.sub(r"[^A-Za-z0-9._-]", "-", ask.artifact.resolve().name) or "model"
    return dataclasses.replace(served, name=name, request=request, context=context, released=_released(found))


@contextmanager
def endpoint(ask: Ask, on_ready: Callable[[Server, Served], None] = lambda server, served: None) -> Iterator[Server]:
    """A server that listens and has its model loaded; who has it calls `serve_forever`, in whatever thread.

    Raises what `look` does, UsageError where it cannot listen, and WorkerDied where the runtime cannot load it.
    """
    served = look(ask)
    with Worker(_WORKER, dataclasses.asdict(served.request), str(ask.artifact)) as worker:
        stops = served.stops | _harmony_stops(worker)
        render = _renderer(ask.artifact, served)
        service = Service(served.name, worker, Limits(served.context, stops), render, ask.no_answer)
        with Server(ask.host, ask.port, service) as server:
            on_ready(server, served)
            yield server


def serve(ask: Ask, on_ready: Callable[[Server, Served], None]) -> None:
    """Answer until interrupted. Raises WorkerDied when the runtime ends."""
    with endpoint(ask, on_ready) as server:
        server.serve_forever()
        server.service.require_alive()


def _harmony_stops(worker: Worker) -> frozenset[int]:
    try:
        return harmony.Special.of(worker.vocabulary).stops
    except ExporterError:
        return frozenset()


def _renderer(where: Path, served: Served) -> Render | None:
    template = served.template
    if template is None:
        return None

    def render(inputs: Mapping[str, Any]) -> str:
        each = row(dict(inputs), "this conversation")
        assert each.chat is not None
        opened = dataclasses.replace(each, chat={**each.chat, "add_generation_prompt": True})
        return rendered(where, template, served.tokenizer_config, [opened])[0]

    return render


# Each kind


def _gguf(found: Foreign, request: Request, artifact: Path) -> Served:
    head = read_tables(found.path)
    template = head.metadata.get("tokenizer.chat_template")
    ids = [head.whole(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    small = _SmallFiles(found.path.parent)
    return Served(
        "",
        request,
        head.whole(f"{head.text('general.architecture')}.context_length") or 0,
        frozenset(i for i in ids if i is not None),
        template if isinstance(template, str) else small.template,
        small.tokenizer_config,
    )


def _onnx(found: Foreign, request: Request, artifact: Path) -> Served:
    subject = find_subject(artifact)
    small = _SmallFiles(subject.folder)
    _require_tokenizer(found)
    if (subject.folder / "manifest.json").is_file():
        read_initializers(found.path, subject.folder)
    here = import_onnxruntime().get_available_providers()
    provider = PROVIDERS[subject.device] if PROVIDERS[subject.device] in here else CPU
    require_runnable(found.path, provider)
    request = dataclasses.replace(request, provider=provider, head_size=subject.head_size)
    context = subject.context or (found.config.max_position_embeddings if found.config else 0)
    return small.served(request, context)


def _folder(found: Foreign, request: Request, artifact: Path) -> Served:
    _require_tokenizer(found)
    return _SmallFiles(found.path).served(request, found.config.max_position_embeddings if found.config else 0)


def _require_tokenizer(found: Foreign) -> None:
    if found.tokenizer_file is None:
        raise Refused(f"{found.path}: no tokenizer.json beside it", hint="copy tokenizer.json from the source model")


class _SmallFiles:
    """Template and stops of a folder, as far as they are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tokenizer_config = self._json("tokenizer_config.json")
        file = folder / "chat_template.jinja"
        self.template = read_template(file if file.is_file() else None, self.tokenizer_config)

    def _json(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        return read_json(path, _CONFIG_CAP) if path.is_file() else {}

    def served(self, request: Request, context: int) -> Served:
        stops: list[Any] = []
        for name in ("generation_config.json", "config.json"):
            value = self._json(name).get("eos_token_id")
            stops += value if isinstance(value, list) else [value]
        whole = frozenset(i for i in stops if type(i) is int)
        return Served("", request, context, whole, self.template, self.tokenizer_config)


def _released(found: Foreign) -> str | None:
    """The released model whose sizes these are; a fine-tune of it has them too."""
    for repo, config in RELEASED.items():
        if found.config and all(
            getattr(found.config, name) == getattr(config, name)
            for name in ("num_hidden_layers", "num_local_experts", "hidden_size", "vocab_size")
        ):
            return repo.partition("/")[2]
    return None
