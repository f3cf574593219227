// Stage 2: two task vectors of length 1, the chord (LERP) and the arc (SLERP) between their tips.
"use strict";

scene("arc", [
  {name: "omega", label: "Ω, the angle between them", min: 0, max: 175, step: 1, value: 76, says: v => `${v}°`},
  {name: "lam", label: "λ, from the first to the second", min: 0, max: 1, step: 0.01, value: 0.5, says: v => v.toFixed(2)},
], ({omega, lam}, width) => {
  const {slerp, lerp, single} = WARP.colours, turn = Math.max(omega, 1e-4) * Math.PI / 180;
  const tip = angle => [Math.sin(angle), Math.cos(angle)], one = tip(-turn / 2), two = tip(turn / 2);
  const share = [Math.sin((1 - lam) * turn) / Math.sin(turn), Math.sin(lam * turn) / Math.sin(turn)];
  const mix = (a, b) => [a * one[0] + b * two[0], a * one[1] + b * two[1]];
  const chord = mix(1 - lam, lam), arc = mix(...share), length = v => Math.hypot(...v);
  const high = Math.min(340, 0.62 * width), scale = high / 1.45, half = width / 2 / scale;
  const plane = new Plane(width, high, [-half, half], [-0.2, 1.25], ["", ""], {left: 0, right: 0, top: 0, bottom: 0});
  plane.ticks = () => [];
  plane.line([[0, 0], one], single, {width: 3}); plane.line([[0, 0], two], single, {width: 3});
  plane.line([one, two], lerp);
  plane.line(Array.from({length: 61}, (_, n) => tip(turn * (n / 60 - 0.5))), slerp);
  plane.line([[0, 0], arc], slerp, {width: 1, dash: "4 4"});
  plane.dot([0, 0], "black"); plane.text([0, 0], "θ_init", "black", {anchor: "middle", dy: 20});
  plane.dot(one, single, {radius: 8, role: "omega"}); plane.dot(two, single, {radius: 8, role: "omega"});
  plane.text(one, "δ₁", single, {anchor: "end", dx: -12}); plane.text(two, "δ₂", single, {dx: 12});
  plane.dot(chord, lerp, {radius: 7, role: "lam"}); plane.dot(arc, slerp, {radius: 9, role: "lam"});
  // names on the side where no line runs: outward of the vectors, and above a chord that lies on the start
  const side = lam < 0.5 ? "end" : "start", steep = Math.abs(lam - 0.5) * omega > 12;
  plane.text(chord, "LERP", lerp, {anchor: side, dx: lam < 0.5 ? -10 : 10, dy: chord[1] < 0.3 ? -10 : 20});
  plane.text(arc, "SLERP", slerp, {anchor: steep ? side : "middle", dy: -14});
  return {
    picture: plane.svg("two task vectors, the chord and the arc between their tips"),
    words: `Ω = ${omega}°, λ = ${lam.toFixed(2)}. <b style="color:${slerp}">SLERP</b> ${share[0].toFixed(2)} δ₁ + ${share[1].toFixed(2)} δ₂, length `
      + `<b>${length(arc).toFixed(2)}</b>. <b style="color:${lerp}">LERP</b> ${(1 - lam).toFixed(2)} δ₁ + ${lam.toFixed(2)} δ₂, `
      + `length <b>${length(chord).toFixed(2)}</b>. The arc keeps the length; the chord cuts the corner.`,
    then: (svg, set) => dragged(svg, (role, [x, y]) => {
      const angle = Math.atan2(x - width / 2, plane.up(0) - y);
      set(role === "omega" ? {omega: Math.min(175, 360 * Math.abs(angle) / Math.PI)} : {lam: 0.5 + angle / turn});
    }),
  };
});

// Parts with data-drag follow a finger or a mouse: move(role, [x, y]) in the picture's pixels.
function dragged(svg, move) {
  for (const part of svg.querySelectorAll("[data-drag]")) {
    part.addEventListener("pointerdown", down => {
      down.preventDefault();
      const box = svg.parentNode.getBoundingClientRect(), role = part.dataset.drag;
      const follow = event => move(role, [event.clientX - box.left, event.clientY - box.top]);
      const stop = () => { removeEventListener("pointermove", follow); removeEventListener("pointerup", stop); removeEventListener("pointercancel", stop); };
      addEventListener("pointermove", follow); addEventListener("pointerup", stop); addEventListener("pointercancel", stop);
    });
  }
}
