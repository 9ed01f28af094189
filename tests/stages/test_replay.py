"""verify BUNDLE: hashes, golden samples on this machine, and a changed answer that is told from the model's own error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from pipeline import RTX, Built, Ended

from tlexport.run import digest

Cli = Callable[..., Ended]


def resealed(bundle: Path, name: str) -> None:
    """Make the manifest agree with a changed file, as somebody who can write the bundle could."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    document["files"][name] = {
        "sha256": digest(bundle / name),
        "bytes": (bundle / name).stat().st_size,
    }
    path.write_text(json.dumps(document))


def test_a_bundle_answers_as_it_was_verified(built: Built, tlx: Cli) -> None:
    done = tlx("verify", built.bundle, "--json")
    assert done.code == 0, done.err
    jsonschema.validate(done.json, tlx("schema", "replay").json)
    own = done.json["targets"]["cpu"]
    assert own["verdict"] == "pass" and own["max_abs_error"] <= own["limit"] and own["flips"] == 0
    assert own["variant"]["drop_high"] is not None and done.json["decision"]["rule"]
    if RTX:
        assert done.json["targets"]["sm89"]["verdict"] == "not run here"
        assert "cannot run sm89 on this machine" in done.json["targets"]["sm89"]["reason"]
    told = tlx("verify", built.bundle)
    assert told.code == 0 and "every hash as packaged" in told.out and "pass" in told.out


def test_a_changed_byte_is_refused_before_anything_runs(bundle_copy: Path, tlx: Cli) -> None:
    golden = bundle_copy / "golden/outputs.npy"
    content = bytearray(golden.read_bytes())
    content[-1] ^= 1
    golden.write_bytes(content)
    done = tlx("verify", bundle_copy)
    assert done.code == 11 and "golden/outputs.npy was altered" in done.err


def test_another_models_answers_fail(bundle_copy: Path, tlx: Cli) -> None:
    """Planted: the golden answers are those of a model whose classes are turned around; the hashes agree."""
    golden = bundle_copy / "golden/outputs.npy"
    np.save(golden, np.load(golden)[:, ::-1].copy())
    resealed(bundle_copy, "golden/outputs.npy")
    done = tlx("verify", bundle_copy, "--json")
    assert done.code == 10, done.err
    own = done.json["targets"]["cpu"]
    assert own["verdict"] == "fail" and own["flips"] > 0 and "from the reference" in own["reason"]


def test_a_small_difference_beyond_the_verified_error_fails(bundle_copy: Path, tlx: Cli) -> None:
    """Planted: answers off by twice the limit, which changes no decision."""
    limit = tlx("verify", bundle_copy, "--json").json["targets"]["cpu"]["limit"]
    golden = bundle_copy / "golden/outputs.npy"
    outputs = np.load(golden)
    outputs[0, 0] += 2 * limit
    np.save(golden, outputs)
    resealed(bundle_copy, "golden/outputs.npy")
    done = tlx("verify", bundle_copy, "--json")
    assert done.code == 10 and done.json["targets"]["cpu"]["verdict"] == "fail"


def test_gates_of_a_bundle_cannot_be_changed(built: Built, tlx: Cli) -> None:
    done = tlx("verify", built.bundle, "--max-drop", "0.5")
    assert done.code == 2 and "its gates are packed with it" in done.err


@pytest.mark.skipif(not RTX, reason="needs a variant that cannot run here")
def test_where_nothing_can_run_nothing_is_proven(bundle_copy: Path, tlx: Cli) -> None:
    path = bundle_copy / "manifest.json"
    document = json.loads(path.read_text())
    for name in [name for name in document["files"] if name.startswith("models/cpu/")]:
        (bundle_copy / name).unlink()
        del document["files"][name]
    (bundle_copy / "models/cpu").rmdir()
    del document["targets"]["cpu"]
    path.write_text(json.dumps(document))
    done = tlx("verify", bundle_copy)
    assert done.code == 14 and "cannot run sm89 on this machine" in done.err
