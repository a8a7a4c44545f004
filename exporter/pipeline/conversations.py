"""Conversations to measure on, as the model itself holds them, and how it goes on by itself after their openings.

Where the model is small, or a GPU holds it whole, it writes them: every window is a conversation with a question of a
list, an analysis, and an answer or a call of a tool, each ended where the model ends it or after its share of the
window. Else they are made of the standard library's sources. Nothing here is in calibration's text: other questions,
another seed, files of the other part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.model import parameter_count
from exporter.model.reference import I64
from exporter.model.weights import Weights, holds
from exporter.pipeline.calibration import written
from exporter.pipeline.calibration.chat import render
from exporter.pipeline.calibration.rows import Row
from exporter.pipeline.progress import Progress
from exporter.validate import harmony
from exporter.validate import text as texts

_SMALL = 2 * 10**9  # parameters that a CPU computes token by token: 20b takes minutes for each
_SEED = 1
_WINDOW = 256  # tokens of a written conversation
_SHARE = 0.4  # of what is left of a window after the question: the analysis, at most
_ARGUMENTS = 32  # tokens of a call, at most
_TOOL_CALL = 4  # one conversation in so many ends with a call
_GREEDY, _GREEDY_ON_GPU = 32, 256  # tokens after each question, by the likeliest choice

QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "A shop sells pens at 3 for 2 euros. What do 21 pens cost? Explain each step.",
    "What is a hash table, and when is it the wrong choice?",
    "Search the documentation for the module that reads zip files.",
    "Erkl\u00e4re kurz, warum der Himmel blau ist.",
    "Turn this into a sentence of at most ten words: the committee has, after long deliberation, decided to postpone.",
    "Which of these is prime: 91, 97, 119, 143?",
    "Look up how a file is opened for appending.",
    "Document this function: def clamp(x, low, high): return max(low, min(x, high))",
    "Why do leaves change colour in autumn?",
    "Translate into Spanish: Where is the nearest station?",
    "Find the page that explains regular expressions.",
    "Given a list of words, group those that are anagrams of each other. Use Python.",
    "What is the derivative of x^3 * ln(x)?",
    "Give two reasons for and two against remote work.",
    "Look up the arguments of the function sorted.",
)
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the documentation.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string", "description": "What to look for."}},
                "required": ["query"],
            },
        },
    }
]


@dataclass(frozen=True, eq=False)
class Conversations:
    """windows: tokens int64 [W, T]. parts: harmony.labels of them, flat, "" for what the assistant did not write."""

    windows: texts.Windows
    parts: list[str]


@dataclass(frozen=True, eq=False)
class Greedy:
    """How the model goes on by its likeliest tokens: `answers` after `prompts`, up to and with what ends a turn."""

    prompts: list[list[int]]
    answers: list[list[int]]
    ends: frozenset[int]
    tokens: int


@dataclass(frozen=True)
class Author:
    """The model as it writes. scratch: where what it wrote is kept; weights: its own, for every pass over them."""

    checkpoint: Checkpoint
    scratch: Path
    device: str
    progress: Progress
    weights: Weights | None = None

    def can_write(self) -> bool:
        """Whether the model can be asked to write here."""
        parameters = parameter_count(self.checkpoint.config)
        # A GPU that does not hold the weights decodes half of 20b's experts anew for every token: an hour of it.
        return parameters <= _SMALL or holds(self.device, parameters)

    def tokenizer(self) -> Any:
        assert self.checkpoint.tokenizer_file is not None
        return texts.load_tokenizer(self.checkpoint.tokenizer_file)

    def write(self, script: written.Scripted, count: int, length: int, sampling: written.Sampling, stage: str) -> I64:
        """Tokens int64 [count, length]."""
        return written.written(
            self.checkpoint,
            script,
            count,
            length,
            sampling,
            self.scratch,
            self.device,
            self.progress,
            weights=self.weights,
            stage=stage,
        )


def conversations(author: Author, count: int, length: int) -> Conversations:
    """`count` windows: of `_WINDOW` tokens that the model writes, else of `length`.

    Raises ExporterError where the tokenizer does not know the harmony format.
    """
    tokenizer = author.tokenizer()
    special = harmony.Special.of(tokenizer)
    if author.can_write() and special.channel >= 0:
        script = _Script(tokenizer, special, _openings(author.checkpoint, tokenizer, count), _WINDOW)
        tokens = author.write(script, count, _WINDOW, written.Sampling(seed=_SEED), "the model writes conversations")
        digest = hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest()
        windows = texts.Windows(tokens, digest, f"conversations written by the model itself (seed {_SEED})")
    else:
        assert author.checkpoint.tokenizer_file is not None
        windows = texts.windows(author.checkpoint.tokenizer_file, _documented(), count, length)
    return labelled(windows, tokenizer)


def labelled(windows: texts.Windows, tokenizer: Any) -> Conversations:
    """The windows with the part of the conversation that each token is."""
    return Conversations(windows, harmony.labels(windows.tokens.reshape(-1).tolist(), tokenizer))


def greedy(author: Author, count: int) -> Greedy:
    """What the reference goes on with after each of `count` questions; on a GPU far enough for short answers to end."""
    most = _GREEDY_ON_GPU if author.device.startswith("cuda") else _GREEDY
    tokenizer = author.tokenizer()
    ends = harmony.Special.of(tokenizer).stops
    prompts = _openings(author.checkpoint, tokenizer, count)
    length = max(map(len, prompts)) + most
    tokens = author.write(Questions(prompts), count, length, written.Sampling(temperature=0.0), "the model answers")
    return Greedy(prompts, answers_in(tokens, prompts, most, ends), ends, most)


def answers_in(tokens: I64, prompts: Sequence[list[int]], most: int, ends: frozenset[int]) -> list[list[int]]:
    """What follows each prompt in its row of tokens [W, T]: at most `most`, up to and with what ends a turn."""
    rows = zip(prompts, tokens, strict=True)
    return [until(row[len(prompt) : len(prompt) + most].tolist(), ends) for prompt, row in rows]


def until(answer: Sequence[int], ends: frozenset[int]) -> list[int]:
    """The tokens up to and with the first that ends a turn."""
    stop = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
    return list(answer[:stop])


def _openings(checkpoint: Checkpoint, tokenizer: Any, count: int) -> list[list[int]]:
    """Tokens of `count` conversations up to where the assistant speaks, by the checkpoint's template if it has one."""
    rows = []
    for i in range(count):
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}]}
        if _calls(i):
            chat["tools"] = _TOOLS
        rows.append(Row(f"question {i + 1}", chat=chat))
    if checkpoint.chat_template is None:
        rendered = [f"<|start|>user<|message|>{QUESTIONS[i % len(QUESTIONS)]}<|end|>" for i in range(count)]
    else:
        rendered = render(checkpoint, rows)
    return [texts.encode(tokenizer, f"{each}<|start|>assistant") for each in rendered]


def _calls(window: int) -> bool:
    return window % _TOOL_CALL == _TOOL_CALL - 1


class Questions:
    """Each window begins with a prompt; then the model chooses."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self._prompts = prompts
        self.key = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()

    def __call__(self, tokens: I64) -> I64:
        at = tokens.shape[1]
        return np.array([prompt[at] if at < len(prompt) else -1 for prompt in self._prompts], np.int64)


class _Script:
    """Says which token must come next in each window; see model/generate.Script.

    It follows the tokens so far and nothing else, so that a resumed run sees what the first one saw. After an answer
    the same window goes on with the next question.
    """

    def __init__(self, tokenizer: Any, special: harmony.Special, prompts: list[list[int]], length: int) -> None:
        def spelled(text: str) -> list[int]:
            return texts.encode(tokenizer, text)

        self._special, self._prompts, self._length = special, prompts, length
        self._analysis = spelled("<|channel|>analysis<|message|>")
        turn = [special.end, *spelled("<|start|>assistant")]
        final, call = "<|channel|>final<|message|>", " to=functions.search<|channel|>commentary json<|message|>"
        self._turns = {False: turn + spelled(final), True: turn + spelled(call)}
        self.key = hashlib.sha256(
            json.dumps([prompts, self._analysis, self._turns[False], self._turns[True], length]).encode()
        ).hexdigest()
        self._seen = 0
        self._stage = ["analysis"] * len(prompts)
        self._asked = list(range(len(prompts)))  # the number of each window's question
        self._due = [[*prompt, *self._analysis] for prompt in prompts]
        self._left = [self._share(len(due)) for due in self._due]

    def _share(self, taken: int) -> int:
        return max(1, int(_SHARE * (self._length - taken)))

    def __call__(self, tokens: I64) -> I64:
        for at in range(self._seen, tokens.shape[1]):
            for window, token in enumerate(tokens[:, at].tolist()):
                self._follow(window, token, at + 1)
        self._seen = tokens.shape[1]
        return np.array([due[0] if due else -1 for due in self._due], np.int64)

    def _follow(self, window: int, token: int, taken: int) -> None:
        due = self._due[window]
        if due:
            due.pop(0)
            return
        special = self._special
        self._left[window] -= 1
        ended = token in special.stops or token == special.end
        if not ended and self._left[window] > 0:
            return
        if self._stage[window] == "analysis":
            calls = _calls(window)
            self._stage[window] = "call" if calls else "final"
            self._due[window] = self._turns[calls][ended and token == special.end :]
            self._left[window] = _ARGUMENTS if calls else self._length
        else:
            closing = [] if ended else [special.call if self._stage[window] == "call" else special.return_]
            self._asked[window] += 1
            self._stage[window] = "analysis"
            prompt = self._prompts[self._asked[window] % len(self._prompts)]
            self._due[window] = [*closing, *prompt, *self._analysis]
            self._left[window] = self._share(taken + len(self._due[window]))


def _documented() -> texts.Text:
    """Conversations about held-out files of the standard library: a question, and the file's text as the answer."""
    held_out = texts.standard_library()
    documents = []
    for document in held_out.documents:
        first = document.lstrip("\"'#! \n").splitlines()[0][:120] if document.strip() else ""
        thought = "The user wants the source of a module. I write it out in full, with its documentation."
        documents.append(
            f"<|start|>user<|message|>Write a Python module. It begins with: {first}<|end|>"
            f"<|start|>assistant<|channel|>analysis<|message|>{thought}<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>{document}<|return|>"
        )
    return texts.Text(tuple(documents), f"conversations about the {held_out.source}")
