"""What the installed ONNX Runtime cannot run, or runs into wrong numbers without a word: said before it is asked.

Its own tables say which operators, attributes and kernels it has, and a model of one node which versions it
takes; onnx_kernels.py knows what its kernels do with what they do not know.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from exporter.errors import MissingExtra, Refused
from exporter.validate.onnx_file import AGAIN, Place, parse, places
from exporter.validate.onnx_kernels import CPU, CUDA, SHORT, WEBGPU, refuse_node

_OPSETS = 32  # each is tried
_AZURE = "AzureExecutionProvider"  # in every build, and has no kernels
_SECONDS = 60.0
_UPDATE = "pip install --upgrade onnxruntime, or another --target"
_PACKAGES = {
    CUDA: "pip install onnxruntime-gpu in place of onnxruntime",
    WEBGPU: "onnxruntime-web in a browser has it; for Python, onnxruntime-ep-webgpu",
}


# (provider, domain, operator, first version, last)
Kernel = tuple[str, str, str, int, int]


def _kernels(state: Any) -> list[Kernel]:
    """Every kernel of this build. `state`: onnxruntime's native module."""
    return [(k.provider, k.domain, k.op_name, *map(int, k.version_range)) for k in state.get_all_opkernel_def()]


@functools.cache
def _kernels_told() -> list[Kernel]:
    """The same from a process of its own; none where that dies.

    Listing the kernels loads every provider of the build, and one whose libraries are not installed (TensorRT's, in
    onnxruntime-gpu) ends the process: seen with onnxruntime-gpu 1.31.
    """
    code = "import json; from exporter.validate import onnx_rules as r; from onnxruntime.capi import "
    code += "onnxruntime_pybind11_state as s; print(json.dumps(r._kernels(s)))"
    try:
        told = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            timeout=_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return [(p, d, o, int(a), int(b)) for p, d, o, a, b in json.loads(told.stdout)]
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return []


def _by_operator(kernels: list[Kernel], provider: str) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Ranges of versions that the provider or the CPU has a kernel for, by (domain, operator)."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for name, domain, operator, first, last in kernels:
        if name in (provider, CPU):
            found.setdefault((domain, operator), []).append((first, last))
    return found


def require_runnable(graph: Path, provider: str) -> None:
    """Raise one clear line where the installed ONNX Runtime cannot run this graph as it is meant.

    `provider` is the runtime's name of an execution provider; what that has no kernel for, the CPU runs.
    Raises MissingExtra without a runtime, ExporterError for a file that is no model, Refused for the rest.
    """
    runtime = _Runtime(provider)
    if provider not in runtime.providers:
        hint = _PACKAGES.get(provider, f"providers here: {', '.join(runtime.providers)}")
        raise Refused(f"{runtime.name} has no {provider}", hint=hint)
    model = parse(graph)
    runtime.require_versions(graph, model)
    functions = {(f.domain, f.name) for f in model.functions}
    for place in places(graph, model):
        if (place.node.domain, place.node.op_type) in functions:
            continue
        problem = runtime.refuse(place)
        hint = _UPDATE
        if problem is None:
            target = SHORT.get(provider, provider).lower()
            hint = f"exporter quantize ... --format onnx --target {target} makes one for it"
            problem = refuse_node(place, provider)
        if problem:
            raise Refused(f"{graph.name}: {place}: {problem} ({runtime.name})", hint=hint)


class _Runtime:
    """The installed onnxruntime: what it says of itself."""

    def __init__(self, provider: str) -> None:
        try:
            import onnxruntime
            from onnxruntime.capi import onnxruntime_pybind11_state as state
        except ModuleNotFoundError as missing:
            raise MissingExtra("onnxruntime", "onnx", "running an ONNX graph") from missing
        self._ort, self.provider = onnxruntime, provider
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self.providers: list[str] = onnxruntime.get_available_providers()
        self._schemas: dict[tuple[str, str], list[Any]] = {}
        for schema in state.get_all_operator_schema():
            self._schemas.setdefault((schema.domain, schema.name), []).append(schema)
        alone = set(self.providers) <= {CPU, _AZURE}
        self._kernels = _by_operator(_kernels(state) if alone else _kernels_told(), provider)

    def require_versions(self, graph: Path, model: Any) -> None:
        """Refuse a format or an operator set that is newer than the runtime."""
        if not self._loads(model.ir_version, []):
            raise Refused(f"{graph.name}: IR version {model.ir_version} is unknown to {self.name}", hint=_UPDATE)
        everywhere = (*model.opset_import, *(i for f in model.functions for i in f.opset_import))
        wanted = {(str(i.domain), int(i.version)): i for i in everywhere}
        if len(wanted) > _OPSETS:
            raise Refused(f"{graph.name}: imports {len(wanted):,} operator sets", hint=AGAIN)
        for (domain, version), imported in wanted.items():
            if not self._loads(10, [imported]):
                what = f"operator set {version} of {domain[:48] or 'ai.onnx'}"
                raise Refused(f"{graph.name}: {what} is unknown to {self.name}", hint=_UPDATE)

    def _loads(self, ir_version: int, opsets: list[Any]) -> bool:
        """Whether it takes a model of one node with these versions: a thousandth of a second, and no table of ours."""
        from onnx import TensorProto, helper

        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
        one = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", values[:1], values[1:])
        if not any(o.domain in ("", "ai.onnx") for o in opsets):
            opsets = [*opsets, helper.make_opsetid("", 13)]
        model = helper.make_model(one, opset_imports=opsets, ir_version=ir_version)
        options = self._ort.SessionOptions()
        options.log_severity_level = 4
        self._ort.set_default_logger_severity(4)
        try:
            self._ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
        except Exception:  # pybind's own kinds, one for each status code
            return False
        finally:
            self._ort.set_default_logger_severity(2)
        return True

    def refuse(self, place: Place) -> str | None:
        """The operator, its attributes and inputs, and a kernel: what of it this runtime lacks, or None."""
        node, domain = place.node, place.domain
        opset = place.scope.opsets.get(domain)
        if opset is None:
            return f"its operator set {domain or 'ai.onnx'!r} is not imported by the graph"
        known = [s for s in self._schemas.get((domain, node.op_type), ()) if s.since_version <= opset]
        schema = max(known, key=lambda s: int(s.since_version), default=None)
        if schema is None or schema.deprecated:
            return f"no such operator in {domain or 'ai.onnx'} {opset}"
        for attribute in node.attribute:
            if attribute.name not in schema.attributes:
                return f"the operator has no attribute {attribute.name[:48]!r} here"
            wanted = schema.attributes[attribute.name].type
            if not attribute.ref_attr_name and int(wanted) != attribute.type:
                return f"the attribute {attribute.name[:48]!r} is not of type {wanted.name}"
        if len(node.input) > schema.max_input:
            return f"{len(node.input)} inputs; the operator takes {schema.max_input} here"
        since = int(schema.since_version)
        ranges = self._kernels.get((domain, node.op_type), [])
        if not self._kernels:
            return None  # it would not say: the session itself will
        if any(first <= since <= last for first, last in ranges) or self._needs_no_kernel(place):
            return None
        where = SHORT.get(self.provider, self.provider)
        return f"no kernel computes it on {where}" + ("" if self.provider == CPU else " or CPU")

    def _needs_no_kernel(self, place: Place) -> bool:
        """Constants become initializers, and some operators are functions of others."""
        import onnx

        if place.node.op_type == "Constant" and place.domain == "":
            return True
        try:
            schema = onnx.defs.get_schema(place.node.op_type, place.scope.opsets[place.domain], place.domain)
        except onnx.defs.SchemaError:
            return False
        return any(getattr(schema, name) for name in ("has_function", "has_context_dependent_function"))
