"""Streaming merges of checkpoints on disk."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from warp_lite.averaging import checkpoints
from warp_lite.averaging.arrays import CHUNK
from warp_lite.averaging.checkpoints import merge_checkpoints
from warp_lite.averaging.liti import liti
from warp_lite.averaging.slerp import lerp, slerp
from warp_lite.averaging.state_dicts import parameters
from warp_lite.policies.loading import load_policy, save_policy

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


@pytest.mark.parametrize("method", ["slerp", "lerp"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1.5])
def test_a_single_policy_is_moved_toward_init_and_read_once(tmp_path, folders, method, eta):
    init, policy, _ = folders
    summary = merge_checkpoints(init, [policy], tmp_path / "out", method=method, eta=eta)
    states = [load_file(folder / "model.safetensors") for folder in (init, policy)]
    expected = liti(*states, eta)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name])
    assert summary.bytes_read == 2 * summary.bytes_written
    merge_checkpoints(init, [policy, policy], tmp_path / "twice", method=method, eta=eta)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "twice")]
    assert same[0] == same[1]


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


# All or nothing


def test_an_interrupted_merge_leaves_nothing(tmp_path, folders, monkeypatch):
    def interrupt(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "merge_arrays", interrupt)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "out", tmp_path / "empty"):
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(folders[0], folders[1:], out)
    assert not (tmp_path / "out").exists() and list((tmp_path / "empty").iterdir()) == []
    assert remains(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("moment", ["checkpoints.merge_arrays", "checkpoints.carry_over"])
def test_a_killed_merge_leaves_nothing_that_looks_whole(tmp_path, folders, moment):
    script = textwrap.dedent(f"""
        import os, signal, sys
        from warp_lite.averaging import checkpoints
        {moment} = lambda *_, **options: os.kill(os.getpid(), signal.SIGKILL)
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
    assert refused(tmp_path, init, [], "there is no policy to merge")
    with pytest.raises(TypeError, match="single path"):
        merge_checkpoints(init, policies[0], tmp_path / "out")


def test_a_file_cut_short_during_the_merge_is_an_error_and_not_a_crash(tmp_path, folders, monkeypatch):
    path, real = folders[2] / "model.safetensors", checkpoints.appearing_whole

    def cut(out):
        os.truncate(path, 1000)
        return real(out)

    monkeypatch.setattr(checkpoints, "appearing_whole", cut)
    assert not refused(tmp_path, folders[0], folders[1:], "two.model.safetensors ended early")


# Names as the library matches them


def stored(folder):
    return load_file(folder / "model.safetensors")


def rewritten(folder, change):
    """A copy of a folder whose tensors were changed by a function, beside it."""
    made = folder.with_name(f"{folder.name}-{change.__name__}")
    shutil.copytree(folder, made)
    save_file(change(stored(folder)), made / "model.safetensors", metadata={"format": "pt"})
    return made


def hub(state):
    """GPT-2 as the hub has it: no name of the base model, masks beside the attention, whatever their dtype."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(40, 40).tril().view(1, 1, 40, 40)
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def byte_masks(state):
    """The same with masks of bytes, as other files have them."""
    return {name: tensor.byte() if name.endswith("attn.bias") and tensor.dim() == 4 else tensor
            for name, tensor in hub(state).items()}


def tied(state):
    """Tied weights twice, as copies."""
    first = next(name for name in state if name.endswith(("wte.weight", "embed_tokens.weight")))
    return {**state, "lm_head.weight": state[first].clone()}


def untied(state):
    """An output matrix of its own."""
    return {name: tensor + (name == "lm_head.weight") for name, tensor in tied(state).items()}


def angles_too(state):
    """The table of rotary angles, as files of some years ago have it."""
    return {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(2)}


@pytest.fixture
def saved(policy_of, tokenizer, tmp_path):
    """Three policies of an architecture as the library saves them, tied."""
    def make(architecture):
        folders = [tmp_path / name for name in ("init", "p1", "p2")]
        for seed, folder in enumerate(folders):
            save_policy(policy_of(architecture, dtype=torch.float32, seed=seed, tie_word_embeddings=True), tokenizer,
                        folder)
        return folders
    return make


@pytest.mark.parametrize("architecture, of_init, of_first", [
    ("gpt2", hub, None), ("gpt2", None, hub), ("gpt2", hub, byte_masks), ("gpt2", byte_masks, hub),
    ("gpt2", tied, None), ("gpt2", None, tied), ("gpt2", tied, hub), ("gpt2", hub, tied), ("llama", tied, None),
    ("llama", None, tied), ("llama", angles_too, None), ("llama", None, angles_too), ("llama", angles_too, tied)])
def test_tensors_are_matched_as_the_library_matches_them(saved, architecture, of_init, of_first, tmp_path):
    """Whatever stands in init's file and the first policy's, the merge loads as that of the files as saved does."""
    init, first, second = saved(architecture)
    merge_checkpoints(init, [first, second], tmp_path / "plain", eta=0.7)
    init, first = (rewritten(folder, change) if change else folder
                   for folder, change in ((init, of_init), (first, of_first)))
    merge_checkpoints(init, [first, second], tmp_path / "out", eta=0.7)
    assert stored(tmp_path / "out").keys() == stored(init).keys()
    for name, tensor in stored(init).items():
        if name.endswith(("attn.masked_bias", "inv_freq")) or name.endswith("attn.bias") and tensor.dim() == 4:
            assert torch.equal(stored(tmp_path / "out")[name], tensor)
    plain, out = (parameters(load_policy(tmp_path / name)[0]) for name in ("plain", "out"))
    assert all(torch.equal(plain[name], tensor) for name, tensor in out.items())


def test_an_output_matrix_of_its_own_is_no_copy(saved, tmp_path):
    init, first, second = saved("llama")
    assert refused(tmp_path, init, [rewritten(first, untied), second], "has a tensor 'lm_head.weight' that")
    assert refused(tmp_path, rewritten(init, untied), [first, second], "has no tensor 'lm_head.weight' that")


def test_names_with_two_counterparts_or_of_other_models_are_refused(tmp_path):
    states = [random_model(seed) for seed in range(3)]
    init, first, second = [save(tmp_path / str(seed), state) for seed, state in enumerate(states)]

    def odd(state):
        return {**{f"model.{name}": tensor for name, tensor in state.items()}, "wte.weight": state["wte.weight"] + 1}

    def partly(state):
        return {f"model.{name}" if name == "scale" else f"other.{name}": tensor for name, tensor in state.items()}

    assert refused(tmp_path, init, [rewritten(first, odd), second], "has a tensor 'model.wte.weight' that")
    assert refused(tmp_path, init, [rewritten(first, partly), second], "has no tensor 'scale'")


def test_dtypes_that_differ_name_the_way_out(tmp_path, folders):
    narrow = save(tmp_path / "narrow", random_model(1, torch.bfloat16))
    assert refused(tmp_path, folders[0], [narrow, folders[2]],
                   "narrow has .* in BF16, .*init in F32; convert one of them first: from_pretrained.*dtype='float32'")


def test_templates_of_a_folder_are_carried_over_and_hidden_files_are_not(tmp_path, folders):
    init = folders[0]
    (init / "additional_chat_templates").mkdir()
    (init / "additional_chat_templates" / "rag.jinja").write_text("{{ bos_token }}")
    (init / "additional_chat_templates" / "rag.py").write_text("")
    (init / "._config.json").write_text("{}")
    merge_checkpoints(init, folders[1:], tmp_path / "out")
    assert (tmp_path / "out/additional_chat_templates/rag.jinja").read_text() == "{{ bos_token }}"
    assert [path.name for path in (tmp_path / "out/additional_chat_templates").iterdir()] == ["rag.jinja"]
    assert not (tmp_path / "out/._config.json").exists()
