"""What a Task takes is checked once, and whoever takes a Task takes nothing beside it that it would not heed."""

import dataclasses

import pytest
import torch
from short_run import CONFIG, PROMPTS, assert_same_weights, other_score, score, short_run
from tiny import make_policy

from warp_lite import Task, best_of_n_front, evaluate, optimal_front, run_warp
from warp_lite.averaging.state_dicts import stack
from warp_lite.config import LoraSettings
from warp_lite.evaluation.metrics import evaluate_many
from warp_lite.experiment import run_experiment
from warp_lite.scale.ray import RayExecutor
from warp_lite.training.executors import BatchedTrainer, SerialTrainer

LENGTH = CONFIG.max_new_tokens


@pytest.fixture
def task(policy_of, tokenizer):
    return Task.of(policy_of("gpt2"), tokenizer, score, PROMPTS, max_new_tokens=LENGTH)


BESIDE = {"tokenizer": object(), "reward": other_score, "prompts": PROMPTS[:3], "eval_prompts": PROMPTS[:3],
          "gold": other_score, "texts": ["this film"], "source": {}}


@pytest.mark.parametrize("name", BESIDE)
def test_a_run_of_a_task_refuses_what_the_task_has(task, tmp_path, name):
    with pytest.raises(TypeError, match=f"the Task has its own {name}; leave out .*dataclasses.replace"):
        run_warp(task, config=CONFIG, out=tmp_path / "run", progress=False, **{name: BESIDE[name]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("front", [optimal_front, best_of_n_front])
@pytest.mark.parametrize("beside", [{"reward": other_score}, {"prompts": PROMPTS}, {"tokenizer": object()},
                                    {"max_new_tokens": 3}, {"temperature": 0.5}], ids=lambda beside: next(iter(beside)))
def test_a_limit_of_a_task_refuses_what_the_task_has(task, front, beside):
    with pytest.raises(TypeError, match=f"the Task has its own {next(iter(beside))}; leave out"):
        front(task, samples=8, **beside)


def test_another_task_is_made_as_the_message_says(task, policy_of, tokenizer):
    other = dataclasses.replace(task, reward=other_score)
    result = run_warp(other, config=CONFIG, progress=False)
    expected = short_run(policy_of("gpt2"), tokenizer, reward=other_score)
    assert_same_weights(result.iterations[-1].merged, expected.iterations[-1].merged)


@pytest.mark.parametrize(("changes", "error", "words"), [
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be 1 or more, not 0"),
    ({"max_new_tokens": "5"}, TypeError, "max_new_tokens must be a number of type int, not '5'"),
    ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be a number of type int, not 2.5"),
    ({"temperature": 0}, ValueError, "temperature must be above 0, not 0"),
    ({"temperature": -1.0}, ValueError, "temperature must be above 0, not -1.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite, not nan"),
], ids=str)
def test_a_length_or_temperature_that_no_config_takes_is_refused_wherever_it_is_given(
        policy_of, tokenizer, changes, error, words):
    policy = policy_of("gpt2")
    options = {"max_new_tokens": LENGTH, **changes}
    for call in (lambda: Task.of(policy, tokenizer, score, PROMPTS, **options),
                 lambda: evaluate(policy, policy, score, PROMPTS, tokenizer, **options),
                 lambda: optimal_front(policy, score, PROMPTS, samples=8, tokenizer=tokenizer, **options),
                 lambda: best_of_n_front(policy, score, PROMPTS, samples=8, tokenizer=tokenizer, **options)):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "8"])
def test_a_number_of_samples_or_prompts_is_a_whole_number_of_one_or_more(task, count):
    for what, call in (("samples", lambda: optimal_front(task, samples=count)),
                       ("samples", lambda: evaluate_many(task, stack([task.sft]), samples=count)),
                       ("count", lambda: task.first(count)),
                       ("trajectory_samples", lambda: run_experiment(task, {"a": CONFIG}, [0], progress=False,
                                                                     trajectory_samples=count))):
        with pytest.raises(ValueError, match=f"^{what} must be a whole number of 1 or more, not {count!r}$"):
            call()


def test_prompts_to_measure_on_have_ids_that_the_policy_has_embeddings_for(tokenizer):
    policy = make_policy("gpt2", 10, torch.float32)  # of a tokenizer's 18
    task = Task.of(policy, tokenizer, score, ["this that", "that this"], max_new_tokens=LENGTH)
    result = run_warp(task, config=CONFIG.replace(iterations=1, steps=1), progress=False)
    far = ["this that", "loved ."]
    for call in (lambda: task.measured_on(far), lambda: result.front([1.0], prompts=far),
                 lambda: result.completions(far), lambda: evaluate(policy, policy, score, far, tokenizer),
                 lambda: optimal_front(policy, score, far, samples=8, tokenizer=tokenizer)):
        with pytest.raises(ValueError, match="prompt 1 has the token 'loved' with the id 15, and the policy has 10"):
            call()


# --- experiments ---


@pytest.mark.parametrize(("arguments", "options", "error", "words"), [
    ((object(), {"a": CONFIG}, [0]), {}, TypeError, r"task is object; pass a Task: Task\.of\("),
    ((None, [CONFIG], [0]), {}, TypeError, "configs is .*; pass a dict of WarpConfigs by their names"),
    ((None, {"a": {"lr": 1e-3}}, [0]), {}, TypeError, "configs is .*; pass a dict of WarpConfigs"),
    ((None, {"a": CONFIG}, 3), {}, TypeError, r"seeds is the number 3; pass a list of them, or range\(3\)"),
    ((None, {"a": CONFIG}, [1, 0, 1]), {}, ValueError, r"seeds is \[1, 0, 1\], which has one twice"),
    ((None, {"a": CONFIG}, [0]), {"rewards": {"A": score}}, ValueError, "rewards has 'A', which is none of .*: a$"),
    ((None, {"a": CONFIG}, [0]), {"starts": {"b": score}}, ValueError, "starts has 'b', which is none of .*: a$"),
    ((None, {"a": CONFIG}, [0]), {"rewards": {"a": 3}}, TypeError, "a reward is int, not a function"),
])
def test_an_experiment_names_the_argument_that_it_cannot_use(task, arguments, options, error, words):
    with pytest.raises(error, match=words):
        run_experiment(arguments[0] or task, *arguments[1:], progress=False, **options)


# --- trainers ---


class Own(SerialTrainer):
    """A trainer of a user's."""

    name = "own"


@pytest.mark.parametrize("trainer", [SerialTrainer, RayExecutor])
def test_the_class_of_a_trainer_is_no_trainer(policy_of, tokenizer, trainer):
    with pytest.raises(TypeError, match=rf"executor is the class {trainer.__name__}; .*: {trainer.__name__}\(\)"):
        short_run(policy_of("gpt2"), tokenizer, executor=trainer)


def test_adapters_refuse_a_trainer_that_they_would_not_ask(policy_of, tokenizer):
    with pytest.raises(ValueError, match="the executor, a Own, would never be asked; leave out executor, or lora"):
        short_run(policy_of("gpt2", dtype=torch.float32), tokenizer, executor=Own(), lora=LoraSettings(2))


def test_a_trainer_that_returns_fewer_runs_than_it_was_given_is_named(policy_of, tokenizer):
    class Forgetful(BatchedTrainer):
        name = "forgetful"

        def train(self, runs, on_step=None):
            return super().train(runs, on_step)[1:]

    with pytest.raises(ValueError, match="the trainer 'forgetful' returned 1 states for the 2 runs"):
        short_run(policy_of("gpt2"), tokenizer, executor=Forgetful())
