"""What is float32 in any case and what is bfloat16; settings that save memory and change nothing but rounding."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from short_run import short_run
from tiny import ARCHITECTURES, make_policy
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from warp_lite import WarpConfig, load_policy, load_result
from warp_lite.averaging.state_dicts import parameters, stack
from warp_lite.policies.forward import make_forward
from warp_lite.policies.gpt2_forward import GPT2Forward
from warp_lite.policies.llama_forward import LlamaForward
from warp_lite.policies.module_forward import ModuleForward
from warp_lite.policies.precision import compute_dtype, full_precision
from warp_lite.policies.prompts import encode_prompts
from warp_lite.policies.sampling import Policies, Rollout, chosen_logprobs
from warp_lite.policies.vmap_forward import VmapForward
from warp_lite.training.batched import Ensemble, train_batched
from warp_lite.training.run import Run
from warp_lite.training.serial import train_serial


def named(value) -> str:
    """A test's name for a parameter, the same in every process."""
    return getattr(value, "__name__", str(value))


EXECUTORS = [train_serial, train_batched]
PROMPTS = ["this film", "that plot was great and i loved it but", "i", "this film was dull .", "the"]  # ragged
CONFIG = WarpConfig(steps=3, batch_size=5, lr=1e-2, beta=0.3, mu=0.1, warmup_steps=1, max_new_tokens=6)
KINDS = ("policy", "anchor", "exp_avg", "exp_avg_sq")
FORWARDS = [(ModuleForward, a) for a in ARCHITECTURES] + [(VmapForward, a) for a in ARCHITECTURES]
FORWARDS += [(GPT2Forward, "gpt2"), (LlamaForward, "llama"), (LlamaForward, "qwen2")]


def likes_film(prompts, completions, completion_ids, **kwargs):
    return [text.split().count("film") + 0.1 * len(ids) + 0.01 * len(prompt)
            for prompt, text, ids in zip(prompts, completions, completion_ids)]


def train(executor, model, tokenizer, config, on_step=None):
    """Two runs from a model."""
    runs = [Run(config, 1, m, parameters(model), parameters(model), likes_film) for m in (1, 2)]
    runs[0].init = {name: tensor.clone() for name, tensor in runs[0].init.items()}  # the model itself is written to
    runs[1].init = runs[0].init
    runs[0].sft = runs[1].sft = runs[0].init
    return executor(model, tokenizer, encode_prompts(tokenizer, PROMPTS), runs, on_step)


def assert_close(first, second, tolerance):
    for one, other in zip(first, second, strict=True):
        for kind in KINDS:
            for name, tensor in getattr(one, kind).items():
                torch.testing.assert_close(
                    getattr(other, kind)[name], tensor, atol=tolerance, rtol=tolerance, msg=f"{kind}: {name}")


def exact_policies(model, policies=2):
    """The same policy twice, by the library's module in the dtype of its weights."""
    return Policies(ModuleForward(model), stack([parameters(model)] * policies))


def a_rollout(model, tokenizer, policies=2):
    """Completions of a few prompts, the same policy twice."""
    prompts = encode_prompts(tokenizer, PROMPTS).repeat(policies)
    uniforms = torch.rand(policies, len(PROMPTS), 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return exact_policies(model, policies).sample(prompts, uniforms, tokenizer)


# --- settings that save memory ---------------------------------------------------------------


SAVINGS = [{"micro_batch": 1}, {"micro_batch": 2}, {"sample_batch": 2}, {"logit_chunk": 4},
           {"micro_batch": 3, "sample_batch": 1, "logit_chunk": 7}, {"offload": True}]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("savings", SAVINGS, ids=named)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_a_run_that_saves_memory_is_the_same_run(executor, savings, architecture, policy_of, tokenizer):
    """Policies, anchors and Adam's moments, in float64, from the gradient of the whole batch."""
    tolerance = 1e-9 if architecture == "gpt2" else 1e-5  # the library's Gemma normalises in float32, always
    config = CONFIG if architecture == "gpt2" else CONFIG.replace(adam_eps=1e-4, lr=1e-3)
    plain, saving = [], []
    first = train(executor, policy_of(architecture), tokenizer, config, lambda r, s, states, m: plain.extend(m))
    other = train(executor, policy_of(architecture), tokenizer, config.replace(**savings),
                  lambda r, s, states, m: saving.extend(m))
    assert_close(first, other, tolerance)
    for one, two in zip(plain, saving, strict=True):
        assert one == pytest.approx(two, abs=max(1e-8, tolerance))


@pytest.mark.parametrize("executor, architecture", [
    *((train_serial, a) for a in ARCHITECTURES), (train_batched, "gpt2")], ids=named)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_layers_give_the_same_run(executor, architecture, precision, policy_of, tokenizer):
    """With dropout in the user's config, which must stay off in the layers that are computed again."""
    dropout = {"attention_dropout": 0.5} if architecture != "gpt2" else {"attn_pdrop": 0.5, "resid_pdrop": 0.5}
    config = CONFIG.replace(steps=2, precision=precision)
    dtype = torch.float64 if precision == "fp32" else torch.float32
    first = train(executor, policy_of(architecture, dtype=dtype), tokenizer, config)
    calls = []
    for checkpointing in (False, True):
        model = policy_of(architecture, dtype=dtype, **dropout).train()
        with counted_layers(model, calls):
            other = train(executor, model, tokenizer, config.replace(checkpointing=checkpointing))
        assert_close(first, other, 1e-12)
        assert not any(layer.gradient_checkpointing for layer in layers_of(model))
    policies = 1 if executor is train_batched else 2
    assert calls[1] - calls[0] == 2 * config.steps * policies  # each of the 2 layers once more a step


@contextmanager
def counted_layers(model, calls):
    """Append how often a layer was computed, by the library or by hand."""
    count = [0]

    def counted(*_):
        count[0] += 1

    by_hand = GPT2Forward._layer
    # A hook of a module within the layer: it runs again when the layer is computed again.
    handles = [next(layer.children()).register_forward_pre_hook(counted) for layer in layers_of(model)]
    with patch.object(GPT2Forward, "_layer", lambda *args: counted() or by_hand(*args)):
        yield
    for handle in handles:
        handle.remove()
    calls.append(count[0])


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def test_policies_that_cannot_be_checkpointed_together_are_refused_in_one_line(policy_of, tokenizer):
    with pytest.raises(ValueError, match="^checkpointing: policies of type LlamaForCausalLM .* executor='serial'$"):
        train(train_batched, policy_of("llama"), tokenizer, CONFIG.replace(checkpointing=True))


# --- logits in chunks ------------------------------------------------------------------------


@pytest.mark.parametrize("kind, architecture", FORWARDS, ids=named)
@pytest.mark.parametrize("temperature, chunk", [(1.0, 1), (0.7, 5), (1.0, 1000)])
def test_logprobs_in_chunks_are_those_of_all_logits_and_so_are_their_gradients(
        kind, architecture, temperature, chunk, policy_of, tokenizer):
    model = policy_of(architecture)
    rollout, forward = a_rollout(model, tokenizer), kind(model)
    direction = torch.randn(rollout.ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for size in (0, chunk):
        leaves = {n: t.clone().requires_grad_() for n, t in stack([parameters(model)] * 2).items()}
        logp = Policies(forward, leaves).logprobs(rollout, temperature, size)
        results.append((logp, *torch.autograd.grad((logp * direction).sum(), list(leaves.values()))))
    for plain, chunked in zip(*results):
        torch.testing.assert_close(chunked, plain, atol=1e-10, rtol=1e-10)


def test_the_gradient_of_a_chunk_is_the_numerical_one_and_the_closed_form():
    """∂ log p(y) / ∂ logits = onehot(y) − p."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)                   # (E, V, C)
    ids = torch.randint(5, (2, 2, 3), generator=generator)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=generator).requires_grad_()
    prompts = encode_prompts(FakeTokenizer(), ["a", "b"]).repeat(2)
    rollout = Rollout(prompts, ids, torch.ones_like(ids), torch.zeros(2, 2, 3))

    class Linear:
        """Hidden states that are given, and a head."""

        prepare = staticmethod(dict)

        def hidden(self, w, ids, mask=None, keep=0):
            return w["x"]

        def head(self, w, x):
            return x @ W.transpose(1, 2)

    def chunked(x):
        return Policies(Linear(), {"x": x}).logprobs(rollout, 0.7, 4)

    assert torch.autograd.gradcheck(chunked, x)
    gradient, = torch.autograd.grad(chunked(x).sum(), x)
    logits = (x @ W.transpose(1, 2).unsqueeze(1) / 0.7).detach()
    onehot = torch.nn.functional.one_hot(ids, 5).double()
    torch.testing.assert_close(gradient, (onehot - logits.softmax(-1)) @ W.unsqueeze(1) / 0.7)


class FakeTokenizer:
    """Prompts of one token."""

    pad_token_id = 0
    bos_token_id = eos_token_id = None

    def __call__(self, texts, **options):
        return {"input_ids": [[1] for _ in texts]}


def test_a_cap_on_the_logits_is_heeded_and_other_heads_are_refused(tokenizer):
    torch.manual_seed(0)
    small = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    capped = Gemma2ForCausalLM(Gemma2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=4, initializer_range=0.5, final_logit_softcapping=2.0, **small)).eval()
    rollout, forward = a_rollout(capped, tokenizer), VmapForward(capped)
    policies = Policies(forward, stack([parameters(capped)] * 2))
    with torch.no_grad():
        chunked, plain = (policies.logprobs(rollout, chunk=chunk) for chunk in (4, 0))
    torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)
    assert forward.linear_head.cap == 2.0

    class Scaled(GPT2LMHeadModel):
        """Its logits are more than a linear map."""

        def forward(self, *args, **options):
            """Twice the logits."""
            output = super().forward(*args, **options)
            output.logits = 2 * output.logits
            return output

    class Bounded(GPT2LMHeadModel):
        """Its small logits are a linear map, and its large ones are not."""

        def forward(self, *args, **options):
            """Logits within ± 30."""
            output = super().forward(*args, **options)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

    for kind in (Scaled, Bounded):
        model = kind(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=40, **small)).eval()
        for executor in EXECUTORS:
            with pytest.raises(ValueError, match=f"^logit_chunk: the logits of a {kind.__name__} are not a linear map"):
                train(executor, model, tokenizer, CONFIG.replace(logit_chunk=4))


def test_a_cap_by_another_name_is_heeded():
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, lru_width=16, num_hidden_layers=3, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    assert ModuleForward(model).linear_head.cap == model.config.logits_soft_cap


# --- bfloat16 --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, architecture", FORWARDS, ids=named)
def test_in_bfloat16_logprobs_are_those_of_float32_within_its_tolerance(kind, architecture, policy_of, tokenizer):
    """Sampled, in one pass, and in chunks; with a cache in bfloat16; gradients and weights in float32."""
    model = policy_of(architecture, dtype=torch.float32)
    rollout, weights = a_rollout(model, tokenizer), stack([parameters(model)] * 2)
    exact, forward = exact_policies(model).logprobs(rollout), kind(model, torch.bfloat16)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    policies = Policies(forward, leaves)
    logp, chunked = policies.logprobs(rollout), policies.logprobs(rollout, chunk=4)
    for some in (logp, chunked):
        assert some.dtype == torch.float32
        assert 0 < (some - exact).abs().max() < 0.15  # random tiny policies with large weights; 8 bits are 0.4 %
        assert (some - exact)[rollout.mask.bool()].abs().mean() < 0.02
    torch.testing.assert_close(chunked, logp, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(logp.sum(), list(leaves.values()))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    plain = Policies(kind(model), leaves)
    reference = torch.autograd.grad(plain.logprobs(rollout).sum(), list(leaves.values()))
    flat, right = (torch.cat([g.flatten() for g in some]) for some in (gradients, reference))
    assert torch.nn.functional.cosine_similarity(flat, right, 0) > 0.995
    uniforms = torch.rand(2, len(PROMPTS), 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        drawn = policies.sample(rollout.prompts, uniforms, tokenizer)
        assert (drawn.logprobs - policies.logprobs(drawn)).abs().max() < 0.15


def test_the_vocabulary_head_stays_in_float32(tokenizer):
    """Logits around 100, as trained models have them, lie half a nat apart in bfloat16."""
    model = make_policy("gpt2", len(tokenizer), torch.float32)
    with torch.no_grad():
        model.transformer.ln_f.bias[0], model.transformer.wte.weight[:, 0] = 10, 10
    rollout, weights = a_rollout(model, tokenizer), stack([parameters(model)] * 2)
    assert model(rollout.prompts.ids[0]).logits.median() > 90
    exact = exact_policies(model).logprobs(rollout)
    for kind in (ModuleForward, VmapForward, GPT2Forward):
        with torch.no_grad():
            error = Policies(kind(model, torch.bfloat16), weights).logprobs(rollout) - exact
        assert error.abs().max() < 0.1
    with torch.autocast("cpu", torch.bfloat16):  # what the library's autocast alone would make of it
        rough = chosen_logprobs(model(rollout.prompts.ids[0]).logits, rollout.prompts.ids[0], 1.0)
    fine = chosen_logprobs(model(rollout.prompts.ids[0]).logits, rollout.prompts.ids[0], 1.0)
    assert (rough - fine).abs().max() > 0.1


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("weights, precision", [(torch.bfloat16, "fp32"), (torch.float32, "bf16"),
                                                (torch.float16, "bf16")], ids=named)
def test_policy_and_anchor_move_by_the_exact_float32_amount(executor, weights, precision, policy_of, tokenizer):
    """At a learning rate of 1e-6, each step of which would be rounded away in half precision."""
    model = policy_of("gpt2", dtype=weights)
    config = CONFIG.replace(steps=3, lr=1e-6, precision=precision, max_grad_norm=1e9)
    kept = []
    train(executor, model, tokenizer, config, lambda runs, step, states, metrics: kept.extend(states()))
    steps = kept[:3] if executor is train_serial else kept[::2]
    theta = {name: tensor.float().clone() for name, tensor in parameters(policy_of("gpt2", dtype=weights)).items()}
    ema, moving = {name: tensor.clone() for name, tensor in theta.items()}, 0
    leaves = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in theta.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=config.lr, eps=config.adam_eps, betas=(0.9, 0.95))
    before = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    for state in steps:
        for name, leaf in leaves.items():
            leaf.grad = (state.exp_avg[name] - 0.9 * before[name]) / (1 - 0.9)
        optimizer.step()
        before = state.exp_avg
        for name, leaf in leaves.items():
            ema[name] += config.mu * (leaf.detach() - ema[name])
            assert state.policy[name].dtype == state.anchor[name].dtype == torch.float32
            ulp = 2 * torch.finfo(torch.float32).eps * leaf.detach().abs() + 1e-9
            assert ((state.policy[name] - leaf.detach()).abs() <= ulp).all()
            assert ((state.anchor[name] - ema[name]).abs() <= ulp).all()
    for name, start in theta.items():
        moved = (steps[-1].policy[name] - start)[steps[-1].exp_avg[name] != 0]
        moving += (moved != 0).float().sum()
        if weights == torch.bfloat16:  # where it would not have moved at all
            large = start.abs() > 0.01
            assert torch.equal(steps[-1].policy[name].bfloat16()[large], start.bfloat16()[large])
    assert moving > 0.9 * sum(tensor.numel() for tensor in theta.values())


@pytest.mark.parametrize("executor", ["batched", "serial"])
def test_a_half_precision_policy_is_trained_and_merged_as_its_float32_copy_and_handed_back_in_its_own_dtype(
        executor, policy_of, tokenizer, tmp_path):
    half = policy_of("gpt2", dtype=torch.bfloat16)
    wide = policy_of("gpt2", dtype=torch.bfloat16).float()
    before = {name: tensor.clone() for name, tensor in parameters(half).items()}
    result = short_run(half, tokenizer, out=tmp_path / "half", executor=executor)
    expected = short_run(wide, tokenizer, executor=executor)
    for a, b in zip(result.iterations, expected.iterations):
        for one, two in zip([a.init, a.merged, a.next_init, *a.policies, *a.anchors],
                            [b.init, b.merged, b.next_init, *b.policies, *b.anchors]):
            assert all(torch.equal(one[name], two[name]) and one[name].dtype == torch.float32 for name in two)
    assert result.trajectories == expected.trajectories
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(half).items())
    result.save_policy(tmp_path / "point", 0.5)
    saved, _ = load_policy(tmp_path / "point", dtype="auto")
    loaded = load_result(tmp_path / "half", result.task.reward)
    for model in (result.policy(0.5), saved, loaded.policy(0.5)):
        assert model.dtype == torch.bfloat16
        for name, tensor in parameters(model).items():
            assert torch.equal(tensor, expected.weights(0.5)[name].bfloat16())
    assert loaded.front(etas=(0.5,)) == result.front(etas=(0.5,)) == expected.front(etas=(0.5,))
    assert full_precision(wide) is wide and expected.policy(1).dtype == torch.float32


def test_the_precision_follows_from_the_compute_capability():
    capability = "torch.cuda.get_device_capability"
    assert compute_dtype("auto", "cpu") is None and compute_dtype("bf16", "cpu") == torch.bfloat16
    for found, auto in (((7, 5), None), ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16), ((9, 0), torch.bfloat16)):
        with patch(capability, lambda device, found=found: found), patch("torch.cuda.get_device_name", lambda _: "T4"):
            assert compute_dtype("auto", "cuda") == auto and compute_dtype("fp32", "cuda") is None
            if auto is None:
                with pytest.raises(ValueError, match="needs a GPU of compute capability 8.0, and T4 has 7.5; take "):
                    compute_dtype("bf16", "cuda")


# --- state on another device than the weights ------------------------------------------------


def test_an_ensemble_with_its_state_elsewhere_takes_the_same_steps(policy_of):
    """The copy that trains follows the weights that the optimiser updates, to the bit."""
    states = [parameters(policy_of("gpt2", dtype=torch.float32, seed=seed)) for seed in range(2)]
    here, apart = (Ensemble(states, [1e-2, 1e-3], (0.9, 0.95), 1e-8, [1.0, 0.1], offload=offload)
                   for offload in (False, True))
    assert here.live is here.flat and apart.live is not apart.flat
    for add in [False, True] * 3:
        for ensemble in (here, apart):
            loss = sum((weight ** 2).sum() for weight in ensemble.weights.values())
            ensemble.backward(loss, add)
            if add:
                ensemble.step(1.0)
        assert torch.equal(here.flat, apart.flat) and torch.equal(apart.live, apart.flat)
    assert all(weight.data_ptr() >= apart.live.data_ptr() for weight in apart.weights.values())
    assert not torch.equal(here.flat, Ensemble.flatten(states))


def test_make_forward_passes_the_dtype_on(policy_of):
    for architecture in ARCHITECTURES:
        model = policy_of(architecture, dtype=torch.float32)
        for executor in ("batched", "serial"):
            assert make_forward(model, executor, torch.bfloat16).dtype == torch.bfloat16
            assert make_forward(model, executor).dtype is None
