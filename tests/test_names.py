"""One name means one thing, in the whole package."""

import ast

from warp_lite.storage.provenance import PACKAGE

ENTRY_POINTS = {"main"}  # of commands


def test_no_two_modules_define_a_public_function_or_class_of_one_name():
    homes: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(path.relative_to(PACKAGE).as_posix())
    assert len(homes) > 300
    assert not {name: where for name, where in homes.items() if len(where) > 1 and name not in ENTRY_POINTS}


def test_no_type_has_two_names():
    types: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
                name = node.targets[0].id
                if name[0].isupper() and not name.isupper():
                    types.setdefault(ast.dump(node.value), []).append(name)
    assert not [names for names in types.values() if len(names) > 1]
