"""The linter's rules against TensorRT-RTX: what it refuses is refused, what it lets through is built.

One child process asks it everything: native code may crash, and a builder takes half a second to start.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from exporter.validate.tensorrt_operators import OPERATORS
from tests.tensorrt_cases import CASES, SMS, TWINS, Case

LIMIT = 300  # seconds for all of it; 15 is usual


def asked(case: Case) -> tuple[int, ...]:
    """All capabilities where they differ, else one."""
    return SMS if 0 < len(case.sms) < len(SMS) or 0 < len(case.taken) < len(SMS) else (89,)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name: the parser's refusal as text, else for each capability the builder's refusal, or an empty text."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("graphs")
    questions: list[dict[str, Any]] = []
    for name, case in CASES.items():
        (folder / str(len(questions))).mkdir()
        (folder / str(len(questions)) / "weights.data").write_bytes(case.data)
        questions.append({"name": name, "sms": asked(case), "model": case.model})
    for name, model in TWINS.items():
        (folder / str(len(questions))).mkdir()
        questions.append({"name": f"twin: {name}", "sms": (75, 120), "model": model})
    for index, question in enumerate(questions):
        (folder / str(index) / "model.onnx").write_bytes(question.pop("model").SerializeToString())
    (folder / "questions.json").write_text(json.dumps(questions))
    command = [sys.executable, "-m", "tests.oracle.test_tensorrt_rules", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return answers


@pytest.mark.parametrize("name", CASES)
def test_it_refuses_what_the_linter_refuses(said: dict[str, Any], name: str) -> None:
    case, answer = CASES[name], said[name]
    assert "optimization profile" not in str(answer)  # a refusal for want of one proves nothing
    for sm in asked(case):
        refused = isinstance(answer, str) or bool(answer[str(sm)])
        assert refused == (case.fatal and sm in case.sms and sm not in case.taken), answer


@pytest.mark.parametrize("name", TWINS)
def test_it_builds_the_twin(said: dict[str, Any], name: str) -> None:
    assert said[f"twin: {name}"] == {"75": "", "120": ""}


def test_it_knows_the_operators_that_the_linter_lets_through(said: dict[str, Any]) -> None:
    """And no others of ONNX's, but for those that then want a plugin or a kernel."""
    known = set(said["operators"])
    missing = {"CausalConvWithState", "LinearAttention", "NonMaxSuppression", "NonZero", "RoiAlign"}
    assert known - OPERATORS == missing
    assert OPERATORS - known == {"SimplifiedLayerNormalization"}  # ONNX Runtime's, in ONNX's own domain


def ask(builder: Any, logger: Any, graph: Path, sms: list[int]) -> str | dict[str, str]:
    import tensorrt_rtx as trt

    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        return "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or "no reason"
    answer = {}
    for sm in sms:
        logger.lines.clear()
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
        profile = builder.create_optimization_profile()
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        for each in (i for i in inputs if -1 in tuple(i.shape)):
            shapes = [[size if d == -1 else d for d in each.shape] for size in (1, 2, 4)]
            profile.set_shape(each.name, *shapes)
        config.add_optimization_profile(profile)
        built = builder.build_serialized_network(network, config)
        answer[str(sm)] = "" if built is not None else " | ".join(logger.lines)[:500] or "no reason"
    return answer


def main(folder: Path) -> None:
    import tensorrt_rtx as trt

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    questions = json.loads((folder / "questions.json").read_text())
    answers: dict[str, Any] = {
        q["name"]: ask(builder, logger, folder / str(index) / "model.onnx", q["sms"])
        for index, q in enumerate(questions)
    }
    parser = trt.OnnxParser(builder.create_network(0), logger)
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    answers["operators"] = sorted(name for name in names if parser.supports_operator(name))
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
