"""What a folder holds is data: no pickle, no code of its own, no path that leads out of it, no network."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from short_run import PROMPTS, files, score, short_run

from warp_lite import load_result
from warp_lite.cli import main
from warp_lite.policies.loading import load_policy, save_policy

PACKAGE = Path(__file__).parent.parent / "warp_lite"
SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "diskcache", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load", "numpy.load",
                "np.save", "os.system", "os.popen", "pandas.read_pickle", "torch.hub.load"}
BRIEF = {"iterations": 1, "steps": 2, "eval_every": 0}


def unsafe(tree) -> list[str]:
    """What in a module could run what a file holds."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [name for name in names if name.partition(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if call in UNSAFE_CALLS:
                found.append(call)
            if call.endswith(".from_pretrained") and options.get("trust_remote_code") != "False":
                found.append(f"{call} without trust_remote_code=False")
            found += [f"{name}={options[name]}" for name, safe in (
                ("trust_remote_code", "False"), ("allow_pickle", "False"), ("weights_only", "True"), ("shell", "False"),
                ("use_safetensors", "True"), ("safe_serialization", "True")) if options.get(name, safe) != safe]
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_runs_what_a_file_holds(name):
    assert unsafe(SOURCES[name]) == []


@pytest.mark.parametrize("line", [
    "import pickle", "from joblib import load", "torch.load(path)", "eval(text)", "np.load(p, allow_pickle=True)",
    "AutoModel.from_pretrained(f)", "AutoModel.from_pretrained(f, trust_remote_code=True)",
    "f(trust_remote_code=ours)", "subprocess.run(c, shell=True)", "from_pretrained(a, use_safetensors=False)"])
def test_the_check_finds_what_it_looks_for(line):
    assert unsafe(ast.parse(line))


@pytest.fixture(scope="module")
def finished(policy_of, tokenizer, tmp_path_factory):
    """A finished run folder, shared: copy it to change it."""
    folder = tmp_path_factory.mktemp("security") / "run"
    short_run(policy_of("gpt2", dtype=torch.float32), tokenizer, out=folder, **BRIEF)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_folder_is_safetensors_json_and_a_picture(finished):
    kinds = {path.suffix for path in finished.rglob("*") if path.is_file() and path.name not in ("DONE", ".lock")}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".png", ".jinja"}
    json.loads((finished / "iteration-1" / "DONE").read_text())


@pytest.mark.parametrize("where", ["iteration-1/run-1", "iteration-1", "sft"])
@pytest.mark.parametrize("name", ["../../../secret", "/etc/hostname", "merged/../../../secret", "linked"])
def test_a_path_that_leads_out_of_the_folder_is_refused(run, tmp_path, where, name):
    (tmp_path / "secret").write_text("secret")
    (run / where / "linked").symlink_to(tmp_path / "secret")
    done = json.loads((run / where / "DONE").read_text())
    done["sha256"][name] = "0" * 64
    (run / where / "DONE").write_text(json.dumps(done))
    with pytest.raises(ValueError, match=f"{where}/DONE names '{name}', which is outside its folder") as caught:
        load_result(run, score)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where, name", [
    ("sft", "adapter_config.json"), ("iteration-1/merged", "adapter_config.json"),
    ("iteration-1/next-init", "model.safetensors.index.json"), ("sft", "chat_template.jinja")])
def test_a_file_that_was_put_beside_those_vouched_for_is_refused(run, where, name):
    """The library would follow it to another model, or render it."""
    (run / where / name).write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ValueError, match=f"{where}/{name} is not what DONE vouches for; "):
        load_result(run, score)


@pytest.mark.parametrize("content", ["[]", "{}", '{"sha256": 3}', '{"sha256": {}}', '{"sha256": {"DONE": 3}}', "{",
                                     '{"sha256": {"\\u0000": ""}}', "[" * 100_000, "\udcff"])
@pytest.mark.parametrize("where", ["iteration-1/run-1", "iteration-1", "sft"])
def test_a_done_that_vouches_for_nothing_is_refused_in_one_line(run, where, content):
    (run / where / "DONE").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as caught:
        load_result(run, score)
    assert "\n" not in str(caught.value) and str(run / where) in str(caught.value) or "null byte" in str(caught.value)


@pytest.mark.parametrize("altered", ["sft/model.safetensors", "iteration-1/run-2/policy.safetensors",
                                     "iteration-1/merged/config.json"])
def test_a_merge_refuses_what_a_run_folder_does_not_vouch_for(run, tmp_path, altered, capsys):
    """The files are sound in themselves: only the hashes tell. Moved away from its DONE, a file is the user's own."""
    runs = [run / "iteration-1" / f"run-{m}" / "policy.safetensors" for m in (1, 2)]
    init = run / ("iteration-1/merged" if "merged" in altered else "sft")
    command = ["merge", "--policies", *map(str, runs), "--init", str(init), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    shutil.rmtree(tmp_path / "out")
    path = run / altered
    if path.suffix == ".json":
        path.write_text(path.read_text() + " ")
    else:
        state = load_file(path)
        state[min(state)] += 1
        save_file(state, path, metadata={"format": "pt"})
    before = files(run)
    capsys.readouterr()
    assert main(command) == 2
    line, = capsys.readouterr().err.splitlines()
    assert f"{path} is not what DONE vouches for; " in line
    assert files(run) == before and not (tmp_path / "out").exists()
    moved = shutil.copytree(init, tmp_path / "own")
    (moved / "DONE").unlink(missing_ok=True)
    own = [shutil.copy(policy, tmp_path / f"{m}.safetensors") for m, policy in enumerate(runs)]
    assert main(["merge", "--policies", *map(str, own), "--init", str(moved), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("reward", ["subprocess:call", "os:system", "builtins:exec", "os.path:exists"])
def test_code_that_a_run_folder_names_as_its_reward_is_not_run(run, reward, monkeypatch, capsys):
    config = json.loads((run / "config.json").read_text())
    config["settings"]["source"] = {"policy": "x", "reward": reward}
    (run / "config.json").write_text(json.dumps(config))
    assert main(["front", str(run)]) == 2
    assert f"names the code '{reward}' as the reward, which is not run" in capsys.readouterr().err
    (run / "evil.py").write_text("raise SystemExit('it was run')")
    config["settings"]["source"] = {"policy": "x", "reward": "evil:score"}
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(run)
    assert main(["front", "."]) == 2 and "'evil:score' as the reward, which is not run" in capsys.readouterr().err


def test_code_beside_a_policy_is_not_run(policy_of, tokenizer, tmp_path):
    save_policy(policy_of("gpt2", dtype=torch.float32), tokenizer, tmp_path / "policy")
    for name, change in (("config.json", {"model_type": "evil", "architectures": ["Evil"], "auto_map": {
            "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}),
                         ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})):
        path = tmp_path / "policy" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (tmp_path / "policy" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="cannot load a policy from"):
        load_policy(tmp_path / "policy")
    assert not (tmp_path / "ran").exists()


NO_NETWORK = """
import json, socket, sys
tried = []
def refuse(*arguments, **options):
    tried.append(str(arguments[-1] if isinstance(arguments[0], socket.socket) else arguments[0]))
    raise OSError("there is no network")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = socket.getaddrinfo = refuse
from warp_lite import result
from warp_lite.evaluation import limit
result.EVALUATION_SAMPLES, limit.LIMIT_SAMPLES, limit.LIMIT_PROMPTS = 32, 16, 8
from warp_lite.cli import main
codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps([codes, tried]))
"""


def commands_without_network(folder, offline, commands):
    """Exit codes of commands run in one process whose sockets fail, what they tried to reach, and stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    paths = os.pathsep.join([str(PACKAGE.parent), str(Path(__file__).parent)])
    environment |= {"PYTHONPATH": paths, **({"HF_HUB_OFFLINE": "1"} if offline else {})}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", NO_NETWORK, json.dumps(commands)], cwd=folder,
                          env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_a_run_on_a_folder_or_the_tiny_world_opens_no_socket(world, policy_of, tokenizer, tmp_path):
    """Whether or not HF_HUB_OFFLINE is set: here it is not."""
    save_policy(policy_of("gpt2", dtype=torch.float32), tokenizer, tmp_path / "policy")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    short = ["--set=iterations=1", "--set=steps=1", "--set=runs=2", "--set=batch_size=2", "--set=max_new_tokens=5"]
    codes, tried, err = commands_without_network(tmp_path, False, [
        ["run", "--policy", "policy", "--reward", "short_run:score", "--prompts", "prompts.txt", *short, "--out", "a"],
        ["front", "a", "--etas", "0,1"],
        ["run", "--preset", "tiny", *short, "--out", "b"],
        ["merge", "--init", "a/sft", "--policies", "a/iteration-1/merged", "policy", "--out", "c"]])
    assert codes == [0, 0, 0, 0], err
    assert tried == []
    assert files(tmp_path / "c")


@pytest.mark.slow
def test_offline_a_name_on_the_hub_is_one_line_and_no_socket(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    codes, tried, err = commands_without_network(tmp_path, True, [
        ["run", "--policy", "openai-community/gpt2", "--reward", "short_run:score", "--prompts", "prompts.txt", "--out",
         "x"]])
    assert (codes, tried) == ([2], []) and len(err.splitlines()) == 1 and "cannot load a policy from" in err
    assert not (tmp_path / "x").exists()
