"""The package as a plain install leaves it, and the worlds that the notebooks run in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from make_world import make_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder into which the package was installed from a copy of the sources, non-editable."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "README.md").touch()
    shutil.copytree(ROOT / "warp_lite", source / "warp_lite", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
                    "--no-index", "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture(scope="session")
def environment(installed, world) -> dict[str, str]:
    """What a notebook's kernel finds: the installed package, fast mode, the cache of the tiny worlds."""
    return {**os.environ, "PYTHONPATH": str(installed), "WARP_LITE_FAST": "1"}


@pytest.fixture(scope="session")
def model(world, tmp_path_factory):
    """`model("folder")`: what goes into MODEL; the world is trained or written before it is returned."""
    from warp_lite import reviews_world

    made = {}

    def name_of(kind: str) -> str:
        if kind == "folder":
            if kind not in made:
                made[kind] = make_world(world, tmp_path_factory.mktemp("worlds") / "folder")
            return str(made[kind])
        architecture = {"tiny-gpt2": "gpt2", "tiny-gemma": "gemma3", "gpt2-imdb": "gpt2", "gemma-imdb": "gemma3",
                        "smollm2": "gpt2"}[kind]
        reviews_world(architecture, progress=False)
        return kind

    return name_of
