"""TensorRT artifacts of the demo checkpoint, their graphs computed by ONNX Runtime, against the reference.

With float32 activations nothing but the last bits may differ, and every fault planted in a graph stands out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.checkpoint import open_checkpoint
from exporter.errors import ExporterError
from exporter.formats import get_format
from exporter.model.reference import ReferenceLogits, Routes, reference_logits
from exporter.numerics import decode
from exporter.validate import metrics, onnx_twin, text
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_session import QMOE_GEMM, Decoding, Graph
from tests.conftest import DEMO, run_exporter

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import helper, numpy_helper  # noqa: E402

LENGTH, TRAINED, LONG = 256, 4096, 4160
PREFILL, STEPS = 96, 64  # the attention window is 128
FLOOR = 1e-10  # mean KL of the graphs is below 1e-11
GATES = get_format("tensorrt").gates
MADE = {"f32": "sm80", "exact-bf16": "sm80", "mxfp4-bf16": "sm120", "exact-f16": "sm75"}
PROFILE = """
title = "every form of the numbers"
model = "openai/gpt-oss-20b"
[hardware]
device = "gpu"
memory = "80GiB"
reserve = "1GiB"
context = 8192
ubatch = 512
runtime = "0.5GiB"
[validate]
windows = 1
length = 128
[gates]
digests_equal = true
"""


@pytest.fixture(scope="module", autouse=True)
def float32_activations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(QMOE_GEMM, "fp32")
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of each recipe, unproved."""
    root = tmp_path_factory.mktemp("tensorrt")
    artifact = '[[artifact]]\nformat = "tensorrt"\nrecipe = "{}"\ntarget = "{}"\n'
    profile = root / "forms.toml"
    profile.write_text(PROFILE + "".join(artifact.format(*each) for each in MADE.items()))
    done = run_exporter("quantize", "-p", profile, DEMO, "--out", root, "--until", "export", "--json")
    assert done.code == 0, done.err
    return {each["recipe"]: Path(each["path"]) for each in done.json["artifacts"]}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the reference predicts, whole and for its first layers alone, and the experts that it chooses."""

    config: Any
    read: Any

    def tokens(self, length: int) -> Any:
        return text.windows(DEMO / "tokenizer.json", text.standard_library(), 1, length).tokens

    def logits(self, length: int, layers: int = 0, routed: Any = None) -> ReferenceLogits:
        config = self.config
        if layers:
            config = dataclasses.replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])
        tokens = self.tokens(length)
        return reference_logits(config, self.read, tokens, [config.rope], top_k=config.vocab_size, routed=routed)[0]

    @functools.cached_property
    def routes(self) -> Routes:
        return Routes(self.config, LENGTH)

    @functools.cached_property
    def release(self) -> ReferenceLogits:
        return self.logits(LENGTH, routed=self.routes)


@pytest.fixture(scope="module")
def wanted() -> Iterator[Wanted]:
    torch.set_num_threads(1)
    with open_checkpoint(DEMO) as checkpoint:
        yield Wanted(checkpoint.config, lambda *rows: decode.values(checkpoint.read(*rows)))


def load(path: Path, **settings: Any) -> Graph:
    return Graph(path, **{"threads": 1, "provider": CPU, "activations": "float32", **settings})


def log_probabilities(logits: Any) -> Any:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)


def every_log_probability(reference: ReferenceLogits) -> Any:
    found = np.empty(reference.top_logprobs.shape)
    np.put_along_axis(found, reference.top_ids.astype(np.int64), reference.top_logprobs, axis=1)
    return log_probabilities(found)


def in_pieces(decoding: Decoding, tokens: Any, *counts: int) -> Any:
    """Logits of tokens [T] that come `counts` at a time."""
    return np.concatenate([decoding.append(tokens[decoding.position : decoding.position + n]) for n in counts])


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Both graphs of an artifact, and the logits of the first window at once."""

    prefill: Graph
    single: Graph
    whole: Any
    routes: Any


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path], wanted: Wanted) -> Callable[[str], Loaded]:
    @functools.cache
    def of(recipe: str) -> Loaded:
        prefill, single = (load(folders[recipe] / f"{name}.onnx", inspect=True) for name in ("prefill", "decode"))
        decoding = Decoding(prefill)
        whole = decoding.append(wanted.release.tokens[0])
        return Loaded(prefill, single, whole, decoding.routes(wanted.config.num_experts_per_tok))

    return of


# They compute the model


@pytest.mark.parametrize("recipe", ["f32", "exact-bf16", "mxfp4-bf16"])
def test_what_holds_the_release_exactly_is_the_reference(
    recipe: str, loaded: Callable[[str], Loaded], wanted: Wanted
) -> None:
    found, release = loaded(recipe), wanted.release
    assert np.abs(log_probabilities(found.whole) - every_log_probability(release)).max() < 3e-5
    positions = metrics.compare(release, 0, found.whole)
    assert positions.kl.max() < 1e-11
    assert positions.same_top.all()
    assert np.array_equal(found.routes, wanted.routes.experts)


def test_fp4_and_its_integers_are_the_same_numbers(loaded: Callable[[str], Loaded]) -> None:
    assert np.array_equal(loaded("mxfp4-bf16").whole, loaded("exact-bf16").whole)


def test_turing_loses_what_float16_loses(loaded: Callable[[str], Loaded], wanted: Wanted) -> None:
    positions = metrics.compare(wanted.release, 0, loaded("exact-f16").whole)
    assert positions.kl.mean() < 1e-8
    assert positions.same_top.all()


@pytest.mark.parametrize("recipe", ["f32", "mxfp4-bf16", "exact-f16"])
def test_decoding_beyond_the_window_is_prefill(recipe: str, loaded: Callable[[str], Loaded], wanted: Wanted) -> None:
    found, tokens = loaded(recipe), wanted.release.tokens[0]
    pieces = in_pieces(Decoding(found.prefill, found.single), tokens, PREFILL, *[1] * STEPS)
    assert np.abs(pieces - found.whole[: PREFILL + STEPS]).max() < 5e-5


def test_a_prompt_in_pieces_is_the_prompt(loaded: Callable[[str], Loaded], wanted: Wanted) -> None:
    found, tokens = loaded("exact-bf16"), wanted.release.tokens[0]
    assert np.abs(in_pieces(Decoding(found.prefill), tokens, 100, 100, 55, 1) - found.whole).max() < 5e-5
    # Either graph takes any number of tokens.
    assert np.abs(in_pieces(Decoding(found.single), tokens, 3, 40) - found.whole[:43]).max() < 5e-5


def test_beyond_the_length_that_the_rope_was_trained_on(folders: dict[str, Path], wanted: Wanted) -> None:
    """In a sliding layer and a full one."""
    reference = wanted.logits(LONG, 2)
    graphs = [load(folders["f32"] / f"{name}.onnx", layers=2) for name in ("prefill", "decode")]
    counts = (512,) * (TRAINED // 512) + (LONG - TRAINED - 16,) + (1,) * 16
    logits = in_pieces(Decoding(*graphs), reference.tokens[0], *counts)
    positions = metrics.compare(reference, 0, logits)
    assert positions.kl[TRAINED:].max() < FLOOR
    assert positions.same_top[TRAINED:].all()


@pytest.mark.parametrize("graph", ["prefill", "single"])
def test_a_batch_with_padding_before_it_is_its_sequences(
    graph: str, loaded: Callable[[str], Loaded], wanted: Wanted
) -> None:
    """Two sequences of 150 and 137 tokens, positions from the first real token on; then two tokens more of each."""
    found, tokens = loaded("exact-bf16"), wanted.release.tokens[0]
    pair = [(tokens[:152], 0), (tokens[40:179], 13)]
    ids = np.stack([np.pad(each, (gap, 0)) for each, gap in pair])  # [2, 152]
    mask = np.stack([np.arange(152) >= gap for _, gap in pair]).astype(np.int64)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    session = getattr(found, graph).session
    cache = {i.name: np.zeros((2, 2, 0, 64), np.float32) for i in session.get_inputs() if "past" in i.name}
    names = ["logits", *(name.replace("past_key_values", "present") for name in cache)]
    parts = []
    for start, stop in ((0, 150), (150, 151), (151, 152)):
        feed = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        logits, *present = session.run(names, {**feed, "attention_mask": mask[:, :stop], **cache})
        cache = dict(zip(cache, present, strict=True))
        parts.append(logits)
    both = np.concatenate(parts, axis=1)  # [2, 152, V]
    for logits, (alone, gap) in zip(both, pair, strict=True):
        assert np.abs(logits[gap:] - Decoding(found.prefill).append(alone)).max() < 5e-5
        assert np.isfinite(logits).all()


def test_as_shipped_it_rounds_to_float16(folders: dict[str, Path], wanted: Wanted) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv(QMOE_GEMM)
        for recipe in ("exact-bf16", "mxfp4-bf16"):
            graph = load(folders[recipe] / "prefill.onnx", activations="shipped", inspect=True)
            positions = metrics.compare(wanted.release, 0, Decoding(graph).append(wanted.release.tokens[0]))
            assert 1e-7 < positions.kl.mean() < 1e-3


# The first layers


@pytest.mark.parametrize("layers", [1, 2])
def test_cut_it_is_the_reference_of_as_many_layers(
    layers: int, folders: dict[str, Path], loaded: Callable[[str], Loaded], wanted: Wanted
) -> None:
    graphs = [load(folders["mxfp4-bf16"] / f"{name}.onnx", layers=layers) for name in ("prefill", "decode")]
    reference = wanted.logits(LENGTH, layers)
    logits = Decoding(graphs[0]).append(reference.tokens[0])
    assert metrics.compare(reference, 0, logits).kl.max() < FLOOR
    pieces = in_pieces(Decoding(*graphs), reference.tokens[0], PREFILL, *[1] * STEPS)
    assert np.abs(pieces - logits[: PREFILL + STEPS]).max() < 5e-5
    assert np.abs(logits - loaded("mxfp4-bf16").whole).max() > 0.1
    assert len(graphs[0].present) == 2 * layers


def test_what_is_cut_off_is_gone(folders: dict[str, Path]) -> None:
    model = onnx.load(folders["exact-bf16"] / "prefill.onnx", load_external_data=False)
    onnx_twin.cut(model, 2)
    names = [v.name for values in (model.graph.initializer, model.graph.input, model.graph.output) for v in values]
    names += [node.name for node in model.graph.node]
    assert any(".1." in name for name in names)
    assert not [name for name in names if "layers.2" in name or ".2." in name or ".3." in name]
    with pytest.raises(ExporterError, match=r"no /model/layers\.6/residual/output"):
        onnx_twin.cut(model, 7)


@pytest.mark.parametrize("recipe", ["exact-f16", "mxfp4-bf16"])
def test_a_shorter_vocabulary_has_the_same_logits(
    recipe: str, folders: dict[str, Path], loaded: Callable[[str], Loaded]
) -> None:
    model = onnx.load(folders[recipe] / "prefill.onnx", load_external_data=False)
    onnx_twin.cut_vocabulary(model, 300)
    path = folders[recipe] / "short.onnx"
    path.write_bytes(model.SerializeToString())
    tokens = np.arange(200, 300)
    short = load(path)
    assert short.vocab_size == 300
    whole = Decoding(loaded(recipe).prefill).append(tokens)
    assert np.abs(Decoding(short).append(tokens) - whole[:, :300]).max() < 5e-5


# Faults planted in the graphs, each of which must show


def find(model: Any, name: str) -> Any:
    return next(each for each in (*model.graph.node, *model.graph.initializer) if each.name == name)


def constant(name: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        tensor = find(model, name)
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))

    return edit


def moved(name: str, rows: int) -> Callable[[Any], None]:
    """An initializer whose bytes are read `rows` of its leading axis further on."""

    def edit(model: Any) -> None:
        fields = {entry.key: entry for entry in find(model, name).external_data}
        row = int(fields["length"].value) // find(model, name).dims[0]
        fields["offset"].value = str(int(fields["offset"].value) + rows * row)

    return edit


def outputs_swapped(name: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        node = find(model, name)
        node.output[0], node.output[1] = node.output[1], node.output[0]

    return edit


def input_of(name: str, index: int, other: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        find(model, name).input[index] = other

    return edit


def without_sharing_among_the_chosen(model: Any) -> None:
    """Softmax over all experts, of which the chosen ones' shares are taken."""
    stem = "/model/layers.1/moe/router"
    node = find(model, f"{stem}/Softmax")
    (out,) = node.output
    node.input[0], node.output[0] = f"{stem}/logits", "every_share"
    inputs = ["every_share", f"{stem}/chosen/ids"]
    taken = helper.make_node("GatherElements", inputs, [out], name="taken", axis=-1)
    model.graph.node.insert(list(model.graph.node).index(node) + 1, taken)


def queries_ahead(model: Any) -> None:
    """The queries of one layer rotated as if they stood one token further on; keys are not."""
    node = find(model, "/model/layers.2/attn/q/RotaryEmbedding")
    model.graph.node.insert(0, helper.make_node("Add", [node.input[3], "int64_1"], ["ahead"], name="ahead"))
    node.input[3] = "ahead"


EXPERTS = "model.layers.1.mlp.experts"
FAULTS: dict[str, Callable[[Any], None]] = {
    "window one longer": constant("int64_128", lambda window: window + 1),
    "window one shorter": constant("int64_128", lambda window: window - 1),
    "first layer full": input_of("/model/layers.0/attn/Attention", 3, "/model/mask/full/Concat/output"),
    "sinks lost": constant("sink_key", np.zeros_like),
    "sinks of another layer": input_of("/model/layers.1/attn/sinks/Mul", 0, "model.layers.3.self_attn.sinks"),
    "sinks scaled once more": constant("float_8.0", lambda root: root / np.float32(8)),
    "sines one position off": moved("sin_cache", 1),
    "queries rotated one ahead": queries_ahead,
    "gate and up swapped": outputs_swapped("/model/layers.1/moe/Split"),
    "scales of the next expert": moved(f"{EXPERTS}.down_proj.weight_scales", 1),
    "biases of another layer": input_of(
        "/model/layers.1/moe/gate_up_proj/bias/Gather", 0, "model.layers.3.mlp.experts.gate_up_proj.bias"
    ),
    "shares of all experts": without_sharing_among_the_chosen,
    "steepness 1": constant("float_1.702", np.ones_like),
    "no clamp": constant("float_7.0", lambda limit: limit * 100),
    "up without its one": constant("float_1", np.zeros_like),
}


def faulty(folder: Path, fault: Callable[[Any], None], graph: str = "prefill") -> Path:
    """A graph beside the sound one, over the same weights."""
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    fault(model)
    path = folder / "fault.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows(name: str, folders: dict[str, Path], wanted: Wanted) -> None:
    found = Decoding(load(faulty(folders["exact-bf16"], FAULTS[name]))).append(wanted.release.tokens[0])
    assert metrics.compare(wanted.release, 0, found).kl.mean() > GATES["arithmetic_kl_mean"]


@pytest.mark.parametrize("name", ["window one shorter", "sinks lost", "scales of the next expert"])
def test_a_fault_of_decoding_alone_shows(
    name: str, folders: dict[str, Path], loaded: Callable[[str], Loaded], wanted: Wanted
) -> None:
    sound = loaded("mxfp4-bf16")
    single = load(faulty(folders["mxfp4-bf16"], FAULTS[name], "decode"))
    pieces = in_pieces(Decoding(sound.prefill, single), wanted.release.tokens[0], PREFILL, *[1] * STEPS)
    assert np.abs(pieces - sound.whole[: PREFILL + STEPS]).max() > GATES["cached_difference"]
