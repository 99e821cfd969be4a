"""The style sheet of the report page: two colour schemes, any width, paper."""

from __future__ import annotations

# Text colours stand on `page`, `card` and tints; a test computes their contrasts.
LIGHT = {
    "page": "#f4f6f9",
    "card": "#ffffff",
    "text": "#191d26",
    "muted": "#565f6e",
    "line": "#d5dae3",
    "accent": "#2450b8",
    "floor": "#7f8a9c",
    "target": "#a8361f",
    "ok": "#0e6236",
    "ok-tint": "#e2f3e9",
    "doubt": "#7a4c00",
    "doubt-tint": "#fdefd3",
    "bad": "#a3201a",
    "bad-tint": "#fce4e1",
    "skipped": "#4f5867",
    "skipped-tint": "#e8ebf0",
}
DARK = {
    "page": "#11141a",
    "card": "#1a1f28",
    "text": "#e8ebf1",
    "muted": "#a7b0c0",
    "line": "#343c4b",
    "accent": "#8fb6ff",
    "floor": "#717d92",
    "target": "#ff9d85",
    "ok": "#7fdcaa",
    "ok-tint": "#16352a",
    "doubt": "#f2c36b",
    "doubt-tint": "#3a2d12",
    "bad": "#ff9c94",
    "bad-tint": "#43201f",
    "skipped": "#b4bdcc",
    "skipped-tint": "#2a313d",
}


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


# Dark is for screens only: paper stays white whatever the reader's setting.
STYLE = (
    f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n"
    """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1, .provenance, .figures dt, .scores tbody th { overflow-wrap: anywhere; }
h1, h2, h3, p, dl, dd, figure { margin: 0; }
h1 { font-size: clamp(1.3rem, 3.2vw, 1.9rem); line-height: 1.25; }
h2 { font-size: 1.3rem; line-height: 1.3; margin-bottom: .3rem; }
h3 { font-size: 1.05rem; line-height: 1.35; }
section { margin-top: 3rem; }
section > h2 + p { margin-bottom: 1rem; max-width: 46rem; }
.muted, .eyebrow, figcaption, .note { color: var(--muted); }
.eyebrow { font-size: .85rem; }
.note { font-size: .875rem; max-width: 46rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1.1rem 1.2rem; }
.score { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.5rem 3rem;
  margin-top: 1.5rem; padding: 1.5rem; }
.big { font-size: clamp(3rem, 8vw, 4.8rem); font-weight: 650; line-height: 1.05; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.big small { font-size: .38em; font-weight: 500; letter-spacing: 0; color: var(--muted); }
.metric { font-weight: 600; }
p.excess { margin-top: .8rem; }
.verdict { margin-top: 1.2rem; padding: .75rem .9rem; border-radius: .45rem; background: var(--skipped-tint); }
.verdict.ok { background: var(--ok-tint); } .verdict.doubt { background: var(--doubt-tint); }
.verdict.bad { background: var(--bad-tint); }
.plot { font-size: .8125rem; padding: .25rem 0; }
.plot svg { display: block; width: 100%; overflow: visible; }
.plot text { fill: var(--text); font-variant-numeric: tabular-nums; }
.plot .over { paint-order: stroke; stroke: var(--card); stroke-width: 5px; stroke-linejoin: round; }
.plot .soft { fill: var(--muted); } .plot .strong { font-weight: 600; }
.plot .grid { stroke: var(--line); } .plot .axis { stroke: var(--muted); }
.plot .excess-bar, .plot .dot { fill: var(--accent); } .plot .floor-bar { fill: var(--floor); }
.plot .whisker { stroke: var(--text); stroke-width: 2; } .plot .fit { stroke: var(--accent); stroke-width: 1.5; }
.plot .floor-mark { stroke: var(--floor); stroke-width: 3; }
.plot .target { stroke: var(--target); stroke-width: 2; stroke-dasharray: 5 3; }
.plot .target-text { fill: var(--target); }
.plot .ring { fill: var(--card); stroke: var(--accent); stroke-width: 2.5; }
.curve { padding: .5rem 1rem .5rem 3.4rem; max-width: 46rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 .6rem; font-size: .8125rem;
  color: var(--muted); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.swatch.floor { background: var(--floor); } .swatch.excess { background: var(--accent); }
.swatch.spread { height: 2px; background: var(--text); vertical-align: middle; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .55rem .6rem .55rem 0; font-weight: 400; }
thead th { color: var(--muted); font-size: .875rem; }
tbody { border-top: 1px solid var(--line); }
.scores th + th, .scores td, .larger th + th, .larger td { text-align: right; padding-right: 0; padding-left: .5rem; }
.scores .sets { text-align: left; padding: 0 0 .55rem; font-size: .8125rem; color: var(--muted); }
.value, .spread { display: inline-block; white-space: nowrap; }
.spread { color: var(--muted); }
.scores tbody th { min-width: 6.6rem; }
.scores th .muted { font-size: .8125rem; }
.larger { max-width: 22rem; margin-bottom: 1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.2rem; }
img { display: block; max-width: 100%; height: auto; border-radius: .3rem; }
.pair img { width: 100%; }
figcaption { font-size: .875rem; margin-bottom: .4rem; }
.checks { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.check > * + * { margin-top: .6rem; }
.check header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .3rem .8rem; align-items: center; }
.check .headline { font-weight: 600; }
.pictured { grid-column: 1 / -1; }
.badge { display: inline-flex; align-items: center; gap: .4em; padding: .12rem .6rem .12rem .45rem; border-radius: 1rem;
  font-size: .8125rem; font-weight: 650; }
.badge svg { width: .95em; height: .95em; fill: none; stroke: currentColor; stroke-width: 2.4; stroke-linecap: round;
  stroke-linejoin: round; }
.badge.ok { color: var(--ok); background: var(--ok-tint); }
.badge.doubt { color: var(--doubt); background: var(--doubt-tint); }
.badge.bad { color: var(--bad); background: var(--bad-tint); }
.badge.skipped { color: var(--skipped); background: var(--skipped-tint); }
.figures { display: flex; flex-wrap: wrap; gap: .35rem 1.5rem; font-size: .875rem; }
.figures dt, .figures dd { display: inline; } .figures dt { color: var(--muted); }
.figures dd { font-variant-numeric: tabular-nums; font-weight: 600; margin-left: .35em; }
.measures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 12.4rem), 1fr)); gap: 1rem; }
.measures .number { font-size: 1.55rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.measures + .note { margin-top: .7rem; }
.measures .spread { font-size: .65em; font-weight: 500; }
.limits { padding-left: 1.2rem; max-width: 46rem; } .limits li + li { margin-top: .4rem; }
.provenance { table-layout: fixed; font-size: .875rem; } .provenance th { width: 32%; color: var(--muted); }
.provenance td { font: .8125rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  padding-right: 0; }
.provenance tr + tr { border-top: 1px solid var(--line); }
@media (max-width: 34rem) {
  .provenance th, .provenance td { display: block; width: auto; }
  .provenance td { padding-top: 0; }
}
@media (min-width: 60rem) {
  .pictured { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem; align-items: start; }
  .pictured > * { grid-column: 1; }
  .pictured > figure { grid-column: 2; grid-row: 1 / span 9; margin: 0; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { background: none; font-size: 10.5pt; } main { max-width: none; padding: 0; }
  section { margin-top: 1.6rem; } h2, h3 { break-after: avoid; }
  .card, figure, tr, li, .plot { break-inside: avoid; }
  .pair { grid-template-columns: 1fr 1fr; }
}
"""
)
