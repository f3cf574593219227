"""What a result depends on: the code under what is imported, package versions; and what a result says of itself."""

import shutil
import subprocess
import sys
from functools import partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from short_run import assert_same_weights

from warp_lite.averaging.state_dicts import parameters
from warp_lite.config import WarpConfig
from warp_lite.evaluation.limit import limit_rewards
from warp_lite.experiment import run_experiment
from warp_lite.policies.prompts import encode_prompts
from warp_lite.result import WarpResult
from warp_lite.rewards.calling import SeveralRewards, mean_reward
from warp_lite.storage.files import read_json
from warp_lite.storage.provenance import (
    LIBRARIES,
    PACKAGE,
    modules_used,
    package_versions,
    provenance,
    source_hash,
)
from warp_lite.task import Task
from warp_lite.training import kept_runs
from warp_lite.training.kept_runs import KeptRuns, reward_key
from warp_lite.training.run import Run
from warp_lite.viewing.front_report import fingerprint

PROMPTS = ["this film was", "that plot was", "this plot is", "but that film is"]
CONFIG = WarpConfig(iterations=2, runs=2, steps=2, batch_size=2, max_new_tokens=4, eval_every=0)
STUDIES = ("warp_lite.evidence.studies", "warp_lite.evidence.noise", "warp_lite.evidence.tuning")


def small_package(folder: Path, **files: str) -> Path:
    """A package `small` of those files, a double underscore for a folder."""
    for name, text in {"__init__": "", **files}.items():
        path = folder / "small" / ("__init__.py" if name == "__init__" else f"{name.replace('__', '/')}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "small"


FILES = {"study": "from .wing.tool import work\n\n\ndef run():\n    from . import late\n    return work(late)\n",
         "wing__tool": "import small.other.deep\nfrom ..base import one\n\n\ndef work(x):\n    return one\n",
         "base": "one = 1\n", "late": "late = 1\n", "other__deep": "two = 2\n",
         "drawing": "from .study import run\n"}


def test_the_modules_used_are_those_imported_at_any_depth_also_inside_functions(tmp_path):
    package = small_package(tmp_path, **FILES)
    assert list(modules_used("small.study", package=package)) == [
        "small", "small.base", "small.late", "small.other.deep", "small.study", "small.wing.tool"]


@pytest.mark.parametrize("name", ["base", "late", "other__deep", "wing__tool", "study"])
def test_a_change_of_any_module_that_is_used_changes_the_hash(name, tmp_path):
    before = source_hash("small.study", package=small_package(tmp_path / "a", **FILES))
    changed = small_package(tmp_path / "b", **{**FILES, name: FILES[name].replace("1", "7").replace("2", "8")
                                                        .replace("work(late)", "None").replace("return one", "pass")})
    assert source_hash("small.study", package=changed) != before


def test_what_is_not_used_and_what_is_not_code_leaves_the_hash(tmp_path):
    before = source_hash("small.study", package=small_package(tmp_path / "a", **FILES))
    texts = {name: f'"""Words."""\n# more\n{text}' for name, text in FILES.items()} | {"drawing": "colour = 3\n"}
    texts["study"] = texts["study"].replace("def run():\n", 'def run():\n    """What it does."""\n\n')
    assert source_hash("small.study", package=small_package(tmp_path / "b", **texts)) == before


def test_a_module_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no module 'small.gone'"):
        source_hash("small.gone", package=small_package(tmp_path))


def test_every_module_that_python_loads_with_the_studies_is_followed():
    program = (f"import sys, {', '.join(STUDIES)}\n"
               "print(*(name for name, module in sys.modules.items()"
               " if name.startswith('warp_lite') and not hasattr(module, '__path__')))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    by_packages = {"warp_lite.rewards.loading"}  # rewards/__init__ exports it; no study calls it
    assert len(loaded) > 30 and loaded - by_packages <= modules_used(*STUDIES).keys()


def test_no_study_run_or_front_depends_on_how_it_is_drawn_or_reported():
    for module in (*STUDIES, "warp_lite.experiment", "warp_lite.result", "warp_lite.evaluation.limit"):
        for name in modules_used(module):
            assert not name.startswith(("warp_lite.viewing", "warp_lite.notebooks", "warp_lite.cli")), (module, name)
            shown = ("report", "wording", "drawing", "claims", "effects")
            assert name not in {f"warp_lite.evidence.{part}" for part in shown}


@pytest.mark.parametrize("edited", ["averaging/liti.py", "training/reinforce.py", "policies/sampling.py",
                                    "evaluation/metrics.py", "rewards/bradley_terry.py", "worlds/grammar.py"])
def test_a_changed_function_in_another_module_changes_what_studies_depend_on(edited, tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "warp_lite", ignore=shutil.ignore_patterns("__pycache__"))
    assert source_hash(*STUDIES, package=copy) == source_hash(*STUDIES)
    other = shutil.copytree(PACKAGE, tmp_path / "edited" / "warp_lite", ignore=shutil.ignore_patterns("__pycache__"))
    path = other / edited
    path.write_text(path.read_text(encoding="utf-8") + "\n\ndef added():\n    return 1\n", encoding="utf-8")
    assert source_hash(*STUDIES, package=other) != source_hash(*STUDIES)
    other = shutil.copytree(PACKAGE, tmp_path / "drawn" / "warp_lite", ignore=shutil.ignore_patterns("__pycache__"))
    for drawing in ("viewing/plots.py", "evidence/report.py", "evidence/wording.py", "evidence/drawing.py",
                    "notebooks/figures.py"):
        (other / drawing).write_text("drawn = 1\n")
    assert source_hash(*STUDIES, package=other) == source_hash(*STUDIES)


def test_provenance_names_every_library_that_numbers_depend_on():
    assert set(provenance()["packages"]) == set(LIBRARIES) >= {"torch", "transformers", "numpy", "tokenizers"}
    assert package_versions()["torch"] == torch.__version__


# --- kept runs ------------------------------------------------------------------------------


def length_reward(prompts, completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


class Priced:
    """A reward less a price."""

    def __init__(self, price, tensor=None, inner=None):
        self.price, self.tensor, self.inner = price, tensor, inner

    def from_ids(self, prompts, ids, mask):
        return -self.price * mask.sum(-1).double()


@pytest.fixture
def kept(gpt2_policy, tokenizer, tmp_path):
    def make(code="code", prompts=PROMPTS, samples=1):
        encoded = encode_prompts(tokenizer, prompts)
        return KeptRuns(tmp_path / "kept", gpt2_policy, encoded, encoded, samples, code)
    return make


def test_a_kept_run_is_found_by_the_code_the_versions_and_the_reward_that_made_it(kept, gpt2_policy, monkeypatch):
    sft = parameters(gpt2_policy)
    run = Run(CONFIG, 1, 1, sft, sft, length_reward)
    path = kept().path(run)
    assert kept().path(run) == path
    others = [kept("other code").path(run), kept(samples=2).path(run), kept(prompts=PROMPTS[:3]).path(run),
              kept().path(Run(CONFIG, 1, 1, sft, sft, Priced(0.1))),
              kept().path(Run(CONFIG, 1, 1, sft, sft, Priced(0.2)))]
    monkeypatch.setattr(kept_runs, "package_versions", lambda: {"torch": "9"})
    others.append(kept().path(run))
    assert len({path, *others}) == 7


def test_a_reward_is_known_by_its_source_its_settings_and_the_weights_in_it(world):
    keys = [reward_key(reward) for reward in (
        length_reward, lambda prompts, completions: [0.0], Priced(1.0), Priced(2.0), Priced(1.0, torch.zeros(2)),
        Priced(1.0, torch.ones(2)), Priced(1.0, inner=Priced(3.0)), Priced(1.0, inner=Priced(4.0)), world.reward,
        [length_reward, world.reward])]
    assert len(set(keys)) == len(keys)
    assert reward_key(Priced(1.0, inner=Priced(3.0))) == keys[6]
    world.reward.head.data[0] += 1
    try:
        assert reward_key(world.reward) != keys[8]
    finally:
        world.reward.head.data[0] -= 1


def scaled(prompts, completions, scale=1):
    return [scale * len(completion) for completion in completions]


def closed_over(scale):
    return lambda prompts, completions: [scale * len(completion) for completion in completions]


def with_default(scale):
    def reward(prompts, completions, scale=scale):
        return [scale * len(completion) for completion in completions]
    return reward


class Holding:
    """A reward that holds its scale, and has a method that is one too; it also holds itself."""

    def __init__(self, scale):
        self.scale, self.itself = scale, self

    def __call__(self, prompts, completions):
        return [self.scale * len(completion) for completion in completions]

    score = __call__


class Slotted:
    """A reward without a dict."""

    __slots__ = "scale"

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, prompts, completions):
        return [self.scale * len(completion) for completion in completions]


LIKE_REWARDS = {
    "partial": lambda scale: partial(scaled, scale=scale), "closure": closed_over, "default": with_default,
    "object": Holding, "method": lambda scale: Holding(scale).score, "slots": Slotted,
    "list": lambda scale: Holding([0, scale]), "dict": lambda scale: Holding({"a": {"b": scale}}),
    "set": lambda scale: Holding({scale, "a", "b"}), "array": lambda scale: Holding(np.array([scale])),
    "wrapped": lambda scale: wraps(scaled)(closed_over(scale)),
    "mean": lambda scale: mean_reward([len, Holding(scale)]),
    "weighted": lambda scale: SeveralRewards([len, scaled], [1.0, scale]),
    "in one line": lambda scale: [lambda prompts: 1, lambda prompts: 2][scale - 1],
    "module": lambda scale: torch.nn.Linear(1, 1).requires_grad_(False).apply(
        lambda module: module.weight.fill_(scale) and module.bias.fill_(0)),
}


@pytest.mark.parametrize("kind", LIKE_REWARDS)
def test_rewards_of_one_source_are_told_apart_by_what_they_hold(kind):
    make = LIKE_REWARDS[kind]
    assert reward_key(make(1)) == reward_key(make(1)) != reward_key(make(2))


def test_runs_of_rewards_of_one_source_are_not_taken_for_each_other(gpt2_policy, tokenizer, tmp_path):
    task = Task.of(gpt2_policy, tokenizer, closed_over(1), PROMPTS, PROMPTS[:2], max_new_tokens=4)
    configs = {"a": CONFIG, "b": CONFIG}
    rewards = {"a": partial(scaled, scale=1), "b": partial(scaled, scale=-1)}
    whole, kept, again = (run_experiment(task, configs, [0], rewards=rewards, progress=False, out=out)
                          for out in (None, tmp_path / "kept", tmp_path / "kept"))
    for name in configs:
        for result in (kept, again):
            assert_same_weights(result.results[name][0].iterations[-1].merged,
                                whole.results[name][0].iterations[-1].merged)
    first, second = (kept.results[name][0].iterations[-1].merged for name in configs)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_weights_are_hashed_once_however_often_a_run_is_looked_for(kept, gpt2_policy, monkeypatch):
    hashed = []
    weights_hash = kept_runs.weights_hash
    monkeypatch.setattr(kept_runs, "weights_hash", lambda weights: hashed.append(1) or weights_hash(weights))
    sft = parameters(gpt2_policy)
    ours = kept()
    for m in (1, 2, 3):
        ours.path(Run(CONFIG, 1, m, sft, sft, length_reward))
    assert len(hashed) == 1


def test_an_experiment_hashes_each_weights_once_in_all_its_iterations(gpt2_policy, tokenizer, tmp_path, monkeypatch):
    hashed, made = [], []
    weights_hash, init = kept_runs.weights_hash, KeptRuns.__init__
    monkeypatch.setattr(kept_runs, "weights_hash", lambda weights: hashed.append(1) or weights_hash(weights))
    monkeypatch.setattr(KeptRuns, "__init__", lambda self, *args: made.append(1) or init(self, *args))
    task = Task.of(gpt2_policy, tokenizer, length_reward, PROMPTS, PROMPTS[:2], max_new_tokens=CONFIG.max_new_tokens)
    for _ in range(2):  # trained, then read
        run_experiment(task, {"a": CONFIG}, (0, 1), progress=False, out=tmp_path)
        assert len(hashed) == 1 + 2 and len(made) == 1  # θ_sft, and where each seed's second iteration starts
        hashed.clear()
        made.clear()


def test_a_kept_run_says_what_made_it(gpt2_policy, tokenizer, tmp_path):
    task = Task.of(gpt2_policy, tokenizer, length_reward, PROMPTS, PROMPTS[:2], max_new_tokens=CONFIG.max_new_tokens)
    run_experiment(task, {"a": CONFIG}, (0,), progress=False, out=tmp_path)
    for path in tmp_path.glob("run-*.json"):
        assert read_json(path)["provenance"]["packages"] == package_versions()


# --- fronts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what, value", [("source_hash", "other code"), ("package_versions", {"torch": "9"})])
def test_a_front_and_its_limit_are_measured_again_by_other_code(what, value, world, tmp_path, monkeypatch):
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path))
    result = WarpResult(world.first(3), CONFIG)
    before = fingerprint(result, (0.0, 1.0))
    assert fingerprint(result, (0.0, 1.0)) == before
    limit_rewards(result.task, 4)
    limit_rewards(result.task, 4)
    assert len(list(tmp_path.iterdir())) == 1
    for module in ("viewing.front_report", "evaluation.limit"):
        monkeypatch.setattr(f"warp_lite.{module}.{what}", lambda *modules: value)
    limit_rewards(result.task, 4)
    assert fingerprint(result, (0.0, 1.0)) != before and len(list(tmp_path.iterdir())) == 2
