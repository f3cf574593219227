"""The house: imports run one way, Algorithm 1 stands alone, and what is new goes in one place."""

import ast
import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from short_run import CONFIG, PROMPTS, assert_same_weights, score, short_run

from warp_lite import MERGES, ParetoExplorer, Task, WarpConfig, load_result, merge_checkpoints, run_warp
from warp_lite.averaging.merging import merge
from warp_lite.averaging.slerp import combine
from warp_lite.cli import main
from warp_lite.experiment import run_experiment
from warp_lite.scale.adapters import Adapter, merge_adapters
from warp_lite.storage.provenance import PACKAGE
from warp_lite.storage.run_config import check_out
from warp_lite.viewing.explorer.grid import merged_weights

# From the ground up: a module imports from its own floor and those below. Names are wings or single modules.
FLOORS = [["averaging"], ["config", "storage/files", "storage/provenance", "storage/prompt_sources"], ["storage"],
          ["averaging/checkpoints"], ["policies"], ["rewards"], ["task"], ["worlds"], ["evaluation"], ["training"],
          ["result"], ["warp"], ["reopen", "launch", "experiment"], ["scale"], ["viewing"],
          ["notebooks/figures", "notebooks/plans"], ["evidence"], ["notebooks", "cli", "costs"]]


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its path, parsed."""
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, tree: ast.Module, among: dict) -> set[tuple[str, bool]]:
    """The package's modules that a module imports, each with whether only when a function is called."""
    folder, inside = name.split("/")[:-1], set()
    typing_only = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If)
                   and "TYPE_CHECKING" in ast.unparse(block.test) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing_only:
            continue
        if node.level:
            base = folder[:len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif (node.module or "").split(".")[0] == "warp_lite":
            base = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            for path in ("/".join([*base, alias.name]), "/".join(base), "/".join([*base, "__init__"])):
                if path in among and path != name:
                    inside.add((path, node.col_offset > 0))
                    break
    return inside


def floor(name: str) -> int:
    """The floor that a module stands on."""
    fits = [(len(place), level) for level, places in enumerate(FLOORS) for place in places
            if name == place or name.startswith(f"{place}/")]
    return max(fits)[1]


def test_no_import_runs_upward():
    found = modules()
    for name, tree in found.items():
        if name == "__init__":  # the package's names, each looked up on first use
            continue
        for other, _ in imports(name, tree, found):
            assert floor(other) <= floor(name), f"{name} imports {other}, which stands above it"


def test_there_is_no_circle_of_imports():
    found = modules()
    below = {name: {other for other, late in imports(name, tree, found) if not late} for name, tree in found.items()
             if name != "__init__"}
    done, path = set(), []

    def visit(name):
        assert name not in path, " → ".join([*path[path.index(name):], name])
        if name not in done:
            path.append(name)
            for other in below.get(name, ()):
                visit(other)
            done.add(path.pop())

    for name in below:
        visit(name)


def test_warp_is_algorithm_1_and_nothing_else():
    text = (PACKAGE / "warp.py").read_text(encoding="utf-8")
    assert text.count("\n") < 120
    assert not re.search(r"\bray\b|lora|adapter|memory|fail", text, re.IGNORECASE)


# --- what is new goes in one place ------------------------------------------------------------


@pytest.fixture
def folders_of(tmp_path):
    """Saves an init and policies; returns their folders."""
    def save(init, policies):
        folders = [tmp_path / name for name in ("init", *(f"policy-{m}" for m in range(len(policies))))]
        for folder, state in zip(folders, [init, *policies]):
            folder.mkdir()
            save_file(state, folder / "model.safetensors")
        return folders[0], folders[1:]
    return save


@pytest.fixture
def first_only(monkeypatch):
    """A merge method that a user might add: half of the first policy's task vector, a tenth of the last's."""
    def half_of_the_first(gram, weights):
        assert gram.shape == (len(weights), len(weights)) and gram.dtype == torch.float64
        return [0.5, *[0.0] * (len(weights) - 2), 0.1]

    monkeypatch.setitem(MERGES, "mine", half_of_the_first)
    return [0.5, 0.1]


def test_a_new_merge_method_is_one_function_and_works_everywhere(first_only, gpt2_policy, tokenizer, tmp_path):
    def by_hand(init, policies):
        return {name: combine(init[name], [policy[name] for policy in policies], first_only) for name in init}

    result = short_run(gpt2_policy, tokenizer, out=tmp_path / "run", merge="mine", iterations=1)
    (iteration,) = result.iterations
    expected = by_hand(iteration.init, iteration.policies)
    assert_same_weights(iteration.merged, expected)
    assert_same_weights(merge(iteration.init, iteration.policies, "mine"), expected)
    assert_same_weights(load_result(tmp_path / "run", score).iterations[0].merged, expected)

    task = Task.of(gpt2_policy, tokenizer, score, PROMPTS, max_new_tokens=CONFIG.max_new_tokens)
    config = CONFIG.replace(merge="mine", iterations=1)
    (again,) = run_experiment(task, {"mine": config}, [config.seed], progress=False).results["mine"]
    assert_same_weights(again.iterations[0].merged, expected, 1e-12)

    runs = [str(tmp_path / "run/iteration-1" / f"run-{m}" / "policy.safetensors") for m in (1, 2)]
    arguments = ["merge", "--init", str(tmp_path / "run/sft"), "--policies", *runs, "--method", "mine"]
    assert main([*arguments, "--out", str(tmp_path / "merged")]) == 0
    from warp_lite import load_policy
    on_disk = dict(load_policy(tmp_path / "merged", dtype=torch.float64)[0].named_parameters())
    assert_same_weights({name: tensor.detach() for name, tensor in on_disk.items()}, expected, 1e-12)  # no fused add

    explorer = ParetoExplorer(result, fast=True, prompts=1, limit=[], progress=False)
    assert {line["runs"] for line in explorer.grid["lines"]} == {1, 2}
    assert_same_weights(merged_weights(result, 1, 2, 0.25), expected)


def test_a_new_merge_method_merges_adapters_as_their_dense_matrices(first_only):
    draw = torch.Generator().manual_seed(0)
    adapters = [Adapter({"w.weight": (torch.randn(4, 2, generator=draw), torch.randn(2, 3, generator=draw))})
                for _ in range(2)]
    merged = merge_adapters(adapters, method="mine").delta("w.weight")
    expected = 0.5 * adapters[0].delta("w.weight") + 0.1 * adapters[1].delta("w.weight")
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("returned", [
    [1.0], [float("nan"), 0.0], [0.1, 0.2, 0.3], None, 0.5, "ab", ["a", "b"], [1j, 1j], {0: 0.5, 1: 0.5}, {0.3, 0.7},
    torch.ones(2, 2), np.ones((1, 2))], ids=str)
def test_a_merge_method_that_does_not_give_a_number_for_each_policy_is_named(returned, monkeypatch):
    monkeypatch.setitem(MERGES, "broken", lambda gram, weights: returned)
    init = {"w": torch.zeros(3)}
    with pytest.raises(ValueError, match="the merge method '<lambda>' returned .* for 2 policies"):
        merge(init, [{"w": torch.ones(3)}, {"w": -torch.ones(3)}], "broken")


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, iter, lambda c: torch.tensor(c, requires_grad=True)])
def test_a_merge_method_may_return_numbers_of_any_kind_in_an_order(kind, monkeypatch):
    monkeypatch.setitem(MERGES, "any", lambda gram, weights: kind([2.0, -1.0]))
    init = {"w": torch.zeros(3)}
    assert merge(init, [{"w": torch.ones(3)}, {"w": torch.full((3,), 4.0)}], "any")["w"].tolist() == [-2.0] * 3


def test_a_merge_method_that_fails_is_named_and_leaves_no_file(folders_of, monkeypatch, tmp_path):
    def careless(gram, weights):
        return {}["a key\nof two lines"]

    monkeypatch.setitem(MERGES, "careless", careless)
    init, policies = folders_of({"w": torch.zeros(3)}, [{"w": torch.ones(3)}, {"w": -torch.ones(3)}])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="the merge method 'careless' failed with KeyError: .*") as error:
        merge_checkpoints(init, policies, tmp_path / "out", "careless")
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before


def test_a_merge_method_that_changes_the_weights_it_is_given_changes_no_other_tensor(folders_of, monkeypatch, tmp_path):
    def consuming(gram, weights):
        return [weights.pop() for _ in range(len(weights))]

    monkeypatch.setitem(MERGES, "consuming", consuming)
    init = {name: torch.zeros(2) for name in "abc"}
    policies = [{name: torch.ones(2) for name in "abc"}, {name: torch.full((2,), 5.0) for name in "abc"}]
    merged = merge(init, policies, "consuming", [0.25, 0.75])
    merge_checkpoints(*folders_of(init, policies), tmp_path / "out", "consuming", weights=[0.25, 0.75])
    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    assert {tuple(state[name].tolist()) for state in (merged, on_disk) for name in "abc"} == {(2.0, 2.0)}


def test_an_unknown_merge_method_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="merge must be one of slerp, lerp, none, not 'mean'"):
        WarpConfig(merge="mean")
    with pytest.raises(ValueError, match="method is 'mean'; it must be one of slerp, lerp"):
        merge({}, [{}, {}], "mean")


@dataclass(frozen=True)
class WiderConfig(WarpConfig):
    """WarpConfig with a setting more, which may be None."""

    clip: int | None = None


def test_a_new_setting_is_one_field_and_an_older_folder_has_its_default(gpt2_policy, tokenizer, tmp_path, monkeypatch):
    assert WiderConfig().with_text(["clip=3"]).clip == 3 and WiderConfig(clip=3).with_text(["clip=none"]).clip is None
    for value in (1.5, "3", True):
        with pytest.raises(TypeError, match=f"clip must be a number of type int or None, not {value!r}"):
            WiderConfig(clip=value)
    whole = short_run(gpt2_policy, tokenizer, out=tmp_path / "run")
    monkeypatch.setattr("warp_lite.storage.run_config.WarpConfig", WiderConfig)
    wider = WiderConfig(**dataclasses.asdict(CONFIG))
    resumed = run_warp(gpt2_policy, tokenizer, score, PROMPTS, wider, tmp_path / "run", True, progress=False)
    assert_same_weights(resumed.weights(), whole.weights())
    with pytest.raises(ValueError, match="holds a run with clip = None, not 2"):
        run_warp(gpt2_policy, tokenizer, score, PROMPTS, wider.replace(clip=2), tmp_path / "run", True, progress=False)
    assert check_out(tmp_path / "run", True)


def test_a_new_world_is_one_module(gpt2_policy, tokenizer, tmp_path):
    """A task made anywhere runs, is measured, and is kept as those of this package are."""
    from warp_lite.evaluation.limit import limit_rewards, optimal_front
    from warp_lite.task import World

    def my_world():
        world = World.of(gpt2_policy, tokenizer, score, PROMPTS[2:], PROMPTS[:2], gold=score, max_new_tokens=7)
        world.facts = {"made": "here"}
        return world

    result = run_warp(my_world(), config=CONFIG.replace(iterations=1, max_new_tokens=7), out=tmp_path / "run",
                      progress=False)
    points = result.front((0.0, 1.0), samples=2)
    assert all(np.isfinite(point["reward"]) and point["reward"] == point["gold"] for point in points)
    rewards, gold = limit_rewards(my_world(), samples=16)
    assert rewards.shape == gold.shape == (2, 16)
    assert optimal_front(my_world(), samples=64, min_ess=0)
    (again,) = run_experiment(my_world(), {"": CONFIG.replace(iterations=1, max_new_tokens=7)}, [0],
                              progress=False).results[""]
    assert_same_weights(again.weights(), result.weights(), 1e-9)


def test_the_limits_completions_are_as_long_as_the_tasks(gpt2_policy, tokenizer):
    from warp_lite.evaluation.limit import best_of_n_front, optimal_front

    lengths = []

    def reward(prompts, completions, completion_ids):
        lengths.extend(map(len, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    task = Task.of(gpt2_policy, tokenizer, reward, PROMPTS, PROMPTS[:3], max_new_tokens=3)
    for front in (optimal_front, best_of_n_front):
        front(task, samples=32)
        assert max(lengths) == 3
        lengths.clear()


def test_what_needs_no_torch_does_not_import_it():
    program = "import sys, warp_lite, warp_lite.config, warp_lite.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
