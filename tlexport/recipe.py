"""A recipe: YAML plus `key.path=value` overrides, checked whole and frozen.

Every mistake is reported at once, each with the key's full path and, where one is near, the valid name.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tlexport import targets
from tlexport.errors import RecipeError
from tlexport.tensors import Profile

Modality = Literal["image", "tabular", "series", "molecule"]
Task = Literal["auto", "binary", "multiclass", "multilabel", "regression"]
MetricName = Literal[
    "auc",
    "accuracy",
    "balanced_accuracy",
    "f1",
    "average_precision",
    "sensitivity_at_90",
    "mcc",
    "ks",
    "brier",
    "log_loss",
    "rmse",
    "mae",
    "r2",
    "qlike",
]
DEFAULT_BACKBONES = {"tabular": "tabular/tabm", "series": "series/patch", "molecule": "molecule/smiles"}
Strategy = Literal["auto", "probe", "partial", "full", "scratch"]
PrecisionName = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
AUTO = "auto"
BackendName = Literal["auto", "onnxruntime", "openvino", "tensorrt_rtx", "tensorrt", "inductor"]
IN_RUN = "run"  # of a cache: kept in the run's own folder


class Section(BaseModel):
    """A frozen part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SplitFractions(Section):
    """Shares of the samples drawn for validation and test where the data does not state its own split."""

    val: float = Field(0.15, gt=0, lt=0.9)
    test: float = Field(0.15, gt=0, lt=0.9)
    by: Literal["auto", "random", "time", "scaffold"] = Field(
        "auto",
        description="auto: by time (series), scaffold (molecules), else random: stratified, by group if there are; "
        "time: the latest rows are the test split; scaffold: the largest scaffolds are the training split",
    )
    folds: int | None = Field(
        None, ge=2, le=100, description="the test split is one of this many folds; `test` is then not used"
    )
    fold: int = Field(0, ge=0, description="which of the folds is the test split, counted from 0")


class Manifest(Section):
    """Column names of a CSV manifest; several label columns, or labels joined by `|`, mean multi-label."""

    image: str = "path"
    label: str | tuple[str, ...] = "label"
    split: str | None = "split"
    group: str | None = "group"
    root: str | None = Field(
        None, description="folder that image paths are relative to; default: the CSV's own"
    )


class Dicom(Section):
    """How a DICOM file becomes an 8-bit image."""

    frame: int = Field(0, ge=0, description="which frame of a multi-frame file")
    window: tuple[float, float] | None = Field(
        None,
        description="centre and width in modality units (for CT: Hounsfield); default: the file's own VOI",
    )


class Table(Section):
    """Columns of a table (modality tabular). What is not named is inferred and then frozen in the run."""

    target: str | tuple[str, ...] | None = Field(
        None, description="label column; several mean multi-label or several values"
    )
    numeric: tuple[str, ...] = Field((), description="columns that are numbers whatever they look like")
    categorical: tuple[str, ...] = Field(
        (), description="columns that are categories though they are numbers"
    )
    exclude: tuple[str, ...] = Field((), description="columns the model must not see (identifiers, leaks)")
    group: str | None = Field(None, description="column whose groups stay in one split (patient, customer)")
    time: str | None = Field(None, description="column to order rows by where data.split.by is time")
    split: str | None = Field(None, description="column that states train, val or test")
    missing: tuple[str, ...] = ("", "NA", "N/A", "NaN", "nan", "null", "None", "?")
    max_categories: int = Field(
        64, ge=2, le=4096, description="the most frequent ones get a code of their own"
    )


class Series(Section):
    """Prices of many assets over time (modality series): what is forecast, and from how many days."""

    target: Literal["variance", "direction", "drawdown", "spike"] = Field(
        "variance",
        description="of the next `horizon` days: mean daily variance; up or not; a fall by `threshold` from the last close; "
        "a variance of `threshold` times the window's",
    )
    horizon: int = Field(1, ge=1, le=260, description="days ahead")
    window: int = Field(64, ge=8, le=2048, description="days that the graph takes")
    threshold: float | None = Field(
        None,
        gt=0,
        description="drawdown: a share of the price (0.05); spike: times the window's variance (2)",
    )
    stride: int = Field(1, ge=1, description="days from one training sample of an asset to its next")
    purge: int | None = Field(
        None,
        ge=0,
        description="days left out between splits; default: the horizon, the least that is allowed",
    )
    time: str | None = Field(None, description="date column; default: date, time or timestamp")
    asset: str | None = Field(
        None, description="asset column; default: name, ticker, symbol or the file's name"
    )
    max_gap: int = Field(
        10, ge=1, description="calendar days between two rows; a longer gap breaks the series"
    )


class Molecule(Section):
    """Molecules as SMILES (modality molecule)."""

    smiles: str | None = Field(None, description="column of SMILES; default: smiles or mol")
    target: str | tuple[str, ...] | None = Field(None, description="label column; several mean multi-label")
    max_length: int = Field(128, ge=8, le=1024, description="tokens; longer SMILES are left out and counted")
    tokenizer: str | None = Field(
        None,
        description="name or folder of a Hugging Face tokenizer; default: that of a huggingface/ backbone, else our own",
    )


class Data(Section):
    """Where samples come from and how they are split and prepared."""

    path: str = Field(
        description="file, folder or <package>/<name>; images: folder, .npz, .csv, torchvision/<Dataset>, medmnist/<name>, sklearn/digits"
    )
    image_size: int = Field(224, ge=8, le=2048, description="pixels; images reach the model as squares")
    channels: Literal[1, 3] | None = Field(None, description="grey (1) or RGB (3); default: as the data is")
    resize: Literal["crop", "squash", "pad"] = "crop"
    split: SplitFractions = SplitFractions()
    resplit: bool = Field(
        False, description="ignore the data's own splits and draw new ones (by group if there are groups)"
    )
    max_corrupt: float = Field(
        0, ge=0, description="files that may be unreadable: a count (>= 1) or a share (< 1)"
    )
    duplicates: Literal["report", "drop", "fail"] = Field(
        "report",
        description="what to do with a test image that is also in train (drop: leave it out of test)",
    )
    limit: int | None = Field(None, ge=2, description="at most this many samples per split, stratified")
    train_size: int | None = Field(
        None, ge=2, description="at most this many training samples; val and test stay whole"
    )
    class_names: tuple[str, ...] | None = None
    slices: tuple[str, ...] = Field(
        (),
        description="columns of the table or manifest by which verify tells drops apart (sex, hospital, age): they need "
        "not be features; series are told apart by asset and year by themselves",
    )
    manifest: Manifest = Manifest()
    dicom: Dicom = Dicom()
    table: Table = Table()
    series: Series = Series()
    molecule: Molecule = Molecule()


class Backbone(Section):
    """The pretrained network and where its weights come from."""

    name: str = Field(
        "timm/tf_efficientnet_lite0",
        description="timm/<name>, torchvision/<name>, tabular/tabm, series/patch, molecule/smiles or huggingface/<name>",
    )
    weights: str = Field(
        "default",
        description="default (the library's own, downloaded), none, package:<name>, a file (.safetensors, .pth), or a pretrained run",
    )
    allow_mismatch: bool = Field(False, description="accept weights that differ beyond the head")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the head")
    options: dict[str, int | float | bool | str] = Field(
        {}, description="the network's own sizes (width, depth ...), where the name leaves them open"
    )


class Augment(Section):
    """Random changes of training batches."""

    horizontal_flip: bool = False
    vertical_flip: bool = False
    crop: float = Field(
        1.0, gt=0, le=1, description="smallest share of the area kept by a random resized crop"
    )
    rotate: float = Field(0.0, ge=0, le=180, description="degrees, either way")
    color: float = Field(0.0, ge=0, le=1, description="strength of brightness and contrast jitter")
    erase: float = Field(0.0, ge=0, le=1, description="probability that a rectangle is erased")


class Transfer(Section):
    """How the backbone is fitted to the task."""

    strategy: Strategy = Field(
        "full",
        description="auto trains a probe and the network that a short trial chooses, and keeps the better",
    )
    loss: Literal["auto", "cross_entropy", "mse", "huber", "qlike"] = Field(
        "auto", description="auto: cross-entropy for classes, mean squared error for values"
    )
    stages: int = Field(1, ge=1, description="how many of the last stages `partial` trains")
    epochs: int = Field(5, ge=1, le=10_000)
    batch_size: int = Field(32, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the head")
    layer_decay: float = Field(
        0.8, gt=0, le=1, description="learning rate ratio from a stage to the one below it"
    )
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    balance: Literal["none", "weights", "sampler"] = "none"
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the averaged weights; default: none kept"
    )
    patience: int | None = Field(
        None, ge=1, description="epochs without a better validation metric before stopping"
    )
    autocast: Literal["auto", "off", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on CUDA where it has it, off on the CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    augment: Augment = Augment()


class Race(Section):
    """How `strategy: auto` finds its strategy: a probe and one network, chosen by a trial, are trained to their end."""

    candidates: tuple[Literal["probe", "partial", "full", "scratch"], ...] = (
        "probe",
        "partial",
        "full",
        "scratch",
    )
    share: float = Field(
        0.4,
        gt=0,
        le=1,
        description="most of the full grid's training time that the race may take, the winner's own training included: "
        "its schedule is cut to fit",
    )
    audit: bool = Field(
        False,
        description="train every candidate to its end as well, and write the choice's regret and share of the time",
    )


class Pretrain(Section):
    """Learning without labels, on the training split alone (`tlexport pretrain`)."""

    objective: str = Field(
        "auto", description="of the modality: masked (all), forecast (series); auto: its default"
    )
    mask: float = Field(0.3, gt=0, lt=1, description="share of what is hidden and has to be filled in")
    epochs: int = Field(10, ge=1, le=10_000)
    batch_size: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class Export(Section):
    opset: int = Field(20, ge=20, le=23)
    batch: Profile = Profile()
    tolerance: float = Field(
        1e-4,
        gt=0,
        le=1e-2,
        description="largest error of the FP32 graph against the reference, as a share of the output's scale",
    )


class Compile(Section):
    """Which backends the typed graphs are compiled with, and how long one build may take."""

    backends: tuple[BackendName, ...] = Field(
        ("auto",),
        description="auto: every one that is installed and compiles in seconds; inductor takes part only if it is named: "
        "[auto, inductor]",
    )
    timeout: float = Field(1800.0, gt=0, description="seconds that one build may take before it is stopped")


class TensorRT(Section):
    """What TensorRT and TensorRT-RTX are told beyond the graph. A variant whose backend cannot do what is set here is refused."""

    workspace_mb: int | None = Field(
        None, ge=1, description="MiB of scratch memory a layer may use; default: all of the GPU's"
    )
    optimization_level: int | None = Field(
        None,
        ge=0,
        le=5,
        description="how long to search for fast kernels (TensorRT); default: the library's, 3",
    )
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = Field(
        "none", description="other GPUs that the engine must run on, at some cost in speed (TensorRT)"
    )
    version_compatible: bool = Field(
        False, description="an engine that later versions load too, with its runtime in it (TensorRT)"
    )
    strip_weights: bool = Field(
        False,
        description="an engine without weights, to be refitted from its typed graph before it runs (TensorRT)",
    )
    sparse_weights: bool = Field(
        False, description="use sparse kernels for weights that are already 2:4 sparse (TensorRT)"
    )
    aux_streams: int | None = Field(
        None,
        ge=0,
        description="streams that an engine may use beside the caller's (TensorRT); default: its choice",
    )
    tf32: bool = Field(
        False,
        description="let FP32 products round their factors to 10 bits; accuracy judged on a CPU does not show it",
    )
    timing_cache: str | None = Field(
        None, description="file that keeps what builds have timed (TensorRT); run: a file in the run"
    )
    runtime_cache: str | None = Field(
        None,
        description="file that keeps what TensorRT-RTX compiles when it loads an engine; run: a file in the run",
    )

    def placed(self, folder: Path) -> TensorRT:
        """The same with `run` replaced by the caches' files in `folder`."""
        files = {"timing_cache": "timing.cache", "runtime_cache": "runtime.cache"}
        kept = {key: str(folder / name) for key, name in files.items() if getattr(self, key) == IN_RUN}
        return self.model_copy(update=kept)


class Calibration(Section):
    """How INT8 ranges are found, on the training split."""

    method: Literal["max", "entropy", "percentile", "mse", "auto"] = Field(
        "percentile", description="auto: for each tensor the one with the least measured error"
    )
    percentile: float = Field(99.99, gt=50, lt=100)
    samples: int = Field(256, ge=1)


class Search(Section):
    """How the fastest graph within gates.max_drop is found. It looks at validation samples: the test split stays unseen."""

    enabled: bool = Field(
        True, description="off: every layer in the precision that was asked for, come what may"
    )
    samples: int = Field(1000, ge=16, description="validation samples that judge a candidate")
    evaluations: int = Field(12, ge=3, description="most passes over those samples, sensitivities included")
    learn: bool = Field(
        True,
        description="learn how to round weights (AdaRound, minutes) where quicker improvements miss the budget",
    )
    least: float = Field(
        0.8, ge=0, le=1, description="share of the operations that a search leaves in low precision at least"
    )
    keep: tuple[str, ...] = Field((), description="layers that stay in FP32, by their names in the graph")
    report: bool = Field(
        False, description="ask every layer what it costs, also where the budget is met without"
    )


class Gates(Section):
    """Limits that fail a variant. `max_drop` is held against the unfavourable end of the interval."""

    max_drop: float = Field(
        0.01,
        ge=0,
        le=1,
        description="of the metric; of rmse, mae and qlike as a share of the reference's value",
    )
    max_flips: float | None = Field(
        None, ge=0, le=1, description="share of test samples whose decision changes"
    )
    max_slice_drop: float | None = Field(
        None,
        ge=0,
        le=1,
        description="of any slice with enough samples whose drop is beyond chance (p at most 0.05, Holm over the slices)",
    )
    max_ece_drift: float | None = Field(
        None, ge=0, le=1, description="how much worse calibrated than the reference, at worst"
    )
    max_p50_ms: float | None = Field(None, gt=0)
    max_p99_ms: float | None = Field(None, gt=0)
    max_size_mb: float | None = Field(None, gt=0)


class Decision(Section):
    """The cut-off that decisions are made at: chosen on validation samples, frozen in the bundle. Of several classes the most
    probable one is decided for, whatever stands here."""

    rule: Literal["half", "youden", "sensitivity", "specificity", "precision", "share", "cost"] = Field(
        "half",
        description="half: 0.5; youden: most sensitivity + specificity; sensitivity, specificity, precision: at least `value`; "
        "share: decided for about `value` of the samples; cost: least, where a miss costs `value` false alarms",
    )
    value: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _has_its_value(self) -> Decision:
        if self.rule in ("half", "youden"):
            if self.value is not None:
                raise ValueError(f"value has no meaning with rule={self.rule}")
        elif self.value is None:
            raise ValueError(f"rule={self.rule} needs a value, for instance 0.9")
        elif self.rule != "cost" and self.value > 1:
            raise ValueError(f"value is a share, at most 1 (got {self.value:g})")
        return self


class Verify(Section):
    resamples: int = Field(2000, ge=200, le=100_000)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    least_samples: int = Field(30, ge=2, description="of a slice whose drop is stated")


class Bench(Section):
    samples: int = Field(300, ge=10, description="timed runs of each variant at batch 1")
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    threads: int | None = Field(None, ge=1, description="default: the cores this process may use")
    cuda_graphs: bool = Field(
        True, description="on GPUs: time replays of a CUDA graph where it can be captured"
    )


class Golden(Section):
    """Samples a client can test itself with. They are copies of test inputs: choose `synthetic` where data may not leave."""

    samples: int = Field(8, ge=2, le=256)
    source: Literal["test", "synthetic"] = "test"


class Report(Section):
    """What the report may show of the test data. It travels with the bundle."""

    images: Literal["auto"] | bool = Field(
        "auto",
        description="test samples whose decision changed, as images or rows: copies of test data; auto: unless golden.source "
        "is synthetic",
    )
    flips: int = Field(12, ge=0, le=24, description="changed decisions that are shown, the worst first")


class Recipe(Section):
    """All that is asked of one model's life."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = ""
    modality: Modality = "image"
    task: Task = "auto"
    metric: MetricName = "accuracy"
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data
    backbone: Backbone = Backbone()
    transfer: Transfer = Transfer()
    race: Race = Race()
    pretrain: Pretrain = Pretrain()
    baselines: tuple[str, ...] = Field(
        ("auto",),
        description="plain models fitted on the same split to stand beside; auto: the modality's own; []: none",
    )
    export: Export = Export()
    precision: tuple[PrecisionName, ...] = ("fp32", "fp16", "int8")
    compile: Compile = Compile()
    tensorrt: TensorRT = TensorRT()
    calibration: Calibration = Calibration()
    targets: tuple[str, ...] = ("cpu",)
    search: Search = Search()
    gates: Gates = Gates()
    verify: Verify = Verify()
    bench: Bench = Bench()
    decision: Decision = Decision()
    golden: Golden = Golden()
    report: Report = Report()

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(targets.resolve(name) for name in names))

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not self.targets:
            raise ValueError("targets: at least one is needed, for instance cpu")
        if not self.precision:
            raise ValueError("precision: at least one is needed, for instance fp32")
        if not self.compile.backends:
            raise ValueError("compile.backends: at least one is needed, for instance auto")
        return self

    @property
    def shows_samples(self) -> bool:
        """Whether copies of test samples may stand in the report."""
        asked = self.report.images
        return self.golden.source == "test" if asked == "auto" else bool(asked)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(source: str | Path, overrides: list[str] | None = None, sets: list[str] | None = None) -> Recipe:
    """Read a recipe from a file or from the shipped ones by name, apply `key.path=value`, check it whole.

    `sets` name lists of overrides that the recipe itself carries under `sets:` (`quick: [data.limit=500, ...]`);
    `overrides` come after them.

    A relative `data.path` or weights file in the recipe file is taken relative to the working directory,
    as one on the command line is. Raises RecipeError with every mistake, one a line.
    """
    path = find(source)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"recipe {path} must be a mapping of keys, for instance 'data: {{path: images/}}'")
    document.setdefault("name", path.stem)
    chosen = _chosen_sets(document.pop("sets", None) or {}, sets or [], str(path))
    return parse(document, [*chosen, *(overrides or [])], origin=str(path))


def sets_of(source: str | Path) -> dict[str, list[str]]:
    """The sets of overrides that a recipe carries. Raises RecipeError."""
    document = yaml.safe_load(find(source).read_text(encoding="utf-8"))
    return dict((document.get("sets") or {}) if isinstance(document, dict) else {})


def _chosen_sets(known: Any, names: list[str], origin: str) -> list[str]:
    well_formed = isinstance(known, dict) and all(
        isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)
        for entries in known.values()
    )
    if not well_formed:
        raise RecipeError(
            f"{origin}: sets: must map names to lists of key.path=value, for instance quick: [data.limit=500]"
        )
    if unknown := [name for name in names if name not in known]:
        raise RecipeError(
            f"{origin} has no set {', '.join(map(repr, unknown))} (it has: {', '.join(known) or 'none'})"
        )
    return [entry for name in names for entry in known[name]]


def parse(document: dict[str, Any], overrides: list[str], origin: str = "recipe") -> Recipe:
    """Check a mapping with overrides applied. Raises RecipeError with every mistake, one a line."""
    mistakes = [mistake for text in overrides if (mistake := _apply(document, text))]
    _default_backbone(document)
    _default_tokenizer(document)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        mistakes += [_explain(detail, document) for detail in error.errors()]
    if mistakes:
        raise RecipeError(
            f"{origin}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}\n  " + "\n  ".join(mistakes)
        )
    return recipe


def with_overrides(recipe: Recipe, overrides: list[str], **sections: Any) -> Recipe:
    """A new recipe with `key.path=value` and whole sections replaced, checked again."""
    document = recipe.model_dump(mode="json")
    document.update({key: value for key, value in sections.items() if value is not None})
    return parse(document, overrides, origin="command line")


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).parent
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find(source: str | Path) -> Path:
    """The file that `source` names: a path, or the name of a shipped recipe."""
    path = Path(source)
    if path.is_file():
        return path
    known = shipped()
    if path.stem in known and path.suffix in ("", ".yaml") and path.parent.name in ("", "recipes"):
        return known[path.stem]
    near = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"no recipe {str(source)!r}{hint} (shipped: {', '.join(known)}; or the path of a YAML file)"
    )


def _default_backbone(document: dict[str, Any]) -> None:
    """Where only the modality is named, its own network from random weights."""
    name = DEFAULT_BACKBONES.get(str(document.get("modality")))
    backbone = document.setdefault("backbone", {}) if name else None
    if name and isinstance(backbone, dict):
        backbone.setdefault("name", name)
        if backbone["name"] == name:
            backbone.setdefault("weights", "none")


def _default_tokenizer(document: dict[str, Any]) -> None:
    """A Hugging Face network reads what its own tokenizer makes of a SMILES, unless another one is named."""
    backbone, data = document.get("backbone"), document.get("data")
    name = str(backbone.get("name", "")) if isinstance(backbone, dict) else ""
    if document.get("modality") == "molecule" and name.startswith("huggingface/") and isinstance(data, dict):
        section = data.setdefault("molecule", {})
        if isinstance(section, dict) and section.get("tokenizer") is None:
            section["tokenizer"] = name.removeprefix("huggingface/")


def _apply(document: dict[str, Any], text: str) -> str | None:
    """Set one `key.path=value` in place; returns what is wrong with it, if anything."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        return f"{text!r} is not of the form key.path=value, for instance data.path=images/"
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError:
        parsed = value
    *parents, last = key.split(".")
    node = document
    for name in parents:
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            return f"{key}: {name!r} holds a value, not a section"
        node = child
    node[last] = os.path.expanduser(parsed) if isinstance(parsed, str) else parsed  # noqa: PTH111
    return None


def _explain(detail: Any, document: dict[str, Any]) -> str:
    """One line for one of pydantic's findings."""
    where = ".".join(str(part) for part in detail["loc"]) or "recipe"
    if detail["type"] == "extra_forbidden":
        *parents, last = (str(part) for part in detail["loc"])
        valid = list(_section(parents).model_fields)
        near = difflib.get_close_matches(last, valid, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*parents, near[0]])!r}?" if near else f"valid here: {', '.join(valid)}"
        )
        return f"{where}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{where}: missing"
    message = detail["msg"].removeprefix("Value error, ")
    got = detail.get("input")
    shown = f" (got {got!r})" if isinstance(got, (str, int, float, bool)) else ""
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"


def _section(path: list[str]) -> type[BaseModel]:
    """The model class of the section at `path`."""
    section: type[BaseModel] = Recipe
    for name in path:
        annotation = section.model_fields[name].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return section
