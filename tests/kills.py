"""Kill runs of the command line at random moments, resume them, and compare: python tests/kills.py FOLDER KILLS SEED

FOLDER is a task as tests/test_kills.py makes it. Prints one line of JSON: how many runs were killed, how often in
all (a resumed run may be killed again), how many ended with the bytes of the run that was never stopped, what
differed in the others, and what the folders held when they were killed. Processes are forked from this one, which
has imported everything, so that the moments fall into the run and not into its imports.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from short_run import files

import warp_lite.viewing.front_report
import warp_lite.warp
import warp_lite.worlds.reviews  # noqa: F401
from warp_lite import result
from warp_lite.cli import main
from warp_lite.evaluation import limit

RUN = ["run", "--policy", "policy", "--reward", "kills_reward:score", "--prompts", "prompts.txt", "--set=iterations=2",
       "--set=runs=2", "--set=steps=8", "--set=batch_size=4", "--set=lr=1e-2", "--set=max_new_tokens=5",
       "--set=eval_every=4", "--set=save_every=1"]


def start(arguments, log):
    """The command in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        code = main(arguments)
    finally:
        os._exit(code)


def finished(arguments, log) -> float:
    """Run the command to its end; how long it took, in seconds."""
    begin = time.monotonic()
    _, status = os.waitpid(start(arguments, log), 0)
    if status:
        raise SystemExit(f"{arguments} ended with status {status}:\n{log.read_text()}")
    return time.monotonic() - begin


def killed(arguments, log, moment) -> bool:
    """Start the command and kill it after so many seconds; whether it was still there."""
    child = start(arguments, log)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def stage(out: Path) -> str:
    """What a folder had come to."""
    if not out.is_dir():
        return "nothing yet"
    half = "writing in " if list(out.rglob(".*.part")) else ""
    for name in ("front.png", "front.json", "iteration-2/DONE", "iteration-2/next-init", "iteration-2/merged",
                 "iteration-2", "iteration-1/DONE", "iteration-1/next-init", "iteration-1/merged", "iteration-1",
                 "prompts.json", "sft", "config.json"):
        if (out / name).exists():
            return half + name
    return half + "an empty folder"


def kill(folder: Path, kills: int, seed: int) -> dict:
    """What the module's line of JSON says."""
    os.chdir(folder)
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # a process that is killed loses nothing that it has written, synced or not
    result.EVALUATION_SAMPLES, limit.LIMIT_SAMPLES = 32, 64
    chance, log = random.Random(seed), Path("log.txt")
    seconds = finished([*RUN, "--out", "whole"], log)
    whole, stages, count, differing = files("whole"), Counter(), 0, {}
    for n in range(kills):
        out = Path(f"out-{n}")
        arguments, again = [*RUN, "--resume", "--out", str(out)], True
        while again:
            if killed(arguments, log, chance.uniform(0, seconds)):
                count += 1
                stages[stage(out)] += 1
            again = chance.random() < 0.3
        finished(arguments, log)
        found = files(out)
        if found != whole:
            differing[str(out)] = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
    return {"runs": kills, "kills": count, "identical": kills - len(differing), "differing": differing,
            "seconds": round(seconds, 2), "stages": dict(stages)}


if __name__ == "__main__":
    print(json.dumps(kill(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
