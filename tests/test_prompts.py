"""Prompts: what may hold them, the files they come in, their special tokens, and which are held out."""

import json
import time

import numpy as np
import pytest
import torch
from short_run import PROMPTS, files, short_run
from tiny import make_tokenizer
from tokenizers import processors

from warp_lite.cli import main
from warp_lite.policies.loading import save_policy
from warp_lite.policies.prompts import (
    added_tokens,
    encode_prompts,
    encode_texts,
    opening_ids,
    reading_prompts,
    without_bos,
)
from warp_lite.storage.prompt_sources import prompt_columns, read_prompts
from warp_lite.storage.run_config import kept_prompts
from warp_lite.task import hold_out
from warp_lite.worlds import load_world

datasets = pytest.importorskip("datasets")
pd = pytest.importorskip("pandas")

BOS, EOS = 1, 2
TEMPLATE = ("{{ bos_token }}{% if tools %} but{% endif %}{% for m in messages %} {{ m.content }} .{% endfor %}"
            "{% if add_generation_prompt %} it{% if loud is defined and loud %} great{% endif %}{% endif %}")
CONVERSATION = [{"role": "user", "content": "this film"}, {"role": "assistant", "content": "was dull"}]


def framing_tokenizer(front="<bos>", back="<eos>"):
    """A tokenizer that puts those tokens around whatever it reads."""
    tokenizer = make_tokenizer(bos=False)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (front, back) if token]
    if ids:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, (front, "$A", back))), special_tokens=ids)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# --- special tokens ---


@pytest.mark.parametrize("front, back", [("<bos>", "<eos>"), ("<bos>", None), (None, "<eos>"), (None, None)])
def test_a_prompt_has_the_tokenizers_bos_once_and_does_not_end_in_an_eos_it_appends(front, back):
    tokenizer = framing_tokenizer(front, back)
    assert added_tokens(tokenizer) == (front is not None, back is not None)
    plain = tokenizer("this film", add_special_tokens=False)["input_ids"]
    once = [*([BOS] if front else []), *plain]
    assert opening_ids(tokenizer, ["this film"]) == [once]
    assert opening_ids(tokenizer, ["<bos> this film"]) == [[BOS, *plain]]
    assert opening_ids(tokenizer, ["this film <eos>"]) == [[*once, EOS]]  # written by the user, and kept
    assert encode_prompts(tokenizer, ["this film"]).ids.tolist() == [once]


@pytest.mark.parametrize("front", ["<bos>", None])
def test_a_text_that_the_template_rendered_has_the_ids_of_its_conversation(front):
    tokenizer = framing_tokenizer(front)
    asked = [{"role": "user", "content": "that plot"}]
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    for prompt in (asked, rendered):
        assert encode_prompts(tokenizer, [prompt]).ids.tolist() == [expected]


@pytest.mark.parametrize("back", ["<eos>", None])
def test_a_text_of_the_perplexity_ends_in_one_eos(back):
    ids, mask = encode_texts(framing_tokenizer(back=back), ["this film", "<bos> that <eos>"])
    assert [row[seen.bool()].count_nonzero() for row, seen in zip(ids == EOS, mask)] == [1, 1]
    assert [row[seen.bool()].count_nonzero() for row, seen in zip(ids == BOS, mask)] == [1, 1]
    assert ids[0, -1] == EOS


def test_where_bos_and_eos_are_one_token_only_what_is_added_is_left_out():
    tokenizer = framing_tokenizer("<eos>", None)
    tokenizer.bos_token = "<eos>"
    plain = tokenizer("this film", add_special_tokens=False)["input_ids"]
    assert opening_ids(tokenizer, ["this film", "<eos> this film"]) == [[EOS, *plain]] * 2


def test_a_classifiers_text_gets_no_second_bos():
    tokenizer = framing_tokenizer("<bos>", "<eos>")
    ids = tokenizer(without_bos(tokenizer, ["<bos> this film", "this film"]))["input_ids"]
    assert ids[0] == ids[1] and ids[0].count(BOS) == 1
    plain = framing_tokenizer(None, None)
    assert without_bos(plain, ["<bos> this"]) == ["<bos> this"]


def test_a_library_that_calls_the_tokenizer_itself_reads_the_same_prompts():
    tokenizer = framing_tokenizer()
    reader = reading_prompts(tokenizer)
    texts = ["this film", "<bos> that"]
    assert reader(text=texts)["input_ids"] == opening_ids(tokenizer, texts)
    assert reader("this", return_tensors="pt")["input_ids"].tolist() == [tokenizer("this")["input_ids"]]
    assert isinstance(reader, type(tokenizer)) and type(tokenizer).__name__ != "PromptTokenizer"
    plain = framing_tokenizer(None, None)
    assert reading_prompts(plain) is plain


# --- conversations ---


@pytest.mark.parametrize("row", [
    {"prompt": CONVERSATION[:1]},
    {"prompt": CONVERSATION},
    {"prompt": CONVERSATION[:1], "chat_template_kwargs": {"loud": True}},
    {"prompt": CONVERSATION, "chat_template_kwargs": {"loud": True}},
], ids=["asked", "prefill", "options", "both"])
def test_a_conversation_is_rendered_as_trl_renders_it(row):
    apply_chat_template = pytest.importorskip("trl.data_utils").apply_chat_template
    tokenizer = framing_tokenizer()
    rows = [row, {"prompt": CONVERSATION[:1]}]
    encoded = encode_prompts(tokenizer, rows)
    assert encoded.texts == [apply_chat_template(row, tokenizer)["prompt"] for row in rows]
    assert encode_prompts(tokenizer, datasets.Dataset.from_list([row])).texts == encoded.texts[:1]


@pytest.mark.parametrize("tools", [[{"name": "look_up"}], '[{"name": "look_up"}]', [], None])
def test_tools_reach_the_template_as_a_list_or_as_json(tools):
    (text,) = encode_prompts(framing_tokenizer(), {"prompt": [CONVERSATION], "tools": [tools]}).texts
    assert (" but" in text) == bool(tools)


def test_held_out_conversations_keep_their_template_options(policy_of):
    tokenizer = framing_tokenizer(back=None)
    policy = policy_of("gpt2", dtype=torch.float32)
    rows = [{"prompt": [{"role": "user", "content": text}], "chat_template_kwargs": {"loud": True}} for text in PROMPTS]
    result = short_run(policy, tokenizer, lambda prompts, completions: [1.0] * len(prompts), rows, iterations=1)
    assert all(text.endswith(" it great") for text in result.task.eval_prompts.texts)
    assert len(result.completions(result.task.first(2).eval_prompts)) == 2


# --- what may hold prompts ---

ROWS = {"prompt": PROMPTS, "answer": list(range(len(PROMPTS)))}
HOLDERS = {
    "a list": PROMPTS, "a tuple": tuple(PROMPTS), "a generator": iter(PROMPTS), "an array": np.array(PROMPTS),
    "an array of objects": np.array(PROMPTS, dtype=object), "a series": pd.Series(PROMPTS), "a data frame":
    pd.DataFrame(ROWS), "a dict of columns": ROWS, "a dict of arrays": {n: np.array(v) for n, v in ROWS.items()},
    "a data set": datasets.Dataset.from_dict(ROWS), "a column of one": datasets.Dataset.from_dict(ROWS)["prompt"],
    "rows": [dict(zip(ROWS, row)) for row in zip(*ROWS.values())], "the keys of a dict": dict.fromkeys(PROMPTS).keys()}


@pytest.mark.parametrize("kind", HOLDERS)
def test_prompts_are_taken_from(kind):
    prompts, columns = prompt_columns(HOLDERS[kind])
    assert prompts == PROMPTS and all(type(prompt) is str for prompt in prompts)
    assert columns in ({}, {"answer": ROWS["answer"]}) and all(type(a) is int for a in columns.get("answer", ()))


@pytest.mark.parametrize("prompts, error, words", [
    ("this film", TypeError, "list of str, not one str"),
    ({"this film", "that"}, TypeError, "a set, whose order differs"),
    (3, TypeError, "prompts is int; pass a list of texts"),
    (None, TypeError, "prompts is NoneType; pass"),
    (np.array("this film"), TypeError, "prompts is ndarray; pass"),
    (datasets.DatasetDict(train=datasets.Dataset.from_dict(ROWS)), TypeError, "splits .train.; choose one"),
    (datasets.Dataset.from_dict(ROWS).to_iterable_dataset(), TypeError, "IterableDataset, a stream"),
    ({"text": PROMPTS}, ValueError, "the dict of prompts has no column 'prompt'; it has text"),
    ({}, ValueError, "no column 'prompt'; it has no columns"),
    (pd.DataFrame({"text": PROMPTS}), ValueError, "the DataFrame of prompts has no column 'prompt'; it has text"),
    ({"prompt": "this film"}, TypeError, "the column 'prompt' of prompts is str; pass a list"),
    ({"prompt": PROMPTS, "answer": [1, 2]}, ValueError, "12 prompts and 2 values in the column 'answer'"),
    ([{"prompt": "this"}, {"text": "that"}], ValueError, "prompt 1 is no dict with a 'prompt'"),
    ([{"prompt": "this"}, "that"], ValueError, "prompt 1 is no dict with a 'prompt'"),
    (CONVERSATION, ValueError, "prompt 0 is a message, not a conversation; put its messages in a list"),
    ({"prompt": PROMPTS, "prompts": PROMPTS}, ValueError, "column 'prompts', which is no name.*rename it"),
    ([{"prompt": "this", "completions": 1}], ValueError, "column 'completions'"),
    ({"prompt": PROMPTS, "self": PROMPTS}, ValueError, "column 'self'"),
    ({"prompt": PROMPTS, 0: PROMPTS}, ValueError, "column 0, which is no name"),
])
def test_what_holds_no_prompts_is_refused_in_one_line(prompts, error, words):
    with pytest.raises(error, match=words) as caught:
        prompt_columns(prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompts", [[["this", "film"]], np.array([["this"], ["that"]]), [[{"role": "user"}]]])
def test_lists_that_are_no_conversations_are_refused_in_one_line(prompts):
    with pytest.raises(TypeError, match='prompt 0 is no list of messages with a "role" and a "content"'):
        encode_prompts(framing_tokenizer(), prompts)


def test_a_value_that_a_row_lacks_is_none():
    rows = [{"prompt": "this", "answer": 1}, {"prompt": "that", "level": "hard"}]
    expected = (["this", "that"], {"answer": [1, None], "level": [None, "hard"]})
    assert prompt_columns(rows) == expected == prompt_columns(pd.DataFrame(rows))


# --- columns and rewards ---


@pytest.mark.parametrize("name", ["reward", "completion", "completion_ids", "kwargs", "tokenizer", "trainer_state"])
def test_a_column_of_any_name_that_is_no_argument_is_passed_as_trl_passes_it(policy_of, tokenizer, tmp_path, name):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append(kwargs)
        return [float(len(c)) for c in completions]

    own = object()
    rows = {"prompt": PROMPTS, name: [f"value {i}" for i in range(len(PROMPTS))]}
    short_run(policy_of("gpt2", dtype=torch.float32), tokenizer, reward, rows, tmp_path / "run", iterations=1)
    left_out = name in ("completion", "completion_ids")  # as in RLOOTrainer._calculate_rewards
    for kwargs in seen:
        values = kwargs.get(name, own)
        assert (values is own or isinstance(values[0], list)) if left_out else values[0].startswith("value ")


def test_the_command_line_passes_the_fields_of_a_line_to_the_reward(policy_of, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_policy(policy_of("gpt2", dtype=torch.float32), tokenizer, tmp_path / "policy")
    (tmp_path / "column_reward.py").write_text(
        "def exact(prompts, completions, answer):\n"
        "    assert [f'{p.split()[0]}!' for p in prompts] == answer\n"
        "    return [float(len(c)) for c in completions]\n")
    rows = [json.dumps({"prompt": prompt, "answer": f"{prompt.split()[0]}!"}) for prompt in PROMPTS]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr("warp_lite.result.EVALUATION_SAMPLES", 16)
    monkeypatch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 16)
    command = ["run", "--policy", "policy", "--reward", "column_reward:exact", "--prompts", "p.jsonl", "--out", "out",
               *(f"--set={s}" for s in ("iterations=1", "runs=2", "steps=2", "batch_size=2", "max_new_tokens=4"))]
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "prompts.json").read_text())["eval_columns"].keys() == {"answer"}
    assert main([*command, "--resume"]) == 0


def test_a_folder_that_was_begun_without_columns_goes_on_without_them(policy_of, tokenizer, tmp_path, monkeypatch,
                                                                       capsys):
    monkeypatch.chdir(tmp_path)
    save_policy(policy_of("gpt2", dtype=torch.float32), tokenizer, tmp_path / "policy")
    (tmp_path / "plain_reward.py").write_text(
        "def plain(prompts, completions, **kwargs):\n    return [float('answer' in kwargs)] * len(prompts)\n")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    monkeypatch.setattr("warp_lite.result.EVALUATION_SAMPLES", 16)
    monkeypatch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 16)
    command = ["run", "--policy", "policy", "--reward", "plain_reward:plain", "--prompts", "p.jsonl", "--out", "out",
               *(f"--set={s}" for s in ("iterations=1", "runs=2", "steps=2", "batch_size=2", "max_new_tokens=4"))]
    assert main(command) == 0
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": prompt, "answer": 1}) for prompt in PROMPTS))
    before = files(tmp_path / "out")
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    assert "was begun without the further fields" in capsys.readouterr().err and files(tmp_path / "out") == before


# --- files ---


def lines(prompts, **options):
    return "\n".join(json.dumps({"prompt": prompt}, **options) for prompt in prompts)


TWO = ["one", "two"]
FILES = {
    "crlf.txt": (b"one\r\n\r\ntwo\r\n", TWO), "cr.txt": (b"one\rtwo", TWO), "no-suffix": (b"one\ntwo", TWO),
    "bom.txt": ("\ufeffone\ntwo\n".encode(), TWO), "upper.TXT": (b"one\ntwo", TWO),
    "spaces.txt": (b"one  \n  two\n", ["one  ", "  two"]),
    "crlf.jsonl": (lines(TWO).replace("\n", "\r\n").encode(), TWO),
    "bom.jsonl": (f"\ufeff{lines(TWO)}".encode(), TWO),
    "upper.JSONL": (lines(TWO).encode(), TWO), "lines.ndjson": (lines(TWO).encode(), TWO),
    "lines.json": (lines(TWO).encode(), TWO),
    "array.json": (json.dumps([{"prompt": prompt} for prompt in TWO], indent=1).encode(), TWO),
    "separators.jsonl": (lines(["a\u2028b", "c\x85d"], ensure_ascii=False).encode(), ["a\u2028b", "c\x85d"]),
    "fields.jsonl": (b'{"prompt": "one", "n": 1}\n{"prompt": "two"}', [{"prompt": "one", "n": 1}, {"prompt": "two"}]),
    "conversation.jsonl": (lines([CONVERSATION]).encode(), [CONVERSATION])}


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_read_from(name, tmp_path):
    data, expected = FILES[name]
    (tmp_path / name).write_bytes(data)
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize("name, data, words", [
    ("p.csv", b"prompt\none", r"take \.txt, a prompt in each line, or \.jsonl"), ("p.parquet", b"PAR1", r"take \.txt"),
    ("p.jsonl.gz", b"\x1f\x8b", r"take \.txt"), ("p.tsv", b"one", r"take \.txt"),
    ("p.txt", "one\n".encode("utf-16"), "cannot read the prompts in"), ("p.txt", b"caf\xe9\n", "cannot read the prom"),
    ("p.txt", b"\n \n", "has no prompts"), ("p.jsonl", b'{"prompt": "a"}\n\n"b"', "line 3 of .* no JSON object with a"),
    ("p.jsonl", b'[{"prompt": "a"}]', "line 1 of .* is no JSON object"), ("p.json", b"[1]", "entry 1 of"),
    ("p.json", b"[]", "p.json has no prompts; its array is empty"),
    ("p.jsonl", b'{"prompt": "a"},\n{"prompt": "b"}', "line 1 of .* is no JSON object"),
    ("p.json", b'{"prompt": ["a", "b"]}', r"the .prompt. in line 1 of .*p.json is neither a text .*\['a', 'b'\]"),
    ("p.json", b'{"prompt": {"0": "a"}}', "the .prompt. in line 1 of .* is neither a text nor a list of messages"),
    ("p.json", b'[{"prompt": "a"}, {"prompt": null}]', "the .prompt. in entry 2 of .* is neither .*None"),
    ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": []}', "the .prompt. in line 3 of .* is neither"),
    ("p.json", b'[{"prompt": "a"}', "begins as a JSON array and is none"), ("p.jsonl", b'{"text": "a"}', "line 1 of")])
def test_a_file_that_is_not_read_is_refused_in_one_line(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


# --- which are held out ---


@pytest.fixture
def world_folder(policy_of, tokenizer, tmp_path):
    """A world without its prompts."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    save_policy(policy_of("gpt2", dtype=torch.float32), tokenizer, tmp_path / "world" / "policy")
    classifier = DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=16, dim=8, hidden_dim=8, n_layers=1, n_heads=1))
    save_policy(classifier, tokenizer, tmp_path / "world" / "reward")
    return tmp_path / "world"


def test_a_world_reads_its_files_as_the_command_line_does_and_holds_out_as_run_warp_does(world_folder, tokenizer):
    texts = ["this film", "that plot", "i loved it"] * 3 + ["it\u2028was"] + ["this film"] + PROMPTS
    text = f"\ufeff{lines(texts, ensure_ascii=False)}"
    (world_folder / "prompts.jsonl").write_bytes(text.replace("\n", "\r\n").encode())
    world = load_world(str(world_folder))
    train, held_out = hold_out(encode_prompts(tokenizer, texts))
    assert world.prompts.given == train.texts and world.eval_prompts.given == held_out.texts
    assert not {*train.texts} & {*held_out.texts} and {*train.texts, *held_out.texts} == {*texts}
    (world_folder / "prompts.jsonl").write_text('{"prompt": "this", "n": 1}\n{"prompt": "that", "n": 2}\n')
    prompts = load_world(str(world_folder)).prompts
    assert prompts.given == ["that"] and prompts.columns == {"n": [2]}
    (world_folder / "eval_prompts.jsonl").write_text(lines(["i loved it"]))
    assert load_world(str(world_folder)).eval_prompts.given == ["i loved it"]


class Numbers:
    """A tokenizer of texts that are numbers."""

    bos_token_id = eos_token_id = None
    pad_token_id = 0

    def __call__(self, texts, **options):
        return {"input_ids": [[1] for _ in texts]}


@pytest.mark.parametrize("count", [2, 5, 6, 100, 2560])
def test_up_to_the_cap_every_fifth_distinct_prompt_is_held_out(count):
    texts = [str(i // 2) for i in range(2 * count)]  # each twice
    train, held_out = hold_out(encode_prompts(Numbers(), texts))
    assert held_out.texts == [str(i) for i in range(0, count, 5)]
    assert train.texts == [text for text in texts if int(text) % 5]


@pytest.mark.parametrize("count, cap", [(2561, 512), (100_000, 512), (1000, 10), (7, 1)])
def test_past_the_cap_no_more_than_that_are_held_out_and_from_everywhere(count, cap):
    train, held_out = hold_out(encode_prompts(Numbers(), [str(i) for i in range(count)]), cap)
    assert cap / 2 < len(held_out) <= cap and len(train) == count - len(held_out)
    gaps = np.diff([int(text) for text in held_out.texts])
    assert len(set(gaps.tolist())) <= 1 and int(held_out.texts[-1]) >= count - (gaps[0] if len(gaps) else count)


def test_no_prompt_held_out_is_refused():
    with pytest.raises(ValueError, match="held_out must be 1 or more, not 0"):
        hold_out(encode_prompts(Numbers(), ["1", "2"]), 0)


def test_holding_out_takes_time_in_proportion_to_the_prompts():
    times = []
    for count in (20_000, 200_000):
        encoded = encode_prompts(Numbers(), [str(i) for i in range(count)])
        start = time.process_time()
        hold_out(encoded)
        times.append(time.process_time() - start)
    assert times[1] < 40 * times[0] + 0.5  # ten times as many; a hundred times the time were it quadratic


def test_a_folder_that_holds_out_others_goes_on_with_those(policy_of, tokenizer, tmp_path, monkeypatch):
    """As one does that was made when a fifth was held out of however many."""
    policy = policy_of("gpt2", dtype=torch.float32)
    chosen = {"iterations": 1, "steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr("warp_lite.task.hold_out", lambda prompts, kept: hold_out(prompts, kept=PROMPTS[1:4]))
        short_run(policy, tokenizer, out=tmp_path / "run", **chosen)
    assert kept_prompts(tmp_path / "run")["eval"] == PROMPTS[1:4] != PROMPTS[::5]
    before = files(tmp_path / "run")
    result = short_run(policy, tokenizer, out=tmp_path / "run", resume=True, **chosen)
    assert result.task.eval_prompts.given == PROMPTS[1:4] and files(tmp_path / "run") == before
    with pytest.raises(ValueError, match="holds a run with prompts.eval = 3, not 2"):
        short_run(policy, tokenizer, prompts=PROMPTS[5:], out=tmp_path / "run", resume=True, **chosen)


def test_prompts_that_config_json_does_not_vouch_for_are_not_kept(policy_of, tokenizer, tmp_path):
    short_run(policy_of("gpt2", dtype=torch.float32), tokenizer, out=tmp_path / "run", iterations=1, steps=2)
    path = tmp_path / "run" / "prompts.json"
    assert kept_prompts(tmp_path / "run")["eval"] and kept_prompts(tmp_path / "run", resume=False) == {}
    path.write_text(path.read_text().replace("film", "plot"))
    assert kept_prompts(tmp_path / "run") == {} == kept_prompts(tmp_path / "none") == kept_prompts(None)
