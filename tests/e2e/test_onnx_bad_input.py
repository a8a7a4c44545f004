"""Damaged ONNX folders and stores, killed proofs, missing libraries: one line, files made again, or a failed gate."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import onnx
import pytest

from tests import variants
from tests.conftest import run_exporter
from tests.e2e.test_bad_input import one_clear_line

# Small and quick: one window, and no text beyond the length that the rope was made for.
PROFILE = """
title = "quick"
model = "openai/gpt-oss-20b"
[hardware]
device = "cpu"
memory = "8GiB"
reserve = "1GiB"
context = 1024
ubatch = 512
runtime = "0.2GiB"
[[artifact]]
format = "onnx"
target = "cpu"
recipe = "exact-q8"
[validate]
windows = 1
length = 160
[gates]
digests_equal = true
head_equal = true
tokenizer_equal = true
export_kl_mean = 0.005
release_kl_mean = 0.01
"""
GPTQ = """
title = "a part of one layer calibrated"
[calibration]
windows = 1
length = 64
[[rule]]
match = "model.layers.1.mlp.experts.down_proj.weight"
method = "gptq"
scheme = "int4-g32"
[[rule]]
match = "*.mlp.experts.*_proj.weight"
method = "rtn"
scheme = "int4-g32"
[[rule]]
match = "*"
method = "keep"
"""
WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from exporter.cli import main
main(sys.argv[2:])
"""
DATA, PLAIN, GENAI = "model.onnx.data", "model.onnx", "model_genai.onnx"
CODES = "lm_head.weight_codes"


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "report.json"}


class Job:
    """A checkpoint, a profile and a folder of artifacts."""

    def __init__(self, model, profile, out):
        self.model, self.profile, self.out = model, profile, out
        self.folder = out / "model" / "quick" / "onnx-exact-q8-cpu"

    def arguments(self, *more):
        return [str(self.model), "-p", str(self.profile), "--out", str(self.out), *map(str, more)]

    def __call__(self, command, *more, **settings):
        return run_exporter(command, *self.arguments(*more), **settings)

    def flip(self, name, at, bits=1):
        with open(self.folder / name, "r+b") as f:
            f.seek(at)
            (byte,) = f.read(1)
            f.seek(at)
            f.write(bytes([byte ^ bits]))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A proved artifact. Its checkpoint takes 4,096 tokens, so that cosines and the long text cost nothing."""
    base = tmp_path_factory.mktemp("sound")
    model = variants.copy(base / "model")
    variants.edit_json(model / "config.json", lambda config: config.update(max_position_embeddings=4096))
    (base / "quick.toml").write_text(PROFILE)
    job = Job(model, base / "quick.toml", base / "out")
    done = job("quantize")
    assert done.code == 0, done.err + done.out
    return job


@pytest.fixture
def job(sound, tmp_path):
    """A copy to damage, beside its store and its reference."""
    shutil.copytree(sound.out, tmp_path / "out")
    return Job(sound.model, sound.profile, tmp_path / "out")


def places(folder, graph=PLAIN):
    """(offset, bytes) of every initializer in the data file, by name."""
    model = onnx.load(folder / graph, load_external_data=False)
    fields = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
    return {name: (int(each["offset"]), int(each["length"])) for name, each in fields.items()}


def rewrite(path, edit):
    """Change a graph without changing its size: another size is made again before anyone looks."""
    model, size = onnx.load(path, load_external_data=False), path.stat().st_size
    edit(model)
    raw = model.SerializeToString()
    assert len(raw) == size
    path.write_bytes(raw)


def set_field(key, change, name=CODES):
    """An edit of one field of an initializer's place."""

    def edit(model):
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        (entry,) = [e for e in tensor.external_data if e.key == key]
        entry.value = change(entry.value)

    return edit


def set_attribute(name, field, old, new):
    def edit(model):
        found = [a for n in model.graph.node for a in n.attribute if a.name == name and getattr(a, field) == old]
        assert found
        for attribute in found:
            setattr(attribute, field, new)

    return edit


# Damaged files, before anything runs


def linked(job, link):
    path = job.folder / DATA
    shutil.move(path, job.out / "elsewhere")
    getattr(path, link)(job.out / "elsewhere")


def outside(job):
    shutil.copy(job.folder / DATA, job.folder.parent / "l1.onnx.data")
    rewrite(job.folder / PLAIN, set_field("location", lambda _: "../l1.onnx.data"))


EARLY = {
    "data are a symbolic link": (lambda job: linked(job, "symlink_to"), "is a symbolic link"),
    "data are a hard link": (lambda job: linked(job, "hardlink_to"), "is a hard link"),
    "data outside the folder": (outside, "is no plain path below its folder"),
    "offset of a neighbour": (
        lambda job: rewrite(job.folder / PLAIN, set_field("offset", lambda v: str(int(v) - 4096))),
        "share bytes of model.onnx.data",
    ),
    "offset beyond the end": (
        lambda job: rewrite(job.folder / PLAIN, set_field("offset", lambda v: "9" * len(v))),
        "ends at ",
    ),
    "graph of zeros": (
        lambda job: (job.folder / PLAIN).write_bytes(bytes((job.folder / PLAIN).stat().st_size)),
        "not an ONNX model, or cut off",
    ),
    "bias that is no bfloat16": (
        lambda job: job.flip(DATA, places(job.folder)["model.layers.1.mlp.experts.gate_up_proj.bias"][0]),
        "holds numbers that are not bfloat16",
    ),
}


def link_graph(job):
    shutil.move(job.folder / GENAI, job.out / "elsewhere")
    (job.folder / GENAI).symlink_to(job.out / "elsewhere")


GENAI_EARLY = {
    "links to the graph": (link_graph, "is a symbolic link"),
    "another offset": (
        lambda job: rewrite(job.folder / GENAI, set_field("offset", lambda v: "9" * len(v))),
        "damaged ONNX artifact",
    ),
}


@pytest.mark.parametrize("kind", GENAI_EARLY)
def test_the_graph_for_genai_is_read_before_a_runtime_is_asked(kind, job):
    damage, words = GENAI_EARLY[kind]
    damage(job)
    assert one_clear_line(job("quantize"), 1, words, "--overwrite")


@pytest.mark.parametrize("kind", EARLY)
def test_damage_that_is_seen_before_a_runtime_is_asked(kind, job):
    damage, words = EARLY[kind]
    damage(job)
    assert one_clear_line(job("quantize"), 1, words, "--overwrite")
    assert not (job.folder / "report.json").exists(), "an old report must not stand beside a damaged file"


def test_a_manifest_that_is_none(job):
    (job.folder / "manifest.json").write_bytes(b"\xff" * 100)
    assert one_clear_line(job("quantize"), 4, "is not an artifact of ours", "move it away")


def test_files_of_another_size_are_made_again(job, sound):
    (job.folder / "tokenizer_config.json").unlink()
    os.truncate(job.folder / DATA, 1000)
    (job.folder / "genai_config.json").write_text("{}")
    rewritten = onnx.load(job.folder / PLAIN, load_external_data=False)
    del rewritten.graph.node[10]
    (job.folder / PLAIN).write_bytes(rewritten.SerializeToString())
    done = job("quantize", "--until", "export")
    assert done.code == 0, done.err
    again, whole = contents(job.folder), contents(sound.folder)
    assert {name: again[name] for name in again if name != "manifest.json"} == {
        name: whole[name]
        for name in whole
        if name
        not in (
            "manifest.json",
            "provenance.json",
            "SHA256SUMS",
            "report.md",
            "report.html",
        )  # hashes come with the proof
    }


# Damage that a gate finds


def failed_gates(job, code=3):
    done = job("quantize", "--json", timeout=300)
    assert done.code == code, done.err
    (artifact,) = done.json["artifacts"]
    assert artifact["status"] == "gate failed"
    return {gate["name"] for gate in artifact["gates"] if not gate["passed"]}


def test_a_bit_of_a_code_and_a_bit_of_the_cosines(job):
    found = places(job.folder)
    job.flip(DATA, found[CODES][0] + 12_345)
    job.flip(DATA, found["cos_cache"][0] + 64)
    assert {"digests_equal", "head_equal"} <= failed_gates(job)


@pytest.mark.slow
def test_the_graph_for_genai_with_another_window(job):
    """The plain graph is sound, and the weights are: only what genai makes of them differs."""
    rewrite(job.folder / GENAI, set_attribute("local_window_size", "i", 128, 130))
    assert failed_gates(job) & {"head_equal", "genai_difference", "digests_equal"} == {"head_equal", "genai_difference"}


@pytest.mark.slow
def test_the_plain_graph_with_another_limit(job):
    rewrite(job.folder / PLAIN, set_attribute("swiglu_limit", "f", 7.0, 2.0))
    assert {"head_equal", "arithmetic_kl_mean"} <= failed_gates(job)


def test_a_byte_between_two_tensors(job):
    found = sorted(places(job.folder).values())
    gap = next(at + n for (at, n), (after, _) in itertools.pairwise(found) if at + n < after)
    job.flip(DATA, gap)
    assert "head_equal" in failed_gates(job)


def test_hashes_that_are_not_those_of_the_files(job):
    sums = job.folder / "SHA256SUMS"
    lines = [f"{'0' * 64}  {DATA}" if line.endswith(DATA) else line for line in sums.read_text().splitlines()]
    sums.write_text("\n".join(lines) + "\n")
    assert one_clear_line(job("quantize"), 1, "SHA256SUMS", "--overwrite")


# The store


def test_a_damaged_store_is_made_again_where_it_can_be(job, sound):
    (data,) = (job.out / "model" / "store").glob("*/data.bin")
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 3] ^= 1
    data.write_bytes(raw)
    assert job("export", "--overwrite").code == 0
    assert contents(job.folder)[DATA] == contents(sound.folder)[DATA]


def test_export_from_a_damaged_calibrated_store_names_what_heals_it(sound, tmp_path):
    recipe = tmp_path / "gptq.toml"
    recipe.write_text(GPTQ)
    job = Job(sound.model, sound.profile, tmp_path / "out")
    assert job("quantize", "--recipe", recipe, "--until", "quantize").code == 0
    (data,) = (job.out / "model" / "store").glob("*/data.bin")
    data.write_bytes(bytes(255 - byte for byte in data.read_bytes()))
    assert one_clear_line(job("export", "--recipe", recipe), 1, "changed in the store", "exporter quantize")
    assert not list((job.out / "model" / "quick").glob("onnx-gptq-cpu"))
    assert job("quantize", "--recipe", recipe, "--until", "export").code == 0
    assert job("export", "--recipe", recipe).code == 0


def test_a_store_of_another_checkpoint_is_no_store(job, tmp_path):
    other = variants.copy(tmp_path / "other" / "model")
    edit = {"max_position_embeddings": 4096, "swiglu_limit": 5.0}
    variants.edit_json(other / "config.json", lambda config: config.update(edit))
    before, job.model = contents(job.folder), other
    assert one_clear_line(job("export"), 4, "is not complete", "--until quantize")
    assert one_clear_line(job("quantize", "--until", "export"), 4, "holds another artifact", "--overwrite")
    assert contents(job.folder) == before


def test_another_context_is_another_artifact(job):
    assert one_clear_line(job("export", "--context", 2048), 4, "holds another artifact", "--overwrite")
    assert job("export", "--context", 2048, "--overwrite").code == 0
    config = json.loads((job.folder / "genai_config.json").read_text())
    assert config["search"]["max_length"] == 2048


# A proof that is killed


def test_a_killed_proof_leaves_no_process_and_its_scratch_is_removed(job):
    command = [sys.executable, "-m", "exporter", "quantize", *job.arguments()]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scratch = job.out / "model"
    until = time.monotonic() + 60
    workers = []
    while not workers and time.monotonic() < until and child.poll() is None:
        time.sleep(0.05)
        if list(scratch.glob(".proof-*")):
            workers = children_of(child.pid)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert workers
    while any(alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
    assert list(scratch.glob(".proof-*"))
    assert not (job.folder / "report.json").exists()
    assert job("quantize", "--until", "export").code == 0
    assert not list(scratch.glob(".proof-*"))


def children_of(pid):
    tasks = f"/proc/{pid}/task"
    found = []
    with contextlib.suppress(FileNotFoundError):
        for task in os.listdir(tasks):
            with open(f"{tasks}/{task}/children") as f:
                found += [int(word) for word in f.read().split()]
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# What is not there


@pytest.mark.parametrize("module", ["onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "jinja2"])
def test_a_missing_library_is_named_before_any_work(module, sound, tmp_path):
    job = Job(sound.model, sound.profile, tmp_path / "out")
    command = [sys.executable, "-c", WITHOUT, module, "quantize", *job.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: ")
    assert f"needs {module.replace('_', '-')}, which is not installed" in done.stderr
    extra = "validate" if module == "jinja2" else "onnx"
    assert f"pip install 'exporter[{extra}]'" in done.stderr
    assert not job.out.exists()


def test_a_variable_that_changes_the_kernels_is_refused_before_any_work(sound, tmp_path):
    job = Job(sound.model, sound.profile, tmp_path / "out")
    done = job("quantize", env={"ORT_QMOE_CPU_QNBIT_GEMM": "fp32"})
    assert one_clear_line(done, 1, "ORT_QMOE_CPU_QNBIT_GEMM", "unset")
    assert not job.out.exists()


# bench


def test_bench_of_more_tokens_than_the_model_takes(job):
    done = run_exporter("bench", job.folder, "--prompt", 5000, "--depth", 4000, "--tokens", 200, "--repeats", 1)
    assert one_clear_line(done, 2, "4,096", "--prompt")


@pytest.mark.parametrize("graph", [PLAIN, GENAI])
def test_bench_of_data_under_another_name(graph, job):
    linked(job, "hardlink_to")
    done = run_exporter("bench", job.folder / graph, "--prompt", 8, "--tokens", 2, "--repeats", 1)
    assert one_clear_line(done, 1, "is a hard link")
