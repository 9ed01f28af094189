"""What each command returns with `--json`; `tlexport schema NAME` prints these as JSON Schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tlexport.timings import CurvePoint, Knee, LargestRate, Latency, Memory, OpenLoop, Watch


class Result(BaseModel):
    """Base of every stage's result: plain values, so that it can be stored in the run and printed."""

    model_config = ConfigDict(frozen=True)


class WeightsSummary(Result):
    """How the pretrained weights fitted the backbone; tensor counts."""

    source: str
    origin: str = Field("", description="where they come from, in words; empty: not recorded")
    licence: str = Field("", description="as their publisher states it; empty: not recorded")
    matched: int
    total: int
    head: tuple[str, ...] = Field((), description="tensors of the old head, left out")
    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    sha256: str | None = None


class Metrics(Result):
    """Metric name -> value (`auc`, `accuracy`, `balanced_accuracy`, `ece` ...) per split."""

    val: dict[str, float]
    test: dict[str, float]


class PretrainResult(Result):
    run: str
    backbone: str
    objective: str
    samples: dict[str, int] = Field(description="per split; test is kept out of pretraining")
    first_loss: float = Field(description="on the validation split before training")
    val_loss: float = Field(description="on the validation split at the best epoch")
    epochs: int
    best_epoch: int
    seconds: float
    samples_per_second: float
    device: str
    resumed_from: int = Field(0, description="epochs that an earlier, interrupted call had done")
    weights: WeightsSummary
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Baseline(Result):
    """A plain model fitted on the same training split and judged on the same test split."""

    name: str
    description: str
    metrics: Metrics
    lead: float | None = Field(
        description="how much better than it the fine-tuned model is, in the recipe's metric; negative: the baseline wins"
    )
    lead_low: float | None
    lead_high: float | None
    verdict: str = Field(description="in words, with the numbers")
    run: str | None = Field(None, description="run directory of its graph, to be built like any other")
    why_not: str = Field("", description="why it has no graph")
    seconds: float


class BaselinesResult(Result):
    run: str
    headline: str = Field(
        "", description="what has to be read first: a plain baseline that does at least as well"
    )
    baselines: tuple[Baseline, ...]


class FinetuneResult(Result):
    headline: str = Field(
        "", description="what has to be read first: a plain baseline that does at least as well"
    )
    run: str
    strategy: str
    backbone: str
    task: str
    classes: tuple[str, ...]
    samples: dict[str, int] = Field(description="per split")
    metric: str = Field(description="the recipe's metric: chosen the best epoch, judges every variant")
    metrics: Metrics
    epochs: int
    best_epoch: int
    seconds: float
    images_per_second: float
    device: str
    resumed_from: int = Field(0, description="epochs that an earlier, interrupted call had done")
    weights: WeightsSummary
    corrupt: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = Field((), description="samples of val or test that are also in train")
    problems: tuple[str, ...] = Field(
        (), description="what was left out or changed in the data, and how much"
    )
    leaks: tuple[str, ...] = Field(
        (), description="what gives the label away, or stands on both sides of the split"
    )
    baselines: tuple[Baseline, ...] = ()
    race: dict[str, Any] | None = Field(None, description="how strategy: auto chose, with its evidence")
    notes: tuple[str, ...] = ()


class ExportParity(Result):
    """Largest error of the FP32 graph in ONNX Runtime against eager PyTorch on real samples."""

    output: str
    batch: int
    max_abs_error: float
    scale: float
    relative: float


class ExportResult(Result):
    run: str
    graph: str
    opset: int
    parameters: int
    size_bytes: int
    parity: tuple[ExportParity, ...]
    golden: int = Field(description="golden samples kept")


class GraphInfo(Result):
    name: str
    precision: str
    file: str
    size_bytes: int
    compute: dict[str, int] = Field(description="compute nodes (Conv, Gemm, MatMul) per dtype")


class LayerCost(Result):
    """A group of layers that change their precision together."""

    layers: tuple[str, ...] = Field(description="names of the products in the graph")
    noise: float | None = Field(
        description="squared error of the scores as a share of their variance when only this group is in low precision; "
        "null: infinite"
    )
    macs: float = Field(description="share of the graph's multiply-accumulates")
    kept: bool = Field(description="left in FP32")


class SearchTrial(Result):
    """A graph that was judged on the validation samples while the budget was searched for."""

    step: str = Field(description="what was changed, in words")
    kept: tuple[str, ...] = Field((), description="layers left in FP32")
    drop: float | None = Field(
        description="reference minus graph on validation samples; null: outputs not finite"
    )
    drop_low: float | None
    drop_high: float | None = Field(
        description="unfavourable end of the paired interval: the budget limits this"
    )
    low_macs: float = Field(description="share of the multiply-accumulates in low precision")
    size_bytes: int
    cost_ms: float = Field(description="of one sample, by the cost model: not measured")
    within: bool


class GraphSearch(Result):
    """How one typed graph was brought within the budget. The last trial that is within it was taken."""

    graph: str
    budget: float = Field(description="largest drop allowed, in the metric's unit")
    samples: int = Field(description="validation samples")
    cost_model: str
    trials: tuple[SearchTrial, ...]
    layers: tuple[LayerCost, ...] = Field((), description="most harmful first; empty where it was not asked")
    kept: tuple[str, ...] = Field((), description="layers left in FP32")
    evaluations: float = Field(description="passes over the validation samples, or over as many elsewhere")
    note: str = ""


class ErrorStep(Result):
    """What one step on the way from PyTorch to the artifact adds, on the same samples."""

    step: str = Field(description="what is held against what")
    noise: float | None = Field(
        description="squared error of the outputs as a share of the reference's variance; null: not finite"
    )
    db: float | None = Field(description="the same as a signal-to-noise ratio; null: no error, or not finite")
    max_abs_error: float | None
    flips: int | None = Field(description="samples whose decision changes; null in a regression")


class LayerNoise(Result):
    """Signal-to-quantisation-noise ratio of a layer's output; errors of the layers before are in it."""

    layer: str
    operator: str
    db: float | None = Field(description="null: no error at all, or a value that is not finite (`finite`)")
    finite: bool


class Culprit(Result):
    layers: tuple[str, ...] = Field(description="products that change their precision together")
    share: float = Field(description="of the whole squared error, gone when they alone are left in FP32")
    cause: str
    advice: str


class ExplainResult(Result):
    run: str
    graph: str
    samples: int
    steps: tuple[ErrorStep, ...]
    layers: tuple[LayerNoise, ...] = Field(description="in the graph's order")
    culprits: tuple[Culprit, ...]
    evaluations: int = Field(description="graphs that were run to find them")
    sentence: str


class QuantizeResult(Result):
    run: str
    graphs: tuple[GraphInfo, ...]
    searches: tuple[GraphSearch, ...] = ()
    refused: dict[str, str] = Field(default_factory=dict, description="graph -> why it cannot be made")
    calibration_samples: int
    calibration_method: str


class Variant(Result):
    """One (graph, backend, target). Values that were not measured are null, never estimated."""

    name: str
    backend: str
    target: str
    precision: str
    metric: float | None = Field(None, description="the recipe's metric on the test split")
    drop: float | None = Field(None, description="reference minus variant; positive is worse")
    drop_low: float | None = None
    drop_high: float | None = Field(
        None, description="unfavourable end of the paired interval; the gate holds this"
    )
    flips: int | None = Field(None, description="test samples whose decision changed")
    flips_upper: float | None = Field(None, description="upper confidence bound of the share of flips")
    max_abs_error: float | None = None
    usual_error: float | None = Field(
        None,
        description="what nine of ten test samples' largest error does not exceed; null where golden samples are none of them",
    )
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    threads: int | None = Field(None, description="threads the variant was timed with")
    count: int | None = Field(None, description="timed samples behind the percentiles")
    dropped: str = Field("", description="why its timing was ended early: too far behind the best")
    cost_ms: float | None = Field(
        None, description="of one sample by the cost model, where the target is not here: not measured"
    )
    calls_per_sample: int | None = Field(
        None,
        description="calls that a sample is the mean of: more than 1 where reading the clock would count; "
        "the percentiles are then of such means",
    )
    speedup: float | None = Field(
        None,
        description="median latency of torch eager over this variant's, batch 1; null where there is no PyTorch model",
    )
    throughput: dict[str, float] | None = Field(None, description="samples per second by batch size")
    knee: Knee | None = Field(None, description="batch size beyond which throughput hardly grows")
    latency: Latency | None = Field(
        None, description="the same percentiles with their intervals, and every call"
    )
    unsettled: bool = Field(False, description="its warm-up ended by the clock, before its times stood still")
    memory: Memory | None = Field(None, description="in a process of its own, with the largest batch timed")
    too_slow: bool = Field(False, description="fails by a latency gate, and by no other")
    size_bytes: int | None = None
    sha256: str | None = None
    file: str | None = Field(None, description="artifact, relative to the run")
    receipt: str | None = Field(None, description="dtypes the compute layers were really built with")
    options: dict[str, Any] = Field(
        {}, description="what its backend was told that is not as by default (the recipe's tensorrt section)"
    )
    judged_by: str | None = Field(None, description="what executed the graph for the accuracy numbers")
    verdict: str = "unjudged"  # pass | fail | compiled, not run here | refused | unjudged
    reason: str = ""


class CompileResult(Result):
    run: str
    variants: tuple[Variant, ...]


class Decision(Result):
    """How a decision is made of probabilities: chosen on validation samples, frozen, and the same in the bundle."""

    rule: str = Field(description="in words: most probable class, or how the cut-off was chosen")
    thresholds: tuple[float, ...] | None = Field(
        None,
        description="a label is decided for at this probability or above: one of class 1 (binary) or one a label; "
        "null: the most probable class",
    )
    samples: int = Field(0, description="validation samples that chose them; 0: none were needed")

    def in_words(self) -> str:
        cuts = ", ".join(f"{cut:.4g}" for cut in self.thresholds or ())
        return f"{self.rule}{f' ({cuts})' if cuts else ''}"


class FlipCount(Result):
    """Test samples whose decision at the operating threshold is not the reference's."""

    count: int
    harmful: int = Field(description="right before, wrong now")
    harmless: int = Field(description="the others: wrong before, or otherwise wrong now")
    share: float
    upper: float = Field(description="upper confidence bound of the share in the population")
    mcnemar_p: float = Field(description="exact mid-p of as many harmful against as many mended decisions")


class SliceDrop(Result):
    """The metric's drop on some of the test samples."""

    slice: str = Field(description="class=cat, group=17, sex=F, year=2019 ...")
    samples: int
    reference: float | None
    drop: float | None = Field(description="null: too few samples, or the metric is undefined there")
    drop_low: float | None
    drop_high: float | None
    p: float | None = Field(
        None, description="that the slice has no drop at all, one-sided, Holm over the slices"
    )
    note: str = ""


class CalibrationDrift(Result):
    """Probabilities held against outcomes; drift is variant minus reference on the same resamples, positive is worse."""

    ece: float = Field(description="of the variant: expected calibration error, its bias taken out")
    ece_reference: float
    ece_drift: float
    ece_drift_low: float
    ece_drift_high: float
    brier: float
    brier_reference: float
    brier_drift: float
    brier_drift_low: float
    brier_drift_high: float


class AucTest(Result):
    """DeLong: reference minus variant."""

    reference: float
    variant: float
    drop: float
    low: float
    high: float
    p: float = Field(description="two-sided, of no difference")


class ForecastTest(Result):
    """Diebold and Mariano: is the variant's loss the same?"""

    loss: str
    mean_difference: float = Field(description="variant minus reference; positive is worse")
    statistic: float
    p: float = Field(description="two-sided, of equal losses")
    periods: int
    lags: int


class Tails(Result):
    """Where a regression's errors hurt most, in the label's unit."""

    rmse: float
    rmse_reference: float
    rmse_low_decile: float = Field(description="over the samples with the smallest tenth of labels")
    rmse_low_decile_reference: float
    rmse_high_decile: float = Field(description="over the samples with the largest tenth of labels")
    rmse_high_decile_reference: float
    p99_error: float = Field(description="99% of the absolute errors are below")
    p99_error_reference: float


class AccuracyEvidence(Result):
    """What stands behind a variant's verdict on accuracy."""

    variant: str
    p: float | None = Field(None, description="that the drop is at the limit or beyond, one-sided")
    p_adjusted: float | None = Field(None, description="Holm over the variants of its target")
    needed: int | None = Field(None, description="test samples that would decide, about")
    flips: FlipCount | None = None
    auc: AucTest | None = None
    calibration: CalibrationDrift | None = None
    forecast: ForecastTest | None = None
    tails: Tails | None = None
    slices: tuple[SliceDrop, ...] = Field((), description="worst first; those without a drop last")
    worst_slice: str = Field("", description="in words; empty where no slice has a drop")
    notes: tuple[str, ...] = Field((), description="what could not be said, and why")


class VerifyResult(Result):
    run: str
    metric: str
    reference: float
    samples: int
    confidence: float
    gates: dict[str, Any]
    variants: tuple[Variant, ...]
    decision: Decision | None = Field(None, description="null in a regression, where nothing is decided")
    evidence: tuple[AccuracyEvidence, ...] = ()


class Replayed(Result):
    """A bundle's variant asked its golden samples on this machine."""

    variant: Variant = Field(description="as verify and bench left it")
    verdict: str = Field(description="pass | fail | not run here | not trusted")
    reason: str
    limit: float = Field(description="largest difference from the reference that is taken for the same model")
    max_abs_error: float | None = None
    flips: int | None = Field(None, description="golden samples that are decided otherwise")


class ReplayResult(Result):
    bundle: str
    name: str
    metric: str
    reference: float | None
    samples: int = Field(description="golden samples")
    decision: Decision | None
    targets: dict[str, Replayed]


class Referenced(Result):
    """What variants are held against: the network as it was trained, on each device where one of them was timed."""

    reference: Variant
    reference_on_gpu: Variant | None = Field(
        None, description="what variants for a GPU are sped up against; null where none was timed"
    )

    @property
    def references(self) -> tuple[Variant, ...]:
        return (self.reference, *([self.reference_on_gpu] if self.reference_on_gpu else []))


class BenchResult(Referenced):
    run: str
    variants: tuple[Variant, ...]
    front: tuple[str, ...] = Field(
        description="variants that none for the same target beats in drop, latency (or cost by the model) and size at once"
    )
    threads: int = Field(description="the most that a variant could be given")
    machine: dict[str, Any]
    busy_percent: float = Field(description="share of all cores that others used just before the timing")
    clock_ns: float | None = Field(
        None, description="what timing a call that does nothing shows; not subtracted"
    )
    withheld: tuple[str, ...] = Field((), description="percentiles not stated, and why")
    notes: tuple[str, ...] = Field((), description="what the numbers mean for where to run it")
    watch: Watch | None = Field(None, description="what the machine did meanwhile")
    raw: str = Field(description="file with every timed run in seconds, relative to the run")


class MeasureResult(Result):
    """What `tlexport bench` finds of one variant of a bundle or run: closed loop, and what else was asked for."""

    path: str
    model: str
    variant: str
    backend: str
    target: str
    precision: str
    provider: str = Field(description="where it really ran, as the library reports it")
    threads: int = Field(description="of each worker")
    concurrency: int
    closed: Latency = Field(description="one worker, batch 1, the next call when the last one has returned")
    calls_per_sample: int = Field(description="calls that a sample of it is the mean of")
    unsettled: bool = Field(description="the warm-up ended by the clock, before times stood still")
    parts_ms: dict[str, float] | None = Field(
        None, description="of one call: host, copies and device apart; null where the backend cannot tell"
    )
    open: OpenLoop | None = None
    largest: LargestRate | None = None
    curve: tuple[CurvePoint, ...] = ()
    knee_batch: Knee | None = None
    knee_concurrency: Knee | None = None
    memory: Memory | None = None
    machine: dict[str, Any]
    watch: Watch
    limit_ms: float | None = Field(None, description="of the p99, from --max-p99 or the recipe's gates")
    verdict: Literal["pass", "fail", "undecided"] | None = Field(None, description="null: there is no limit")
    reason: str = ""
    notes: tuple[str, ...] = ()
    raw: str | None = Field(None, description="file with every timed call in seconds")


class GateVerdict(Result):
    """A new build held against an old one or a stored baseline. `verdict` follows from `low`, `high` and `limit` alone,
    but where `reason` says that the numbers do not count."""

    gate: Literal["latency", "accuracy"]
    name: str = Field(description="model, variant and batch")
    against: str = Field(description="what it is held against")
    measure: str = Field(description="what `value` is, in words")
    verdict: Literal["pass", "fail", "undecided"] = Field(
        description="fail: low > limit; pass: high <= limit; else undecided"
    )
    value: float | None = Field(description="null where nothing could be compared")
    low: float | None
    high: float | None
    confidence: float = Field(description="of the interval low to high, two-sided")
    tolerance: float = Field(
        description="what may be lost: a share of the latency, or a drop in the metric's unit"
    )
    limit: float = Field(
        description="the same on `value`'s scale: 1 + tolerance of a ratio, the tolerance of a drop"
    )
    count: int = Field(description="rounds, sessions or samples of the new build")
    unit: Literal["rounds", "sessions", "samples"]
    needed: int | None = Field(
        None, description="about so many of `unit` would decide; null: no number would tell"
    )
    reason: str = Field(description="one line")


class GateResult(Result):
    """What `bench --against`, `bench --baseline` and `verify --against` print."""

    path: str
    against: str | None = Field(None, description="the other bundle or run, or the file of baselines")
    verdicts: tuple[GateVerdict, ...] = Field(
        (), description="empty where a baseline was recorded and nothing compared"
    )
    saved: bool = Field(False, description="the sessions were stored as the baseline from now on")
    new_ms: tuple[float, ...] = Field(
        (), description="median latency of each round or session of the new build"
    )
    old_ms: tuple[float, ...] = Field((), description="of the old build or the baseline")
    new_control_ms: tuple[float, ...] = Field(
        (), description="of the fixed workload timed beside it, by session"
    )
    old_control_ms: tuple[float, ...] = ()
    machine: dict[str, Any] = Field({}, description="what a baseline is keyed by")
    seconds: float = Field(0.0, description="the measuring took")


class PackageResult(Result):
    run: str
    bundle: str
    chosen: dict[str, str] = Field(description="target -> variant")
    reasons: dict[str, str] = Field(description="target -> why this one")
    losers: dict[str, str] = Field(description="every other variant -> why not, in one line")
    signed: bool = False
    files: int
    size_bytes: int


class ReportResult(Result):
    run: str
    path: str = Field(description="the HTML file")
    bytes: int
    sections: tuple[str, ...] = Field(description="headings of what the run has something to show for")
    sources: dict[str, str] = Field(description="file of the run that the page rests on -> its SHA-256")


class BuildResult(Referenced):
    run: str
    bundle: str | None
    report: str | None
    chosen: dict[str, str]
    reasons: dict[str, str]
    losers: dict[str, str] = Field(description="every other variant -> why not, in one line")
    front: tuple[str, ...] = Field(
        description="variants that none for the same target beats in drop, latency (or cost by the model) and size at once"
    )
    variants: tuple[Variant, ...]
    seconds: dict[str, float] = Field(
        description="per stage; next to none where it was unchanged and skipped"
    )
    failed: dict[str, str] = Field(default_factory=dict, description="target -> why no variant passed")
    notes: tuple[str, ...] = Field((), description="what the measured latencies mean for where to run it")


class PredictResult(Result):
    bundle: str
    target: str
    variant: str
    provider: str = Field(description="where it really ran, as the library reports it")
    task: str
    samples: int
    decisions: dict[str, int] = Field(
        description="class or label -> samples it was decided for; empty for values"
    )
    out: str = Field(description="CSV: name, decision (none for values), a column a class or value")
    first: tuple[dict[str, Any], ...] = Field(description="its first rows")
    notes: tuple[str, ...] = Field((), description="what of the data was not as in training")
    seconds: float


class BackendInfo(Result):
    name: str
    installed: bool
    version: str
    builds: tuple[str, ...]
    runs: tuple[str, ...]
    note: str
    options: tuple[str, ...] = Field((), description="keys of the recipe's tensorrt section that it honours")


class DoctorResult(Result):
    versions: dict[str, str]
    machine: dict[str, Any]
    backends: tuple[BackendInfo, ...]
    targets: dict[str, str] = Field(description="target -> what can be done for it here")


class InspectResult(Result):
    path: str
    kind: str
    summary: dict[str, Any]


class RecipesResult(Result):
    recipes: dict[str, str] = Field(description="name -> description, or the file it was copied to")


class Refusal(Result):
    """Why a bundle is not loaded."""

    kind: Literal[
        "manifest", "version", "name", "size", "missing", "altered", "unlisted", "link", "special", "signature", "unsigned",
        "target", "library", "driver", "system", "code",
    ] = Field(
        description="manifest to unsigned: it may not be trusted; target to code: it cannot run on this machine"
    )  # fmt: skip
    file: str = Field("", description="in the bundle; empty: the bundle as a whole")
    reason: str

    @property
    def untrusted(self) -> bool:
        return self.kind not in ("target", "library", "driver", "system", "code")


class TargetFit(Result):
    """Whether what a target runs may and can be loaded on this machine."""

    variant: str
    backend: str
    is_code: bool = Field(description="an engine or a compiled library, which needs a verified signature")
    loadable: bool | None = Field(description="null: not looked at, since the bundle itself is refused")
    refusals: tuple[Refusal, ...] = Field((), description="why it is not loadable")


class VerifyBundleResult(Result):
    """What `tlexport verify-bundle` prints; nothing of the bundle was loaded for it."""

    bundle: str
    name: str | None = Field(description="null: the manifest cannot be read")
    bundle_version: int | None
    signature: Literal["verified", "refused", "not checked", "absent"] = Field(
        description="not checked: there is one, and no key or identity was given to check it by"
    )
    files: int = Field(description="with a recorded hash")
    bytes: int
    targets: dict[str, TargetFit]
    refusals: tuple[Refusal, ...] = Field(description="against the bundle itself; empty: it is as packaged")


class ErrorResult(Result):
    """What any command prints with --json when it fails."""

    error: str
    kind: str
    exit_code: int


class Differences(Result):
    """A server's answers to golden samples held against the reference's outputs."""

    samples: int = Field(description="answers: a sample that was asked several times counts as often")
    limit: float = Field(description="largest difference from the reference that is taken for the same model")
    max_abs_error: float | None = Field(description="of the answers that are finite; null: none is")
    median_abs_error: float | None = Field(description="of the samples' largest differences")
    rms_error: float | None
    over: int = Field(description="answers beyond the limit, or not finite")
    worst_sample: int = Field(description="golden sample with the largest difference, from 0")
    not_finite: tuple[int, ...] = Field((), description="golden samples answered with NaN or infinity")
    flips: int | None = Field(None, description="answers that are decided otherwise; null in a regression")


class Misplaced(Result):
    """A request of the shuffled stream that got the answers to other samples."""

    request: int
    sent: tuple[int, ...] = Field(description="golden samples, from 0")
    answered: tuple[int, ...] = Field(description="golden samples whose answers came back")


class Suspect(Result):
    """A known mistake, and how much of what a server answers it explains."""

    says: str
    advice: str
    explained: float = Field(
        description="share of the squared difference between server and model that it explains"
    )
    max_abs_error: float | None = Field(description="between the server and the model with the mistake")
    fits: bool = Field(description="its answers are the server's within the limit")
    p: float | None = Field(
        None, description="that answers which say nothing of their sample go with it so well; null: it fits"
    )


class Diagnosis(Result):
    verdict: Literal["named", "suspected", "unknown"]
    says: str
    advice: str
    suspects: tuple[Suspect, ...] = Field(
        (), description="likeliest first; those that fit before those that are near"
    )


class BitParity(Result):
    """Answers compared bit by bit with the local session's at the same batch size."""

    batch: int = Field(description="samples a request")
    answers: int
    identical: int
    at_other_batch: dict[str, int] = Field(
        {},
        description="answers that are not identical but have the bits of the local session's at another batch size, by that "
        "size (the smallest): the same model, computed in batches of another size than the request's, or on other kernels",
    )


class ServerCheck(Result):
    """One thing that a live server was held to."""

    name: str
    verdict: Literal["pass", "fail", "undecided"]
    reason: str = ""


class CheckServerResult(Result):
    """What `tlexport check-server` finds."""

    url: str
    bundle: str
    model: str = Field(description="as the server calls it")
    versions: tuple[str, ...] = Field((), description="that the server states")
    target: str
    variant: str
    encoding: str = Field(description="how tensors travelled: binary, json or grpc")
    golden: Differences = Field(description="one sample a request, one after the other")
    batches: dict[str, Differences] = Field(
        {}, description="samples a request -> all golden samples in such requests"
    )
    stream: Differences | None = Field(
        None, description="shuffled samples in mixed batches over several connections; null: not asked"
    )
    requests: int = Field(0, description="of the stream")
    connections: int = 0
    misplaced: tuple[Misplaced, ...] = Field((), description="answers that belong to other requests")
    indistinct: int = Field(
        0, description="pairs of golden samples with like outputs: their exchange would show nowhere"
    )
    bits: tuple[BitParity, ...] = Field((), description="empty where the variant cannot run here")
    metadata: tuple[str, ...] = Field(
        (), description="what the server states of its tensors and the manifest has otherwise"
    )
    diagnosis: Diagnosis | None = Field(
        None, description="the mistake that it looks like, where golden samples are answered otherwise"
    )
    checks: tuple[ServerCheck, ...] = Field(
        description="metadata, golden samples, each batch size, the shuffled stream"
    )
    verdict: Literal["pass", "fail", "undecided"] = Field(description="of the checks, the worst")
    reason: str = ""
    notes: tuple[str, ...] = ()


class LoadResult(Result):
    """What `tlexport load` finds of a live server."""

    url: str
    bundle: str
    model: str
    encoding: str
    batch: int = Field(description="samples a request")
    connections: int
    open: OpenLoop | None = Field(
        None, description="every request, whatever became of it; null: a search for the largest rate"
    )
    served: Latency | None = Field(
        None, description="of the requests that were answered, from their scheduled start"
    )
    counts: dict[str, int] = Field(
        {}, description="ok, wrong, overload, deadline, timeout, error ... -> requests"
    )
    errors: dict[str, str] = Field({}, description="kind -> what the server said first")
    offered_per_s: float | None = None
    goodput_per_s: float | None = Field(None, description="requests answered rightly, a second")
    shed: float | None = Field(
        None, description="share of the started requests that the server refused for overload"
    )
    waited: float | None = Field(
        None,
        description="share of the requests that were due and found every connection busy: beyond a few the server saw "
        "less than the rate",
    )
    max_abs_error: float | None = Field(None, description="of the answers, from the reference")
    largest: LargestRate | None = None
    machine: dict[str, Any]
    watch: Watch
    limit_ms: float | None = None
    verdict: Literal["pass", "fail", "undecided"] | None = Field(None, description="null: there is no limit")
    reason: str = ""
    notes: tuple[str, ...] = ()
    raw: str | None = Field(None, description="file with every request in seconds")


class ServeResult(Result):
    """What `tlexport serve` says once it answers."""

    bundle: str
    model: str
    version: str
    http: str
    grpc: str | None
    process: int


class DeployResult(Result):
    """A bundle at a place; `version` and `previous` where a server sees versions."""

    bundle: str
    place: str
    kind: str = Field(description="triton, kserve, ort, ovms, ray, bundle or oci")
    name: str
    version: int | None = None
    previous: int | None = Field(None, description="served until now; rollback serves it again")
    models: tuple[str, ...] = Field((), description="model directories, in the order they were switched")
    target: str | None = None
    variant: str | None = None
    digest: str | None = Field(None, description="of the manifest in the registry")
    files: int
    bytes: int
    was_there: bool = Field(False, description="the very same was deployed before; nothing was written")
    removed: tuple[int, ...] = Field((), description="half-written versions of dead deployers, cleaned up")
    pruned: tuple[int, ...] = Field((), description="older whole versions, removed as --keep says")
    dry_run: bool = False
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


class RollbackResult(Result):
    place: str
    name: str
    version: int = Field(description="served now")
    before: int | None = Field(description="served until now")
    models: tuple[str, ...]
    variant: str
    deployed: str = Field(description="when the version was written, UTC")


class PullResult(Result):
    source: str
    bundle: str
    name: str
    digest: str | None = Field(None, description="of the manifest in the registry")
    files: int
    bytes: int
    seconds: float


SCHEMAS: dict[str, type[BaseModel]] = {
    "pretrain": PretrainResult,
    "finetune": FinetuneResult,
    "export": ExportResult,
    "quantize": QuantizeResult,
    "compile": CompileResult,
    "explain-drop": ExplainResult,
    "verify": VerifyResult,
    "replay": ReplayResult,
    "verify-bundle": VerifyBundleResult,
    "bench": BenchResult,
    "bench-bundle": MeasureResult,
    "gate": GateResult,
    "package": PackageResult,
    "report": ReportResult,
    "build": BuildResult,
    "predict": PredictResult,
    "doctor": DoctorResult,
    "inspect": InspectResult,
    "recipes": RecipesResult,
    "serve": ServeResult,
    "check-server": CheckServerResult,
    "load": LoadResult,
    "deploy": DeployResult,
    "rollback": RollbackResult,
    "pull": PullResult,
    "error": ErrorResult,
}
