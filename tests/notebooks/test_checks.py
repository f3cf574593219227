"""The checks that grade themselves: what is right passes, every mistake is named; the notebooks' stubs say what to
fill in, and their folded solutions pass."""

import math
import re

import nbformat
import numpy as np
import pytest
import torch

import warp_lite
from warp_lite.notebooks import check
from warp_lite.notebooks.__main__ import paths

CHECKS = {name: value for name, value in vars(check).items() if isinstance(value, check.Check)}


@pytest.mark.parametrize("name", CHECKS)
def test_what_is_right_passes(name, capsys):
    assert CHECKS[name](CHECKS[name].right) is True
    assert capsys.readouterr().out.startswith("right: ")


@pytest.mark.parametrize("name, words", [(name, words) for name, one in CHECKS.items() for words in one.mistakes])
def test_a_mistake_is_named(name, words, capsys):
    assert CHECKS[name](CHECKS[name].mistakes[words]) is False
    assert capsys.readouterr().out == f"not yet: {words}\n"


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_what_to_return_and_raises_nothing(name, capsys):
    def returns_none(*arguments):
        ...

    def not_there(*arguments):
        raise NotImplementedError

    for stub in (returns_none, not_there):
        assert CHECKS[name](stub) is False
        line = capsys.readouterr().out
        assert line.startswith(f"not filled in yet: {stub.__name__}(") and line.count("\n") == 1
        assert CHECKS[name].returns in line


def test_another_mistake_is_shown_with_the_case_that_differs(capsys):
    assert check.ema(lambda anchor, policy, mu: 0 * anchor) is False
    assert capsys.readouterr().out == (
        "not yet: <lambda>(anchor=[1, -2], policy=[3, 0.5], mu=0.1) is [0, -0] and should be [1.2, -1.75]\n")


@pytest.mark.parametrize("answer, line", [
    (lambda anchor, policy: anchor, "raises TypeError"), (lambda *arguments: "x", "is 'x' and should be"),
    (lambda anchor, policy, mu: anchor[:1], "is [1] and should be"),
    (lambda anchor, policy, mu: float("nan") * anchor, "is [nan, nan] and should be"), (3, "raises TypeError")])
def test_what_is_no_answer_is_shown_and_not_raised(answer, line, capsys):
    assert check.ema(answer) is False
    assert line in capsys.readouterr().out


def test_a_function_that_changes_its_arguments_spoils_nothing(capsys):
    def update(anchor, policy, mu):
        anchor.mul_(1 - mu).add_(mu * policy)
        return anchor

    assert check.ema(update) and check.ema(update)
    assert capsys.readouterr().out.count("right") == 2


# What the checks call right, against closed forms that are written out here


def test_the_right_answers_are_those_of_closed_forms():
    weights = [0.5, 0.3 * math.e**2, 0.2 * math.e**4]  # exp(r / 0.5)
    assert check.tilted.answers_of(check.tilted.right)[0].tolist() == pytest.approx([w / sum(weights) for w in weights])
    assert check.leave_one_out.answers_of(check.leave_one_out.right)[0].tolist() == [4, 3.5, 1.5]
    assert check.ema.answers_of(check.ema.right)[0].tolist() == pytest.approx([1.2, -1.75])
    assert check.liti.answers_of(check.liti.right)[0].tolist() == pytest.approx([1.3, 1.4])
    assert check.regularised.answers_of(check.regularised.right)[0].tolist() == pytest.approx([0.7, 2.15])
    assert check.kl.answers_of(check.kl.right)[0].item() == pytest.approx(((0.2 + 0.5 + 0.4) - 0.5) / 2)
    assert check.crossing.answers_of(check.crossing.right) == pytest.approx([2.5, 0.5, math.nan], nan_ok=True)
    assert check.word.answers_of(check.word.right) == ["holds", "unclear", "unclear", "fails", "fails", "unclear"]
    # means .5 and 3.5: Student's t with one degree of freedom is 12.706, their error 1.5
    assert check.interval.answers_of(check.interval.right)[1] == pytest.approx((2 - 1.5 * 12.7062, 2 + 1.5 * 12.7062))
    assert check.two_steps.answers_of(check.two_steps.right)[0].flatten().tolist() == pytest.approx(
        [0.7 * 1 + 0.3 * 3, 0.7 * 0.5 + 0.3 * 2, 0.3 * 3, 0.3 * 2])
    assert check.adapters.answers_of(check.adapters.right)[0].tolist() == [[1.5, -1, -0.5], [3, 1, 2]]
    assert check.repeats.answers_of(check.repeats.right) == [2 / 8, 2 / 6, 0, 1 / 2, 1 / 3]
    assert check.best_of_n.answers_of(check.best_of_n.right) == pytest.approx([0, 0.193147, 1.835089])


def test_the_right_slerp_is_the_arc_of_two_vectors_and_the_pairwise_merge_of_more():
    one, two, lam = check.TIPS[0] - check.ORIGIN, check.TIPS[2] - check.ORIGIN, 0.25
    omega = math.acos(float(one @ two / one.norm() / two.norm()))
    arc = (math.sin(0.75 * omega) * one + math.sin(lam * omega) * two) / math.sin(omega)
    assert torch.allclose(check.slerp.answers_of(check.slerp.right)[1], check.ORIGIN + arc)
    init, policies = torch.zeros(3, dtype=torch.float64), list(torch.eye(3, dtype=torch.float64))
    assert check.slerp_many.right(init, policies).tolist() == pytest.approx([0.612, 0.612, 0.5], abs=5e-4)


def test_the_right_loop_of_a_merge_that_is_the_mean_is_a_geometric_series():
    """Runs that go halfway to goals of mean g: each iteration leaves the share 1 − η/2 of the way to g."""
    end = check.algorithm(check.vector(0.0, 0.0), check.toy_run, lambda init, policies: sum(policies) / len(policies),
                          iterations=4, runs=2, eta=0.3)
    assert end.tolist() == pytest.approx([(1 - 0.85**4) * goal for goal in (3.5, 2.0)])


# What stands in the notebooks

CALL = re.compile(r"^(?:\w+ = )?check\.(\w+)\((\w+)\)", re.MULTILINE)
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n\n```python\n(.*?)```\n</details>", re.DOTALL)


def exercises():
    """Each cell of a notebook that calls a check, with the check's name, the function's and the text that follows."""
    for path in paths():
        cells = nbformat.read(path, as_version=4).cells
        for cell, after in zip(cells, cells[1:]):
            if cell.cell_type == "code" and (call := CALL.search(cell.source)):
                yield pytest.param(*call.groups(), cell.source, after.source, id=f"{path.stem}-{call[1]}")


EXERCISES = list(exercises())


def names_of_a_notebook():
    return {"np": np, "torch": torch, "check": check, **{name: getattr(warp_lite, name) for name in ("lerp", "slerp")}}


@pytest.mark.parametrize("name, function, stub, after", EXERCISES)
def test_a_notebooks_stub_says_what_to_fill_in(name, function, stub, after, capsys):
    exec(stub, names_of_a_notebook())
    assert capsys.readouterr().out.startswith(f"not filled in yet: {function}(")


@pytest.mark.parametrize("name, function, stub, after", EXERCISES)
def test_a_notebooks_folded_solution_is_right(name, function, stub, after, capsys):
    solution = SOLUTION.search(after)[1]
    namespace = names_of_a_notebook()
    exec(solution, namespace)
    assert CHECKS[name](namespace[function]), capsys.readouterr().out


@pytest.mark.parametrize("name, function, stub, after", EXERCISES)
def test_a_notebooks_stub_has_the_arguments_that_its_check_names(name, function, stub, after):
    signature = re.search(rf"def {function}\((.*?)\):", stub)[1]
    assert signature == ", ".join(CHECKS[name].names)


def test_every_notebook_that_was_written_for_it_has_checks():
    counts = {}
    for exercise in EXERCISES:
        counts[exercise.id[:2]] = counts.get(exercise.id[:2], 0) + 1
    assert all(counts.get(number, 0) >= 2 for number in ("00", "01", "02", "03", "04", "05", "06")), counts


def test_every_cell_that_calls_a_check_is_found():
    """A way of writing the call that `CALL` does not know would go untested."""
    for path in paths():
        sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        calling = [source for source in sources if CHECKS.keys() & set(re.findall(r"\bcheck\.(\w+)\(", source))]
        assert len(calling) == sum(exercise.id.startswith(f"{path.stem}-") for exercise in EXERCISES), path.stem
