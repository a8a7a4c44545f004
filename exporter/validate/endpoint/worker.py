"""A predictor in a process of its own, from both sides.

Unlike the workers of a proof (validate/child.py) it lives as long as the endpoint: a JSON line is asked, a JSON line
is answered. What the parent asks: {"op": "encode", "text"}, {"op": "prompt", "tokens", "top"} and {"op": "next",
"token", "uniform", "temperature", "top_p", "top"}, where token is what the sequence goes on with, null right after a
prompt. An answer is an object; {"error", "hint"} where it failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

from exporter.errors import ExporterError
from exporter.numerics.floats import F32
from exporter.validate.child import WorkerDied, die_with_parent, last_words
from exporter.validate.endpoint.predictors import Predictor, prefill
from exporter.validate.endpoint.sampling import log_probabilities, sample, top
from exporter.validate.endpoint.vocabulary import Vocabulary

_STOP_SECONDS = 5.0
_STACK = 64 << 20  # bytes


@dataclass(frozen=True)
class Likely:
    """A token, its log-probability, and the likeliest ones of its place with theirs."""

    token: int
    log_p: float
    top: list[tuple[int, float]]

    @classmethod
    def of(cls, token: int, log_p: Any, count: int) -> Likely:
        return cls(token, float(log_p[token]), top(log_p, count))


# The child's side


class Session:
    """Answers what the parent asks of one predictor."""

    def __init__(self, predictor: Predictor, encode: Callable[[str], list[int]]) -> None:
        self._predictor, self._encode = predictor, encode
        self._logits: F32 | None = None  # [V] after the last token

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        operations = {"encode": self._text, "prompt": self._prompt, "next": self._next}
        return operations[asked["op"]](asked)

    def _text(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": self._encode(asked["text"])}

    def _prompt(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A new sequence. "likely": of each token but the first, where "top" is not null."""
        tokens, count = asked["tokens"], asked["top"]
        self._logits = None
        self._predictor.clear()
        likely: list[Likely] = []
        at = 0
        for logits in prefill(self._predictor, tokens, count is not None):
            if count is not None:
                following = tokens[at + 1 : at + 1 + len(logits)]
                # Row by row: in float64, those of a piece would take 256 MiB, three times over.
                likely += [Likely.of(t, log_probabilities(logits[i]), count) for i, t in enumerate(following)]
                at += len(logits)
        self._logits = logits[-1].copy()
        return {"likely": [[each.token, each.log_p, each.top] for each in likely]}

    def _next(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["token"] is not None:
            self._logits = self._predictor.append([asked["token"]], False)[-1]
        assert self._logits is not None
        log_p = log_probabilities(self._logits)
        chosen = sample(log_p, asked["uniform"], asked["temperature"], asked["top_p"])
        found = Likely.of(chosen, log_p, asked["top"])
        return {"likely": [[found.token, found.log_p, found.top]]}


Load = Callable[[dict[str, Any]], tuple[Predictor, list[bytes], list[int], Callable[[str], list[int]]]]


def serve(load: Load) -> int:
    """The child: load what the first line says, then answer line by line until stdin ends."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # native code may print

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        started = time.perf_counter()
        predictor, pieces, control, encode = load(json.loads(sys.stdin.readline()))
        seconds = time.perf_counter() - started
        facts = {"runtime": predictor.runtime, "vocab_size": predictor.vocab_size, "load_seconds": seconds}
        # JSON holds no bytes: each becomes the character of its number.
        say({**facts, "pieces": [piece.decode("latin-1") for piece in pieces], "control": control})
        session = Session(predictor, encode)
    except ExporterError as error:
        say({"error": error.message, "hint": error.hint})
        return error.exit_code
    _with_stack(lambda: _loop(session, say))
    return 0


def _with_stack(work: Callable[[], None]) -> None:
    """In a thread whose stack is what it may be on any system: native code recurses over the length of a word."""
    threading.stack_size(_STACK)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def _loop(session: Session, say: Callable[[dict[str, Any]], None]) -> None:
    for line in sys.stdin:
        try:
            say(session.answer(json.loads(line)))
        except ExporterError as error:
            say({"error": error.message, "hint": error.hint})
        except Exception as error:  # one request's failure is not the endpoint's
            say({"error": f"internal error: {type(error).__name__}: {error}"[:300], "hint": None})


# The parent's side


class Worker:
    """The child and what it can be asked; `with` ends it. One question at a time: the caller holds a lock.

    Raises WorkerDied when the runtime crashes or ends, ExporterError for what it says itself.
    """

    def __init__(self, module: str, request: dict[str, Any], subject: str) -> None:
        self.subject = subject
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the worker
        self._said = 0  # bytes of warnings while it loaded
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],  # -P: no folder `exporter` of the working directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
        self.runtime = "the runtime"
        try:
            facts = self.ask(request)
        except BaseException:  # also Ctrl-C while it loads
            self.close()
            raise
        self.runtime, self.vocab_size = str(facts["runtime"]), int(facts["vocab_size"])
        self.load_seconds = float(facts["load_seconds"])
        self._said = os.fstat(self._errors.fileno()).st_size
        pieces = [piece.encode("latin-1") for piece in facts["pieces"]]
        self.vocabulary = Vocabulary(pieces, frozenset(facts["control"]), self.encode)

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.ask({"op": "encode", "text": text})["tokens"]
        return tokens

    def prompt(self, tokens: Sequence[int], count: int | None) -> list[Likely]:
        """Start a sequence; with `count`, of each token but the first, with so many of the likeliest."""
        return self._likely({"op": "prompt", "tokens": list(tokens), "top": count})

    def next(self, token: int | None, uniform: float, temperature: float, top_p: float, count: int) -> Likely:
        """The token that follows, drawn; `token` is the one before, None right after a prompt."""
        asked = {"token": token, "uniform": uniform, "temperature": temperature, "top_p": top_p, "top": count}
        return self._likely({"op": "next", **asked})[0]

    def _likely(self, asked: dict[str, Any]) -> list[Likely]:
        return [Likely(t, p, [(i, v) for i, v in best]) for t, p, best in self.ask(asked)["likely"]]

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(OSError, ValueError):  # it has ended: said below
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ExporterError(answer["error"], hint=answer["hint"])
        return answer

    def _died(self) -> WorkerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        code = self._process.returncode
        how = "does not answer" if code is None else f"exited with {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        self._errors.seek(self._said)
        reason = last_words(self._errors.read()[-(1 << 16) :].decode("utf-8", "replace"))
        hint = "not enough memory?" if code == -signal.SIGKILL else "exporter validate ARTIFACT"
        return WorkerDied(f"{self.runtime} {how} while serving {self.subject}{': ' + reason if reason else ''}", hint)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
