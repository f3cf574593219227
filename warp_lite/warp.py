"""Algorithm 1: iterations of M RL runs, their merge, and the interpolation back.

    θ_init ← θ_sft
    for i = 1 … I:
        for m = 1 … M, in parallel:
            θ^m ← RL from θ_init, with a moving anchor             stage 1: training/reinforce.py, averaging/ema.py
        θ_slerp ← slerp(θ_init, {θ^m}, 1/M)                        stage 2: averaging/slerp.py, averaging/merging.py
        θ_init ← (1 − η) θ_init + η θ_slerp                        stage 3: averaging/liti.py
    return {(1 − η) θ_sft + η θ_slerp : 0 ≤ η ≤ 1}                 the front: result.py

`run_warp` (launch.py) makes all that this needs of what a user has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .averaging.liti import liti
from .averaging.merging import merge
from .averaging.state_dicts import Weights
from .config import WarpConfig
from .result import Iteration, WarpResult
from .task import Task
from .training.iteration import Trained
from .training.run import Run


def warp(task: Task, config: WarpConfig, train: Callable[[list[Run]], Trained],
         keep: Callable[[WarpResult], None] = lambda result: None) -> WarpResult:
    """Algorithm 1 on a task.

    `train` is stage 1: it takes the M runs of an iteration and returns their policies and anchors
    (`training.iteration.Stage1.train`). `keep` is called with the result after each iteration. Source: Algorithm 1.
    """
    result = WarpResult(task, config)
    theta_init = theta_sft = task.sft
    rewards = task.rewards(config.runs)
    for i in range(1, config.iterations + 1):
        runs = [Run(config, i, m, theta_init, theta_sft, reward) for m, reward in enumerate(rewards, 1)]
        trained = train(runs)                                                           # stage 1
        theta_slerp, next_init = finish_iteration(theta_init, trained.policies, config)
        result.iterations.append(Iteration.of(theta_init, trained, theta_slerp, next_init))
        result.trajectories += trained.trajectory
        keep(result)
        theta_init = next_init
    return result


def finish_iteration(theta_init: Weights, policies: Sequence[Weights],
                     config: WarpConfig) -> tuple[Weights, Weights]:
    """Stages 2 and 3 of an iteration: θ_slerp of its M policies, and where the next iteration starts.

    Raises ValueError where the policies do not fit together or are not finite. Source: Algorithm 1, last lines.
    """
    theta_slerp = merge(theta_init, policies, config.merge)                             # stage 2
    return theta_slerp, liti(theta_init, theta_slerp, config.eta)                       # stage 3
