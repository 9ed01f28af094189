"""Who may import whom: read from the code, not from running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tlexport"
FILES = sorted(PACKAGE.rglob("*.py"))
L0 = {
    "errors",
    "cores",
    "hardware",
    "tensors",
    "targets",
    "recipe",
    "run",
    "progress",
    "results",
    "origin",
    "timings",
}
ROOMS = {
    "baselines",
    "modalities",
    "models",
    "training",
    "graph",
    "backends",
    "evidence",
    "bundle",
    "serving",
}
ALLOWED_BETWEEN_ROOMS = {("training", "models"), ("training", "modalities"), ("baselines", "modalities")}
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "sklearn",
    "scipy",
    "pydicom",
    "rdkit",
    "datamol",
    "transformers",
    "tokenizers",
    "hdrh",
    "pynvml",
    "cryptography",
    "cyclonedx",
    "model_signing",
}
# Modules of these rooms are nothing without torch or onnx; the others import heavy libraries inside functions.
HEAVY_AT_TOP = {"models", "training", "graph", "stages", "flow"}


def imports(tree: ast.AST, *, top_only: bool = False) -> set[str]:
    """Dotted names imported anywhere in the file, or only by statements that run when it is imported."""
    nodes = list(_running(tree)) if top_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _running(tree: ast.AST):
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _running(child)


def violations(room: str, module: str, tree: ast.AST) -> list[str]:
    wrong = []
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] != "tlexport" or len(parts) < 2:
            continue
        other = parts[1]
        if room in L0 and other not in L0:
            wrong.append(f"{module} (L0) imports {name}")
        if (
            room in ROOMS
            and other not in L0 | {room}
            and (room, other) not in ALLOWED_BETWEEN_ROOMS
            and other in ROOMS | {"stages", "cli", "console"}
        ):
            wrong.append(f"{module} (room {room}) imports {name}")
        if room == "stages" and other in {"cli", "console", "flow", "stages"}:
            wrong.append(f"{module} (stage) imports {name}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_layers(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    room = relative.parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert violations(room, relative.as_posix() if len(relative.parts) == 1 else f"{relative}", tree) == []
    if room not in HEAVY_AT_TOP:
        assert {name.split(".")[0] for name in imports(tree, top_only=True)} & HEAVY == set()


def test_a_planted_violation_is_seen() -> None:
    tree = ast.parse("def f():\n    from tlexport.backends import ort\n")
    assert violations("graph", "graph/planted.py", tree)
    assert violations("run", "run.py", tree)
    assert violations("stages", "stages/planted.py", ast.parse("from tlexport.stages import verify\n"))
    assert not violations("stages", "stages/planted.py", tree)


def test_backends_do_not_import_each_other() -> None:
    shared = {
        "receipt",
        "isolation",
        "footprint",
        "registry",
        "capabilities",
        "typed",
        "round_trip",
        "ort_cuda",
        "trt_log",
        "trt_options",
        "trt_progress",
        "trt_runner",
        "inductor_code",
        "torch_threads",
        "signal_stack",
    }
    modules = {path.stem for path in (PACKAGE / "backends").glob("*.py")} - {"__init__"}
    for path in (PACKAGE / "backends").glob("*.py"):
        if path.stem in shared | {"__init__"}:
            continue
        own = {
            name.split(".")[2]
            for name in imports(ast.parse(path.read_text()))
            if name.startswith("tlexport.backends.")
        }
        assert own & modules <= shared | {path.stem}, path.name


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tlexport.cli import app; app(['--help'], standalone_mode=False); "
        "print(sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stderr.strip().splitlines()[-1]))
    assert loaded & (HEAVY | {"numpy", "pydantic", "yaml"}) == set()
    assert "typer" in loaded
