"""The run directory: paths, the manifest, atomic writes, locks, and skipping what is unchanged.

run/ recipe.yaml checkpoint/ graphs/ golden/ variants/<name>/ verify.json bench.json report.html
     manifest.json      every stage: config, input and output hashes, versions, seconds, result
     predictions/       what each variant answered to the test split
     cache/             prepared data and features; may be deleted at any time
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from tlexport.errors import RunError, StorageError
from tlexport.recipe import Recipe, parse

MANIFEST_VERSION = 1
RECORDED_VERSIONS = (
    "tlexport",
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt-rtx",
    "tensorrt",
    "numpy",
    "polars",
    "scikit-learn",
    "lightgbm",
    "skl2onnx",
    "onnxmltools",
)
_PARTIAL = ".partial"

ResultT = TypeVar("ResultT", bound=BaseModel)


class Run:
    """One model's directory. Open an existing one with `Run(path)`, make one with `Run.create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "recipe.yaml").is_file():
            raise RunError(
                f"{self.path} is not a run (no recipe.yaml in it); start one with: tlexport finetune RECIPE --out {self.path}"
            )

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe) -> Run:
        """Make the directory, or take up the one that is there if it holds the same recipe.

        Raises RunError if the directory holds something else, StorageError if it cannot be written.
        """
        path = Path(path)
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            held = _read_recipe(path / "recipe.yaml") if (path / "recipe.yaml").is_file() else None
            if held is None:
                _require_empty(path)
            elif held != recipe and _begun(path):
                raise RunError(
                    f"{path} holds a run of another recipe ({_difference(held, recipe)}); choose another --out or remove it"
                )
            if held != recipe:
                write_text(path / "recipe.yaml", recipe.to_yaml())
        return cls(path)

    @cached_property
    def recipe(self) -> Recipe:
        return _read_recipe(self.path / "recipe.yaml")

    def __truediv__(self, relative: str) -> Path:
        return self.path / relative

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands on disk."""
        path = self / "manifest.json"
        if not path.is_file():
            return {"manifest_version": MANIFEST_VERSION, "stages": {}}
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunError(
                f"{path} is not valid JSON ({error}); remove it to run the stages again"
            ) from error
        if document.get("manifest_version") != MANIFEST_VERSION:
            raise RunError(
                f"{path} has version {document.get('manifest_version')}, this tlexport reads {MANIFEST_VERSION}"
            )
        return document

    def result(self, stage: str, kind: type[ResultT]) -> ResultT:
        """What a finished stage returned. Raises RunError naming the command that would make it."""
        record = self.manifest["stages"].get(stage)
        if record is None:
            raise RunError(f"{self.path} has no finished {stage} stage; run: tlexport {stage} {self.path}")
        return kind.model_validate(record["result"])

    def require_unchanged(self, stage: str) -> None:
        """Raises RunError unless all that a finished stage read and made is still what the manifest records."""
        record = self.manifest["stages"].get(stage)
        if record is None:
            raise RunError(f"{self.path} has no finished {stage} stage; run: tlexport {stage} {self.path}")
        for relative, recorded in {**record["inputs"], **record["outputs"]}.items():
            path = self / relative
            if not path.exists() or digest(path) != recorded:
                raise RunError(f"{path} is not what {stage} left; run: tlexport build {self.path}")

    def require(self, relative: str, stage: str) -> Path:
        """The path of something an earlier stage made. Raises RunError naming that stage's command."""
        path = self / relative
        if not path.exists():
            raise RunError(f"{self.path} has no {relative}; run: tlexport {stage} {self.path}")
        return path

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. Raises RunError if another one holds it."""
        with storage_errors(self.path), (self / ".lock").open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"{self.path} is in use by another tlexport process; wait for it or choose another run"
                ) from error
            yield

    def stage(self, name: str, config: dict[str, Any], inputs: list[Path]) -> StageRecord:
        return StageRecord(self, name, config, inputs)

    def relative(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()


class StageRecord:
    """A stage's entry in the manifest: what it read, what it made, and whether it can be skipped."""

    def __init__(self, run: Run, name: str, config: dict[str, Any], inputs: list[Path]) -> None:
        self.run = run
        self.name = name
        self.config = json.loads(json.dumps(config, sort_keys=True, default=str))
        self.inputs = {run.relative(path): digest(_existing(run, path)) for path in inputs}
        self.started = time.monotonic()

    def unchanged(self, kind: type[ResultT]) -> ResultT | None:
        """The stored result, if config, inputs, versions and outputs are all as recorded."""
        record = self.run.manifest["stages"].get(self.name)
        if record is None or any(record[key] != value for key, value in self._key().items()):
            return None
        for relative, recorded in record["outputs"].items():
            path = self.run / relative
            if not path.exists() or digest(path) != recorded:
                return None
        return kind.model_validate(record["result"])

    def finish(self, result: BaseModel, outputs: list[Path]) -> None:
        """Write the record. Outputs must already stand under their final names."""
        document = self.run.manifest
        document["stages"][self.name] = {
            **self._key(),
            "outputs": {self.run.relative(path): digest(path) for path in outputs},
            "seconds": round(time.monotonic() - self.started, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "result": result.model_dump(mode="json"),
        }
        write_json(self.run / "manifest.json", document)

    def _key(self) -> dict[str, Any]:
        return {"config": self.config, "inputs": self.inputs, "versions": versions()}


def _existing(run: Run, path: Path) -> Path:
    if not path.exists():
        raise RunError(f"{path} is missing; run: tlexport build {run.path}")
    return path


def versions() -> dict[str, str]:
    """Installed versions of what can change a result, and the Python that runs."""
    found = {"python": platform.python_version()}
    for name in RECORDED_VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a directory's relative names and contents in sorted order."""
    if path.is_dir():
        whole = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            whole.update(f"{file.relative_to(path).as_posix()}\0{digest(file)}\n".encode())
        return whole.hexdigest()
    with path.open("rb") as handle:
        return (
            hashlib.file_digest(handle, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest_blocks(handle)
        )


def _digest_blocks(handle: Any) -> str:
    whole = hashlib.sha256()
    while block := handle.read(1 << 20):
        whole.update(block)
    return whole.hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into StorageError with what to do."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again, it resumes",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, it resumes",
            errno.EFBIG: "the file would be larger than the limit set for this process (ulimit -f)",
            errno.EACCES: "permission denied; choose a directory you can write to",
            errno.EPERM: "not permitted; choose a directory you can write to",
            errno.EROFS: "the file system is read-only; choose another directory",
            errno.ENOTDIR: "a part of the path is a file, not a directory; choose another directory",
            errno.ENAMETOOLONG: "a name in the path is too long; choose a shorter one",
            errno.EEXIST: "a file of that name is in the way; choose another directory",
            errno.EISDIR: "a directory of that name is in the way; choose another directory",
            errno.ELOOP: "links in the path lead round in a circle; choose another directory",
        }
        if _cannot_be_made(error, path):
            reasons[errno.ENOENT] = "no file or directory can be made there; choose another directory"
        if error.errno not in reasons:
            raise
        # Of a copy or a rename, the second is where it goes.
        written = error.filename2 or error.filename or path
        raise StorageError(f"cannot write {written}: {reasons[error.errno]}") from error


def _cannot_be_made(error: OSError, path: Path) -> bool:
    """Whether what was not found is `path` itself, what holds it or what is written beside it: no input that is missing."""
    made = Path(error.filename) if isinstance(error.filename, str) else path
    return made.parent == path.parent or made in (path, *path.parents)


@contextlib.contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A path beside `final` to write a file or a directory to; on success it takes `final`'s name, else it is removed.

    Files are flushed to the disk before the rename, so that a power cut leaves the old or the new one. A directory
    that is there is moved aside first and removed last: half of one never stands under `final`.
    """
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f".{final.name}{_PARTIAL}")
        replaced = final.with_name(f".{final.name}.replaced{_PARTIAL}")
        _tidy(final, partial, replaced)
        try:
            yield partial
            for file in [partial, *partial.rglob("*")] if partial.is_dir() else [partial]:
                flush(file)
            if final.is_dir():
                final.rename(replaced)
            partial.rename(final)
            flush(final.parent)
        finally:
            _tidy(final, partial, replaced)


def _tidy(final: Path, partial: Path, replaced: Path) -> None:
    """Remove what a replacement left behind; one that was stopped between its two renames is taken back."""
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    _remove(partial)
    _remove(replaced)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file of the run. Raises RunError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """What was written of a file, or renamed in a folder, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_recipe(path: Path) -> Recipe:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid YAML ({error})") from error
    return parse(document if isinstance(document, dict) else {}, [], origin=str(path))


def _require_empty(path: Path) -> None:
    strangers = sorted(entry.name for entry in path.iterdir() if not entry.name.endswith(_PARTIAL))
    if strangers:
        raise RunError(
            f"{path} is not empty and is not a run (it holds {', '.join(strangers[:5])}); choose another --out"
        )


def _begun(path: Path) -> bool:
    """Whether a run holds any work that another recipe would throw away."""
    return (path / "manifest.json").exists() or any((path / "training").glob("*"))


def _difference(old: Recipe, new: Recipe) -> str:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    keys = [key for key in after if before.get(key) != after[key]]
    return f"different: {', '.join(keys)}"
