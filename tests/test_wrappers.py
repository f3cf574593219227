"""Policies whose config nests the language model's, as those that read pictures too (Gemma 3 of 4B and up)."""

import pytest
import torch
import transformers
from tiny import make_tokenizer

from warp_lite import WarpConfig, cli, load_policy, run_warp, save_policy
from warp_lite.notebooks.plans import step_seconds
from warp_lite.policies.prompts import room_for_prompts
from warp_lite.policies.shape import shape_of
from warp_lite.training.memory import training_memory

TOKENIZER = make_tokenizer()
PROMPTS = ["this film", "that plot was great and i loved it but", "i", "this film was dull ."]
IDS = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**IDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 40, "head_dim": 4, "initializer_range": 0.3}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}
CONFIG = WarpConfig(iterations=1, runs=2, steps=3, batch_size=4, max_new_tokens=5, eval_every=3)


def gemma(dtype=torch.float32):
    torch.manual_seed(0)
    text = {**TEXT, "query_pre_attn_scalar": 4, "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=4, boi_token_index=5,
        eoi_token_index=3)).to(dtype).eval()


def mistral(dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.Mistral3ForConditionalGeneration(transformers.Mistral3Config(
        text_config={"model_type": "mistral", **TEXT}, image_token_index=4,
        vision_config={"model_type": "pixtral", **VISION})).to(dtype).eval()


def score(prompts, completions):
    return [float(completion.count("t")) for completion in completions]


@pytest.mark.parametrize("make", [gemma, mistral])
def test_a_wrapper_trains_alike_in_both_executors_and_its_eyes_stay(make, tmp_path):
    merged = []
    for executor in ("batched", "serial"):
        result = run_warp(make(torch.float64), TOKENIZER, score, PROMPTS, CONFIG, tmp_path / executor,
                          executor=executor, progress=False)
        merged.append(result.iterations[0].merged)
        moved = {name for name, tensor in result.sft.items() if not torch.equal(tensor, merged[-1][name])}
        assert moved and not any("vision" in name for name in moved)
    for name, tensor in merged[0].items():
        torch.testing.assert_close(merged[1][name], tensor, atol=1e-5, rtol=1e-5)
    assert type(load_policy(tmp_path / "serial" / "iteration-1" / "merged")[0]) is type(make())


@pytest.mark.parametrize("make", [gemma, mistral])
def test_the_sizes_of_a_wrapper_are_those_of_its_text_model(make):
    model, shape = make(), shape_of(make())
    assert (shape.width, shape.layers, shape.heads, shape.kv_heads, shape.head_size) == (16, 2, 4, 2, 4)
    assert (shape.inner, shape.vocabulary) == (32, len(TOKENIZER))
    assert room_for_prompts(model, 10) == 30
    assert training_memory(model, 2, 4, 8, 8).total > 0 and step_seconds(model, CONFIG) > 0


def test_the_command_line_trains_a_wrapper(tmp_path, capsys, monkeypatch):
    save_policy(gemma(), TOKENIZER, tmp_path / "policy")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "of_tests.py").write_text("def f(prompts, completions): return [1.0 * len(c) for c in completions]")
    monkeypatch.syspath_prepend(tmp_path)
    settings = [word for name in ("iterations=1", "runs=2", "steps=1", "batch_size=4", "max_new_tokens=4")
                for word in ("--set", name)]
    code = cli.main(["run", "--policy", str(tmp_path / "policy"), "--reward", "of_tests:f", "--prompts",
                     str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), *settings])
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("error", [AttributeError("no 'hidden_size'\nnor more"), KeyError("x"), RuntimeError(),
                                   AssertionError("wrong"), NotImplementedError("later")])
def test_no_class_of_error_reaches_the_user_as_a_traceback(error, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(cli, "parser", fail)
    assert cli.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warp-lite: ")
    monkeypatch.setenv("WARP_LITE_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main([])
