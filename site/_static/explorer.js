// The explorer: every iteration's front, for M merged runs and any λ between two, with a point on one of them.
"use strict";

const explored = place => WARP.fronts[place.dataset.front];

scene("explorer", place => {
  const {iterations, runs, etas} = explored(place);
  return [
    {name: "eta", label: "η, from the SFT policy to the merge", min: etas[0], max: etas[etas.length - 1], step: 0.02, value: 0.5, says: v => v.toFixed(2)},
    {name: "iteration", label: "iteration", min: iterations[0], max: iterations[iterations.length - 1], step: 1, value: iterations[iterations.length - 1]},
    ...(runs.length > 1 ? [{name: "runs", label: "M, runs merged", min: 0, max: runs.length - 1, step: 1, value: runs.length - 1, says: n => runs[n]}] : []),
    ...(runs.includes(2) ? [{name: "lam", label: "λ, from run 1 to run 2 (sets M to 2)", min: 0, max: 1, step: 0.05, value: 0.5,
      says: v => v.toFixed(2), brings: {runs: runs.indexOf(2)}}] : []),
  ];
}, (values, width, place) => {
  const {lines, lambdas, etas, iterations, runs, limit, prompts, samples, unit, about} = explored(place);
  const black = WARP.colours.limit, count = runs[values.runs ?? 0];
  const names = ["kl", "kl_se", "reward", "reward_se", "gold", "gold_se", "length"];
  const blend = (a, b, share) => ({...(share < 0.5 ? a : b), ...Object.fromEntries(names.filter(name => name in a)
    .map(name => [name, mixed(a[name], b[name], share)]))});
  const line = iteration => {
    const of = lam => lines.find(l => l.iteration === iteration && l.runs === count && l.lam === lam).points;
    if (count !== 2) return of(null);
    const [n, share] = between(lambdas, values.lam), second = of(lambdas[n + 1]);
    return of(lambdas[n]).map((p, i) => blend(p, second[i], share));
  };
  const front = line(values.iteration), [n, share] = between(etas, values.eta), here = blend(front[n], front[n + 1], share);
  const all = lines.filter(l => l.runs === count).flatMap(l => l.points);
  const right = 1.05 * Math.max(...[...all, ...limit].map(p => p.kl));
  const plane = new Plane(width, Math.min(420, 0.55 * width + 110), [0, right],
    around([...all, ...limit].map(p => p.reward)), ["KL to the SFT policy (nats per sequence)", `reward (${unit})`]);
  if (limit.length) {
    plane.line(limit.map(p => [p.kl, p.reward]), black, {width: 1.5, dash: "7 4"});
    const last = limit[limit.length - 1];
    plane.text([last.kl, last.reward], "limit", black, {anchor: "end", dy: -8});
  }
  for (const i of iterations) {
    const rows = line(i), bold = i === values.iteration, colour = WARP.iterations[(i - 1) % WARP.iterations.length];
    plane.line(rows.map(p => [p.kl, p.reward]), colour, {width: bold ? 3 : 1.5, opacity: bold ? 1 : 0.5});
    for (const p of rows) plane.dot([p.kl, p.reward], colour, {radius: bold ? 3.5 : 2});
    plane.text([right, plane.y[0]], `iteration ${i}`, colour, {anchor: "end", dx: -6, dy: -10 - 18 * (iterations.length - i)});  // no front goes there
  }
  const colour = WARP.iterations[(values.iteration - 1) % WARP.iterations.length];
  plane.line([[here.kl - here.kl_se, here.reward], [here.kl + here.kl_se, here.reward]], "black", {width: 1.5});
  plane.line([[here.kl, here.reward - here.reward_se], [here.kl, here.reward + here.reward_se]], "black", {width: 1.5});
  plane.dot([here.kl, here.reward], colour, {radius: 8, ring: true});
  const nearest = front[share < 0.5 ? n : n + 1];
  return {
    picture: plane.svg("reward against KL along the fronts"),
    words: `Iteration ${values.iteration}, ${count === 1 ? "run 1 alone" : `${count} runs merged`}${count === 2 ? ` at λ = ${values.lam.toFixed(2)}` : ""}, `
      + `η = <b>${values.eta.toFixed(2)}</b>: KL <b>${fixed(here.kl)}</b> ± ${here.kl_se.toFixed(2)} nats, reward <b>${signed(here.reward)}</b> `
      + `± ${here.reward_se.toFixed(2)}${"gold" in here ? `, gold ${signed(here.gold)}` : ""}, ${here.length.toFixed(1)} tokens. `
      + `<span class="note">${about} ± is the standard error over prompts, ${samples} completions a point; between measured points the line is straight.${limit.length ? " The limit ends where too few samples carry it." : ""}</span>`
      + `<p class="head">Written at η = ${nearest.eta.toFixed(1)} (marked: other than at η = 0)</p>` + completions(prompts, nearest.completions),
  };
});
