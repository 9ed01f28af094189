"""The Ray Serve application on Ray as it is: golden samples over JSON and binary tensors, bit for bit, and a new version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from changed_bundles import for_onnxruntime
from processes import ended, need, wait_for
from triton_server import free_ports

from tlexport.bundle import manifest
from tlexport.progress import Silent
from tlexport.stages import deploy

pytestmark = pytest.mark.server
READY_S = 180.0
# What `serve run` does with the file, on two cores and without a dashboard.
START = """
import sys, time
import ray, yaml
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
config = yaml.safe_load(open(sys.argv[1]))
client = serve_start(http_options=config["http_options"])
client.deploy_apps(ServeDeploySchema.parse_obj(config), _blocking=True)
time.sleep(600)
"""


def infer(url: str, batch: np.ndarray, *, binary: bool) -> np.ndarray:
    told: dict[str, Any] = {"name": "images", "datatype": "UINT8", "shape": list(batch.shape)}
    if binary:
        content = batch.tobytes()
        told["parameters"] = {"binary_data_size": len(content)}
        head = json.dumps({"inputs": [told], "parameters": {"binary_data_output": True}}).encode()
        request = urllib.request.Request(
            url, head + content, {"Inference-Header-Content-Length": str(len(head))}
        )
    else:
        request = urllib.request.Request(
            url, json.dumps({"inputs": [told | {"data": batch.tolist()}]}).encode()
        )
    with urllib.request.urlopen(request, timeout=60) as response:
        body, length = response.read(), response.headers.get("Inference-Header-Content-Length")
    document = json.loads(body[: int(length)] if length else body)
    (out,) = document["outputs"]
    flat = np.frombuffer(body[int(length) :], np.float32) if length else np.asarray(out["data"], np.float32)
    return flat.reshape(out["shape"])


@pytest.fixture
def served(bundle_copy: Path, tmp_path: Path) -> Iterator[tuple[str, Path, Path]]:
    need("ray", "starlette")
    bundle, place = for_onnxruntime(bundle_copy), tmp_path / "apps"
    deploy.run(bundle, f"ray:{place}", Silent(), options=deploy.Options(name="digits"))
    (port,) = free_ports(1)
    config = yaml.safe_load((place / "digits/serve.yaml").read_text())
    config["http_options"]["port"] = port
    own = tmp_path / "serve.yaml"
    own.write_text(yaml.safe_dump(config))
    log = tmp_path / "ray.log"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "RAY_USAGE_STATS_ENABLED": "0"
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(own)], stdout=out, stderr=out, env=environment, cwd=tmp_path
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/v2/health/ready", process, log, READY_S)
        yield f"http://127.0.0.1:{port}", bundle, place
    finally:
        ended(process)


def test_golden_samples(served: tuple[str, Path, Path]) -> None:
    import onnxruntime

    url, bundle, place = served
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = place / "digits/1/model.onnx"
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    golden = np.load(bundle / "golden" / "inputs.npy")
    model = f"{url}/v2/models/digits"
    with urllib.request.urlopen(model, timeout=30) as response:
        metadata = json.loads(response.read())
    assert metadata["inputs"][0]["name"] == "images" and metadata["versions"] == ["1"]
    for batch in (golden[:1], golden[1:4]):
        (expected,) = session.run(None, {"images": batch})
        for binary in (True, False):
            answer = infer(f"{model}/infer", batch, binary=binary)
            assert answer.tobytes() == expected.tobytes()
    most = manifest.read(bundle).batch.max
    with pytest.raises(urllib.error.HTTPError) as stop:
        infer(f"{model}/infer", np.zeros((most + 1, *golden.shape[1:]), np.uint8), binary=True)
    assert stop.value.code == 400 and "samples" in json.loads(stop.value.read())["error"]
    with pytest.raises(urllib.error.HTTPError) as stop:
        urllib.request.urlopen(f"{url}/v2/models/other", timeout=30)
    assert stop.value.code == 404
