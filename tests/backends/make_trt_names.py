"""Write the names that an official TensorRT binding offers: python tests/backends/make_trt_names.py VERSION...

NVIDIA's libraries are not needed: the bindings ask them for nine functions, which a stub stands in for, and nothing is
called. Layers and plugins are left out. One line for each class, in trt_names/<version>.txt; the module is the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "trt_names"
PACKAGE = "tensorrt-cu13-bindings"
MODULE = "(module)"
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def listed(module: object) -> str:
    """The module's public names and the members of its classes, a line each."""
    names = _public(module)
    lines = [f"{MODULE}: {' '.join(names)}"]
    for name, value in names.items():
        if isinstance(value, type) and not name.endswith("Layer") and "Plugin" not in name:
            members = _public(value)
            inner = {f"{name}.{n}": m for n, m in members.items() if isinstance(m, type)}
            lines += [f"{n}: {' '.join(_public(m))}" for n, m in {name: value, **inner}.items()]
    return "\n".join(lines) + "\n"


def _public(thing: object) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in dir(thing) if not name.startswith("_")}


def read(text: str) -> dict[str, set[str]]:
    """Class -> its members, of what `listed` wrote."""
    lines = (line.partition(": ") for line in text.splitlines())
    return {name: set(members.split()) for name, _, members in lines}


def of_wheel(version: str) -> str:
    """The names of the official wheel. Raises CalledProcessError if pip cannot fetch it or a C compiler is missing."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        wanted = [f"{PACKAGE}=={version}", "-d", folder]
        run([sys.executable, "-m", "pip", "download", *quiet, *wanted])
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        stub = Path(folder) / "stub.c"
        stub.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
        for name in LIBRARIES:
            file = f"lib{name}.so.{version.split('.')[0]}"
            run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", f"{folder}/{file}", str(stub)])
        code = "import tensorrt_bindings, make_trt_names; print(make_trt_names.listed(tensorrt_bindings), end='')"
        paths = os.pathsep.join([folder, str(Path(__file__).parent)])
        return run([sys.executable, "-c", code], LD_LIBRARY_PATH=folder, PYTHONPATH=paths)


def run(command: list[str], **variables: str) -> str:
    environment = os.environ | variables
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


if __name__ == "__main__":
    for version in sys.argv[1:]:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{version}.txt").write_text(of_wheel(version))
