"""What each layout writes for a real bundle, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from pipeline import Built

from tlexport.bundle import manifest
from tlexport.bundle.layouts import (
    RawStep,
    Wanted,
    declared,
    kserve,
    ort_server,
    ovms,
    pbtxt,
    ray_serve,
    triton,
    tuning,
)
from tlexport.errors import RecipeError
from tlexport.timings import Knee


def wanted(bundle: Path, **changes: object) -> Wanted:
    document = manifest.read(bundle)
    variant = document.targets["cpu"].variant
    golden = np.load(bundle / "golden" / "inputs.npy")[0]
    plain = Wanted(
        name="digits", bundle=bundle, document=document, target="cpu", tuning=tuning.tuned(variant, document.batch),
        version=3, golden={document.inputs[0].name: golden}, place=str(bundle.parent / "place"),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def with_backend(own: Wanted, backend: str) -> Wanted:
    entry = own.entry
    changed = entry.model_copy(update={"variant": entry.variant.model_copy(update={"backend": backend})})
    return dataclasses.replace(own, document=own.document.model_copy(update={"targets": {"cpu": changed}}))


def test_triton_declares_what_the_graph_has(built: Built) -> None:
    own = with_backend(wanted(built.bundle), "onnxruntime")
    (model,) = triton.models(own)
    config = pbtxt.read(model.config.decode())
    document = own.document
    assert declared.differences(model.config, document.inputs, document.outputs) == ()
    assert config["backend"] == ["onnxruntime"] and config["max_batch_size"] == [document.batch.max]
    assert triton.served(model.config, "digits") == 3
    assert model.version == {"model.onnx": own.artifact}
    (sample,) = (content for path, content in model.shared.items() if path.startswith("warmup/"))
    assert sample == own.golden["images"].tobytes()
    (labels,) = (content for path, content in model.shared.items() if path.startswith("labels"))
    assert labels.decode().splitlines() == list(document.classes)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (b"dims: 32", b"dims: 31", "declared dims"),
        (b"TYPE_UINT8", b"TYPE_FP32", "declared TYPE_FP32"),
        (b'name: "images"', b'name: "image"', "the graph has none"),
        (b'name: "probabilities"', b'name: "scores"', "'probabilities' is not declared"),
        (b"dims: 10", b"dims: 10\n  dims: 1", "declared dims"),
        (b"max_batch_size: 4", b"max_batch_size: 0", "declared dims"),
    ],
)
def test_a_wrong_declaration_is_seen(built: Built, before: bytes, after: bytes, told: str) -> None:
    own = with_backend(wanted(built.bundle), "onnxruntime")
    (model,) = triton.models(own)
    assert before in model.config
    found = declared.differences(
        model.config.replace(before, after, 1), own.document.inputs, own.document.outputs
    )
    assert any(told in one for one in found)


def test_triton_takes_batches_and_queue_from_the_knee(built: Built) -> None:
    own = with_backend(wanted(built.bundle), "onnxruntime")
    knee = Knee(at=4, items_per_s=321.5, share=0.9, passed=True, rule="planted")
    variant = own.entry.variant.model_copy(update={"knee": knee, "threads": 2})
    tuned = tuning.tuned(variant, own.document.batch, instances=3)
    config = pbtxt.read(triton.models(dataclasses.replace(own, tuning=tuned))[0].config.decode())
    batching = config["dynamic_batching"][0]
    assert batching["preferred_batch_size"] == [4]
    assert batching["default_queue_policy"][0]["max_queue_size"] == [322]
    assert config["instance_group"] == [{"count": [3], "kind": ["KIND_CPU"]}]
    assert {"key": ["intra_op_thread_count"], "value": [{"string_value": ["2"]}]} in config["parameters"]
    unmeasured = tuning.tuned(variant.model_copy(update={"knee": None}), own.document.batch)
    assert unmeasured.queue is None and any("not timed" in note for note in unmeasured.notes)


def test_an_ensemble_is_pinned_and_keeps_the_served_version_loaded(built: Built) -> None:
    raw = RawStep("encoded", {"tlexport/errors.py": b""}, "tlexport.x:prepare", ("numpy",))
    own = dataclasses.replace(with_backend(wanted(built.bundle), "onnxruntime"), raw=raw, previous=2)
    prepare, model, ensemble = triton.models(own)
    assert [one.name for one in (prepare, model, ensemble)] == ["digits-prepare", "digits", "digits-raw"]
    for one in (prepare, model):
        assert pbtxt.read(one.config.decode())["version_policy"] == [{"specific": [{"versions": [2, 3]}]}]
    steps = pbtxt.read(ensemble.config.decode())["ensemble_scheduling"][0]["step"]
    assert [step["model_version"] for step in steps] == [[3], [3]]


@pytest.mark.parametrize("backend", ["tensorrt_rtx", "inductor"])
def test_triton_refuses_what_it_cannot_run(built: Built, backend: str) -> None:
    with pytest.raises(RecipeError, match="onnxruntime"):
        triton.models(with_backend(wanted(built.bundle), backend))
    with pytest.raises(RecipeError, match="python flavour"):
        triton.models(dataclasses.replace(with_backend(wanted(built.bundle), backend), flavour="python"))


def test_a_tensorrt_engine_is_a_plan(built: Built) -> None:
    own = with_backend(wanted(built.bundle), "tensorrt")
    own = dataclasses.replace(
        own, target="sm89", document=own.document.model_copy(update={"targets": {"sm89": own.entry}})
    )
    (model,) = triton.models(own)
    config = pbtxt.read(model.config.decode())
    assert config["platform"] == ["tensorrt_plan"] and list(model.version) == ["model.plan"]
    assert config["instance_group"][0]["kind"] == ["KIND_GPU"]


def test_kserve_serves_a_repository_of_its_own(built: Built) -> None:
    own = with_backend(wanted(built.bundle, place="s3://bucket/served"), "onnxruntime")
    (model,) = kserve.models(own)
    service = yaml.safe_load(model.config)
    assert service["spec"]["predictor"]["model"]["storageUri"] == "s3://bucket/served/digits/3/repository"
    assert service["spec"]["predictor"]["model"]["protocolVersion"] == "v2"
    inner = model.version["repository/digits/config.pbtxt"]
    assert isinstance(inner, bytes) and triton.served(inner, "digits") == 1
    assert model.version["repository/digits/1/model.onnx"] == own.artifact
    assert kserve.served(model.config, "digits") == 3
    for change in ({"place": "/models"}, {"name": "Digits_1"}):
        with pytest.raises(RecipeError):
            kserve.models(dataclasses.replace(own, **change))


def test_ovms_keeps_the_other_models(built: Built) -> None:
    own = with_backend(wanted(built.bundle), "openvino")
    (model,) = ovms.models(own)
    current = json.dumps(
        {"model_config_list": [{"config": {"name": "other", "base_path": "other"}}], "x": 1}
    ).encode()
    merged = ovms.merged(ovms.merged(current, model.config, "digits"), model.config, "digits")
    document = json.loads(merged)
    assert [one["config"]["name"] for one in document["model_config_list"]] == ["other", "digits"]
    assert (
        document["x"] == 1 and ovms.served(merged, "digits") == 3 and ovms.served(current, "digits") is None
    )
    assert ovms.notes(own) == () and "OpenVINO" in ovms.notes(with_backend(own, "onnxruntime"))[0]
    with pytest.raises(RecipeError):
        ovms.models(with_backend(own, "tensorrt"))


def test_onnxruntime_server_is_told_the_version(built: Built) -> None:
    own = with_backend(wanted(built.bundle), "onnxruntime")
    (model,) = ort_server.models(own)
    assert b"ONNX_SERVER_PREPARE_MODEL=digits:3\n" in model.config
    assert ort_server.served(model.config, "digits") == 3
    with pytest.raises(ValueError, match="prepares no version"):
        ort_server.served(model.config, "other")


def test_ray_gets_its_batches_and_replicas_from_the_knee(built: Built) -> None:
    own = with_backend(wanted(built.bundle), "onnxruntime")
    (model,) = ray_serve.models(own)
    application = yaml.safe_load(model.config)["applications"][0]
    assert application["args"]["max_batch"] == own.tuning.preferred
    assert (
        application["deployments"][0]["autoscaling_config"]["target_ongoing_requests"] == own.tuning.preferred
    )
    assert application["args"]["sha256"] == own.document.files[own.entry.file].sha256
    assert ray_serve.served(model.config, "digits") == 3
    with pytest.raises(RecipeError, match="folder"):
        ray_serve.models(dataclasses.replace(own, place="s3://bucket/x"))


@pytest.mark.parametrize("layout", [triton, kserve, ovms, ort_server, ray_serve])
def test_a_strange_configuration_names_no_version(layout: object) -> None:
    with pytest.raises(ValueError):
        layout.served(b'name: "digits"', "digits")
