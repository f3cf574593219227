"""Checks that grade themselves: a reader fills a function in, and `check.NAME(function)` says whether it is right.

Each tries the function on small cases against the package's own arithmetic or a closed form. Where the answers are
those of a well-known mistake, it is named; else the first case that differs is shown. Tensors are float64.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from ..averaging import liti as stage_3
from ..averaging import slerp as stage_2
from ..evaluation import front, statistics
from ..worlds.english import bare_words, repeated_words, share_repeated

SLACK = 1e-6  # by how much an answer may be off


@dataclass(frozen=True)
class Check:
    """One exercise: `check(function)` prints one line about a reader's function and returns whether it is right.

    returns: what the function should return, in words. right: a function that does. cases: arguments to try.
    mistakes: by what is said of it, a function that makes that mistake. What the reader's function raises is printed,
    not raised.
    """

    returns: str
    right: Callable
    cases: Sequence[tuple]
    mistakes: Mapping[str, Callable]

    def __call__(self, function: Callable) -> bool:
        line = self.verdict(function)
        print(line)
        return line.startswith("right")

    def verdict(self, function: Callable) -> str:
        """The line that is printed: "right", "not filled in yet" or "not yet", and what of it."""
        name = getattr(function, "__name__", "the function")
        try:
            answers = [function(*copy.deepcopy(case)) for case in self.cases]
        except NotImplementedError:
            answers = [None]
        except Exception as error:  # whatever a reader's function may raise
            return f"not yet: {name} raises {type(error).__name__}: {error}"
        if any(answer is None for answer in answers):
            return f"not filled in yet: {name}({', '.join(self.names)}) should return {self.returns}"
        wanted = self.answers_of(self.right)
        if all(map(same, answers, wanted)):
            return f"right: {name} agrees in all {len(self.cases)} cases"
        for words, mistake in self.mistakes.items():
            if all(map(same, answers, self.answers_of(mistake))):
                return f"not yet: {words}"
        case, answer, right = next(row for row in zip(self.cases, answers, wanted) if not same(*row[1:]))
        arguments = ", ".join(f"{name}={shown(value)}" for name, value in zip(self.names, case))
        return f"not yet: {name}({arguments}) is {shown(answer)} and should be {shown(right)}"

    @property
    def names(self) -> list[str]:
        """The names of the arguments."""
        return list(inspect.signature(self.right).parameters)

    def answers_of(self, function: Callable) -> list:
        """What a function of the table says to every case."""
        return [function(*copy.deepcopy(case)) for case in self.cases]


def same(answer: object, wanted: object) -> bool:
    """Whether two answers are one: equal texts, or numbers of one shape within `SLACK`, NaN like NaN."""
    if isinstance(wanted, str) or isinstance(answer, str):
        return answer == wanted
    try:
        one, two = (torch.as_tensor(value, dtype=torch.float64) for value in (answer, wanted))
    except (TypeError, ValueError, RuntimeError):
        return False
    return one.shape == two.shape and torch.allclose(one, two, rtol=SLACK, atol=SLACK, equal_nan=True)


def shown(value: object) -> str:
    """A value on one line, numbers to four digits."""
    if isinstance(value, Tensor):
        return shown(value.tolist())
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return getattr(value, "__name__", repr(value))


def vector(*values: float) -> Tensor:
    """A tensor (N,) in float64."""
    return torch.tensor(values, dtype=torch.float64)


# The objective


def tilt(probabilities: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """π* ∝ π · exp(r/β) of completions that can be counted, (K,). Source: the closed form of the KL-regularised
    optimum."""
    weights = probabilities * torch.exp(rewards / beta)
    return weights / weights.sum()


tilted = Check(
    "the probabilities of π*, (K,)", tilt,
    [(vector(0.5, 0.3, 0.2), vector(0.0, 1.0, 2.0), 0.5), (vector(0.1, 0.9), vector(1.0, -1.0), 2.0)],
    {"the weights are not normalised; divide them by their sum":
        lambda probabilities, rewards, beta: probabilities * torch.exp(rewards / beta),
     "β multiplies the reward; it divides it":
        lambda probabilities, rewards, beta: tilt(probabilities, rewards, 1 / beta),
     "the SFT policy's probabilities are missing; the tilt multiplies them":
        lambda probabilities, rewards, beta: torch.softmax(rewards / beta, 0),
     "β is missing; the tilt is exp(r/β)":
        lambda probabilities, rewards, beta: tilt(probabilities, rewards, 1.0),
     "the sign is reversed: poor completions gain":
        lambda probabilities, rewards, beta: tilt(probabilities, rewards, -beta)})

leave_one_out = Check(
    "for each reward the mean of the others, (B,)",
    lambda rewards: (rewards.sum() - rewards) / (len(rewards) - 1),
    [(vector(1.0, 2.0, 6.0),), (vector(0.5, -1.5, 3.0, 4.0),)],
    {"a completion's own reward counts in its baseline; leave it out":
        lambda rewards: rewards.mean().expand(len(rewards)),
     "the sum of the others is divided by B; there are B − 1 of them":
        lambda rewards: (rewards.sum() - rewards) / len(rewards),
     "the sum of the others is not divided; the baseline is their mean":
        lambda rewards: rewards.sum() - rewards,
     "these are the advantages, reward less baseline; return the baseline":
        lambda rewards: rewards - (rewards.sum() - rewards) / (len(rewards) - 1),
     "the baseline is 0, so that a reward's level moves the gradient": torch.zeros_like})

regularised = Check(
    "the reward with its KL penalty, (B,)",
    lambda rewards, logp, anchor_logp, beta: rewards - beta * (logp - anchor_logp),
    [(vector(1.0, 2.0), vector(-3.0, -5.0), vector(-4.0, -4.5), 0.3), (vector(0.0), vector(-1.0), vector(-2.0), 2.0)],
    {"the sign is reversed: moving away from the anchor is paid for":
        lambda rewards, logp, anchor_logp, beta: rewards + beta * (logp - anchor_logp),
     "β is missing":
        lambda rewards, logp, anchor_logp, beta: rewards - (logp - anchor_logp),
     "the anchor is missing: this is a bonus for entropy, not a KL":
        lambda rewards, logp, anchor_logp, beta: rewards - beta * logp,
     "the KL is missing": lambda rewards, logp, anchor_logp, beta: rewards})

kl = Check(
    "the estimate of the KL in nats per sequence, one number",
    lambda logp, anchor_logp, mask: ((logp - anchor_logp) * mask).sum(-1).mean(),
    [(torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.2, -4.0]], dtype=torch.float64),
      torch.tensor([[-1.2, -2.5, -0.9], [-1.0, -3.0, -1.0]], dtype=torch.float64),
      torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64))],
    {"padding is counted; multiply by the mask before you sum":
        lambda logp, anchor_logp, mask: (logp - anchor_logp).sum(-1).mean(),
     "this is per token; sum over a completion's tokens, then take the mean over completions":
        lambda logp, anchor_logp, mask: ((logp - anchor_logp) * mask).sum() / mask.sum(),
     "policy and anchor are exchanged":
        lambda logp, anchor_logp, mask: ((anchor_logp - logp) * mask).sum(-1).mean(),
     "completions are added up; take their mean":
        lambda logp, anchor_logp, mask: ((logp - anchor_logp) * mask).sum(),
     "the mean over tokens counts padding as tokens; sum over a completion's own tokens":
        lambda logp, anchor_logp, mask: ((logp - anchor_logp) * mask).mean()})


# The three stages


ema = Check(
    "the anchor after the step, (D,)",
    lambda anchor, policy, mu: (1 - mu) * anchor + mu * policy,
    [(vector(1.0, -2.0), vector(3.0, 0.5), 0.1), (vector(0.0, 4.0), vector(1.0, 1.0), 0.7)],
    {"the anchor never moves": lambda anchor, policy, mu: anchor,
     "the anchor is the policy itself: its KL is always zero": lambda anchor, policy, mu: policy,
     "μ is reversed: the policy has the weight 1 − μ": lambda anchor, policy, mu: mu * anchor + (1 - mu) * policy,
     "the old anchor keeps its full weight, so that weights grow; it has 1 − μ":
        lambda anchor, policy, mu: anchor + mu * policy,
     "the anchor moves away from the policy": lambda anchor, policy, mu: anchor - mu * (policy - anchor)})


def on_the_arc(init: Tensor, policies: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """SLERP of single tensors (D,). Raises what `slerp` raises."""
    return stage_2.slerp({"w": init}, [{"w": policy} for policy in policies], weights)["w"]


def step_by_step(init: Tensor, policies: Sequence[Tensor], lams: Sequence[float]) -> Tensor:
    """Each next policy merged into those before it, with a λ for every step: (D,)."""
    merged = policies[0]
    for policy, lam in zip(policies[1:], lams):
        merged = on_the_arc(init, [merged, policy], (1 - lam, lam))
    return merged


def arc_in_degrees(init: Tensor, one: Tensor, two: Tensor, lam: float) -> Tensor:
    """SLERP whose angle went into the sines in degrees: (D,)."""
    d1, d2 = one - init, two - init
    omega = torch.rad2deg(torch.acos(d1 @ d2 / d1.norm() / d2.norm()))
    return init + (torch.sin((1 - lam) * omega) * d1 + torch.sin(lam * omega) * d2) / torch.sin(omega)


def arc_not_divided(init: Tensor, one: Tensor, two: Tensor, lam: float) -> Tensor:
    """SLERP without its division by sin Ω: (D,)."""
    d1, d2 = one - init, two - init
    omega = torch.acos(d1 @ d2 / d1.norm() / d2.norm())
    return init + torch.sin((1 - lam) * omega) * d1 + torch.sin(lam * omega) * d2


ORIGIN = vector(1.0, 2.0, -1.0)
TIPS = [ORIGIN + vector(2.0, 0.0, 0.5), ORIGIN + vector(0.5, 1.9, 0.3), ORIGIN + vector(-0.4, 0.6, 1.5),
        ORIGIN + vector(1.0, 1.0, -1.2)]

slerp = Check(
    "the merge, a vector of weights (D,)",
    lambda init, one, two, lam: on_the_arc(init, [one, two], (1 - lam, lam)),
    [(ORIGIN, TIPS[0], TIPS[1], 0.5), (ORIGIN, TIPS[0], TIPS[2], 0.25)],
    {"this is LERP: the coefficients are 1 − λ and λ, not those of the arc":
        lambda init, one, two, lam: (1 - lam) * one + lam * two,
     "whole weights in place of task vectors; subtract init first and add it again at the end":
        lambda init, one, two, lam: on_the_arc(torch.zeros_like(init), [one, two], (1 - lam, lam)),
     "λ is reversed: λ = 0 must give the first policy":
        lambda init, one, two, lam: on_the_arc(init, [one, two], (lam, 1 - lam)),
     "this is the merged task vector; add init to it":
        lambda init, one, two, lam: on_the_arc(init, [one, two], (1 - lam, lam)) - init,
     "the angle is in degrees; sin and cos take radians": arc_in_degrees,
     "the sines are not divided by sin Ω": arc_not_divided})

slerp_many = Check(
    "the merge of all policies, a vector of weights (D,)",
    lambda init, policies: on_the_arc(init, policies),
    [(ORIGIN, TIPS[:3]), (ORIGIN, TIPS)],
    {"λ is 1/M at every step, so the first policy outweighs the others; the k-th joins with 1/k":
        lambda init, policies: step_by_step(init, policies, [1 / len(policies)] * (len(policies) - 1)),
     "λ is ½ at every step, so the last policy outweighs the others; the k-th joins with 1/k":
        lambda init, policies: step_by_step(init, policies, [0.5] * (len(policies) - 1)),
     "λ is one step late, 1/(k − 1) for the k-th: the second replaces the first":
        lambda init, policies: step_by_step(init, policies, [1 / k for k in range(1, len(policies))]),
     "this is LERP, the mean of the policies": lambda init, policies: sum(policies) / len(policies),
     "whole weights in place of task vectors; the arcs are around init":
        lambda init, policies: on_the_arc(torch.zeros_like(init), policies),
     "only the first two policies are merged": lambda init, policies: on_the_arc(init, policies[:2])})

liti = Check(
    "the weights at η, (D,)",
    lambda init, theta, eta: stage_3.interpolate(init, theta, eta),
    [(vector(1.0, 2.0), vector(2.0, 0.0), 0.3), (vector(0.0, -1.0), vector(4.0, 1.0), 1.5)],
    {"η is reversed: η = 0 must give init": lambda init, theta, eta: eta * init + (1 - eta) * theta,
     "init is missing: this scales the policy's weights": lambda init, theta, eta: eta * theta,
     "the whole of theta is added to init; what is added is theta − init":
        lambda init, theta, eta: init + eta * theta,
     "this is the scaled task vector; add init to it": lambda init, theta, eta: eta * (theta - init),
     "η is always ½": lambda init, theta, eta: (init + theta) / 2,
     "η stops at 1; beyond it the dial extrapolates": lambda init, theta, eta: torch.lerp(init, theta, min(eta, 1.0))})


def algorithm(sft: Tensor, train: Callable, merge: Callable, iterations: int, runs: int, eta: float) -> Tensor:
    """The init (D,) after the last iteration of Algorithm 1's outer loop."""
    init = sft
    for _ in range(iterations):
        merged = merge(init, [train(init, run) for run in range(runs)])
        init = (1 - eta) * init + eta * merged
    return init


def loop_with(next_init: Callable, start: Callable = lambda sft, init: init) -> Callable:
    """The outer loop with another rule for the next init, or with runs that start elsewhere."""
    def wrong(sft, train, merge, iterations, runs, eta):
        init = sft
        for _ in range(iterations):
            merged = merge(start(sft, init), [train(start(sft, init), run) for run in range(runs)])
            init = next_init(sft, init, merged, eta)
        return init
    return wrong


def toy_run(init: Tensor, run: int) -> Tensor:
    """A run of a toy: from `init` (2,) halfway to a goal of its own."""
    return init + 0.5 * (vector(4.0 - run, 1.0 + 2 * run) - init)


loop = Check(
    "the init after the last iteration, (D,)", algorithm,
    [(vector(0.0, 0.0), toy_run, on_the_arc, 2, 2, 0.3), (vector(1.0, 0.0), toy_run, on_the_arc, 3, 3, 0.5)],
    {"every iteration starts from the SFT policy; the init moves on":
        loop_with(lambda sft, init, merged, eta: (1 - eta) * init + eta * merged, lambda sft, init: sft),
     "the next init is taken toward the SFT policy; it lies between this iteration's init and its merge":
        loop_with(lambda sft, init, merged, eta: (1 - eta) * sft + eta * merged),
     "the next init is the merge itself; go only the share η of the way":
        loop_with(lambda sft, init, merged, eta: merged),
     "η is reversed": loop_with(lambda sft, init, merged, eta: eta * init + (1 - eta) * merged),
     "the init never moves": lambda sft, train, merge, iterations, runs, eta: sft,
     "one iteration only": lambda sft, train, merge, iterations, runs, eta: algorithm(sft, train, merge, 1, runs, eta),
     "all runs are the same run; give each its number":
        lambda sft, train, merge, iterations, runs, eta:
            algorithm(sft, lambda init, run: train(init, 0), merge, iterations, runs, eta)})


def both_steps(toward_next: Callable, on_front: Callable) -> Callable:
    """A function that returns the two uses of η, (2, D), each by its own rule of (sft, init, merged, eta)."""
    def both(sft, init, merged, eta):
        return torch.stack([toward_next(sft, init, merged, eta), on_front(sft, init, merged, eta)])
    return both


def from_init(sft: Tensor, init: Tensor, merged: Tensor, eta: float) -> Tensor:
    """The share η of the way from the iteration's init to its merge: (D,)."""
    return stage_3.interpolate(init, merged, eta)


def from_sft(sft: Tensor, init: Tensor, merged: Tensor, eta: float) -> Tensor:
    """The share η of the way from the SFT policy to the merge: (D,)."""
    return stage_3.interpolate(sft, merged, eta)


two_steps = Check(
    "torch.stack([the next init, the front's policy]), (2, D)", both_steps(from_init, from_sft),
    [(vector(0.0, 0.0), vector(1.0, 0.5), vector(3.0, 2.0), 0.3),
     (vector(1.0, -1.0), vector(0.0, 1.0), vector(2.0, 4.0), 0.75)],
    {"both go from the SFT policy, so the next iteration starts without what this one's init had gained":
        both_steps(from_sft, from_sft),
     "both go from the init, so the front has no policy near the SFT policy": both_steps(from_init, from_init),
     "the two are exchanged: the next init goes from this init, the front from the SFT policy":
        both_steps(from_sft, from_init),
     "η is reversed: η = 1 must give the merge in both":
        lambda sft, init, merged, eta: both_steps(from_init, from_sft)(sft, init, merged, 1 - eta),
     "the next init is the merge itself; go only the share η of the way":
        both_steps(lambda sft, init, merged, eta: merged, from_sft)})

adapters = Check(
    "the mean update of the matrices, (d, k)",
    lambda pairs: sum(B @ A for B, A in pairs) / len(pairs),
    [([(vector(1.0, 2.0)[:, None], vector(3.0, 0.0, 1.0)[None]),
       (vector(-1.0, 1.0)[:, None], vector(0.0, 2.0, 2.0)[None])],)],
    {"the factors are averaged, so that B₁A₂ and B₂A₁, which nobody trained, are in it; average the products":
        lambda pairs: sum(B for B, _ in pairs) @ sum(A for _, A in pairs) / len(pairs) ** 2,
     "the updates are added up; take their mean": lambda pairs: sum(B @ A for B, A in pairs)})


# What a measurement says


def level_crossing(path: Sequence[tuple[float, float]], level: float) -> float:
    """The reward where a path of (KL, reward) first gets to a KL, in nats; NaN where it does not."""
    return front.first_crossing(*zip(*path), level)


def last_crossing(path: Sequence[tuple[float, float]], level: float) -> float:
    """The reward at the last rise of a path through a KL."""
    for n in range(len(path) - 1, 0, -1):
        if path[n - 1][0] < level <= path[n][0]:
            return level_crossing(path[n - 1:n + 1], level)
    return float("nan")


OUT_AND_BACK = [(0.0, 0.0), (1.0, 2.0), (3.0, 3.0), (1.5, 1.0), (4.0, 2.0)]

crossing = Check(
    "the reward where the path first gets to that KL, or float('nan') where it never does", level_crossing,
    [(OUT_AND_BACK, 2.0), (OUT_AND_BACK, 0.25), (OUT_AND_BACK, 5.0)],
    {"this is the best reward within the budget of KL; noise only ever raises it":
        lambda path, level: max(reward for kl, reward in path if kl <= level),
     "this is the last crossing; one who stops does so at the first": last_crossing,
     "beyond the end of the path its last reward is repeated; return float('nan') there":
        lambda path, level: path[-1][1] if level > 4 else level_crossing(path, level),
     "this is the nearest measured point; go along the straight line between two points":
        lambda path, level: min(path, key=lambda point: abs(point[0] - level))[1]})

word = Check(
    "'holds', 'fails' or 'unclear', for a claim that the effect lies above null",
    lambda low, high, null: statistics.verdict(low, high, "above", null),
    [(0.1, 0.4, 0.0), (-0.1, 0.4, 0.0), (-0.4, 0.1, 0.0), (-0.4, -0.1, 0.0), (0.1, 0.4, 0.5), (0.4, 0.6, 0.5)],
    {"only the middle of the interval is looked at; the whole interval decides":
        lambda low, high, null: "holds" if (low + high) / 2 > null else "fails",
     "an interval that holds the null counts as a failure; it is unclear":
        lambda low, high, null: "holds" if low > null else "fails",
     "the interval is compared with 0; compare it with null":
        lambda low, high, null: statistics.verdict(low, high, "above"),
     "holds and fails are exchanged": lambda low, high, null: statistics.verdict(low, high, "below", null),
     "an interval that only touches the right side counts as holding; all of it must lie above":
        lambda low, high, null: "holds" if high > null else "fails"})


def t_of_draws(draws: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Student's 95 % interval of the mean where each draw counts as one: its lower and upper end."""
    values, groups = zip(*((value, n) for n, draw in enumerate(draws) for value in draw))
    ends = statistics.t_interval(values, groups)
    return ends.low, ends.high


def ends_by(means: Sequence[float], factor: float, ddof: int = 1, root: bool = True) -> tuple[float, float]:
    """The mean of some means, less and plus so many of their standard deviations or, with `root`, of their errors."""
    half = factor * np.std(means, ddof=ddof) / (len(means) ** 0.5 if root else 1)
    return float(np.mean(means) - half), float(np.mean(means) + half)


def t_factor(n: int) -> float:
    """The 97.5 % point of Student's distribution with n − 1 degrees of freedom."""
    return float(stdtrit(n - 1, 0.975))


def means_of(draws: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each draw."""
    return [float(np.mean(draw)) for draw in draws]


interval = Check(
    "the lower and the upper end of the interval", t_of_draws,
    [([[1.0, 2.0, 3.0], [5.0, 5.5], [2.0, 4.0, 6.0, 8.0]],), ([[0.0, 1.0], [3.0, 4.0]],)],
    {"all seeds count as if they were independent; take the mean of each draw first":
        lambda draws: ends_by(np.concatenate(draws), t_factor(sum(map(len, draws)))),
     "the factor is 1.96, right for very many draws; Student's t is larger for few":
        lambda draws: ends_by(means_of(draws), 1.959964),
     "Student's t has n − 1 degrees of freedom, not n":
        lambda draws: ends_by(means_of(draws), t_factor(len(draws) + 1)),
     "the 95 % point leaves 5 % on either side; take the 97.5 % point":
        lambda draws: ends_by(means_of(draws), float(stdtrit(len(draws) - 1, 0.95))),
     "the standard deviation is divided by n; divide by n − 1 (ddof=1)":
        lambda draws: ends_by(means_of(draws), t_factor(len(draws)), ddof=0),
     "this is the spread of the draws, not of their mean; divide by √n":
        lambda draws: ends_by(means_of(draws), t_factor(len(draws)), root=False),
     "these are the least and the largest draw": lambda draws: (min(means_of(draws)), max(means_of(draws)))})


# What a real model writes, and what best-of-n costs

PRAISE = "a great film, a great film and so great"


def neighbours(words: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of neighbouring words."""
    return list(zip(words, words[1:]))


repeats = Check(
    "the share, 0 to 1", repeated_words,
    [(PRAISE,), ("I liked it. I liked it, too",), ("fine",), ("good good good",), ("Good film , good film",)],
    {"this is the share of words that occurred before; ask for pairs of neighbours":
        lambda text: share_repeated(bare_words(text.lower())),
     "every copy of a pair counts, the first too; count those that occurred before":
        lambda text: (lambda pairs: sum(pairs.count(p) > 1 for p in pairs) / len(pairs) if pairs else 0.0)(
            neighbours(bare_words(text.lower()))),
     "punctuation makes a word another one; leave it out":
        lambda text: share_repeated(neighbours(text.lower().split())),
     "words in capitals count as others; take lower case":
        lambda text: share_repeated(neighbours(bare_words(text))),
     "this is how many, not their share": lambda text: len(neighbours(bare_words(text.lower()))) - len(
         set(neighbours(bare_words(text.lower()))))})

best_of_n = Check(
    "the KL in nats", lambda n: math.log(n) - (n - 1) / n, [(1,), (2,), (16,)],
    {"log n is what it costs to be the best of very many; one sample may be the best by chance: less (n − 1)/n":
        lambda n: math.log(n),
     "the logarithm is to base 2, so these are bits": lambda n: math.log2(n) - (n - 1) / n,
     "this is what there is to subtract": lambda n: (n - 1) / n,
     "(n − 1)/n is subtracted, not added": lambda n: math.log(n) + (n - 1) / n})
