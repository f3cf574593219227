"""Every forward is tried before it is used: caches and padding of all kinds of architectures, and what is refused."""

import pytest
import torch
import transformers
from tiny import make_policy, make_tokenizer

from warp_lite import WarpConfig, run_warp
from warp_lite.averaging.state_dicts import parameters, stack
from warp_lite.policies import Policies, encode_prompts, make_forward
from warp_lite.policies import module_forward as modules
from warp_lite.policies.gpt2_forward import GPT2Forward
from warp_lite.policies.module_forward import ModuleForward, Recomputed

TOKENIZER = make_tokenizer()
V = len(TOKENIZER)
PROMPTS = ["this film", "that plot was great and i loved it but", "i", "this film was dull ."]
IDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODERN = {**IDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
MAMBA = {**IDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
# the class of the config, its settings, and whether the library's cache serves
ARCHITECTURES = {
    "mamba": ("MambaConfig", MAMBA, False),
    "mamba2": ("Mamba2Config", {**MAMBA, "head_dim": 8, "num_heads": 4, "n_groups": 1}, False),
    "falcon-h1": ("FalconH1Config", {**MODERN, "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4,
                                     "mamba_n_groups": 1, "mamba_d_state": 4}, True),
    "lfm2": ("Lfm2Config", {**MODERN, "layer_types": ["conv", "full_attention"]}, True),
    "qwen3-next": ("Qwen3NextConfig", {**MODERN, **EXPERTS, **LINEAR, "head_dim": 8, "layer_types": [
        "linear_attention", "full_attention"], "shared_expert_intermediate_size": 8}, True),
    "jamba": ("JambaConfig", {**MODERN, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                              "expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4}, True),
    "recurrent-gemma": ("RecurrentGemmaConfig", {**IDS, "hidden_size": 16, "intermediate_size": 32, "lru_width": 16,
                                                 "num_hidden_layers": 3, "num_attention_heads": 2,
                                                 "attention_window_size": 6}, False),  # its state is in the module
    "rwkv": ("RwkvConfig", {**MAMBA, "attention_hidden_size": 16, "intermediate_size": 32, "context_length": 64,
                            "rescale_every": 0}, False),  # nor does it take heed of padding
    "gpt-1": ("OpenAIGPTConfig", {**IDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}, False),
}


def make(name, **changes):
    """A random policy in float32, in which these libraries' kernels are written."""
    kind, settings, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**settings, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # next-token distributions far from uniform
    return model


@torch.no_grad()
def alone(model, rollout):
    """The oracle: log-probabilities of each completion, by the library, one sequence at a time and without a cache."""
    rows = []
    for b in range(rollout.ids.shape[1]):
        prompt = rollout.prompts.ids[0, b][rollout.prompts.mask[0, b].bool()]
        completion = rollout.ids[0, b][rollout.mask[0, b].bool()]
        logits = model(torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1:-1]
        rows.append(logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0])
    return rows


@pytest.mark.parametrize("executor", ["batched", "serial"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_completions_are_sampled_and_scored_as_the_library_scores_each_alone(name, executor, monkeypatch):
    """Ragged prompts, and rows that are dropped as soon as they end."""
    model = make(name)
    monkeypatch.setattr("warp_lite.policies.sampling.DROP_AT", 0.99)
    monkeypatch.setattr("warp_lite.policies.sampling.DROP_FROM", 1)
    policies = Policies(make_forward(model, executor), stack([parameters(model)]))
    uniforms = torch.rand(1, 16, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rollout = policies.sample(encode_prompts(TOKENIZER, PROMPTS * 4).repeat(1), uniforms, TOKENIZER)
    lengths = rollout.mask[0].sum(-1)
    assert lengths.min() < lengths.max()
    scored = policies.logprobs(rollout).detach()
    for b, expected in enumerate(alone(model, rollout)):
        for logprobs in (rollout.logprobs, scored):
            torch.testing.assert_close(logprobs[0, b, :len(expected)], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_is_used_exactly_where_it_gives_the_models_own_logits(name, capsys):
    modules.tell_once.cache_clear()
    forward = make_forward(make(name), "serial")
    assert isinstance(forward.new_cache(1, 2, 8, torch.zeros(1)), Recomputed) != ARCHITECTURES[name][2]
    forward.new_cache(1, 2, 8, torch.zeros(1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (not ARCHITECTURES[name][2])
    assert all(type(forward.model).__name__ in line and "without one" in line for line in lines)


@pytest.mark.parametrize("name", ["mamba", "lfm2", "rwkv", "recurrent-gemma"])
def test_a_run_is_trained_and_measured_alike_by_both_executors(name, tmp_path):
    config = WarpConfig(iterations=1, runs=2, steps=2, batch_size=4, max_new_tokens=6, eval_every=1, lr=1e-4)
    merged = []
    for executor in ("batched", "serial"):
        result = run_warp(make(name), TOKENIZER, lambda prompts, completions: [float(len(c)) for c in completions],
                          PROMPTS, config, tmp_path / executor, executor=executor, progress=False)
        assert len(result.trajectories) == 4 and result.front([0.0], samples=2)[0]["kl"] < 1e-5
        merged.append(result.iterations[0].merged)
    assert any(not torch.equal(merged[0][name], tensor) for name, tensor in result.sft.items())
    for name, tensor in merged[0].items():
        torch.testing.assert_close(merged[1][name], tensor, atol=2e-4, rtol=1e-3)


def refused(model, words, tmp_path):
    """Whether a run of the model is refused in one line before anything is written."""
    with pytest.raises(ValueError, match=words) as caught:
        run_warp(model, TOKENIZER, lambda prompts, completions: [0.0] * len(prompts), PROMPTS,
                 WarpConfig(runs=2, steps=1, batch_size=4, max_new_tokens=4), tmp_path / "out", progress=False)
    return "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [
    lambda: transformers.BertLMHeadModel(transformers.BertConfig(
        **IDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)),
    lambda: transformers.XLNetLMHeadModel(transformers.XLNetConfig(
        vocab_size=V, d_model=16, n_layer=2, n_head=2, d_inner=32)),
], ids=["bert", "xlnet"])
def test_a_model_that_looks_at_later_tokens_is_refused(make, tmp_path):
    torch.manual_seed(0)
    assert refused(make().eval(), "no causal LM.*is_decoder=True", tmp_path)


def test_a_model_that_changes_its_weights_as_it_computes_is_refused(tmp_path):
    assert refused(make("rwkv", rescale_every=1), "Rwkv.*changes its weights.*rescale_every=0", tmp_path)


def test_a_gpt2_with_a_module_of_the_users_own_is_not_left_to_the_handwritten_forward():
    model = make_policy("gpt2", V)
    assert isinstance(make_forward(model), GPT2Forward)
    changed = make_policy("gpt2", V)
    changed.transformer.h[0].mlp.act = torch.nn.ReLU()
    forward = make_forward(changed)
    assert not isinstance(forward, GPT2Forward)
    ids = torch.arange(8).view(1, 2, 4)
    expected = changed(ids[0]).logits[None]
    torch.testing.assert_close(Policies(forward, stack([parameters(changed)])).logits(ids), expected)


def test_a_model_is_tried_once_however_often_it_is_measured(monkeypatch):
    model, calls = make("mamba"), []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    make_forward(model, "serial").new_cache(1, 1, 1, torch.zeros(1))
    assert len(calls) > 3
    calls.clear()
    again = make_forward(model, "serial")
    assert isinstance(again, ModuleForward) and isinstance(again.new_cache(1, 1, 1, torch.zeros(1)), Recomputed)
    assert not calls
