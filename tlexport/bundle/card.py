"""The model card: Markdown that a person reads, with the front matter of Hugging Face, filled from what was measured.

Every number comes from the run; where nothing is known, that is what it says. Names from outside (classes, slices, paths,
descriptions) are escaped, so that none can add markup, links or HTML. After Mitchell et al. 2019, Model Cards for Model
Reporting, arXiv:1810.03993.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import yaml

from tlexport.bundle import choice, fit
from tlexport.bundle.facts import Facts
from tlexport.results import SliceDrop, Variant

NAME = "MODEL_CARD.md"
SHOWN = 20  # classes and slices that are listed
_PIPELINES = {
    "image": "image-classification",
    "tabular": "tabular-classification",
    "series": "time-series-forecasting",
}
_TAKEN = re.compile(r"([\\`*_{}\[\]#!|<>~&$^@])")
_LINKS = re.compile(r"(://|(?<=www)\.)", re.IGNORECASE)  # what GitHub makes a link of without brackets
_STARTS = re.compile(r"^([-+=]|\d+[.)])")  # a list, a rule or a heading, at the start of a line


def build(facts: Facts) -> bytes:
    """The card in UTF-8."""
    parts = [
        _front_matter(facts),
        f"# {escaped(facts.document.name)}",
        *_use(facts),
        *_data(facts),
        *_metrics(facts),
        *_variants(facts),
        *_slices(facts),
        *_decision(facts),
        *_latency(facts),
        *_limits(facts),
        *_privacy(facts),
        *_origin(facts),
    ]
    return ("\n\n".join(part for part in parts if part) + "\n").encode()


def escaped(text: object) -> str:
    """Text on one line in which no character means anything to Markdown or HTML."""
    line = "".join(character if character.isprintable() else " " for character in str(text))
    marked = _LINKS.sub(r"\\\1", _TAKEN.sub(r"\\\1", " ".join(line.split())))
    return _STARTS.sub(r"&#8203;\1", marked).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _front_matter(facts: Facts) -> str:
    """YAML that the Hugging Face hub reads; only fields of it that are known."""
    document = facts.document
    pipeline = _PIPELINES.get(document.modality)
    if document.task == "regression" and document.modality == "tabular":
        pipeline = "tabular-regression"
    metric = {"type": document.metric, "value": document.reference, "name": f"{document.metric} (reference)"}
    results = {
        "task": {"type": pipeline or document.task},
        "dataset": {"name": str(facts.data["source"]), "type": str(facts.data["source"]), "split": "test"},
        "metrics": [metric],
    }
    fields = {
        "library_name": "tlexport",
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": sorted({document.modality, document.task, *(v.backend for v in facts.chosen.values())}),
        "model-index": [{"name": document.name, "results": [results]}],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=False)}---"


def _use(facts: Facts) -> list[str]:
    document = facts.document
    said = (
        f"{escaped(facts.recipe.description).rstrip('.')}."
        if facts.recipe.description
        else "Not stated in the recipe."
    )
    kind = {"regression": "values", "multilabel": "probabilities of labels"}.get(
        document.task, "probabilities of classes"
    )
    names = ", ".join(escaped(name) for name in document.classes[:SHOWN])
    more = f" and {len(document.classes) - SHOWN} more" if len(document.classes) > SHOWN else ""
    ends = [
        f"- takes `{_code(spec.name)}`: {escaped(spec.dtype)} {escaped(list(spec.shape))}"
        for spec in document.inputs
    ]
    return [
        "## Intended use",
        f"{said} It answers {kind} ({escaped(document.task)}): {names}{more}.",
        "\n".join(ends),
        "Out of scope is whatever was not measured: data from elsewhere than the data set below, other groups of people or things "
        "than it holds, and decisions without a person where a wrong one does harm. How raw data is prepared stands in "
        "`manifest.json` (`preprocessing`).",
    ]


def _data(facts: Facts) -> list[str]:
    rows = []
    for split, count in facts.tuned.samples.items():
        counts = facts.data["counts"].get(split) or {}
        shown = ", ".join(f"{escaped(name)} {number}" for name, number in list(counts.items())[:SHOWN])
        more = f" and {len(counts) - SHOWN} more classes" if len(counts) > SHOWN else ""
        rows.append(
            (escaped(split), str(count), f"{shown}{more}", escaped(facts.data["split_origin"].get(split, "")))
        )
    groups = facts.data.get("groups")
    leaks = [
        *facts.tuned.leaks,
        *(f"in test or validation and in train: {d}" for d in facts.tuned.duplicates),
    ]
    found = _bullets(leaks) if leaks else "none was found by the checks that finetune makes."
    return [
        "## Data",
        f"Source: {escaped(facts.data['source'])}. SHA-256 of every sample in order: `{facts.data['sha256']}`.",
        _table(("split", "samples", "of each class", "drawn"), rows),
        "Groups in each split: " + ", ".join(f"{escaped(k)} {v}" for k, v in groups.items()) + "."
        if groups
        else "",
        f"Leakage: {found}" if not leaks else f"Leakage found:\n\n{found}",
        f"Left out or changed:\n\n{_bullets(facts.tuned.problems)}" if facts.tuned.problems else "",
    ]


def _metrics(facts: Facts) -> list[str]:
    test, val = facts.tuned.metrics.test, facts.tuned.metrics.val
    rows = [
        (escaped(name), f"{value:.4f}", f"{val[name]:.4f}" if name in val else "")
        for name, value in test.items()
    ]
    beside = [(escaped(b.name), escaped(b.verdict)) for b in facts.tuned.baselines]
    return [
        "## Metrics",
        f"The fine-tuned PyTorch model, which every variant is held against, on {facts.verified.samples} test samples. "
        "These values have no interval; those of the differences below have one.",
        _table(("metric", "test", "validation"), rows),
        _table(("plain model beside it", "verdict"), beside) if beside else "",
    ]


def _variants(facts: Facts) -> list[str]:
    rows = []
    for target, variant in facts.chosen.items():
        found = facts.evidence(variant)
        harm = (
            f"{found.flips.count} ({found.flips.harmful} harmful)"
            if found and found.flips
            else "none to count"
        )
        upper = f"{found.flips.upper:.2%}" if found and found.flips else ""
        rows.append(
            (
                escaped(target), escaped(variant.name), _number(variant.metric),
                f"{_number(variant.drop)} ({_number(variant.drop_low)} to {_number(variant.drop_high)})",
                harm, upper, escaped(variant.judged_by or "not judged"), escaped(variant.verdict),
            )
        )  # fmt: skip
    drift = []
    for variant in facts.chosen.values():
        found = facts.evidence(variant)
        if found and found.calibration:
            c = found.calibration
            drift.append(
                f"{variant.name}: expected calibration error {c.ece:.4f}, reference {c.ece_reference:.4f}; drift {c.ece_drift:+.4f} "
                f"({c.ece_drift_low:+.4f} to {c.ece_drift_high:+.4f})"
            )
    head = (
        "target",
        "variant",
        facts.document.metric,
        "drop (interval)",
        "changed decisions",
        "at most",
        "judged by",
        "verdict",
    )
    return [
        "## What the compiled variants lose",
        f"Drop: reference minus variant on the same test samples, with its {facts.verified.confidence:.0%} interval. "
        "Changed decisions: against the reference's, and the upper bound of their share.",
        _table(head, rows),
        f"Calibration:\n\n{_bullets(drift)}" if drift else "",
    ]


def _slices(facts: Facts) -> list[str]:
    parts = []
    for variant in dict.fromkeys(v.name for v in facts.chosen.values()):
        found = next((of for of in facts.verified.evidence if of.variant == variant), None)
        if found is None or not found.slices:
            continue
        told = f"Worst: {escaped(found.worst_slice)}." if found.worst_slice else "No slice has a drop."
        if all(part.drop is None for part in found.slices):
            told = "Which is the worst is not known: none has enough samples."
        rows = [_slice_row(part) for part in found.slices[:SHOWN]]
        more = (
            f"{len(found.slices) - SHOWN} more are in evidence/verify\\.json."
            if len(found.slices) > SHOWN
            else ""
        )
        parts += [
            f"{escaped(variant)}. {told}",
            _table(("slice", "samples", "reference", "drop", "interval", "note"), rows),
            more,
        ]
    return ["## Slices", *(parts or ["None were told apart."])]


def _slice_row(part: SliceDrop) -> tuple[str, ...]:
    interval = f"{_number(part.drop_low)} to {_number(part.drop_high)}" if part.drop is not None else ""
    return (
        escaped(part.slice), str(part.samples), _number(part.reference), _number(part.drop), interval, escaped(part.note),
    )  # fmt: skip


def _decision(facts: Facts) -> list[str]:
    decision = facts.document.decision
    if decision is None:
        return ["## Decision", "None: it answers values."]
    rests = f", chosen on {decision.samples} validation samples" if decision.samples else ""
    return ["## Decision", f"{escaped(decision.in_words())}{rests}."]


def _latency(facts: Facts) -> list[str]:
    rows = [(escaped(target), *_times(variant)) for target, variant in facts.chosen.items()]
    machine = facts.measured.machine
    gpus = ", ".join(escaped(gpu.get("name", "")) for gpu in machine.get("gpus", [])) or "no GPU"
    return [
        "## Latency",
        f"Batch 1, on {escaped(machine.get('cpu') or 'an unnamed CPU')}, {machine.get('usable_cores')} cores, {gpus}. "
        "A percentile has its interval in brackets; on another machine all of this is different.",
        _table(("target", "p50", "p99", "calls timed", "torch eager's time over it"), rows),
        _bullets(facts.measured.notes),
    ]


def _times(variant: Variant) -> tuple[str, ...]:
    if variant.p50_ms is None:
        return ("not measured", "", "", "")
    known = variant.latency
    spread = [
        f" [{choice.shown(p.low_ms)} to {choice.shown(p.high_ms)}]"
        if p is not None and p.low_ms is not None
        else ""
        for p in ((known.p50, known.p99) if known else (None, None))
    ]
    speed = f"{variant.speedup:.2f}" if variant.speedup else ""
    p99 = choice.shown(variant.p99_ms) + spread[1] if variant.p99_ms is not None else "too few calls"
    return (choice.shown(variant.p50_ms) + spread[0], p99, str(variant.count or ""), speed)


def _limits(facts: Facts) -> list[str]:
    found = [f"{facts.tuned.headline}"] if facts.tuned.headline else []
    for target, variant in facts.chosen.items():
        if variant.verdict != "pass":
            found.append(
                f"{variant.name} for {target}: {variant.verdict}; {variant.reason or 'not run where it was built'}"
            )
        of = facts.evidence(variant)
        small = [part for part in of.slices if part.drop is None] if of else []
        if small:
            named = ", ".join(f"{part.slice} ({part.samples})" for part in small[:5])
            found.append(
                f"{variant.name}: nothing is known of {len(small)} slices, for want of samples: {named}"
            )
        found += [f"{variant.name}: {note}" for note in (of.notes if of else ())]
    undecided = [v for v in facts.verified.variants if v.verdict == "undecided"]
    found += [f"{v.name} was left out, undecided: {v.reason}" for v in undecided]
    gates = {name: limit for name, limit in facts.document.gates.items() if limit is not None}
    held = ", ".join(f"{escaped(name)} {limit:g}" for name, limit in gates.items()) or "none"
    absent = sorted(name for name, limit in facts.document.gates.items() if limit is None)
    return [
        "## Limits",
        f"Gates that had to be passed: {held}. Not gated: {', '.join(map(escaped, absent)) or 'nothing'}.",
        _bullets(found) if found else "Nothing else was found.",
    ]


def _privacy(facts: Facts) -> list[str]:
    real = facts.recipe.golden.source == "test"
    golden = (
        f"`golden/` holds {facts.recipe.golden.samples} real samples of the test split, inputs and all: whoever has the bundle has "
        "them. To leave real data out, build with `golden.source=synthetic`."
        if real
        else "`golden/` holds synthetic samples, none of the data."
    )
    report = (
        "`evidence/report.html` shows test samples whose decision changed, if there are any (`report.images=false` leaves them out)."
        if facts.images_in_report
        else "No report in it shows a sample."
    )
    return [
        "## What of the data is in the bundle",
        f"{golden} {report} Names of classes, slices and columns are those of the data. Weights may remember training samples; "
        "that was not examined.",
    ]


def _origin(facts: Facts) -> list[str]:
    weights = facts.tuned.weights
    began = (
        "random weights"
        if weights.source == "none"
        else f"{escaped(weights.source)} (from: {escaped(weights.origin or 'not stated')}; licence: "
        f"{escaped(weights.licence or 'not stated')}; SHA-256 {escaped(weights.sha256 or 'not known')})"
    )
    code = sorted(target for target, v in facts.chosen.items() if v.backend in fit.CODE)
    return [
        "## Origin",
        f"{escaped(facts.document.backbone)}, trained by the strategy {escaped(facts.tuned.strategy)} for {facts.tuned.epochs} epochs "
        f"(the best was {facts.tuned.best_epoch}), from {began}. The licence of the data and of this model is not stated by the run. "
        "Libraries and files with their hashes: `bom.cdx.json`.",
        f"Executable code, to be loaded only if its signature is verified: {', '.join(map(escaped, code))}."
        if code
        else "",
    ]


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(text: str) -> str:
    """Within back quotes nothing but a back quote means anything."""
    return "".join(c for c in text if c.isprintable() and c not in "`|")


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
