"""The three places that name packages agree: pyproject.toml (ranges), requirements.txt (the lock), environment.yml."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT_TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PROJECT_TEXT)["project"]
LOCK_TEXT = (ROOT / "requirements.txt").read_text(encoding="utf-8")
LOCK = [Requirement(line.split("#")[0]) for line in LOCK_TEXT.splitlines() if re.match(r"\w", line)]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))

CHOSEN_BY_TORCH = re.compile(r"nvidia|cuda|triton")  # differs between builds of one torch version

PLATFORMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    "macos": {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    "windows": {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
}
PYTHONS = ["3.11.0", "3.11.9", "3.12.3", "3.13.1"]


def pins_on(environment):
    """Name → version of what the lock installs there."""
    applying = [pin for pin in LOCK if pin.marker is None or pin.marker.evaluate(environment)]
    pins = {canonicalize_name(pin.name): only_version(pin) for pin in applying}
    assert len(pins) == len(applying), "a package is pinned twice in one environment"
    return pins


def only_version(pin):
    (specifier,) = pin.specifier
    return Version(specifier.version)


def direct_dependencies():
    """Requirements of the core and of the extras."""
    texts = sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
    requirements = [Requirement(text) for text in texts]
    return [r for r in requirements if r.name != PROJECT["name"]]


def imported_modules(path):
    """Top-level names of what a file imports, anywhere in it, that are not its neighbours or the standard library."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    neighbours = {p.stem for p in [*path.parent.iterdir(), *ROOT.iterdir(), *(ROOT / "tests").iterdir()]}
    return {name.partition(".")[0] for name in names} - neighbours - sys.stdlib_module_names


def installed_version(name):
    """Without the local part: torch 2.13.0+cpu is torch 2.13.0."""
    try:
        return Version(Version(metadata.version(name)).public)
    except metadata.PackageNotFoundError:
        return None


def test_every_dependency_is_pinned_inside_its_range():
    pins = pins_on(default_environment())
    for requirement in direct_dependencies():
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name}: not in requirements.txt; run `make lock`"
        assert pin in requirement.specifier, f"{requirement}: requirements.txt pins {pin}; run `make lock`"


def test_everything_that_is_imported_is_declared():
    declared = {canonicalize_name(r.name) for r in direct_dependencies()}
    distributions = metadata.packages_distributions()
    for path in [*(ROOT / "warp_lite").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for module in imported_modules(path):
            names = {canonicalize_name(name) for name in distributions.get(module, [module])}
            assert names & declared, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not name"


def test_the_dev_extra_brings_every_other_extra():
    (own,) = [Requirement(t) for t in PROJECT["optional-dependencies"]["dev"] if t.startswith(PROJECT["name"])]
    assert own.extras == set(PROJECT["optional-dependencies"]) - {"dev"}


def test_the_core_has_lower_bounds_and_no_caps():
    for text in PROJECT["dependencies"]:
        assert [s.operator for s in Requirement(text).specifier] == [">="], text


def test_the_lock_pins_one_plain_public_version_each():
    for pin in LOCK:
        assert [s.operator for s in pin.specifier] == ["=="] and not pin.extras, f"{pin}: not an exact pin"
        assert only_version(pin).local is None, f"{pin}: a local build is to be had on one machine only"
        assert not CHOSEN_BY_TORCH.match(pin.name), f"{pin}: torch brings the one its build needs"


def test_the_lock_names_no_index_no_path_and_nothing_editable():
    assert not re.search(r"^[^#\w]|://|@ ", LOCK_TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_lock_holds_what_is_required_and_nothing_else(platform, python):
    """Walks the installed packages' own metadata as it would read on that platform and Python version."""
    environment = default_environment() | PLATFORMS[platform]
    environment |= {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    pins = pins_on(environment)
    seen = set()
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in direct_dependencies()]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if installed_version(name) != pins.get(name):
            continue  # no metadata of this pin here, as for another platform's package
        for text in metadata.requires(name) or []:
            r = Requirement(text)
            if CHOSEN_BY_TORCH.match(r.name):
                continue
            if r.marker is None or any(r.marker.evaluate(environment | {"extra": e}) for e in extras | {""}):
                todo.append((canonicalize_name(r.name), frozenset(r.extras)))
    required = {name for name, _ in seen}
    assert required - set(pins) == set()
    assert {name for name, pin in pins.items() if installed_version(name) == pin} <= required


def test_every_installed_package_has_its_locked_version():
    pins = pins_on(default_environment())
    found = {name: installed_version(name) for name in pins}
    wrong = {name: str(v) for name, v in found.items() if v is not None and v != pins[name]}
    assert wrong == {}, "the lock and .venv differ; `make setup` follows the lock, `make lock` follows .venv"


def test_conda_brings_python_and_pip_and_the_lock_the_rest():
    assert [c for c in CONDA["channels"] if c != "nodefaults"] == ["conda-forge"]
    *from_conda, from_pip = CONDA["dependencies"]
    assert [re.split("[=<>]", d)[0] for d in from_conda] == ["python", "pip"]
    assert from_pip == {"pip": ["-r requirements.txt", "-e ."]}


def test_the_conda_python_is_one_the_package_supports():
    version = CONDA["dependencies"][0].removeprefix("python=")
    assert Version(version) in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_make_setup_installs_the_lock_and_then_the_package():
    if shutil.which("make") is None:
        pytest.skip("no make on this machine; environment.yml is the way in")
    command = ["make", "--always-make", "--dry-run", "setup"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installs = re.findall(r"-m pip install (.*)", printed)
    assert installs == ["-r requirements.txt", "--no-deps --no-build-isolation -e ."]


def test_the_repository_address_stands_once():
    address = PROJECT["urls"]["Repository"]
    assert re.fullmatch(r"https://github\.com/[^/]+/warp-lite", address)
    assert PROJECT_TEXT.count(address) == 1


@pytest.mark.parametrize("program, environment, expected", [
    ("import warp_lite", {}, "3000"),
    ("import warp_lite.cli", {}, "3000"),
    ("import warp_lite.notebooks.start", {}, "3000"),
    ("import warp_lite", {"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ("import warp_lite", {"GOMP_SPINCOUNT": "1000"}, "1000"),
    ("import warp_lite", {"KMP_BLOCKTIME": "1"}, None),
    ("sys.modules['torch'] = None\nimport warp_lite", {}, None),  # too late: torch has read it
])
def test_waiting_threads_let_others_have_the_core_unless_the_user_says_how_they_wait(program, environment, expected):
    own = {name: value for name, value in os.environ.items()
           if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    program = f"import os, sys\n{program}\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", program], env={**own, **environment}, capture_output=True, text=True)
    assert done.stdout.strip() == str(expected), done.stderr


def test_torch_reads_how_threads_wait_after_the_package_has_set_it():
    """The libgomp in torch's wheels says so itself; other builds of OpenMP have other words."""
    own = {name: value for name, value in os.environ.items()
           if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    done = subprocess.run([sys.executable, "-c", "import warp_lite, torch"], capture_output=True, text=True,
                          env={**own, "OMP_DISPLAY_ENV": "VERBOSE"})
    if "GOMP" not in done.stderr:
        pytest.skip("torch runs on another OpenMP than libgomp")
    assert "GOMP_SPINCOUNT = '3000'" in done.stderr


@pytest.mark.slow
def test_tests_have_the_same_names_in_every_process():
    """Else the processes that share them out refuse to start: a name may hold no address and no order of a set."""
    collecting = [subprocess.Popen(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"], cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True) for seed in ("0", "1")]
    first, second = (process.communicate()[0].splitlines()[:-1] for process in collecting)
    assert len(first) > 1000 and first == second


def test_the_workflow_keeps_what_the_browser_shows():
    """The pages are to be looked at: a test of pictures finds no ugliness."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]
    test, upload = jobs["test"]["steps"][-2:]
    assert test["run"] == ".ci/run" and upload["uses"].startswith("actions/upload-artifact@")
    assert upload["with"]["path"] == test["env"]["WARP_LITE_SCREENSHOTS"] and upload["if"] == "always()"
