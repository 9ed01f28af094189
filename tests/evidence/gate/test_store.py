from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tlexport.errors import RecipeError, StorageError, UndecidedError
from tlexport.evidence import machine
from tlexport.evidence.gate import store
from tlexport.evidence.gate.rule import Session
from tlexport.run import versions

SUBJECT = store.Subject(model="cxr", variant="cpu-int8", batch=1, threads=1)
HERE = {"cpu": "Xeon", "cores": 2, "isa": ["avx2", "avx512f"], "gpus": []}
SUFFIXES = ("json", "sqlite")


def record(kind: str = "baseline", when: int = 0, **changes: object) -> store.Record:
    fields = {
        "kind": kind,
        "recorded": f"2026-01-01T00:00:{when:02d}Z",
        "subject": SUBJECT,
        "machine": HERE,
        "sha256": "0" * 64,
        "sessions": (Session(seconds=1e-3, control=1e-5),) * 5,
    }
    return store.Record.model_validate(fields | changes)


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "folder" / f"baselines.{request.param}"


def test_what_is_appended_is_read_back_in_order(path: Path) -> None:
    assert store.opened(path).records() == () and not path.exists(), "reading makes no file"
    made = [record(), record("run", 1, verdict="pass", value=1.01), record("run", 2, verdict="fail")]
    for each in made:
        store.opened(path).append(each)
    assert store.opened(path).records() == tuple(made)


def test_history_starts_at_the_last_baseline_of_this_subject_on_this_machine() -> None:
    other = store.Subject(model="cxr", variant="cpu-fp32", batch=1, threads=1)
    records = [
        record(when=0),
        record("run", 1),
        record(when=2),
        record(when=3, subject=other),
        record("run", 4),
        record(when=5, machine=HERE | {"cpu": "Epyc"}),
    ]
    assert [r.recorded[-3:-1] for r in store.history(records, SUBJECT, HERE)] == ["02", "04"]


def test_another_machine_is_refused_and_what_differs_is_named() -> None:
    there = HERE | {"cpu": "Epyc", "isa": ["avx2"]}
    with pytest.raises(
        UndecidedError, match=r"another machine .cpu: Xeon, here Epyc; isa: avx2 avx512f, here avx2"
    ) as refused:
        store.history([record()], SUBJECT, there)
    assert "cores" not in str(refused.value) and "--save-baseline" in str(refused.value)


def test_nothing_recorded_names_what_is() -> None:
    with pytest.raises(
        UndecidedError, match=r"no baseline of cxr cpu-int8 at batch 1 on 1 thread .there are: nothing"
    ):
        store.history([], SUBJECT, HERE)
    other = SUBJECT.model_copy(update={"batch": 8})
    with pytest.raises(UndecidedError, match="there are: cxr cpu-int8 at batch 1 on 1 thread"):
        store.history([record()], other, HERE)


WRITER = """
import sys
from pathlib import Path
from tlexport.evidence.gate import store
record = store.Record.model_validate_json(sys.argv[2])
held = store.opened(Path(sys.argv[1]))
for index in range(20):
    held.append(record.model_copy(update={"value": float(index)}))
"""


def test_several_processes_may_write(path: Path) -> None:
    line = [sys.executable, "-c", WRITER, str(path)]
    writers = [
        subprocess.Popen([*line, record("run", who).model_dump_json()], stderr=subprocess.PIPE)
        for who in range(3)
    ]
    for writer in writers:
        assert writer.wait(timeout=120) == 0, writer.stderr and writer.stderr.read()
    records = store.opened(path).records()
    assert len(records) == 60
    for who in range(3):
        own = [r.value for r in records if r.recorded.endswith(f"{who:02d}Z")]
        assert own == list(range(20)), "none lost, in order"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"records": 3}', b"\x00\xff" * 600, b'{"benches": []}']
)
def test_a_broken_or_foreign_file_is_an_error_and_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    if path.suffix == ".sqlite" and not content:
        return  # an empty file is an empty database: SQLite makes one where it is told to
    with pytest.raises(StorageError, match="baselines"):
        store.opened(path).records()
    with pytest.raises(StorageError, match="baselines"):
        store.opened(path).append(record())
    assert path.read_bytes() == content


def test_another_database_and_another_version_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "app.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE users (id)")
    for use in (lambda: store.opened(foreign).records(), lambda: store.opened(foreign).append(record())):
        with pytest.raises(StorageError, match="of something else"):
            use()
    newer, text = tmp_path / "b.sqlite", tmp_path / "b.json"
    store.opened(newer).append(record())
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    text.write_text('{"baselines_version": 99, "records": []}')
    for path in (newer, text):
        with pytest.raises(StorageError, match=r"version 99 .* reads 1"):
            store.opened(path).records()


def test_a_record_that_was_changed_by_hand_is_named(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    store.opened(path).append(record())
    document = json.loads(path.read_text())
    document["records"][0]["sessions"][0]["seconds"] = -1
    path.write_text(json.dumps(document))
    with pytest.raises(StorageError, match=r"sessions.0.seconds"):
        store.opened(path).records()


def test_json_has_a_line_a_record(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    store.opened(path).append(record())
    before = path.read_text().splitlines()
    store.opened(path).append(record("run", 1))
    after = path.read_text().splitlines()
    assert len(after) == len(before) + 1 and after[1].startswith(before[1])


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"ends in .json or .sqlite"):
        store.opened(tmp_path / "baselines.txt")


def test_the_fingerprint_names_no_host_and_stays_the_same() -> None:
    first, second = (store.fingerprint(machine.describe(), versions()) for _ in range(2))
    assert first == second == json.loads(json.dumps(first)), "as it comes back from the store"
    assert {"cpu", "isa", "cores", "memory_gib", "gpus", "onnxruntime-gpu", "numpy"} <= set(first)
    import platform

    assert not platform.node() or platform.node() not in json.dumps(first)
