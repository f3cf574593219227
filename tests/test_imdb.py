"""Worlds from the hub: on a small hub in a folder, and what is said where the real one does not answer."""

import contextlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from real_folders import classifier_folder, policy_folder
from test_real_models import one_error
from torch.nn.functional import cross_entropy
from transformers import pipeline

from warp_lite import load_policy
from warp_lite.averaging.state_dicts import parameters
from warp_lite.cli import main
from warp_lite.policies import hub
from warp_lite.policies.loading import save_policy
from warp_lite.task import World
from warp_lite.worlds import load_world, small_hub
from warp_lite.worlds.imdb import IMDB, ImdbSettings, imdb_world, openings, read_reviews
from warp_lite.worlds.reviews import reviews_world

SHORT = [f"--set={setting}" for setting in (
    "iterations=1", "runs=2", "steps=2", "batch_size=4", "lr=1e-3", "max_new_tokens=6", "eval_every=2")]


@pytest.fixture(scope="module")
def mirror(world, tmp_path_factory):
    """A hub in a folder, in place of the real one, with the tiny world's policy of both architectures."""
    with pytest.MonkeyPatch.context() as patch:
        # another architecture would be trained first: the policy that is there will do for both
        patch.setattr(small_hub, "reviews_world", lambda architecture, progress: reviews_world("gpt2", progress=False))
        return small_hub.make_small_hub(tmp_path_factory.mktemp("hub"), ("gpt2-imdb", "gemma-imdb"))


@pytest.fixture
def offline(mirror, monkeypatch, tmp_path):
    """The hub in a folder as $WARP_LITE_HUB; the library's cache of data sets elsewhere."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("WARP_LITE_HUB", str(mirror))
    return mirror


# --- the worlds -------------------------------------------------------------------------------


def test_gpt2_imdb_is_the_policy_the_classifier_and_the_openings_of_reviews(offline):
    found = load_world("gpt2-imdb", progress=False)
    assert isinstance(found, World) and found.gold is None and found.texts is None
    assert len(found.eval_prompts) == 64 and len(found.prompts) == 1024
    assert not set(found.eval_prompts.given) & set(found.prompts.given)
    rows = [json.loads(line) for line in (offline / "stanfordnlp/imdb/train.jsonl").read_text().splitlines()]
    texts = {row["text"] for row in rows}
    for prompt in found.eval_prompts.given:
        assert len(found.tokenizer.tokenize(prompt)) == 8 and any(text.startswith(prompt) for text in texts)
    labels = {row["text"]: row["label"] for row in rows}
    first = [labels[text] for text in read_reviews("stanfordnlp/imdb", 100)]
    assert [row["label"] for row in rows] == sorted(row["label"] for row in rows) and 20 < sum(first) < 80
    judge = pipeline("text-classification", str(offline / "lvwerra/distilbert-imdb"), top_k=None)
    (scores,) = judge(["this film was great"], function_to_apply="none")
    positive = next(score["score"] for score in scores if score["label"] == "POSITIVE")
    assert found.reward(["this film was"], [" great"]) == [pytest.approx(positive, abs=1e-4)]
    assert found.reward.unit == "logit of POSITIVE"


def test_gemma_imdb_is_fine_tuned_on_other_reviews_and_kept(offline, monkeypatch, tmp_path):
    """What SFT is for: the held-out reviews become likelier. A second time nothing is trained."""
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path))
    settings = ImdbSettings(**{**vars(IMDB["gemma-imdb"]), "sft_steps": 30, "sft_lr": 1e-3, "train_prompts": 200,
                               "eval_prompts": 20})
    base, tokenizer = load_policy(hub.local(settings.policy))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += parameter.std(correction=0).nan_to_num() * torch.randn_like(parameter)
    save_policy(base, tokenizer, hub.local(settings.policy))
    made = imdb_world(settings, progress=False)
    texts = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in made.eval_prompts.given]

    def loss(model):
        with torch.no_grad():
            return sum(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item() for ids in texts) / len(texts)

    assert loss(made.policy) < loss(base) - 0.2
    assert made.folder.parent == tmp_path and (made.folder / "sft" / "tokenizer.json").is_file()
    monkeypatch.setattr("warp_lite.worlds.imdb.train_on_texts", lambda *a: pytest.fail("it trained again"))
    again = imdb_world(settings, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(parameters(made.policy).values(), parameters(again.policy).values()))
    assert again.prompts.given == made.prompts.given


def test_the_preset_runs_and_its_front_is_measured_again(offline, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("warp_lite.result.EVALUATION_SAMPLES", 64)
    monkeypatch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 16)
    arguments = ["run", "--preset", "gpt2-imdb", *SHORT, "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert front["prompts"] == 64 and front["unit"] == "logit of POSITIVE"
    assert main(["front", str(tmp_path / "run"), "--etas", "0,1", "--prompts", "4", "--device", "cpu"]) == 0
    assert main([*arguments, "--resume"]) == 0
    capsys.readouterr()
    assert "leave out --reward-label" in one_error(capsys, [*arguments, "--reward-label", "0"])


def test_openings_are_whole_tokens_each_once_and_the_rest_is_left_over(world):
    texts = ["this new film was great and the plot was dull .", "this new film was great but i loved it .",
             "this new film was .", *(f"the {kind} {noun} was great ." for kind in ("old", "long", "short")
                                      for noun in ("film", "movie", "comedy", "sequel")), "the loud western was dull ."]
    found, left = openings(world.tokenizer, texts, 12, 4)
    assert found[0] == "this new film was" and len(found) == len(set(found)) == 12 and left == texts[14:]
    with pytest.raises(ValueError, match="only 2 of 4 reviews have an opening of 4 tokens; ten are needed"):
        openings(world.tokenizer, texts[:4], 12, 4)


@pytest.mark.parametrize("content, message", [
    ('{"review": "a"}\n', "no column 'text'; it has review"), ('{"text": \n', "cannot load the reviews from .*imdb"),
    (None, "cannot load the reviews")])
def test_reviews_that_cannot_be_read_are_one_line(content, message, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "imdb").mkdir()
    if content:
        (tmp_path / "imdb" / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_reviews(str(tmp_path / "imdb"), 3)
    assert "\n" not in str(caught.value)


# --- the hub itself ---------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, by the name of the repository."""

    ANSWERS = {"gated": (403, "GatedRepo"), "gone": (401, "RepoNotFound"), "empty": (404, "EntryNotFound"),
               "broken": (500, None), "forbidden": (403, None), "there": (200, None)}
    asked = []

    def do_HEAD(self):  # noqa: N802
        if "agent-harnesses" not in self.path:  # the library's own, once a day
            self.asked.append(self.path)
        name = next((name for name in self.ANSWERS if f"/{name}" in self.path), "gone")
        if "slow" in self.path:
            time.sleep(2)
        code, error = self.ANSWERS[name]
        body = b'{"id": "a/there", "sha": "0123"}' if self.command == "GET" else b""
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # it was not waited for
            self.wfile.write(body)

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """A server in the place of the hub, which the library believes to be online."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "asked", [])
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("name, message", [
    ("google/gated", r"'google/gated' is gated: accept its terms at https://huggingface.co/(datasets/)?google/gated, "
                     "then run `hf auth login` or set HF_TOKEN"),
    ("a/gone", "there is no folder 'a/gone', and no (model|data set) of that name on the hub"),
    ("a/empty", "the (model|data set) 'a/empty' on the hub has no config.json"),
    ("a/forbidden", "the hub refuses 'a/forbidden': HTTP 403"),
    ("a/broken", "the hub cannot be reached .HfHubHTTPError., nor is a (model|data set) of that name in its cache")])
def test_what_the_hub_answers_becomes_one_line_after_one_request(name, message, kind, endpoint):
    with pytest.raises(ValueError, match=message) as caught:
        hub.reach(name, kind)
    assert len(Hub.asked) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_repository_that_answers_needs_no_options_and_a_folder_no_request(kind, endpoint, tmp_path):
    assert hub.reach("a/there", kind) == {} and len(Hub.asked) == 1
    assert hub.reach(str(tmp_path), kind) == {} and len(Hub.asked) == 1


def test_a_hub_that_does_not_answer_is_waited_for_once(endpoint, monkeypatch):
    monkeypatch.setattr(hub, "TIME_LIMIT", 0.2)
    start = time.monotonic()
    with pytest.raises(ValueError, match="the hub cannot be reached .*Timeout"):
        hub.reach("slow/there")
    assert time.monotonic() - start < 1.9


def test_what_the_cache_has_is_taken_from_it_where_the_hub_does_not_answer(endpoint, tmp_path):
    (tmp_path / "cache" / "models--a--broken" / "snapshots" / "0123").mkdir(parents=True)
    assert hub.reach("a/broken") == {"local_files_only": True}


def test_a_gated_policy_is_one_line_with_exit_code_2_and_nothing_is_written(endpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WARP_LITE_HUB", str(tmp_path / "hub"))
    classifier_folder(tmp_path / "hub" / "lvwerra" / "distilbert-imdb")
    monkeypatch.setattr(Hub, "ANSWERS", {"gemma-3-270m": (403, "GatedRepo")})
    arguments = ["run", "--preset", "gemma-imdb", "--device", "cpu", "--out", str(tmp_path / "x")]
    message = one_error(capsys, arguments)
    assert "cannot load a policy from 'google/gemma-3-270m'" in message and "is gated: accept its terms at " in message
    assert not (tmp_path / "x").exists() and len(Hub.asked) == 1


def test_offline_by_choice_and_a_misspelt_folder_say_so_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    start = time.monotonic()
    message = one_error(capsys, ["run", "--preset", "gpt2-imdb", "--out", "x"])
    assert "'lvwerra/distilbert-imdb'" in message and "HF_HUB_OFFLINE is set" in message
    policy_folder("gpt2", tmp_path / "policy")
    (tmp_path / "p.txt").write_text("this\nthat\n")
    arguments = ["run", "--policy", "polcy", "--reward", "policy", "--prompts", "p.txt", "--out", "x"]
    assert "there is no folder 'polcy'" in one_error(capsys, [*arguments, "--reward", "os:listdir"])
    assert time.monotonic() - start < 10 and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["cuda:99", "tpu", ""])
def test_a_device_that_is_not_there_is_one_line(name, capsys, tmp_path, world):
    message = one_error(capsys, ["run", "--preset", "tiny", "--device", name or "?", "--out", str(tmp_path / "x")])
    assert f"the device {name or '?'!r} cannot be used" in message and not (tmp_path / "x").exists()
