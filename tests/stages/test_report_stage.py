"""The report of a finished run: what it rests on, what it refuses to draw, and what it keeps to itself."""

from __future__ import annotations

import hashlib
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pipeline import Built

from tlexport.errors import RunError
from tlexport.progress import Silent
from tlexport.recipe import Recipe, with_overrides
from tlexport.run import Run, write_json
from tlexport.stages import package, report


def made(run: Run, *overrides: str) -> str:
    found = report.run(run, with_overrides(run.recipe, list(overrides)), Silent())
    return Path(found.path).read_text(encoding="utf-8")


def flipped(run: Run) -> np.ndarray:
    """Plant a variant whose decisions flip, in verify.json and its predictions; the rows that do."""
    verified = json.loads((run / "verify.json").read_text())
    chosen = next(v for v in verified["variants"] if v["max_abs_error"] is not None)
    outputs = np.load(run / "reference/outputs.npy")
    rows = np.arange(0, len(outputs), 7)
    outputs[rows] = np.roll(outputs[rows], 1, axis=1)
    error = float(np.abs(outputs.astype(float) - np.load(run / "reference/outputs.npy").astype(float)).max())
    for variant in verified["variants"]:
        if variant["max_abs_error"] is not None:
            np.save(run / f"predictions/{variant['name']}.npy", outputs)
            variant |= {"max_abs_error": error, "flips": len(rows)}
    write_json(run / "verify.json", verified)
    assert chosen
    return rows


def test_every_file_it_rests_on_is_named_with_its_hash(run_copy: Run) -> None:
    found = report.run(run_copy, run_copy.recipe, Silent())
    text = Path(found.path).read_text(encoding="utf-8")
    assert found.bytes == len(text.encode()) and found.path == str(run_copy / "report.html")
    assert {"bench.json", "verify.json", "recipe.yaml", "reference/outputs.npy", "bench-samples.npz"} <= set(
        found.sources
    )
    assert any(name.startswith("predictions/") for name in found.sources)
    assert any(name.endswith("receipt.json") for name in found.sources)
    for name, recorded in found.sources.items():
        assert hashlib.sha256((run_copy / name).read_bytes()).hexdigest() == recorded
        assert f"<code>{recorded}</code>" in text
    assert (
        "changed since" not in text and "as verify recorded it" in text and "as finetune recorded it" in text
    )


def test_what_is_shown_was_read_from_the_files(run_copy: Run) -> None:
    bench = json.loads((run_copy / "bench.json").read_text())
    variant = next(v for v in bench["variants"] if v["p50_ms"])
    variant["p50_ms"] = 123.456
    write_json(run_copy / "bench.json", bench)
    text = made(run_copy)
    assert "123" in text and "changed since bench recorded it" in text


def test_gates_are_those_that_were_applied_and_what_a_command_line_changed_is_told(run_copy: Run) -> None:
    verified = json.loads((run_copy / "verify.json").read_text())
    verified["gates"]["max_drop"] = 0.0625
    write_json(run_copy / "verify.json", verified)
    text = made(run_copy, "gates.max_drop=0.125", "report.flips=3")
    assert "gates.max_drop=0.125, report.flips=3" in text and "changed for this build" in text
    asked = text[text.index('<section id="asked"') : text.index('<section id="choice"')]
    assert '<td class="number">0.0625</td>' in asked
    assert "changed for this build" not in made(run_copy)


def test_time_lines_are_drawn_of_when_the_calls_were_made(run_copy: Run) -> None:
    with np.load(run_copy / "bench-samples.npz", allow_pickle=False) as raw:
        timed = [name for name in raw.files if not name.startswith(report.STARTED)]
        assert timed and all(len(raw[report.STARTED + name]) == len(raw[name]) for name in timed)
        assert all(np.all(np.diff(raw[report.STARTED + name]) > 0) for name in timed)
        bare = {name: raw[name] for name in timed}
    text = made(run_copy)
    assert "latency of every variant over time" in text
    np.savez(run_copy / "bench-samples.npz", **bare)  # as earlier versions wrote it
    assert "latency of every variant over time" not in made(run_copy)


@pytest.mark.parametrize("damage", ["truncated", "empty", "shape", "values", "samples"])
def test_answers_that_verify_did_not_judge_are_an_error_and_not_a_plot(run_copy: Run, damage: str) -> None:
    (run_copy / "report.html").unlink()
    path = sorted((run_copy / "predictions").glob("*.npy"))[0]
    outputs = np.load(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "shape":
        np.save(path, outputs[:-1])
    elif damage == "values":
        np.save(path, outputs + np.float32(0.125))
    else:
        path = run_copy / "bench-samples.npz"
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match=r"(?s)" + re.escape(path.name) + ".*(run: tlexport (verify|bench))"):
        made(run_copy)
    assert not (run_copy / "report.html").exists()


def test_without_predictions_the_page_says_what_is_missing(run_copy: Run) -> None:
    for path in (run_copy / "predictions").glob("*.npy"):
        path.unlink()
    text = made(run_copy)
    assert html.escape(report.NO_ANSWERS) in text and 'id="latency"' in text and 'id="confusion"' not in text


def test_images_of_flips_are_shown_unless_the_recipe_keeps_them(run_copy: Run) -> None:
    rows = flipped(run_copy)
    text = made(run_copy)
    assert 0 < text.count("<img ") <= 12 and "report.images: auto" in text
    assert {int(row) for row in re.findall(r'alt="test sample (\d+)"', text)} <= set(rows.tolist())
    assert made(run_copy, "report.flips=2").count("<img ") == 2
    for kept in ("report.images=false", "golden.source=synthetic"):
        text = made(run_copy, kept)
        assert "<img" not in text and "base64" not in text and "reference/inputs.npy" not in text, kept
        assert "test data on this page</th><td>none" in text
    assert "<img " in made(run_copy, "golden.source=synthetic", "report.images=true")


def test_a_bundle_of_a_recipe_that_keeps_its_images_holds_none(run_copy: Run, tmp_path: Path) -> None:
    """Neither the page in the bundle nor any pixels of the flipped samples."""
    recipe: Recipe = with_overrides(run_copy.recipe, ["report.images=false"])
    report.run(run_copy, recipe, Silent())
    package.run(run_copy, recipe, Silent(), out=tmp_path / "bundle")
    page = (tmp_path / "bundle/evidence/report.html").read_text(encoding="utf-8")
    assert "base64" not in page and "<img" not in page and "report.images: false" in page


def test_a_build_that_nothing_passes_still_says_why(run_copy: Run) -> None:
    bench = json.loads((run_copy / "bench.json").read_text())
    for variant in bench["variants"]:
        variant |= {"verdict": "fail", "reason": "too slow by planting"}
    write_json(run_copy / "bench.json", bench)
    text = made(run_copy)
    assert "nothing may be shipped for this target" in text and "too slow by planting" in text


def test_the_command(tlx, run_copy: Run, tmp_path: Path, built: Built) -> None:
    import jsonschema

    out = tmp_path / "elsewhere" / "page.html"
    ended = tlx("report", run_copy.path, "--out", out, "--json")
    assert ended.code == 0 and ended.json["path"] == str(out) and out.stat().st_size == ended.json["bytes"]
    jsonschema.validate(ended.json, tlx("schema", "report").json)
    shown = tlx("report", run_copy.path)
    assert shown.code == 0 and "report.html" in shown.out and "MB" in shown.out
    unmade = tlx("report", built.before["bench"], "--json")
    assert unmade.code == 6 and "tlexport bench" in unmade.json["error"]
