"""The numbers behind the site's scenes: what a command measures, and what is committed of it."""

import json

import pytest
import torch
from short_run import score, short_run

from warp_lite import ParetoExplorer, load_result
from warp_lite.notebooks import __main__ as notebooks
from warp_lite.notebooks import scenes
from warp_lite.notebooks.scenes import ETAS, as_lines, dial, flat, front, marked, moved, plane

COMMITTED = json.loads((notebooks.ROOT / "site" / "scenes.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def result(gpt2_policy, tokenizer):
    return short_run(gpt2_policy, tokenizer)


def test_flat_weights_and_back(result):
    merged = result.iterations[-1].merged
    again = moved(result.sft, flat(merged) - flat(result.sft))
    for name, tensor in merged.items():
        torch.testing.assert_close(again[name], tensor)


def test_places_in_the_plane_keep_the_length_of_the_merge_and_lengthen_nothing(result, monkeypatch):
    monkeypatch.setattr(scenes, "ACROSS", 3)
    monkeypatch.setattr(scenes, "UP", 2)
    made = plane(result)
    last, sft = result.iterations[-1], flat(result.sft)
    x, y = made["iterations"][-1]["merged"]
    assert (x, y) == pytest.approx(((flat(last.merged) - sft).norm().item(), 0), abs=2e-3)
    for policy, place in zip(last.policies, made["iterations"][-1]["runs"]):
        assert torch.tensor(place).norm() <= (flat(policy) - sft).norm() + 2e-3
    assert made["iterations"][0]["init"] == [0, 0]
    assert [len(row) for row in made["rewards"]] == [len(made["across"])] * len(made["up"]) == [3, 3]


def test_the_dial_and_the_front_have_what_the_scenes_read(result):
    assert [point["eta"] for point in dial(result)] == list(ETAS)
    made = front(ParetoExplorer(result, fast=True, prompts=2, limit=[], progress=False).grid, "a short run")
    for of in (made, COMMITTED["fronts"]["tiny"]):
        for line in of["lines"]:
            assert [point["eta"] for point in line["points"]] == of["etas"]
            assert all({"kl", "kl_se", "reward", "reward_se", "length"} <= point.keys() for point in line["points"])
    assert made.keys() == COMMITTED["fronts"]["tiny"].keys()


def test_a_run_folders_front_is_written_under_its_name(result, tmp_path, monkeypatch, capsys):
    result.save(tmp_path / "mine")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr("warp_lite.reopen.load_result", lambda folder: load_result(folder, score))
    assert notebooks.main(["scenes", str(tmp_path / "mine")]) == 0
    made = json.loads((tmp_path / "site" / "fronts" / "mine.json").read_text(encoding="utf-8"))
    assert made.keys() == COMMITTED["fronts"]["tiny"].keys() and "One WARP of mine, seed 0" in made["about"]
    assert notebooks.main(["scenes", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_changed_words_are_masked():
    assert marked("a dull film .", "a bright film .") == ["a bright film .", "0100"]


def test_a_part_is_a_line():
    assert json.loads(as_lines({"a": [1.5], "b": {"c": "η"}})) == {"a": [1.5], "b": {"c": "η"}}
    text = (notebooks.ROOT / "site" / "scenes.json").read_text(encoding="utf-8")
    assert text == as_lines(COMMITTED)


def test_what_is_committed_says_what_made_it():
    assert COMMITTED["provenance"]["commit"] and COMMITTED["config"]["seed"] == 0
