// Stage 1 with a policy of one weight: a steady pull a, and a pull back of β times the distance to the anchor.
"use strict";

scene("anchor", [
  {name: "beta", label: "β, how hard the anchor pulls back", min: 0.005, max: 0.1, step: 0.005, value: 0.02, says: v => v.toFixed(3)},
  {name: "mu", label: "μ, how fast the anchor follows", min: 0, max: 0.1, step: 0.002, value: 0.01, says: v => v.toFixed(3)},
], ({beta, mu}, width) => {
  const a = 0.01, steps = 600, {ema, sft, none} = WARP.colours;
  const walk = rate => {
    let theta = 0, anchor = 0;
    const path = [[0, 0]], behind = [[0, 0]];
    for (let step = 1; step <= steps; step++) {
      [theta, anchor] = [theta + a - beta * (theta - anchor), anchor + rate * (theta - anchor)];
      path.push([step, theta]); behind.push([step, anchor]);
    }
    return {path, behind, end: theta, pace: theta - path[steps - 1][1]};
  };
  const still = walk(0), moving = walk(mu), limit = a / beta;
  const plane = new Plane(width, Math.min(320, 0.6 * width + 60), [0, steps], [0, 6.3], ["step", "weight (arbitrary units)"]);
  plane.line([[0, 0], [steps, a * steps]], none, {width: 1, dash: "4 4"});
  plane.line(moving.behind, ema, {width: 1.5, dash: "5 4"});
  plane.line(moving.path, ema, {width: 3});
  plane.line(still.path, sft, {width: 3, dash: mu === 0 ? "2 6" : ""});
  // every line is below the dashed one, so the corner above it is free
  [["no anchor", none], ["policy, moving anchor", ema], ["policy, fixed anchor", sft], ["moving anchor (dashed)", ema]].forEach(([words, colour], n) =>
    plane.text([0, plane.y[1]], words, colour, {dx: 8, dy: 14 + 17 * n}));
  const pace = mu > 0 ? a / (1 + beta / mu) : 0;
  return {
    picture: plane.svg("a weight while it trains, held by a fixed and by a moving anchor"),
    words: `β = ${beta.toFixed(3)}, μ = ${mu.toFixed(3)}. <b style="color:${sft}">Fixed anchor</b>: the policy stops at a/β = <b>${limit.toFixed(2)}</b>; after ${steps} steps it is at `
      + `${still.end.toFixed(2)}. <b style="color:${ema}">Moving anchor</b>: ` + (mu > 0
        ? `it goes on at a/(1 + β/μ) = <b>${pace.toFixed(4)}</b> a step, and after ${steps} steps is at <b>${moving.end.toFixed(2)}</b>; its last step was ${moving.pace.toFixed(4)}.`
        : `with μ = 0 it does not move, and is a fixed anchor: the policy is at <b>${moving.end.toFixed(2)}</b>.`)
      + ` The pull is a = ${a} a step.`,
  };
});
