"""Fuzzed input: only documented errors, one line and exit code 2 from the command line, and no input changed.

The default is a few hundred cases, the same each time; WARP_LITE_FUZZ=N takes N times a tenth as many, new ones.
"""

import contextlib
import copy
import io
import json
import math
import os
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from short_run import CONFIG, PROMPTS, files

from warp_lite import EMAAnchor, WarpConfig, angles, lerp, liti, slerp, task_vector
from warp_lite.cli import main, parse_etas, read_prompts
from warp_lite.policies.loading import save_policy
from warp_lite.policies.prompts import encode_prompts

MORE = os.environ.get("WARP_LITE_FUZZ")


def fuzz(cases):
    """So many cases by default, the same each time."""
    return settings(max_examples=cases * int(MORE) // 10 if MORE else cases, derandomize=not MORE, deadline=None,
                    database=None, suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def documented():
    """Nothing is raised but what docstrings say."""
    with contextlib.suppress(ValueError, TypeError):
        yield


def command(*arguments):
    """The exit code of a command; if it is not 0 there is one line on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main([str(argument) for argument in arguments])
    if code:
        line = err.getvalue()
        assert code == 2 and line.startswith("warp-lite: ") and line.count("\n") == 1, line
    return code


# --- weights --------------------------------------------------------------------------------

numbers = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3e4, -6e4, 1e-30, 1e30, 3e38, math.nan, math.inf])
ordinary = st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.25, 100.0])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool,
                          torch.complex64])
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def tensors(draw, shape, dtype):
    values = st.lists(draw(st.sampled_from([ordinary, ordinary, numbers])), min_size=math.prod(shape),
                      max_size=math.prod(shape))
    tensor = torch.tensor(draw(values), dtype=torch.float64).reshape(shape)
    if not dtype.is_floating_point and not dtype.is_complex:
        tensor = tensor.nan_to_num(0, 0, 0).clamp(-100, 100)
    return tensor.to(dtype)


@st.composite
def families(draw):
    """A state dict and some that fit it, or in one place do not."""
    layout = draw(st.dictionaries(st.sampled_from("abc"), st.tuples(shapes, dtypes), max_size=3))
    states = [{name: draw(tensors(*kind)) for name, kind in layout.items()} for _ in range(draw(st.integers(1, 4)))]
    init, *others = states
    if others and draw(st.booleans()):
        other, name = draw(st.sampled_from(others)), draw(st.sampled_from("abcd"))
        change = draw(st.sampled_from(["drop", "shape", "dtype", "thing"]))
        if change == "drop":
            other.pop(name, None)
        elif change == "thing":
            other[name] = draw(st.sampled_from([None, 1.0, "weights", [1.0]]))
        else:
            kind = (draw(shapes), torch.float32) if change == "shape" else ((2,), draw(dtypes))
            other[name] = draw(tensors(*kind))
    return init, others


def image(value):
    """Something equal for equal tensors, NaN included."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return repr(value)


@fuzz(120)
@given(families(), st.floats(), st.one_of(st.none(), st.lists(st.floats(), max_size=4)))
def test_arithmetic_on_any_state_dicts_gives_finite_weights_or_a_documented_error(family, number, weights):
    init, others = family
    before = [{name: image(value) for name, value in state.items()} for state in (init, *others)]
    first = others[0] if others else {}

    def anchor():
        average = EMAAnchor(init, number)
        average.update(first)
        return average.state_dict()

    for operation in (lambda: slerp(init, others, weights), lambda: lerp(init, others, weights), anchor,
                      lambda: liti(init, first, number), lambda: task_vector(first, init)):
        with documented():
            result = operation()
            assert [(n, t.dtype, t.shape) for n, t in init.items()] == \
                [(n, t.dtype, t.shape) for n, t in result.items()]
            sound = operation is anchor or all(torch.isfinite(t).all() for t in result.values())
            assert sound, "only an anchor, which runs at every step, does not look at values"
    with documented():
        assert all(torch.isfinite(t).all() for t in angles(init, others).values())
    assert [{name: image(value) for name, value in state.items()} for state in (init, *others)] == before


@st.composite
def damages(draw):
    """What happens to a file: a function of its bytes."""
    at, junk = draw(st.floats(0, 1)), draw(st.binary(max_size=12))
    kind = draw(st.sampled_from(["cut", "insert", "overwrite", "length", "empty"]))

    def damage(data):
        k = int(at * len(data))
        return {"cut": data[:k], "insert": data[:k] + junk + data[k:],
                "overwrite": data[:k] + junk + data[k + len(junk):],
                "length": struct.pack("<Q", int(at * 2**40)) + data[8:], "empty": b""}[kind]
    return damage


@fuzz(40)
@given(families(), damages() | st.none(), st.integers(0, 2), st.sampled_from(["config.json", "model.safetensors"]))
def test_merging_any_checkpoints_is_done_or_refused_in_one_line(family, damage, which, name):
    init, others = family
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        for n, state in enumerate([init, *others, init][:3]):
            (place / str(n)).mkdir()
            (place / str(n) / "config.json").write_text('{"model_type": "gpt2"}')
            sound = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
            save_file(sound, place / str(n) / "model.safetensors")
        target = place / str(which) / name
        if damage and target.is_file():
            target.write_bytes(damage(target.read_bytes()))
        before = files(place)
        code = command("merge", "--init", place / "0", "--policies", place / "1", place / "2", "--out", place / "out")
        assert (place / "out").exists() == (code == 0)
        assert {k: v for k, v in files(place).items() if not k.startswith("out/")} == before


# --- settings -------------------------------------------------------------------------------

NAMES = st.sampled_from([*vars(CONFIG), "bata", "", "self"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
                    st.sampled_from([10**400, "ema", "lerp", "none", 1e-320, 2**63]))
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=3), inner, max_size=3), max_leaves=5)


@fuzz(80)
@given(st.dictionaries(NAMES.filter(bool), anything, max_size=3), st.lists(st.tuples(NAMES, st.text(max_size=8)),
                                                                          max_size=3))
def test_any_settings_make_a_config_or_a_documented_error(changes, texts):
    with documented():
        assert WarpConfig().replace(**changes) == CONFIG.replace(**{**vars(WarpConfig()), **changes})
    with documented():
        WarpConfig(**changes)
    with documented():
        WarpConfig().with_text([f"{name}={text}" for name, text in texts])


@fuzz(40)
@given(st.lists(st.text(max_size=12) | st.builds("{}={}".format, NAMES, scalars), max_size=3), st.text(max_size=8))
def test_any_text_on_the_command_line_is_one_line(texts, other):
    sets = [f"--set={text}" for text in texts]
    gone = ("--policy", "./gone", "--reward", "gone:gone", "--prompts", "./gone.txt", "--out", "./gone")
    assert command("run", *gone, *sets) == 2
    assert command("front", "./gone", f"--etas={other}") == 2
    assert command("merge", "--init", "./gone", "--policies", "./gone", f"--eta={other}", "--out", "./gone") == 2
    assert command("run", "--preset", f"x{other}", "--out", "./gone") == 2
    with documented():
        assert all(0 <= eta < math.inf for eta in parse_etas(other))


# --- prompts --------------------------------------------------------------------------------

odd = st.sampled_from(["\ud800", "\udfff", "\u202e", "\u200b", "\u200d", "\u2066", "\0", "\x1b[2J", "\u2028", "\x85",
                       "\x0c", "\ufeff", "\U0001f469\u200d\U0001f680", "e\u0301", "שלום", "مرحبا", " ", "\t",
                       "film", "<eos>"])
words = st.lists(odd | st.text(max_size=4), max_size=4).map("".join)


def write_prompts(path, texts, lines):
    """A file of prompts, odd in whatever way the texts are."""
    rows = [json.dumps({"prompt": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)] + lines
    rows = rows if path.suffix == ".jsonl" else [*texts, *lines]
    path.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
    return path


extra = st.lists(st.sampled_from(["{", "[]", '{"prompt": 3}', '{"prompt": null}', '{"text": "a"}', "[" * 9999, "null"]),
                 max_size=1)
suffixes = st.sampled_from([".txt", ".jsonl"])


@fuzz(80)
@given(st.lists(words, max_size=4), extra, suffixes)
def test_any_prompts_are_read_and_encoded_or_refused(tokenizer, texts, lines, suffix):
    with tempfile.TemporaryDirectory() as place:
        path = write_prompts(Path(place) / f"prompts{suffix}", texts, lines)
        before = path.read_bytes()
        with documented():
            prompts = read_prompts(str(path))
            if suffix == ".jsonl" and not lines:
                assert prompts == texts
            encoded = encode_prompts(tokenizer, prompts)
            assert encoded.texts == prompts and bool(encoded.mask.any(-1).all())
        assert path.read_bytes() == before


@pytest.fixture(scope="module")
def task(policy_of, tokenizer, tmp_path_factory):
    """A policy's folder and a finished run of it, by the command line."""
    place = tmp_path_factory.mktemp("task")
    save_policy(policy_of("gpt2", dtype=torch.float32), tokenizer, place / "policy")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    with small():
        assert command(*arguments(place, place / "prompts.txt", place / "run")) == 0
    return place


def arguments(place, prompts, out):
    """`warp-lite run`, as short as it can be."""
    brief = [f"--set={s}" for s in ("iterations=1", "runs=2", "steps=1", "batch_size=2", "max_new_tokens=2")]
    return ["run", "--policy", place / "policy", "--reward", "short_run:score", "--prompts", prompts, "--out", out,
            *brief]


@contextlib.contextmanager
def small():
    """Fronts of few samples, without a picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warp_lite.result.EVALUATION_SAMPLES", 8)
        patch.setattr("warp_lite.training.iteration.TRAJECTORY_SAMPLES", 4)
        patch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 4)
        patch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).write_bytes(b""))
        patch.setattr("warp_lite.storage.files.sync", lambda path: None)
        yield


@pytest.mark.slow
@fuzz(12)
@given(st.lists(words, max_size=5), extra, suffixes)
def test_a_run_on_any_prompts_ends_or_is_refused_in_one_line(task, texts, lines, suffix):
    with tempfile.TemporaryDirectory() as place, small():
        path = write_prompts(Path(place) / f"prompts{suffix}", [*texts, "this film", "that plot"], lines)
        before = path.read_bytes()
        code = command(*arguments(task, path, Path(place) / "out"))
        assert path.read_bytes() == before and (Path(place) / "out" / "front.json").is_file() == (code == 0)


# --- run folders ----------------------------------------------------------------------------

JSON = ["config.json", "prompts.json", "front.json", "sft/config.json", "sft/DONE", "sft/tokenizer_config.json",
        "iteration-1/DONE", "iteration-1/run-1/DONE", "iteration-1/run-2/metrics.jsonl",
        "iteration-1/run-1/trajectory.jsonl", "iteration-1/merged/config.json"]


@st.composite
def edits(draw):
    """What happens to a JSON file: one place in it gets another value or goes."""
    picks, new, kind = draw(st.lists(st.integers(0, 50), max_size=4)), draw(anything), draw(st.integers(0, 3))

    def edit(data):
        value = whole = json.loads(data.splitlines()[0] if data.startswith(b'{"') else data)
        for depth, pick in enumerate(picks):
            if not isinstance(value, (dict, list)) or not value:
                break
            key = list(value)[pick % len(value)] if isinstance(value, dict) else pick % len(value)
            if depth == len(picks) - 1 or not isinstance(value[key], (dict, list)) or not value[key]:
                if kind == 0:
                    del value[key]
                else:
                    value[key] = new
                break
            value = value[key]
        return (json.dumps(whole) + "\n").encode()
    return edit


@pytest.mark.slow
@fuzz(40)
@given(st.sampled_from(JSON), edits() | damages(), st.booleans())
def test_any_json_in_a_run_folder_is_read_or_refused_in_one_line(task, name, change, resume):
    run = task / "changed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(task / "run", run)
    target = run / name
    target.write_bytes(change(target.read_bytes()))
    before = copy.deepcopy(files(run))
    with small():
        if resume:
            code = command(*arguments(task, task / "prompts.txt", run), "--resume")
        else:
            code = command("front", run, "--etas", "0,1")
    assert files(task / "run") and (code == 0 or files(run) == before)
