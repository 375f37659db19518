"""The page of ``nnUNetUDA_quality``: cases from worst to best in one file that asks the network for nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_uda.evaluation.overlays import draw_overlay
from nnunet_uda.evaluation.page import write_filled
from nnunet_uda.evaluation.report import jsonable
from nnunet_uda.palette import label_colours

GAP = 4
"""Pixels between the planes of a thumbnail."""


def thumbnail(
    image: np.ndarray, label: np.ndarray, spacing: Sequence[float], structures: dict[str, int], size: int = 150
) -> str:
    """A strip of three planes through the middle of what was segmented, with contours: JPEG as base64.

    Args:
        image: ``(Z, Y, X)`` one channel, axes from inferior to superior, anterior to posterior and right to left (LPS).
        label: ``(Z, Y, X)``.
        spacing: mm for each axis.
        structures: their values by name.
        size: pixels of the longer side of a plane.
    """
    from matplotlib.image import imsave

    window = tuple(np.percentile(image, (0.5, 99.5)))
    panels = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        areas = (label > 0).sum(axis=tuple(others))
        index = int(areas.argmax()) if areas.any() else label.shape[axis] // 2
        cut, cut_label = (np.take(array, index, axis=axis) for array in (image, label))
        if axis:
            cut, cut_label = cut[::-1], cut_label[::-1]  # the head up
        in_plane = tuple(float(spacing[other]) for other in others)
        panels.append(draw_overlay(cut, cut_label, label_colours(structures), in_plane, window, size, 1))
    height = max(panel.shape[0] for panel in panels)
    width = sum(panel.shape[1] for panel in panels) + GAP * (len(panels) - 1)
    strip, start = np.zeros((height, width, 3), np.uint8), 0
    for panel in panels:
        top = (height - panel.shape[0]) // 2
        strip[top : top + panel.shape[0], start : start + panel.shape[1]] = panel
        start += panel.shape[1] + GAP
    buffer = io.BytesIO()
    imsave(buffer, strip, format="jpeg", pil_kwargs={"quality": 75, "subsampling": 0})
    return base64.b64encode(buffer.getvalue()).decode()


def write_page(
    path: Path,
    title: str,
    notes: Sequence[str],
    cases: Sequence[dict[str, Any]],
    structures: dict[str, int],
    thumbnails: dict[str, str],
) -> None:
    """Write the page.

    Args:
        path: the file to write.
        title: its heading.
        notes: sentences under it.
        cases: ``CaseQuality.to_json`` of each.
        structures: values by name, in their order.
        thumbnails: base64 JPEG by case.
    """
    keep = ("dice", "low", "high", "verdict", "reasons")
    data = {
        "structures": list(structures),
        "cases": [
            {
                "case": case["case"],
                "overall": {key: case["overall"][key] for key in keep[:4]},
                "structures": {
                    name: {key: each[key] for key in keep} | {"ml": case["signals"][name].get("volume", 0.0) / 1000}
                    for name, each in case["structures"].items()
                },
                "picture": thumbnails.get(case["case"]),
            }
            for case in cases
        ],
    }
    colours = dict(zip(structures, label_colours(structures).values(), strict=True))
    sentences = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    write_filled(path, PAGE, title, colours, jsonable(data), {"NOTES": sentences})


PAGE = r"""<style>
:root { color-scheme: light dark; --ink: #1d2433; --soft: #545d70; --line: #d5dae4; --paper: #fff; --tint: #f3f5f9;
  --good: #0072b2; --look: #a86f00; --failed: #b84300; --bar: #8b95a8; --accent: #2456c7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #a9b1c1; --line: #3a4150; --paper: #14171d;
  --tint: #1e232c; --good: #56b4e9; --look: #f0b429; --failed: #ff8552; --bar: #7d879a; --accent: #8fb4ff; } }
@media print { :root { --ink: #000; --soft: #333; --line: #999; --paper: #fff; --tint: #fff; --good: #0072b2;
  --look: #a86f00; --failed: #b84300; --bar: #666; } .bar { display: none !important; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 25px; margin: 0 0 6px; overflow-wrap: anywhere; }
.notes p { color: var(--soft); font-size: 13.5px; margin: 4px 0; overflow-wrap: anywhere; max-width: 90ch; }
.counts { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 16px 0 4px; font-size: 17px; }
.good { color: var(--good); } .look { color: var(--look); } .failed { color: var(--failed); }
.mark { font-weight: 700; }
.bar { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin: 14px 0; position: sticky; top: 0;
  background: var(--paper); padding: 8px 0; z-index: 2; border-bottom: 1px solid var(--line); }
.bar label { font-size: 13.5px; color: var(--soft); }
select { font: inherit; font-size: 14px; color: var(--ink); background: var(--paper); border: 1px solid var(--bar);
  border-radius: 6px; padding: 4px 8px; max-width: 100%; }
select:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin: 8px 0; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; border: 1px solid #777; print-color-adjust: exact; }
article { display: grid; grid-template-columns: minmax(0, 470px) minmax(0, 1fr); gap: 8px 20px; padding: 14px 0;
  border-bottom: 1px solid var(--line); break-inside: avoid; content-visibility: auto;
  contain-intrinsic-size: auto 200px; }
article h2 { grid-column: 1 / -1; font-size: 16px; margin: 0; overflow-wrap: anywhere; }
article img { max-width: 100%; height: auto; background: #000; border-radius: 4px; display: block; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 10px 3px 0; vertical-align: top; }
th { font-weight: 600; overflow-wrap: anywhere; }
td.range { width: 110px; padding-top: 9px; }
.scale { position: relative; height: 8px; background: var(--tint); border: 1px solid var(--line); border-radius: 4px;
  min-width: 70px; print-color-adjust: exact; }
.scale i { position: absolute; top: 1px; bottom: 1px; background: var(--bar); border-radius: 3px;
  print-color-adjust: exact; }
.scale b { position: absolute; top: -4px; bottom: -4px; width: 3px; margin-left: -1px; background: var(--ink);
  print-color-adjust: exact; }
ul { margin: 2px 0 6px; padding-left: 18px; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 700px) { main { padding: 16px 12px 40px; } article { grid-template-columns: minmax(0, 1fr); } }
@media print { article { content-visibility: visible; } main { max-width: none; padding: 0; } }
</style>
</head>
<body>
<main>
<h1>@@TITLE@@</h1>
<div class="notes">@@NOTES@@</div>
<div class="counts" id="counts" role="status"></div>
<div class="bar">
<label>Structure <select id="structure"></select></label>
<label>Verdict <select id="verdict"><option value="">all</option><option>failed</option><option>look at it</option>
<option>good</option></select></label>
<label>Order <select id="order"><option value="worst">worst first</option><option value="best">best first</option>
<option value="name">by name</option></select></label>
<span id="shown"></span>
</div>
<div class="legend">@@LEGEND@@</div>
<div id="cases"></div>
<div id="more"></div>
</main>
<script type="application/json" id="data">@@DATA@@</script>
<script>
"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const el = id => document.getElementById(id);
const esc = text => String(text).replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));
const KIND = {"good": ["good", "✓"], "look at it": ["look", "?"], "failed": ["failed", "✕"]};
const STEP = 40;
const number = value => value === null ? "–" : value.toFixed(2);
const verdict = name => `<span class="${KIND[name][0]}"><span class="mark" aria-hidden="true">${KIND[name][1]}` +
  `</span> ${name}</span>`;
let chosen = [], drawn = 0;

el("structure").innerHTML = `<option value="">all</option>` +
  D.structures.map(name => `<option>${esc(name)}</option>`).join("");

function judged(item) { const name = el("structure").value; return name ? item.structures[name] : item.overall; }

function card(item) {
  const wanted = el("structure").value;
  const names = D.structures.filter(name => !wanted || name === wanted);
  const rows = names.map(name => {
    const s = item.structures[name], estimate = s.dice === null ? "–" : number(s.dice);
    const scale = s.dice === null ? "" : `<div class="scale" role="img" aria-label="range ${number(s.low)} to ` +
      `${number(s.high)}"><i style="left:${100 * s.low}%;right:${100 * (1 - s.high)}%"></i>` +
      `<b style="left:${100 * s.dice}%"></b></div>`;
    return `<tr><th scope="row">${esc(name)}</th><td>Dice ${estimate}<br><small>${number(s.low)} to ${number(s.high)}` +
      `</small></td><td class="range">${scale}</td><td>${verdict(s.verdict)}<br><small>${s.ml.toPrecision(3)} ml` +
      `</small></td></tr><tr><td colspan="4"><ul>${s.reasons.map(r => `<li>${esc(r)}</li>`).join("")}</ul></td></tr>`;
  }).join("");
  const picture = item.picture ? `<img alt="${esc(item.case)} in three planes, with contours" loading="lazy" ` +
    `decoding="async" src="data:image/jpeg;base64,${item.picture}">` : "";
  return `<article><h2>${esc(item.case)}: ${verdict(item.overall.verdict)}, expected Dice ` +
    `${number(item.overall.dice)}</h2><div>${picture}</div><div><table>${rows}</table></div></article>`;
}

function more(to) {
  const end = Math.min(chosen.length, to);
  if (end > drawn) el("cases").insertAdjacentHTML("beforeend", chosen.slice(drawn, end).map(card).join(""));
  drawn = Math.max(drawn, end);
}

function show() {
  const wanted = el("verdict").value, order = el("order").value;
  chosen = D.cases.filter(item => !wanted || judged(item).verdict === wanted);
  const value = item => judged(item).dice === null ? -1 : judged(item).dice;
  chosen.sort((a, b) => order === "name" ? (a.case < b.case ? -1 : 1) :
    (order === "worst" ? 1 : -1) * (value(a) - value(b)));
  el("cases").innerHTML = "";
  drawn = 0;
  more(STEP);
  const count = name => D.cases.filter(item => judged(item).verdict === name).length;
  el("counts").innerHTML = ["failed", "look at it", "good"].map(name =>
    `<span>${verdict(name)}: <b>${count(name)}</b> of ${D.cases.length}</span>`).join("");
  el("shown").textContent = `${chosen.length} of ${D.cases.length} cases`;
}

for (const id of ["structure", "verdict", "order"]) el(id).addEventListener("change", show);
new IntersectionObserver(seen => { if (seen[0].isIntersecting) more(drawn + STEP); }, {rootMargin: "1200px"})
  .observe(el("more"));
addEventListener("scroll", () => {
  if (el("more").getBoundingClientRect().top < innerHeight + 1200) more(drawn + STEP);
}, {passive: true});
addEventListener("beforeprint", () => more(chosen.length));
show();
</script>
</body>
</html>
"""
