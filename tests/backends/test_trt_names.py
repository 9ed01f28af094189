"""Every name of TensorRT's bindings that the code uses exists in each version: read from the code, not from running it.

TensorRT itself cannot be installed everywhere; what its official bindings offer is kept in trt_names (make_trt_names.py).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import shutil
import subprocess
import textwrap
from dataclasses import dataclass, field

import make_trt_names
import pytest
from make_trt_names import FOLDER, MODULE

from tlexport.backends import trt, trt_options, trt_progress, trt_runner

SOURCES = (trt, trt_options, trt_progress, trt_runner)
VERSIONS = sorted(path.stem for path in FOLDER.glob("*.txt"))
# Variable, parameter or field -> the class of what it holds.
HOLDS = {
    "trt": MODULE,
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "e": "ParserError",
    "engine": "ICudaEngine",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "runtime": "Runtime",
    "runtime_cache": "IRuntimeCache",
    "runtime_config": "IRuntimeConfig",
    "shapes": "IOptimizationProfile",
}
ONLY_IN = {("_optimization_profile", "tensor"): "ITensor"}  # where a name means something else elsewhere
# What calls give that is no object of TensorRT's: names, lists, numbers, enumerators.
PLAIN = {"dtype", "errors", "found", "limit", "made", "names"}
ONLY_RTX = {
    (MODULE, "ComputeCapability"),
    (MODULE, "CudaGraphStrategy"),
    (MODULE, "DynamicShapesKernelSpecializationStrategy"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("IRuntimeCache", "deserialize"),
    ("IRuntimeCache", "serialize"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "set_runtime_cache"),
}
Names = dict[str, set[str]]


@dataclass
class Uses:
    """`needed` and `optional` (behind hasattr or getattr with a default): (class, name). `unknown`: what cannot be followed."""

    needed: set[tuple[str, str]] = field(default_factory=set)
    optional: set[tuple[str, str]] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)

    def read(self, source: str, known: Names) -> Uses:
        for node in ast.parse(source).body:
            for function in [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef)] or [node]:
                self._read(function, getattr(function, "name", ""), known)
        return self

    def _read(self, scope: ast.AST, function: str, known: Names) -> None:
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute):
                self._holder(node, function, known)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                self._looked_up(node, node.func.id, function, known)
            elif isinstance(node, ast.Assign):
                self._followed(node.targets[0], node.value, function, known)
            elif isinstance(node, (ast.comprehension, ast.For)):
                self._followed(node.target, node.iter, function, known)
            elif isinstance(node, ast.NamedExpr):
                self._followed(node.target, node.value, function, known)

    def _holder(self, node: ast.AST, function: str, known: Names) -> str:
        """The class of what an expression holds; empty if it is none of TensorRT's. Takes down what is read on the way."""
        if isinstance(node, ast.Name):
            return ONLY_IN.get((function, node.id)) or HOLDS.get(node.id, "")
        if isinstance(node, ast.Call):  # an instance, of a class that is called
            made = self._holder(node.func, function, known)
            return made if made != MODULE and made in known else ""
        if not isinstance(node, ast.Attribute):
            return ""
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return HOLDS.get(node.attr, "")
        if not (holder := self._holder(node.value, function, known)):
            return ""
        self.needed.add((holder, node.attr))
        inner = node.attr if holder == MODULE else f"{holder}.{node.attr}"
        return inner if inner in known else ""

    def _looked_up(self, call: ast.Call, name: str, function: str, known: Names) -> None:
        """hasattr(x, "name") and getattr(x, "name", default)."""
        constant = name in ("hasattr", "getattr") and isinstance(call.args[1], ast.Constant)
        if constant and (holder := self._holder(call.args[0], function, known)):
            found = self.optional if name == "hasattr" or len(call.args) == 3 else self.needed
            found.add((holder, call.args[1].value))

    def _followed(self, target: ast.expr, value: ast.expr, function: str, known: Names) -> None:
        """What a call gave must have a name that this test knows the class of."""
        given = any(
            isinstance(n, ast.Call)
            and isinstance(n.func, ast.Attribute)
            and self._holder(n.func.value, function, known)
            for n in ast.walk(value)
        )
        if given and isinstance(target, ast.Name):
            held = ONLY_IN.get((function, target.id)) or HOLDS.get(target.id)
            if not held and target.id not in PLAIN:
                self.unknown.append(f"{function}: {target.id}")


def missing(uses: Uses, known: Names, allowed: set[tuple[str, str]]) -> list[str]:
    return sorted(
        f"{holder}.{name}"
        for holder, name in uses.needed - allowed
        if not name.startswith("__") and name not in known.get(holder, set())
    )


def committed(version: str) -> Names:
    return make_trt_names.read((FOLDER / f"{version}.txt").read_text())


def uses_of_the_code(known: Names) -> Uses:
    uses = Uses()
    for module in SOURCES:
        uses.read(inspect.getsource(module), known)
    return uses


def rtx() -> Names:
    if not trt.RTX.availability().installed:
        pytest.skip("tensorrt-rtx is not installed")
    return make_trt_names.read(make_trt_names.listed(importlib.import_module("tensorrt_rtx")))


def test_the_code_is_followed_to_the_end() -> None:
    uses = uses_of_the_code(committed(VERSIONS[-1]))
    assert uses.unknown == [] and len(uses.needed) > 50
    assert {holder for holder, _ in uses.needed} >= set(HOLDS.values()) - {"IRuntimeCache", "IRuntimeConfig"}
    assert ("ILogger.Severity", "ERROR") in uses.needed


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_exists_in_tensorrt(version: str) -> None:
    known = committed(version)
    assert missing(uses_of_the_code(known), known, ONLY_RTX) == []


def test_every_name_exists_in_tensorrt_rtx() -> None:
    known = rtx()
    assert missing(uses_of_the_code(known), known, set()) == []


def test_what_is_looked_for_exists_somewhere() -> None:
    libraries = [committed(version) for version in VERSIONS]
    uses = uses_of_the_code(libraries[0])
    assert uses.optional == {("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")}
    for holder, name in uses.optional:
        assert any(name in known.get(holder, ()) for known in libraries)


def test_what_is_said_to_be_in_rtx_only_is_used_and_nowhere_else() -> None:
    used = uses_of_the_code(rtx()).needed
    for holder, name in ONLY_RTX:
        assert (holder, name) in used
        assert not any(name in committed(version).get(holder, ()) for version in VERSIONS)


@pytest.mark.parametrize(
    "planted, found",
    [
        ("config.builder_optimisation_level = 3", "IBuilderConfig.builder_optimisation_level"),
        ("config.set_flag(trt.BuilderFlag.TF33)", "BuilderFlag.TF33"),
        ("context = engine.create_context()", "ICudaEngine.create_context"),
        ("trt.Builder(log).create_nothing()", "Builder.create_nothing"),
        ("[parser.get_fault(i) for i in range(3)]", "OnnxParser.get_fault"),
        ("getattr(trt, 'Bilder')", "(module).Bilder"),
        ("self.context.execute_async_v9(0)", "IExecutionContext.execute_async_v9"),
        ("trt.ILogger.Severity.FATAL", "ILogger.Severity.FATAL"),
        ("config.int8_calibrator = None", "IBuilderConfig.int8_calibrator"),
    ],
)
def test_a_planted_name_is_seen(planted: str, found: str) -> None:
    """The last one is real, in TensorRT 10 alone."""
    known = committed(VERSIONS[-1])
    source = f"def build(trt, log, config, engine, parser, self):\n{textwrap.indent(planted, '    ')}\n"
    assert missing(Uses().read(source, known), known, ONLY_RTX) == [found]


def test_an_object_under_a_new_name_is_asked_about() -> None:
    known = committed(VERSIONS[-1])
    source = (
        "def build(engine):\n    inspector = engine.create_engine_inspector()\n    inspector.anything()\n"
    )
    assert Uses().read(source, known).unknown == ["build: inspector"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_names_are_those_of_the_official_wheel(version: str) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler for the stub of the libraries")
    try:
        listed = make_trt_names.of_wheel(version)
    except subprocess.CalledProcessError as error:
        if "pip" not in error.cmd:
            raise
        pytest.skip(
            f"pip cannot fetch {make_trt_names.PACKAGE} {version} here: {error.stderr.strip()[-200:]}"
        )
    assert make_trt_names.read(listed) == committed(version)
