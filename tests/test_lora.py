"""Adapters: their merges against dense merges, PEFT as the oracle of ΔW, and Algorithm 1 that trains them."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from short_run import CONFIG, PROMPTS, assert_same_weights, differ, files, score, short_run, stop_after
from torch import nn
from transformers import AutoModelForCausalLM

from warp_lite import lerp, liti, load_result, slerp
from warp_lite.averaging.state_dicts import load_weights, parameters, stack
from warp_lite.cli import main
from warp_lite.policies.loading import save_policy
from warp_lite.policies.module_forward import ModuleForward
from warp_lite.policies.prompts import encode_prompts
from warp_lite.policies.sampling import Policies
from warp_lite.task import Task
from warp_lite.training.reinforce import advantages, checked_rewards, draw, warmup
from warp_lite.training.run import Run
from warp_lite.viewing.plots import draw_merges

peft = pytest.importorskip("peft")

from warp_lite.scale import lora as lora_module  # noqa: E402
from warp_lite.scale.adapters import (  # noqa: E402
    Adapter,
    adapter_gram,
    combine_adapters,
    factors_merged,
    fold,
    merge_adapters,
    relative_error,
    truncate,
)
from warp_lite.scale.lora import AdapterTrainer, LoraSettings  # noqa: E402
from warp_lite.scale.peft_folders import (  # noqa: E402
    compare_merges,
    front_adapter,
    load_adapter,
    merge_adapter_folders,
    save_adapter,
)

SETTINGS = LoraSettings(rank=2, alpha=3.0)
CASES = [("gpt2", False), ("gpt2", True), ("gemma3", False), ("llama", True)]


def random_adapter(policy, seed, rank=2, dtype=torch.float64):
    """An adapter of every matrix of the blocks, of norms that differ from matrix to matrix."""
    torch.manual_seed(seed)
    names = [n for n, p in policy.named_parameters() if p.dim() == 2 and (".h." in n or ".layers." in n)]
    gpt2 = "transformer." in names[0]
    factors = {}
    for k, name in enumerate(names):
        out, into = policy.get_parameter(name).shape[::-1 if gpt2 else 1]
        factors[name] = ((0.1 * (1 + k)) * torch.randn(out, rank, dtype=dtype), torch.randn(rank, into, dtype=dtype))
    return Adapter(factors, frozenset(names) if gpt2 else frozenset())


def peft_policy(policy, architecture, rslora=False, seed=0, **settings):
    """PEFT's own model around a copy of a policy, its factors drawn at random."""
    copied = load_weights(type(policy)(policy.config).to(policy.dtype), parameters(policy))
    torch.manual_seed(seed)
    model = peft.get_peft_model(copied, peft.LoraConfig(**{
        "r": 3, "lora_alpha": 5, "use_rslora": rslora, "target_modules": "all-linear",
        "fan_in_fan_out": architecture == "gpt2", "task_type": "CAUSAL_LM", **settings}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


# --- arithmetic against dense float64 -------------------------------------------------------


@pytest.mark.parametrize("method", ["slerp", "lerp"])
@pytest.mark.parametrize(("architecture", "count", "weights"), [
    ("gpt2", 2, None), ("gpt2", 3, None), ("llama", 4, None), ("gemma3", 2, (0.3, 0.7)), ("llama", 3, (0.2, 0.5, 0.3))])
def test_merging_adapters_is_merging_dense_policies(policy_of, architecture, count, weights, method):
    policy = policy_of(architecture)
    init, adapters = parameters(policy), [random_adapter(policy, seed) for seed in range(count)]
    dense = {"slerp": slerp, "lerp": lerp}[method](init, [fold(init, a) for a in adapters], weights)
    merged = merge_adapters(adapters, weights, method)
    assert_same_weights(fold(init, merged), dense, 1e-10)
    assert merged.rank == 2 * count and differ(dense, init)


def test_gram_of_factors_is_the_gram_of_dense_matrices(gpt2_policy):
    adapters = [random_adapter(gpt2_policy, seed) for seed in range(3)]
    for name in adapters[0].factors:
        flat = torch.stack([a.delta(name).flatten() for a in adapters])
        torch.testing.assert_close(adapter_gram(adapters, name), flat @ flat.T, rtol=1e-12, atol=1e-12)


def test_merging_factors_is_not_merging_adapters(gpt2_policy):
    """B̄Ā keeps 1/M of each trained term and adds M(M − 1)/M² that nobody trained; equal adapters hide it."""
    same = random_adapter(gpt2_policy, 0)
    assert relative_error(factors_merged([same, same]), same) < 1e-12
    for count in (2, 4):
        adapters = [random_adapter(gpt2_policy, seed) for seed in range(count)]
        mean = merge_adapters(adapters, method="lerp")
        # M terms kept at 1/M (their difference to the mean: 1 − 1/M), M(M − 1) of the same norm added
        expected = math.sqrt((1 - 1 / count) ** 2 * count + count * (count - 1) / count**2) / math.sqrt(count)
        assert relative_error(factors_merged(adapters), mean) == pytest.approx(expected, rel=0.25)
        assert relative_error(factors_merged(adapters), merge_adapters(adapters)) > 0.5


@pytest.mark.parametrize("rank", [1, 3, 4, 6, 50])
def test_truncation_is_the_dense_svd_and_its_error_is_the_norm_of_what_is_lost(gpt2_policy, rank):
    merged = merge_adapters([random_adapter(gpt2_policy, seed) for seed in range(3)])
    small, error = truncate(merged, rank)
    lost = total = 0.0
    for name in merged.factors:
        U, S, Vh = torch.linalg.svd(merged.delta(name), full_matrices=False)
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        torch.testing.assert_close(small.delta(name), best, rtol=0, atol=1e-9)
        lost, total = lost + (merged.delta(name) - best).square().sum(), total + merged.delta(name).square().sum()
    assert error == pytest.approx((lost / total).sqrt().item(), abs=1e-9)
    assert error == pytest.approx(relative_error(small, merged), abs=1e-7)
    assert (error < 1e-12) == (rank >= 6) and small.rank <= max(rank, 6)


def test_adapters_of_zero_and_of_one_policy_have_no_nan(gpt2_policy):
    zero, one = combine_adapters([random_adapter(gpt2_policy, 0)], [0.0]), random_adapter(gpt2_policy, 1)
    init = parameters(gpt2_policy)
    assert_same_weights(fold(init, merge_adapters([zero, zero])), init)
    dense = slerp(init, [init, fold(init, one)])
    assert_same_weights(fold(init, merge_adapters([zero, one])), dense, 1e-10)
    assert truncate(zero, 1)[1] == 0 and relative_error(zero, zero) == 0


def test_what_does_not_fit_is_refused(gpt2_policy, llama_policy):
    one = random_adapter(gpt2_policy, 0)
    part = Adapter(dict(list(one.factors.items())[1:]), one.transposed)
    with pytest.raises(ValueError, match="only one of adapters\\[0\\] and adapters\\[1\\] changes 'transformer.h.0"):
        merge_adapters([one, part])
    with pytest.raises(ValueError, match="in different shapes"):
        merge_adapters([one, Adapter({n: (A.T, B.T) for n, (B, A) in one.factors.items()}, one.transposed)])
    with pytest.raises(ValueError, match="1 adapter to merge"):
        merge_adapters([one])
    with pytest.raises(ValueError, match="method is 'mean'"):
        merge_adapters([one, one], method="mean")
    with pytest.raises(ValueError, match="which init has not"):
        fold(parameters(llama_policy), one)
    with pytest.raises(ValueError, match="by a matrix"):
        fold(parameters(gpt2_policy), Adapter(one.factors))
    with pytest.raises(ValueError, match="rank of an adapter"):
        truncate(one, 0)


# --- PEFT as the oracle ---------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "rslora"), CASES)
def test_a_loaded_adapter_changes_weights_as_pefts_merge_and_unload(policy_of, tmp_path, architecture, rslora):
    policy = policy_of(architecture)
    model = peft_policy(policy, architecture, rslora)
    model.save_pretrained(tmp_path / "adapter")
    expected = parameters(model.merge_and_unload())
    folded = fold(parameters(policy), load_adapter(tmp_path / "adapter"))
    assert_same_weights(folded, expected, 1e-12)
    assert differ(folded, parameters(policy))


def test_alphas_and_ranks_by_pattern_are_heeded(policy_of, tmp_path):
    policy = policy_of("gpt2")
    model = peft_policy(policy, "gpt2", rank_pattern={"c_fc": 1}, alpha_pattern={"h.1.attn.c_attn": 20})
    model.save_pretrained(tmp_path / "adapter")
    expected = parameters(model.merge_and_unload())
    assert_same_weights(fold(parameters(policy), load_adapter(tmp_path / "adapter")), expected, 1e-12)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_saved_adapter_is_what_peft_loads(policy_of, tmp_path, architecture):
    policy = policy_of(architecture)
    adapter = merge_adapters([random_adapter(policy, 0), random_adapter(policy, 1, rank=1)])
    save_adapter(adapter, tmp_path / "adapter", base="somewhere")
    loaded = peft.PeftModel.from_pretrained(load_weights(type(policy)(policy.config).to(policy.dtype),
                                                         parameters(policy)), tmp_path / "adapter")
    assert_same_weights(parameters(loaded.merge_and_unload()), fold(parameters(policy), adapter), 1e-12)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter_config.json",
                                                                       "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere"
    with pytest.raises(ValueError, match="is not an empty folder"):
        save_adapter(adapter, tmp_path / "adapter")


@pytest.mark.parametrize(("settings", "message"), [
    ({"use_dora": True}, "adapter of type DORA"),
    ({"bias": "all"}, "trained with bias = all"),
    ({"modules_to_save": ["ln_f"]}, r"trained with modules_to_save = \['ln_f'\]"),
    ({"init_lora_weights": "pissa"}, "changes the base model too"),
    ({"alora_invocation_tokens": [4, 5]}, r"trained with alora_invocation_tokens = \[4, 5\]"),
    ({"trainable_token_indices": [3]}, r"trained with trainable_token_indices = \[3\]"),
])
def test_adapters_that_are_no_sum_are_refused(policy_of, tmp_path, settings, message):
    model = peft_policy(policy_of("gpt2", dtype=torch.float32), "gpt2", **settings)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("changed, message", [
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga', which changes the base"),
    ({"init_lora_weights": "corda"}, "init_lora_weights='corda', which changes the base"),
    ({"init_lora_weights": "tomorrows"}, "init_lora_weights='tomorrows', which changes the base"),
    ({"lora_bias": True}, "lora_bias = True"), ({"layer_replication": [[0, 2]]}, "layer_replication = "),
    ({"use_qalora": True}, "use_qalora = True"), ({"tomorrows_field": 5}, "tomorrows_field = 5, which is more than"),
    ({"target_parameters": ["w"]}, "target_parameters"), ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"lora_alpha": None}, "lora_alpha = None, which is no number"), ({"peft_type": "VERA"}, "type VERA")], ids=str)
def test_every_setting_that_is_not_understood_is_refused_by_its_name_and_value(gpt2_policy, tmp_path, changed, message):
    """Also one that PEFT does not have yet, unless it is off."""
    save_adapter(random_adapter(gpt2_policy, 0), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"tomorrows_switch": False, "tomorrows_option": None}
    path.write_text(json.dumps(config))
    load_adapter(tmp_path / "adapter")
    path.write_text(json.dumps(config | changed))
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(tmp_path / "adapter")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("settings", [
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal", "r": 2}, {"init_lora_weights": "mica"},
    {"layers_to_transform": [1]}, {"target_modules": ["c_attn"], "exclude_modules": ["h.0.attn.c_attn"]}], ids=str)
def test_settings_that_leave_a_sum_are_understood(policy_of, tmp_path, settings):
    policy = policy_of("gpt2", dtype=torch.float32)
    targets = {"target_modules": ["c_attn"]} | settings
    model = peft_policy(policy, "gpt2", **targets)
    model.save_pretrained(tmp_path / "adapter")
    expected = parameters(model.merge_and_unload())
    assert_same_weights(fold(parameters(policy), load_adapter(tmp_path / "adapter")), expected, 1e-5)


def test_folders_that_are_no_adapter_are_refused(gpt2_policy, tmp_path):
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_adapter(tmp_path)
    save_adapter(random_adapter(gpt2_policy, 0), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is it truncated"):
        load_adapter(tmp_path / "adapter")


def test_without_peft_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs peft, which is not installed: pip install 'warp-lite\[lora\]'"):
        lora_module.library("peft", "lora")


# --- Algorithm 1 that trains adapters -------------------------------------------------------


def lora_run(policy, tokenizer, lora=SETTINGS, **options):
    return short_run(policy, tokenizer, lora=lora, **options)


@pytest.fixture(scope="module")
def result(policy_of, tokenizer, tmp_path_factory):
    """A finished run of adapters and its folder, shared: not to be changed."""
    out = tmp_path_factory.mktemp("lora") / "run"
    return lora_run(policy_of("gpt2", dtype=torch.float32), tokenizer, out=out), out


@pytest.mark.parametrize(("architecture", "rslora"), [("gpt2", False), ("llama", True)])
def test_a_run_is_reinforce_on_pefts_own_model_with_the_anchor_averaging_weights(policy_of, tokenizer, architecture,
                                                                                rslora):
    """The oracle: PEFT's module and ΔW, torch's Adam and clipping, one loss by autograd, an anchor of dense weights."""
    policy, config = policy_of(architecture), CONFIG.replace(steps=5, mu=0.3)
    init, settings = parameters(policy), LoraSettings(rank=2, alpha=3.0, rslora=rslora)
    prompts = encode_prompts(tokenizer, PROMPTS)
    run = Run(config, 1, 2, init, init, score)
    trainer = AdapterTrainer(settings)
    trainer.start(Task(policy, tokenizer, score, prompts, prompts), config, None)
    other, state = trainer.train([Run(config, 1, 1, init, init, score), run])

    model = peft_policy(policy, architecture, rslora, r=2, lora_alpha=3)
    first = trainer.first_factors(run)
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert theta.keys() == first.keys()
    with torch.no_grad():
        for name, parameter in theta.items():
            parameter.copy_(first[name])
    optimizer = torch.optim.Adam(theta.values(), lr=config.lr, betas=(config.adam_beta1, config.adam_beta2))
    forward, plain, anchor = ModuleForward(model), ModuleForward(policy), dict(init)
    for step in range(config.steps):
        batch, uniforms = draw([run], step, prompts)
        now = {name: p.unsqueeze(0) for name, p in theta.items()}
        rollout = Policies(forward, now).sample(batch, uniforms, tokenizer)
        logp = Policies(forward, now).logprobs(rollout).sum(-1)
        with torch.no_grad():
            kl = logp - Policies(plain, stack([anchor])).logprobs(rollout).sum(-1)
        reward = checked_rewards([run], step, rollout, tokenizer) - config.beta * kl
        optimizer.zero_grad()
        (-(advantages(reward) * logp).mean() / config.max_new_tokens).backward()
        torch.nn.utils.clip_grad_norm_(theta.values(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.lr * warmup(config, step)
        optimizer.step()
        with torch.no_grad():  # ΔW by PEFT
            for module, layer in model.named_modules():
                if hasattr(layer, "lora_A"):
                    name = f"{module.removeprefix('base_model.model.')}.weight"
                    anchor[name] = 0.7 * anchor[name] + 0.3 * (init[name] + layer.get_delta_weight("default"))
    assert_same_weights(state.trained, {name: p.detach() for name, p in theta.items()}, 1e-9)
    assert_same_weights(state.anchor, anchor, 1e-9)
    assert_same_weights(state.policy, parameters(model.merge_and_unload()), 1e-9)
    assert differ(state.policy, init) and differ(state.anchor, init) and differ(state.policy, other.policy)


def test_only_adapted_matrices_move_and_their_updates_have_the_rank(result):
    result, _ = result
    for iteration in result.iterations:
        for policy in iteration.policies:
            for name, init in iteration.init.items():
                delta = (policy[name] - init).double()
                if ".h." in name and init.dim() == 2:
                    S = torch.linalg.svdvals(delta)
                    assert S[0] > 1e-3 and S[2] < 1e-3 * S[0], name
                else:
                    assert torch.equal(policy[name], init), name


def test_merge_front_and_next_init_are_those_of_the_dense_policies(result):
    result, _ = result
    first, second = result.iterations
    for iteration in (first, second):
        assert_same_weights(iteration.merged, slerp(iteration.init, iteration.policies))
        assert_same_weights(iteration.next_init, liti(iteration.init, iteration.merged, CONFIG.eta))
    assert_same_weights(second.init, first.next_init)
    assert differ(second.init, result.sft)
    points = result.front(etas=(0, 0.5, 1))
    assert points[0]["kl"] == pytest.approx(0, abs=1e-6) and points[2]["kl"] > 0


def test_the_folder_loads_and_its_adapters_give_the_front(result):
    result, out = result
    loaded = load_result(out, score)
    assert_same_weights(loaded.weights(), result.weights())
    assert json.loads((out / "config.json").read_text())["settings"]["lora"]["rank"] == 2
    for eta, iteration in ((1.0, 1), (0.5, 2)):
        exact, error = front_adapter(out, eta, iteration)
        assert error == 0 and exact.rank == 2 * 2 * iteration
        assert_same_weights(fold(result.sft, exact), result.weights(eta, iteration), 1e-5)
        small, error = front_adapter(out, eta, iteration, rank=2)
        assert small.rank == 2 and error == pytest.approx(relative_error(small, exact), rel=1e-4) and 0 < error < 1
    with pytest.raises(ValueError, match="no iteration 3"):
        front_adapter(out, iteration=3)


def test_executors_agree_and_a_run_does_not_depend_on_how_many_there_are(policy_of, tokenizer):
    both = [lora_run(policy_of("gpt2"), tokenizer, executor=executor) for executor in ("batched", "serial")]
    for a, b in zip(*(r.iterations for r in both)):
        assert_same_weights(a.merged, b.merged, 1e-9)
        assert_same_weights(a.anchors[1], b.anchors[1], 1e-9)
    alone = lora_run(policy_of("gpt2"), tokenizer, runs=1, iterations=1)
    assert_same_weights(alone.iterations[0].policies[0], both[0].iterations[0].policies[0], 1e-9)


def test_anchor_sft_stays_at_the_sft_policy(policy_of, tokenizer):
    found = lora_run(policy_of("gpt2"), tokenizer, anchor="sft")
    for iteration in found.iterations:
        for anchor in iteration.anchors:
            assert_same_weights(anchor, found.sft)


def test_the_callers_model_comes_back_as_it_was(policy_of, tokenizer):
    policy = policy_of("gpt2", dtype=torch.float32)
    before, names = {n: t.clone() for n, t in parameters(policy).items()}, [n for n, _ in policy.named_modules()]
    lora_run(policy, tokenizer)
    assert_same_weights(parameters(policy), before)
    assert names == [n for n, _ in policy.named_modules()] and all(p.requires_grad for p in policy.parameters())


def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(policy_of, tokenizer, tmp_path, result):
    _, whole = result
    for calls in (2, 6):
        out = tmp_path / f"stopped-{calls}"
        with pytest.raises(KeyboardInterrupt):
            lora_run(policy_of("gpt2", dtype=torch.float32), tokenizer, out=out, stop=stop_after(calls))
        lora_run(policy_of("gpt2", dtype=torch.float32), tokenizer, out=out, resume=True)
        found, expected = files(out), files(whole)
        assert found.keys() == expected.keys()
        for name in found:
            if "adapter_config" not in name and name != "DONE" and not name.endswith("/DONE"):
                assert found[name] == expected[name], name


def test_another_rank_is_not_resumed(result, policy_of, tokenizer):
    _, out = result
    with pytest.raises(ValueError, match="holds a run with lora.rank = 2, not 3"):
        lora_run(policy_of("gpt2", dtype=torch.float32), tokenizer, LoraSettings(3, 3.0), out=out, resume=True)


def test_wrong_settings_are_refused_before_anything_is_written(policy_of, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="rank of an adapter must be 1 or more"):
        LoraSettings(rank=0)
    with pytest.raises(ValueError, match="alpha must be above 0"):
        LoraSettings(alpha=math.nan)
    with pytest.raises(ValueError, match="load it in float32"):
        lora_run(policy_of("gpt2", dtype=torch.bfloat16), tokenizer, out=tmp_path / "run")
    with pytest.raises(ValueError, match="no linear layer"):
        lora_run(policy_of("gpt2"), tokenizer, LoraSettings(2, target_modules="wte"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_average_of_factors_is_another_anchor(policy_of, tokenizer):
    """Why the anchor keeps dense matrices: along a run, B̄Ā falls short of the average of BA by a share that is
    measured here."""
    policy, config = policy_of("gpt2"), CONFIG.replace(steps=30, mu=0.1)
    trainer, init = AdapterTrainer(SETTINGS), parameters(policy)
    trainer.start(Task.of(policy, tokenizer, score, PROMPTS, PROMPTS, max_new_tokens=5), config, None)
    averaged, path = None, []

    def watch(runs, step, states, metrics):
        path.append(states()[0])

    trainer.train([Run(config, 1, 1, init, init, score)], watch)
    averaged = trainer.first_factors(Run(config, 1, 1, init, init, score))
    for state in path:
        averaged = {name: 0.9 * averaged[name] + 0.1 * state.trained[name] for name in averaged}
    lost = total = 0.0
    for name in trainer.names:
        exact = path[-1].anchor[name] - init[name]
        lost += (trainer.adapter_of(averaged).delta(name) - exact).square().sum().item()
        total += exact.square().sum().item()
    assert 0.01 < math.sqrt(lost / total) < 1


def test_the_figure_shows_what_merging_factors_loses(result):
    result, out = result
    adapters = [load_adapter(out / f"iteration-1/run-{m}/adapter") for m in (1, 2)]
    ways = compare_merges(result, adapters, rank=2, etas=(0.0, 1.0))
    exact, small, wrong = ways
    assert exact["error"] == 0 and 0 < small["error"] < 1 and wrong["error"] > 0.5
    assert exact["points"][1]["kl"] == pytest.approx(result.front([1.0], [1])[0]["kl"], rel=1e-3)
    axes = draw_merges(ways).axes[0]
    drawn = [np.stack(container.lines[0].get_data(), 1) for container in axes.containers]
    for way, line in zip(ways, drawn, strict=True):
        np.testing.assert_allclose(line, [[p["kl"], p["reward"]] for p in way["points"]])
    assert f"reward {wrong['points'][1]['reward']:.2f}" in axes.get_title(loc="left")
    assert "A and B merged separately (relative error" in axes.get_legend().get_texts()[2].get_text()


# --- folders and the command line -----------------------------------------------------------


def test_merged_folders_are_dense_policies_or_adapters_of_a_rank(result, tokenizer, policy_of, tmp_path, capsys):
    result, out = result
    init, adapters = str(out / "sft"), [str(out / f"iteration-1/run-{m}/adapter") for m in (1, 2)]
    for eta in (1.0, 0.5):
        target = tmp_path / f"dense-{eta}"
        assert main(["merge", "--init", init, "--policies", *adapters, "--eta", str(eta), "--out", str(target)]) == 0
        dense = parameters(AutoModelForCausalLM.from_pretrained(target))
        assert_same_weights(dense, liti(result.sft, result.iterations[0].merged, eta), 1e-5)
        assert (target / "tokenizer.json").is_file() and not (target / "adapter_config.json").exists()
    error = merge_adapter_folders(init, adapters, tmp_path / "again", rank=2)
    assert main(["merge", "--init", init, "--policies", *adapters, "--rank", "2", "--out", str(tmp_path / "two")]) == 0
    assert f"rank 2: relative error {error:.2g}" in capsys.readouterr().out
    exact = merge_adapters([load_adapter(folder) for folder in adapters])
    assert relative_error(load_adapter(tmp_path / "two"), exact) == pytest.approx(error, rel=1e-4)
    refused = ["merge", "--init", init, "--policies", init, init, "--rank", "2", "--out", str(tmp_path / "no")]
    assert main(refused) == 2 and "--rank is for adapters" in capsys.readouterr().err
    other = tmp_path / "llama"
    save_policy(policy_of("llama", dtype=torch.float32), tokenizer, other)
    assert main(["merge", "--init", str(other), "--policies", *adapters, "--out", str(tmp_path / "no")]) == 2
    assert "has not; were they trained on it?" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_the_command_line_trains_adapters(policy_of, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    save_policy(policy_of("llama", dtype=torch.float32), tokenizer, tmp_path / "policy")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["run", "--policy", str(tmp_path / "policy"), "--reward", "short_run:score", "--prompts",
               str(tmp_path / "prompts.txt"), "--lora-rank", "3", "--out", str(tmp_path / "run")]
    for change in ("iterations=1", "runs=2", "steps=2", "batch_size=3", "max_new_tokens=4", "eval_every=0", "lr=0.01"):
        command += ["--set", change]
    assert main(command) == 0, capsys.readouterr().err
    assert (tmp_path / "run/front.json").is_file()
    assert load_adapter(tmp_path / "run/iteration-1/run-2/adapter").rank == 3
    assert main([*command, "--lora-rank", "0", "--out", str(tmp_path / "no")]) == 2
    assert "must be 1 or more" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_adapters_load_with_peft_in_a_process_without_this_package(result, tmp_path):
    result, out = result
    adapter, _ = front_adapter(out, 0.5)
    save_adapter(adapter, tmp_path / "half", base=out / "sft")
    program = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
for base, adapter in (sys.argv[1:3], sys.argv[3:5]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    same = AutoPeftModelForCausalLM.from_pretrained(adapter)
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(model(ids).logits, same(ids).logits)
    print(model(ids).logits.double().sum().item())
assert "warp_lite" not in sys.modules
"""
    pairs = [(out / "iteration-1/next-init", out / "iteration-2/run-2/adapter"), (out / "sft", tmp_path / "half")]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, *(str(p) for pair in pairs for p in pair)],
                          capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = result.policy(0.5)
    for line, weights in zip(done.stdout.split(), (result.iterations[1].policies[1], result.weights(0.5)), strict=True):
        with torch.no_grad():
            logits = load_weights(model, weights)(torch.tensor([[1, 5, 6, 7]])).logits
        assert float(line) == pytest.approx(logits.double().sum().item(), rel=1e-4)


# --- runs that fail -------------------------------------------------------------------------


@pytest.mark.parametrize("when", [1, 3])
def test_front_adapter_is_of_the_runs_that_were_merged(policy_of, tokenizer, tmp_path, when):
    """One run of three fails, at its first step or later; the others go on, and a front is of them alone."""
    calls = []

    def failing(prompts, completions):
        calls.append(0)  # the first two are the trial of a reward, then there is one a step
        return [math.nan if len(calls) - 2 >= when else float(len(text)) for text in completions]

    result = lora_run(policy_of("llama", dtype=torch.float32), tokenizer, reward=[score, failing, score], runs=3,
                      eval_every=0, on_failure="continue", out=tmp_path / "run")
    assert [iteration.runs for iteration in result.iterations] == [[1, 3], [1, 3]]
    for iteration in (1, 2):
        adapter, error = front_adapter(tmp_path / "run", eta=0.5, iteration=iteration)
        assert error == 0 and adapter.rank == 2 * 2 * iteration
        assert_same_weights(fold(result.sft, adapter), result.weights(0.5, iteration), 1e-5)
    assert_same_weights(load_result(tmp_path / "run", score).iterations[1].merged, result.iterations[1].merged)


# --- the base that an adapter is of ---------------------------------------------------------


def test_adapters_of_another_iterations_base_are_refused_and_of_their_own_merged(result, tmp_path, capsys):
    """The run's own merge is the oracle; a copy of the base elsewhere, or in 16 bits' worth of values, will do."""
    run, out = result
    policies = [out / f"iteration-2/run-{m}/adapter" for m in (1, 2)]
    merge_adapter_folders(out / "iteration-1/next-init", policies, tmp_path / "right")
    merged = parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "right"))
    assert_same_weights(merged, run.iterations[1].merged, 1e-5)
    with pytest.raises(ValueError, match="was trained on other weights than those of .*sft: its base is .*next-init"):
        merge_adapter_folders(out / "sft", policies, tmp_path / "wrong")
    assert main(["merge", "--init", str(out / "sft"), "--policies", *map(str, policies), "--out",
                 str(tmp_path / "wrong")]) == 2
    assert "was trained on other weights" in capsys.readouterr().err and not (tmp_path / "wrong").exists()
    shutil.copytree(out / "sft", tmp_path / "copy")
    merge_adapter_folders(tmp_path / "copy", [out / f"iteration-1/run-{m}/adapter" for m in (1, 2)], tmp_path / "one")
    assert capsys.readouterr().err == ""


def test_pefts_own_adapters_are_checked_where_their_base_is_there_and_else_it_is_said(policy_of, tokenizer, tmp_path,
                                                                                     capsys):
    for seed, name in enumerate(("base", "other")):
        save_policy(policy_of("gpt2", dtype=torch.float32, seed=seed), tokenizer, tmp_path / name)
    peft_policy(policy_of("gpt2", dtype=torch.float32), "gpt2").save_pretrained(tmp_path / "adapter")

    def saved(base, name):
        shutil.copytree(tmp_path / "adapter", tmp_path / name)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
        return tmp_path / name

    here = saved(str(tmp_path / "base"), "here")
    merge_adapter_folders(tmp_path / "base", [here], tmp_path / "out")
    expected = fold(parameters(policy_of("gpt2", dtype=torch.float32)), load_adapter(here))
    assert_same_weights(parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, 1e-6)
    assert "cannot be known" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="was trained on other weights than those of .*other"):
        merge_adapter_folders(tmp_path / "other", [here, here], tmp_path / "wrong")
    for base in ("somebody/gpt2", None):
        away = saved(base, f"away-{base is None}")
        merge_adapter_folders(tmp_path / "base", [away, here], tmp_path / f"out-{base is None}")
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warp-lite")]
        assert f"whether {away} was trained on {tmp_path / 'base'} cannot be known" in line


def test_an_adapter_is_merged_onto_a_folder_without_the_base_models_name(policy_of, tokenizer, tmp_path):
    """As the hub has GPT-2."""
    policy = policy_of("gpt2", dtype=torch.float32)
    save_policy(policy, tokenizer, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file,
              metadata={"format": "pt"})
    adapter = random_adapter(policy, 0, dtype=torch.float32)
    save_adapter(adapter, tmp_path / "adapter", base=tmp_path / "base")
    merge_adapter_folders(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert_same_weights(merged, fold(parameters(policy), adapter), 1e-6)
