"""Every public function and class says what it takes, what it returns, and what it raises.

Public is what has no leading underscore, in modules and in public classes; a constructor and a call count as the
class's own. The package is read, not imported, so that what needs Ray or TRL is held to it too.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "warp_lite"
CALLED_BY_CLASS = ("__init__", "__call__")  # described by the class's docstring
ELSEWHERE = re.compile(r"(as|see|like|errors as|raises as) \S+", re.IGNORECASE)  # a sentence that says nothing itself


def public(node: ast.AST, above: str = "", prefix: str = ""):
    """(name, definition, its docstring with that of its class) of what a module or class defines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            doc = ast.get_docstring(child) or ""
            yield prefix + child.name, child, doc
            yield from public(child, doc, f"{child.name}.")
        elif isinstance(child, ast.FunctionDef) and (not child.name.startswith("_") or child.name in CALLED_BY_CLASS):
            yield prefix + child.name, child, f"{ast.get_docstring(child) or ''}\n{above}"
        elif isinstance(child, ast.If | ast.Try):
            yield from public(child, above, prefix)


MODULES = {path.relative_to(PACKAGE).as_posix(): list(public(ast.parse(path.read_text(encoding="utf-8"))))
           for path in sorted(PACKAGE.rglob("*.py"))}


def offenders(definitions, offends) -> list[str]:
    """The names of those definitions that `offends(node, docstring)` is true of."""
    return [name for name, node, doc in definitions if offends(node, doc)]


def of_functions(offends):
    """The same rule, asked of functions alone."""
    return lambda node, doc: isinstance(node, ast.FunctionDef) and offends(node, doc)


def own_nodes(function: ast.FunctionDef):
    """The nodes of a function's body, without those of functions and classes defined in it."""
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)


def raised(function: ast.FunctionDef) -> set[str]:
    """The classes of the exceptions that a function's own body raises by name."""
    calls = [node.exc for node in own_nodes(function) if isinstance(node, ast.Raise)]
    names = [ast.unparse(exc.func if isinstance(exc, ast.Call) else exc) for exc in calls if exc is not None]
    return {name.split(".")[-1] for name in names if name.split(".")[-1][0].isupper()}


def lacks_annotations(node, doc) -> bool:
    """Whether a parameter has none."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    rest = [parameter for parameter in (node.args.vararg, node.args.kwarg) if parameter]
    return any(p.annotation is None and p.arg not in ("self", "cls") for p in named + rest)


def returns_unannotated(node, doc) -> bool:
    """Whether something is returned that no annotation names."""
    returns = [n for n in own_nodes(node) if isinstance(n, ast.Yield) or isinstance(n, ast.Return) and n.value]
    return node.returns is None and bool(returns)


def says_nothing_itself(node, doc) -> bool:
    """Whether there is no docstring, or one that only refers elsewhere."""
    own = doc if node.name in CALLED_BY_CLASS else ast.get_docstring(node) or ""
    sentences = [sentence.strip() for sentence in re.split(r"[.;]\s|[.;]$", own) if sentence.strip()]
    return all(ELSEWHERE.fullmatch(sentence) for sentence in sentences)


def leaves_out_an_exception(node, doc) -> bool:
    """Whether the function's own body raises a class that its docstring does not name."""
    return any(name not in doc for name in raised(node))


def test_a_walk_over_the_package_finds_what_is_public():
    names = {f"{module}:{name}" for module, definitions in MODULES.items() for name, _, _ in definitions}
    assert len(names) > 400
    assert {"averaging/slerp.py:slerp", "averaging/ema.py:EMAAnchor.update", "scale/ray.py:RayExecutor"} <= names
    assert not any("._" in name for name in names if not name.endswith(("__init__", "__call__")))


@pytest.mark.parametrize("module", MODULES)
def test_parameters_and_returns_are_annotated_and_docstrings_say_what_is_raised(module):
    for offends in (of_functions(lacks_annotations), of_functions(returns_unannotated), says_nothing_itself,
                    of_functions(leaves_out_an_exception)):
        assert not offenders(MODULES[module], offends)


@pytest.mark.parametrize("text, rule", [
    ("def f(x):\n    'A line.'", lacks_annotations), ("def f():\n    'A line.'\n    return 1", returns_unannotated),
    ("def f():\n    pass", says_nothing_itself), ("def f():\n    'As `train_serial`.'", says_nothing_itself),
    ("def f():\n    'Errors as `sample`; see `train`.'", says_nothing_itself),
    ("def f():\n    'Nothing.'\n    if True:\n        raise errors.Bad('no')", leaves_out_an_exception)])
def test_each_rule_tells_what_breaks_it(text, rule):
    function = ast.parse(text).body[0]
    assert rule(function, ast.get_docstring(function) or "")
