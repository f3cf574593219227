"""Benchmarks against what a user would pick instead. `make bench` runs them.

Every ratio is measured side by side: the two sides take turns, medians are compared.
Writes results.json, results.md and growth.png beside this file (or into --out DIR) and prints the table. With --only
the other parts stay as they were measured before, and the table names the commit of each.
A figure that is missed is printed as missed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from warp_lite.averaging.state_dicts import parameters, stack
from warp_lite.config import WarpConfig
from warp_lite.policies.forward import make_forward
from warp_lite.policies.loading import load_policy, quiet, save_policy
from warp_lite.policies.prompts import Prompts, encode_prompts
from warp_lite.policies.sampling import Policies
from warp_lite.rewards.calling import rollout_rewards
from warp_lite.storage.provenance import provenance
from warp_lite.training.batched import Ensemble, FlatAnchor, train_batched
from warp_lite.training.reinforce import differentiate, draw, score
from warp_lite.training.run import Run
from warp_lite.training.serial import train_serial
from warp_lite.viewing.plots import COLOURS, style
from warp_lite.worlds import load_world
from warp_lite.worlds.reviews import reviews_world

HERE = Path(__file__).resolve().parent
PARTS = ("steps", "sampling", "real", "experiment", "claims", "saving", "merge", "ray", "busy", "growth")
REAL_BATCH = 16  # completions a step of the real model
LENGTH = 24  # tokens of every completion on the tiny model; none ends early, so that all sides do the same work


class Endless(Policies):
    """Policies whose completions never end early: -1 is never sampled."""

    def ends(self, tokenizer) -> tuple[int, ...]:
        return (-1,)


def interleaved(rounds: int, **sides) -> dict[str, float]:
    """Median seconds of each side; the sides take turns.

    A side is a function that returns seconds, or None: then it is timed.
    """
    times = {name: [] for name in sides}
    for side in sides.values():
        side()  # warm-up
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            seconds = side()
            times[name].append(seconds if seconds is not None else time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def bandwidth() -> float:
    """Bytes a second that a copy of 256 MB reads and writes, the best of five."""
    a, b = torch.zeros(2**26), torch.zeros(2**26)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        b.copy_(a)
        best = min(best, time.perf_counter() - start)
    return 2 * a.nbytes / best


def matrix_rate() -> float:
    """Floating-point operations a second of an fp32 matrix product of this machine (1024³), the best of ten."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


class PolicyStep:
    """One step of E policies: sampling, anchor, reward, scoring, backward, update; completions of full length."""

    def __init__(self, world, model, policies: int, batch: int, length: int = LENGTH):
        state = parameters(model)
        self.world, self.E = world, policies
        config = WarpConfig(batch_size=batch, max_new_tokens=length)
        self.runs = [Run(config, 1, m + 1, state, state, world.reward) for m in range(policies)]
        self.prompts = world.prompts
        self.forward = make_forward(model)
        self.ensemble = Ensemble([state] * policies, [1e-6] * policies, (0.9, 0.95), 1e-8, [1.0] * policies)
        self.anchor = FlatAnchor(self.ensemble, [state] * policies, [config.mu] * policies)
        self.beta = torch.full((policies, 1), 0.3, dtype=torch.float64)
        self.config, self.steps = config, 0

    def __call__(self) -> None:
        for _ in self.stages():
            pass

    def stages(self) -> Iterator[str]:
        """Take a step; the name of each of its parts as it ends."""
        batch, uniforms = draw(self.runs, self.steps, self.prompts)
        with torch.no_grad():
            rollout = Endless(self.forward, self.ensemble.weights).sample(batch, uniforms, self.world.tokenizer)
        yield "sampling"
        anchor_logp = score(self.forward, self.anchor.weights, rollout, self.config)
        yield "the anchor's log-probabilities"
        rewards = rollout_rewards([self.world.reward] * self.E, rollout, self.world.tokenizer)
        yield "rewards"
        differentiate(self.forward, self.ensemble.weights, rollout, rewards, anchor_logp, self.beta, self.config,
                      self.ensemble.backward)
        yield "forward and backward"
        self.ensemble.step(1.0)
        self.anchor.update()
        self.steps += 1
        yield "Adam and the moving anchor"

    def parts(self, rounds: int) -> list[dict]:
        """Median seconds of each part of a step, with the least that its operations and its weights' bytes take at the
        measured rates of matrix products and of copies."""
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds + 1):  # the first is not counted
            before = time.perf_counter()
            for name in self.stages():
                now = time.perf_counter()
                seconds.setdefault(name, []).append(now - before)
                before = now
        rate, copied, operations, bytes_moved = matrix_rate(), bandwidth(), self.operations(), self.bytes_moved()
        return [{"part": name, "seconds": median(some[1:]), "by_operations": operations[name] / rate,
                 "by_bytes": bytes_moved[name] / copied} for name, some in seconds.items()]

    def operations(self) -> dict[str, float]:
        """Operations of the matrix products of each part of a step, all policies: 2 a weight and token, three times
        that for training, and attention. Those of tokens that are no padding, in prompts of the mean length."""
        config, B = self.world.policy.config, self.runs[0].config.batch_size
        length = self.config.max_new_tokens
        S = float(self.prompts.mask.sum(-1).double().mean()) + length - 1

        def trunk(model) -> float:
            layers = sum(weight.numel() for name, weight in parameters(model).items() if weight.dim() == 2
                         and not any(part in name for part in ("wte", "wpe", "embed", "lm_head")))
            scores = model.config.num_hidden_layers * 2 * 2 * S * S * model.config.hidden_size / 2  # causal: half
            return B * (S * layers * 2 + scores)

        once = self.E * (trunk(self.world.policy) + B * length * config.hidden_size * config.vocab_size * 2)
        return {"sampling": once, "the anchor's log-probabilities": once,
                "rewards": self.E * trunk(self.world.reward.trunk), "forward and backward": 3 * once,
                "Adam and the moving anchor": 0.0}

    def bytes_moved(self) -> dict[str, float]:
        """Bytes of weights that each part of a step reads and writes, all policies: a pass reads them once, the
        backward pass twice more, sampling once a token; Adam has seven, and the anchor three."""
        weights = self.ensemble.flat.nbytes
        return {"sampling": self.config.max_new_tokens * weights, "the anchor's log-probabilities": weights,
                "rewards": weights, "forward and backward": 3 * weights, "Adam and the moving anchor": 10 * weights}


class Side:
    """One side of a comparison, a process of its own, so that neither lives with the other's threads or memory: a call
    writes a word to it, and returns the list that it answers."""

    def __init__(self, *arguments: object, threads: int | None = None):
        own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self.name, self.complaints = str(arguments[0]).lstrip("-"), tempfile.TemporaryFile("w+")
        self.child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *map(str, arguments)], env={**os.environ, **own},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True)

    def __call__(self, word: str) -> list:
        with suppress(BrokenPipeError):  # it has ended: what it said is below
            self.child.stdin.write(f"{word}\n")
            self.child.stdin.flush()
        while line := self.child.stdout.readline():
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        self.complaints.seek(0)
        said = self.complaints.read().strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"the process of the side {self.name!r} ended with {self.child.wait()}: {said[-1]}")

    def close(self) -> None:
        """End the process, if it has not."""
        with suppress(BrokenPipeError):
            self.child.stdin.close()
        self.child.wait()
        self.complaints.close()


class TRLStep(Side):
    """Steps of TRL's RLOOTrainer on the tiny world's policy. Each call returns the median seconds of some."""

    def __init__(self, folder: Path, batch: int, defaults: bool = False):
        super().__init__("--trl", folder, batch, int(defaults))

    def __call__(self) -> float:
        return super().__call__("step")[0]


def trl_process(folder: Path, batch: int, defaults: bool) -> None:
    """The other side of `TRLStep`: an answer for every line of standard input."""
    world = reviews_world()

    def reward(prompts, completions, completion_ids, **kwargs):
        ids = torch.tensor([(row + [0] * LENGTH)[:LENGTH] for row in completion_ids])
        return world.reward.from_ids(encode_prompts(world.tokenizer, prompts), ids, torch.ones_like(ids)).tolist()

    for _ in sys.stdin:
        print("answer", json.dumps([trl_seconds(folder, world, batch, reward, defaults)]), flush=True)


def trl_seconds(folder: Path, world, batch: int, reward: Callable, defaults: bool = False) -> float:
    """Median seconds of the last four of six steps of TRL's RLOOTrainer on the policy in `folder`, completions of full
    length; in float32 and with an anchor that moves at every step, or with its own `defaults`."""
    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import RLOOConfig, RLOOTrainer

    AcceleratorState._reset_state(True)  # it remembers the precision of the trainer before
    marks = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks.append(time.perf_counter())

    own = {} if defaults else {"bf16": False, "gradient_checkpointing": False, "sync_ref_model": True,
                               "ref_model_mixup_alpha": 0.01, "ref_model_sync_steps": 1}
    arguments = RLOOConfig(
        output_dir=str(folder / "out"), use_cpu=True, per_device_train_batch_size=batch, num_generations=batch,
        max_completion_length=LENGTH, temperature=1.0, top_k=0, top_p=1.0, beta=0.3, learning_rate=1e-6, max_steps=6,
        report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
        generation_kwargs={"min_new_tokens": LENGTH}, **own)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        RLOOTrainer(model=model, reward_funcs=reward, args=arguments, processing_class=world.tokenizer,
                    train_dataset=Dataset.from_dict({"prompt": world.prompts.given * 20}),
                    callbacks=[Clock()]).train()
    return float(np.median(np.diff(marks)[1:]))


def real_process(side: str, folder: Path) -> None:
    """A side of `bench_real`. "step": median seconds of a training step, one in front of it uncounted; "sample":
    seconds of sampling and of generate(), taking turns; "rate": operations a second of a matrix product, and those of
    a step; "parts": `PolicyStep.parts`; "peak": the most memory so far, in bytes."""
    world = load_world("smollm2", progress=False)
    few = encode_prompts(world.tokenizer, world.prompts.given[:REAL_BATCH])
    prompts = Prompts(few.texts, few.ids[None], few.mask[None])
    step = PolicyStep(world, world.policy, 1, REAL_BATCH) if side == "ours" else None
    for line in sys.stdin:
        if line.strip() == "peak":
            answer = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
        elif line.strip() == "rate":
            answer = [matrix_rate(), sum(step.operations().values())]
        elif line.strip() == "parts":
            answer = step.parts(2)
        elif line.strip() == "sample":
            t = interleaved(7, ours=lambda: real_samples(step, world, prompts),
                            theirs=lambda: generated(world.policy, prompts))
            answer = [t["ours"], t["theirs"]]
        elif step is not None:
            answer = [interleaved(3, step=step)["step"]]
        else:
            answer = [trl_seconds(folder, world, REAL_BATCH, world.reward)]
        print("answer", json.dumps(answer), flush=True)


def real_samples(step: PolicyStep, world, prompts: Prompts) -> None:
    """Completions of full length by the policies of a step."""
    uniforms = torch.rand(1, REAL_BATCH, LENGTH, dtype=torch.float64)
    with torch.no_grad():
        Endless(step.forward, step.ensemble.weights).sample(prompts, uniforms, world.tokenizer)


def generated(model, prompts: Prompts) -> None:
    """The same by the library's generate()."""
    with torch.no_grad(), quiet():
        model.generate(prompts.ids[0], attention_mask=prompts.mask[0], do_sample=True, top_k=0, top_p=1.0,
                       max_new_tokens=LENGTH, min_new_tokens=LENGTH)


def bench_real(rounds: int, scratch: Path) -> list[dict]:
    """A step of SmolLM2, 16 completions of 24 tokens in float32, against TRL's, with one thread and with two; sampling
    against generate(); memory. Needs `make real-model`."""
    world = load_world("smollm2")
    save_policy(world.policy, world.tokenizer, scratch / "smollm2")
    rows = []
    for threads in (1, 2):
        ours, trl = (Side("--real", side, scratch / "smollm2", threads=threads) for side in ("ours", "trl"))
        words = f"SmolLM2-135M, {REAL_BATCH} × {LENGTH} tokens, {threads} thread{'s' if threads > 1 else ''}"
        times = [(ours("step")[0], trl("step")[0]) for _ in range(min(rounds, 2))]
        seconds, of_trl = (median(side) for side in zip(*times))
        rows.append(row(f"policy step, {words}, against TRL RLOO", seconds, of_trl, 1.5))
        sampled, by_generate = ours("sample")
        rows.append(row(f"sampling, {words}, against generate()", sampled, by_generate, 1.5))
        rate, operations = ours("rate")
        rows.append({"name": f"share of the measured fp32 matrix rate, {words}", "value": operations / seconds / rate,
                     "unit": "share", "target": None, "met": True,
                     "detail": f"{operations / 1e9:.0f} GFLOP a step, {rate / 1e9:.0f} GFLOP/s"})
        peaks = ours("peak")[0], trl("peak")[0]
        rows.append({"name": f"peak memory, {words}, as a share of TRL's", "value": peaks[0] / peaks[1],
                     "unit": "share", "target": None, "met": True,
                     "detail": f"{peaks[0] / 1e9:.1f} GB against {peaks[1] / 1e9:.1f} GB"})
        rows.append({"name": f"a step of {words}", "parts": ours("parts")})
        ours.close()
        trl.close()
    return rows


def published(world, folder: Path):
    """The tiny world's policy as GPT-2 was published, with the activation "gelu_new": the same function, which
    the library computes in eight passes. Returns the model, saved in `folder`."""
    model = copy.deepcopy(world.policy)
    model.config.activation_function = "gelu_new"
    save_policy(model, world.tokenizer, folder)
    return load_policy(folder)[0]


def bench_steps(world, rounds: int, scratch: Path) -> list[dict]:
    """A policy step against TRL's, and against the machine."""
    rows, rate = [], []
    gpt2 = published(world, scratch / "published")
    save_policy(world.policy, world.tokenizer, scratch / "tiny")
    ours = PolicyStep(world, gpt2, 4, 64)

    def timed():
        rate.append(matrix_rate())
        start = time.perf_counter()
        for _ in range(3):
            ours()
        return (time.perf_counter() - start) / 3

    sides = {
        "trl": TRLStep(scratch / "published", 64),
        "defaults": TRLStep(scratch / "published", 64, True),
        "fused": TRLStep(scratch / "tiny", 64),
    }
    t = interleaved(rounds, ours=timed, **sides)
    rows.append(
        row("policy step, batch 64, E=4, against TRL RLOO (GPT-2 as published: gelu_new)", t["ours"] / 4, t["trl"], 5)
    )
    rows.append(row("the same, against TRL with its own defaults", t["ours"] / 4, t["defaults"], None))
    rows.append(row("the same, where the model asks for the fused activation", t["ours"] / 4, t["fused"], None))
    operations = sum(ours.operations().values())
    share = operations / t["ours"] / median(rate)
    rows.append(
        {
            "name": "share of the measured fp32 matrix rate, batch 64, E=4",
            "value": share,
            "unit": "share",
            "target": 0.55,
            "met": share >= 0.55,
            "detail": f"{operations / 4e9:.2f} GFLOP a policy step, {median(rate) / 1e9:.0f} GFLOP/s",
        }
    )
    rows.append({"name": "a step of 4 tiny policies, batch 64", "parts": ours.parts(2 * rounds)})
    small = PolicyStep(world, gpt2, 32, 8)
    sides |= {"small": TRLStep(scratch / "published", 8)}
    t = interleaved(rounds, ours=small, trl=sides["small"])
    rows.append(
        row("policy step, batch 8, E=32, reward on token ids, against TRL RLOO (gelu_new)", t["ours"] / 32, t["trl"],
            10)
    )
    rows.append({"name": "a step of 32 tiny policies, batch 8", "parts": small.parts(2 * rounds)})
    for side in sides.values():
        side.close()
    return rows


def bench_sampling(world, rounds: int, scratch: Path) -> list[dict]:
    """Sampling against the library's generate(), dynamic and static cache."""
    rows = []
    torch.manual_seed(0)
    big = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=50256, pad_token_id=50256)).eval()
    gpt2 = published(world, scratch / "published-sampling")
    tiny = encode_prompts(world.tokenizer, world.prompts.given[:64])
    ids = torch.randint(0, 50000, (16, 8))
    for name, model, prompts, length, target in (
        (
            "64 × 24 tokens, tiny GPT-2 as published",
            gpt2,
            Prompts(tiny.texts, tiny.ids[None], tiny.mask[None]),
            LENGTH,
            4,
        ),
        ("16 × 32 tokens, GPT-2 of 124M", big, Prompts([""] * 16, ids[None], torch.ones_like(ids)[None]), 32, 1),
    ):
        forward, weights = (
            make_forward(model),
            stack([parameters(model)])
            if model is not big
            else {n: p.unsqueeze(0) for n, p in parameters(model).items()},
        )
        uniforms = torch.rand(1, len(prompts), length, dtype=torch.float64)

        def ours(forward=forward, weights=weights, prompts=prompts, uniforms=uniforms):
            with torch.no_grad():
                Endless(forward, weights).sample(prompts, uniforms, world.tokenizer)

        def generate(cache=None, model=model, prompts=prompts, length=length):
            extra = {} if cache is None else {"cache_implementation": cache}
            with torch.no_grad(), quiet():
                model.generate(
                    prompts.ids[0],
                    attention_mask=prompts.mask[0],
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=length,
                    min_new_tokens=length,
                    **extra,
                )

        t = interleaved(rounds if model is not big else max(3, rounds // 2), ours=ours, generate=generate)
        rows.append(row(f"sampling {name}, against generate()", t["ours"], t["generate"], target))
        if model is not big:
            try:
                t = interleaved(2, ours=ours, static=lambda: generate("static"))
                rows.append(
                    row(f"sampling {name}, against generate() with a static cache", t["ours"], t["static"], None)
                )
            except Exception as error:  # it compiles, which needs a compiler that may be absent
                rows.append(
                    {"name": "generate() with a static cache", "detail": f"did not run: {type(error).__name__}"}
                )
    return rows


def bench_experiment(world) -> list[dict]:
    """One iteration of 16 seeds × M=4 × T=100 × batch 4, training only; and batched against serial."""
    rows = []
    state = parameters(world.policy)
    prompts = world.prompts
    config = WarpConfig(steps=100, batch_size=4, lr=1e-3)
    runs = [Run(config.replace(seed=s), 1, m, state, state, world.reward) for s in range(16) for m in range(1, 5)]
    start = time.perf_counter()
    train_batched(world.policy, world.tokenizer, prompts, runs)
    seconds = time.perf_counter() - start
    rows.append(
        {
            "name": "16 seeds × M=4 × T=100 × batch 4, one iteration, training only",
            "value": seconds,
            "unit": "s",
            "target": 25,
            "at_most": True,
            "met": seconds <= 25,
        }
    )
    short = [Run(config.replace(steps=20), 1, m, state, state, world.reward) for m in range(1, 5)]
    t = interleaved(
        3,
        batched=lambda: train_batched(world.policy, world.tokenizer, prompts, short) and None,
        serial=lambda: train_serial(world.policy, world.tokenizer, prompts, short) and None,
    )
    rows.append(row("batched against serial, M=4, batch 4, 20 steps", t["batched"], t["serial"], None))
    return rows


def bench_saving(world, scratch: Path) -> list[dict]:
    """The share of a run's time in which it saves what it could go on from, at the default, and that of its logs."""
    from warp_lite import run_warp
    from warp_lite.training.run_folder import RunFolder

    spent: dict[str, list[float]] = {"save_states": [], "append": []}

    def timed(method):
        def call(*arguments):
            start = time.perf_counter()
            method(*arguments)
            spent[method.__name__].append(time.perf_counter() - start)
        return call

    before = {name: getattr(RunFolder, name) for name in spent}
    config = WarpConfig(iterations=1, steps=1500, eval_every=0)
    try:
        for name, method in before.items():
            setattr(RunFolder, name, timed(method))
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            start = time.perf_counter()
            run_warp(world, config=config, out=Path(folder) / "run", progress=False)
            seconds = time.perf_counter() - start
    finally:
        for name, method in before.items():
            setattr(RunFolder, name, method)
    saves, logs = (sum(times) for times in spent.values())
    return [{"name": "share of a run in which it saves, M=4, 1,500 steps, save_every at its default",
             "value": saves / seconds, "unit": "share", "target": 0.03, "at_most": True, "met": saves / seconds <= 0.03,
             "detail": f"{saves:.2f} s of {seconds:.1f} s, {len(spent['save_states'])} saves; the logs of every step "
                       f"take {logs / seconds:.1%} more"}]


def bench_ray(world, scratch: Path) -> list[dict]:
    """Two workers of Ray against one process, from when Ray is up: run folders of one iteration of M = 4 runs."""
    import ray

    from warp_lite import run_warp
    from warp_lite.storage.provenance import pinned_threads

    config = WarpConfig(iterations=1, steps=300, eval_every=0)

    def side(executor: str) -> None:
        with pinned_threads(1), tempfile.TemporaryDirectory(dir=scratch) as folder:
            run_warp(world, config=config, out=Path(folder) / "run", executor=executor, progress=False)

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    t = interleaved(3, ray=lambda: side("ray"), serial=lambda: side("serial"))
    ray.shutdown()
    return [row("run_warp on two workers of Ray against serial, M=4, 300 steps, one thread each", t["ray"], t["serial"],
                1.7)]


def bench_busy(rounds: int, scratch: Path) -> list[dict]:
    """The command line beside two processes that never rest, and on a free machine with threads that wait as torch's
    do by default: busily."""
    command = [sys.executable, "-m", "warp_lite.cli", "run", "--preset", "tiny", "--set=iterations=1", "--out"]
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}

    def side(**environment) -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            subprocess.run([*command, f"{folder}/run"], env={**own, **environment}, check=True, capture_output=True)

    def busy() -> float:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        try:
            start = time.perf_counter()
            side()
            return time.perf_counter() - start
        finally:
            for other in others:
                other.kill()
                other.wait()

    t = interleaved(min(3, rounds), quiet=side, spinning=lambda: side(GOMP_SPINCOUNT="300000"), busy=busy)
    rows = []
    for name, slow, fast, target in (
            ("the same beside two busy processes, over its time on a free machine", "busy", "quiet", 3),
            ("one iteration of the tiny preset by the command line, over its time with waiting threads that spin",
             "quiet", "spinning", 1.05)):
        ratio = t[slow] / t[fast]
        rows.insert(0, {"name": name, "value": ratio, "unit": "×", "target": target, "at_most": True,
                        "met": ratio <= target, "detail": f"{t[slow]:.1f} s against {t[fast]:.1f} s"})
    return rows


def gpt2_folder(folder: Path, layers: int = 12, seed: int = 0) -> Path:
    """A random GPT-2-shaped fp32 checkpoint with 124M parameters at 12 layers."""
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(seed)
        with quiet():
            GPT2LMHeadModel(GPT2Config(n_layer=layers)).save_pretrained(folder)
    return folder


def process(command: list[str], **environment) -> tuple[float, float]:
    """Wall seconds and peak resident MB of a whole process."""
    # A small process in between: the peak of a child counts what its parent had when it forked.
    launcher = (
        "import os, subprocess, sys, time; start = time.perf_counter(); child = subprocess.Popen(sys.argv[1:], "
        "stdout=subprocess.DEVNULL); _, status, usage = os.wait4(child.pid, 0); child.returncode = 0; "
        "print(time.perf_counter() - start, usage.ru_maxrss); sys.exit(os.waitstatus_to_exitcode(status))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", launcher, *command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-500:]}")
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak) / 1024


def bench_merge(rounds: int, scratch: Path) -> list[dict]:
    """Merging two 124M fp32 checkpoints on disk, against mergekit's command line and against the copy of the bytes."""
    init, one, two = (gpt2_folder(scratch / name, seed=s) for s, name in enumerate(("init", "one", "two")))
    recipe = scratch / "merge.yml"
    recipe.write_text(
        f"merge_method: nuslerp\nbase_model: {init}\ndtype: float32\nparameters: {{nuslerp_flatten: true}}\nmodels:\n"
        + "".join(f"  - {{model: {path}, parameters: {{weight: 0.5}}}}\n" for path in (one, two))
    )
    peaks: dict[str, list[float]] = {"ours": [], "mergekit": []}
    bin_folder = Path(sys.executable).parent

    def fresh(name):
        subprocess.run(["rm", "-rf", str(scratch / name)], check=True)
        return str(scratch / name)

    def ours():
        seconds, peak = process(
            [
                str(bin_folder / "warp-lite"),
                "merge",
                "--init",
                str(init),
                "--policies",
                str(one),
                str(two),
                "--out",
                fresh("ours"),
            ]
        )
        peaks["ours"].append(peak)
        return seconds

    def mergekit():
        seconds, peak = process(
            [str(bin_folder / "mergekit-yaml"), "--quiet", str(recipe), fresh("theirs")], HF_HUB_OFFLINE="1"
        )
        peaks["mergekit"].append(peak)
        return seconds

    def copy():
        start = time.perf_counter()
        with (scratch / "copy").open("wb") as target:
            for i, path in enumerate((init, one, two)):
                with (path / "model.safetensors").open("rb") as source:
                    while data := source.read(2**24):
                        if i == 0:
                            target.write(data)
        return time.perf_counter() - start

    t = interleaved(max(3, rounds // 2), ours=ours, mergekit=mergekit, copy=copy)
    peak = {name: median(values) for name, values in peaks.items()}
    return [
        row("merging two 124M fp32 checkpoints, whole process, against mergekit", t["ours"], t["mergekit"], 6),
        {
            "name": "its peak memory, as a share of mergekit's",
            "value": peak["ours"] / peak["mergekit"],
            "unit": "share",
            "target": 0.07,
            "at_most": True,
            "met": peak["ours"] <= 0.07 * peak["mergekit"],
            "detail": f"{peak['ours']:.0f} MB against {peak['mergekit']:.0f} MB",
        },
        {
            "name": "its time over reading the inputs and writing the output once",
            "value": t["ours"] / t["copy"],
            "unit": "×",
            "target": None,
            "detail": f"{t['ours']:.2f} s against {t['copy']:.2f} s",
        },
    ]


def bench_claims(scratch: Path) -> list[dict]:
    """`warp-lite claims --only 4-runs-against-1` on one of its four draws, from an empty cache, against the steps of
    its policies alone, and against these and the steps of the SFT policies and reward models; processor time of one
    thread, both worlds."""
    from warp_lite.evidence.bench import WORLDS, Bench, draw_of
    from warp_lite.evidence.claims import lines_needed, pick
    from warp_lite.evidence.settings import NOISY
    from warp_lite.evidence.studies import STUDIES
    from warp_lite.worlds import reviews

    lines = lines_needed(pick(["4-runs-against-1"]), list(WORLDS))
    seeds = [seed for seed in range(16) if draw_of(seed) == 1]
    spent: dict[str, float] = {}

    def timed(name, function):
        def call(*arguments, **options):
            start = time.process_time()
            result = function(*arguments, **options)
            spent[name] = spent.get(name, 0.0) + time.process_time() - start
            return result
        return call

    trainers = {name: getattr(reviews, name) for name in ("train_sft", "train_bradley_terry")}
    threads, cache = torch.get_num_threads(), os.environ.get("WARP_LITE_CACHE")
    torch.set_num_threads(1)
    os.environ["WARP_LITE_CACHE"] = str(scratch / "empty-cache")
    try:
        for name, trainer in trainers.items():
            setattr(reviews, name, timed(name, trainer))
        for taste in WORLDS:
            bench = timed("whole", Bench.of)(taste, 1, seeds)
            bench.lines = frozenset(lines[taste, "merging"])
            timed("whole", STUDIES["merging"])(bench)
            timed("steps", bench.train)({"runs": NOISY.replace(runs=5)})
    finally:
        for name, trainer in trainers.items():
            setattr(reviews, name, trainer)
        torch.set_num_threads(threads)
        if cache is None:
            del os.environ["WARP_LITE_CACHE"]
        else:
            os.environ["WARP_LITE_CACHE"] = cache
    steps, training = spent["steps"], spent["steps"] + spent["train_sft"] + spent["train_bradley_terry"]
    parts = (f"{spent['whole']:.0f} s a draw of two worlds: RL steps {steps:.0f} s, SFT policy "
             f"{spent['train_sft']:.0f} s, reward models {spent['train_bradley_terry']:.0f} s")
    return [{"name": f"claims --only 4-runs-against-1 from an empty cache, over {what}", "value": spent["whole"] / own,
             "unit": "×", "target": target, "at_most": True, "met": target is None or spent["whole"] / own <= target,
             "detail": detail}
            for what, own, target, detail in (
                ("its RL steps alone", steps, 1.6, parts),
                ("all training steps, the SFT policy's and the reward models' too", training, None, ""))]


def bench_growth(world, scratch: Path) -> dict:
    """Step time over E, the batch and the length; merge time over M and over bytes; evaluation over the number of η."""
    from warp_lite.averaging.checkpoints import merge_checkpoints
    from warp_lite.evaluation.metrics import evaluate_many

    growth: dict[str, list] = {"E": [], "batch": [], "length": [], "M": [], "bytes": [], "etas": []}
    for E in (1, 2, 4, 8, 16, 32, 64):
        growth["E"].append((E, interleaved(4, step=PolicyStep(world, world.policy, E, 8))["step"]))
    for batch in (2, 4, 8, 16, 32, 64, 128):
        growth["batch"].append((batch, interleaved(4, step=PolicyStep(world, world.policy, 4, batch))["step"]))
    for length in (5, 10, 20, 30, 40):
        growth["length"].append((length, interleaved(4, step=PolicyStep(world, world.policy, 4, 8, length))["step"]))
    state = parameters(world.policy)
    for count in (1, 2, 4, 8, 16, 32):
        states = stack([state] * count)
        growth["etas"].append((count, interleaved(4, evaluate=lambda states=states: evaluate_many(
            world, states, samples=1, texts=False) and None)["evaluate"]))

    def merge_time(folders: list[Path]) -> float:
        def merge():
            subprocess.run(["rm", "-rf", str(scratch / "out")], check=True)
            merge_checkpoints(folders[0], folders[1:], scratch / "out", progress=False)

        return interleaved(3, merge=merge)["merge"]

    folders = [gpt2_folder(scratch / f"small-{s}", layers=2, seed=s) for s in range(9)]
    for M in (1, 2, 4, 8):
        growth["M"].append((M, merge_time(folders[:M + 1])))
    for layers in (2, 4, 8, 12):
        three = [gpt2_folder(scratch / f"layers-{layers}-{s}", layers=layers, seed=s) for s in range(3)]
        growth["bytes"].append((3 * (three[0] / "model.safetensors").stat().st_size / 1e6, merge_time(three)))
    return growth


def row(name: str, ours: float, theirs: float, target: float | None) -> dict:
    """A ratio: how many times faster."""
    return {
        "name": name,
        "value": theirs / ours,
        "unit": "× faster",
        "target": target,
        "met": target is None or theirs / ours >= target,
        "detail": f"{1e3 * ours:.1f} ms against {1e3 * theirs:.1f} ms",
    }


def table(results: dict) -> str:
    """The results as a Markdown table. Parts that other commits measured are named below it."""
    lines = ["| figure | measured | at least | |", "|---|---|---|---|"]
    rows = [r for name in PARTS if name in results for r in results[name].get("rows", ())]
    for r in (r for r in rows if "parts" not in r):
        if "value" not in r:
            lines.append(f"| {r['name']} | – | – | {r['detail']} |")
            continue
        at_least = "–" if r.get("target") is None else f"{r['target']:g}"
        if r.get("target") is not None and r.get("at_most"):
            at_least = f"at most {r['target']:g}"
        verdict = "" if r.get("target") is None else ("met" if r["met"] else "**missed**")
        lines.append(f"| {r['name']} | {r['value']:.2f} {r['unit']} | {at_least} {verdict} | {r.get('detail', '')} |")
    by_commit: dict[str, list[str]] = {}
    for name in PARTS:
        if name in results:
            by_commit.setdefault(str(results[name]["provenance"]["commit"])[:10], []).append(name)
    lines.append("")
    for r in (r for r in rows if "parts" in r):
        lines += parts_table(r)
    for commit, names in by_commit.items():
        lines.append(f"Measured at commit {commit}: {', '.join(names)}.")
    return "\n".join(lines)


def parts_table(timed: dict) -> list[str]:
    """Where a step goes, as lines of Markdown: each part's time beside the least that it could take."""
    whole = sum(part["seconds"] for part in timed["parts"])
    lines = [f"Where {timed['name']} goes, {1e3 * whole:.3g} ms. At least: its matrix products at the measured rate, "
             "and its weights' bytes at that of a copy.", "",
             "| part | ms | share | at least, by operations | at least, by bytes | times the larger |",
             "|---|---|---|---|---|---|"]
    for part in timed["parts"]:
        least = max(part["by_operations"], part["by_bytes"])
        lines.append(f"| {part['part']} | {1e3 * part['seconds']:.3g} | {part['seconds'] / whole:.0%} | "
                     f"{1e3 * part['by_operations']:.3g} | {1e3 * part['by_bytes']:.3g} | "
                     f"{part['seconds'] / least:.1f} |")
    return [*lines, ""]


def draw_growth(growth: dict) -> Figure:
    """Six panels: how the times grow."""
    with style():
        figure = Figure(figsize=(12, 6.4), layout="constrained")
        panels = figure.subplots(2, 3)
        labels = (
            ("E", "policies in one program, E (batch 8)", "ms a policy's step", lambda E: 1e3 / E),
            ("batch", "batch (E = 4)", "ms a policy's step", lambda batch: 1e3 / 4),
            ("length", "tokens of a completion (E = 4, batch 8)", "ms a policy's step", lambda length: 1e3 / 4),
            ("M", "policies merged, M (213 MB each)", "s a merge", lambda M: 1),
            ("bytes", "MB read (two policies and the init)", "s a merge", lambda size: 1),
            ("etas", "number of η (64 completions each)", "ms an η", lambda count: 1e3 / count),
        )
        for axes, (key, x, y, scale) in zip(panels.flat, labels):
            places = [place for place, _ in growth[key]]
            axes.plot(places, [seconds * scale(place) for place, seconds in growth[key]], marker="o",
                      color=COLOURS["slerp"])
            axes.set(xlabel=x, ylabel=y, ylim=(0, None))
            if key in ("E", "batch", "M", "etas"):
                axes.set_xscale("log", base=2)
                axes.set_xticks(places, [f"{place:g}" for place in places])
                axes.minorticks_off()
        figure.suptitle("How times grow: medians of 4 steps or evaluations, of 3 merges")
    return figure


def main() -> None:
    """Run all benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--trl", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--real", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    if arguments.trl:
        return trl_process(Path(arguments.trl[0]), int(arguments.trl[1]), arguments.trl[2] == "1")
    if arguments.real:
        return real_process(arguments.real[0], Path(arguments.real[1]))
    world = reviews_world()
    chosen = arguments.only or PARTS
    kept = arguments.out / "results.json"
    results = json.loads(kept.read_text())["parts"] if arguments.only and kept.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="warp-bench-") as scratch:
        scratch = Path(scratch)
        parts = {
            "steps": lambda: bench_steps(world, arguments.rounds, scratch),
            "sampling": lambda: bench_sampling(world, arguments.rounds, scratch),
            "real": lambda: bench_real(arguments.rounds, scratch),
            "experiment": lambda: bench_experiment(world),
            "claims": lambda: bench_claims(scratch),
            "saving": lambda: bench_saving(world, scratch),
            "merge": lambda: bench_merge(arguments.rounds, scratch),
            "ray": lambda: bench_ray(world, scratch),
            "busy": lambda: bench_busy(arguments.rounds, scratch),
        }
        for name in tqdm(chosen, desc="benchmarks", disable=None):
            if name == "growth":
                results[name] = {"provenance": provenance(), "growth": bench_growth(world, scratch)}
                draw_growth(results[name]["growth"]).savefig(arguments.out / "growth.png", dpi=130)
            else:
                results[name] = {"provenance": provenance(), "rows": parts[name]()}
                print(table({name: results[name]}), file=sys.stderr)
            kept.write_text(json.dumps({"parts": results}, indent=1) + "\n")  # after each, should the next be stopped
            (arguments.out / "results.md").write_text(table(results) + "\n")
    print(table(results))
    print(f"\nOn {torch.get_num_threads()} threads of a CPU; nothing here was measured on a GPU.")


if __name__ == "__main__":
    main()
