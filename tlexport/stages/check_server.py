"""check_server: a bundle's golden samples through a live server, held against the reference and against this machine's session.

Whether the same model answers, whether every answer belongs to its request, and if not, which known mistake it looks like.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from tlexport import tensors
from tlexport.backends import DEFAULTS, Runner, ort, registry, typed
from tlexport.bundle import golden, manifest, preflight
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.errors import CompileError, GateError, NotInstalledError, RecipeError, UndecidedError
from tlexport.evidence.accuracy import operating
from tlexport.evidence.live import mistakes, parity, stream, verdict
from tlexport.evidence.live.diagnosis import Hypothesis
from tlexport.evidence.live.mistakes import answers as behind
from tlexport.evidence.live.verdict import Answers, Seen, Truth
from tlexport.graph import retype
from tlexport.progress import Progress
from tlexport.results import BitParity, CheckServerResult, Refusal
from tlexport.serving import asking
from tlexport.serving import client as clients
from tlexport.serving.asking import Asking
from tlexport.serving.client import Access
from tlexport.serving.datatypes import ProtocolError

LARGEST = 64  # samples of a request at most, whatever the profile allows

Session = Callable[..., Answers]  # (samples, samples a call) -> outputs [n, K]


class Ask(BaseModel):
    """What is asked of the server."""

    model_config = ConfigDict(frozen=True)

    model: str | None = Field(
        None, description="as the server calls it; default: the bundle's name, else its only one"
    )
    target: str | None = None
    samples: int = Field(256, ge=0, description="of the shuffled stream; 0: none")
    concurrency: int = Field(4, ge=1, le=256, description="connections of the stream")
    seed: int = Field(0, ge=0)
    previous: tuple[Path, ...] = Field((), description="earlier bundles, to be recognised in the answers")


@dataclass(frozen=True)
class _Bundle:
    """What is compared with; `session` is None where the variant cannot run here."""

    path: Path
    document: manifest.Manifest
    target: str
    refused: dict[str, tuple[Refusal, ...]]  # target -> why its variant may not or cannot be loaded here
    inputs: NDArray[Any]
    session: Session | None
    truth: Truth
    notes: list[str]

    @property
    def largest(self) -> int:
        return min(self.document.batch.max, LARGEST)


def run(
    url: str, bundle: Path, ask: Ask, access: Access, progress: Progress, *, trust: Trust = NOBODY
) -> CheckServerResult:
    """Compare the server at `url` with `bundle`, which is checked before anything of it is loaded.

    Raises PreflightError if the bundle is not as packaged, ServerError if the server cannot be reached, has not the model or is
    not ready, UndecidedError if it refuses to answer.
    """
    with ExitStack() as stack:
        held = _opened(bundle, ask.target, trust, stack)
        client = clients.connect(url, access)
        stack.callback(client.close)
        clients.require_ready(client, "")
        model = clients.choose(client, ask.model, held.document.name)
        clients.require_ready(client, model.name)
        seen = _seen(held, model, client, partial(clients.connect, url, access), ask, stack, progress)
        found = verdict.judged(held.truth, seen, partial(_hypotheses, held, seen.golden, ask, stack))
        bits = verdict.bits(held.truth, seen)
        return CheckServerResult(
            url=url,
            bundle=str(bundle),
            model=model.name,
            versions=model.versions,
            target=held.target,
            variant=held.document.targets[held.target].variant.name,
            encoding=client.encoding,
            golden=held.truth.differences(seen.golden),
            batches={str(size): held.truth.differences(of) for size, of in seen.batches.items()},
            stream=seen.of_stream(held.truth),
            requests=len(seen.streamed.rows) if seen.streamed else 0,
            connections=ask.concurrency if seen.streamed else 1,
            misplaced=found.misplaced[: parity.MOST_TOLD],
            indistinct=verdict.indistinct(held.truth),
            bits=bits,
            metadata=seen.stated,
            diagnosis=found.diagnosis,
            checks=found.checks,
            verdict=found.verdict,
            reason=found.reason,
            notes=_notes(held, found, bits),
        )


def failure(result: CheckServerResult) -> GateError | None:
    """The error that the verdict amounts to."""
    if result.verdict == "pass":
        return None
    kind = UndecidedError if result.verdict == "undecided" else GateError
    return kind(f"{result.url}: {result.reason}")


def _seen(
    held: _Bundle,
    model: clients.Model,
    client: clients.Client,
    connect: Callable[[], clients.Client],
    ask: Ask,
    stack: ExitStack,
    progress: Progress,
) -> Seen:
    stated = tuple(_stated(model, held.document))
    try:
        with progress.bar("check-server") as step:
            first = tensors.named(held.inputs[:1], [spec.name for spec in held.document.inputs])
            asking.patiently(lambda: clients.negotiate(client, model.name, first))
            one = _asking(held, model.name, client)
            step(1, 4, "golden samples")
            golden = one.all_in(1)
            step(2, 4, "batches")
            batches = {size: one.all_in(size) for size in _sizes(held.largest) if size > 1}
            step(3, 4, "shuffled stream")
            streamed = None
            if ask.samples:
                requests = stream.drawn(len(held.inputs), ask.samples, held.largest, ask.seed)
                connections = [connect() for _ in range(min(ask.concurrency, len(requests)))]
                for other in connections:
                    other.encoding = client.encoding
                    stack.callback(other.close)
                streamed = stream.sent([_asking(held, model.name, of) for of in connections], requests)
            step(4, 4)
            return Seen(golden, batches, streamed, stated)
    except ProtocolError as error:
        told = f"; the server states: {'; '.join(stated)}" if stated else ""
        raise UndecidedError(f"{client.url} cannot be asked the golden samples: {error}{told}") from error


def _asking(held: _Bundle, model: str, client: clients.Client) -> Asking:
    return Asking(client, model, held.inputs, held.document.inputs, held.document.outputs[0])


def _stated(model: clients.Model, document: manifest.Manifest) -> Iterator[str]:
    for what, stated, specs in (
        ("input", model.inputs, document.inputs),
        ("output", model.outputs, document.outputs),
    ):
        yield from parity.metadata([(of.name, of.dtype, of.shape) for of in stated], specs, what)


def _sizes(largest: int) -> list[int]:
    """1, 2, 4 ... and the largest."""
    return sorted({*(2**power for power in range(7) if 2**power <= largest), largest})


def _opened(bundle: Path, wanted: str | None, trust: Trust, stack: ExitStack) -> _Bundle:
    document, refused = preflight.by_target(bundle, trust=trust)
    target = manifest.target(document, wanted)
    entry = document.targets[target]
    inputs, expected = golden.load(bundle, document)
    session, own, why_not = None, {}, "; ".join(of.reason for of in refused[target])
    try:
        if not refused[target]:
            session = _session(bundle / entry.file, entry.variant.backend, target, document, stack)
    except (NotInstalledError, CompileError) as error:
        why_not = " ".join(str(error).split())
    if session is not None:
        for size in _sizes(min(document.batch.max, LARGEST)):
            own[size] = session(inputs[asking.filled(len(inputs), size)], size)[: len(inputs)]
    decide = None
    if document.task != "regression":
        decide = partial(operating.decide, task=document.task, decision=document.decision)
    truth = Truth(
        expected=expected,
        error=entry.variant.max_abs_error,
        own=own,
        why_not=why_not,
        decide=decide,
    )
    return _Bundle(bundle, document, target, refused, inputs, session, truth, [])


def _session(
    artifact: Path, backend: str, target: str, document: manifest.Manifest, stack: ExitStack
) -> Session:
    """The artifact, loaded here. Real numbers in place of bytes are asked of a copy of its graph that takes them."""
    names = tuple(spec.name for spec in document.inputs)
    entry = document.targets.get(target)
    threads = (entry.variant.threads if entry else None) or 1
    runner: Runner = stack.enter_context(registry.loader(backend, artifact, target, DEFAULTS)(threads))
    floats: list[Runner] = []

    def of_floats() -> Runner:
        if not floats:
            made = retype.taking_floats(typed.load(artifact)) if artifact.suffix == ort.SUFFIX else None
            if made is None:
                raise CompileError(f"{artifact.name} takes nothing but bytes")
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / artifact.name
            copy.write_bytes(made.SerializeToString())
            floats.append(stack.enter_context(registry.loader(backend, copy, target, DEFAULTS)(threads)))
        return floats[0]

    def session(samples: NDArray[Any], size: int = min(document.batch.max, LARGEST)) -> Answers:
        real = document.inputs[0].dtype == "uint8" and samples.dtype == np.float32
        chosen = of_floats() if real else runner
        parts = (samples[start : start + size] for start in range(0, len(samples), size))
        return np.concatenate([next(iter(chosen.run(tensors.named(part, names)).values())) for part in parts])

    return session


def _hypotheses(held: _Bundle, answers: Answers, ask: Ask, stack: ExitStack) -> Iterator[Hypothesis]:
    """What the server would answer by each known mistake. Where the variant does not run here, the FP32 graph is asked."""
    document, own = held.document, held.truth.nearest.astype(np.float64)
    yield from behind.explanations(answers.astype(np.float64), own, document.task, document.classes)
    full = _session(held.path / "graphs/fp32.onnx", ort.NAME, "cpu", document, stack)
    session = held.session or full
    for mistake in mistakes.known(document.modality, document.inputs, document.preprocessing):
        try:
            outputs = session(mistake.change(held.inputs))
        except CompileError as error:  # real numbers cannot be asked of every artifact
            held.notes.append(f"not tried: {mistake.says} ({error})")
            continue
        yield Hypothesis(mistake.says, mistake.advice, outputs, mistake.least)
    deploy = f"deploy {document.targets[held.target].file} of the bundle"
    yield Hypothesis("another precision: the FP32 graph", deploy, full(held.inputs))
    yield from _others(held, deploy, stack)
    for path in ask.previous:
        yield from _previous(held, path, stack)


def _others(held: _Bundle, deploy: str, stack: ExitStack) -> Iterator[Hypothesis]:
    """The other targets' variants, where they run here."""
    for target, entry in held.document.targets.items():
        if target == held.target:
            continue
        if held.refused[target]:
            held.notes.append(f"not tried: the variant for {target} ({held.refused[target][0].reason})")
            continue
        try:
            other = _session(held.path / entry.file, entry.variant.backend, target, held.document, stack)
        except (NotInstalledError, CompileError) as error:
            held.notes.append(f"not tried: the variant for {target} ({' '.join(str(error).split())})")
            continue
        yield Hypothesis(f"another variant: {entry.variant.name}", deploy, other(held.inputs))


def _previous(held: _Bundle, path: Path, stack: ExitStack) -> Iterator[Hypothesis]:
    document, refused = preflight.by_target(path)
    if document.inputs != held.document.inputs:
        raise RecipeError(f"{path} takes other inputs than {held.path}: it is no earlier version of it")
    target = held.target if held.target in document.targets else manifest.target(document, None)
    entry = document.targets[target]
    if refused[target]:
        held.notes.append(f"not tried: {path} ({refused[target][0].reason})")
        return
    session = _session(path / entry.file, entry.variant.backend, target, document, stack)
    yield Hypothesis(
        f"an older version of the model: {path}",
        f"deploy {held.path}, and see which version the server has loaded",
        session(held.inputs),
    )


def _notes(held: _Bundle, found: verdict.Verdict, bits: tuple[BitParity, ...]) -> tuple[str, ...]:
    truth, said = held.truth, list(held.notes)
    if not truth.own:
        said.append(f"not compared bit by bit: {truth.why_not}")
    if truth.wide:
        said.append(
            f"the error that verify measured for the variant makes the limit {truth.limit:.3g}, of a spread of {truth.spread:.3g}: "
            "only the comparison with this machine's session tells"
        )
    said += [
        f"of the answers at batch {of.batch} {count} have the bits of this machine's session at batch {other}, not at {of.batch}: the "
        f"same model, computed in batches of another size (split, padded or merged with other clients' requests) or on other kernels"
        for of in bits
        for other, count in of.at_other_batch.items()
    ]
    if found.diagnosis and found.verdict == "pass":
        said.append(
            f"answers are not this machine's session's, yet within the verified error: {found.diagnosis.says}"
        )
    return tuple(said)
