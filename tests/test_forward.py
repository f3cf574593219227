"""The forwards: the library's module, the same under vmap, GPT-2 and Llama by hand."""

from unittest.mock import patch

import pytest
import torch
from tiny import ARCHITECTURES, POSITIONS, make_policy
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import warp_lite.policies.gpt2_forward as gpt2_module
from warp_lite.averaging.state_dicts import load_weights, parameters, stack, unstack
from warp_lite.policies import products
from warp_lite.policies.forward import make_forward
from warp_lite.policies.gelu import gelu_
from warp_lite.policies.gpt2_forward import ColumnCache, GPT2Cache, GPT2Forward
from warp_lite.policies.llama_forward import LlamaForward
from warp_lite.policies.module_forward import ModuleForward
from warp_lite.policies.trial import serves
from warp_lite.policies.vmap_forward import VmapForward

LENGTHS = (1, 4, 9, 12)  # of the rows of a ragged batch; the windows of Gemma 3 and Mistral are 3
VOCABULARY = 18


class WideGPT2Forward(GPT2Forward):
    """The hand-written forward as it treats wide models: no layer norms folded into matrices, no columns of heads."""

    def _fold(self, *args):
        with patch.object(gpt2_module, "FOLD_UP_TO", 0):
            return super()._fold(*args)

    def new_cache(self, *args):
        with patch.object(gpt2_module, "SMALL", 0):
            return super().new_cache(*args)


CASES = [(ModuleForward, architecture) for architecture in ARCHITECTURES]
CASES += [(VmapForward, architecture) for architecture in ARCHITECTURES]
CASES += [(GPT2Forward, "gpt2"), (WideGPT2Forward, "gpt2"), (LlamaForward, "llama"), (LlamaForward, "qwen2")]


def policies_of(architecture, dtype=torch.float64, policies=3, **settings):
    """Policies of one architecture: a module for each, and their weights stacked."""
    models = [make_policy(architecture, VOCABULARY, dtype, seed, **settings) for seed in range(policies)]
    return models, stack([parameters(model) for model in models])


def ragged(policies=3, side="left"):
    """Token ids and mask (E, B, S), padded on one side; every policy has other tokens."""
    width = max(LENGTHS)
    ids = torch.randint(3, VOCABULARY, (policies, len(LENGTHS), width), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for b, length in enumerate(LENGTHS):
        mask[:, b, slice(width - length, None) if side == "left" else slice(length)] = 1
    return ids * mask, mask


def alone(models, ids, mask):
    """The oracle: the logits (S, V) of every row by itself, unpadded, from the library's module: lists [e][b]."""
    with torch.no_grad():
        return [[model(row[keep.bool()][None], use_cache=False).logits[0] for row, keep in zip(ids[e], mask[e])]
                for e, model in enumerate(models)]


def assert_rows_equal(logits, expected, mask, tolerance=1e-9):
    """Logits (E, B, S, V) at the tokens of `mask` against the oracle's lists."""
    for e, rows in enumerate(expected):
        for b, row in enumerate(rows):
            torch.testing.assert_close(logits[e, b][mask[e, b].bool()], row, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_activation_and_its_gradient_are_the_librarys(dtype, tolerance):
    x = torch.cat([torch.linspace(-9, 9, 721), torch.tensor([-1e4, -40.0, 0.0, 40.0, 1e4])]).to(dtype).requires_grad_()
    ours, library = gelu_(x.clone()), torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(ours, library, atol=tolerance, rtol=tolerance)
    weight = torch.linspace(1, 2, len(x), dtype=dtype)
    slope, expected = (torch.autograd.grad(y, x, weight)[0] for y in (ours, library))
    torch.testing.assert_close(slope, expected, atol=8 * tolerance, rtol=8 * tolerance)
    with torch.no_grad():
        assert torch.equal(gelu_(x.clone()), ours)


def test_the_activations_gradient_is_taken_once_and_says_so():
    x = torch.linspace(-3, 3, 7).requires_grad_()
    y = gelu_(x.clone()).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_a_narrow_dtype_the_activation_is_the_librarys_own(dtype):
    x = torch.linspace(-9, 9, 721).to(dtype)
    assert torch.equal(gelu_(x), torch.nn.functional.gelu(x, approximate="tanh"))


def test_columns_of_heads_hold_what_a_product_of_matrices_would():
    models, weights = policies_of("gpt2")
    forward, (ids, mask) = GPT2Forward(models[0]), ragged()
    caches = forward.new_cache(*ids.shape, models[0].lm_head.weight), WideGPT2Forward(models[0]).new_cache(
        *ids.shape, models[0].lm_head.weight)
    assert [type(cache) for cache in caches] == [ColumnCache, GPT2Cache]
    kept = torch.tensor([[3, 1], [0, 2], [1, 2]])
    logits = []
    for cache in caches:
        w, at = forward.prepare(weights), 0
        for end in (2, 6, 7):  # a prompt, more of it, a token
            forward(w, ids[..., at:end], mask[..., :end], cache)
            at = end
        cache = forward.cache_of(cache, kept)
        assert cache.length == 7
        rows = kept.unsqueeze(-1).expand(-1, -1, ids.shape[-1])
        logits.append(forward(w, ids.gather(1, rows)[..., 7:8], mask.gather(1, rows)[..., :8], cache))
    torch.testing.assert_close(*logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("policies", [3, 1])
@pytest.mark.parametrize("forward, architecture", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_has_the_logits_that_the_library_gives_it_alone(forward, architecture, side, policies):
    models, weights = policies_of(architecture, policies=policies)
    ids, mask = ragged(policies, side)
    forward = forward(models[0])
    assert_rows_equal(forward(forward.prepare(weights), ids, mask), alone(models, ids, mask), mask)


@pytest.mark.parametrize("forward, architecture", CASES)
def test_without_padding_no_mask_is_needed(forward, architecture):
    models, weights = policies_of(architecture)
    ids, mask = torch.randint(VOCABULARY, (3, 2, 12)), torch.ones(3, 2, 12, dtype=torch.long)
    forward = forward(models[0])
    prepared = forward.prepare(weights)
    assert_rows_equal(forward(prepared, ids), alone(models, ids, mask), mask)
    torch.testing.assert_close(forward(prepared, ids, mask), forward(prepared, ids), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("policies", [3, 1])
@pytest.mark.parametrize("forward, architecture", CASES)
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("start", [1, 5])
def test_with_a_cache_token_by_token_logits_are_those_of_one_pass(forward, architecture, padded, start, policies):
    """The first `start` tokens at once, as a prompt is, then one at a time."""
    models, weights = policies_of(architecture, policies=policies)
    ids, mask = ragged(policies)
    if not padded:
        ids, mask = torch.randint(VOCABULARY, ids.shape), torch.ones_like(mask)
    forward = forward(models[0])
    prepared = forward.prepare(weights)
    E, B, S = ids.shape
    with torch.no_grad():
        cache = forward.new_cache(E, B, S, next(iter(weights.values())))
        pieces = [forward(prepared, ids[..., :start], mask[..., :start] if padded else None, cache)]
        for t in range(start, S):
            pieces.append(forward(prepared, ids[..., t:t + 1], mask[..., :t + 1] if padded else None, cache))
    assert_rows_equal(torch.cat(pieces, 2), alone(models, ids, mask), mask)


@pytest.mark.parametrize("policies", [3, 1])
@pytest.mark.parametrize("forward, architecture", CASES)
def test_a_cache_of_some_rows_goes_on_as_if_the_others_had_never_been_there(forward, architecture, policies):
    """Each policy keeps rows of its own, in an order of its own."""
    models, weights = policies_of(architecture, policies=policies)
    ids, mask = ragged(policies)
    kept = torch.stack([torch.randperm(ids.shape[1])[:2] for _ in models])
    forward, some = forward(models[0]), kept.unsqueeze(-1).expand(-1, -1, ids.shape[-1])
    prepared, start = forward.prepare(weights), 4
    with torch.no_grad():
        cache = forward.new_cache(*ids.shape, next(iter(weights.values())))
        forward(prepared, ids[..., :start], mask[..., :start], cache)
        cache = forward.cache_of(cache, kept)
        ids, mask = ids.gather(1, some), mask.gather(1, some)
        pieces = [forward(prepared, ids[..., t:t + 1], mask[..., :t + 1], cache) for t in range(start, ids.shape[-1])]
    expected = [[row[max(0, start - pads):] for row, pads in zip(rows, (mask[e] == 0).sum(-1).tolist())]
                for e, rows in enumerate(alone(models, ids, mask))]
    assert_rows_equal(torch.cat(pieces, 2), expected, mask[..., start:])


@pytest.mark.parametrize("policies", [3, 1])
@pytest.mark.parametrize("forward, architecture", CASES)
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_those_of_the_library(forward, architecture, padded, policies):
    models, weights = policies_of(architecture, policies=policies)
    ids, mask = ragged(policies)
    if not padded:  # the padding token may be sampled, too: then the library gives its embedding no gradient
        ids, mask = torch.randint(VOCABULARY, ids.shape), torch.ones_like(mask)
        assert (ids == 0).any(-1).any(-1).all()
    direction = torch.randn(*ids.shape, VOCABULARY, dtype=torch.float64) * mask.unsqueeze(-1)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    forward = forward(models[0])
    logits = forward(forward.prepare(leaves), ids, mask if padded else None)
    gradients = dict(zip(leaves, torch.autograd.grad((logits * direction).sum(), list(leaves.values()))))
    for e, model in enumerate(models):
        model.zero_grad()
        for b in range(ids.shape[1]):
            keep = mask[e, b].bool()
            (model(ids[e, b][keep][None], use_cache=False).logits[0] * direction[e, b][keep]).sum().backward()
        tolerance = 1e-5 if architecture == "gemma3" else 1e-9  # the library's Gemma normalises in float32, always
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][e], parameter.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("forward", [GPT2Forward, WideGPT2Forward])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_to_the_last_bit_the_same_whether_or_not_a_gradient_is_taken(forward, dtype):
    models, weights = policies_of("gpt2", dtype)
    (ids, mask), forward = ragged(), forward(models[0])
    trained = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
    with torch.no_grad():
        expected = forward(forward.prepare(weights), ids, mask)
    assert torch.equal(forward(forward.prepare(trained), ids, mask), expected)


@pytest.mark.parametrize("policies", [3, 1])
@pytest.mark.parametrize("forward, architecture", CASES)
def test_keep_gives_the_logits_from_a_position_on(forward, architecture, policies):
    models, weights = policies_of(architecture, policies=policies)
    ids, mask = ragged(policies)
    forward = forward(models[0])
    prepared = forward.prepare(weights)
    every = forward(prepared, ids, mask)
    torch.testing.assert_close(forward(prepared, ids, mask, keep=7), every[:, :, 7:], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("forward, architecture", CASES)
def test_tokens_before_those_kept_are_looked_at_by_all_later_ones(forward, architecture, padded):
    models, weights = policies_of(architecture)
    (ids, mask), forward = ragged(), forward(models[0])
    ids, mask = (ids, mask) if padded else (ids.clamp(min=3), torch.ones_like(mask))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
    for keep in (11, 7):  # one token goes on, or some
        gradients = []
        for first in (keep, 0):
            logits = forward(forward.prepare(leaves), ids, mask if padded else None, keep=first)[:, :, keep - first:]
            gradients.append(torch.autograd.grad(logits.square().sum(), list(leaves.values()), materialize_grads=True))
        for ours, expected in zip(*gradients):
            torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        prepared, cache = forward.prepare(weights), forward.new_cache(*ids.shape, next(iter(weights.values())))
        forward(prepared, ids[..., :8], mask[..., :8], cache, keep=7)
        following = forward(prepared, ids[..., 8:9], mask[..., :9], cache)
        expected = forward(prepared, ids[..., :9], mask[..., :9], keep=8)
    at = mask[..., 8].bool()
    torch.testing.assert_close(following[at], expected[at], atol=1e-11, rtol=1e-11)


class LlamaWithABias(LlamaForCausalLM):
    """A policy that adds a parameter to its logits, which no look at its head would find while it is zero."""

    def __init__(self, config):
        super().__init__(config)
        self.bias = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.bias
        return output


@pytest.mark.parametrize("executor", ["batched", "serial"])
@pytest.mark.parametrize("policies", [2, 1])
def test_kept_logits_are_the_modules_own_with_whatever_it_adds_to_them(executor, policies):
    torch.manual_seed(0)
    model = LlamaWithABias(LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                       num_attention_heads=2, num_key_value_heads=1))
    forward, (ids, mask) = make_forward(model, executor), ragged(policies)
    weights = {name: (tensor + (name == "bias")).requires_grad_() for name, tensor in
               stack([parameters(model)] * policies).items()}
    every, kept = (forward(forward.prepare(weights), ids, mask, keep=keep) for keep in (0, 7))
    torch.testing.assert_close(kept, every[:, :, 7:], atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(kept.sum(), [weights["bias"]])
    assert (gradient == kept[..., 0].numel() / policies).all()


@pytest.mark.parametrize("forward, architecture", CASES)
def test_in_float32_the_error_is_that_of_float32(forward, architecture):
    narrow, weights = policies_of(architecture, torch.float32)
    wide, _ = policies_of(architecture)
    ids, mask = ragged()
    forward = forward(narrow[0])
    logits = forward(forward.prepare(weights), ids, mask)
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    assert_rows_equal(logits.double(), alone(wide, ids, mask), mask, tolerance=2e-5)


@pytest.mark.parametrize("forward, architecture", CASES)
def test_a_policy_has_the_same_logits_whatever_policies_stand_beside_it(forward, architecture):
    models, weights = policies_of(architecture)
    ids, mask = ragged()
    forward = forward(models[0])
    together = forward(forward.prepare(weights), ids, mask)
    for e in range(3):
        one = forward.prepare({name: tensor[e:e + 1] for name, tensor in weights.items()})
        torch.testing.assert_close(forward(one, ids[e:e + 1], mask[e:e + 1])[0], together[e], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_in_the_users_config_is_not_live_in_any_forward(architecture):
    dropout = {"attention_dropout": 0.5} if architecture != "gpt2" else {
        "attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
    model = make_policy(architecture, VOCABULARY, **dropout).train()
    plain = make_policy(architecture, VOCABULARY)
    weights, (ids, mask) = stack([parameters(model)]), ragged(1)
    expected = alone([plain], ids, mask)
    for forward in (ModuleForward, VmapForward, GPT2Forward)[:3 if architecture == "gpt2" else 2]:
        forward = forward(model.train())
        assert_rows_equal(forward(forward.prepare(weights), ids, mask), expected, mask)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_convert_both_ways(architecture):
    models, weights = policies_of(architecture)
    ids, _ = ragged()
    blank = make_policy(architecture, VOCABULARY, seed=99)
    for e, state in enumerate(unstack(weights)):
        assert state.keys() == parameters(models[e]).keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in parameters(models[e]).items())
        torch.testing.assert_close(load_weights(blank, state)(ids[e]).logits, models[e](ids[e]).logits, atol=0, rtol=0)
    next(iter(unstack(weights)[0].values())).zero_()
    assert next(iter(weights.values()))[0].abs().sum() > 0  # what unstack gives are copies


# --- which forward serves which model --------------------------------------------------------


def gpt2(**settings):
    return make_policy("gpt2", VOCABULARY, **settings)


@pytest.mark.parametrize("settings", [
    {}, {"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 24}, {"layer_norm_epsilon": 0.1},
    {"reorder_and_upcast_attn": True}, {"n_layer": 1, "n_head": 1}, {"attn_implementation": "eager"}], ids=str)
def test_the_handwritten_forward_serves_this_gpt2_and_equals_it(settings):
    model = gpt2(**settings)
    assert GPT2Forward.supports(model) and isinstance(make_forward(model), GPT2Forward)
    weights, (ids, mask) = stack([parameters(model)]), ragged(1)
    forward = GPT2Forward(model)
    assert_rows_equal(forward(forward.prepare(weights), ids, mask), alone([model], ids, mask), mask)


@pytest.mark.parametrize("settings", [
    {"activation_function": "relu"}, {"activation_function": "gelu"}, {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False}, {"tie_word_embeddings": False}], ids=str)
def test_the_handwritten_forward_refuses_a_gpt2_that_it_would_get_wrong(settings):
    model = gpt2(**settings)
    weights, (ids, mask) = stack([parameters(model)]), ragged(1)
    wrong = GPT2Forward(model)
    right = alone([model], ids, mask)[0][-1][-1]
    assert (wrong(wrong.prepare(weights), ids, mask)[0, -1, -1] - right).abs().max() > 1e-5
    assert not GPT2Forward.supports(model)
    forward = make_forward(model)
    assert isinstance(forward, VmapForward)
    assert_rows_equal(forward(forward.prepare(weights), ids, mask), alone([model], ids, mask), mask)


def test_the_handwritten_forward_refuses_other_classes():
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY}

    class Changed(GPT2LMHeadModel):
        """A subclass may compute anything."""

    assert not GPT2Forward.supports(Changed(GPT2Config(**small)))
    assert not GPT2Forward.supports(GPT2DoubleHeadsModel(GPT2Config(**small)))
    assert not GPT2Forward.supports(GPT2LMHeadModel(GPT2Config(**small, add_cross_attention=True)))
    for architecture in ARCHITECTURES[1:]:
        model = make_policy(architecture, VOCABULARY)
        assert not GPT2Forward.supports(model) and isinstance(make_forward(model), VmapForward)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_serial_executor_uses_the_librarys_module(architecture):
    assert isinstance(make_forward(make_policy(architecture, VOCABULARY), "serial"), ModuleForward)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
         "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("make", [
    lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3)),
    lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
    lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=4, query_pre_attn_scalar=4, sliding_window=3)),
    lambda: make_policy("gemma3", VOCABULARY, attn_implementation="eager"),
    lambda: make_policy("qwen2", VOCABULARY, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    lambda: make_policy("llama", VOCABULARY, tie_word_embeddings=True),
], ids=["mistral, window", "mistral, no window", "gemma2", "gemma3, eager", "qwen2, window", "llama, tied"])
def test_vmap_serves_further_architectures_with_their_own_masks(make):
    """In float32: the library's eager attention of Gemma has a softmax in float32 that overflows in float64."""
    torch.manual_seed(0)
    model = make().float().eval()
    weights, (ids, mask) = stack([parameters(model)] * 2), ragged(2)
    forward = VmapForward(model)
    assert forward.supports(model) and serves(forward, model)
    assert isinstance(make_forward(model), LlamaForward if LlamaForward.supports(model) else VmapForward)
    with torch.no_grad():
        assert_rows_equal(forward(weights, ids, mask), alone([model] * 2, ids, mask), mask, 1e-5)
        cache = forward.new_cache(*ids.shape, next(iter(weights.values())))
        pieces = [forward(weights, ids[..., t:t + 1], mask[..., :t + 1], cache) for t in range(ids.shape[-1])]
    assert_rows_equal(torch.cat(pieces, 2), alone([model] * 2, ids, mask), mask, 1e-5)


class OwnMask(GPT2LMHeadModel):
    """A module that looks at every token, whatever mask is passed in: under vmap it would be silently wrong."""

    def forward(self, ids, attention_mask=None, **options):
        """Ignores masks of four dimensions."""
        if attention_mask is not None and attention_mask.dim() > 2:
            attention_mask = torch.zeros_like(attention_mask)
        return super().forward(ids, attention_mask=attention_mask, **options)


@pytest.mark.parametrize("make", [
    lambda: FalconForCausalLM(FalconConfig(
        **{**SMALL, "num_key_value_heads": 4}, alibi=True, new_decoder_architecture=False)),
    lambda: OwnMask(gpt2().config),
], ids=["falcon, alibi", "a module that ignores the mask"])
def test_what_vmap_would_get_wrong_is_left_to_the_librarys_module(make):
    torch.manual_seed(0)
    model = make().double().eval()
    weights, (ids, mask) = stack([parameters(model)] * 2), ragged(2)
    forward = make_forward(model)
    assert isinstance(forward, ModuleForward)
    assert_rows_equal(forward(weights, ids, mask), alone([model] * 2, ids, mask), mask)


# --- Llama by hand -----------------------------------------------------------------------------


def llama_like(kind, config, **settings):
    """A random model of the Llama family in float32, its biases and gains no zeros and ones."""
    torch.manual_seed(0)
    model = kind(config(**{**SMALL, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


FAMILY = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama, biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, one head a key": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama, one key": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "llama, wide heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 8}),
    "llama, scaled angles": (LlamaForCausalLM, LlamaConfig, {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
    "llama, rough norm": (LlamaForCausalLM, LlamaConfig, {"rms_norm_eps": 0.1}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
}


def family(name):
    """A model of `FAMILY`."""
    kind, config, settings = FAMILY[name]
    return llama_like(kind, config, **settings)


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def large(request, monkeypatch):
    """Small matrices treated as large ones are: multiplied by oneDNN, and packed in a cache."""
    if request.param:
        assert products.available()
        monkeypatch.setattr(products, "SMALLEST", 0)
        monkeypatch.setattr(products, "WORTH", 1)
    return request.param


@pytest.mark.parametrize("policies", [3, 1])
@pytest.mark.parametrize("name", FAMILY)
def test_the_handwritten_llama_serves_its_family_and_equals_it(name, policies, large):
    model = family(name)
    forward, weights = make_forward(model), stack([parameters(model)] * policies)
    assert isinstance(forward, LlamaForward)
    ids, mask = ragged(policies)
    expected = alone([model] * policies, ids, mask)
    with torch.no_grad():
        prepared = forward.prepare(weights)
        assert_rows_equal(forward(prepared, ids, mask), expected, mask, 2e-5)
        cache = forward.new_cache(*ids.shape, next(iter(weights.values())))
        pieces = [forward(prepared, ids[..., :5], mask[..., :5], cache)]
        pieces += [forward(prepared, ids[..., t:t + 1], mask[..., :t + 1], cache) for t in range(5, ids.shape[-1])]
    assert_rows_equal(torch.cat(pieces, 2), expected, mask, 2e-5)
    assert bool(cache.packs.packed) == large


@pytest.mark.parametrize("name", ["llama", "llama, tied", "llama, biases", "qwen2"])
@pytest.mark.parametrize("policies", [1, 3])
def test_by_onednn_gradients_and_logits_are_those_of_batched_products(name, policies, monkeypatch):
    """What is frozen gets no gradient."""
    model, results = family(name), []
    (ids, mask), frozen = ragged(policies), "model.layers.0.mlp.up_proj.weight"
    for smallest in (10**9, 0):
        monkeypatch.setattr(products, "SMALLEST", smallest)
        leaves = {n: tensor.requires_grad_(n != frozen) for n, tensor in stack([parameters(model)] * policies).items()}
        forward = make_forward(model)
        logits = forward(forward.prepare(leaves), ids, mask, keep=3)
        trained = [tensor for tensor in leaves.values() if tensor.requires_grad]
        generator = torch.Generator().manual_seed(2)
        direction = torch.randn(logits.shape, generator=generator) * mask[..., 3:].unsqueeze(-1)
        results.append((logits.detach(), *torch.autograd.grad((logits * direction).sum(), trained)))
        with torch.no_grad():  # to the last bit: where policy and anchor are one, their log-probabilities are
            assert torch.equal(forward(forward.prepare(leaves), ids, mask, keep=3), logits)
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second, first, atol=1e-4, rtol=1e-4)


def wide_gpt2():
    """A GPT-2 in float32 whose layers are treated as those of wide ones are."""
    return gpt2().float()


@pytest.mark.parametrize("make, count", [(lambda: family("llama"), 9), (wide_gpt2, 9)], ids=["llama", "gpt2"])
def test_packed_matrices_stay_when_rows_of_the_cache_are_dropped(make, count, monkeypatch):
    """Two layers of four products each, q, k and v in one, gate and up in one; and the head."""
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(products, "WORTH", 1)
    monkeypatch.setattr(gpt2_module, "SMALL", 0)
    model, (ids, mask), kept = make(), ragged(1), torch.tensor([[3, 1]])
    forward = make_forward(model)
    with torch.no_grad(), patch.object(products, "pack", side_effect=products.pack) as packing:
        prepared = forward.prepare(stack([parameters(model)]))
        cache = forward.new_cache(*ids.shape, model.lm_head.weight)
        for start, end in ((0, 6), (6, 7), (7, 8)):
            forward(prepared, ids[..., start:end], mask[..., :end], cache)
        times = packing.call_count
        cache = forward.cache_of(cache, kept)
        logits = forward(prepared, ids[:, kept[0], 8:9], mask[:, kept[0], :9], cache)
    assert times == packing.call_count == count
    expected = alone([model], ids[:, kept[0], :9], mask[:, kept[0], :9])[0]
    for row, right in zip(logits[0, :, 0], expected):
        torch.testing.assert_close(row, right[-1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("make", [lambda: family("llama"), wide_gpt2], ids=["llama", "gpt2"])
def test_few_tokens_to_come_are_not_worth_packing(make, monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(gpt2_module, "SMALL", 0)
    model, (ids, mask) = make(), ragged(1)
    forward = make_forward(model)
    prepared, like = forward.prepare(stack([parameters(model)])), model.lm_head.weight
    with torch.no_grad():
        for room, packed in ((8 + products.WORTH, True), (7 + products.WORTH, False)):
            cache = forward.new_cache(*ids.shape[:2], room, like)
            for start, end in ((0, 8), (8, 9)):
                forward(prepared, ids[..., start:end], mask[..., :end], cache)
            assert bool(cache.packs.packed) == packed


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("policies", [1, 3])
def test_gpt2_by_onednn_is_the_librarys(policies, fold, monkeypatch):
    """Logits, with a cache and without, and gradients; the last bit is the same whether or not one is taken."""
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(products, "WORTH", 1)
    monkeypatch.setattr(gpt2_module, "SMALL", 0)
    monkeypatch.setattr(gpt2_module, "FOLD_UP_TO", 256 if fold else 0)
    model, (ids, mask) = wide_gpt2(), ragged(policies)
    wide, forward, expected = gpt2(), make_forward(model), alone([model] * policies, ids, mask)
    leaves = {name: tensor.requires_grad_() for name, tensor in stack([parameters(model)] * policies).items()}
    with patch.object(products._Product, "apply", side_effect=products._Product.apply) as product:
        logits = forward(forward.prepare(leaves), ids, mask)
    assert product.call_count == 9 * policies
    assert_rows_equal(logits.detach(), expected, mask, 2e-5)
    (logits * mask.unsqueeze(-1)).square().sum().backward()
    right = {name: tensor.requires_grad_() for name, tensor in stack([parameters(wide)] * policies).items()}
    (ModuleForward(wide)(right, ids, mask) * mask.unsqueeze(-1)).square().sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), right[name].grad, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        prepared = forward.prepare(leaves)
        assert torch.equal(forward(prepared, ids, mask), logits)
        cache = forward.new_cache(*ids.shape, model.lm_head.weight)
        pieces = [forward(prepared, ids[..., :5], mask[..., :5], cache)]
        pieces += [forward(prepared, ids[..., t:t + 1], mask[..., :t + 1], cache) for t in range(5, ids.shape[-1])]
    assert cache.packs.packed
    assert_rows_equal(torch.cat(pieces, 2), expected, mask, 2e-5)


@pytest.mark.parametrize("make", [
    lambda: llama_like(LlamaForCausalLM, LlamaConfig, hidden_act="gelu"),
    lambda: llama_like(LlamaWithABias, LlamaConfig),
    lambda: llama_like(MistralForCausalLM, MistralConfig, sliding_window=3),
    lambda: llama_like(Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    lambda: family("llama").double(),
], ids=["another activation", "a subclass", "mistral, window", "qwen2, window", "float64"])
def test_the_handwritten_llama_refuses_what_it_would_get_wrong(make):
    model = make()
    assert not LlamaForward.supports(model)
    assert isinstance(make_forward(model), VmapForward)


def test_a_llama_with_a_module_of_the_users_own_is_not_left_to_the_handwritten_forward():
    model = family("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    assert LlamaForward.supports(model) and isinstance(make_forward(model), VmapForward)


# --- products by oneDNN ------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_onednns_products_and_gradients_are_those_of_float64(rows, monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 0)
    torch.manual_seed(0)
    x, matrix, direction = torch.randn(rows, 48), torch.randn(80, 48), torch.randn(rows, 80)
    wide = [tensor.double().requires_grad_() for tensor in (x, matrix)]
    expected = wide[0] @ wide[1].t()
    gradients = torch.autograd.grad(expected, wide, direction.double())
    leaves = x.requires_grad_(), matrix.requires_grad_()
    assert products.served(leaves[0].unsqueeze(0), leaves[1].unsqueeze(0))
    y = products.multiply(*leaves)
    for found, right in zip((y, *torch.autograd.grad(y, leaves, direction)), (expected, *gradients)):
        torch.testing.assert_close(found.double(), right, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(products.multiply(*leaves), y)
        packs = products.Packs(16, 100)  # packed for another number of rows
        packs.expect(0, 1)
        for parts in ([matrix], matrix.split([30, 40, 10])):
            packed = torch.cat(packs.multiply(str(len(parts)), x, list(parts)), -1)
            torch.testing.assert_close(packed.double(), expected, atol=1e-4, rtol=1e-5)
        assert len(packs.packed) == 2
    y = products.multiply(x.detach(), leaves[1])  # what needs no gradient is given none
    torch.testing.assert_close(torch.autograd.grad(y, leaves[1], direction)[0].double(), gradients[1], atol=1e-4,
                               rtol=1e-5)


@pytest.mark.parametrize("of", [torch.sum, lambda y: y[:, ::2].sum(), lambda y: (y.t() @ torch.ones(16, 3)).sum()],
                         ids=["one number seen many times", "every second column", "a transposed gradient"])
def test_onednn_takes_inputs_and_gradients_however_they_lie_in_memory(of):
    torch.manual_seed(0)
    matrix = torch.randn(400, 300, requires_grad=True)
    for x in (torch.randn(300, 16).t(), torch.randn(32, 600)[::2, ::2], torch.randn(1, 300).expand(16, 300)):
        x = x.requires_grad_() if x.is_leaf else x.detach().requires_grad_()
        found, right = (torch.autograd.grad(of(y), (x, matrix)) for y in (products.multiply(x, matrix), x @ matrix.t()))
        for one, other in zip(found, right):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    assert products.multiply(torch.empty(0, 300), matrix.detach()).shape == (0, 400)


def test_without_onednn_products_are_those_of_blas(monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 0)
    x, matrix = torch.randn(1, 4, 6), torch.randn(1, 5, 6)
    assert products.served(x, matrix) and not products.served(x.double(), matrix.double())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    products.available.cache_clear()
    try:
        assert not products.served(x, matrix)
    finally:
        monkeypatch.undo()
        products.available.cache_clear()
