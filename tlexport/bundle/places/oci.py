"""A bundle in an OCI registry: a blob a file, and a manifest that names them all; it appears with its manifest, which is sent last.

Sources: OCI image specification 1.1 (manifests with an artifactType, the empty descriptor), OCI distribution specification.
Credentials come from where docker login keeps them. A registry is spoken to over TLS, but on this very machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tlexport.bundle import names
from tlexport.bundle.manifest import File
from tlexport.bundle.places import Advance
from tlexport.errors import BundleError, NotInstalledError, RecipeError, RunError, StorageError

ARTIFACT = "application/vnd.tlexport.bundle.v1"
FILE = "application/vnd.tlexport.bundle.file.v1"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY, EMPTY_TYPE = b"{}", "application/vnd.oci.empty.v1+json"
TITLE = "org.opencontainers.image.title"
MOVES = "latest"  # the one tag that may be given to another bundle
LARGEST_MANIFEST = 4 << 20
_BLOCK = 1 << 20
_TIMEOUT_S = (10, 300)
_REFERENCE = re.compile(
    r"oci://(?P<registry>[A-Za-z0-9.-]+(?::\d+)?|\[[0-9a-fA-F:]+\](?::\d+)?)/(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_HERE = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")


class Reference:
    """`oci://registry/repository:tag` or `...@sha256:...`. Raises RecipeError for anything else."""

    def __init__(self, url: str) -> None:
        found = _REFERENCE.fullmatch(url)
        if found is None:
            shown = re.sub(r"//.*@", "//...@", url)  # a password is not repeated
            raise RecipeError(f"{shown} is no reference to a registry; it goes oci://REGISTRY/REPOSITORY:TAG")
        self.registry, self.repository = found["registry"], found["repository"]
        self.digest = found["digest"]
        self.tag = found["tag"] or (None if self.digest else MOVES)
        self.where = url

    def container(self) -> str:
        return f"{self.registry}/{self.repository}" + (f"@{self.digest}" if self.digest else f":{self.tag}")


def push(
    bundle: Path, files: Mapping[str, File], url: str, annotations: Mapping[str, str], advance: Advance
) -> tuple[str, bool]:
    """Send every file that is not there yet, then the manifest: (its digest, whether the very same one was there).

    Raises RunError if the tag names another bundle, StorageError where the registry refuses.
    """
    reference = Reference(url)
    if reference.digest:
        raise RecipeError(f"{url}: a digest is what a push returns; name a tag")
    document = _manifest(files, annotations)
    content = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    with _registry(reference) as (registry, container):
        held = _held(registry, container)
        if held == digest:
            return digest, True
        if held and reference.tag != MOVES:
            raise RunError(
                f"{url} is another bundle ({held}); choose another tag: a tag that moves cannot be trusted"
            )
        _send(registry, container, _blob(EMPTY), EMPTY)
        for name, own in files.items():
            _send(
                registry,
                container,
                {"digest": f"sha256:{own.sha256}", "size": own.bytes},
                bundle / name,
                advance,
            )
        url_of = f"{registry.prefix}://{container.manifest_url()}"
        _expect(registry.do_request(url_of, "PUT", data=content, headers={"Content-Type": MANIFEST}), 201)
    return digest, False


def pull(url: str, folder: Path, *, largest: int, most_files: int, advance: Advance) -> str:
    """Fetch every file into the new `folder`, names and sizes checked before a byte is written: the manifest's digest.

    Raises BundleError for an artifact that is none of ours, or whose bytes are not what its digests say.
    """
    reference = Reference(url)
    with _registry(reference) as (registry, container):
        content = _read(registry, container)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if reference.digest and digest != reference.digest:
            raise BundleError(f"{url}: the registry sent another manifest ({digest})")
        layers = _layers(content, url, largest, most_files)
        for name, (blob, size) in layers.items():
            destination = folder / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            _fetch(registry, container, blob, size, destination, advance)
    return digest


def _manifest(files: Mapping[str, File], annotations: Mapping[str, str]) -> dict[str, Any]:
    layers = [
        {"mediaType": FILE, "digest": f"sha256:{own.sha256}", "size": own.bytes, "annotations": {TITLE: name}}
        for name, own in sorted(files.items())
    ]
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": ARTIFACT,
        "config": {"mediaType": EMPTY_TYPE, **_blob(EMPTY)},
        "layers": layers,
        "annotations": dict(annotations),
    }


def _layers(content: bytes, url: str, largest: int, most_files: int) -> dict[str, tuple[str, int]]:
    """Name -> digest and size. Names stay inside, are not said twice, and the sizes are bounded together."""
    try:
        document = json.loads(content)
        if document.get("artifactType") != ARTIFACT:
            raise BundleError(f"{url} is no bundle (artifactType {document.get('artifactType')!r})")
        told = [(own["annotations"][TITLE], own["digest"], own["size"]) for own in document["layers"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{url}: its manifest cannot be read ({error!r})") from error
    if len(told) > most_files:
        raise BundleError(f"{url} has {len(told)} files, a bundle has at most {most_files}")
    found: dict[str, tuple[str, int]] = {}
    for name, digest, size in told:
        if not isinstance(name, str) or names.problem(name) or name in found:
            raise BundleError(f"{url} names no file of a bundle: {name!r}")
        if not isinstance(digest, str) or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            raise BundleError(f"{url}: {name} has no SHA-256")
        if type(size) is not int or size < 0:
            raise BundleError(f"{url}: {name} has no size")
        found[name] = (digest, size)
    if (total := sum(size for _, size in found.values())) > largest:
        raise BundleError(f"{url} has {total} bytes, at most {largest} are fetched")
    return found


@contextlib.contextmanager
def _registry(reference: Reference) -> Iterator[tuple[Any, Any]]:
    """oras' client and the parsed reference. Raises NotInstalledError, and StorageError for whatever goes wrong within."""
    try:
        import oras.provider
        import requests
    except ImportError as error:
        raise NotInstalledError("oras, which speaks to registries,", "deploy") from error
    try:
        here = _HERE.fullmatch(reference.registry) is not None
        registry = oras.provider.Registry(hostname=reference.registry, insecure=here)
        for scheme in ("http://", "https://"):
            registry.session.mount(scheme, _patient(requests))
        # oras tries for two minutes to reach what is not there.
        registry.session.get(f"{registry.prefix}://{reference.registry}/v2/")
        container = registry.get_container(reference.container())
        registry.auth.load_configs(container)
        yield registry, container
    except (BundleError, RunError, StorageError):
        raise
    except OSError as error:
        told = " ".join(str(error).split())[:160]
        raise StorageError(f"{reference.where} cannot be used: {type(error).__name__}: {told}") from error
    except ValueError as error:
        raise StorageError(
            f"{reference.where} cannot be used: {' '.join(str(error).split())[:160]}"
        ) from error


def _patient(requests: Any) -> Any:
    class Patient(requests.adapters.HTTPAdapter):  # type: ignore[misc]
        """oras waits for ever."""

        def send(self, request: Any, **options: Any) -> Any:
            return super().send(request, **{**options, "timeout": options.get("timeout") or _TIMEOUT_S})

    return Patient()


def _held(registry: Any, container: Any) -> str:
    """Digest of what the tag names; empty if it names nothing."""
    response = registry.do_request(
        f"{registry.prefix}://{container.manifest_url()}", "HEAD", headers={"Accept": MANIFEST}
    )
    if response.status_code == 404:
        return ""
    _expect(response, 200)
    return str(response.headers.get("Docker-Content-Digest", "another manifest"))


def _read(registry: Any, container: Any) -> bytes:
    url = f"{registry.prefix}://{container.manifest_url()}"
    response = registry.do_request(url, "GET", headers={"Accept": MANIFEST}, stream=True)
    with response:
        if response.status_code == 404:
            raise StorageError(f"oci://{container} is not there")
        _expect(response, 200)
        content = b""
        for block in response.iter_content(_BLOCK):
            content += block
            if len(content) > LARGEST_MANIFEST:
                raise BundleError(f"oci://{container}: its manifest is larger than {LARGEST_MANIFEST} bytes")
    return content


class _Body:
    """A file or bytes to send, read anew by each try."""

    def __init__(self, content: Path | bytes, size: int, advance: Advance) -> None:
        self.content, self.size, self.advance = content, size, advance

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[bytes]:
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as handle:
            while block := handle.read(_BLOCK):
                yield block
                self.advance(len(block))


def _send(
    registry: Any,
    container: Any,
    blob: dict[str, Any],
    content: Path | bytes,
    advance: Advance = lambda moved: None,
) -> None:
    """In one request, after which the registry has checked the SHA-256; nothing if it is there already."""
    if registry.blob_exists(blob, container):
        advance(blob["size"])
        return
    begun = registry.do_request(f"{registry.prefix}://{container.upload_blob_url()}", "POST")
    _expect(begun, 202)
    place = registry._get_location(begun, container)
    joined = f"{place}{'&' if '?' in place else '?'}digest={blob['digest']}"
    # An empty body has no iterator to send: its length would be unknown to the server.
    body = _Body(content, blob["size"], advance) if blob["size"] else b""
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob["size"])}
    _expect(registry.do_request(joined, "PUT", data=body, headers=headers), 201)


def _fetch(registry: Any, container: Any, blob: str, size: int, destination: Path, advance: Advance) -> None:
    whole, done = hashlib.sha256(), 0
    with registry.get_blob(container, blob, stream=True) as response, destination.open("xb") as out:
        _expect(response, 200)
        for block in response.iter_content(_BLOCK):
            done += len(block)
            if done > size:
                raise BundleError(
                    f"oci://{container}: {destination.name} is longer than the {size} bytes it should have"
                )
            whole.update(block)
            out.write(block)
            advance(len(block))
    if done != size or f"sha256:{whole.hexdigest()}" != blob:
        raise BundleError(f"oci://{container}: {destination.name} is not what its digest says")


def _blob(content: bytes) -> dict[str, Any]:
    return {"digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}


def _expect(response: Any, status: int) -> None:
    if response.status_code != status:
        raise StorageError(
            f"the registry answered {response.status_code} {response.reason} to {response.request.method} "
            f"{response.request.url.partition('?')[0]}"
        )
