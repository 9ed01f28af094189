"""The report's style sheet: light and dark on a screen, light on paper; no fonts, pictures or scripts from elsewhere."""

COLOURS = """
:root {
  color-scheme: light dark;
  --ink: #16191d; --quiet: #565d68; --rule: #dfe2e7; --paper: #fff; --raised: #f6f7f9;
  --other: #b3bac4; --s0: #4b525d; --s1: #1f5fbf; --s2: #c2570c; --s3: #7a3fb0; --pass: #17724a; --fail: #b42c25;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8ec; --quiet: #a0a7b3; --rule: #333842; --paper: #14161a; --raised: #1c1f25;
    --other: #525a67; --s0: #c3c9d3; --s1: #76abf7; --s2: #f0a05a; --s3: #c39bea; --pass: #5fc491; --fail: #f0877d;
  }
}
@media print { :root { color-scheme: light; } }
"""

TEXT = """
* { box-sizing: border-box; }
html { scroll-padding-top: 3.2rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
.page {
  display: grid; grid-template-columns: minmax(0, 1fr); max-width: 80rem; margin: 0 auto; padding: 0 1.25rem 5rem;
}
nav {
  position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--rule);
  margin: 0 -1.25rem; padding: .55rem 1.25rem; overflow-x: auto; white-space: nowrap; font-size: .84rem;
  scrollbar-width: none;
}
nav ol { list-style: none; display: flex; gap: 1.1rem; margin: 0; padding: 0; }
nav a { color: var(--quiet); text-decoration: none; }
nav a:hover, nav a:focus-visible { color: var(--s1); }
@media (min-width: 1080px) {
  .page { grid-template-columns: 11.5rem minmax(0, 1fr); column-gap: 2.4rem; }
  html { scroll-padding-top: 1.5rem; }
  nav {
    align-self: start; max-height: 100vh; margin: 0; padding: 2.6rem 0; border: 0; overflow: auto; white-space: normal;
  }
  nav ol { flex-direction: column; gap: .34rem; }
}
main { min-width: 0; padding-top: 2.4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.18rem; letter-spacing: -.005em; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
section { margin-top: 2.9rem; padding-top: 1.3rem; border-top: 1px solid var(--rule); }
p { margin: .35rem 0; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--s1); }
.quiet, caption, th, figcaption, .source { color: var(--quiet); }
.headline { font-weight: 600; color: var(--fail); }
.source { font-size: .78rem; margin-top: 1rem; max-width: none; }
.source code { font-size: .95em; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86em; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--s1); outline-offset: 2px; }
"""

TABLES = """
.scroll { overflow-x: auto; max-width: 100%; scrollbar-width: thin; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .3rem 0; }
caption { text-align: left; font-weight: 600; padding: .5rem 0 .1rem; }
caption::first-letter { text-transform: uppercase; }
th, td { padding: .34rem .95rem .34rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.word, thead th { white-space: nowrap; }
thead th { vertical-align: bottom; }
tr.chosen td:first-child { font-weight: 650; }
tr.open td { border-bottom: 0; padding-bottom: .1rem; }
tr.reason td { padding-top: 0; color: var(--quiet); }
td.pass, b.pass { color: var(--pass); font-weight: 600; }
td.fail, b.fail { color: var(--fail); font-weight: 600; }
.columns { display: flex; flex-wrap: wrap; gap: 0 3.2rem; align-items: flex-start; }
.columns table { max-width: 100%; }
.columns td { overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--quiet); overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem; margin: 1.4rem 0 0; }
.card { background: var(--raised); border-radius: 8px; padding: 1rem 1.2rem; border-left: 4px solid var(--pass); min-width: 0; }
.card.fail { border-color: var(--fail); }
.card h2 { font-size: .84rem; font-weight: 500; color: var(--quiet); margin: 0; }
.card .name { font-weight: 650; font-size: 1.05rem; overflow-wrap: anywhere; }
.card dl {
  display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; margin: .6rem 0; font-variant-numeric: tabular-nums;
}
.card dt { color: var(--quiet); }
.card dd { margin: 0; }
.flips {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); gap: .9rem; padding: 0;
  margin: .6rem 0; list-style: none;
}
.flips li { background: var(--raised); border-radius: 8px; padding: .8rem; font-size: .84rem; overflow-wrap: anywhere; min-width: 0; }
.flips img {
  display: block; width: 100%; max-width: 10rem; height: auto; border-radius: 4px; margin-bottom: .6rem;
  image-rendering: pixelated;
}
.flips table { font-size: 1em; margin: .35rem 0 0; }
.flips td, .flips th { padding: .12rem .8rem .12rem 0; border: 0; }
"""

FIGURES = """
figure { margin: .9rem 0 1.1rem; min-width: 0; }
figcaption { font-size: .82rem; max-width: 46rem; margin-top: .3rem; }
.beside { display: flex; flex-wrap: wrap; gap: .4rem 1.8rem; align-items: flex-start; }
.beside figure { flex: 0 1 22.5rem; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.3rem; margin: 0 0 .4rem; padding: 0; font-size: .84rem;
}
.key {
  display: inline-block; width: 1.1rem; border-top: 3px solid var(--of); vertical-align: middle; margin-right: .45rem;
}
.s0 { --of: var(--s0); }
.s1 { --of: var(--s1); --dash: 7 2; }
.s2 { --of: var(--s2); --dash: 3 2; }
.s3 { --of: var(--s3); --dash: 1 2; }
.ink { --of: var(--ink); }
.other { --of: var(--other); }
svg { display: block; max-width: 100%; height: auto; }
@media screen and (max-width: 700px) { svg.wide { max-width: none; width: 42rem; } }
svg text { font-size: 11.5px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg text.strong { font-weight: 600; fill: var(--ink); }
svg text.count { fill: var(--ink); }
svg text.faint { font-size: 10px; }
svg text.tiny { font-size: 9px; }
svg text.worse { fill: var(--fail); font-weight: 600; }
svg text.better { fill: var(--pass); font-weight: 600; }
line { stroke-width: 1.5; }
line.pass, circle.pass { stroke: var(--pass); fill: var(--pass); }
line.fail, circle.fail { stroke: var(--fail); fill: var(--fail); }
line.other, circle.other { stroke: var(--quiet); fill: var(--quiet); }
line.axis { stroke: var(--quiet); stroke-width: 1; }
line.grid { stroke: var(--rule); stroke-width: 1; }
line.gate { stroke: var(--fail); stroke-dasharray: 5 4; }
line.median { stroke: var(--ink); stroke-width: 2.5; }
line.quantile { stroke: var(--ink); stroke-width: 1; }
.guide { fill: none; stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 4 4; }
.curve { fill: none; stroke: var(--s1); stroke-width: 2; }
circle.end { fill: var(--s1); }
.series { fill: none; stroke: var(--of); stroke-width: 2; stroke-dasharray: var(--dash, none); }
.series.s0 { stroke-width: 3.4; stroke-opacity: .55; }
.series.ink { stroke-width: 1; }
.series.thin { stroke-width: 1; stroke-dasharray: none; }
.whisker { stroke: var(--of); }
.dots { fill: none; stroke: var(--of); stroke-linecap: round; stroke-width: 3; }
.dots.small { stroke-width: 2.4; opacity: .65; }
.dots.big { stroke-width: 7; }
.dots.faint { opacity: .35; }
.bars { fill: var(--of); opacity: .75; }
.cell { stroke: var(--rule); }
.cell.right { fill: var(--pass); }
.cell.wrong { fill: var(--fail); }
.cell.changed { stroke: var(--ink); stroke-width: 1.5; }
"""

PAPER = """
@page { size: A4; margin: 15mm 13mm; }
@media print {
  body { font-size: 9.5pt; }
  .page { display: block; padding: 0; max-width: none; }
  nav { display: none; }
  main { padding: 0; }
  section { margin-top: 1.4rem; padding-top: .8rem; }
  table { font-size: 7.6pt; }
  th, td { padding: .18rem .6rem .18rem 0; }
  td.number, th.number, td.word, thead th { white-space: normal; }
  .scroll { overflow: visible; }
  svg, svg.wide { width: auto; max-width: 100%; }
  svg, tr, figure, .card, .flips li { break-inside: avoid; }
  .beside { break-inside: avoid; }
  p, figcaption { orphans: 3; widows: 3; }
  h2, h3, h2 + p, h3 + p, .legend { break-after: avoid; }
  .flips { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .5rem; }
  .flips img { max-width: 2.6cm; }
  .card, .flips li { border: 1px solid var(--rule); }
  .beside figure { flex: 0 1 8.4cm; }
  summary::after { content: " (in full in the file itself)"; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

STYLE = COLOURS + TEXT + TABLES + FIGURES + PAPER
