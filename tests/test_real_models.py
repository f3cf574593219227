"""Models as people have them go through the command line: their tokenizers, paddings, templates, classifiers."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from real_folders import TEXTS, TOKENIZERS, classifier_folder, gpt2_tokenizer, policy_folder, qwen2_tokenizer
from short_run import files
from tiny import ARCHITECTURES, make_policy, make_tokenizer, naive_completion
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer, pipeline

from warp_lite import ClassifierReward, WarpConfig, load_policy, load_result, run_warp
from warp_lite.averaging.state_dicts import parameters
from warp_lite.cli import main
from warp_lite.policies.loading import load_tokenizer, save_policy
from warp_lite.policies.prompts import encode_prompts
from warp_lite.policies.randomness import prompt_indices, token_uniforms
from warp_lite.rewards.calling import call_reward
from warp_lite.rewards.classifiers import PipelineReward
from warp_lite.storage.files import LOCK

WORDS = [f"{a} {b} {c}" for a in ("this", "that") for b in ("film", "plot") for c in ("was", "is", "was great")]
CHATS = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": text}] for text in WORDS]
SHORT = [f"--set={setting}" for setting in (
    "iterations=1", "runs=2", "steps=2", "batch_size=3", "lr=1e-2", "max_new_tokens=5", "eval_every=2")]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of each kind: four policies, a classifier, two files of prompts. Leave it as it is."""
    folder = tmp_path_factory.mktemp("shelf")
    for architecture in TOKENIZERS:
        settings = {"max_position_embeddings": 96} if architecture != "gpt2" else {"n_positions": 96}
        policy_folder(architecture, folder / architecture, **settings)
    classifier_folder(folder / "distilbert")
    for name, prompts in (("prompts", WORDS), ("chats", CHATS)):
        rows = [json.dumps({"prompt": prompt, "id": i}) + "\n" for i, prompt in enumerate(prompts)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def few(monkeypatch):
    """Evaluation with few samples."""
    monkeypatch.setattr("warp_lite.result.EVALUATION_SAMPLES", 8)
    monkeypatch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 32)


def command(shelf, out, policy, *more, reward="distilbert", prompts="prompts.jsonl"):
    return ["run", "--policy", str(shelf / policy), "--reward", str(shelf / reward), "--prompts",
            str(shelf / prompts), "--out", str(out), "--device", "cpu", *SHORT, *more]


def one_error(capsys, arguments) -> str:
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and len(err.splitlines()) == 1, (code, out, err)
    return err


# --- from disk to a front, and on from there ------------------------------------------------


@pytest.fixture(scope="module")
def finished(shelf, tmp_path_factory):
    """`finished(architecture)`: the folder of a run by the command line, made once."""
    made = {}

    def folder_of(architecture):
        if architecture not in made:
            out = tmp_path_factory.mktemp("runs") / architecture
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warp_lite.result.EVALUATION_SAMPLES", 8)
                patch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 32)
                patch.setenv("WARP_LITE_CACHE", str(out.parent / "cache"))
                assert main(command(shelf, out, architecture)) == 0
            made[architecture] = out
        return made[architecture]

    return folder_of


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_policy_reward_and_prompts_from_disk_become_a_front(architecture, shelf, finished):
    """η = 0 is the policy as it was given: no KL, and its reward is the library's, of texts by the library."""
    out = finished(architecture)
    front = json.loads((out / "front.json").read_text())
    assert [p["eta"] for p in front["points"]] == pytest.approx([i / 10 for i in range(11)])
    start, *rest = front["points"]
    assert abs(start["kl"]) < 1e-5 and all(p["kl"] > 0 for p in rest)
    assert front["unit"] == "logit of POSITIVE"
    result = load_result(out)
    held_out = result.task.eval_prompts.given
    texts = [f"{p} {c.strip()}" for p, c in zip(held_out, result.completions(held_out, 0.0))]
    judge = pipeline("text-classification", str(shelf / "distilbert"), function_to_apply="none", top_k=None)
    expected = [next(e["score"] for e in row if e["label"] == "POSITIVE") for row in judge(texts)]
    completions = [text.removeprefix(prompt) for prompt, text in zip(result.task.eval_prompts.given, texts)]
    assert result.task.reward(result.task.eval_prompts.given, completions) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_points_of_the_front_load_where_this_package_cannot_be_imported(finished, tmp_path):
    """Weights, tokenizer and generation settings, from folders with nothing in them that runs code."""
    program = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "warp_lite":
            raise ImportError("blocked")
sys.meta_path.insert(0, Block())
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("this film wasn't", return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids).logits.double()
    g = model.generation_config
    print(json.dumps([ids["input_ids"].tolist(), logits.sum().item(), tokenizer.eos_token_id, tokenizer.pad_token,
                      [g.do_sample, g.temperature, g.top_k, g.eos_token_id], tokenizer.chat_template]))
"""
    expected, folders = [], []
    for architecture in ARCHITECTURES:
        result = load_result(finished(architecture))
        folders += [finished(architecture) / "iteration-1" / "merged", tmp_path / architecture]
        result.save_policy(folders[-1], eta=0.3)
        for eta in (1.0, 0.3):
            ids = result.task.tokenizer("this film wasn't", return_tensors="pt")
            with torch.no_grad():
                logits = result.policy(eta)(**ids).logits.double()
            own = TOKENIZERS[architecture]()
            expected.append([ids["input_ids"].tolist(), pytest.approx(logits.sum().item(), rel=1e-4), own.eos_token_id,
                             own.pad_token, [True, 0.7, 7, own.eos_token_id], own.chat_template])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, *map(str, folders)], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected
    suffixes = {path.suffix for architecture in ARCHITECTURES for path in finished(architecture).rglob("*.*")
                if path.name != LOCK}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".jinja", ".png"}


def test_a_point_of_the_front_is_a_merge_on_disk_of_the_folders_of_a_run(finished, tmp_path, capsys):
    """θ_η = (1 − η) θ_sft + η θ_merged: what save_policy writes, the command `merge` writes from two folders."""
    out = finished("gpt2")
    merged = str(out / "iteration-1" / "merged")
    assert main(["merge", "--init", str(out / "sft"), "--policies", merged, merged, "--eta", "0.3",
                 "--out", str(tmp_path / "disk")]) == 0
    load_result(out).save_policy(tmp_path / "memory", eta=0.3)
    ours, disk = (parameters(load_policy(tmp_path / name)[0]) for name in ("memory", "disk"))
    for name, tensor in ours.items():
        torch.testing.assert_close(disk[name], tensor)
    for name in ("generation_config.json", "tokenizer.json"):
        one, two = (json.loads((tmp_path / where / name).read_text()) for where in ("disk", "memory"))
        assert one == two


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_side_on_which_a_tokenizer_pads_changes_nothing(architecture, shelf, few, tmp_path, monkeypatch):
    """Byte for byte: policies, metrics and front."""
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path / "cache"))
    found = {}
    for side in ("left", "right"):
        shutil.copytree(shelf / architecture, tmp_path / side)
        config = json.loads((tmp_path / side / "tokenizer_config.json").read_text())
        (tmp_path / side / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": side}))
        assert load_policy(tmp_path / side)[1].padding_side == side
        out = tmp_path / f"run-{side}"
        assert main([*command(shelf, out, architecture), "--policy", str(tmp_path / side)]) == 0
        found[side] = {name: content for name, content in files(out).items()
                       if name.endswith((".safetensors", ".jsonl", "front.json"))}
    assert found["left"] == found["right"] and len(found["left"]) > 8


# --- a tokenizer whose padding is EOS ---------------------------------------------------------


def test_where_padding_is_eos_the_action_that_ends_a_completion_is_still_learned(tmp_path):
    """One step against autograd on each sequence alone, EOS's log-probability in the sum and nothing after it."""
    tokenizer = make_tokenizer(bos=False, pad="<eos>")
    ids = {"pad_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = make_policy("gpt2", len(tokenizer), **ids)
    with torch.no_grad():  # so that EOS comes early: scores rise along the last layer's bias
        model.transformer.ln_f.bias += 1.5 * model.transformer.wte.weight[tokenizer.eos_token_id]
    prompts, T, B = ["this film", "that plot was", "i loved"], 6, 4
    config = WarpConfig(iterations=1, runs=1, merge="none", steps=1, batch_size=B, lr=1e-3, warmup_steps=1, beta=0.2,
                        max_new_tokens=T, max_grad_norm=1e9, eval_every=0, adam_eps=1.0)  # so large that steps ∝ ∇
    score = {"<eos>": 0.5}

    def reward(prompts, completions, completion_ids, **kwargs):
        return [float(len(row)) + score["<eos>"] * (row[-1] == tokenizer.eos_token_id) for row in completion_ids]

    result = run_warp(model, tokenizer, reward, prompts, config, eval_prompts=["that film"], progress=False)

    key = (config.seed, 1, 1)
    rows = prompt_indices(key, 0, B, len(prompts))
    uniforms = token_uniforms(key, 0, B, T)
    encoded = [tokenizer(prompts[i])["input_ids"] for i in rows]
    actions = [naive_completion(model, prompt, u, tokenizer.eos_token_id, 1.0)[0]
               for prompt, u in zip(encoded, uniforms)]
    ended = [a[-1] == tokenizer.eos_token_id for a in actions]
    assert any(ended) and any(len(a) < T for a in actions) and len({len(a) for a in actions}) > 1
    rewards = torch.tensor(reward(None, None, actions), dtype=torch.float64)
    advantages = rewards - (rewards.sum() - rewards) / (B - 1)  # the first step has no KL to its anchor
    loss = 0.0
    for prompt, action, advantage in zip(encoded, actions, advantages):
        logp = model(torch.tensor([[*prompt, *action]])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        loss = loss - advantage * logp[range(len(action)), action].sum() / B / T
    loss.backward()
    learned = result.iterations[0].policies[0]
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        expected = parameter.detach() - config.lr * gradient / (gradient.abs() + config.adam_eps)
        torch.testing.assert_close(learned[name], expected, rtol=1e-7, atol=1e-10)


# --- conversations ----------------------------------------------------------------------------

CHAT_REWARD = """
import json, pathlib

def score(prompts, completions, completion_ids, **kwargs):
    seen = pathlib.Path("seen.json")
    if not seen.exists():
        seen.write_text(json.dumps([prompts, completions, completion_ids]))
    return [len(c[0]["content"]) + 0.1 * len(p) for p, c in zip(prompts, completions)]
"""


def test_conversations_are_written_by_the_chat_template_and_reach_rewards_as_in_trl(shelf, few, tmp_path, monkeypatch,
                                                                                    capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat_reward.py").write_text(CHAT_REWARD)
    arguments = command(shelf, tmp_path / "out", "qwen2", prompts="chats.jsonl")
    arguments[arguments.index("--reward") + 1] = "chat_reward:score"
    assert main(arguments) == 0
    prompts, completions, ids = json.loads((tmp_path / "seen.json").read_text())
    assert all(prompt in CHATS for prompt in prompts)
    tokenizer = AutoTokenizer.from_pretrained(shelf / "qwen2")
    expected = [[{"role": "assistant", "content": text}] for text in tokenizer.batch_decode(ids, True)]
    assert completions == expected
    kept = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert sorted(map(str, kept["train"] + kept["eval"])) == sorted(map(str, CHATS))
    shown = capsys.readouterr().out
    assert "<|im_start|>user\n" in shown and "<|im_start|>assistant\n" in shown
    result = load_result(tmp_path / "out")  # the conversations are read back and encoded as they were
    batch = result.task.eval_prompts
    for messages, row, real in zip(kept["eval"], batch.ids.tolist(), batch.mask.tolist()):
        by_library = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert [token for token, m in zip(row, real) if m] == by_library


def test_a_template_that_writes_bos_does_not_get_a_second_one():
    tokenizer = TOKENIZERS["llama"]()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
    ids = encode_prompts(tokenizer, [[{"role": "user", "content": "this film"}]]).ids[0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.decode(ids, skip_special_tokens=True) == "this film"


def test_a_classifier_reads_a_conversation_line_by_line_or_by_its_own_template(shelf):
    reward = ClassifierReward(shelf / "distilbert")
    answer = [{"role": "assistant", "content": "it is superb"}]
    plain = reward(["be brief\nthis film was\nit is superb"], [""])
    assert reward([CHATS[0]], [answer]) == pytest.approx(plain, abs=1e-6)
    reward.tokenizer.chat_template = "{% for m in messages %}[CLS] {{ m.content }} [SEP]{% endfor %}"
    with torch.no_grad():
        row = reward.tokenizer("[CLS] be brief [SEP][CLS] this film was [SEP][CLS] it is superb [SEP]",
                               add_special_tokens=False, return_tensors="pt")
        expected = reward.model(**row).logits[0, 1].item()
    assert reward([CHATS[0]], [answer]) == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("prompts, message", [
    ([CHATS[0], "this film"], "prompt 1 is no list of messages"),
    ([CHATS[0], []], "prompt 1 is no list of messages"),
    ([CHATS[0], [{"role": "user"}]], "prompt 1 is no list of messages"),
    (["this film", CHATS[0]], "prompt 1 is list, not str")])
def test_prompts_are_texts_or_conversations_and_not_a_mixture(prompts, message):
    with pytest.raises(TypeError, match=message):
        encode_prompts(qwen2_tokenizer(), prompts)


def test_a_conversation_for_a_tokenizer_without_a_template_is_one_line(shelf, tmp_path, capsys):
    message = one_error(capsys, command(shelf, tmp_path / "x", "gpt2", prompts="chats.jsonl"))
    assert "prompt 0 is a conversation, but the policy's tokenizer has no chat template" in message
    assert not (tmp_path / "x").exists()


# --- rewards ----------------------------------------------------------------------------------


def test_the_label_and_the_output_of_the_classifier_can_be_chosen_and_are_found_again(shelf, few, tmp_path, capsys,
                                                                                      monkeypatch):
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path / "cache"))
    options = ["--reward-label", "negative", "--reward-output", "log-probability"]
    assert main(command(shelf, tmp_path / "out", "gpt2", *options)) == 0
    assert "log-probability of NEGATIVE" in capsys.readouterr().out
    reward = load_result(tmp_path / "out").task.reward
    by_index = ClassifierReward(shelf / "distilbert", label=0)
    other = ClassifierReward(shelf / "distilbert", label=1)
    a, b = by_index(["this film"], ["is dull"])[0], other(["this film"], ["is dull"])[0]
    assert reward(["this film"], ["is dull"])[0] == pytest.approx(a - np.logaddexp(a, b), abs=1e-5)
    for options, words in ((["--reward-label", "neutral"], "2 labels (NEGATIVE, POSITIVE) and no label 'neutral'"),
                           (["--reward-label", "2"], "no label 2"),
                           (["--reward", "chat_reward:score", "--reward-label", "0"], "is no classifier")):
        assert words in one_error(capsys, command(shelf, tmp_path / "x", "gpt2", *options))


def test_a_pipeline_of_the_library_is_a_reward(shelf):
    """As it is, and with a label and log-probabilities chosen; equal to the classifier it holds."""
    judge = pipeline("text-classification", str(shelf / "distilbert"), batch_size=2)
    prompts, completions = ["this film", "that plot", "the"], ["was great .", "is dull", "great " * 60]
    for label in ("POSITIVE", 0):
        for log_probability in (False, True):
            classifier = ClassifierReward(shelf / "distilbert", label, log_probability)
            values = PipelineReward(judge, label, log_probability)(prompts, completions)
            assert values == pytest.approx(classifier(prompts, completions), abs=1e-5)
    expected = ClassifierReward(shelf / "distilbert")(prompts, completions)
    assert call_reward(judge, prompts, completions, {"completion_ids": [[1]] * 3}) == pytest.approx(expected, abs=1e-5)
    model, tokenizer = load_policy(shelf / "gpt2")
    config = WarpConfig(iterations=1, runs=1, merge="none", steps=1, batch_size=2, max_new_tokens=3, eval_every=0)
    result = run_warp(model, tokenizer, judge, WORDS, config, progress=False)
    assert np.isfinite(result.front([0.0, 1.0], samples=1)[1]["reward"])
    with pytest.raises(ValueError, match="a pipeline for 'text-generation' gives no reward"):
        PipelineReward(pipeline("text-generation", str(shelf / "gpt2")))


def test_what_is_too_long_for_a_classifier_is_cut_at_its_beginning(shelf):
    """48 positions: [CLS], the last 46 words, [SEP]; the completion is what is judged."""
    reward = ClassifierReward(shelf / "distilbert")
    assert reward.tokenizer.model_max_length > 10**9 and reward.longest == 48
    long, short = reward(["dull " * 60], ["great " * 40]), reward(["dull " * 6], ["great " * 40])
    assert long == pytest.approx(short, abs=1e-5)


# --- tokenizers that do not fit, or do not reload ---------------------------------------------


def test_tokens_without_an_embedding_are_named_before_anything_is_written(shelf, tmp_path, capsys):
    model, _ = load_policy(shelf / "gpt2")
    more = gpt2_tokenizer()
    more.add_tokens(["film"])
    save_policy(model, more, tmp_path / "word")
    padded = gpt2_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    save_policy(model, padded, tmp_path / "pad")
    for folder, words in (("word", "prompt 0 has the token 'film' with the id 321, and the policy has 321 embeddings"),
                          ("pad", "padding token '[PAD]' has the id 321")):
        arguments = command(shelf, tmp_path / "x", "gpt2")
        arguments[arguments.index("--policy") + 1] = str(tmp_path / folder)
        assert words in one_error(capsys, arguments) and not (tmp_path / "x").exists()


def test_a_token_that_no_prompt_has_may_be_without_an_embedding(shelf, tmp_path, few, capsys):
    """As Gemma 3's smaller models ship: their tokenizer knows an image token that they do not."""
    model, tokenizer = load_policy(shelf / "gemma3")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    save_policy(model, tokenizer, tmp_path / "gemma")
    arguments = command(shelf, tmp_path / "out", "gemma3")
    arguments[arguments.index("--policy") + 1] = str(tmp_path / "gemma")
    assert main(arguments) == 0


def test_a_classifier_whose_tokenizer_is_anothers_is_named(shelf, tmp_path, capsys):
    model = ClassifierReward(shelf / "distilbert").model
    save_policy(model, gpt2_tokenizer(), tmp_path / "c")
    message = one_error(capsys, [*command(shelf, tmp_path / "x", "gpt2"), "--reward", str(tmp_path / "c")])
    assert "cannot load a reward model" in message and "are both of one checkpoint?" in message


@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_a_tokenizer_splits_text_as_its_own_file_says_whatever_the_architecture(architecture, tmp_path, capsys):
    """The library makes Qwen 2's tokenizer of any that stands in a Qwen 2 folder."""
    tokenizer = TOKENIZERS["llama"]()
    model = make_policy("qwen2", len(tokenizer), torch.float32, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    save_policy(model, tokenizer, tmp_path / "policy")
    if architecture == "phi3":
        config = json.loads((tmp_path / "policy" / "config.json").read_text())
        (tmp_path / "policy" / "config.json").write_text(json.dumps({**config, "model_type": "phi3"}))
    text = "this film was great, naïve"
    by_library = AutoTokenizer.from_pretrained(tmp_path / "policy")
    found = load_tokenizer(str(tmp_path / "policy"))
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (found.eos_token, found.bos_token) == ("</s>", "<s>")
    warned = "splits text otherwise than its tokenizer.json; the file is followed" in capsys.readouterr().err
    assert warned == (by_library(text)["input_ids"] != tokenizer(text)["input_ids"]) == (architecture == "qwen2")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokenizers_of_each_kind_reload_as_the_library_reloads_them(architecture, shelf, capsys):
    by_library, found = AutoTokenizer.from_pretrained(shelf / architecture), load_tokenizer(str(shelf / architecture))
    assert type(found) is type(by_library) and capsys.readouterr().err == ""
    for text in TEXTS:
        one, two, made = (t(text)["input_ids"] for t in (found, by_library, TOKENIZERS[architecture]()))
        assert one == two == made
    assert isinstance(found, GemmaTokenizer) == (architecture == "gemma3")


def test_saved_folders_keep_their_architecture_and_no_code(finished):
    for architecture in ARCHITECTURES:
        config = json.loads((finished(architecture) / "iteration-1" / "merged" / "config.json").read_text())
        assert "auto_map" not in config and config["architectures"]
        AutoModelForCausalLM.from_pretrained(finished(architecture) / "iteration-1" / "merged")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
