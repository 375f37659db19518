const COLOURS = D.colours.runs;
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
  el("plot").innerHTML = `<svg width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" role="img" ` +
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
  if (found >= 0) { show(found); el("overlays").scrollIntoView({behavior: "smooth"}); }
});

const KINDS = [["missed", [230, 159, 0]], ["added", [86, 180, 233]], ["another structure", [204, 121, 167]]];
const SCALE = 2;
const layers = {reference: true, prediction: true, wrong: false};
const sheets = new Map();
let volume = 0, place = 0;

function picture(kind, text) {
  const image = new Image();
  image.src = `data:image/${kind};base64,${text}`;
  return image.decode().then(() => image);
}
function values(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.width; canvas.height = image.height;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(image, 0, 0);
  const rgba = context.getImageData(0, 0, image.width, image.height).data;
  const grey = new Uint8Array(rgba.length / 4);
  for (let i = 0; i < grey.length; i++) grey[i] = rgba[4 * i];
  return grey;
}
async function load(index) {
  if (sheets.has(index)) return sheets.get(index);
  const stack = D.overlays[index].stack, names = Object.keys(stack.labels);
  const [grey, ...masks] = await Promise.all(
    [picture("jpeg", stack.image), ...names.map(name => picture("png", stack.labels[name]))]);
  const loaded = {grey, masks: masks.map(values), names};
  sheets.clear();  /* one volume at a time */
  sheets.set(index, loaded);
  return loaded;
}

function paint(canvas, loaded, run, at) {
  const {width: w, height: h, columns} = D.overlays[volume].stack;
  const left = at % columns * w, top = Math.floor(at / columns) * h, whole = columns * w;
  canvas.width = w * SCALE; canvas.height = h * SCALE;
  const context = canvas.getContext("2d");
  context.drawImage(loaded.grey, left, top, w, h, 0, 0, canvas.width, canvas.height);
  const over = context.getImageData(0, 0, canvas.width, canvas.height), rgba = over.data;
  const reference = loaded.masks[0], mine = loaded.masks[run + 1], structures = D.colours.structures;
  const label = (mask, x, y) => mask[(top + Math.floor(y / SCALE)) * whole + left + Math.floor(x / SCALE)];
  const blend = (i, colour, alpha) => {
    for (let c = 0; c < 3; c++) rgba[i + c] = rgba[i + c] * (1 - alpha) + colour[c] * alpha;
  };
  for (let y = 0; y < canvas.height; y++) for (let x = 0; x < canvas.width; x++) {
    const p = label(reference, x, y), q = label(mine, x, y), i = 4 * (y * canvas.width + x);
    if (!p && !q) continue;
    if (layers.wrong && p !== q) blend(i, KINDS[p && q ? 2 : p ? 0 : 1][1], .85);
    else if (layers.prediction && q) blend(i, structures[q - 1], .4);
    if (layers.reference && p) {
      const edge = (dx, dy) => {
        const X = x + dx, Y = y + dy;
        return X < 0 || Y < 0 || X >= canvas.width || Y >= canvas.height || label(reference, X, Y) !== p;
      };
      if (edge(1, 0) || edge(-1, 0) || edge(0, 1) || edge(0, -1)) blend(i, structures[p - 1], 1);
    }
  }
  context.putImageData(over, 0, 0);
}

function figures(loaded, at) {
  const overlay = D.overlays[volume], row = D.volumes.indexOf(overlay.volume), mean = D.rows[D.rows.length - 1];
  return loaded.names.slice(1).map((name, run) => {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas");
    const dice = D.values.Dice[mean][run] && D.values.Dice[mean][run][row];
    figure.innerHTML = `<figcaption><b>${esc(D.runs[run])}</b>, Dice of this volume ` +
      `${dice === null || dice === undefined ? "undefined" : dice.toFixed(3)}</figcaption>`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${overlay.volume}, slice ${overlay.stack.slices[at] + 1}, ${D.runs[run]}`);
    figure.appendChild(canvas);
    paint(canvas, loaded, run, at);
    return figure;
  });
}
function title(at) {
  const overlay = D.overlays[volume], index = overlay.stack.slices[at];
  const chosen = overlay.chosen.find(part => part.index === index);
  return chosen ? chosen.title : `${overlay.plane} slice ${index + 1} of ${overlay.depth}`;
}
async function draw() {
  const wanted = [volume, place], loaded = await load(volume);
  if (wanted[0] !== volume || wanted[1] !== place) return;  /* meanwhile another was asked for */
  el("slice").value = place;
  el("where").textContent = `${D.overlays[volume].volume}: ${title(place)}`;
  el("panels").replaceChildren(...figures(loaded, place));
  el("viewer").dataset.drawn = `${volume}/${place}`;
  const mark = el("wrong").querySelector(".here");
  if (mark) { mark.setAttribute("x1", place + .5); mark.setAttribute("x2", place + .5); }
}
function show(index, at) {
  volume = index;
  const {stack, chosen} = D.overlays[volume], n = stack.slices.length;
  const worst = chosen.find(part => part.title.includes("most wrong")) || chosen[0];
  place = at === undefined ? Math.max(0, stack.slices.indexOf(worst ? worst.index : stack.slices[n >> 1])) : at;
  el("volume").value = volume;
  el("slice").max = n - 1;
  const lines = Object.values(stack.wrong), top = Math.max(1, ...lines.flat());
  el("wrong").setAttribute("viewBox", `0 0 ${n} 100`);
  const drawn = line => (n > 1 ? line : [line[0], line[0]]).map(
    (value, i) => `${i + (n > 1 ? .5 : 0)},${96 - 92 * value / top}`).join(" ");
  el("wrong").innerHTML = lines.map((line, r) => `<polyline fill="none" stroke="${runColour(r)}" stroke-width="1.6" ` +
    `vector-effect="non-scaling-stroke" points="${drawn(line)}"/>`).join("") +
    `<line class="here" y1="0" y2="100" stroke="currentColor" stroke-width="1.5" stroke-dasharray="3 3" ` +
    `vector-effect="non-scaling-stroke"/>`;
  draw();
}
function step(by) {
  const n = D.overlays[volume].stack.slices.length;
  place = Math.min(n - 1, Math.max(0, place + by));
  draw();
}
function stepVolume(by) { show((volume + D.overlays.length + by) % D.overlays.length); }
function nextChosen() {
  const {stack, chosen} = D.overlays[volume], places = chosen.map(part => stack.slices.indexOf(part.index));
  const next = places.find(at => at > place);
  place = next === undefined ? places[0] : next;
  draw();
}

if (D.overlays.length) {
  el("volume").innerHTML = D.overlays.map((o, i) => `<option value="${i}">${esc(o.volume)}</option>`).join("");
  el("volume").addEventListener("change", () => show(+el("volume").value));
  el("previous").addEventListener("click", () => step(-1));
  el("next").addEventListener("click", () => step(1));
  el("chosen").addEventListener("click", nextChosen);
  el("slice").addEventListener("input", () => { place = +el("slice").value; draw(); });
  el("wrong").addEventListener("click", event => {
    const box = el("wrong").getBoundingClientRect(), n = D.overlays[volume].stack.slices.length;
    place = Math.min(n - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * n)));
    draw();
  });
  el("layers").addEventListener("click", event => {
    const layer = event.target.dataset.layer;
    if (!layer) return;
    layers[layer] = !layers[layer];
    event.target.setAttribute("aria-pressed", layers[layer]);
    draw();
  });
  el("kinds").innerHTML = "Disagreement: " + KINDS.map(([name, colour]) =>
    `<span><i style="background:rgb(${colour})"></i>${name}</span>`).join("");
  document.addEventListener("keydown", event => {
    if (/SELECT|INPUT/.test(event.target.tagName) || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else if (event.key === "ArrowUp") stepVolume(-1);
    else if (event.key === "ArrowDown") stepVolume(1);
    else return;
    event.preventDefault();
  });
  show(0);
} else el("viewer").hidden = true;

const closed = [];
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details:not([open])").forEach(one => { closed.push(one); one.open = true; });
  const loaded = sheets.get(volume);
  if (!loaded) return;
  const {stack, chosen} = D.overlays[volume];
  el("printed").replaceChildren(...chosen.map(part => {
    const block = document.createElement("div"), panels = document.createElement("div");
    block.innerHTML = `<h3>${esc(D.overlays[volume].volume)}: ${esc(part.title)}</h3>`;
    panels.className = "panels";
    panels.append(...figures(loaded, stack.slices.indexOf(part.index)));
    block.append(panels);
    return block;
  }));
});
window.addEventListener("afterprint", () => {
  closed.splice(0).forEach(one => { one.open = false; });
  el("printed").replaceChildren();
});
window.addEventListener("resize", plot);
plot();
