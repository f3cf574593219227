"""Policies in GGUF: the weights that the file stands for, converted once, and errors of one line."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from warp_lite import load_policy
from warp_lite.policies import gguf as converting

gguf = pytest.importorskip("gguf")

WORDS = ["<unk>", "<s>", "</s>", *(chr(letter) for letter in range(ord("a"), ord("z") + 1)), "Ġ", "th", "the"]
MERGES = ["t h", "th e"]


def llama() -> LlamaForCausalLM:
    """A Llama of two layers, two heads of keys for four of queries, with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=10000.0, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2)).eval()


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in llama.cpp's order: the halves that are rotated together side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, architecture="llama", kind=None):
    """A GGUF file of a model and a tokenizer of letters; matrices in the quantised `kind`, or float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(MERGES)
    for name, token in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            values = turned(values, heads)
        place = names.get_name(name, try_suffixes=(".weight",))
        if kind is not None and values.ndim == 2:
            writer.add_tensor(place, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 30, 9, 31]])).logits


def test_a_gguf_file_is_the_model_that_it_was_written_from(tmp_path):
    model = llama()
    policy, tokenizer = load_policy(write(tmp_path / "tiny.gguf", model))
    torch.testing.assert_close(logits(policy), logits(model), rtol=0, atol=0)
    assert type(policy) is LlamaForCausalLM and not hasattr(policy.config, "quantization_config")
    assert tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"])[-1] == "the"
    assert tokenizer.eos_token_id == 2 and policy.generation_config.eos_token_id == 2


def test_quantised_weights_are_those_that_the_package_reads(tmp_path):
    model = llama()
    policy, _ = load_policy(write(tmp_path / "tiny.gguf", model, kind=gguf.GGMLQuantizationType.Q8_0))
    original = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    wanted = gguf.dequantize(gguf.quantize(original, kind), kind)
    np.testing.assert_array_equal(policy.model.layers[0].mlp.up_proj.weight.detach().numpy(), wanted)
    assert not np.array_equal(wanted, original)


def test_a_file_is_converted_once_and_again_where_it_has_changed(tmp_path, cache, monkeypatch):
    model = llama()
    path = write(tmp_path / "tiny.gguf", model)
    first, _ = load_policy(path)
    with monkeypatch.context() as patched:
        patched.setattr(converting, "convert", lambda *_: pytest.fail("it was converted a second time"))
        again, _ = load_policy(str(path))
    torch.testing.assert_close(logits(first), logits(again), rtol=0, atol=0)
    model.model.norm.weight.data *= 2
    write(path, model)
    changed, _ = load_policy(path)
    torch.testing.assert_close(logits(changed), logits(model), rtol=0, atol=0)
    folders = sorted(folder for folder in cache.iterdir() if folder.is_dir())
    assert len(folders) == 2
    ordinary, _ = load_policy(folders[0])
    assert type(ordinary) is LlamaForCausalLM


def test_what_cannot_be_read_is_one_line(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "tiny.gguf", llama())
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:len(whole) // 2])
    unknown = write(tmp_path / "unknown.gguf", llama(), architecture="martian")
    for bad in (cut, unknown):
        with pytest.raises(ValueError, match=f"^cannot load a policy from '{bad}': ") as caught:
            load_policy(bad)
        assert "\n" not in str(caught.value)
    assert "martian" in str(caught.value)
    with pytest.raises(ValueError, match="neither a folder nor in GGUF"):
        load_policy(__file__)
    assert not list(cache.glob("gguf-*"))  # nothing half-written
    monkeypatch.setattr(converting, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package gguf: pip install gguf"):
        load_policy(path)


@pytest.mark.slow
def test_the_command_line_trains_from_a_gguf_file(tmp_path):
    policy, prompts = write(tmp_path / "tiny.gguf", llama()), tmp_path / "prompts.txt"
    prompts.write_text("the\nthe a\nthe b\nthe c\nthe d\nthe e\n")
    score = "def score(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    (tmp_path / "length.py").write_text(score)
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "warp_lite.cli", "run", "--policy", str(policy), "--reward", "length:score", "--prompts",
         str(prompts), "--set=steps=2", "--set=iterations=1", "--set=runs=2", "--set=batch_size=2",
         "--set=max_new_tokens=4", "--out", str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reopened, _ = load_policy(next(out.glob("iteration-1/merged")))
    assert sum(p.numel() for p in reopened.parameters()) == sum(p.numel() for p in llama().parameters())
