"""Prompts, sampling and scoring against the library's module, and folders that cannot be loaded."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from tiny import ARCHITECTURES, POSITIONS, make_policy, make_tokenizer, naive_completion

from warp_lite import load_policy, save_policy
from warp_lite.averaging.state_dicts import parameters, stack
from warp_lite.policies.forward import make_forward
from warp_lite.policies.module_forward import ModuleForward
from warp_lite.policies.prompts import Prompts, encode_prompts, room_for_prompts
from warp_lite.policies.randomness import token_uniforms
from warp_lite.policies.sampling import Policies, Rollout, completion_ids, completions_text, inverted

RAGGED = ["this film", "that plot was great and i loved it but", "i", "this film was dull ."]
LONGEST = 8  # tokens of a completion


def draw(model, tokenizer, prompts, temperature=1.0, seed=0, length=LONGEST, uniforms=None, forward=None):
    """A rollout of one policy: (the policy, rollout, the numbers that decided it)."""
    policies = Policies(forward or make_forward(model), stack([parameters(model)]))
    encoded = encode_prompts(tokenizer, prompts).repeat(1)
    if uniforms is None:
        uniforms = token_uniforms((seed,), 0, len(encoded), length).unsqueeze(0)
    return policies, policies.sample(encoded, uniforms, tokenizer, temperature), uniforms


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("serial", [True, False], ids=["module", "batched"])
def test_completions_and_logprobs_are_those_of_a_naive_loop(architecture, serial, temperature, tokenizer, request):
    """Ragged prompts: each row equals its prompt alone, so padding has no part in it."""
    model = request.getfixturevalue(f"{architecture}_policy")
    forward = ModuleForward(model) if serial else make_forward(model)
    small = torch.linspace(0.02, 1, 16, dtype=torch.float64).view(1, 16, 1)  # EOS is one of the vocabulary's first
    uniforms = token_uniforms((0,), 0, 16, LONGEST) * small
    _, rollout, _ = draw(model, tokenizer, RAGGED * 4, temperature, uniforms=uniforms, forward=forward)
    completions = completion_ids(rollout.ids, rollout.mask)
    for row, text in enumerate(RAGGED * 4):
        expected, logps = naive_completion(
            model, tokenizer(text)["input_ids"], uniforms[0, row], tokenizer.eos_token_id, temperature)
        assert completions[row] == expected
        torch.testing.assert_close(rollout.logprobs[0, row, :len(logps)], torch.tensor(logps, dtype=torch.float64))
    lengths = [len(completion) for completion in completions]
    assert min(lengths) < LONGEST and max(lengths) == LONGEST  # some end early and some never end


def test_first_tokens_are_as_frequent_as_the_softmax_says(gpt2_policy, tokenizer):
    """Nothing is truncated and nothing is greedy: all 18 tokens appear, each in its share."""
    N = 10_000
    _, rollout, _ = draw(gpt2_policy, tokenizer, ["this film"] * N, temperature=0.9, length=1)
    with torch.no_grad():
        logits = gpt2_policy(torch.tensor([tokenizer("this film")["input_ids"]])).logits[0, -1]
    expected = (logits / 0.9).softmax(-1).numpy() * N
    observed = np.bincount(rollout.ids[0, :, 0], minlength=len(tokenizer))
    assert expected.min() > 5 and (observed > 0).all()
    assert chisquare(observed, expected).pvalue > 1e-3
    untempered = logits.softmax(-1).numpy() * N
    assert chisquare(observed, untempered).pvalue < 1e-6  # so the test can tell temperatures apart


def test_more_than_fifty_tokens_can_be_sampled():
    """The library's `generate` keeps the 50 most likely ones unless told otherwise."""
    tokenizer = make_tokenizer([f"w{i}" for i in range(100)])
    model = make_policy("gpt2", len(tokenizer), initializer_range=0.01)
    _, rollout, _ = draw(model, tokenizer, ["w1"] * 5000, length=1)
    assert len(rollout.ids.unique()) == len(tokenizer)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_the_librarys_loss_on_the_completion(architecture, pad):
    """Labels of −100 on the prompt and after EOS: EOS itself counts, even where padding is made of it."""
    tokenizer = make_tokenizer(pad=pad)
    model = make_policy(architecture, len(tokenizer), seed=1)
    policies, rollout, _ = draw(model, tokenizer, RAGGED * 4)
    scored = policies.logprobs(rollout)
    torch.testing.assert_close(scored, rollout.logprobs, atol=1e-9, rtol=1e-9)
    completions = completion_ids(rollout.ids, rollout.mask)
    for row, (text, completion) in enumerate(zip(RAGGED * 4, completions)):
        prompt = tokenizer(text)["input_ids"]
        labels = [-100] * len(prompt) + completion
        with torch.no_grad():
            loss = model(torch.tensor([prompt + completion]), labels=torch.tensor([labels])).loss
        torch.testing.assert_close(scored[0, row].sum(), -loss.double() * len(completion), atol=1e-6, rtol=1e-6)
    ended = [completion[-1] == tokenizer.eos_token_id for completion in completions]
    assert any(ended) and not all(ended)


def test_the_mask_counts_every_token_up_to_the_first_eos_and_nothing_after(gpt2_policy, tokenizer):
    policies, rollout, _ = draw(gpt2_policy, tokenizer, RAGGED * 8, seed=3)
    scored = policies.logprobs(rollout)
    for ids, mask, first, second in zip(rollout.ids[0], rollout.mask[0], rollout.logprobs[0], scored[0]):
        ends = (ids == tokenizer.eos_token_id).nonzero()
        length = ends[0].item() + 1 if len(ends) else len(ids)
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert (ids[length:] == tokenizer.pad_token_id).all()
        for logp in (first, second):
            assert (logp[:length] < 0).all() and (logp[length:] == 0).all()


def test_the_score_of_a_completion_does_not_depend_on_what_stands_after_eos(gpt2_policy, tokenizer):
    policies, rollout, _ = draw(gpt2_policy, tokenizer, RAGGED * 4)
    before = policies.logprobs(rollout)
    assert (rollout.mask == 0).any()
    rollout.ids = torch.where(rollout.mask.bool(), rollout.ids, 7)
    torch.testing.assert_close(policies.logprobs(rollout), before, atol=1e-12, rtol=1e-12)


def test_temperature_is_applied_alike_when_sampling_and_when_scoring(gpt2_policy, tokenizer):
    policies, rollout, _ = draw(gpt2_policy, tokenizer, RAGGED, temperature=0.6)
    torch.testing.assert_close(policies.logprobs(rollout, 0.6), rollout.logprobs, atol=1e-9, rtol=1e-9)
    assert (policies.logprobs(rollout, 1.0) - rollout.logprobs).abs().max() > 0.1
    logits = policies.completion_logits(rollout)
    by_hand = (logits / 0.6).log_softmax(-1).gather(-1, rollout.ids[..., None])[..., 0] * rollout.mask
    torch.testing.assert_close(by_hand, rollout.logprobs, atol=1e-9, rtol=1e-9)


def test_a_completion_does_not_depend_on_the_batch_around_it(policy_of, tokenizer):
    """Policies, rows and their order: each completion follows its own policy, prompt and numbers."""
    models = [policy_of("gpt2", seed=seed) for seed in range(3)]
    policies = Policies.of(models[0], [parameters(model) for model in models])
    uniforms = torch.stack([token_uniforms((e,), 0, len(RAGGED), LONGEST) for e in range(3)])
    encoded = encode_prompts(tokenizer, RAGGED)
    together = policies.sample(encoded.repeat(3), uniforms, tokenizer)
    whole = completion_ids(together.ids, together.mask)
    for e, model in enumerate(models):
        order = [2, 0, 3]
        _, some, _ = draw(model, tokenizer, [RAGGED[b] for b in order], uniforms=uniforms[e:e + 1, order])
        assert completion_ids(some.ids, some.mask) == [whole[e * len(RAGGED) + b] for b in order]
    assert whole[:4] != whole[4:8]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("serial", [True, False], ids=["module", "batched"])
@pytest.mark.parametrize("prompts", [RAGGED * 4, ["this film was"] * 16], ids=["ragged", "alike"])
def test_dropping_completions_that_ended_changes_none(architecture, serial, prompts, tokenizer, policy_of, monkeypatch):
    models = [policy_of(architecture, seed=seed) for seed in range(3)]
    forward = ModuleForward(models[0]) if serial else make_forward(models[0])
    policies = Policies(forward, stack([parameters(model) for model in models]))
    uniforms = torch.stack([token_uniforms((e,), 0, 16, LONGEST) for e in range(3)])
    uniforms *= 0.2  # EOS is one of the vocabulary's first
    encoded, found, widths = encode_prompts(tokenizer, prompts).repeat(3), [], []
    cache_of = forward.cache_of
    monkeypatch.setattr(forward, "cache_of", lambda cache, rows: widths.append(rows.shape[1]) or cache_of(cache, rows))
    monkeypatch.setattr("warp_lite.policies.sampling.DROP_AT", 0.99)
    for at_least in (1, 10**9):
        monkeypatch.setattr("warp_lite.policies.sampling.DROP_FROM", at_least)
        found.append(policies.sample(encoded, uniforms, tokenizer))
    dropped, whole = found
    assert widths and widths == sorted(set(widths), reverse=True) and widths[0] < 16
    assert torch.equal(dropped.ids, whole.ids) and torch.equal(dropped.mask, whole.mask)
    torch.testing.assert_close(dropped.logprobs, whole.logprobs, atol=1e-12, rtol=1e-12)


def test_sampling_stops_when_the_last_completion_has_ended(gpt2_policy, tokenizer):
    class Counted:
        """Counts the calls of a forward."""

        def __init__(self):
            self.inner, self.calls, self.model = make_forward(gpt2_policy), 0, gpt2_policy
            self.prepare, self.new_cache = self.inner.prepare, self.inner.new_cache

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return self.inner(*args, **kwargs)

    T = POSITIONS // 2
    uniforms = token_uniforms((0,), 0, 40, T).unsqueeze(0)
    _, rollout, _ = draw(gpt2_policy, tokenizer, RAGGED * 10, uniforms=uniforms)
    lengths = rollout.mask[0].sum(-1)
    short = [row for row, length in enumerate(lengths.tolist()) if length < T // 2]
    counted = Counted()
    _, some, _ = draw(gpt2_policy, tokenizer, [(RAGGED * 10)[row] for row in short],
                         uniforms=uniforms[:, short], forward=counted)
    assert len(short) > 3 and rollout.ids.shape[-1] == T
    assert counted.calls == some.ids.shape[-1] == lengths[short].max() < T
    always = 1 - 1e-9  # the last word, which is not EOS
    _, endless, _ = draw(gpt2_policy, tokenizer, RAGGED, uniforms=torch.full((1, 4, 5), always))
    assert endless.ids.shape[-1] == 5 and endless.mask.all()


def test_numbers_at_the_ends_of_the_interval_never_choose_a_token_without_mass(tokenizer):
    """In float32 a number just below 1 rounds to 1, which is past every token."""
    model = make_policy("gpt2", len(tokenizer), torch.float32)

    class Certain:
        """All mass on token 5."""

        prepare, new_cache = staticmethod(dict), staticmethod(lambda *args: None)

        def __init__(self):
            self.model = model

        def __call__(self, w, ids, mask=None, cache=None, keep=0):
            logits = torch.full((*ids.shape[:2], ids.shape[2] - keep, len(tokenizer)), -200.0)
            logits[..., 5] = 0
            return logits

    for u in (0.0, 0.5, np.nextafter(1, 0)):
        _, rollout, _ = draw(model, tokenizer, RAGGED, uniforms=torch.full((1, 4, 3), u).double(), forward=Certain())
        assert (rollout.ids == 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_computed_in_float32_at_least(dtype, policy_of, tokenizer):
    policies, rollout, _ = draw(policy_of("gpt2", dtype=dtype), tokenizer, RAGGED)
    assert rollout.logprobs.dtype == policies.logprobs(rollout).dtype == torch.float32


def test_texts_have_no_special_tokens_and_lists_of_ids_end_with_eos(tokenizer):
    ids = torch.tensor([[[6, 7, 2, 0], [2, 0, 0, 0], [8, 6, 7, 9]]])
    mask = torch.tensor([[[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]])
    assert completion_ids(ids, mask) == [[6, 7, 2], [2], [8, 6, 7, 9]]
    rollout = Rollout(encode_prompts(tokenizer, ["this"] * 3).repeat(1), ids, mask, torch.zeros(ids.shape), (2, 9))
    assert completions_text(tokenizer, rollout) == [tokenizer.decode(row) for row in ([6, 7], [], [8, 6, 7])]


# --- prompts ---------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left_and_a_batch_is_trimmed_to_its_longest(tokenizer):
    encoded = encode_prompts(tokenizer, RAGGED)
    for text, ids, mask in zip(RAGGED, encoded.ids, encoded.mask):
        tokens = tokenizer(text)["input_ids"]
        assert ids[mask.bool()].tolist() == tokens and mask.tolist() == sorted(mask.tolist())
    batch = encoded.batch(np.array([[0, 2], [3, 0]]))
    assert batch.texts == [RAGGED[i] for i in (0, 2, 3, 0)]
    assert batch.ids.shape == (2, 2, len(tokenizer(RAGGED[3])["input_ids"]))
    assert batch.ids[1, 0].tolist() == tokenizer(RAGGED[3])["input_ids"]
    repeated = encoded.repeat(3)
    assert repeated.ids.shape == (3, *encoded.ids.shape) and repeated.texts == RAGGED * 3


def test_columns_of_a_data_set_follow_their_prompts(tokenizer):
    Dataset = pytest.importorskip("datasets").Dataset
    data = Dataset.from_dict({"prompt": RAGGED, "target": [3, 1, 4, 5], "name": list("abcd")})
    batch = encode_prompts(tokenizer, data).batch(np.array([[2, 0], [1, 1]]))
    assert batch.texts == [RAGGED[i] for i in (2, 0, 1, 1)]
    assert batch.columns == {"target": [4, 3, 1, 1], "name": list("cabb")}
    assert batch.repeat(2).columns["target"] == [4, 3, 1, 1] * 2
    with pytest.raises(ValueError, match="no column 'prompt'; it has text, label"):
        encode_prompts(tokenizer, Dataset.from_dict({"text": RAGGED, "label": [0] * 4}))


def test_rows_of_a_rollout_keep_their_prompts_and_columns_when_policies_are_selected(gpt2_policy, tokenizer):
    columns = {"target": list(range(4))}
    encoded = encode_prompts(tokenizer, RAGGED)
    encoded = Prompts(encoded.texts, encoded.ids, encoded.mask, columns).batch(np.array([[0, 1], [2, 3], [1, 0]]))
    policies = Policies.of(gpt2_policy, [parameters(gpt2_policy)] * 3)
    rollout = policies.sample(encoded, torch.rand(3, 2, 4), tokenizer)
    chosen = rollout.select([2, 0])
    assert chosen.prompts.texts == [RAGGED[i] for i in (1, 0, 0, 1)]
    assert chosen.prompts.columns == {"target": [1, 0, 0, 1]}
    assert torch.equal(chosen.ids, rollout.ids[[2, 0]]) and torch.equal(chosen.logprobs, rollout.logprobs[[2, 0]])


@pytest.mark.parametrize("prompts, kind, words", [
    ([], ValueError, "no prompts"),
    (["this film", ""], ValueError, "prompt 1 is empty"),
    (["this film", "that \ud83d"], ValueError, "prompt 1 has half a character .a surrogate. in it"),
    (["this", 3], TypeError, "prompt 1 is int, not str: '3'"),
    (["this", None], TypeError, "prompt 1 is NoneType"),
    ("this film", TypeError, "list of str"),
    (["this", "film " * 7], ValueError, "prompt 1 has 7 tokens and leaves no room .*at most 6 fit"),
])
def test_prompts_that_cannot_be_used_are_refused_in_one_line(prompts, kind, words):
    with pytest.raises(kind, match=words) as caught:
        encode_prompts(make_tokenizer(bos=False), prompts, room=6)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_longest_prompt_that_fits_can_be_completed_to_the_last_position(architecture, tokenizer):
    model = make_policy(architecture, len(tokenizer))
    room = room_for_prompts(model, LONGEST)
    assert room == POSITIONS - LONGEST
    with pytest.raises(ValueError, match=f"at most {room} fit"):
        encode_prompts(tokenizer, ["film " * room], room)  # and <bos>
    policies, rollout, _ = draw(
        model, tokenizer, ["film " * (room - 1), "this"], uniforms=torch.full((1, 2, LONGEST), 1 - 1e-9))
    assert rollout.ids.shape[-1] == LONGEST
    torch.testing.assert_close(policies.logprobs(rollout), rollout.logprobs, atol=1e-9, rtol=1e-9)


def test_a_completion_longer_than_the_policys_positions_is_refused(gpt2_policy):
    with pytest.raises(ValueError, match=f"max_new_tokens is {POSITIONS}.*{POSITIONS} positions.*lower it"):
        room_for_prompts(gpt2_policy, POSITIONS)


# --- folders ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A policy on disk, to be broken."""
    save_policy(make_policy("gpt2", len(tokenizer), torch.float32, resid_pdrop=0.5), tokenizer, tmp_path / "policy")
    return tmp_path / "policy"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_policy_loads_as_it_was(architecture, tmp_path, tokenizer):
    model = make_policy(architecture, len(tokenizer), torch.float32)
    save_policy(model, tokenizer, tmp_path / "policy")
    loaded, loaded_tokenizer = load_policy(tmp_path / "policy")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    if architecture != "qwen2":  # whose folders the library reads with its own tokenizer class, whatever they say
        assert loaded_tokenizer(RAGGED)["input_ids"] == tokenizer(RAGGED)["input_ids"]
    assert loaded_tokenizer.eos_token_id == tokenizer.eos_token_id and loaded_tokenizer.padding_side == "left"
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))


def test_a_loaded_policy_has_no_dropout(folder):
    model, tokenizer = load_policy(folder)
    assert not model.training
    ids = torch.tensor([tokenizer(RAGGED[1])["input_ids"]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def alter_json(path, **changes):
    """Change entries of a JSON file; None drops one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def alter_weights(path, change):
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


BREAKS = {
    "missing": (lambda d: d.rename(d.with_name("elsewhere")), "there is no such folder"),
    "a file": (lambda d: (d.rename(d.with_name("elsewhere")), d.write_text("")), "neither a folder nor in GGUF"),
    "empty": (lambda d: [path.unlink() for path in d.iterdir()], "no config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "truncated"),
    "truncated header": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:100]),
                         "truncated"),
    "truncated weights": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
                          "truncated"),
    "a lacking tensor": (lambda d: alter_weights(d / "model.safetensors", lambda w: w.pop("transformer.ln_f.bias")),
                         "lacks weights.*'transformer.ln_f.bias'"),
    "a tensor of another shape": (
        lambda d: alter_weights(d / "model.safetensors", lambda w: w.update({"transformer.ln_f.bias": torch.zeros(3)})),
        r"'transformer.ln_f.bias' has shape \(3,\).*\(16,\)"),
    "pickled weights only": (lambda d: (torch.save({}, d / "pytorch_model.bin"), (d / "model.safetensors").unlink()),
                             "model.safetensors"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "JSON"),
    "config of another kind": (lambda d: (d / "config.json").write_text("[]"), "cannot load a policy"),
    "config with a wrong type": (lambda d: alter_json(d / "config.json", n_layer="two"), "n_layer"),
    "unknown architecture": (lambda d: alter_json(d / "config.json", model_type="gpt9"), "gpt9"),
    "no causal LM": (lambda d: alter_json(d / "config.json", model_type="vit"), "AutoModelForCausalLM"),
    "no tokenizer": (lambda d: [path.unlink() for path in d.glob("tokenizer*")], "no tokenizer"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "cannot load a policy"),
    "no EOS": (lambda d: [alter_json(d / name, eos_token=None, eos_token_id=None) for name in (
        "tokenizer_config.json", "config.json", "generation_config.json")], "has an EOS token"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_folder_that_cannot_be_used_is_named_in_one_line(name, folder):
    change, words = BREAKS[name]
    change(folder)
    with pytest.raises(ValueError, match=words) as caught:
        load_policy(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("words", [18, 4096, 4097, 9000, 20 * 256])
def test_the_token_is_where_the_running_sum_passes_the_number_and_has_a_probability(words, dtype):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 50, words, generator=generator, dtype=dtype).mul(4).softmax(-1)
    p[:, ::2] *= torch.rand(2, 25, words, generator=generator) < 0.01  # most words have none, whole blocks of them
    p[..., 5] += 1e-9
    below_one = 1 - torch.finfo(dtype).eps / 2
    u = torch.rand(2, 50, 1, generator=generator, dtype=dtype)
    for given in (u, 0 * u, torch.full_like(u, below_one)):
        token = inverted(p, given)
        assert token.shape == given.shape and (p.gather(-1, token) > 0).all()
        cdf = p.double().cumsum(-1)
        share = cdf.gather(-1, token) / cdf[..., -1:]
        before = share - p.double().gather(-1, token) / cdf[..., -1:]
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert (before <= given + tolerance).all() and (given <= share + tolerance).all()
    assert (inverted(p, 0 * u) == (p > 0).byte().argmax(-1, keepdim=True)).all()  # the first that has one
    p[0] = torch.nan  # is told of where the loss is not finite
    assert (inverted(p, u) < words).all()
