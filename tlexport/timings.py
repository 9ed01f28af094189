"""What timing finds, as plain values: they are stored in results and bundles, and printed with `--json`.

Times are in milliseconds unless a name says otherwise.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Value(BaseModel):
    """Base: plain and frozen."""

    model_config = ConfigDict(frozen=True)


class Percentile(Value):
    """A quantile of the latency and its interval; all three values null, with the reason, where it is withheld."""

    q: float
    value_ms: float | None
    low_ms: float | None
    high_ms: float | None
    count: int
    confidence: float
    reason: str = Field("", description="why it is withheld")
    supported: bool = Field(
        False,
        description="the count satisfies MLPerf's rule: the value alone may be quoted, at 99% within its margin",
    )
    note: str = Field("", description="what MLPerf's rule needs, where it is not satisfied")
    worth: float | None = Field(
        None,
        description="how many independent calls the count is worth, where neighbours in a queue are alike",
    )


class Latency(Value):
    """A distribution of latencies."""

    count: int
    p50: Percentile
    p90: Percentile
    p99: Percentile
    mean_ms: float
    min_ms: float
    max_ms: float
    throughput_per_s: float = Field(description="items, over the time the counted calls took")
    histogram: str = Field(
        "",
        description="HdrHistogram V2, compressed, base64; nanoseconds, 3 significant digits; every call is in it",
    )
    drift: str = Field("", description="a trend over the time of measuring, in words; empty: none seen")


class OpenLoop(Value):
    """Requests that arrive when they will, whether or not the last one was answered."""

    arrivals: Literal["poisson", "fixed"]
    rate_per_s: float = Field(description="that was asked for")
    offered_per_s: float = Field(description="of the schedule as it was drawn")
    completed_per_s: float
    workers: int
    seconds: float = Field(description="from the first scheduled start to the last answer")
    requests: int
    unserved: int = Field(
        description="not started when the time was up; they are in the latencies with what they had waited by then"
    )
    utilisation: float = Field(description="share of the workers' time spent answering")
    latency: Latency = Field(description="from the scheduled start to the answer: waiting is in it")
    service: Latency = Field(description="from the real start to the answer")
    lag_p50_ms: float = Field(
        description="how late the generator itself was: worker free, request due, not started"
    )
    lag_p99_ms: float
    generator: str = Field(
        "", description="set where a notable share of the latency is the generator's own lateness"
    )
    overload: str = Field("", description="set where the queue grew: the rate is beyond what can be served")


class Probe(Value):
    """One open-loop run of the search for the largest rate."""

    rate_per_s: float
    seconds: float
    requests: int
    p99: Percentile
    verdict: Literal["within", "over", "undecided"]
    reason: str


class LargestRate(Value):
    """The largest arrival rate whose p99 meets a limit."""

    limit_ms: float
    rate_per_s: float | None = Field(
        description="met it with the p99's upper end; null: no rate that was tried did"
    )
    over_per_s: float | None = Field(description="smallest rate above it that did not; null: none was found")
    probes: tuple[Probe, ...]
    note: str = ""


class CurvePoint(Value):
    """Throughput with every worker always busy."""

    batch: int
    concurrency: int
    items_per_s: float
    low: float | None
    high: float | None
    p50_ms: float
    calls: int


class Knee(Value):
    """Where more (a larger batch, more workers) stops to pay."""

    at: int = Field(description="batch size or number of workers")
    items_per_s: float
    share: float = Field(description="of the best throughput of the curve")
    passed: bool = Field(description="false: the curve still rose at its end, the knee may lie beyond")
    rule: str


class Memory(Value):
    """What loading a candidate and running it takes, in MiB; null where it cannot be told."""

    host_peak_mib: float | None = Field(
        description="growth of the process's peak, its libraries loaded beforehand"
    )
    device_mib: float | None = Field(description="of the GPU's memory; null without one")


class GpuState(Value):
    name: str
    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    memory_used_mib: float | None
    throttled: tuple[str, ...] = Field((), description="reasons in words; being idle is none")


class Watch(Value):
    """What the machine did while something was measured; null where it cannot be read.

    Percentages are null too where the time was too short to tell: the kernel counts in ticks of 10 ms.
    """

    seconds: float
    cpu_mhz: tuple[float, ...] | None = Field(description="of each core, the lowest that was seen")
    cpu_mhz_highest: tuple[float, ...] | None
    steal_percent: float | None = Field(description="of all cores' time, that the hypervisor gave to others")
    others_percent: float | None = Field(description="of all cores' time, used by other processes")
    voluntary_switches: int | None
    involuntary_switches: int | None
    minor_faults: int | None
    major_faults: int | None
    throttled_periods: int | None = Field(description="in which the container had used up its CPU time")
    throttled_s: float | None
    gpus: tuple[GpuState, ...] = Field((), description="the last state; throttled: anything seen at any time")
    gpu_note: str = Field("", description="why there are none, or why they could not be asked")
    readings: int
    reading_ms: float = Field(description="what one reading cost; it is made outside the timed calls")
    warnings: tuple[str, ...] = ()
