const KIND = {"good": ["good", "✓"], "look at it": ["look", "?"], "failed": ["failed", "✕"]};
const STEP = 40;
const number = value => value === null ? "–" : value.toFixed(2);
const millilitres = value => `${value < 100 ? value.toPrecision(3) : Math.round(value)} ml`;
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
    return `<tr><th scope="row">${esc(name)}</th><td class="dice">Dice ${estimate}<br><small>${number(s.low)} to ${number(s.high)}` +
      `</small></td><td class="range">${scale}</td><td class="verdict">${verdict(s.verdict)}<br>` +
      `<small>${millilitres(s.ml)}</small></td></tr><tr><td colspan="4"><ul>${s.reasons.map(r => `<li>${esc(r)}</li>`).join("")}</ul></td></tr>`;
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
