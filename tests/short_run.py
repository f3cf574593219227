"""A run of Algorithm 1 on a random tiny policy: a few steps, tens of milliseconds."""

from pathlib import Path

import numpy as np

from warp_lite import WarpConfig, run_warp

PROMPTS = [f"{a} {b} {c}" for a in ("this", "that") for b in ("film", "plot") for c in ("was", "is", "was great")]
CONFIG = WarpConfig(iterations=2, runs=2, steps=4, batch_size=3, lr=1e-2, beta=0.1, mu=0.1, eta=0.3,
                    max_new_tokens=5, eval_every=2, save_every=3)


def score(prompts, completions, completion_ids, **kwargs):
    """Short completions with many distinct words score high."""
    return [len(set(c.split())) - 0.5 * len(ids) + 0.1 * len(p.split())
            for p, c, ids in zip(prompts, completions, completion_ids)]


def other_score(prompts, completions, **kwargs):
    """Another reward, for runs of their own."""
    return [float(c.count("great")) for c in completions]


def short_run(policy, tokenizer, reward=score, prompts=PROMPTS, out=None, resume=False, executor="batched", stop=None,
              eval_prompts=None, gold=None, lora=None, on_failure="stop", **changes):
    """`run_warp` with CONFIG, changed."""
    return run_warp(policy, tokenizer, reward, prompts, CONFIG.replace(**changes), out, resume, executor,
                    eval_prompts=eval_prompts, gold=gold, stop=stop, on_failure=on_failure, progress=False, lora=lora)


def stop_after(calls: int):
    """A `stop` that says True when it has been asked that often."""
    asked = iter(range(1, 10**6))
    return lambda: next(asked) >= calls


def files(folder) -> dict[str, bytes]:
    """Every file of a folder and its bytes, config.json's provenance left out."""
    folder = Path(folder)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    if "config.json" in found:
        found["config.json"] = found["config.json"].split(b'"provenance"')[0]
    return found


def assert_same_weights(first, second, tolerance=0.0):
    """Two state dicts are equal: to the bit, or in float64 to a tolerance."""
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name].numpy(), second[name].numpy(), tolerance, tolerance, err_msg=name)


def differ(first, second) -> bool:
    """Whether two state dicts differ anywhere by more than rounding."""
    return any((first[name] - second[name]).abs().max() > 1e-6 for name in first)
