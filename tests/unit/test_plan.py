"""Plans and fits of the released models, exact and without any weight."""

import pytest

from exporter.errors import Refused, UsageError
from exporter.formats import get_format
from exporter.model import parameter_count, released_bytes, tensor_specs
from exporter.model.memory import fit, kv_bytes, largest_context
from exporter.model.released import RELEASED, released_repo
from exporter.pipeline.plan import leaf_memory, make_plan, released_scheme, require_fit, workers_for
from exporter.pipeline.profiles import load_profile, profile_names

B20, B120 = RELEASED["openai/gpt-oss-20b"], RELEASED["openai/gpt-oss-120b"]


def plan(config, profile, **options):
    return make_plan("gpt-oss", config, released_scheme, load_profile(profile), **options)


@pytest.mark.parametrize(
    ("config", "parameters", "nbytes", "tensors"),
    [(B20, 20_914_757_184, 13_761_264_768, 459), (B120, 116_829_156_672, 65_248_815_744, 687)],
)
def test_counts_are_the_published_ones(config, parameters, nbytes, tensors):
    assert parameter_count(config) == parameters
    assert released_bytes(config) == nbytes
    # As many as the release has: it fuses gate and up, and splits blocks from scales.
    assert len(tensor_specs(config)) == tensors


@pytest.mark.parametrize(
    ("config", "context", "full", "sliding"),
    [
        (B20, 8192, 12 * 8192 * 2048, 12 * 128 * 2048),
        (B20, 131072, 3_221_225_472, 3_145_728),
        (B120, 32768, 18 * 32768 * 2048, 18 * 128 * 2048),
        (B20, 64, 12 * 64 * 2048, 12 * 64 * 2048),
    ],
)
def test_only_full_layers_grow_with_the_context(config, context, full, sliding):
    assert kv_bytes(config, context) == (full, sliding)


def test_a_runtime_keeps_the_micro_batch_beside_the_window():
    # llama.cpp: 128 + 512 tokens, rounded up to 256 cells.
    assert kv_bytes(B20, 8192, 512)[1] == 12 * 768 * 2048


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_plans_and_fits_its_own_model(name):
    profile = load_profile(name)
    made = plan(RELEASED[profile.model], name)
    require_fit(made)
    for artifact in made.artifacts:
        assert artifact.nbytes == sum(artifact.format.target(s).nbytes for s in artifact.steps)
        assert artifact.largest_context >= profile.hardware.context


def test_20b_on_16_gb():
    (artifact,) = plan(B20, "16gb").artifacts
    assert artifact.nbytes == 12_096_558_336
    assert artifact.fit.fits
    assert not fit(B20, artifact.nbytes, load_profile("16gb").hardware, 131072).fits


@pytest.mark.parametrize(
    ("context", "kv_mib", "compute_mib"), [(8192, 210, 429.65), (32768, 786, 453.65), (131072, 3090, 549.65)]
)
def test_buffers_are_those_of_llama_cpp(context, kv_mib, compute_mib):
    """What llama.cpp's log says of a file of 20b's shapes (xllamacpp 2026.10.11549, CPU, ubatch 512)."""
    found = fit(B20, 0, load_profile("16gb").hardware, context)
    assert (found.kv_full + found.kv_sliding) / 2**20 == kv_mib
    assert (found.logits + found.scratch) / 2**20 == pytest.approx(compute_mib, abs=0.1)


def test_the_largest_context_is_the_last_that_fits():
    hardware = load_profile("16gb").hardware
    best = largest_context(B20, 12_096_558_336, hardware)
    assert fit(B20, 12_096_558_336, hardware, best).fits
    assert not fit(B20, 12_096_558_336, hardware, best + 256).fits


def test_what_cannot_fit_is_refused_with_what_would():
    with pytest.raises(Refused) as e:
        require_fit(plan(B20, "16gb", context=131072))
    assert e.value.hint.startswith("--context ")
    with pytest.raises(Refused) as e:
        require_fit(plan(B120, "16gb"))
    assert "no context fits" in e.value.hint


def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(Refused, match="beyond the model's 131,072"):
        plan(B20, "80gb", context=200_000)


def test_a_format_that_the_profile_does_not_make():
    with pytest.raises(UsageError, match="unknown format"):
        plan(B20, "16gb", formats=("onnnx",))


def test_groups_that_do_not_divide_are_refused(tmp_path):
    recipe = tmp_path / "g128.toml"
    recipe.write_text('title = "t"\n[[rule]]\nmatch = "*"\nmethod = "rtn"\nscheme = "int4-g128"\n')
    with pytest.raises(Refused, match=r"2880, which 128 does not divide \(22.5 groups\)"):
        plan(B20, "16gb", recipe=str(recipe))


def test_workers_follow_from_memory():
    steps = plan(B20, "16gb").artifacts[0].steps
    largest = max(map(leaf_memory, steps))
    assert workers_for(steps, 10**12, 2) == 2
    assert workers_for(steps, 300_000_000 + largest, 8) == 1
    with pytest.raises(Refused, match="too small"):
        workers_for(steps, 300_000_000 + largest - 1, 8)


def test_names_of_the_released_models():
    assert released_repo("20b") == released_repo("gpt-oss-20b") == "openai/gpt-oss-20b"
    assert released_repo("openai/gpt-oss-120b") == "openai/gpt-oss-120b"
    assert released_repo("someone/gpt-oss-20b") is None


def test_gguf_names_every_tensor_of_120b_once():
    fmt = get_format("gguf")
    (artifact,) = plan(B120, "80gb").artifacts
    names = [fmt.target(s).name for s in artifact.steps]
    assert len(set(names)) == len(names) == len(artifact.steps)
    assert "blk.35.ffn_gate_exps.weight" in names
    assert "blk.0.post_attention_norm.weight" in names
