"""llama.cpp against the reference, on a GGUF of the demo checkpoint that gguf-py wrote, all in float32."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import ExporterError
from exporter.model import layer
from exporter.model.reference import reference_logits
from exporter.validate import llama_cpp, metrics, runtime, text
from tests.oracle.twin import CONFIG, TOKENIZER, Twin, demo_tensors, write_gguf

torch = pytest.importorskip("torch")

WINDOWS, LENGTH = 2, 512


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    torch.set_num_threads(1)  # two test processes on two cores: more threads only wait for each other
    path = tmp_path_factory.mktemp("twin") / "twin.gguf"
    tensors = demo_tensors()
    write_gguf(path, tensors)
    sample = text.standard_library()
    tokens = text.windows(TOKENIZER, sample, WINDOWS, LENGTH).tokens
    ropes = [CONFIG.rope, llama_cpp.runtime_rope(CONFIG.rope)]
    release, rounded = reference_logits(CONFIG, lambda n, a, b: tensors[n][a:b], tokens, ropes, top_k=CONFIG.vocab_size)
    return Twin(path, tensors, sample, tokens, release, rounded)


PROGRESS: list[tuple[str, int, int]] = []


@pytest.fixture(scope="module")
def report(twin: Twin) -> dict[str, Any]:
    return runtime.prove_gguf(
        twin.path,
        tokens=twin.tokens,
        text=twin.sample,
        tokenizer_file=TOKENIZER,
        release=twin.release,
        runtime=twin.runtime,
        threads=1,
        flash_attention="off",
        kv_type="f32",
        time_limit=120,
        on_progress=lambda *done: PROGRESS.append(done),
    )


# The proof


def test_an_exact_file_equals_the_runtimes_arithmetic(report: dict[str, Any]) -> None:
    export = report["export"]
    assert export["kl_max"] < 1e-8
    assert export["top1"] == 1
    assert export["ppl_ratio"] == pytest.approx(1, abs=1e-5)
    assert export["positions"] == WINDOWS * LENGTH


def test_the_yarn_rounding_of_llama_cpp_has_its_own_line(report: dict[str, Any]) -> None:
    difference, release = report["runtime_difference"], report["release"]
    assert 3e-4 < difference["kl_mean"] < 5e-3
    assert difference["top1"] < 1
    # All of the distance from the release is the runtime's: nothing is left for the file.
    assert release["kl_mean"] == pytest.approx(difference["kl_mean"], rel=1e-3)


def test_the_report_is_json_and_measures_speed_and_memory(report: dict[str, Any], twin: Twin) -> None:
    json.dumps(report, allow_nan=False)
    assert report["tokenizer_equal"] is True
    assert report["tokenizer"]["ids"] > 5000
    speed, memory = report["speed"], report["memory"]
    assert 0 < speed["load_seconds"] < 60
    assert speed["prefill_tokens_per_second"] > 1
    assert speed["decode_tokens_per_second"] > 1
    assert speed["greedy_text"]
    assert memory["file_bytes"] == twin.path.stat().st_size
    # Every weight was read, and the comparison's logits are not in it.
    assert memory["file_bytes"] < memory["peak_rss_bytes"] < memory["file_bytes"] + (256 << 20)
    assert report["runtime"]["via"] == f"xllamacpp {llama_cpp.VERSION}"
    assert report["runtime"]["threads"] == 1
    assert list(dict.fromkeys(stage for stage, _, _ in PROGRESS)) == ["load", "speed", "compare"]
    assert PROGRESS[-1] == ("compare", WINDOWS * LENGTH, WINDOWS * LENGTH)


@pytest.fixture(scope="module")
def logits(twin: Twin) -> Any:
    """llama.cpp's logits of the twin, float32 [W * T, V], from the binding itself."""
    parts = []
    with (
        llama_cpp.Model(twin.path) as model,
        llama_cpp.Context(model, LENGTH, 200, 1, flash_attention="off", kv_type="f32") as context,
    ):
        assert model.vocab_size == CONFIG.vocab_size
        for window in twin.tokens:
            context.clear()
            parts += [context.decode(window[at : at + 200], all_logits=True).copy() for at in range(0, LENGTH, 200)]
        context.clear()
        last = context.prefill(twin.tokens[0])
        np.testing.assert_allclose(last[0], parts[2][-1], atol=1e-4)
    return np.concatenate(parts)


def test_logits_differ_by_less_than_a_thousandth(twin: Twin, logits: Any) -> None:
    dense = np.empty_like(logits)
    np.put_along_axis(dense, twin.runtime.top_ids.astype(np.int64), twin.runtime.top_logprobs, axis=1)
    apart = logits - dense
    assert np.abs(apart - apart.mean(axis=1, keepdims=True)).max() < 1e-3


def test_top_k_with_a_tail_says_the_same_of_real_text(twin: Twin) -> None:
    ropes = [CONFIG.rope, llama_cpp.runtime_rope(CONFIG.rope)]
    kept = reference_logits(CONFIG, twin.read, twin.tokens, ropes, top_k=512)
    exact = metrics.between(twin.release, twin.runtime).kl.mean()
    assert 0.97 * exact < metrics.between(*kept).kl.mean() <= exact * (1 + 1e-6)


# Faults planted in the reference, each of which must show


def renamed(twin: Twin, a: str, b: str) -> dict[str, Any]:
    def swap(name: str) -> str:
        return name.replace(a, "@").replace(b, a).replace("@", b)

    return {"read": lambda name, start, stop: twin.read(swap(name), start, stop)}


def changed(twin: Twin, part: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    return {"read": lambda name, i, j: change(twin.read(name, i, j)) if part in name else twin.read(name, i, j)}


def patched(target: Any, name: str, value: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(target, name, value)
    return {}


def config(**values: Any) -> dict[str, Any]:
    return {"config": dataclasses.replace(CONFIG, **values)}


FAULTS: dict[str, Callable[[Twin, pytest.MonkeyPatch], dict[str, Any]]] = {
    "window one longer": lambda t, m: config(sliding_window=129),
    "window one shorter": lambda t, m: config(sliding_window=127),
    "every layer full": lambda t, m: config(layer_types=("full_attention",) * 4),
    "layers swapped": lambda t, m: config(layer_types=CONFIG.layer_types[::-1]),
    "sinks dropped": lambda t, m: changed(t, "sinks", lambda x: np.full_like(x, -1e9)),
    "gate and up swapped": lambda t, m: renamed(t, "experts.gate_proj", "experts.up_proj"),
    "YaRN not rounded": lambda t, m: {"rope": CONFIG.rope},
    "YaRN left out": lambda t, m: {"rope": dataclasses.replace(CONFIG.rope, kind="default")},
    "attention factor left out": lambda t, m: patched(layer, "attention_factor", lambda r: 1.0, m),
    "theta of another model": lambda t, m: {
        "rope": dataclasses.replace(llama_cpp.runtime_rope(CONFIG.rope), theta=1e4)
    },
    "alpha wrong": lambda t, m: config(swiglu_alpha=1.0),
    "limit wrong": lambda t, m: config(swiglu_limit=1.0),
    "one expert fewer": lambda t, m: config(num_experts_per_tok=3),
    "one expert tensor one scale off": lambda t, m: changed(
        t, "layers.1.mlp.experts.down_proj.weight", lambda x: x * np.float32(2)
    ),
    "expert bias dropped": lambda t, m: changed(t, "experts.down_proj.bias", np.zeros_like),
    "router bias dropped": lambda t, m: changed(t, "router.bias", np.zeros_like),
    "epsilon wrong": lambda t, m: config(rms_norm_eps=1e-3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_reference_shows(fault: str, twin: Twin, logits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"config": CONFIG, "read": twin.read, "rope": llama_cpp.runtime_rope(CONFIG.rope)}
    given |= FAULTS[fault](twin, monkeypatch)
    (wrong,) = reference_logits(given["config"], given["read"], twin.tokens[:1], [given["rope"]], top_k=256)
    kl = metrics.compare(wrong, 0, logits[:LENGTH]).kl.mean()
    assert kl > 1e-4  # the floor is 1e-11


# The runtime and its failures


def test_another_pre_tokenizer_is_noticed(twin: Twin, tmp_path: Path) -> None:
    path = tmp_path / "wrong.gguf"
    data = twin.path.read_bytes()
    key = b"tokenizer.ggml.pre"
    at = data.index(key) + len(key) + 4 + 8  # past the type and the length of the string
    assert data[at : at + 6] == b"gpt-4o"
    path.write_bytes(data[:at] + b"viking" + data[at + 6 :])
    tokenizer = text.load_tokenizer(TOKENIZER)
    pieces = text.pieces(tokenizer, twin.sample)
    expected = [text.encode(tokenizer, piece) for piece in pieces]
    with llama_cpp.Model(path) as model:
        found = [model.tokenize(piece) for piece in pieces]
    first = runtime.compare_ids(pieces, expected, found)["first_difference"]
    assert first is not None
    assert first["expected"] != first["found"]


def test_text_of_tokens(twin: Twin) -> None:
    with llama_cpp.Model(twin.path) as model:
        assert model.text(model.tokenize("a  b\n<|end|>é")) == "a  b\n<|end|>é"


def test_bytes_of_a_split_file_are_those_of_all_its_parts(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        (tmp_path / f"a-of-[b]-0000{i}-of-00003.gguf").write_bytes(b"x" * 10**i)
    (tmp_path / "a-of-[b]-00001-of-00002.gguf").write_bytes(b"other")
    assert runtime._file_bytes(tmp_path / "a-of-[b]-00001-of-00003.gguf") == 1110
    (tmp_path / "one.gguf").write_bytes(b"xy")
    assert runtime._file_bytes(tmp_path / "one.gguf") == 2


def test_not_a_gguf(twin: Twin, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"this is not a model" * 100)
    with pytest.raises(ExporterError, match=r"cannot load .*x\.gguf: .*magic"):
        runtime.run_worker(twin.request(tmp_path, path), 60)


def test_a_truncated_gguf(twin: Twin, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    whole = twin.path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExporterError, match=r"cannot load .*: .*corrupted or incomplete"):
        runtime.run_worker(twin.request(tmp_path, path), 60)
    path.write_bytes(whole[:5000])
    with pytest.raises(ExporterError, match="cannot load"):
        runtime.run_worker(twin.request(tmp_path, path), 60)


def test_a_missing_gguf(twin: Twin, tmp_path: Path) -> None:
    with pytest.raises(ExporterError, match=r"x\.gguf is missing"):
        runtime.prove_gguf(
            tmp_path / "x.gguf",
            tokens=twin.tokens,
            text=twin.sample,
            tokenizer_file=TOKENIZER,
            release=twin.release,
            runtime=twin.runtime,
            threads=1,
        )


def script(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_killed_child(twin: Twin, tmp_path: Path) -> None:
    command = script(
        "import os, sys; sys.stderr.write('ggml: last words'); sys.stderr.flush(); os.kill(os.getpid(), 9)"
    )
    with pytest.raises(ExporterError, match=r"was killed by SIGKILL while running twin\.gguf: ggml: last words"):
        runtime.run_worker(twin.request(tmp_path, twin.path), 60, command)
    with pytest.raises(ExporterError, match="was killed by SIGABRT"):
        runtime.run_worker(twin.request(tmp_path, twin.path), 60, script("import os; os.abort()"))


def test_a_child_that_answers_nothing(twin: Twin, tmp_path: Path) -> None:
    with pytest.raises(ExporterError, match="exited with 0"):
        runtime.run_worker(twin.request(tmp_path, twin.path), 60, script("print('chatter')"))
    with pytest.raises(ExporterError, match=r"exited with 1 while running twin\.gguf: ZeroDivisionError"):
        runtime.run_worker(twin.request(tmp_path, twin.path), 60, script("1/0"))


def children() -> int:
    import psutil

    return len(psutil.Process().children())


def test_a_child_beyond_its_time(twin: Twin, tmp_path: Path) -> None:
    before = children()
    with pytest.raises(ExporterError, match=r"did not finish in llama.cpp within 0\.05 s"):
        runtime.run_worker(twin.request(tmp_path, twin.path), 0.05)
    assert children() == before


def test_ctrl_c_leaves_no_child(twin: Twin, tmp_path: Path) -> None:
    before = children()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runtime.run_worker(twin.request(tmp_path, twin.path), 60, script("import time; time.sleep(60)"))
    assert time.monotonic() - started < 30
    assert children() == before


def test_a_file_of_another_vocabulary(twin: Twin, tmp_path: Path) -> None:
    tokens = np.full((1, 8), CONFIG.vocab_size + 5)
    reference = dataclasses.replace(
        twin.release,
        tokens=tokens,
        top_ids=twin.release.top_ids[:8],
        top_logprobs=twin.release.top_logprobs[:8],
        tail_logprob=twin.release.tail_logprob[:8],
        target_logprob=twin.release.target_logprob[:8],
    )
    reference.save(tmp_path / "r.npz")
    request = dataclasses.replace(twin.request(tmp_path, twin.path), references={"release": str(tmp_path / "r.npz")})
    with pytest.raises(ExporterError, match="has token 2053, the file a vocabulary of 2048"):
        runtime.run_worker(request, 60)


def test_another_version_of_the_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "2027.1.1")
    with pytest.raises(ExporterError, match=r"xllamacpp 2027\.1\.1 is installed") as error:
        llama_cpp.load_library()
    assert error.value.hint == f"pip install xllamacpp=={llama_cpp.VERSION}"


def test_another_struct_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a field had been added in front of the others: the defaults land in wrong places."""
    fields = llama_cpp.ContextParams._fields_
    shifted = type("Shifted", (ctypes.Structure,), {"_fields_": (("new", fields[0][1]), *fields)})
    monkeypatch.setitem(llama_cpp._SIGNATURES, "llama_context_default_params", (shifted, []))
    with pytest.raises(ExporterError, match="has other structs than expected"):
        llama_cpp.load_library()


def test_a_wrong_default_is_named() -> None:
    params = llama_cpp.load_library().llama_model_default_params()
    assert llama_cpp.wrong_defaults(params, llama_cpp.MODEL_DEFAULTS) == []
    params.split_mode = 7
    assert llama_cpp.wrong_defaults(params, llama_cpp.MODEL_DEFAULTS) == ["split_mode 7, not 1"]
