"""The settings that studies share, and the measure that they are chosen by."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import WarpConfig
from ..evaluation.front import hypervolume

# Of a front, so close that a merge of 8 nats has a point at every half nat up to 4: reward is concave in KL, so that
# straight lines between few points take area from the fronts that go far, and from these most.
ETAS = tuple(k / 20 for k in range(1, 21))
BEYOND = (*ETAS, 1.25, 1.5, 2.0)  # past the merge: LERP takes shorter steps than SLERP
PAST_ETAS = (1.2, 1.4, 1.6, 1.8, 2.0)  # further along the line from θ_sft through the merge
WEAK_ETAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)  # where single runs go far from θ_sft
# What β alone is given, in place of LITI, to draw a front with: learning rates too, as no β keeps a fast run near.
REFRESH = tuple((lr, beta) for lr in (1e-4, 3e-4, 1e-3) for beta in (0.03, 0.1, 0.3, 1.0))
KL_MAX = 4.0  # nats up to which areas are taken
# Batches of 4: gradient noise rules, and task vectors are far from parallel.
NOISY = WarpConfig(iterations=1, runs=4, steps=100, batch_size=4, lr=1e-3, beta=0.3, mu=0.01, eta=0.3, eval_every=0)
# Longer runs of batches of 8, on which anchors are compared.
ANCHORS = WarpConfig(iterations=1, runs=1, steps=240, batch_size=8, lr=1e-3, beta=0.3, mu=0.01, merge="none",
                     eval_every=20)
# The noise map: batch size × learning rate.
NOISE_GRID = tuple(NOISY.replace(batch_size=batch, lr=lr) for batch in (2, 4, 8, 16, 32) for lr in (3e-4, 1e-3, 3e-3))
SHORT = 20  # steps of the two runs whose angle predicts what longer ones gain
# Equal compute: 3,200 completions each, by name.
EQUAL = {
    "WARP": NOISY.replace(iterations=2),
    "WARP with LERP": NOISY.replace(iterations=2, merge="lerp"),
    "one iteration": NOISY.replace(steps=200),
    "one long run": NOISY.replace(runs=1, steps=800, merge="none", eval_every=80),
    "batch of 16": NOISY.replace(runs=1, steps=200, batch_size=16, merge="none"),
    "batch of 32": NOISY.replace(runs=1, steps=100, batch_size=32, merge="none"),
    "plain run": NOISY.replace(runs=1, steps=800, merge="none", anchor="sft", eval_every=40),
}
TRACED = ("plain run",)  # those whose curve is the run's way and not its LITI front: nothing in them is averaged
# Weak regularisation: merged runs of batches of 8 against one run of batches of 32.
WEAK = NOISY.replace(steps=150, batch_size=8, lr=7e-4, merge="lerp")
WIDE = WEAK.replace(runs=1, batch_size=32, merge="none")
# The nearest to the limit, at any compute.
LARGE = WarpConfig(iterations=1, runs=4, batch_size=32, steps=200, lr=5e-4, mu=0.01, eta=0.5, eval_every=0)


def area(points: Sequence[dict], kl_max: float = KL_MAX, kind: str = "reward") -> float:
    """The area of a front above the reward of its first point, θ_sft, for KL from 0 to `kl_max`."""
    return hypervolume([(p["kl"], p[kind]) for p in points], (kl_max, points[0][kind]))
