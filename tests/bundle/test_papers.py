"""The bill of materials and the model card say what the run measured, and nothing else; names from outside are only text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from pipeline import Built

from tlexport.bundle import bom, card, manifest
from tlexport.bundle.facts import Facts
from tlexport.models.checkpoint import describe_checkpoint
from tlexport.results import BenchResult, FinetuneResult, VerifyResult, WeightsSummary
from tlexport.run import Run, digest, read_json


@pytest.fixture(scope="module")
def facts(built: Built) -> Facts:
    run = Run(built.run)
    document = manifest.read(built.bundle)
    return Facts(
        document=document.model_copy(update={"files": {}}),
        recipe=run.recipe,
        tuned=run.result("finetune", FinetuneResult),
        verified=run.result("verify", VerifyResult),
        measured=BenchResult.model_validate(read_json(run / "bench.json")),
        data=describe_checkpoint(run / "checkpoint").extra["data"],
        checkpoint_sha256="0" * 64,
        hashes={n: f.sha256 for n, f in document.files.items() if n.startswith(("graphs/", "models/"))},
        finished="2026-01-01T00:00:00Z",
        images_in_report=True,
    )


def materials(facts: Facts) -> dict[str, Any]:
    """As JSON, valid by the schema of CycloneDX 1.6 that the library ships."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = bom.build(facts).decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    return json.loads(text)


def test_the_bundle_has_both(built: Built) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (built.bundle / bom.NAME).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = manifest.read(built.bundle)
    assert {bom.NAME, card.NAME} < set(document.files)
    files = {
        c["name"]: c["hashes"][0]["content"] for c in json.loads(text)["components"] if c["type"] == "file"
    }
    for entry in document.targets.values():
        assert files[entry.file] == digest(built.bundle / entry.file)


def test_the_validator_sees_a_wrong_document(facts: Facts) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    broken = json.loads(bom.build(facts))
    broken["metadata"]["component"]["modelCard"]["modelParameters"]["approach"]["type"] = "magic"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(broken)) is not None


def test_materials_name_model_data_weights_and_libraries(facts: Facts) -> None:
    found = materials(facts)
    model = found["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    parameters = model["modelCard"]["modelParameters"]
    assert parameters["modelArchitecture"] == facts.document.backbone and parameters["task"] == "multiclass"
    assert parameters["datasets"] == [{"ref": "data"}] and parameters["inputs"][0]["format"].startswith(
        "images: uint8"
    )
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert any("confidenceInterval" in metric for metric in metrics)
    assert model["pedigree"] == {"notes": "trained from random weights"}  # of this run
    parts = {part["bom-ref"]: part for part in found["components"]}
    assert parts["data"]["hashes"][0]["content"] == facts.data["sha256"]
    torch = parts["library:torch"]
    assert torch["purl"].startswith("pkg:pypi/torch@") and "Apache-2.0" in torch["properties"][0]["value"]
    assert bom.build(facts) == bom.build(facts)


def test_weights_are_an_ancestor_and_what_is_unknown_is_said_to_be(facts: Facts) -> None:
    weights = WeightsSummary(source="file:w.pth", matched=3, total=4, sha256="a" * 64)
    tuned = facts.tuned.model_copy(update={"weights": weights})
    (ancestor,) = materials(replace(facts, tuned=tuned))["metadata"]["component"]["pedigree"]["ancestors"]
    assert ancestor["hashes"][0]["content"] == "a" * 64 and ancestor["description"].endswith("not stated")
    assert {"name": "tlexport:weights.licence", "value": "not stated"} in ancestor["properties"]
    stages = {"compile": {"torch": "0.0.1", "no-such-package": "1"}}
    document = facts.document.model_copy(update={"provenance": {"stages": stages}})
    parts = {part["bom-ref"]: part for part in materials(replace(facts, document=document))["components"]}
    for name in ("torch", "no-such-package"):  # another version than the installed one, and none
        assert parts[f"library:{name}"]["properties"][0]["value"] == "not stated"


def text_of(facts: Facts) -> str:
    return card.build(facts).decode()


def test_the_card_is_filled_from_measurements(facts: Facts) -> None:
    text = text_of(facts)
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "image-classification" and front["library_name"] == "tlexport"
    (metric,) = front["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == facts.document.reference
    for heading in ("Intended use", "Data", "Metrics", "Slices", "Decision", "Latency", "Limits", "Origin"):
        assert f"\n## {heading}\n" in text
    variant = facts.chosen["cpu"]
    assert f"{variant.drop:.4f} ({variant.drop_low:.4f} to {variant.drop_high:.4f})" in text
    assert f"{facts.tuned.metrics.test['accuracy']:.4f}" in text
    for split, count in facts.tuned.samples.items():
        assert f"| {split} | {count} |" in text
    assert "8 real samples of the test split" in text and "golden.source=synthetic" in text
    assert "Not gated: " in text and "max\\_drop 0.15" in text
    assert "Which is the worst is not known: none has enough samples." in text


def test_the_card_tells_what_went_wrong(facts: Facts) -> None:
    tuned = facts.tuned.model_copy(
        update={"leaks": ("column 'paid' gives the label away",), "headline": "a forest does better"}
    )
    recipe = facts.recipe.model_copy(
        update={"golden": facts.recipe.golden.model_copy(update={"source": "synthetic"})}
    )
    text = text_of(replace(facts, tuned=tuned, recipe=recipe, images_in_report=False))
    assert "Leakage found:\n\n- column 'paid' gives the label away" in text
    assert "- a forest does better" in text
    assert "holds synthetic samples" in text and "No report in it shows a sample" in text


HOSTILE = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "a|b\n\n# heading",
    "`code` **bold** _em_",
    "http://evil.example www.evil.example a@evil.example",
    "&lt;b&gt;",
    "- list",
    "1. list",
    "\u202eright to left\x1b[31m",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_outside_are_only_text(facts: Facts, name: str) -> None:
    document = facts.document.model_copy(update={"classes": (name, "other")})
    data = {**facts.data, "source": name, "counts": {"train": {name: 3}}}
    recipe = facts.recipe.model_copy(update={"description": name})
    text = text_of(replace(facts, document=document, data=data, recipe=recipe))
    body = text.split("---\n", 2)[2]
    assert not re.search(r"<(?!/?$)\w|</|(?<!\\)!\[|(?<!\\)\[click|(?<!\\)://|www\.|(?<!\\)@", body)
    assert "\n# heading" not in body and "\x1b" not in text and "\u202e" not in text
    assert body.count("\n# ") == 1 or body.startswith("\n# ") or body.startswith("# ")
    head = "| split | samples | of each class | drawn |"
    table = body[body.index(head) :].split("\n\n")[0].splitlines()
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in table)
    assert yaml.safe_load(text.split("---\n", 2)[1])["model-index"]
