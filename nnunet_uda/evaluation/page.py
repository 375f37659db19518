"""The report page: inline style and script, ``@@NAME@@`` where ``report.write_html`` puts content."""

from __future__ import annotations

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@@TITLE@@</title>
<style>
:root { --ink: #1d2433; --soft: #5d6679; --line: #dde1e9; --tint: #f5f6f9; --accent: #2456c7; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 28px 28px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 40px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 14px; margin: 22px 0 8px; font-weight: 600; }
.soft, .rules p, .notes { color: var(--soft); font-size: 13px; margin: 4px 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 10px; vertical-align: top; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody th { font-weight: 600; background: #fff; }
tbody tr:hover td { background: var(--tint); }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
.bar { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 10px 0; }
button, select { font: inherit; font-size: 14px; color: var(--ink); background: #fff; border: 1px solid #c4cad6;
  border-radius: 6px; padding: 4px 12px; cursor: pointer; max-width: 100%; }
button:hover, select:hover { border-color: var(--accent); }
button[aria-pressed=true] { background: var(--accent); border-color: var(--accent); color: #fff; }
button:focus-visible, select:focus-visible, summary:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin: 8px 0; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; border: 1px solid rgba(0, 0, 0, .25); }
.legend i.dot { border-radius: 50%; border: 0; }
#plot { overflow-x: auto; }
#plot text { font-size: 12px; fill: var(--soft); }
#plot .name { fill: var(--ink); font-weight: 600; }
#plot .grid { stroke: var(--line); }
#plot .mean { stroke: var(--ink); stroke-width: 2.5; }
#plot .link { stroke: #98a1b3; stroke-opacity: .28; fill: none; }
#plot .pt { cursor: pointer; fill-opacity: .85; stroke: #fff; }
#plot .cross { cursor: pointer; stroke-width: 2; }
#plot .on.link { stroke: var(--ink); stroke-opacity: 1; stroke-width: 1.5; }
#plot .on.pt { stroke: var(--ink); stroke-width: 2; fill-opacity: 1; }
#tip { position: fixed; pointer-events: none; background: #1d2433; color: #fff; font-size: 12.5px; padding: 5px 9px;
  border-radius: 5px; display: none; z-index: 2; white-space: pre-line; }
#panels { display: flex; flex-wrap: wrap; gap: 10px; }
#panels figure { margin: 0; flex: 1 1 240px; max-width: 400px; }
#panels img { width: 100%; display: block; background: #000; border-radius: 4px; }
#panels figcaption { font-size: 13px; font-weight: 600; margin-bottom: 3px; overflow-wrap: anywhere; }
#where { font-size: 14px; }
@media print { .bar, details > summary { display: none; } }
</style>
</head>
<body>
<main>
<h1>@@TITLE@@</h1>
<p class="soft">@@DESCRIPTION@@</p>

<h2>Tables</h2>
@@TABLES@@
<details><summary>The scores of every volume</summary>@@VOLUMES@@</details>
<details><summary>How the figures are computed</summary><div class="rules">@@RULES@@</div></details>

<h2>Every volume</h2>
<div class="bar" id="metrics"></div>
<div class="legend" id="runs"></div>
<div id="plot"></div>
<p class="soft">A dot is a volume, a bar the mean, a cross an undefined distance (exactly one mask is empty); a thin
line joins one volume across the runs. Point at a dot for its name, click it for its overlays.</p>

<h2 id="overlays">Overlays</h2>
<p class="soft">@@OVERLAY_NOTE@@</p>
<div id="viewer">
<div class="bar">
<button id="previous" title="left arrow key">&#8592; Previous</button>
<button id="next" title="right arrow key">Next &#8594;</button>
<select id="volume" aria-label="volume"></select>
<span id="where"></span>
</div>
<div class="legend">@@LEGEND@@</div>
<div id="panels"></div>
<p class="soft">Left and right arrow keys leaf through the slices, up and down through the volumes.</p>
</div>
</main>
<div id="tip"></div>
<script type="application/json" id="data">@@DATA@@</script>
<script>
"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const el = id => document.getElementById(id);
const esc = text => String(text).replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));
const COLOURS = ["#2f6fb7", "#e07b1a", "#3c9a4a", "#a34fa0", "#c8423b", "#1f9c9c", "#8a6a2f", "#6b6f7b"];
const runColour = r => COLOURS[r % COLOURS.length];
let metric = 0;

el("runs").innerHTML = D.runs.map((name, r) =>
  `<span><i class="dot" style="background:${runColour(r)}"></i>${esc(name)}</span>`).join("");
el("metrics").innerHTML = D.metrics.map((m, i) => `<button data-i="${i}">${esc(m.label)}</button>`).join("");
el("metrics").addEventListener("click", event => {
  if (event.target.dataset.i !== undefined) { metric = +event.target.dataset.i; plot(); }
});

function ticks(top) {
  const raw = top / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find(factor => factor * power >= raw - 1e-12);
  const found = [];
  for (let value = 0; value <= top + 1e-9; value += step) found.push(+value.toPrecision(6));
  return found;
}

function plot() {
  const m = D.metrics[metric], values = D.values[m.key], undefined_ = D.undefined[m.key];
  document.querySelectorAll("#metrics button").forEach((b, i) => b.setAttribute("aria-pressed", i === metric));
  let top = m.key === "Dice" ? 1 : 0, missing = false;
  for (const row of D.rows) for (let r = 0; r < D.runs.length; r++) values[row][r].forEach((value, v) => {
    if (value !== null) top = Math.max(top, value);
    else if (undefined_[row][r][v]) missing = true;
  });
  top = m.key === "Dice" ? 1 : (top * 1.05 || 1);
  const column = 40, gap = 36, left = 58, high = 300, upper = 14, base = upper + high;
  const room = (el("plot").clientWidth - left) / D.rows.length - gap;
  const groupWidth = Math.max(column * D.runs.length, 110, Math.min(room, 90 * D.runs.length));
  const width = left + D.rows.length * (groupWidth + gap), height = base + (missing ? 62 : 36);
  const y = value => base - value / top * high;
  const out = [];
  for (const tick of ticks(top)) out.push(
    `<line class="grid" x1="${left}" x2="${width}" y1="${y(tick)}" y2="${y(tick)}"/>` +
    `<text x="${left - 8}" y="${y(tick) + 4}" text-anchor="end">${tick}</text>`);
  if (missing) out.push(`<text x="2" y="${base + 24}">undef.</text>`);
  D.rows.forEach((row, g) => {
    const start = left + gap / 2 + g * (groupWidth + gap);
    const x = r => start + groupWidth * (r + .5) / D.runs.length;
    const spread = Math.min(36, groupWidth / D.runs.length / 2);
    const jitter = v => ((v * .618034 + .5) % 1 - .5) * spread;
    const bar = spread / 2 + 7;
    D.volumes.forEach((_, v) => {
      const points = D.runs.map((_, r) => [r, values[row][r][v]]).filter(p => p[1] !== null);
      if (points.length > 1) out.push(`<polyline class="link" data-v="${v}" points="${
        points.map(p => `${x(p[0]) + jitter(v)},${y(p[1])}`).join(" ")}"/>`);
    });
    D.runs.forEach((_, r) => {
      const defined = values[row][r].filter(value => value !== null);
      if (defined.length) {
        const mean = defined.reduce((a, b) => a + b, 0) / defined.length;
        out.push(`<line class="mean" x1="${x(r) - bar}" x2="${x(r) + bar}" y1="${y(mean)}" y2="${y(mean)}"/>`);
      }
      values[row][r].forEach((value, v) => {
        const tags = `data-v="${v}" data-r="${r}" data-g="${g}"`, cx = x(r) + jitter(v);
        if (value !== null) out.push(
          `<circle class="pt" ${tags} cx="${cx}" cy="${y(value)}" r="4.5" fill="${runColour(r)}"/>`);
        else if (undefined_[row][r][v]) out.push(`<path class="pt cross" ${tags} stroke="${runColour(r)}" ` +
          `style="stroke:${runColour(r)}" d="M${cx - 4} ${base + 16}l8 8m0 -8l-8 8"/>`);
      });
    });
    const name = row.length > 22 ? row.slice(0, 21) + "…" : row;
    out.push(`<text class="name" x="${start + groupWidth / 2}" y="${height - 8}" text-anchor="middle">` +
      `${esc(name)}</text>`);
  });
  el("plot").innerHTML = `<svg width="${width}" height="${height}" role="img" ` +
    `aria-label="${esc(m.label)} of every volume">${out.join("")}</svg>`;
}

el("plot").addEventListener("mouseover", event => {
  const point = event.target.closest(".pt");
  document.querySelectorAll("#plot .on").forEach(other => other.classList.remove("on"));
  if (!point) { el("tip").style.display = "none"; return; }
  const {v, r, g} = point.dataset, m = D.metrics[metric], value = D.values[m.key][D.rows[g]][r][v];
  document.querySelectorAll(`#plot [data-v="${v}"]`).forEach(other => other.classList.add("on"));
  el("tip").textContent = `${D.volumes[v]}\n${D.runs[r]}, ${D.rows[g]}\n${m.label}: ` +
    (value === null ? "undefined (one mask is empty)" : value.toFixed(m.digits));
  el("tip").style.display = "block";
  el("tip").style.left = Math.min(event.clientX + 14, innerWidth - el("tip").offsetWidth - 8) + "px";
  el("tip").style.top = event.clientY + 14 + "px";
});
el("plot").addEventListener("mouseleave", () => {
  el("tip").style.display = "none";
  document.querySelectorAll("#plot .on").forEach(other => other.classList.remove("on"));
});
el("plot").addEventListener("click", event => {
  const point = event.target.closest(".pt");
  if (!point || !D.overlays.length) return;
  const found = D.overlays.findIndex(overlay => overlay.volume === D.volumes[point.dataset.v]);
  if (found >= 0) { show(found, 0); el("overlays").scrollIntoView({behavior: "smooth"}); }
});

let current = [0, 0];
function show(volume, slice) {
  current = [volume, slice];
  const overlay = D.overlays[volume], shown = overlay.slices[slice];
  el("volume").value = volume;
  el("where").textContent = `${shown.title} (picture ${slice + 1} of ${overlay.slices.length})`;
  el("panels").innerHTML = shown.panels.map(panel => `<figure><figcaption>${esc(panel.title)}</figcaption>` +
    `<img alt="${esc(overlay.volume)}, ${esc(shown.title)}, ${esc(panel.title)}" ` +
    `src="data:image/jpeg;base64,${panel.jpeg}"></figure>`).join("");
}
function step(by) {
  let [volume, slice] = current;
  slice += by;
  const n = D.overlays.length;
  if (slice < 0) { volume = (volume + n - 1) % n; slice = D.overlays[volume].slices.length - 1; }
  else if (slice >= D.overlays[volume].slices.length) { volume = (volume + 1) % n; slice = 0; }
  show(volume, slice);
}
if (D.overlays.length) {
  el("volume").innerHTML = D.overlays.map((o, i) => `<option value="${i}">${esc(o.volume)}</option>`).join("");
  el("volume").addEventListener("change", () => show(+el("volume").value, 0));
  el("previous").addEventListener("click", () => step(-1));
  el("next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", event => {
    if (event.target.tagName === "SELECT" || event.altKey || event.ctrlKey || event.metaKey) return;
    const n = D.overlays.length;
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else if (event.key === "ArrowUp") show((current[0] + n - 1) % n, 0);
    else if (event.key === "ArrowDown") show((current[0] + 1) % n, 0);
    else return;
    event.preventDefault();
  });
  show(0, 0);
} else el("viewer").hidden = true;
window.addEventListener("resize", plot);
plot();
</script>
</body>
</html>
"""
