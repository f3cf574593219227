"""The command line: `warp-lite run`, `merge`, `front`, `claims`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .storage.prompt_sources import FORMATS, read_prompts

if TYPE_CHECKING:
    from .scale.ray import RayExecutor


class Stop:
    """Whether Ctrl-C was pressed, or the process told to end (SIGTERM). A run asks after every step, so that it
    stops between two; the second time it stops at once, by KeyboardInterrupt."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.requested

    def _request(self, *_):
        if self.requested:
            raise KeyboardInterrupt("stopped at once; the last saved step is kept")
        self.requested = True
        with suppress(OSError, ValueError):  # not print: whatever it was writing may have been cut in two
            os.write(sys.stderr.fileno(), b"warp-lite: stopping after this step; once more stops at once\n")


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line like every other."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError, which `main` prints as one line with the command's --help."""
        raise ValueError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 2 bad input, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # where η cannot be printed, a ? stands for it
            stream.reconfigure(errors="replace")
    try:
        arguments = parser().parse_args(argv)
        return arguments.command(arguments)
    except KeyboardInterrupt as interrupt:
        kept = f": {interrupt}; continue with --resume" if str(interrupt) else "; nothing was written"
        print(f"warp-lite: interrupted{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the libraries raise classes of their own
        if os.environ.get("WARP_LITE_DEBUG"):
            raise
        lines = str(error).strip().splitlines()
        print(f"warp-lite: {' '.join(lines[:1]) or type(error).__name__}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The parser of every command and option; each command's function is its `command`."""
    from .config import PRESETS

    top = Parser(prog="warp-lite", description="WARP: align a language model by averaging weights.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    presets = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    run = commands.add_parser(
        "run", help="run Algorithm 1 and draw its front",
        description="Run Algorithm 1 and draw its front: on a preset, or on your own policy, reward and prompts.")
    run.add_argument("--preset", metavar="NAME", help=presets)
    run.add_argument("--policy", metavar="NAME_OR_DIR", help="a causal LM from the hub, a folder or a GGUF file")
    run.add_argument("--reward", metavar="NAME_OR_DIR|MODULE:FUNCTION",
                     help="a sequence classifier, or a function of TRL's signature")
    run.add_argument("--reward-label", metavar="NAME|INDEX",
                     help="the label of the classifier whose output is the reward (default: its last)")
    run.add_argument("--reward-output", choices=("logit", "log-probability"),
                     help="what of that label is the reward (default: logit)")
    run.add_argument("--prompts", metavar="FILE",
                     help=f"prompts to train on: {FORMATS}; further fields of a line go to the reward")
    run.add_argument("--eval-prompts", metavar="FILE",
                     help="held-out prompts, such a file too (default: a fifth of --prompts, 512 at most)")
    run.add_argument("--set", metavar="NAME=VALUE", action="append", default=[],
                     help="change a setting of WarpConfig; may be repeated")
    run.add_argument("--executor", choices=("batched", "serial", "ray"), default="batched",
                     help="train the runs as one program (large ones on a CPU as several), one after the other by the "
                          "library's module, or as tasks of Ray (default: batched)")
    run.add_argument("--ray-address", metavar="ADDRESS", help="the Ray cluster to join: auto or HOST:PORT "
                     "(default: $RAY_ADDRESS, or a Ray of its own on this machine)")
    run.add_argument("--ray-cpus", type=int, metavar="N", help="CPUs, and threads, of a run on Ray (default: 1)")
    run.add_argument("--ray-gpus", type=float, metavar="X", help="GPUs of a run on Ray (default: 0)")
    run.add_argument("--lora-rank", type=int, metavar="R", help="train adapters of this rank (LoRA)")
    add_device(run)
    run.add_argument("--on-failure", choices=("stop", "continue"), default="stop",
                     help="when the reward, loss or gradient of a run is not finite: stop, or merge the other runs "
                          "without it (default: stop)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out; start it if there is none")
    run.add_argument("--out", metavar="DIR", required=True, help="the run folder to write")
    run.set_defaults(command=run_command)

    merge = commands.add_parser("merge", help="merge checkpoints on disk",
                                description="Merge checkpoints on disk, tensor by tensor.")
    merge.add_argument("--init", metavar="DIR", required=True, help="the checkpoint that the policies started from")
    merge.add_argument("--policies", metavar="DIR", nargs="+", required=True,
                       help="checkpoints, or PEFT folders of adapters; one alone is moved toward the init by --eta")
    merge.add_argument("--method", metavar="NAME", default="slerp",
                       help="how the task vectors are merged: slerp, lerp or another of "
                            "averaging/coefficients.py (default: slerp)")
    merge.add_argument("--eta", type=float, default=1.0, metavar="X",
                       help="LITI: 0 is the init, 1 the merge, above extrapolates (default: 1)")
    merge.add_argument("--rank", type=int, metavar="R", help="of adapters: write an adapter of this rank")
    merge.add_argument("--out", metavar="DIR", required=True, help="the folder to write")
    merge.set_defaults(command=merge_command)

    front = commands.add_parser(
        "front", help="measure the front of a run folder",
        description="Measure the front of a finished run folder; writes front.json and front.png in it.")
    front.add_argument("folder", metavar="DIR", help="a finished run folder")
    front.add_argument("--etas", metavar="X,X,…", help="where to measure it (default: 0,.1,.2, … 1)")
    front.add_argument("--prompts", type=int, metavar="N",
                       help="how many of the held-out prompts to use (default: all)")
    add_device(front)
    front.set_defaults(command=front_command)

    claims = commands.add_parser(
        "claims", help="decide the paper's claims with error bars",
        description="Train what the claims need, for many seeds and draws of two tiny worlds, and write claims.json, "
                    "a table and a figure for each. What is finished in DIR is not run again.")
    claims.add_argument("--seeds", type=int, metavar="N",
                        help="how many RL seeds, each with an SFT policy and a reward model of its own (default: 16); "
                             "of smollm2, which has one of each, 3")
    claims.add_argument("--seed-offset", type=int, default=0, metavar="K",
                        help="the first seed: 24 for others than those of the committed evidence (default: 0)")
    claims.add_argument("--only", metavar="NAME", action="append", default=[],
                        help="decide only this claim, and measure only what it compares; may be repeated")
    claims.add_argument("--decisive", action="store_true",
                        help="decide where merging would win, which was predicted, in place of the paper's claims")
    claims.add_argument("--world", metavar="NAME", action="append", default=[],
                        help="sentiment or detail; may be repeated (default: both). Or smollm2: a real language "
                             "model, in hours (`make real-model` installs it)")
    claims.add_argument("--workers", type=int, metavar="N", help="processes of one thread each (default: one a core)")
    claims.add_argument("--tune", action="store_true", help="choose the settings again; writes DIR/tuned.json")
    claims.add_argument("--noise-map", action="store_true",
                        help="the gain of merging over batch size and learning rate; writes DIR/noise.json")
    claims.add_argument("--list", action="store_true", help="list the claims and stop")
    claims.add_argument("--out", metavar="DIR", help="the folder to write; an earlier one is continued")
    claims.set_defaults(command=claims_command)
    return top


def add_device(command: argparse.ArgumentParser) -> None:
    """Give a command the option --device."""
    command.add_argument("--device", metavar="NAME",
                         help="cpu, cuda, cuda:1, … for policy and reward model (default: the first GPU, or the CPU "
                              "where there is none; the CPU for tiny worlds)")


def run_command(arguments: argparse.Namespace) -> int:
    """`warp-lite run`: Algorithm 1 into the run folder --out, and its front. Returns the exit code, 0.

    Raises ValueError for options that do not fit together or cannot be used, KeyboardInterrupt where it was told to
    stop.
    """
    from .config import WarpConfig, preset
    from .storage.files import is_taken
    from .storage.run_config import check_out

    if arguments.preset is not None:
        for name in ("policy", "reward", "reward_label", "reward_output", "prompts", "eval_prompts"):
            if getattr(arguments, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"--preset brings its own policy, reward and prompts; leave out {option}")
        chosen = preset(arguments.preset)
        config = chosen.config.with_text(arguments.set)
    else:
        missing = [f"--{name}" for name in ("policy", "reward", "prompts") if getattr(arguments, name) is None]
        if missing:
            raise ValueError(f"give --preset, or --policy, --reward and --prompts; missing: {', '.join(missing)}")
        config = WarpConfig().with_text(arguments.set)
        prompts, held_out = prompts_of(arguments)
        reward_options = {}
        if arguments.reward_label is not None:
            reward_options["label"] = label_of(arguments.reward_label)
        if arguments.reward_output is not None:
            reward_options["log_probability"] = arguments.reward_output == "log-probability"
    check_out(arguments.out, arguments.resume)  # before torch is waited for, or anything loaded or trained
    if is_taken(arguments.out):
        raise ValueError(f"{arguments.out} is in use by another process; wait until it has ended, or choose another")
    executor = chosen_executor(arguments)

    from .launch import run_warp
    from .viewing.front_report import complete_front

    options = {"config": config, "out": arguments.out, "resume": arguments.resume, "executor": executor,
               "on_failure": arguments.on_failure}
    if arguments.lora_rank is not None:
        from .scale.lora import LoraSettings
        options["lora"] = LoraSettings(arguments.lora_rank)
    if arguments.preset is not None:
        from .worlds import load_world
        world = load_world(chosen.world, device=arguments.device or chosen.device)
        world.source = {"preset": arguments.preset, "world": chosen.world}
        task = (world,)
    else:
        from .policies.loading import load_policy, pick_device
        from .rewards.loading import load_reward
        device = pick_device(arguments.device or "auto")
        reward = load_reward(arguments.reward, device, **reward_options)
        task = (*load_policy(arguments.policy, device=device), reward, prompts)
        source = {"policy": arguments.policy, "reward": arguments.reward}
        if reward_options:
            source["reward_options"] = reward_options
        options |= {"eval_prompts": held_out, "source": source}
    with Stop() as stop:
        result = run_warp(*task, stop=stop, **options)
    with keeping(f"every run in {arguments.out} is kept"):
        if stop():  # asked for after the last step
            raise KeyboardInterrupt
        complete_front(result, Path(arguments.out), again=False)
    return 0


def prompts_of(arguments: argparse.Namespace) -> tuple[list, list | None]:
    """What --prompts and --eval-prompts hold. A folder that was begun when further fields of a file were not passed on
    goes on without them, and a line says so.

    Raises ValueError for a file that cannot be read.
    """
    from .storage.run_config import kept_prompts

    prompts = read_prompts(arguments.prompts)
    held_out = read_prompts(arguments.eval_prompts) if arguments.eval_prompts else None
    of_folder = kept_prompts(arguments.out, arguments.resume)
    if of_folder and not of_folder.get("eval_columns") and isinstance((held_out or prompts)[0], dict):
        print(f"warp-lite: {arguments.out} was begun without the further fields of the prompts, and goes on without "
              "them", file=sys.stderr)
        prompts, held_out = (rows and [row["prompt"] if isinstance(row, dict) else row for row in rows]
                             for rows in (prompts, held_out))
    return prompts, held_out


def chosen_executor(arguments: argparse.Namespace) -> str | RayExecutor:
    """What --executor and the options of Ray say: a trainer's name, or a RayExecutor.

    Raises ValueError for an option of Ray without Ray, and one that cannot be used.
    """
    names = ("address", "cpus", "gpus")
    options = {name: getattr(arguments, f"ray_{name}") for name in names}
    options = {name: value for name, value in options.items() if value is not None}
    if arguments.executor == "ray":
        from .scale.ray import RayExecutor
        return RayExecutor(**options)
    if options:
        raise ValueError(f"--ray-{next(iter(options))} is for --executor ray")
    return arguments.executor


def merge_command(arguments: argparse.Namespace) -> int:
    """`warp-lite merge`: checkpoints, or adapters, into the folder --out. Returns the exit code, 0.

    Raises ValueError for folders that cannot be merged, and a --rank of whole policies.
    """
    from .averaging.checkpoints import merge_checkpoints

    count = len(arguments.policies)
    adapters = [(Path(folder) / "adapter_config.json").is_file() for folder in arguments.policies]
    if all(adapters):
        from .scale.peft_folders import merge_adapter_folders
        error = merge_adapter_folders(arguments.init, arguments.policies, arguments.out, method=arguments.method,
                                      eta=arguments.eta, rank=arguments.rank)
        what = "" if arguments.rank is None else f", an adapter of rank {arguments.rank}: relative error {error:.2g}"
        print(f"merged {count} {'adapter' if count == 1 else 'adapters'} into {arguments.out}{what}")
        return 0
    if arguments.rank is not None:
        raise ValueError(f"--rank is for adapters; {arguments.policies[adapters.index(False)]} holds none")
    merge_checkpoints(arguments.init, arguments.policies, arguments.out, method=arguments.method, eta=arguments.eta)
    print(f"merged {count} {'policy' if count == 1 else 'policies'} into {arguments.out}")
    return 0


def front_command(arguments: argparse.Namespace) -> int:
    """`warp-lite front`: the front of a run folder, measured again and drawn. Returns the exit code, 0.

    Raises ValueError for a folder that is no finished run, and for --etas or --prompts out of range.
    """
    etas = None if arguments.etas is None else parse_etas(arguments.etas)

    from .config import PRESETS
    from .storage.run_config import read_config

    source = read_config(arguments.folder)["settings"].get("source") or {}

    from .policies.loading import pick_device
    from .reopen import load_result
    from .result import ETAS
    from .viewing.front_report import complete_front

    default = PRESETS[source["preset"]].device if source.get("preset") in PRESETS else "auto"
    result = load_result(arguments.folder, device=pick_device(arguments.device or default))
    if arguments.prompts is not None:
        held_out = len(result.task.eval_prompts)
        if not 2 <= arguments.prompts <= held_out:
            raise ValueError(f"--prompts must lie between 2 and the {held_out} held-out prompts, not "
                             f"{arguments.prompts}")
        result.task = result.task.first(arguments.prompts)
    complete_front(result, Path(arguments.folder), etas or ETAS)
    return 0


def claims_command(arguments: argparse.Namespace) -> int:
    """`warp-lite claims`: the claims decided, or listed, or the settings chosen again. Returns the exit code, 0.

    Raises ValueError for options that cannot be used, KeyboardInterrupt that says what is kept.
    """
    if arguments.list:
        from .evidence.claims import ALL, pick

        shown = pick(arguments.only) if arguments.only else ALL
        print("\n".join(f"{claim.name:24} {claim.statement}" for claim in shown))
        return 0
    if arguments.out is None:
        raise ValueError("--out is missing; name a folder for claims.json, the table and the figures")
    out = Path(arguments.out)
    is_ours = (out / "units").is_dir()
    if out.exists() and not is_ours and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there and holds no evidence; name a new folder, or an earlier one to continue")
    is_real = "smollm2" in arguments.world
    count = (3 if is_real else 16) if arguments.seeds is None else arguments.seeds
    if count < 1 or arguments.seed_offset < 0:
        raise ValueError(f"--seeds must be 1 or more and --seed-offset 0 or more, not {count} and "
                         f"{arguments.seed_offset}")
    if is_real and (len(arguments.world) > 1 or arguments.only or arguments.tune or arguments.noise_map
                    or arguments.decisive):
        raise ValueError("--world smollm2 is an experiment of its own; it takes --seeds, --seed-offset, --workers and "
                         "--out")
    seeds = range(arguments.seed_offset, arguments.seed_offset + count)
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be 1 or more, not {arguments.workers}")

    from .evidence.claims import pick
    from .evidence.report import run_claims, run_noise_map, run_tuning

    chosen = pick(arguments.only, arguments.decisive)
    whole = not arguments.only and not arguments.decisive
    with keeping(f"every finished study is kept in {out}; the same command goes on from there"):
        if is_real:
            from .evidence.real import run_real

            text = run_real(out, seeds, arguments.workers)
        elif arguments.tune:
            text = run_tuning(out, arguments.world, arguments.workers)
        elif arguments.noise_map:
            text = run_noise_map(out, arguments.world, seeds, arguments.workers)
        else:
            text = run_claims(out, chosen, arguments.world, seeds, arguments.workers, whole=whole)
    print(text)
    return 0


def label_of(text: str) -> int | str:
    """A classifier's label as --reward-label gives it: an index where it is a number, else a name."""
    try:
        return int(text)
    except ValueError:
        return text


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Where Ctrl-C is pressed inside, raises KeyboardInterrupt that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what) from None


def parse_etas(text: str) -> tuple[float, ...]:
    """Numbers with commas between them as distinct rising η. Raises ValueError for one that is none, or below 0."""
    try:
        etas = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"--etas wants numbers with commas between them, not {text!r}") from None
    if any(not 0 <= eta < float("inf") for eta in etas):
        raise ValueError(f"--etas must be 0 or more, not {text!r}")
    return etas


if __name__ == "__main__":
    sys.exit(main())
