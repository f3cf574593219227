// The limit: the SFT policy's own completions, weighed by exp(reward / β). No policy gets more reward at this KL.
"use strict";

// KL, reward, gold and effective sample size of π_sft · exp(r/β), a mean over prompts of estimates from samples.
function tilted(beta) {
  const {rewards, gold} = WARP.tilt, sum = {kl: 0, reward: 0, gold: 0, ess: 0};
  rewards.forEach((row, n) => {
    const top = Math.max(...row), w = row.map(r => Math.exp((r - top) / beta)), total = w.reduce((a, b) => a + b);
    const mean = of => w.reduce((a, x, i) => a + x * of[i], 0) / total, reward = mean(row);
    sum.kl += reward / beta - (top / beta + Math.log(total / row.length));
    sum.reward += reward; sum.gold += mean(gold[n]);
    sum.ess += total * total / w.reduce((a, x) => a + x * x, 0);
  });
  return Object.fromEntries(Object.entries(sum).map(([name, value]) => [name, value / rewards.length]));
}
const TILT_BETAS = Array.from({length: 61}, (_, n) => 10 ** (1 - n / 40)), TRUSTED = 30;
let tiltCurve;

scene("tilt", [
  {name: "n", label: "β, the price of a nat (left: dear)", min: 0, max: 60, step: 1, value: 40, says: n => TILT_BETAS[n].toFixed(2)},
], ({n}, width) => {
  const {limit, gold, single, sft} = WARP.colours, {completions: texts, prompt, rewards} = WARP.tilt;
  tiltCurve ??= TILT_BETAS.map(tilted);
  const beta = TILT_BETAS[n], here = tiltCurve[n], sound = tiltCurve.filter(p => p.ess >= TRUSTED);
  const wide = width > 640, side = wide ? width / 2 - 8 : width;
  // left: how often each of a few completions would be written
  const w = texts.map(t => Math.exp(t.reward / beta)), total = w.reduce((a, b) => a + b), row = 38;
  const bars = texts.map((t, i) => [t, w[i] / total]).sort((a, b) => a[0].reward - b[0].reward).map(([t, p], i) => {
    const y = 34 + i * row, long = 0.92 * (side - 60) * p, even = 0.92 * (side - 60) / texts.length;
    const room = side / 8.2, text = t.text.length > room ? t.text.slice(0, room - 2) + " …" : t.text;
    return `<text x="0" y="${y - 4}">${signed(t.reward)} · ${escaped(text)}</text>`
      + `<rect x="0" y="${y}" width="${long.toFixed(1)}" height="12" fill="${limit}"/>`
      + `<line x1="${even}" x2="${even}" y1="${y - 1}" y2="${y + 13}" stroke="${sft}" stroke-width="2"/>`
      + `<text x="${Math.max(long, even) + 6}" y="${y + 11}">${(100 * p).toFixed(1)} %</text>`;
  });
  const high = 34 + texts.length * row;
  const left = `<svg role="img" aria-label="shares of eight completions" width="${side}" height="${high}" viewBox="0 0 ${side} ${high}">`
    + `<text x="0" y="12" class="title">After “${escaped(prompt)}”</text>${bars.join("")}</svg>`;
  // right: reward and gold against KL
  const plane = new Plane(side, high, [0, 1.12 * tiltCurve[60].kl], around(tiltCurve.flatMap(p => [p.reward, p.gold])),
    ["KL to the SFT policy (nats per sequence)", "reward (SD of SFT samples)"]);
  const cut = sound.length;
  for (const [name, colour] of [["reward", limit], ["gold", gold]]) {
    plane.line(tiltCurve.slice(0, cut).map(p => [p.kl, p[name]]), colour, {dash: name === "reward" ? "7 4" : ""});
    plane.line(tiltCurve.slice(cut - 1).map(p => [p.kl, p[name]]), colour, {width: 1, dash: "1 4"});
    plane.dot([here.kl, here[name]], colour, {radius: 7, hollow: here.ess < TRUSTED});
    plane.text([tiltCurve[cut - 1].kl, tiltCurve[cut - 1][name]], name === "reward" ? "limit" : "its gold reward", colour,
      {anchor: "end", dx: name === "reward" ? -4 : 0, dy: name === "reward" ? -10 : 78});
  }
  return {
    picture: `<div class="pair">${left}${plane.svg("reward against KL along the limit")}</div>`,
    words: `At β = <b>${beta.toFixed(2)}</b> the best policy is at a KL of <b>${here.kl.toFixed(2)} nats</b>, with reward `
      + `<b>${signed(here.reward)}</b> and <b style="color:${gold}">gold reward ${signed(here.gold)}</b>. `
      + `Of ${rewards[0].length} samples a prompt ${here.ess.toFixed(0)} carry the estimate`
      + (here.ess < TRUSTED ? `, <b>too few to trust it</b>.` : ".") + ` <span class="note">Bars: the share of each of eight completions among them, after its reward. Ticks: the same for the SFT policy.</span>`,
  };
});
