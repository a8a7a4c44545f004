"""Damaged and hostile artifacts, opened in a process with 500 MB and seconds: read, or refused in one clear line.

A byte that is not what it was may make another file that is just as good; what it must never make is a crash, a hang,
a gigabyte, or a traceback.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")
if not Path("/proc/self/status").exists():
    pytest.skip("limits of memory as Linux has them", allow_module_level=True)

from tests import variants
from tests.foreign_files import gguf_demo, gptq_demo, released_like
from tests.hostile_child import MORE

SECONDS = 20
SOME = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


class Child:
    """tests/hostile_child.py, begun anew after it died."""

    def __init__(self):
        self.process = None

    def ask(self, path, whole=False, seconds=SECONDS):
        """What came of it: {"end": ...}; "died" and "hung" are ends too."""
        if self.process is None:
            self._begin()
        return self._say({"path": str(path), "whole": whole}, seconds)

    def _begin(self):
        command = [sys.executable, "-P", "-W", "error", "-m", "tests.hostile_child"]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=env | {"OPENBLAS_NUM_THREADS": "1"}
        )
        self.lines = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process.stdout, self.lines), daemon=True).start()
        assert self._wait(60)["end"] == "ready"

    @staticmethod
    def _listen(stdout, lines):
        for line in stdout:
            lines.put(line)
        lines.put(None)

    def _say(self, asked, seconds):
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._wait(seconds)

    def _wait(self, seconds):
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            return {"end": "hung"}
        if line is None:
            code = self.process.wait()
            self.close()
            return {"end": "died", "message": str(code)}
        return json.loads(line)

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


@pytest.fixture(scope="module")
def child():
    one = Child()
    yield one
    one.close()


def is_clear(found) -> bool:
    """Read; or an error of ours, on one line that can be printed, with what cures it."""
    if found["end"] == "read":
        return True
    ours = found["end"] in ("ExporterError", "UsageError", "Refused", "BadCheckpoint")
    return ours and found["message"].isprintable() and len(found["message"]) < 1500 and bool(found["hint"])


class Spoiled:
    """A file changed in place, and put back as it was."""

    def __init__(self, path):
        self.path = path
        self.whole = path.read_bytes()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.path.write_bytes(self.whole)

    def flip(self, at, change):
        with self.path.open("r+b") as f:
            f.seek(at)
            f.write(bytes([self.whole[at] ^ change]))


KINDS = ("gguf", "gptq", "released")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """kind -> (what is opened, the file that is spoiled, how many bytes of it are tables)."""
    root = tmp_path_factory.mktemp("hostile")
    types = {"model.embed_tokens.weight": "Q4_0", "lm_head.weight": "Q5_1"}
    gguf_demo(
        root / "m.gguf", lambda n: "Q8_0" if "self_attn" in n and "_proj.w" in n else types.get(n) or released_like(n)
    )
    gptq_demo(root / "gptq", symmetric=False, act_order=True)
    variants.single_file(root / "released")
    made = {"gguf": (root / "m.gguf", root / "m.gguf")}
    made |= {kind: (root / kind, root / kind / "model.safetensors") for kind in KINDS[1:]}
    return {kind: (path, file, tables_of(file)) for kind, (path, file) in made.items()}


def tables_of(file):
    raw = file.read_bytes()
    if file.suffix == ".gguf":
        from exporter.formats.gguf.foreign_tables import read_tables

        return min(t.offset for t in read_tables(file).tensors.values())
    return 8 + int.from_bytes(raw[:8], "little")


@pytest.mark.parametrize("kind", KINDS)
def test_sound_to_begin_with(kind, artifacts, child):
    found = child.ask(artifacts[kind][0], whole=True)
    assert found == {"end": "read", "problems": ""}


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_anywhere(kind, artifacts, child):
    path, file, tables = artifacts[kind]
    size = file.stat().st_size

    @SOME
    @given(st.one_of(st.integers(0, tables), st.integers(0, size - 1)))
    def check(at):
        with Spoiled(file):
            os.truncate(file, at)
            found = child.ask(path)
        assert is_clear(found), found
        assert found["end"] != "read" or size - at < 32  # the padding after the last tensor

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_byte_of_the_tables_changed(kind, artifacts, child):
    path, file, tables = artifacts[kind]

    @SOME
    @given(st.integers(0, tables - 1), st.integers(1, 255))
    def check(at, change):
        with Spoiled(file) as spoiled:
            spoiled.flip(at, change)
            found = child.ask(path, whole=True)
        assert is_clear(found), found

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_byte_of_the_weights_changed(kind, artifacts, child):
    path, file, tables = artifacts[kind]

    @settings(SOME, max_examples=12)
    @given(st.integers(tables, file.stat().st_size - 1), st.integers(1, 255))
    def check(at, change):
        with Spoiled(file) as spoiled:
            spoiled.flip(at, change)
            found = child.ask(path, whole=True)
        assert is_clear(found), found
        if kind == "released":  # every byte of it counts
            assert found["end"] == "read"
            assert found["problems"]

    check()


WORDS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 3, 2**31, 2**63, 10**30, 400_000_000, 1e308, -0.5, "", "x", "\x1b[2J", "../..", [], {}]),
    st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)


@pytest.mark.parametrize("kind", ["gptq", "released"])
def test_any_value_of_the_configuration(kind, artifacts, child):
    path = artifacts[kind][0]
    config = json.loads((path / "config.json").read_text())
    inner = ("rope_scaling", "quantization_config")
    places = [(k,) for k in config] + [(k, i) for k in inner for i in config[k]]
    added = ("checkpoint_format", "meta", "exporter", "dynamic", "rope_parameters", "transform_config", "pack_dtype")
    places += [("quantization_config", name) for name in added] + [("rope_parameters",), ("auto_map",)]

    @SOME
    @given(st.sampled_from(places), WORDS)
    def check(place, value):
        changed = json.loads(json.dumps(config))
        there = changed
        for key in place[:-1]:
            there = there[key]
        there[place[-1]] = value
        with Spoiled(path / "config.json"):
            (path / "config.json").write_text(json.dumps(changed))
            found = child.ask(path)
        assert is_clear(found), found

    check()


CONFIGS = {
    "4e8 layers": lambda c: {**c, "num_hidden_layers": 400_000_000},
    "1e9 experts": lambda c: {**c, "num_local_experts": 1_000_000_000},
    "1,024 layers": lambda c: {**c, "num_hidden_layers": 1024, "layer_types": None},
    "all at their caps": lambda c: {
        **c,
        "num_hidden_layers": 1024,
        "num_local_experts": 4096,
        "hidden_size": 1 << 17,
        "layer_types": None,
    },
    "not an object": lambda c: [c],
    "no quantization": lambda c: {k: v for k, v in c.items() if k != "quantization_config"},
}


@pytest.mark.parametrize("kind", ["gptq", "released"])
@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_ask_for_too_much(case, kind, artifacts, child):
    path = artifacts[kind][0]
    with Spoiled(path / "config.json") as spoiled:
        (path / "config.json").write_text(json.dumps(CONFIGS[case](json.loads(spoiled.whole))))
        found = child.ask(path)
    assert is_clear(found), found
    assert (found["end"] == "read") == (case == "no quantization")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_files_of_gigabytes_that_cost_nothing(name, artifacts, child):
    """Sparse: 8 GB on the disk of an attacker are none."""
    path = artifacts["gptq"][0]
    if name in ("generation_config.json", "tokenizer_config.json"):
        path = artifacts["released"][0]
    with Spoiled(path / name):
        os.truncate(path / name, 8 << 30)
        found = child.ask(path)
        os.truncate(path / name, 0)
    assert is_clear(found), found
    assert found["end"] == "BadCheckpoint"
    assert "above the" in found["message"]


EMPTY = b"[" + b"[]," * 3_900_000 + b"[]]"  # 12 MB, and 280 MB when it has been read


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", variants.INDEX, "quantize_config.json"])
def test_json_that_swells(name, artifacts, child):
    path = artifacts["gptq" if name == "quantize_config.json" else "released"][0]
    try:
        whole = (path / name).read_bytes() if (path / name).exists() else None
        (path / name).write_bytes(EMPTY * 2)
        found = child.ask(path)
    finally:
        (path / name).unlink()
        if whole is not None:
            (path / name).write_bytes(whole)
    assert is_clear(found), found
    assert "bytes that it can need" in found["message"]


def test_headers_that_swell(tmp_path, child):
    """Of tensors without a number in them, which cost nothing but their names."""
    folder = variants.copy(tmp_path / "m")
    one = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    for i, count in enumerate((150_000, 150_000, 150_000)):
        raw = b"{" + b"".join(one % n for n in range(count))[:-1] + b"}"
        (folder / f"spare-{i}.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    found = child.ask(folder)
    assert is_clear(found), found
    assert "above any that it can need" in found["message"]


def test_keys_that_swell(tmp_path, child):
    """Short arrays are kept; many of them must not be."""
    body = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (4096).to_bytes(8, "little") + bytes(4096)
    keys = b"".join((4).to_bytes(8, "little") + b"%04d" % i + body for i in range(9999))
    raw = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (9999).to_bytes(8, "little") + keys
    (tmp_path / "m.gguf").write_bytes(raw)
    found = child.ask(tmp_path / "m.gguf")
    assert is_clear(found), found
    assert "hold more than 16,777,216 bytes" in found["message"]


def test_nesting_without_end(artifacts, child):
    path = artifacts["released"][0]
    with Spoiled(path / "config.json"):
        (path / "config.json").write_text("[" * 1_000_000)
        assert "nested too deeply" in child.ask(path)["message"]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../b.safetensors", "C:x.safetensors", "x.bin"]
)
def test_shards_that_lead_elsewhere(name, tmp_path, child):
    folder = variants.copy(tmp_path / "m")
    variants.edit_json(folder / variants.INDEX, lambda i: i["weight_map"].update({"lm_head.weight": name}))
    found = child.ask(folder)
    assert found["end"] == "BadCheckpoint"
    assert "is not a safetensors file of this folder" in found["message"]


def test_parts_that_lead_elsewhere(tmp_path, child):
    """A part of a GGUF that is a link out of its folder."""
    import gguf

    original = gguf.GGUFWriter
    gguf.GGUFWriter = lambda *a: original(*a, split_max_tensors=40)
    try:
        gguf_demo(tmp_path / "m.gguf", released_like)
    finally:
        gguf.GGUFWriter = original
    (tmp_path / "m").mkdir()
    first, second = sorted(tmp_path.glob("*.gguf"))
    first.rename(tmp_path / "m" / first.name)
    (tmp_path / "m" / second.name).symlink_to(second)
    found = child.ask(tmp_path / "m")
    assert "outside the checkpoint's folder" in found["message"]


@pytest.mark.parametrize(("how", "end"), [("hang", "hung"), ("eat", "raised"), ("die", "died")])
def test_the_watch_is_awake(how, end, child):
    """What these tests are there to find is found."""
    found = child.ask(how, seconds=3)
    assert found["end"] == end
    assert not is_clear(found)


def test_the_limit_is_one(tmp_path, child):
    """A file that is read whole within the limit, and a process that says what it is."""
    assert MORE == 500 << 20
    path = tmp_path / "m.gguf"
    with path.open("wb") as f:  # 4,000,000 empty texts: just within the cap on texts
        f.write(b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little"))
        f.write((1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little") + (8).to_bytes(4, "little"))
        f.write((4_000_000).to_bytes(8, "little"))
        f.truncate(1 << 30)
    found = child.ask(path)
    assert is_clear(found)
    assert "behind its last tensor" in found["message"]
