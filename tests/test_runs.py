"""The run folder: refused when it is another's, written whole, checked when it is read."""

import json
import shutil

import pytest
import torch
from short_run import CONFIG, PROMPTS, files, other_score, score, short_run, stop_after

from warp_lite import load_result
from warp_lite.averaging.state_dicts import parameters
from warp_lite.storage.files import read_json, read_lines, whole, write_json
from warp_lite.storage.provenance import pinned_threads, provenance
from warp_lite.storage.run_config import check_out
from warp_lite.storage.tensors import weights_hash
from warp_lite.training.run import RunState
from warp_lite.training.run_folder import RunFolder

SETTINGS = {"config": {"lr": 1.0, "steps": 3}, "source": None}
LIKE = {"b": torch.zeros(2), "a": torch.zeros(3, 2)}


def state(step, value=1.0):
    return RunState(step, *({name: tensor + value + i for name, tensor in LIKE.items()} for i in range(4)))


@pytest.fixture(scope="module")
def policy(policy_of):
    return policy_of("gpt2", dtype=torch.float32)


@pytest.fixture(scope="module")
def finished(policy, tokenizer, tmp_path_factory):
    """A finished run folder, shared: copy it to change it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    short_run(policy, tokenizer, out=folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run folder."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# --- which folders are taken ----------------------------------------------------------------


def test_an_absent_and_an_empty_folder_are_new(tmp_path):
    (tmp_path / "empty").mkdir()
    assert not check_out(tmp_path / "absent") and not check_out(tmp_path / "empty", resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_folder_of_something_else_is_refused_untouched(tmp_path, gpt2_policy):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    gpt2_policy.save_pretrained(tmp_path / "model")  # it has a config.json too
    (tmp_path / "file").write_text("")
    before = files(tmp_path)
    for name, message in (("notes", "not empty and not a run folder"), ("model", "not empty and not a run folder"),
                          ("file", "is a file")):
        for resume in (False, True):
            with pytest.raises(ValueError, match=message):
                RunFolder(tmp_path / name, SETTINGS, LIKE, resume)
    assert files(tmp_path) == before


def test_a_run_folder_is_continued_only_when_asked(tmp_path):
    RunFolder(tmp_path / "run", SETTINGS, LIKE)
    with pytest.raises(ValueError, match="holds a run already; continue it with --resume or choose another"):
        RunFolder(tmp_path / "run", SETTINGS, LIKE)
    assert check_out(tmp_path / "run", resume=True, settings=SETTINGS)


@pytest.mark.parametrize("change, message", [
    ({"lr": 2e-2}, "with lr = 0.01, not 0.02"), ({"seed": 3}, "with seed = 0, not 3"),
    ({"merge": "lerp"}, "with merge = 'slerp', not 'lerp'"),
    ({"reward": other_score}, "with reward = 'score', not 'other_score'"),
    ({"prompts": PROMPTS[:7]}, "with prompts.eval = 3, not 2"), ({"prompts": PROMPTS[::-1]}, "on other prompts")])
def test_resume_with_other_settings_names_the_first_that_differs(policy, tokenizer, run, change, message):
    before = files(run)
    with pytest.raises(ValueError, match=f"holds a run {message}; resume with the same settings or choose another"):
        short_run(policy, tokenizer, out=run, resume=True, **change)
    assert files(run) == before


def test_resume_with_another_policy_is_refused(policy_of, tokenizer, run):
    with pytest.raises(ValueError, match="holds a run of another policy; "):
        short_run(policy_of("gpt2", dtype=torch.float32, seed=1), tokenizer, out=run, resume=True)


# --- what is not whole ----------------------------------------------------------------------


def test_a_folder_is_filled_beside_its_place_and_vanishes_on_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "sft") as made:
        made.mkdir()
        (made / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    for content in ("1", "2"):
        with whole(tmp_path / "sft") as made:
            made.mkdir()
            (made / content).write_text(content)
            assert not (tmp_path / "sft" / content).exists()
        assert [p.name for p in tmp_path.rglob("*")] == ["sft", content]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "a.json", bad)
    assert read_json(tmp_path / "a.json") == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_state_is_there_for_all_runs_that_train_together_or_an_earlier_one_is(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run", SETTINGS, LIKE)
    assert folder.load_states(1, [1, 2]) == [None, None]
    folder.save_states(1, [1, 2], [state(5), state(5)])
    folder.save_states(1, [1], [state(9)])
    shutil.copy(folder.run(1, 2) / "state-5.safetensors", folder.run(1, 1) / "state-5.safetensors")
    # as if it was killed after the first of two was written: 5 and 9 for run 1, only 5 for run 2
    assert [s.step for s in folder.load_states(1, [1, 2])] == [5, 5]
    assert [s.step for s in folder.load_states(1, [1])] == [9]
    folder.save_states(1, [1, 2], [state(12), state(12)])
    assert sorted(p.name for p in folder.path.rglob("state-*")) == ["state-12.safetensors"] * 2


def test_weights_come_back_in_the_order_of_the_model(tmp_path):
    folder = RunFolder(tmp_path / "run", SETTINGS, LIKE)
    folder.save_states(1, [1], [state(5)])
    (found,) = folder.load_states(1, [1])
    folder.finish_run(1, 1, state(7))
    for weights in (found.policy, found.exp_avg_sq, *folder.finished_run(1, 1)):
        assert list(weights) == list(LIKE) != sorted(LIKE)
    assert torch.equal(found.exp_avg["a"], LIKE["a"] + 3)


def test_logs_forget_what_will_be_taken_anew(tmp_path):
    folder = RunFolder(tmp_path / "run", SETTINGS, LIKE)
    folder.append(1, 1, "metrics.jsonl", [{"step": s} for s in (1, 2, 3)])
    with (folder.run(1, 1) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # cut off by a crash
    assert [row["step"] for row in read_lines(folder.run(1, 1) / "metrics.jsonl")] == [1, 2, 3]
    folder.cut_logs(1, 1, 2)
    assert (folder.run(1, 1) / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


# --- what is checked when it is read --------------------------------------------------------


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [
    "iteration-1/run-2/policy.safetensors", "iteration-2/run-1/anchor.safetensors", "iteration-1/run-1/metrics.jsonl",
    "iteration-1/run-1/trajectory.jsonl", "iteration-2/merged/model.safetensors", "iteration-1/next-init/config.json",
    "sft/model.safetensors", "sft/tokenizer.json", "prompts.json"])
def test_an_altered_file_is_named(policy, tokenizer, run, name):
    if name == "prompts.json":
        (run / name).write_text((run / name).read_text().replace("this film was", "that film was"))
    else:
        damage(run / name)
    before = files(run)
    message = f"{name} is not what {'config.json' if name == 'prompts.json' else 'DONE'} vouches for; "
    message += "take it from a copy" if name.startswith(("sft", "prompts")) else "remove .*"
    with pytest.raises(ValueError, match=message):
        load_result(run, score)
    with pytest.raises(ValueError, match=message):
        short_run(policy, tokenizer, out=run, resume=True)
    assert files(run) == before


def test_a_missing_file_is_named(run):
    (run / "iteration-1/run-2/policy.safetensors").unlink()
    with pytest.raises(ValueError, match="run-2/policy.safetensors is not what DONE vouches for; remove .*run-2 to"):
        load_result(run, score)


def test_the_way_out_of_an_altered_run_leads_out(policy, tokenizer, run, finished):
    damage(run / "iteration-2/run-1/policy.safetensors")
    shutil.rmtree(run / "iteration-2/run-1")
    short_run(policy, tokenizer, out=run, resume=True)
    altered = {name for name, data in files(run).items() if data != files(finished).get(name)}
    assert all(name.startswith("iteration-2/run-1/") for name in altered), "alone it may round otherwise"
    damage(run / "iteration-1/merged/model.safetensors")
    for name in ("DONE", "merged", "next-init"):
        path = run / "iteration-1" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    short_run(policy, tokenizer, out=run, resume=True)
    assert files(run)["iteration-1/merged/model.safetensors"] == files(finished)["iteration-1/merged/model.safetensors"]


def test_a_truncated_state_is_named_with_a_way_out(policy, tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        short_run(policy, tokenizer, out=tmp_path / "run", stop=stop_after(2))
    (path,) = (tmp_path / "run/iteration-1/run-2").glob("state-*")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot read .*run-2/state-2.safetensors: .*; is it truncated. remove it"):
        short_run(policy, tokenizer, out=tmp_path / "run", resume=True)
    path.unlink()
    short_run(policy, tokenizer, out=tmp_path / "run", resume=True)


def test_an_unfinished_folder_is_not_a_result(policy, tokenizer, run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        short_run(policy, tokenizer, out=tmp_path / "half", stop=stop_after(CONFIG.steps + 1))
    with pytest.raises(ValueError, match="half is not finished: run 1 of iteration 2 is missing; continue it with"):
        load_result(tmp_path / "half", score)
    (run / "iteration-2" / "DONE").unlink()
    with pytest.raises(ValueError, match="not finished: the merge of iteration 2 is missing"):
        load_result(run, score)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"settings": 3}', '{"model_type": "gpt2"}'])
def test_a_folder_without_a_run_is_not_a_result(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="is not a run folder|cannot read .*config.json"):
        load_result(tmp_path, score)


# --- facts ----------------------------------------------------------------------------------


def test_the_hash_of_weights_is_that_of_names_shapes_and_values(policy):
    weights = parameters(policy)
    first = next(iter(weights))
    assert weights_hash(weights) == weights_hash({name: tensor.clone() for name, tensor in weights.items()})
    others = [{**weights, first: weights[first] + 1e-6}, {**weights, first: weights[first].T},
              {n if n != first else "x": t for n, t in weights.items()}, {**weights, first: weights[first].double()}]
    assert len({weights_hash(w) for w in [weights, *others]}) == 5


def test_a_resumed_run_keeps_the_number_of_threads(policy, tokenizer, tmp_path):
    seen, brief = [], {"iterations": 1, "steps": 2, "eval_every": 0}
    with pinned_threads(2):
        with pytest.raises(KeyboardInterrupt):
            short_run(policy, tokenizer, out=tmp_path / "run", stop=stop_after(1), **brief)

    def threads():
        seen.append(torch.get_num_threads())
        return False

    before = torch.get_num_threads()
    short_run(policy, tokenizer, out=tmp_path / "run", resume=True, stop=threads, **brief)
    assert set(seen) == {2} and torch.get_num_threads() == before != 2


def test_provenance_says_what_made_it():
    found = provenance()
    assert found["packages"]["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert json.dumps(found)
