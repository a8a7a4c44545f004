"""One model that answers requests one after another, in whatever order they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from exporter.errors import ExporterError, UsageError
from exporter.validate.child import WorkerDied
from exporter.validate.endpoint import answers, requests
from exporter.validate.endpoint.answers import Answer
from exporter.validate.endpoint.generation import Abandoned, Gone, Limits, Written, complete, converse, encode
from exporter.validate.endpoint.requests import ApiError, Chat, Completion
from exporter.validate.endpoint.turn import Turn
from exporter.validate.endpoint.worker import Worker

_LOOK_SECONDS = 0.5  # between two looks whether a client that waits for its turn is still there
# What the chat template is given -> the prompt. Raises UsageError for what it does not take.
Render = Callable[[Mapping[str, Any]], str]
Chunks = Generator[dict[str, Any], None, None]
Answers = dict[str, Any] | Chunks


@dataclass
class Service:
    """`render` is None where the model has no chat template. `failed`: why the runtime ended, once it has.

    no_answer: the content of a chat in which the model reached none; "" for null, as OpenAI has it.
    """

    name: str
    worker: Worker
    limits: Limits
    render: Render | None
    no_answer: str = ""
    failed: WorkerDied | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, asked: Mapping[str, Any], gone: Gone) -> Answers:
        """The answer to a POST, or its chunks as they come. Raises ApiError, and Abandoned when `gone` says so."""
        if path == "/tokenize":
            text = requests.text(asked)
            with self._turn_of_model(gone):
                tokens = self.worker.encode(text)
            return {"tokens": tokens, "count": len(tokens), "max_model_len": self.limits.context}
        if path == "/detokenize":
            return {"prompt": self.worker.vocabulary.decode(requests.tokens(asked, self.worker.vocabulary))}
        if path == "/v1/completions":
            parsed = requests.completion(asked)
            return self._texts(parsed, gone) if parsed.stream else self._text(parsed, gone)
        chat = requests.chat(asked)
        prompt = self._prompt(chat)
        return self._turns(chat, prompt, gone) if chat.stream else self._turn(chat, prompt, gone)

    def require_alive(self) -> None:
        """Raises WorkerDied once the runtime has ended, also between two requests."""
        if self.failed is None and not self.worker.alive:
            with self._lock:
                try:
                    self.worker.ask({})
                except WorkerDied as error:
                    self.failed = error
        if self.failed is not None:
            raise self.failed

    def models(self) -> dict[str, Any]:
        model = {"id": self.name, "object": "model", "owned_by": "exporter", "max_model_len": self.limits.context}
        return {"object": "list", "data": [model]}

    def tokenizer_info(self) -> dict[str, Any]:
        """What lm-eval asks instead of loading a tokenizer of its own; the names are vLLM's."""
        known = self.worker.vocabulary.token_to_id
        eos = next((t for t in ("<|return|>", "<|endoftext|>") if known(t) in self.limits.stops), None)
        if eos is None and self.limits.stops:
            eos = self.worker.vocabulary.name(min(self.limits.stops))
        bos = "<|startoftext|>" if known("<|startoftext|>") is not None else None
        return {"eos_token": eos, "bos_token": bos, "pad_token": eos}

    # Completions

    def _text(self, asked: Completion, gone: Gone) -> dict[str, Any]:
        choices, done = [], []
        with self._turn_of_model(gone):
            for index, prompt in enumerate(self._encoded(asked)):
                done.append(written := Written(prompt))
                for _ in complete(self.worker, asked, written, self.limits, gone):
                    pass
                choices.append(answers.text_choice(index, asked, written, self.worker.vocabulary))
        return Answer(self.name, False).whole(choices, done)

    def _texts(self, asked: Completion, gone: Gone) -> Chunks:
        if asked.logprobs is not None:
            raise ApiError(400, "logprobs is given without stream only", "logprobs")
        return self._text_chunks(asked, gone)

    def _text_chunks(self, asked: Completion, gone: Gone) -> Chunks:
        answer, done = Answer(self.name, False), list[Written]()
        with self._turn_of_model(gone):
            for index, prompt in enumerate(self._encoded(asked)):
                choice: dict[str, Any] = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
                if asked.echo:
                    yield answer.chunk([{**choice, "text": self.worker.vocabulary.decode(prompt)}])
                done.append(written := Written(prompt))
                for piece in complete(self.worker, asked, written, self.limits, gone):
                    if piece:
                        yield answer.chunk([{**choice, "text": piece}])
                yield answer.chunk([{**choice, "finish_reason": written.finish}])
        if asked.usage:
            yield answer.chunk([], done)

    def _encoded(self, asked: Completion) -> list[list[int]]:
        """All of them before the first is answered: a bad one among many costs nothing."""
        return [encode(prompt, self.worker.vocabulary, self.limits) for prompt in asked.prompts]

    # Chat completions

    def _prompt(self, asked: Chat) -> str:
        if self.render is None:
            raise ApiError(400, f"{self.name} has no chat template: ask /v1/completions", "messages")
        try:
            return self.render(asked.template)
        except UsageError as error:
            raise ApiError(400, error.message, "messages") from error

    def _begun(self, asked: Chat, prompt: str) -> tuple[Turn, Written]:
        tokens = encode(prompt, self.worker.vocabulary, self.limits)
        turn = Turn(tokens, self.worker.vocabulary, self.limits.stops, asked.sampling.stop)
        return turn, Written(tokens)

    def _turn(self, asked: Chat, prompt: str, gone: Gone) -> dict[str, Any]:
        reasoning, content = "", ""
        with self._turn_of_model(gone):
            turn, written = self._begun(asked, prompt)
            for more, said in converse(self.worker, asked, written, turn, self.limits, gone):
                reasoning, content = reasoning + more, content + said
        content = content or ("" if turn.calls else self.no_answer)
        choice = answers.chat_choice(reasoning, content, turn.calls, written.finish)
        return Answer(self.name, True).whole([choice], [written])

    def _turns(self, asked: Chat, prompt: str, gone: Gone) -> Chunks:
        answer = Answer(self.name, True)

        def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
            return answer.chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}])

        with self._turn_of_model(gone):
            turn, written = self._begun(asked, prompt)
            yield chunk({"role": "assistant", "content": ""})
            for reasoning, content in converse(self.worker, asked, written, turn, self.limits, gone):
                if reasoning:
                    yield chunk({"reasoning_content": reasoning, "reasoning": reasoning})
                if content:
                    yield chunk({"content": content})
            if turn.calls:
                yield chunk({"tool_calls": answers.tool_calls(turn.calls, indexed=True)})
        yield chunk({}, written.finish)
        if asked.usage:
            yield answer.chunk([], [written])

    @contextmanager
    def _turn_of_model(self, gone: Gone) -> Iterator[None]:
        """Alone with the model; what it says becomes an answer. Raises ApiError or Abandoned."""
        while not self._lock.acquire(timeout=_LOOK_SECONDS):
            if gone():
                raise Abandoned
        try:
            if self.failed:
                raise ApiError(503, self.failed.message)
            yield
        except WorkerDied as error:
            self.failed = self.failed or error
            raise ApiError(503, error.message) from error
        except ExporterError as error:
            raise ApiError(500, error.message) from error
        finally:
            self._lock.release()
