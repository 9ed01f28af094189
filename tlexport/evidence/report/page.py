"""The report: one HTML file that needs nothing else. It has no scripts, and its policy forbids any request."""

from __future__ import annotations

from html import escape

from tlexport.evidence.report import accuracy, flipped, forecast, overview, record, timing
from tlexport.evidence.report.document import Document
from tlexport.evidence.report.markup import Section
from tlexport.evidence.report.style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
SECTIONS = (
    overview.asked,
    overview.choice,
    overview.variants,
    overview.front,
    overview.drops,
    flipped.flips,
    accuracy.slices,
    accuracy.reliability,
    accuracy.discrimination,
    accuracy.confusions,
    forecast.forecasts,
    timing.latency,
    timing.conditions,
    record.layers,
    record.searches,
    overview.baselines,
    record.training,
    record.environment,
    record.recipe,
    record.sources,
)
SHORT = 12  # digits of a hash beside a section


def sections(document: Document) -> list[Section]:
    """Those that have something to show, in the page's order."""
    return [section for make in SECTIONS if (section := make(document)).content]


def render(document: Document) -> str:
    """The whole page. Every text in `document` is escaped: class and file names are what users chose."""
    shown = sections(document)
    title = f"{document.recipe['name']}: is it still the same model?"
    links = "".join(f'<li><a href="#{part.key}">{escape(part.title)}</a></li>' for part in shown)
    body = "".join(_section(part, document) for part in shown)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head>\n'
        f'<body><div class="page"><nav aria-label="Contents"><ol>{links}</ol></nav>\n'
        f"<main>{overview.header(document)}{body}</main></div></body></html>\n"
    )


def _section(part: Section, document: Document) -> str:
    label = f"{part.key}-title"
    return (
        f'<section id="{part.key}" aria-labelledby="{label}"><h2 id="{label}">{escape(part.title)}</h2>'
        f"{part.content}{_sources(part, document)}</section>\n"
    )


def _sources(part: Section, document: Document) -> str:
    """Which files the section's numbers come from, each with the beginning of its hash."""
    held = [document.sources[file] for file in dict.fromkeys(part.sources) if file in document.sources]
    if not held:
        return ""
    told = ", ".join(
        f"{escape(source.file)} <code>{escape(source.sha256[:SHORT])}</code>{escape(f' ({source.told})') if source.changed else ''}"
        for source in held
    )
    return f'<p class="source">From {told} · <a href="#sources">all files</a></p>'
