"""`plan --sensitivity`: what is weighed, what is measured, what is chosen, and what an interruption costs."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from exporter.cli import main
from exporter.errors import Refused
from exporter.model import tensor_specs
from exporter.model.memory import fit
from exporter.model.reference import reference_logits
from exporter.model.released import RELEASED
from exporter.numerics import decode
from exporter.pipeline.candidates import GROUPS, Candidate, candidates, recipe_text, steps_of, survey
from exporter.pipeline.plan import make_plan, released_scheme
from exporter.pipeline.profiles import load_profile, load_recipe
from exporter.pipeline.progress import Progress
from exporter.pipeline.request import RunRequest
from exporter.pipeline.run import Run
from exporter.pipeline.sensitivity import Sensitivities, Sensitivity, SensitivityRequest
from exporter.quantize.exact import from_mxfp4
from exporter.quantize.rtn import round_to
from exporter.types import Scheme, TensorSpec
from exporter.validate import text
from exporter.validate.metrics import between, summary

DEMO = Path(__file__).parents[1] / "data" / "tiny-gpt-oss"
B20 = RELEASED["openai/gpt-oss-20b"]
TARGET = 5_600_000  # bytes: released 7.4 MB, all int8 that can be 5.9 MB


class Stages(Progress):
    """Remembers the stages; stops as Ctrl-C does when one called `stop` begins."""

    def __init__(self, stop: str = "") -> None:
        self.seen: list[str] = []
        self.stop = stop

    def stage(self, name: str, total: int, unit: str = "B") -> None:
        self.seen.append(name)
        if name == self.stop:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Setting:
    folder: Path
    profile: str
    recipe: str

    def request(self, **changes) -> SensitivityRequest:
        given = {"formats": ("gguf",), "out": self.folder / "out", "target_bytes": TARGET, **changes}
        return SensitivityRequest(str(DEMO), self.profile, recipe=self.recipe, **given)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("sensitivity")
    profile, recipe = folder / "small.toml", folder / "few.toml"
    given = load_profile("16gb").validate
    shipped = Path(__file__).parents[2] / "profiles"
    body = (shipped / "16gb.toml").read_text()
    body = body.replace(f"windows = {given.windows} ", "windows = 2 ").replace(
        f"length = {given.length}", "length = 64"
    )
    profile.write_text(body)
    body = (shipped / "recipes" / "gptq-int4.toml").read_text()
    body = body.replace("windows = 128", "windows = 2").replace("length = 512", "length = 64")
    recipe.write_text(body + '\n[gptq]\nhessian = "shared"\n')
    assert load_profile(str(profile)).validate.windows == load_recipe(str(recipe)).calibration.windows == 2
    return Setting(folder, str(profile), str(recipe))


@pytest.fixture(scope="module")
def answer(setting) -> Sensitivities:
    return Sensitivity(setting.request(), Progress()).run()


# What can be weighed without reading a weight


def survey_20b(profile="16gb", target=None, **options):
    return survey(make_plan("20b", B20, released_scheme, load_profile(profile), **options), released_scheme, target)


def test_every_choice_is_a_plan_of_the_same_size(tmp_path):
    found = survey_20b()
    for choice in (found.choices[0], found.choices[17], found.choices[-1]):
        file = tmp_path / "r.toml"
        file.write_text(recipe_text([o.candidate for o in choice.options], "t"))
        (artifact,) = make_plan("20b", B20, released_scheme, load_profile("16gb"), recipe=str(file)).artifacts
        assert (artifact.nbytes,) == choice.nbytes
        assert artifact.fit.fits


def test_the_limit_is_where_the_memory_ends():
    found, hardware = survey_20b(), load_profile("16gb").hardware
    assert fit(B20, found.limit, hardware).fits
    assert not fit(B20, found.limit + 1, hardware).fits
    assert survey_20b(target=found.limit - 1).limit == found.limit - 1
    assert survey_20b(target=10**15).limit == found.limit


def test_what_fits_is_what_the_runtime_holds():
    """Of an ONNX artifact on a CPU: more than its file, and keys and values of four bytes in every number."""
    found = survey_20b("cpu", formats=("onnx",))
    for choice in (found.choices[0], found.choices[-1]):
        assert choice.memory[0] > choice.nbytes[0]
        assert choice.memory[0] <= found.limit
    hardware = load_profile("cpu").hardware
    assert fit(B20, found.limit, hardware, kv_item=4).fits
    assert not fit(B20, found.limit + 1, hardware, kv_item=4).fits
    smallest = min(choice.nbytes[0] for choice in found.choices)
    assert {c.nbytes[0] for c in survey_20b("cpu", target=smallest, formats=("onnx",)).choices} == {smallest}
    larger = survey_20b("cpu", formats=("onnx",), context=B20.max_position_embeddings)
    assert len(larger.choices) < len(found.choices)


def test_groups_and_kept_tensors_are_all_of_the_model():
    first = [candidates(g, [released_scheme(s) for s in members(g)])[0] for g in GROUPS]
    steps = steps_of(first, tensor_specs(B20), released_scheme)
    assert {s.method for s in steps} == {"keep", "pass"}
    assert sum(len(members(g)) for g in GROUPS) == 24 * (4 + 2 + 1) + 2


def members(group: str) -> list[TensorSpec]:
    roles = {"attention": "linear", "lm_head": "head", "embeddings": "embedding"}
    if group in roles:
        return [s for s in tensor_specs(B20) if s.role == roles[group]]
    experts = [s for s in tensor_specs(B20) if s.role == "expert"]
    return [s for s in experts if (".down_proj." in s.name) == (group == "down")]


def test_nothing_fits_says_the_smallest():
    with pytest.raises(Refused, match=r"embeddings mxfp4\) is 11\.\d GB of weights, and 9 GB is the limit"):
        survey_20b(target=9 * 10**9)


def test_what_a_format_cannot_hold_is_no_choice():
    found = survey_20b(recipe="gptq-int4", formats=("gptq",))
    refused = {(o.candidate.group, o.candidate.scheme) for o in found.options if o.refused}
    assert {("down", "mxfp4"), ("embeddings", "int8-g32"), ("lm_head", "mxfp4")} <= refused
    assert all(o.refused is None for c in found.choices for o in c.options)


def test_what_a_format_cannot_hold_together_is_no_choice():
    found = survey_20b("80gb", recipe="gptq-int4", formats=("compressed-tensors",))
    pairs = {
        tuple(o.candidate.scheme for o in c.options if o.candidate.group in ("gate_up", "down")) for c in found.choices
    }
    assert pairs == {("mxfp4",) * 2, ("int8-g32",) * 2, ("int4-g32",) * 2}


def test_of_equals_the_smallest_is_taken():
    found = survey_20b("80gb")
    chosen = found.least(lambda c: 0.0)
    assert sum(chosen.nbytes) == min(sum(c.nbytes) for c in found.choices)
    exact = found.least(lambda c: 0.0 if c.exact else 1.0)
    assert [o.candidate.scheme for o in exact.options] == ["bf16", "mxfp4", "mxfp4", "bf16", "bf16"]


def test_a_bf16_model_has_more_to_try():
    bf16, mxfp4 = Scheme.parse("bf16"), Scheme.parse("mxfp4")
    tried = [(c.method, c.scheme) for c in candidates("down", [bf16, bf16])]
    assert tried == [("keep", "bf16"), ("exact", "int8-g32"), ("gptq", "int4-g32"), ("gptq", "mxfp4")]
    # Whether these are exact is not known before they are read.
    assert [c.exact for c in candidates("down", [bf16])] == [True, False, False, False]
    assert [c.exact for c in candidates("down", [mxfp4])] == [True, True, False]
    with pytest.raises(Refused, match="down is stored as bf16 and mxfp4"):
        candidates("down", [bf16, mxfp4])


# What is measured


def test_the_choice_is_the_best_that_fits(answer):
    kl = {c: f["kl_mean"] for c, f in answer.figures.items()}
    assert max(answer.choice.nbytes) <= TARGET
    for other in answer.survey.choices:
        assert max(other.nbytes) <= TARGET
        assert math.fsum(kl[o.candidate] for o in other.options) >= answer.predicted
    assert 0 < answer.measured["kl_mean"] < 2 * answer.predicted
    assert all(0 < kl[c] < 0.1 for c in kl if not c.exact)


@pytest.mark.parametrize(
    ("candidate", "change"),
    [
        (Candidate("attention", "rtn", "int8-g32"), lambda q: round_to(q, Scheme.parse("int8-g32"))),
        (Candidate("embeddings", "rtn", "mxfp4", "mse"), lambda q: round_to(q, Scheme.parse("mxfp4", "mse"))),
        (Candidate("gate_up", "exact", "int8-g32"), lambda q: from_mxfp4(q, Scheme.parse("int8-g32", "pow2"))),
    ],
)
def test_figures_are_those_of_a_forward_with_the_group_changed(answer, demo_checkpoint, candidate, change):
    """Computed the plain way: names told apart by hand, the whole vocabulary kept."""
    words = {"attention": "_proj.weight", "embeddings": "embed_tokens", "gate_up": "mlp.experts."}[candidate.group]
    windows = text.windows(DEMO / "tokenizer.json", text.standard_library(), 2, 64)
    config = demo_checkpoint.config

    def released(name, start, stop):
        return decode.values(demo_checkpoint.read(name, start, stop))

    def changed(name, start, stop):
        inside = words in name and name.endswith("weight") and "down" not in name
        if candidate.group == "attention":
            inside = inside and "self_attn" in name
        q = demo_checkpoint.read(name, start, stop)
        return decode.values(change(q) if inside else q)

    a, b = (
        reference_logits(config, read, windows.tokens, [config.rope], top_k=config.vocab_size)[0]
        for read in (released, changed)
    )
    figures = summary(between(a, b))
    assert answer.figures[candidate]["kl_mean"] == pytest.approx(figures["kl_mean"], rel=1e-2, abs=1e-12)
    assert answer.figures[candidate]["top1"] == figures["top1"]


def test_the_recipe_is_the_choice_and_says_what_was_measured(answer, setting):
    recipe = load_recipe(str(answer.recipe))
    body = answer.recipe.read_text()
    assert (recipe.calibration.windows, recipe.calibration.length, recipe.formats) == (2, 64, ("gguf",))
    (artifact,) = make_plan(
        "demo",
        answer.plan.config,
        released_scheme,
        load_profile(setting.profile),
        formats=("gguf",),
        recipe=str(answer.recipe),
    ).artifacts
    assert (artifact.nbytes,) == answer.choice.nbytes
    for figures in answer.figures.values():
        assert f"{figures['kl_mean']:.6f}" in body
    assert f"measured together {answer.measured['kl_mean']:.6f}" in body
    assert answer.text["sha256"][:12] in body


def test_quantize_takes_up_the_store_that_was_measured(answer, setting):
    """So the KL is that of the numbers that are exported."""
    assert any(o.candidate.method == "gptq" for o in answer.choice.options)
    store = setting.folder / "out" / "tiny-gpt-oss" / "store"
    before, seen = sorted(p.name for p in store.iterdir()), Stages()
    request = RunRequest(
        str(DEMO), setting.profile, ("gguf",), str(answer.recipe), setting.folder / "out", until="quantize"
    )
    Run(request, seen).run()
    assert sorted(p.name for p in store.iterdir()) == before
    assert "calibrate" not in seen.seen


# What an interruption costs


def test_nothing_is_measured_twice(answer, setting):
    seen = Stages()
    again = Sensitivity(setting.request(), seen).run()
    assert seen.seen == []
    assert (again.figures, again.measured) == (answer.figures, answer.measured)


def test_an_interrupted_run_goes_on_to_the_same_answer(answer, setting, tmp_path):
    """Stopped between two forwards; the stores are those of the finished run."""
    first, second = Stages(stop="lm_head as int4-g32"), Stages()
    request = setting.request(out=tmp_path)
    stores = Path("tiny-gpt-oss") / "store"
    shutil.copytree(setting.folder / "out" / stores, tmp_path / stores)
    with pytest.raises(KeyboardInterrupt):
        Sensitivity(request, first).run()
    resumed = Sensitivity(request, second).run()
    assert (resumed.figures, resumed.measured) == (answer.figures, answer.measured)
    assert resumed.recipe.read_text() == answer.recipe.read_text()
    assert second.seen[0] == first.seen[-1] == "lm_head as int4-g32"
    assert set(first.seen[:-1]).isdisjoint(second.seen)


def test_another_limit_measures_only_the_new_choice(setting, answer):
    seen = Stages()
    other = Sensitivity(setting.request(target_bytes=6_000_000, write=setting.folder / "other.toml"), seen).run()
    assert set(seen.seen) <= {"calibrate", "the choice"}
    assert other.predicted < answer.predicted
    assert other.recipe == setting.folder / "other.toml"


# The command


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    return stop.value.code, *capsys.readouterr()


def test_the_command_prints_one_object(answer, setting, capsys):
    shared = ("plan", DEMO, "-p", setting.profile, "--recipe", setting.recipe, "-f", "gguf", "--sensitivity")
    shared += ("--out", setting.folder / "out", "--target-bytes", TARGET)
    code, out, _ = run(capsys, *shared, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["chosen"] == {o.candidate.group: o.candidate.scheme for o in answer.choice.options}
    assert [o["kl_mean"] for o in found["options"]] == [
        answer.figures[o.candidate]["kl_mean"] for o in answer.survey.options
    ]
    assert {o["method"] for o in found["options"] if not o["measured"]} == {"keep", "pass", "exact"}
    code, out, _ = run(capsys, *shared)
    assert code == 0
    assert f"KL: sum of the parts {answer.predicted:.6f}" in out
    assert sum(line.startswith(" *") for line in out.splitlines()) == len(GROUPS)


WRONG = {
    "target alone": (("--target-bytes", "1G"), 2, "--target-bytes goes with --sensitivity"),
    "text alone": (("--calibration", "self"), 2, "--calibration goes with --sensitivity"),
    "no toml": (("--sensitivity", "--write", "best.txt"), 2, "best.txt is not a .toml file"),
    "no memory": (("--sensitivity", "--max-memory", "300M"), 4, "calibration needs"),
    "no size": (("--sensitivity", "--target-bytes", "1M"), 4, "no choice fits: the smallest"),
    "no device": (("--sensitivity", "--device", "cuda:99"), 2, "cuda:99"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_one_line(case, setting, tmp_path, capsys):
    arguments, code, words = WRONG[case]
    found, _, err = run(capsys, "plan", DEMO, "-p", setting.profile, "--out", tmp_path / "out", *arguments)
    assert found == code
    assert words in err.splitlines()[0]
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_ones_own_is_not_replaced(setting, tmp_path):
    mine = tmp_path / "mine.toml"
    shutil.copy(setting.recipe, mine)
    with pytest.raises(Refused, match="recipe of your own"):
        Sensitivity(setting.request(write=mine), Progress())
    assert np.array_equal(mine.read_bytes(), Path(setting.recipe).read_bytes())
