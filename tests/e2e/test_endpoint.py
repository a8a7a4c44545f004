"""exporter serve: what a client gets equals what the runtime says, and no client, good or bad, can hang it."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.pipeline.serve import Ask, endpoint
from exporter.validate.endpoint.server import BODY, Server
from exporter.validate.llama_cpp import Context, Model
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_session import Decoding, Graph
from tests.served import log_softmax, make

PROMPT = "def add(a, b):\n    return"
CONTEXT = 256


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("endpoint")
    return make(base, ("onnx", "exact-q8", "cpu"), ("gguf", "mxfp4-q8", ""))


@contextmanager
def serving(artifact: Path, context: int = CONTEXT) -> Iterator[Server]:
    """An endpoint that answers in a thread."""
    with endpoint(Ask(artifact, context=context, threads=1)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(made: dict[str, Path]) -> Iterator[Server]:
    with serving(made["gguf"]) as found:
        yield found


def ask(server: Server, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """(status, answer); `body` makes it a POST."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    url = server.url.removesuffix("/v1") + path
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def completion(server: Server, prompt: Any = PROMPT, **settings: Any) -> dict[str, Any]:
    status, answer = ask(server, "/v1/completions", {"prompt": prompt, "temperature": 0, **settings})
    assert status == 200, answer
    return dict(answer)


def text_of(server: Server, **settings: Any) -> str:
    return str(completion(server, **settings)["choices"][0]["text"])


def chat(server: Server, *contents: str, **settings: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content} for content in contents]
    status, answer = ask(server, "/v1/chat/completions", {"messages": messages, "temperature": 0, **settings})
    assert status == 200, answer
    return dict(answer)


def events(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    """The chunks of a streamed answer."""
    asked = urllib.request.Request(
        server.url.removesuffix("/v1") + path,
        json.dumps({**body, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        lines = answer.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


# Against the runtime itself


@pytest.fixture(scope="module")
def direct(made: dict[str, Path]) -> tuple[list[int], np.ndarray[Any, Any], list[int]]:
    """llama.cpp by itself: the prompt's tokens, their log-probabilities [n, V], and eight greedy tokens after it."""
    (path,) = made["gguf"].glob("*.gguf")
    with Model(path) as model, Context(model, 128, 64, 1) as context:
        tokens = model.tokenize(PROMPT)
        log_p = log_softmax(context.decode(tokens, all_logits=True))
        greedy = [int(log_p[-1].argmax())]
        while len(greedy) < 8:
            greedy.append(int(context.decode(greedy[-1:], all_logits=False)[0].argmax()))
    return tokens, log_p, greedy


def test_log_probabilities_are_the_runtimes(server: Server, direct: Any) -> None:
    tokens, log_p, greedy = direct
    choice = completion(server, max_tokens=8, logprobs=3, echo=True)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"].startswith(PROMPT)
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    expected = [log_p[i, t] for i, t in enumerate(tokens[1:])]
    assert found["token_logprobs"][1 : len(tokens)] == pytest.approx(expected, abs=1e-3)
    for i, best in enumerate(found["top_logprobs"][1 : len(tokens)]):
        assert sorted(best.values(), reverse=True)[:3] == pytest.approx(np.sort(log_p[i])[::-1][:3], abs=1e-3)
    words = server.service.worker.vocabulary
    assert found["tokens"][len(tokens) :] == [words.name(t) for t in greedy]
    assert [len(best) for best in found["top_logprobs"][len(tokens) :]] == [3] * 8


def test_a_prompt_may_be_text_or_tokens_or_several(server: Server, direct: Any) -> None:
    tokens = direct[0]
    alone = text_of(server, max_tokens=5)
    both = completion(server, [PROMPT, "import"], max_tokens=5)
    assert [c["text"] for c in both["choices"]] == [alone, text_of(server, prompt="import", max_tokens=5)]
    assert [c["index"] for c in both["choices"]] == [0, 1]
    assert text_of(server, prompt=tokens, max_tokens=5) == alone
    used = completion(server, [tokens, tokens], max_tokens=5)["usage"]
    assert used == {"prompt_tokens": 2 * len(tokens), "completion_tokens": 10, "total_tokens": 2 * len(tokens) + 10}


def test_onnx_says_what_onnx_runtime_says(made: dict[str, Path]) -> None:
    with serving(made["onnx"]) as server:
        tokens = server.service.worker.encode(PROMPT)
        found = completion(server, max_tokens=1, logprobs=1, echo=True)["choices"][0]["logprobs"]
        assert chat(server, "Hello", max_tokens=3)["choices"][0]["message"]["content"]
        again = completion(server, max_tokens=1, logprobs=1, echo=True)["choices"][0]["logprobs"]
    assert again == found
    graph = Graph(made["onnx"] / "model.onnx", threads=1, provider=CPU)
    log_p = log_softmax(Decoding(graph).append(tokens))
    expected = [log_p[i, t] for i, t in enumerate(tokens[1:])]
    assert found["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-3)


def test_a_folder_is_served_by_our_own_forward(made: dict[str, Path], server: Server) -> None:
    """The same model as the GGUF, whose other weights are in 8 bits: near, and not the same."""
    long = "".join(f"def f{i}(a, b):\n    return a + {i} * b\n" for i in range(12))  # beyond the window of 128
    there = completion(server, long, max_tokens=1, logprobs=1, echo=True)["choices"]
    with serving(made["folder"]) as own:
        here = completion(own, long, max_tokens=1, logprobs=1, echo=True)["choices"]
    found, expected = (np.array(c[0]["logprobs"]["token_logprobs"][1:-1]) for c in (here, there))
    assert len(found) > 160
    assert 0 < np.abs(found - expected).mean() < 0.05


# Drawing and stopping


def test_a_seed_gives_the_same_text_again(server: Server) -> None:
    texts = [text_of(server, temperature=1, seed=seed, max_tokens=12) for seed in (1, 1, 2, None, None)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4
    assert text_of(server, temperature=1, top_p=0, max_tokens=12) == text_of(server, max_tokens=12)


def test_a_stop_text_ends_the_text_and_is_not_in_it(server: Server) -> None:
    whole = text_of(server, max_tokens=24)
    stop = whole[10:14]
    choice = completion(server, max_tokens=24, stop=[stop, "never"])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    streamed = events(server, "/v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 24, "stop": stop})
    assert "".join(c["choices"][0]["text"] for c in streamed) == choice["text"]
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_context_is_the_end_of_the_text(server: Server) -> None:
    choice = completion(server, "x = 1\n" * 50, max_tokens=5000)
    assert choice["usage"]["total_tokens"] == CONTEXT
    assert choice["choices"][0]["finish_reason"] in ("length", "stop")
    status, answer = ask(server, "/v1/completions", {"prompt": "x = 1\n" * 200})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


# Chats


def test_a_chat_is_the_completion_of_its_template(server: Server) -> None:
    prompt = "<|start|>user<|message|>Hello<|end|><|start|>assistant<|channel|>final<|message|>"
    found = chat(server, "Hello", max_tokens=12)
    choice = found["choices"][0]
    assert choice["message"]["content"] == text_of(server, prompt=prompt, max_tokens=12)
    assert (choice["message"]["role"], choice["finish_reason"]) == ("assistant", "length")
    assert found["usage"]["completion_tokens"] == 12
    system = "<|start|>system<|message|>Reasoning: low<|end|>"
    low = chat(server, "Hello", max_tokens=12, reasoning_effort="low")
    assert low["choices"][0]["message"]["content"] == text_of(server, prompt=system + prompt, max_tokens=12)
    assert low["usage"]["prompt_tokens"] == len(server.service.worker.encode(system + prompt))


def test_a_streamed_chat_says_the_same(server: Server) -> None:
    whole = chat(server, "Hello", max_tokens=12)
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12}
    chunks = events(server, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["usage"] == whole["usage"]
    deltas = [c["choices"][0]["delta"] for c in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == whole["choices"][0]["message"]["content"]
    assert len(deltas) > 8
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_what_the_template_does_not_take_is_a_bad_request(server: Server) -> None:
    body = {"messages": [{"role": "note", "content": "x"}]}
    for stream in (False, True):
        status, answer = ask(server, "/v1/chat/completions", {**body, "stream": stream})
        assert (status, answer["error"]["param"]) == (400, "messages")
        assert "no notes" in answer["error"]["message"]


def test_tokens_of_texts_and_back(server: Server) -> None:
    status, answer = ask(server, "/tokenize", {"prompt": "a <|end|>\u20ac", "add_special_tokens": False})
    assert (status, answer["tokens"]) == (200, server.service.worker.encode("a <|end|>\u20ac"))
    assert ask(server, "/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": "a <|end|>\u20ac"})
    assert ask(server, "/tokenizer_info")[1]["eos_token"] == "<|return|>"


# Bad clients


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", b"", 400),
        ("/v1/completions", b"[" * 100_000, 400),
        ("/v1/completions", b"[]", 400),
        ("/v1/completions", b"\xff\xfe", 400),
        ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400),
        ("/v1/completions", {"prompt": [5000]}, 400),
        ("/v1/completions", {"prompt": [-1]}, 400),
        ("/v1/completions", {"prompt": ""}, 400),
        ("/v1/completions", {"prompt": "\ud800"}, 400),
        ("/v1/completions", {"prompt": "x", "stream": True, "logprobs": 1}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100_000}]}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user"}], "reasoning_effort": {}}, 400),
        ("/v1/completions", {"prompt": "x " * 100_000}, 400),
        ("/v1/completions", {"prompt": "x" * 16_385}, 400),
        ("/v1/completions", {"prompt": ("x" * 16_384 + " ") * 8}, 400),
        ("/v1/completions", {"prompt": " " * 1_000_000}, 400),
        ("/tokenize", {"prompt": "\u3042" * 1_000_000}, 400),
        ("/v1/embeddings", {}, 404),
        ("/v1/models", {}, 405),
        ("/tokenize", {"prompt": 5}, 400),
        ("/detokenize", {"tokens": [1e9]}, 400),
        ("/v1/completions", None, 405),
        ("/../etc/passwd", None, 404),
    ],
    ids=lambda each: str(each)[:40],
)
def test_a_bad_request_gets_an_error_object(server: Server, path: str, body: Any, status: int) -> None:
    found, answer = ask(server, path, body)
    assert (found, set(answer)) == (status, {"error"})
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in answer["error"]["message"]


def raw(server: Server, data: bytes) -> bytes:
    """All that comes back until the server closes or answers."""
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(data)
        return connection.recv(1 << 16)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"\r\n", b"411"),
        (HEAD + b"Content-Length: -1\r\n\r\n", b"411"),
        (HEAD + b"Content-Length: %d\r\n\r\n" % (BODY + 1), b"413"),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", b"413"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (HEAD.replace(b"127.0.0.1", b"evil.example") + b"Content-Length: 2\r\n\r\n{}", b"403"),
        (HEAD.replace(b"application/json", b"text/plain") + b"Content-Length: 2\r\n\r\n{}", b"415"),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost:80\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"DELETE /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"501"),
    ],
)
def test_bad_bytes_get_an_answer(server: Server, data: bytes, status: bytes) -> None:
    answer = raw(server, data)
    assert status in answer.split(b"\r\n")[0] or (status == b"400" and b'"error"' in answer)
    assert b"Traceback" not in answer
    assert ask(server, "/health") == (200, {"status": "ok"})


def test_a_client_that_stops_in_the_middle_keeps_nobody_waiting(server: Server) -> None:
    with socket.create_connection(server.server_address[:2]) as slow:
        slow.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert text_of(server, max_tokens=1)


def test_a_client_that_goes_frees_the_model(made: dict[str, Path]) -> None:
    """Ten times 8,000 tokens would take a minute."""
    with serving(made["gguf"], 8192) as server:
        started = time.monotonic()
        for stream in (False, True) * 5:
            asked = {"prompt": "x", "max_tokens": 8000, "temperature": 0, "stream": stream}
            data = json.dumps(asked).encode()
            with socket.create_connection(server.server_address[:2]) as connection:
                connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
                time.sleep(0.05)
        assert text_of(server, max_tokens=1)
        seconds = time.monotonic() - started
    assert seconds < 15


def test_requests_at_once_are_answered_one_by_one(server: Server) -> None:
    prompts = [f"def f{i}(x):\n" for i in range(12)]
    alone = [text_of(server, prompt=p, max_tokens=6) for p in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: text_of(server, prompt=p, max_tokens=6), prompts))
    assert together == alone
