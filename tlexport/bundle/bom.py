"""The bill of materials: CycloneDX 1.6 with the model, its data, its weights, its libraries and every file it runs.

What the run does not know is said to be unknown, never guessed. The library has no class for a model card, so that part is
added to its JSON by the specification's names (CycloneDX 1.6, `modelCard`). Equal runs make equal documents.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import uuid
from typing import TYPE_CHECKING, Any

from tlexport import __version__
from tlexport.bundle import fit
from tlexport.bundle.facts import Facts

if TYPE_CHECKING:
    from cyclonedx.model import HashType, Property
    from cyclonedx.model.component import Component

NAME = "bom.cdx.json"
UNKNOWN = "not stated"
MODEL, DATA, WEIGHTS = "model", "data", "weights"


def build(facts: Facts) -> bytes:
    """The document as JSON in UTF-8."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.output.json import JsonV1Dot6

    identity = json.dumps([facts.document.name, facts.finished, sorted(facts.hashes.items())])
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_OID, identity))
    bom.metadata.timestamp = datetime.datetime.fromisoformat(facts.finished.replace("Z", "+00:00"))
    bom.metadata.tools.components.add(_library("tlexport", __version__))
    model = _model(facts)
    bom.metadata.component = model
    parts = [_data(facts), *_files(facts), *(_library(*named) for named in _versions(facts).items())]
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(model, parts)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    document["metadata"]["component"]["modelCard"] = _card(facts)
    for component in document["components"]:
        if component["bom-ref"] == DATA:
            component["data"] = [_dataset(facts)]
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def _model(facts: Facts) -> Component:
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    weights = facts.tuned.weights
    if weights.source == "none":
        pedigree = Pedigree(notes="trained from random weights")
    else:
        ancestor = Component(
            name=weights.source,
            type=ComponentType.MACHINE_LEARNING_MODEL,
            bom_ref=WEIGHTS,
            description=f"pretrained weights of {facts.document.backbone}, from: {weights.origin or UNKNOWN}",
            hashes=[_sha256(weights.sha256)] if weights.sha256 else [],
            properties=[
                _property("weights.licence", weights.licence or UNKNOWN),
                _property("weights.sha256", weights.sha256 or UNKNOWN),
            ],
        )
        notes = f"fine-tuned ({facts.tuned.strategy}): {weights.matched} of {weights.total} tensors matched"
        pedigree = Pedigree(ancestors=[ancestor], notes=notes)
    return Component(
        name=facts.document.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=MODEL,
        description=facts.recipe.description or None,
        pedigree=pedigree,
        properties=[
            _property("checkpoint.sha256", facts.checkpoint_sha256),
            _property("licence", UNKNOWN),
        ],
    )


def _data(facts: Facts) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    counts = ", ".join(f"{split} {count}" for split, count in facts.tuned.samples.items())
    return Component(
        name=str(facts.data["source"]),
        type=ComponentType.DATA,
        bom_ref=DATA,
        description=f"samples: {counts}; the hash is of every sample's input, label and group, in order, not of a file",
        hashes=[_sha256(facts.data["sha256"])],
        properties=[_property("data.licence", UNKNOWN), _property("data.sensitive", UNKNOWN)],
    )


def _files(facts: Facts) -> list[Component]:
    from cyclonedx.model.component import Component, ComponentType

    code = {entry.file for entry in facts.document.targets.values() if entry.variant.backend in fit.CODE}
    return [
        Component(
            name=name,
            type=ComponentType.FILE,
            bom_ref=f"file:{name}",
            hashes=[_sha256(sha256)],
            properties=[_property("executable", str(name in code).lower())],
        )
        for name, sha256 in sorted(facts.hashes.items())
    ]


def _versions(facts: Facts) -> dict[str, str]:
    """Library -> version, of every stage that made or measured something; the Python that ran is one of them."""
    found: dict[str, str] = {}
    for versions in facts.document.provenance["stages"].values():
        found |= versions
    return {name: version for name, version in found.items() if name != "tlexport"}


def _library(name: str, version: str) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    known = PackageURL("generic" if name == "python" else "pypi", None, name, version)
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"library:{name}",
        purl=known,
        properties=[_property("library.licence", _licence(name, version))],
    )


def _licence(name: str, version: str) -> str:
    """As the installed package states it, if that is the version meant: an SPDX expression, or its own words' first line."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
    if package.version != version:
        return UNKNOWN
    stated = package.metadata.json
    for key in ("license_expression", "license"):
        text = str(stated.get(key, "")).strip()
        if text and text != "UNKNOWN":
            return text.splitlines()[0]
    classifiers = [str(line) for line in stated.get("classifier", []) if str(line).startswith("License ::")]
    return classifiers[0].rpartition(" :: ")[2] if classifiers else UNKNOWN


def _card(facts: Facts) -> dict[str, Any]:
    document = facts.document
    considerations = {"useCases": [facts.recipe.description]} if facts.recipe.description else {}
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": document.task,
            "modelArchitecture": document.backbone,
            "datasets": [{"ref": DATA}],
            "inputs": [
                {"format": f"{spec.name}: {spec.dtype} {list(spec.shape)}"} for spec in document.inputs
            ],
            "outputs": [
                {"format": f"{spec.name}: {spec.dtype} {list(spec.shape)}"} for spec in document.outputs
            ],
        },
        "quantitativeAnalysis": {"performanceMetrics": _metrics(facts)},
        **({"considerations": considerations} if considerations else {}),
    }


def _metrics(facts: Facts) -> list[dict[str, Any]]:
    """The reference on the test split, and of each target what its variant loses against it, with the paired interval."""
    found: list[dict[str, Any]] = [
        {"type": name, "value": f"{value:.6g}", "slice": "test split, PyTorch reference"}
        for name, value in sorted(facts.tuned.metrics.test.items())
    ]
    for target, variant in facts.chosen.items():
        own = f"test split, {variant.name} for {target}"
        if variant.metric is not None:
            found.append({"type": facts.document.metric, "value": f"{variant.metric:.6g}", "slice": own})
        if variant.drop is not None and variant.drop_low is not None and variant.drop_high is not None:
            bounds = {"lowerBound": f"{variant.drop_low:.6g}", "upperBound": f"{variant.drop_high:.6g}"}
            found.append(
                {
                    "type": f"{facts.document.metric}, drop against the reference",
                    "value": f"{variant.drop:.6g}",
                    "slice": own,
                    "confidenceInterval": bounds,
                }
            )
    return found


def _dataset(facts: Facts) -> dict[str, Any]:
    splits = [
        {"name": f"split.{name}", "value": f"{facts.tuned.samples.get(name, 0)} samples, {origin}"}
        for name, origin in facts.data["split_origin"].items()
    ]
    return {
        "type": "dataset",
        "name": str(facts.data["source"]),
        "contents": {"properties": splits},
    }


def _sha256(value: str) -> HashType:
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=value)


def _property(name: str, value: str) -> Property:
    from cyclonedx.model import Property

    return Property(name=f"tlexport:{name}", value=value)
