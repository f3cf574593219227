"""Streaming merges of checkpoints on disk."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from warp_lite.averaging import checkpoints
from warp_lite.averaging.checkpoints import merge_checkpoints
from warp_lite.averaging.liti import liti
from warp_lite.averaging.slerp import CHUNK, lerp, slerp

SHAPES = {"wte.weight": (CHUNK // 64 + 3, 130), "h.0.attn.weight": (8, 24), "h.0.attn.bias": (24,), "scale": ()}


def random_model(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def save(folder, state, shards=None):
    """A folder as transformers saves it, with a config, a tokenizer, and things that must not be copied."""
    folder.mkdir(parents=True)
    if shards is None:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {name: file for file, names in shards.items() for name in names}
        for file, names in shards.items():
            save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "trainer_state.json"):
        (folder / name).write_text(json.dumps({"from": folder.name}))
    for name in ("merges.txt", "modeling.py", "training_args.bin"):
        (folder / name).write_text(folder.name)
    return folder


TWO_SHARDS = {"model-00001-of-00002.safetensors": ["wte.weight", "scale"],
              "model-00002-of-00002.safetensors": ["h.0.attn.weight", "h.0.attn.bias"]}


@pytest.fixture
def folders(tmp_path):
    return [save(tmp_path / name, random_model(seed)) for seed, name in enumerate(("init", "one", "two"))]


def hashes(*folders):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest()
            for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def remains(parent):
    """What a merge has left behind that no reader of checkpoints should find."""
    return sorted(path.name for path in parent.iterdir() if path.name.endswith(".part"))


# The result


@pytest.mark.parametrize("method, in_memory", [("slerp", slerp), ("lerp", lerp)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1.5])
def test_a_merge_on_disk_is_the_merge_in_memory(tmp_path, method, in_memory, dtype, eta):
    states = [random_model(seed, dtype) for seed in range(4)]
    init, *policies = [save(tmp_path / str(seed), state) for seed, state in enumerate(states)]
    summary = merge_checkpoints(init, policies, tmp_path / "out", method=method, eta=eta)
    expected = liti(states[0], in_memory(states[0], states[1:]), eta)
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():  # to the bit; in float64 the sums' order shows in the last one
        torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-14 if dtype == torch.float64 else 0)
    size = sum(tensor.nbytes for tensor in states[0].values())
    assert summary.tensors == 4 and summary.bytes_written == size
    assert summary.bytes_read == size * (8 if method == "slerp" else 4)  # SLERP reads twice: angle, then arc


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method, in_memory", [("slerp", slerp), ("lerp", lerp)])
def test_half_precision_is_computed_in_float32_and_rounded_once(tmp_path, dtype, method, in_memory):
    states = [random_model(seed, dtype) for seed in range(3)]
    init, *policies = [save(tmp_path / str(seed), state) for seed, state in enumerate(states)]
    merge_checkpoints(init, policies, tmp_path / "out", method=method, eta=0.3)
    wide = [{name: tensor.float() for name, tensor in state.items()} for state in states]
    expected = liti(wide[0], in_memory(wide[0], wide[1:]), 0.3)
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(result[name], expected[name].to(dtype)) for name in expected)


def test_weights_are_given_to_the_policies_in_order(tmp_path, folders):
    init, *policies = folders
    merge_checkpoints(init, policies, tmp_path / "a", weights=(0.8, 0.2))
    merge_checkpoints(init, policies, tmp_path / "b", weights=(0.0, 1.0))
    states = [load_file(folder / "model.safetensors") for folder in folders]
    expected = slerp(states[0], states[1:], (0.8, 0.2))
    for name, tensor in load_file(tmp_path / "a" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name])
    for name, tensor in load_file(tmp_path / "b" / "model.safetensors").items():
        assert torch.equal(tensor, states[2][name])


def test_a_sharded_merge_equals_an_unsharded_one_and_is_sharded_like_init(tmp_path, folders):
    init, *policies = folders
    sharded = save(tmp_path / "sharded", load_file(init / "model.safetensors"), TWO_SHARDS)
    merge_checkpoints(init, policies, tmp_path / "whole")
    merge_checkpoints(sharded, policies, tmp_path / "parts")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for file, names in TWO_SHARDS.items():
        part = load_file(tmp_path / "parts" / file)
        assert part.keys() == set(names)
        assert all(torch.equal(part[name], whole[name]) for name in names)
    index = "model.safetensors.index.json"
    assert (tmp_path / "parts" / index).read_text() == (sharded / index).read_text()
    assert not (tmp_path / "whole" / index).exists()
    merge_checkpoints(init, [sharded, policies[0]], tmp_path / "mixed")
    assert (tmp_path / "mixed" / "model.safetensors").is_file()


def test_buffers_unmoved_and_empty_tensors_are_carried_over(tmp_path):
    states = [{**random_model(seed), "steps": torch.tensor([3]), "mask": torch.tensor([True, False]),
               "none": torch.zeros(0, 4), "still": torch.full((7,), 0.1)} for seed in range(3)]
    init, *policies = [save(tmp_path / str(seed), state) for seed, state in enumerate(states)]
    merge_checkpoints(init, policies, tmp_path / "out", eta=0.3)
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("steps", "mask", "none", "still"):
        assert torch.equal(result[name], states[0][name])
    states[2]["steps"] += 1
    other = save(tmp_path / "other", states[2])
    with pytest.raises(ValueError, match=r"other\['steps'\] is a torch.int64 buffer that differs"):
        merge_checkpoints(init, [policies[0], other], tmp_path / "out-2")


def test_config_and_tokenizer_come_from_init_and_nothing_that_could_be_executed(tmp_path, folders):
    before = hashes(*folders)
    out = tmp_path / "deep" / "out"
    merge_checkpoints(folders[0], folders[1:], str(out))
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "merges.txt"}
    assert json.loads((out / "config.json").read_text()) == {"from": "init"}
    assert hashes(*folders) == before
    assert remains(out.parent) == []


def test_a_merged_gpt2_with_a_tied_head_loads_and_speaks(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2,
                                     bos_token_id=0, eos_token_id=0)
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(transformers.GPT2LMHeadModel(config).eval())
        models[-1].save_pretrained(tmp_path / str(seed), max_shard_size="4KB" if seed == 0 else "5GB")
    assert len(list((tmp_path / "0").glob("*.safetensors"))) > 1
    merge_checkpoints(tmp_path / "0", [tmp_path / "1", tmp_path / "2"], tmp_path / "out", eta=0.3)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    states = [model.state_dict() for model in models]
    expected = liti(states[0], slerp(states[0], states[1:]), 0.3)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    assert torch.isfinite(loaded(torch.arange(8)[None]).logits).all()


def test_a_merge_on_disk_agrees_with_mergekits(tmp_path):
    merge = pytest.importorskip("mergekit.merge")
    config_module = pytest.importorskip("mergekit.config")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2,
                                     bos_token_id=0, eos_token_id=0)
    for seed in range(3):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / str(seed))
    recipe = {"merge_method": "nuslerp", "base_model": str(tmp_path / "0"), "dtype": "float32",
              "models": [{"model": str(tmp_path / str(seed)), "parameters": {"weight": 0.5}} for seed in (1, 2)]}
    options = merge.MergeOptions(copy_tokenizer=False, quiet=True)
    merge.run_merge(config_module.MergeConfiguration.model_validate(recipe), str(tmp_path / "theirs"), options)
    merge_checkpoints(tmp_path / "0", [tmp_path / "1", tmp_path / "2"], tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)


def test_the_number_of_threads_is_left_as_it_was(tmp_path, folders):
    threads = torch.get_num_threads()
    merge_checkpoints(folders[0], folders[1:], tmp_path / "out")
    assert torch.get_num_threads() == threads


# All or nothing


def test_an_interrupted_merge_leaves_nothing(tmp_path, folders, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "combine", interrupt)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "out", tmp_path / "empty"):
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(folders[0], folders[1:], out)
    assert not (tmp_path / "out").exists() and list((tmp_path / "empty").iterdir()) == []
    assert remains(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("moment", ["checkpoints.combine", "checkpoints.carry_over"])
def test_a_killed_merge_leaves_nothing_that_looks_whole(tmp_path, folders, moment):
    script = textwrap.dedent(f"""
        import os, signal, sys
        from warp_lite.averaging import checkpoints
        {moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.merge_checkpoints(sys.argv[1], sys.argv[2:4], sys.argv[4])
    """)
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", script, *map(str, folders), str(out)])
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = remains(tmp_path)
    assert left.startswith(".out.") and not (tmp_path / left / "config.json").exists()
    merge_checkpoints(folders[0], folders[1:], out)  # and the next merge is not in its way
    assert (out / "config.json").exists()


def test_out_may_be_an_empty_folder_and_nothing_else(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    merge_checkpoints(folders[0], folders[1:], tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    (tmp_path / "file").write_text("mine")
    before = hashes(*folders)
    for taken in (folders[0], folders[1], tmp_path / "file", tmp_path / "empty"):
        with pytest.raises(ValueError, match=f"{taken.name} exists and is not an empty folder"):
            merge_checkpoints(folders[0], folders[1:], taken)
    assert hashes(*folders) == before and (tmp_path / "file").read_text() == "mine"


# Bad input: refused before any work, by name


def refused(tmp_path, init, policies, words, **settings):
    with pytest.raises(ValueError, match=words) as error:
        merge_checkpoints(init, policies, tmp_path / "refused" / "out", **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "refused" / "out").exists()
    if (tmp_path / "refused").exists():
        assert list((tmp_path / "refused").iterdir()) == []
    return not (tmp_path / "refused").exists()  # true: before any work


def test_folders_that_are_not_checkpoints(tmp_path, folders):
    init, one, two = folders
    assert refused(tmp_path, init, [one, tmp_path / "missing"], "missing is not a folder")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path, init, [one, tmp_path / "empty"], "empty has no model.safetensors")
    (two / "model.safetensors").unlink()
    (two / "pytorch_model.bin").write_bytes(b"\x80")
    assert refused(tmp_path, init, [one, two], r"two has pickled weights only \(pytorch_model.bin\)")
    (two / "adapter_model.safetensors").write_bytes(b"")
    assert refused(tmp_path, init, [one, two], "two holds a LoRA adapter")


def truncated(content):
    return content[:-1]


def lengthened(content):
    return content + b"\0"


def garbled(content):
    return content[:8] + b"x" * (len(content) - 8)


@pytest.mark.parametrize("damage", [truncated, lengthened, garbled, lambda _: b"", lambda _: b"\xff" * 100])
def test_damaged_files_are_named(tmp_path, folders, damage):
    path = folders[2] / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert refused(tmp_path, folders[0], folders[1:], "two.model.safetensors is truncated or not a safetensors")


def without_scale(state):
    del state["scale"]


def with_extra(state):
    state["extra"] = torch.zeros(1)


def reshaped(state):
    state["scale"] = torch.zeros(2)


def recast(state):
    state["scale"] = torch.tensor(0.0).half()


@pytest.mark.parametrize("spoil, words", [
    (without_scale, "other has no tensor 'scale' that .*init has"),
    (with_extra, "other has a tensor 'extra' that .*init has not"),
    (reshaped, r"other has 'scale' in shape \(2,\), .*init in \(\)"),
    (recast, "other has 'scale' in F16, .*init in F32; convert"),
])
def test_checkpoints_that_do_not_fit_are_refused_before_any_work(tmp_path, folders, spoil, words):
    state = random_model(9)
    spoil(state)
    other = save(tmp_path / "other", state)
    assert refused(tmp_path, folders[0], [folders[1], other], words)


def test_nan_weights_are_named_and_the_partial_folder_is_removed(tmp_path, folders):
    state = random_model(9)
    state["wte.weight"][-1, -1] = math.nan
    other = save(tmp_path / "other", state)
    for method in ("slerp", "lerp"):  # seen only when the work has begun, and what was begun is removed
        assert not refused(tmp_path, folders[0], [folders[1], other], r"other\['wte.weight'\] has NaN", method=method)
    assert not refused(tmp_path, other, folders[1:], r"other\['wte.weight'\] has NaN")


def test_dtypes_that_cannot_be_averaged_are_refused(tmp_path, folders):
    other = save(tmp_path / "other", {"w": torch.zeros(4).to(torch.float8_e4m3fn)})
    assert refused(tmp_path, other, [other, other], "'w' in F8_E4M3, which cannot be averaged; convert")


@pytest.mark.parametrize("content, words", [
    ("{", "is not a safetensors index"),
    ('{"weight_map": []}', "is not a safetensors index"),
    ('{"weight_map": {"w": "../model.safetensors"}}', "only .safetensors files beside it"),
    ('{"weight_map": {"w": "model.bin"}}', "only .safetensors files beside it"),
    ('{"weight_map": {"w": "model-9.safetensors"}}', "has no model-9.safetensors"),
    ('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}', "disagree about tensor 'scale'"),
])
def test_a_bad_index_is_refused(tmp_path, folders, content, words):
    sharded = save(tmp_path / "sharded", random_model(0), TWO_SHARDS)
    (sharded / "model.safetensors.index.json").write_text(content)
    assert refused(tmp_path, sharded, folders[1:], words)


def test_wrong_arguments_are_refused(tmp_path, folders):
    init, *policies = folders
    for settings, words in (({"method": "ties"}, "method is 'ties'"), ({"eta": -1}, "eta is -1"),
                            ({"weights": (0.9, 0.9)}, "sum to 1.8")):
        assert refused(tmp_path, init, policies, words, **settings)
    assert refused(tmp_path, init, policies[:1], "at least two")
    with pytest.raises(TypeError, match="single path"):
        merge_checkpoints(init, policies[0], tmp_path / "out")


def test_a_file_cut_short_during_the_merge_is_an_error_and_not_a_crash(tmp_path, folders, monkeypatch):
    path, real = folders[2] / "model.safetensors", checkpoints.appearing_whole

    def cut(out):
        os.truncate(path, 1000)
        return real(out)

    monkeypatch.setattr(checkpoints, "appearing_whole", cut)
    assert not refused(tmp_path, folders[0], folders[1:], "two.model.safetensors ended early")
