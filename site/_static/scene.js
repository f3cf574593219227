// A scene: sliders, what they change as words, and a picture. Each NAME.js calls scene(NAME, sliders, draw).
"use strict";

// sliders: [{name, label, min, max, step, value, says, brings}]; says(value) is what stands beside it, and moving it
// brings others to the values that it has no meaning without.
// draw(values, width) returns {words: HTML, picture: SVG, then?}; then(svg, set) may make parts of it draggable.
// Sliders may depend on the element: then `sliders` is a function of it.
function scene(name, sliders, draw) {
  for (const place of document.querySelectorAll(`[data-scene="${name}"]`)) {
    const own = typeof sliders === "function" ? sliders(place) : sliders;
    const values = Object.fromEntries(own.map(s => [s.name, s.value])), inputs = {};
    const controls = document.createElement("div"), picture = document.createElement("div");
    const words = document.createElement("div");
    controls.className = "controls"; picture.className = "picture";
    words.setAttribute("data-readout", ""); words.setAttribute("aria-live", "polite");
    place.replaceChildren(controls, picture, words);
    const set = changed => {
      for (const [key, value] of Object.entries(changed)) {
        inputs[key].input.value = value;
        values[key] = +inputs[key].input.value;
      }
      show();
    };
    const show = () => {
      for (const s of own) inputs[s.name].beside.textContent = (s.says ?? String)(values[s.name], values);
      const made = draw(values, Math.max(280, picture.clientWidth), place);
      picture.innerHTML = made.picture;
      words.innerHTML = made.words;
      made.then?.(picture.querySelector("svg"), set);
    };
    for (const s of own) {
      const label = document.createElement("label"), input = document.createElement("input");
      const text = document.createElement("span"), beside = document.createElement("output");
      Object.assign(input, {type: "range", min: s.min, max: s.max, step: s.step});
      input.value = s.value;
      text.textContent = s.label;
      input.addEventListener("input", () => set({[s.name]: +input.value, ...s.brings}));
      label.append(text, input, beside);
      controls.append(label);
      inputs[s.name] = {input, beside};
    }
    show();
    new ResizeObserver(() => { if (picture.clientWidth !== picture.drawn) { picture.drawn = picture.clientWidth; show(); } })
      .observe(picture);
  }
}

// --- drawing ------------------------------------------------------------------------------------

const escaped = text => String(text).replace(/[&<>]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"})[c]);
const signed = (x, digits = 2) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
const fixed = (x, digits = 2) => (x < 0 ? "−" : "") + Math.abs(x).toFixed(digits);
const mixed = (a, b, share) => a + share * (b - a);
// Where x lies among rising values: the index below, and the share of the way to the next.
function between(values, x) {
  let n = 0;
  while (n < values.length - 2 && values[n + 1] <= x) n++;
  return [n, (x - values[n]) / (values[n + 1] - values[n])];
}

// A plane with axes, (x, y) in its own units. Marks are added in the order they are drawn.
class Plane {
  constructor(width, height, x, y, labels, margin = {left: 46, right: 12, top: 10, bottom: 40}) {
    Object.assign(this, {width, height, x, y, labels, margin, parts: []});
  }
  across(x) { return mixed(this.margin.left, this.width - this.margin.right, (x - this.x[0]) / (this.x[1] - this.x[0])); }
  up(y) { return mixed(this.height - this.margin.bottom, this.margin.top, (y - this.y[0]) / (this.y[1] - this.y[0])); }
  at([x, y]) { return `${this.across(x).toFixed(1)},${this.up(y).toFixed(1)}`; }
  line(points, colour, {width = 2, dash = "", opacity = 1} = {}) {
    this.parts.push(`<polyline points="${points.map(p => this.at(p)).join(" ")}" fill="none" stroke="${colour}" `
      + `stroke-width="${width}" stroke-dasharray="${dash}" opacity="${opacity}" stroke-linejoin="round"/>`);
  }
  dot([x, y], colour, {radius = 5, hollow = false, ring = false, role = ""} = {}) {
    this.parts.push(`<circle cx="${this.across(x).toFixed(1)}" cy="${this.up(y).toFixed(1)}" r="${radius}" ${role && `data-drag="${role}"`} `
      + `fill="${hollow ? "white" : colour}" stroke="${ring ? "black" : colour}" stroke-width="${ring || hollow ? 2 : 0}"/>`);
  }
  box([x0, x1], [y0, y1], colour) {
    const left = this.across(x0), top = this.up(y1);
    this.parts.push(`<rect x="${left.toFixed(1)}" y="${top.toFixed(1)}" width="${(this.across(x1) - left + 0.3).toFixed(1)}" `
      + `height="${(this.up(y0) - top + 0.3).toFixed(1)}" fill="${colour}" shape-rendering="crispEdges"/>`);
  }
  text([x, y], words, colour, {anchor = "start", dx = 0, dy = 0} = {}) {
    this.parts.push(`<text x="${(this.across(x) + dx).toFixed(1)}" y="${(this.up(y) + dy).toFixed(1)}" fill="${colour}" `
      + `text-anchor="${anchor}" class="halo">${escaped(words)}</text>`);
  }
  ticks(range, room) {
    const raw = (range[1] - range[0]) / room, size = 10 ** Math.floor(Math.log10(raw));
    const step = size * [1, 2, 5, 10].find(m => m * size >= raw), ticks = [];
    for (let t = Math.ceil(range[0] / step - 1e-9); t * step <= range[1] + 1e-9; t++) ticks.push(+(t * step).toPrecision(6));
    return ticks;
  }
  svg(name) {
    const {left, right, top, bottom} = this.margin, axes = [];
    for (const t of this.ticks(this.x, (this.width - left - right) / 70)) {
      axes.push(`<line x1="${this.across(t)}" x2="${this.across(t)}" y1="${top}" y2="${this.height - bottom}" class="grid"/>`
        + `<text x="${this.across(t)}" y="${this.height - bottom + 16}" text-anchor="middle">${fixed(t, 2).replace(/\.?0+$/, "")}</text>`);
    }
    for (const t of this.ticks(this.y, (this.height - top - bottom) / 45)) {
      axes.push(`<line x1="${left}" x2="${this.width - right}" y1="${this.up(t)}" y2="${this.up(t)}" class="grid"/>`
        + `<text x="${left - 6}" y="${this.up(t) + 4}" text-anchor="end">${fixed(t, 2).replace(/\.?0+$/, "")}</text>`);
    }
    const middle = this.up((this.y[0] + this.y[1]) / 2);
    axes.push(`<text x="${(left + this.width - right) / 2}" y="${this.height - 6}" text-anchor="middle">${this.labels[0]}</text>`
      + `<text transform="translate(12 ${middle}) rotate(-90)" text-anchor="middle">${this.labels[1]}</text>`);
    return `<svg role="img" aria-label="${escaped(name)}" width="${this.width}" height="${this.height}" `
      + `viewBox="0 0 ${this.width} ${this.height}">${axes.join("")}${this.parts.join("")}</svg>`;
  }
}

// A range over values, with some room.
function around(values, room = 0.06) {
  const low = Math.min(...values), high = Math.max(...values);
  return [low - room * (high - low), high + room * (high - low)];
}

// Completions: the words that differ from those of the SFT policy are marked.
function completions(prompts, texts) {
  return texts.map(([text, changed], n) => `<p class="completion"><span>${escaped(prompts[n])}</span> `
    + text.split(" ").map((word, i) => changed[i] === "1" ? `<mark>${escaped(word)}</mark>` : escaped(word)).join(" ")
    + "</p>").join("");
}
