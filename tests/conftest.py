"""What the tests share: a tiny tokenizer, random tiny policies of four architectures, the trained tiny world."""

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network; read when the library is imported
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as `import warp_lite` sets it; torch is imported first here

import pytest
import torch
from filelock import FileLock
from tiny import ARCHITECTURES, make_policy, make_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """18 tokens, <bos> in front of every text, <pad> and <eos> distinct."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def policy_of(tokenizer):
    """`policy_of("gpt2", dtype=…, seed=…, …)`: a new random tiny policy for `tokenizer`."""
    def make(architecture, **settings):
        return make_policy(architecture, len(tokenizer), **settings)
    return make


def _shared_fixture(architecture):
    @pytest.fixture(scope="session", name=f"{architecture}_policy")
    def policy(policy_of):
        """A random tiny policy in float64, shared: leave its weights as they are."""
        return policy_of(architecture)
    return policy


gpt2_policy, gemma3_policy, llama_policy, qwen2_policy = map(_shared_fixture, ARCHITECTURES)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world `reviews_world("gpt2")`: from $WARP_LITE_CACHE if set, else trained once for all workers.

    While tests run, $WARP_LITE_CACHE names its folder, so that child processes find it too.
    """
    from warp_lite import reviews_world

    given = os.environ.get("WARP_LITE_CACHE")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = given or str(shared / "warp-lite-cache")
    os.makedirs(folder, exist_ok=True)
    os.environ["WARP_LITE_CACHE"] = folder
    with FileLock(os.path.join(folder, "tests.lock")):
        made = reviews_world("gpt2", progress=False)
    yield made
    if given is None:
        del os.environ["WARP_LITE_CACHE"]


@pytest.fixture
def here(task, tmp_path, monkeypatch):
    """A copy of the folder `task` of a test module, in which we are; evaluation with few samples."""
    shutil.copytree(task, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warp_lite.result.EVALUATION_SAMPLES", 32)
    monkeypatch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 64)
    return tmp_path
