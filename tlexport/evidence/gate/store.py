"""Where baselines and the runs held against them are kept: an SQLite file, or a JSON file to be kept in git.

Both only ever grow. A record is keyed by what was timed and on what kind of machine; no host, user or path name is in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from tlexport.errors import RecipeError, StorageError, UndecidedError
from tlexport.evidence.gate.rule import Session
from tlexport.evidence.machine import Machine
from tlexport.run import storage_errors, write_text

VERSION = 1
DEFAULT = Path(".tlexport/baselines.sqlite")
SQLITE = (".sqlite", ".sqlite3", ".db")
WAIT_S = 30.0  # for another writer
# Packages whose version changes what is timed.
RUNTIMES = ("onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch", "numpy")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Subject(Frozen):
    """What was timed. The file itself is not in the key: it is what changes from build to build."""

    model: str
    variant: str
    batch: int
    threads: int

    def __str__(self) -> str:
        return f"{self.model} {self.variant} at batch {self.batch} on {self.threads} thread{'s' * (self.threads > 1)}"


class Record(Frozen):
    """One recording: sessions of one build on one machine."""

    kind: Literal["baseline", "run"]
    recorded: str  # UTC, ISO 8601
    subject: Subject
    machine: dict[str, Any]  # see `fingerprint`
    sha256: str  # of the artifact
    sessions: tuple[Session, ...]
    verdict: Literal["pass", "fail", "undecided", ""] = ""  # of a run; a baseline has none
    value: float | None = None  # of a run: the ratio, with its interval
    low: float | None = None
    high: float | None = None


class Store(Protocol):
    def append(self, record: Record) -> None: ...

    def records(self) -> tuple[Record, ...]:
        """All of them, oldest first. Raises StorageError if the file is broken or not ours."""
        ...


def opened(path: Path) -> Store:
    """The store in `path`, by its suffix; made when something is first written. Raises RecipeError for another suffix."""
    if path.suffix == ".json":
        return JsonStore(path)
    if path.suffix in SQLITE:
        return SqliteStore(path)
    raise RecipeError(f"{path}: a file of baselines ends in .json or {', '.join(SQLITE)}")


def fingerprint(machine: Machine, versions: Mapping[str, str]) -> dict[str, Any]:
    """What times depend on and a machine keeps: its processors, memory and libraries."""
    return {
        "cpu": machine.cpu,
        "architecture": machine.architecture,
        "isa": list(machine.isa),
        "cores": machine.usable_cores,
        "quota_cores": machine.quota_cores,
        "memory_gib": round(machine.memory_gib),
        "gpus": [gpu.name for gpu in machine.gpus],
        "drivers": sorted({gpu.driver for gpu in machine.gpus if gpu.driver}),
        "system": machine.system,
        "python": ".".join(versions["python"].split(".")[:2]),
        **{name: versions.get(name) for name in RUNTIMES},
    }


def history(records: Sequence[Record], subject: Subject, machine: Mapping[str, Any]) -> tuple[Record, ...]:
    """The baseline in force and the runs since then, oldest first.

    Raises UndecidedError, which names what differs, if none was recorded for this subject on such a machine.
    """
    own = [record for record in records if record.subject == subject]
    here = [record for record in own if record.machine == machine]
    starts = [index for index, record in enumerate(here) if record.kind == "baseline"]
    if starts:
        return tuple(here[starts[-1] :])
    recorded = [record for record in own if record.kind == "baseline"]
    if recorded:
        raise UndecidedError(
            f"undecided: the baseline of {subject} was recorded on another machine ({_difference(recorded[-1].machine, machine)}); "
            "record one here with --save-baseline"
        )
    known = ", ".join(sorted({str(record.subject) for record in records})) or "nothing"
    raise UndecidedError(
        f"undecided: no baseline of {subject} (there are: {known}); record one with --save-baseline"
    )


def _difference(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    keys = [key for key in {**recorded, **here} if recorded.get(key) != here.get(key)]
    return "; ".join(f"{key}: {_shown(recorded.get(key))}, here {_shown(here.get(key))}" for key in keys)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


class SqliteStore:
    """A table with a row a record. SQLite's own locks keep writers apart."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Record) -> None:
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists() or self.path.stat().st_size == 0
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            version, tables = self._state(connection)
            if fresh and not tables:
                connection.execute("CREATE TABLE records (id INTEGER PRIMARY KEY, document TEXT NOT NULL)")
                connection.execute(f"PRAGMA user_version = {VERSION}")
            else:
                self._require_ours(version, tables)
            connection.execute("INSERT INTO records (document) VALUES (?)", (record.model_dump_json(),))
            connection.execute("COMMIT")

    def records(self) -> tuple[Record, ...]:
        if not self.path.exists():
            return ()
        with self._connected() as connection:
            version, tables = self._state(connection)
            self._require_ours(version, tables)
            rows = connection.execute("SELECT document FROM records ORDER BY id").fetchall()
        return tuple(_parsed(document, self.path) for (document,) in rows)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)
        except sqlite3.Error as error:
            raise StorageError(f"{self.path} cannot be opened: {error}") from error
        try:
            yield connection
        except sqlite3.Error as error:
            raise StorageError(
                f"{self.path} cannot be used as a store of baselines: {error}; name another file, or restore it"
            ) from error
        finally:
            connection.close()

    def _state(self, connection: sqlite3.Connection) -> tuple[int, set[str]]:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return version, {name for (name,) in rows}

    def _require_ours(self, version: int, tables: set[str]) -> None:
        if "records" not in tables:
            raise StorageError(
                f"{self.path} is a database of something else; name another file for baselines"
            )
        _require_version(version, self.path)


class JsonStore:
    """{"baselines_version": 1, "records": [...]}, a line a record, so that a change reads well in git. Replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Record) -> None:
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.parent):
                lines = [held.model_dump_json() for held in (*self.records(), record)]
                body = ",\n".join(lines)
                write_text(self.path, f'{{"baselines_version": {VERSION}, "records": [\n{body}\n]}}\n')

    def records(self) -> tuple[Record, ...]:
        if not self.path.exists():
            return ()
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise StorageError(
                f"{self.path} is not JSON ({error}); restore it, or name another file for baselines"
            ) from error
        if not isinstance(document, dict) or not isinstance(document.get("records"), list):
            raise StorageError(f"{self.path} is JSON of something else; name another file for baselines")
        _require_version(document.get("baselines_version"), self.path)
        return tuple(_parsed(json.dumps(held), self.path) for held in document["records"])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other writers of JSON stores in it; a lock file beside one kept in git would be in the way."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _require_version(version: Any, path: Path) -> None:
    if version != VERSION:
        raise StorageError(
            f"{path} has version {version} of the store of baselines, this tlexport reads {VERSION}"
        )


def _parsed(document: str, path: Path) -> Record:
    try:
        return Record.model_validate_json(document)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"])) or "record"
        raise StorageError(f"{path} holds a record that cannot be read ({where}: {detail['msg']})") from error
