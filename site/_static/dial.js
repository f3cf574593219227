// Stage 3: η moves the weights from the SFT policy through the merge, and with them KL, reward and what is written.
"use strict";

const HILL = ["#ffffff", "#ededed", "#d9d9d9", "#c4c4c4", "#adadad"];
function shade(share) {  // of the hill: light is little reward
  const [n, rest] = between(HILL.map((_, i) => i / (HILL.length - 1)), Math.min(1, Math.max(0, share)));
  const part = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  return `rgb(${[0, 1, 2].map(i => Math.round(mixed(part(HILL[n], i), part(HILL[n + 1], i), rest))).join()})`;
}

scene("dial", [
  {name: "eta", label: "η, from the SFT policy (0) to the merge (1) and past it", min: 0, max: 1.5, step: 0.02, value: 0.5, says: v => v.toFixed(2)},
], ({eta}, width) => {
  const {iterations, across, up, rewards} = WARP.plane, points = WARP.dial, {single, liti} = WARP.colours;
  const [n, share] = between(points.map(p => p.eta), eta), [a, b] = [points[n], points[n + 1]];
  const here = Object.fromEntries(["kl", "kl_se", "reward", "reward_se", "gold"].map(name => [name, mixed(a[name], b[name], share)]));
  const nearest = share < 0.5 ? a : b, side = width > 640 ? width / 2 - 8 : width, high = Math.min(340, 0.75 * side + 40);
  // left: the plane of weights on the hill of reward
  const low = Math.min(...rewards.flat()), top = Math.max(...rewards.flat()), cells = 4;
  const ends = values => [values[0], values[values.length - 1]];
  const plane = new Plane(side, high, ends(across), ends(up), ["weights, toward the merge", "weights, beside it"]);
  for (let j = 0; j < (up.length - 1) * cells; j++) for (let i = 0; i < (across.length - 1) * cells; i++) {
    const [c, r] = [Math.floor(i / cells), Math.floor(j / cells)], s = (i % cells + 0.5) / cells, t = (j % cells + 0.5) / cells;
    const value = mixed(mixed(rewards[r][c], rewards[r][c + 1], s), mixed(rewards[r + 1][c], rewards[r + 1][c + 1], s), t);
    const x = k => mixed(across[c], across[c + 1], (i % cells + k) / cells), y = k => mixed(up[r], up[r + 1], (j % cells + k) / cells);
    plane.box([x(0), x(1)], [y(0), y(1)], shade((value - low) / (top - low)));
  }
  iterations.forEach((it, i) => {
    for (const run of it.runs) {
      plane.line([it.init, run], WARP.iterations[i], {width: 1});
      plane.dot(run, WARP.iterations[i], {radius: 3.5});
    }
    plane.dot(it.merged, WARP.iterations[i], {radius: 6, ring: true});
    plane.text(it.merged, `merge ${i + 1}`, "black", {anchor: "middle", dy: i + 1 < iterations.length ? -10 : 20});
  });
  const merged = iterations[iterations.length - 1].merged, theta = [eta * merged[0], eta * merged[1]];
  plane.line([[0, 0], [1.5 * merged[0], 1.5 * merged[1]]], liti, {width: 3});
  plane.dot([0, 0], "black"); plane.text([0, 0], "θ_sft", "black", {dy: -9, anchor: "middle"});
  plane.dot(theta, liti, {radius: 8, ring: true});
  // right: KL and reward
  const front = new Plane(side, high, [0, 1.06 * Math.max(...points.map(p => p.kl))], around(points.flatMap(p => [p.reward, p.gold])),
    ["KL to the SFT policy (nats per sequence)", "reward (SD of SFT samples)"]);
  for (const [name, colour] of [["gold", WARP.colours.gold], ["reward", liti]]) {
    front.line(points.map(p => [p.kl, p[name]]), colour, {width: name === "gold" ? 1.5 : 3});
    for (const p of points) front.dot([p.kl, p[name]], colour, {radius: 2.5});
    const last = points[points.length - 1];
    front.text([last.kl, last[name]], name, colour, {anchor: "end", dy: name === "gold" ? 20 : -10});
    front.dot([here.kl, here[name]], colour, {radius: 7, ring: true});
  }
  return {
    picture: `<div class="pair">${plane.svg("the weights on the reward's hill")}${front.svg("reward against KL")}</div>`,
    words: `η = <b>${eta.toFixed(2)}</b>: KL <b>${fixed(here.kl)}</b> ± ${here.kl_se.toFixed(2)} nats, reward <b>${signed(here.reward)}</b> `
      + `± ${here.reward_se.toFixed(2)}, gold ${signed(here.gold)}. `
      + `<span class="note">Shading: reward, from ${signed(low)} (light) to ${signed(top)} (dark). ${WARP.fronts.tiny.about} ± is the standard error over prompts.</span>`
      + `<p class="head">Written at η = ${nearest.eta.toFixed(1)} (marked: other than at η = 0)</p>`
      + completions(WARP.fronts.tiny.prompts, nearest.completions),
  };
});
