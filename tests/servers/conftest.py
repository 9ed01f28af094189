"""Real servers, stores and registries: each started on a free port of the loopback and ended with the test.

Where a part is missing its tests are skipped and say why; with CI_REQUIRE_SERVERS=1 they fail instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ended, missing, need, wait_for
from triton_server import free_ports

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def triton_python() -> Path:
    python = Path(os.environ.get("TLEXPORT_TRITON_PYTHON", ROOT / ".venv-triton" / "bin" / "python"))
    if not python.exists():
        missing("needs .venv-triton with nvidia-pytriton; make test-server makes it")
    return python


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of moto's server; the endpoint and the keys stand where the library looks for them."""
    need("moto", "flask", "s3fs")
    (port,) = free_ports(1)
    log = tmp_path / "moto.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/", process, log)
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "planted-key",
            "AWS_SECRET_ACCESS_KEY": "planted-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    finally:
        ended(process)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Debian's docker-registry (distribution)."""
    need("oras")
    program = shutil.which("docker-registry")
    if program is None:
        missing("needs docker-registry; apt-get install docker-registry")
    port, debug = free_ports(2)
    config, log = tmp_path / "registry.yml", tmp_path / "registry.log"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {tmp_path / 'registry'}\n"
        f"http:\n  addr: 127.0.0.1:{port}\n  debug:\n    addr: 127.0.0.1:{debug}\n"
    )
    with log.open("wb") as out:
        process = subprocess.Popen([str(program), "serve", str(config)], stdout=out, stderr=out)
    try:
        wait_for(f"http://127.0.0.1:{port}/v2/", process, log)
        yield f"127.0.0.1:{port}"
    finally:
        ended(process)
