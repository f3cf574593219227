"""The command line: what each command leaves, and that bad input is one line and exit code 2."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from short_run import PROMPTS, files, short_run
from transformers import AutoModelForCausalLM

from warp_lite import slerp
from warp_lite.averaging.state_dicts import parameters
from warp_lite.cli import main, parse_etas, read_prompts
from warp_lite.policies.loading import load_policy, save_policy
from warp_lite.storage.files import locked

SHORT = [f"--set={setting}" for setting in (
    "iterations=2", "runs=2", "steps=4", "batch_size=3", "lr=1e-2", "max_new_tokens=5", "eval_every=2", "save_every=2")]
REWARD = """
import os, time

def score(prompts, completions, completion_ids, **kwargs):
    time.sleep(float(os.environ.get("SLOW_REWARD", 0)))
    return [len(set(c.split())) - 0.5 * len(ids) for c, ids in zip(completions, completion_ids)]

def nan(prompts, completions):
    return [float("nan")] * len(prompts)

def short(prompts, completions):
    return [1.0]

def broken(prompts, completions):
    raise KeyError("no such key")

number = 3
"""


@pytest.fixture(scope="module")
def task(policy_of, tokenizer, tmp_path_factory):
    """A folder with a policy, a reward module and prompts; shared, so write elsewhere."""
    folder = tmp_path_factory.mktemp("task")
    save_policy(policy_of("gpt2", dtype=torch.float32), tokenizer, folder / "policy")
    (folder / "cli_reward.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    rows = [json.dumps({"prompt": prompt, "id": i}) + "\n" for i, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    return folder


def own(*more):
    """`warp-lite run` on the task, a short run."""
    return ["run", "--policy", "policy", "--reward", "cli_reward:score", "--prompts", "prompts.txt", *SHORT, *more]


def error_of(capsys, arguments) -> str:
    """Run a command that must fail: exit code 2 and one line on stderr, nothing on stdout."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("warp-lite: "), (code, out, err)
    return err


# --- what the commands leave ----------------------------------------------------------------


def test_run_trains_draws_and_prints_the_front(here, capsys):
    assert main(own("--out", "out")) == 0
    out, err = capsys.readouterr()
    front = json.loads((here / "out" / "front.json").read_text())
    assert len(front["points"]) == 22 and len(front["trajectories"]) == 2 * 2 * 2
    assert front["limit"] and front["best_of_n"]
    assert (here / "out" / "front.png").read_bytes().startswith(b"\x89PNG")
    table = out.splitlines()
    assert table[0].split() == "iteration η KL (nats) reward length distinct".split() and len(table) > 24
    assert "Traceback" not in err and "out/front.png" in table[-1]
    AutoModelForCausalLM.from_pretrained(here / "out" / "iteration-2" / "merged")


def test_run_takes_prompts_of_its_own_for_evaluation_and_either_executor(here, capsys):
    (here / "held_out.jsonl").write_text('{"prompt": "i loved it"}\n{"prompt": "dull film"}\n')
    options = ["--eval-prompts", "held_out.jsonl", "--prompts", "prompts.jsonl", "--executor", "serial"]
    assert main(own(*options, "--out", "out")) == 0
    prompts = json.loads((here / "out" / "prompts.json").read_text())
    assert prompts["eval"] == ["i loved it", "dull film"] and prompts["train"] == PROMPTS


def test_resume_of_a_finished_folder_draws_its_front_again(here, capsys, monkeypatch):
    assert main(own("--out", "out")) == 0
    first, before = capsys.readouterr().out, files(here / "out")
    (here / "out" / "front.png").unlink()
    monkeypatch.setattr("warp_lite.training.executors.train_batched", lambda *a: pytest.fail("it trained again"))
    monkeypatch.setattr("warp_lite.viewing.front_report.measure_front", lambda *a: pytest.fail("it measured again"))
    assert main(own("--resume", "--out", "out")) == 0
    assert capsys.readouterr().out == first and files(here / "out") == before


def test_front_measures_a_finished_folder_where_it_is_asked_to(here, capsys):
    assert main(own("--out", "out")) == 0
    capsys.readouterr()
    assert main(["front", "out", "--etas", "1,0,.25,1.5", "--prompts", "2"]) == 0
    front = json.loads((here / "out" / "front.json").read_text())
    assert [p["eta"] for p in front["points"]] == [0, 0.25, 1, 1.5] * 2 and front["prompts"] == 2
    assert "1.50" in capsys.readouterr().out


def test_merge_writes_the_slerp_of_two_folders(here, capsys, policy_of, tokenizer):
    for seed in (1, 2):
        save_policy(policy_of("gpt2", dtype=torch.float32, seed=seed), tokenizer, here / f"p{seed}")
    assert main(["merge", "--init", "policy", "--policies", "p1", "p2", "--out", "merged"]) == 0
    init, one, two, merged = (parameters(load_policy(here / name)[0]) for name in ("policy", "p1", "p2", "merged"))
    expected = slerp(init, [one, two])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name])
    assert "merged 2 policies" in capsys.readouterr().out


def test_a_preset_runs_on_the_tiny_world(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("warp_lite.result.EVALUATION_SAMPLES", 64)
    monkeypatch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 16)
    monkeypatch.setattr("warp_lite.evaluation.limit.LIMIT_PROMPTS", 8)
    arguments = ["run", "--preset", "tiny", "--set=steps=3", "--set=iterations=1", "--set=runs=2",
                 "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "gold reward" in out and "perplexity" in out and "η=0.5" in out
    assert "gold" in json.loads((tmp_path / "run" / "front.json").read_text())["points"][0]
    assert main([*arguments, "--resume"]) == 0 and capsys.readouterr().out == out
    assert main(["front", str(tmp_path / "run"), "--etas", "0,1"]) == 0


def test_run_takes_a_folder_of_a_reward_model(here, world, capsys):
    (here / "openings.txt").write_text("\n".join(world.prompts.given[:40]))
    arguments = own("--policy", str(world.folder / "sft"), "--reward", str(world.folder / "reward"),
                    "--prompts", "openings.txt", "--set=iterations=1", "--out", "out")
    assert main(arguments) == 0 and "rewards in standard deviations of SFT samples" in capsys.readouterr().out
    assert main(["front", "out", "--etas", "0,1"]) == 0


# --- bad input ------------------------------------------------------------------------------

RUN_ERRORS = {
    "nothing to run on": (["run", "--out", "x"], "give --preset, or .*missing: --policy, --reward, --prompts"),
    "no out": (["run", "--preset", "tiny"], "required: --out; see warp-lite run --help"),
    "an unknown preset": (["run", "--preset", "tinny", "--out", "x"], "no preset 'tinny'; there are tiny, tiny-gemma"),
    "a preset and a policy": (["run", "--preset", "tiny", "--policy", "p", "--out", "x"], "leave out --policy"),
    "an unknown command": (["walk"], "invalid choice: 'walk'"),
    "an unknown option": (own("--otu", "x"), "--out; see|unrecognized arguments: --otu"),
    "an unknown executor": (own("--executor", "fast", "--out", "x"), "invalid choice: 'fast'"),
    "an unknown setting": (own("--set", "bata=1", "--out", "x"), "no setting 'bata'; the nearest is 'beta'"),
    "a setting without a value": (own("--set", "beta", "--out", "x"), "NAME=VALUE, not 'beta'"),
    "a setting of another type": (own("--set", "steps=1.5", "--out", "x"), "steps must be of type int, not '1.5'"),
    "eta out of range": (own("--set", "eta=1.2", "--out", "x"), "eta must lie between 0 and 1, not 1.2"),
    "mu out of range": (own("--set", "mu=-0.1", "--out", "x"), "mu must lie between 0 and 1, not -0.1"),
    "a negative beta": (own("--set", "beta=-1", "--out", "x"), "beta must be 0 or more, not -1"),
    "nan as a setting": (own("--set", "lr=nan", "--out", "x"), "lr must be finite"),
    "a missing prompts file": (own("--prompts", "gone.txt", "--out", "x"), "cannot read the prompts in gone.txt"),
    "an empty prompts file": (own("--prompts", "empty.txt", "--out", "x"), "empty.txt has no prompts"),
    "a folder as prompts": (own("--prompts", "policy", "--out", "x"), "cannot read the prompts in policy"),
    "prompts that are no text": (own("--prompts", "policy/model.safetensors", "--out", "x"), "cannot read the prompts"),
    "a bad line of jsonl": (
        own("--prompts", "bad.jsonl", "--out", "x"),
        'line 2 of bad.jsonl is no JSON object with a "prompt"'),
    "a prompt too long": (own("--prompts", "long.txt", "--out", "x"), "prompt 1 has 61 tokens and leaves no room"),
    "empty held-out prompts": (own("--eval-prompts", "empty.txt", "--out", "x"), "empty.txt has no prompts"),
    "a missing policy": (own("--policy", "./gone", "--out", "x"), "cannot load a policy from './gone'"),
    "a folder that is no policy": (own("--policy", "folder", "--out", "x"), "cannot load a policy from 'folder'"),
    "a truncated policy": (
        own("--policy", "truncated", "--out", "x"),
        "cannot load a policy from 'truncated'.*truncated"),
    "a policy with nan": (own("--policy", "nan", "--out", "x"), "NaN or infinite weights in 'transformer.wte.weight'"),
    "a missing reward module": (own("--reward", "gone:score", "--out", "x"), "cannot find the reward 'gone:score'"),
    "a missing reward": (own("--reward", "cli_reward:gone", "--out", "x"), "cannot find the reward 'cli_reward:gone'"),
    "a reward that is none": (
        own("--reward", "cli_reward:number", "--out", "x"),
        "'cli_reward:number' is int, not a function"),
    "a reward folder that is none": (
        own("--reward", "folder", "--out", "x"),
        "cannot load a reward model from 'folder'"),
    "a reward of nan": (
        own("--reward", "cli_reward:nan", "--out", "x"),
        "the reward is nan in iteration 1, run 1, step 1"),
    "a reward with too few values": (own("--reward", "cli_reward:short", "--out", "x"), "1 values for 3 completions"),
    "a reward that fails": (
        own("--reward", "cli_reward:broken", "--out", "x"),
        "broken failed on a first trial with KeyError"),
    "a run that leaves the numbers": (own("--set", "max_new_tokens=50", "--out", "x"), "max_new_tokens"),
    "an out that is a file": (own("--out", "prompts.txt"), "prompts.txt is a file"),
    "an out that is in use": (own("--out", "folder"), "folder is not empty and not a run folder; choose another"),
    "a model's folder as out": (own("--resume", "--out", "policy"), "policy is not empty and not a run folder"),
    "front of nothing": (["front", "gone"], "gone is not a run folder"),
    "front of a model": (["front", "policy"], "policy is not a run folder"),
    "etas that are no numbers": (
        ["front", "policy", "--etas", "0,half"],
        "numbers with commas between them, not '0,half'"),
    "negative etas": (["front", "policy", "--etas=-1,0"], "must be 0 or more, not '-1,0'"),
    "no etas": (["front", "policy", "--etas", ""], "numbers with commas"),
    "infinite etas": (["front", "policy", "--etas", "inf"], "must be 0 or more"),
    "policies that do not fit": (["merge", "--init", "policy", "--policies", "policy", "other", "--out", "x"],
                                 "other has 'transformer.*in shape .*same architecture"),
    "a merge of nan": (
        ["merge", "--init", "policy", "--policies", "policy", "nan", "--out", "x"],
        "NaN or infinite weights"),
    "a merge of a truncated policy": (["merge", "--init", "policy", "--policies", "policy", "truncated", "--out", "x"],
                                      "truncated/model.safetensors is truncated"),
    "a merge of nothing": (
        ["merge", "--init", "policy", "--policies", "policy", "gone", "--out", "x"],
        "gone is not a folder"),
    "a merge onto something": (["merge", "--init", "policy", "--policies", "policy", "policy", "--out", "folder"],
                               "folder exists and is not an empty folder"),
    "a negative eta of a merge": (
        ["merge", "--init", "policy", "--policies", "policy", "policy", "--eta=-1", "--out", "x"], "eta is -1"),
    "an eta that is no number": (["merge", "--init", "policy", "--policies", "p", "p", "--eta", "half", "--out", "x"],
                                 "argument --eta: invalid float value: 'half'"),
}


@pytest.fixture(scope="module")
def broken(task, policy_of, tokenizer, tmp_path_factory):
    """The task and one of everything that is wrong."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(task, folder, dirs_exist_ok=True)
    save_policy(policy_of("gpt2", dtype=torch.float32, n_embd=8), tokenizer, folder / "other")
    bad = policy_of("gpt2", dtype=torch.float32)
    with torch.no_grad():
        bad.transformer.wte.weight[3, 3] = torch.nan
    save_policy(bad, tokenizer, folder / "nan")
    shutil.copytree(folder / "policy", folder / "truncated")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "folder").mkdir()
    (folder / "folder" / "thesis.txt").write_text("mine")
    (folder / "empty.txt").write_text("\n  \n")
    (folder / "long.txt").write_text("this film\n" + "great " * 60)
    (folder / "bad.jsonl").write_text('{"prompt": "this"}\n{"text": "that"}\n')
    return folder


@pytest.mark.parametrize("case", RUN_ERRORS)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_is_written(broken, monkeypatch, capsys, case):
    arguments, message = RUN_ERRORS[case]
    monkeypatch.chdir(broken)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = files(broken)
    found = error_of(capsys, arguments)
    assert re.search(message, found), found
    assert files(broken) == before and not (broken / "x").exists()


def test_an_out_in_use_is_refused_before_the_tiny_world_is_trained(broken, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path))
    monkeypatch.chdir(broken)
    assert "choose another" in error_of(capsys, ["run", "--preset", "tiny", "--out", "folder"])
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_is_not_overwritten_and_resume_names_what_differs(here, capsys):
    assert main(own("--out", "out")) == 0
    capsys.readouterr()
    before = files(here / "out")
    assert "out holds a run already; continue it with --resume" in error_of(capsys, own("--out", "out"))
    assert "with beta = 0.3, not 0.1" in error_of(capsys, own("--resume", "--set", "beta=.1", "--out", "out"))
    (here / "shorter.txt").write_text("\n".join(PROMPTS[:9]))
    assert "with prompts." in error_of(capsys, own("--resume", "--prompts", "shorter.txt", "--out", "out"))
    assert files(here / "out") == before


@pytest.mark.parametrize("count", ["0", "1", "4"])
def test_front_refuses_more_or_fewer_prompts_than_there_are(here, capsys, count):
    short_run(*load_policy(here / "policy"), out=here / "run")
    config = json.loads((here / "run" / "config.json").read_text())
    config["settings"]["source"] = {"policy": "policy", "reward": "cli_reward:score"}
    (here / "run" / "config.json").write_text(json.dumps(config))
    message = f"--prompts must lie between 2 and the 3 held-out prompts, not {count}"
    assert message in error_of(capsys, ["front", "run", "--prompts", count])


def test_front_names_a_file_that_was_altered(here, capsys):
    assert main(own("--out", "out")) == 0
    capsys.readouterr()
    weights = here / "out" / "iteration-1" / "run-2" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert "iteration-1/run-2/policy.safetensors is not what DONE vouches for" in error_of(capsys, ["front", "out"])


def test_front_of_a_folder_from_python_says_that_it_knows_no_reward(here, capsys):
    short_run(*load_policy(here / "policy"), out=here / "run")
    assert "does not say where the reward is" in error_of(capsys, ["front", "run"])


def test_etas_are_sorted_and_single():
    assert parse_etas("1,0,.5,1,2") == (0.0, 0.5, 1.0, 2.0)


def test_prompts_keep_their_spaces_and_lose_a_byte_order_mark(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffthis film \n\n  that\r\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["this film ", "  that"]


def test_a_front_that_was_altered_is_measured_again(here, capsys):
    assert main(own("--out", "out")) == 0
    path = here / "out" / "front.json"
    before, front = path.read_bytes(), json.loads(path.read_bytes())
    for altered in ({n: v for n, v in front.items() if n != "unit"}, {**front, "points": []}, {**front, "prompts": 7}):
        path.write_text(json.dumps(altered))
        assert main(own("--resume", "--out", "out")) == 0 and path.read_bytes() == before


def test_a_line_of_json_may_hold_a_separator_that_is_no_new_line(tmp_path):
    prompts = ["one\u2028two", "three\x85four", "five\x0csix"]
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "p.jsonl").write_bytes("\r\n".join(rows).encode())
    assert read_prompts(tmp_path / "p.jsonl") == prompts


def test_a_line_of_json_too_deep_to_read_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1 of .*p.jsonl is no JSON object"):
        read_prompts(tmp_path / "p.jsonl")


# --- help, pipes, Ctrl-C --------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--help"], ["run", "merge", "front"]),
    (["run", "--help"], ["--preset", "tiny-gemma", "--policy", "--reward", "--prompts", "--eval-prompts",
                         "--set NAME=VALUE", "--executor", "--ray-address", "--ray-cpus", "--ray-gpus", "--resume",
                         "--out", "a fifth of", ".jsonl", "512"]),
    (["merge", "--help"], ["--init", "--policies", "--method", "--eta", "--out", "default: slerp"]),
    (["front", "--help"], ["DIR", "--etas", "--prompts", "front.json and front.png"])])
def test_help_names_every_option(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    text = " ".join(out.split())
    assert stop.value.code == 0 and err == "" and all(word in text for word in words), text


@pytest.mark.parametrize("arguments, code", [
    ("--help", 0), ("run --help", 0), ("front --help", 0), ("merge --help", 0), ("claims --help", 0), ("", 2),
    ("ran", 2), ("run --preset tiny", 2), ("run --out out", 2), ("run --preset large --out out", 2),
    ("run --preset tiny --set lr=high --out out", 2), ("run --preset tiny --set rate=1 --out out", 2),
    ("run --preset tiny --out prompts.txt", 2), ("run --preset tiny --out .", 2), ("run --preset tiny --out run", 2),
    ("run --preset tiny --out taken", 2), ("run --policy p --reward r --prompts absent.txt --out out", 2),
    ("run --policy p --reward r --prompts prompts.csv --out out", 2), ("front .", 2), ("claims", 2),
    ("claims --out . --seeds 0", 2)])
def test_help_and_what_is_refused_do_not_wait_for_torch(tmp_path, arguments, code):
    for name in ("prompts.txt", "prompts.csv"):
        (tmp_path / name).write_text("this film\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"settings": {}, "provenance": {"threads": 1}}')
    program = ("import sys\nfrom warp_lite.cli import main\ntry:\n    code = main(sys.argv[1:])\n"
               "except SystemExit as stop:\n    code = stop.code\n"
               "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
               "assert not heavy, heavy\nsys.exit(code)")
    with locked(tmp_path / "taken"):
        done = subprocess.run([sys.executable, "-c", program, *arguments.split()], cwd=tmp_path, capture_output=True,
                              text=True)
    assert done.returncode == code and len(done.stderr.splitlines()) == (code == 2), done.stderr


@pytest.mark.parametrize("error, code, message", [
    (KeyboardInterrupt(), 130, "warp-lite: interrupted; nothing was written\n"),
    (KeyboardInterrupt("step 3 is saved"), 130, "warp-lite: interrupted: step 3 is saved; continue with --resume\n"),
    (OSError("cannot write x: the disk is full\nmore"), 2, "warp-lite: cannot write x: the disk is full\n"),
    (ValueError(), 2, "warp-lite: ValueError\n")])
def test_what_stops_a_command_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, message):
    def fail(*args):
        raise error

    monkeypatch.setattr("warp_lite.cli.front_command", fail)
    assert main(["front", "x"]) == code and capsys.readouterr().err == message


def test_ctrl_c_while_the_front_is_measured_keeps_the_runs(here, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("warp_lite.viewing.front_report.measure_front", interrupted)
        assert main(own("--out", "out")) == 130
    assert "every run in out is kept; continue with --resume" in capsys.readouterr().err
    assert main(own("--resume", "--out", "out")) == 0 and (here / "out" / "front.json").is_file()


@pytest.mark.parametrize("signals, message", [
    ("SIGTERM", "step 3 of iteration 1 is saved in out; continue with --resume"),
    ("SIGINT SIGINT", "stopped at once; the last saved step is kept; continue with --resume"),
    ("SIGTERM SIGINT", "stopped at once; the last saved step is kept; continue with --resume")])
def test_a_process_told_to_end_saves_and_told_twice_ends_at_once(here, capsys, signals, message):
    """The reward, called four times in the trial and thrice until then, tells it in the third step."""
    module = "told_" + signals.replace(" ", "_")
    (here / f"{module}.py").write_text(f"""
import signal
from cli_reward import score as own
calls = []

def score(prompts, completions, completion_ids):
    calls.append(1)
    if len(calls) == 8:
        for name in {signals.split()}:
            signal.raise_signal(getattr(signal, name))
    return own(prompts, completions, completion_ids)
""")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    arguments = [*own("--out", "out"), "--reward", f"{module}:score"]
    assert main(arguments) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1] == f"warp-lite: interrupted: {message}"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    (state,) = (here / "out/iteration-1/run-2").glob("state-*")
    assert state.name == ("state-3.safetensors" if signals == "SIGTERM" else "state-2.safetensors")
    assert main([*arguments, "--resume"]) == 0 and main([*arguments, "--out", "whole"]) == 0
    assert files(here / "out") == files(here / "whole")


def test_ctrl_c_after_the_last_step_is_not_forgotten(here, capsys, monkeypatch):
    from warp_lite import launch

    write = launch.write_iteration

    def told(folder, task, i, *weights):
        write(folder, task, i, *weights)
        if i == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "write_iteration", told)
        assert main(own("--out", "out")) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("interrupted: every run in out is kept; continue with --resume\n")
    assert not (here / "out/front.json").exists() and main(own("--resume", "--out", "out")) == 0


@pytest.mark.slow
def test_ctrl_c_saves_the_run_and_resume_finishes_it_as_if_nothing_had_been(here, capsys):
    arguments = [*own("--out", "out"), "--set=steps=12", "--set=save_every=100"]
    command = [sys.executable, "-W", "ignore", "-m", "warp_lite.cli", *arguments]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "SLOW_REWARD": "0.3", "PYTHONPATH": root})
    log, deadline = here / "out" / "iteration-1" / "run-1" / "metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("warp-lite: interrupted: step ") and last.endswith("is saved in out; continue with --resume")
    assert not list(here.glob("out/iteration-1/run-1/DONE"))
    assert main([*arguments, "--resume"]) == 0
    assert main([*arguments, "--out", "whole"]) == 0
    assert files(here / "out") == files(here / "whole")
