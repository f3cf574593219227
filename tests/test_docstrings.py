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


DEFINITIONS = [pytest.param(node, doc, id=f"{path.relative_to(PACKAGE)}:{name}")
               for path in sorted(PACKAGE.rglob("*.py"))
               for name, node, doc in public(ast.parse(path.read_text(encoding="utf-8")))]
FUNCTIONS = [case for case in DEFINITIONS if isinstance(case.values[0], ast.FunctionDef)]


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


def test_a_walk_over_the_package_finds_what_is_public():
    names = {case.id for case in DEFINITIONS}
    assert len(DEFINITIONS) > 400
    assert {"averaging/slerp.py:slerp", "averaging/ema.py:EMAAnchor.update", "scale/ray.py:RayExecutor"} <= names
    assert not any("._" in name for name in names if not name.endswith(("__init__", "__call__")))


@pytest.mark.parametrize("node, doc", FUNCTIONS)
def test_every_parameter_is_annotated(node, doc):
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    rest = [parameter for parameter in (node.args.vararg, node.args.kwarg) if parameter]
    assert not [p.arg for p in named + rest if p.annotation is None and p.arg not in ("self", "cls")]


@pytest.mark.parametrize("node, doc", FUNCTIONS)
def test_what_is_returned_is_annotated(node, doc):
    returns = [n for n in own_nodes(node) if isinstance(n, ast.Yield) or isinstance(n, ast.Return) and n.value]
    assert node.returns is not None or not returns


@pytest.mark.parametrize("node, doc", DEFINITIONS)
def test_every_docstring_says_something_itself(node, doc):
    own = doc if node.name in CALLED_BY_CLASS else ast.get_docstring(node) or ""
    sentences = [sentence.strip() for sentence in re.split(r"[.;]\s|[.;]$", own) if sentence.strip()]
    assert [sentence for sentence in sentences if not ELSEWHERE.fullmatch(sentence)]


@pytest.mark.parametrize("node, doc", FUNCTIONS)
def test_every_exception_raised_here_is_named_in_the_docstring(node, doc):
    assert not {name for name in raised(node) if name not in doc}


@pytest.mark.parametrize("sentence", ["As `train_serial`.", "See `hub.reach`.", "Errors as `sample`; see `train`."])
def test_a_docstring_that_only_refers_elsewhere_is_told(sentence):
    function = ast.parse(f'def f():\n    """{sentence}"""').body[0]
    with pytest.raises(AssertionError):
        test_every_docstring_says_something_itself(function, sentence)


def test_an_exception_that_the_docstring_leaves_out_is_told():
    function = ast.parse('def f():\n    """Nothing."""\n    if True:\n        raise errors.Bad("no")').body[0]
    assert raised(function) == {"Bad"}
