"""What must be true of every notebook as it is committed."""

import ast
import re

import nbformat
import pytest
from papermill import inspect_notebook

from warp_lite.notebooks import __main__ as notebooks

PATHS = notebooks.paths()
ARCHITECTURES = re.compile(r"gpt|gemma|llama|qwen|mistral", re.I)
MEASURING = {"run_experiment", "run_warp", "train_batched", "train", "leashes", "measure", "sweep", "from_start",
             "evaluate", "evaluate_many", "front", "front_rows", "reference_rewards", "limit_rewards", "sft_rewards",
             "ParetoExplorer"}
DRAWING = {"show", "subplots", "plot", "sliders", "display"}
VERDICTS = re.compile(r"\b(holds|fails|unclear)\b")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def nodes(notebook):
    """Every node of the syntax trees of a notebook's cells."""
    for cell in code(notebook):
        source = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines())
        if "setup" not in cell.metadata.get("tags", ()):
            yield from ast.walk(ast.parse(source))


def calls(notebook):
    return [node for node in nodes(notebook) if isinstance(node, ast.Call)]


def test_it_is_a_valid_notebook_with_the_python3_kernel(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


def test_papermill_finds_the_five_parameters_and_retrain_where_the_running_example_is_used(path, notebook):
    assert len(tagged(notebook, "parameters")) == 1
    retrain = ["RETRAIN"] if path.name.startswith(notebooks.SHARING) else []
    assert list(inspect_notebook(str(path))) == ["MODEL", "FAST", "SEED", "DEVICE", "OUT", *retrain]


def test_the_shared_cells_come_first_and_are_what_the_command_writes(path, notebook):
    sources = [cell.source for cell in code(notebook)[:3]]
    assert sources == list(notebooks.shared_cells(path.name).values())
    assert [cell.metadata.get("tags") for cell in code(notebook)[:3]] == [["setup"], ["parameters"], ["start"]]


def test_the_parameters_are_literals(notebook):
    (cell,) = tagged(notebook, "parameters")
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)


def test_the_badge_leads_to_this_notebook_in_the_repository_of_pyproject(path, notebook):
    assert notebooks.badge(path.name) in notebook.cells[0].source
    text = path.read_text(encoding="utf-8")
    owners = set(re.findall(r"github(?:\.com)?/([\w.-]+)/warp-lite", text))
    assert owners == {notebooks.address().split("/")[-2]}


def test_no_cell_names_an_architecture(path, notebook):
    if path.name.startswith(notebooks.FOR_GPU):
        return  # they are about real models by name
    for cell in notebook.cells:
        if not {"parameters", "about-parameters"} & {*cell.metadata.get("tags", ())}:
            source = re.sub(r"\d\d_\w+\.ipynb", "", cell.source)  # a link to a notebook that does
            assert not ARCHITECTURES.search(source), cell.source


def test_every_code_cell_was_executed_in_order_without_an_error(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for cell in code(notebook) for output in cell.outputs if output.output_type == "error"]


def test_the_outputs_are_those_of_the_default_model_in_full_mode_or_where_that_wants_a_gpu_in_fast_mode(path, notebook):
    (cell,) = tagged(notebook, "start")
    printed = "".join(output.text for output in cell.outputs if output.output_type == "stream" and
                      output.name == "stdout")
    model, mode = ("tiny-gpt2:", "full")
    if path.name.startswith(notebooks.FOR_GPU):
        model, mode = "gpt2-imdb (a small model of its structure in its place):", "fast"
    if path.name.startswith(notebooks.REAL_MODEL):
        model = "smollm2:"
    assert printed.startswith(model) and f"{mode} mode" in printed


def test_there_is_a_picture_and_a_picture_in_front_of_every_widget(notebook):
    pictures = 0
    for cell in code(notebook):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        if "application/vnd.jupyter.widget-view+json" in kinds:
            assert pictures, cell.source
        pictures += "image/png" in kinds
    assert pictures


def test_widget_metadata_has_its_state(notebook):
    for content in notebook.metadata.get("widgets", {}).values():
        assert content["state"]
    assert not notebooks.widget_errors(notebook)


def test_marked_cells_have_outputs_and_execution_counts(notebook):
    for cell in code(notebook):
        if "NBVAL_CHECK_OUTPUT" in cell.source:
            assert cell.execution_count and cell.outputs


def test_no_title_states_a_finding_that_was_typed(notebook):
    for call in calls(notebook):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        titles = [*call.args] if name in ("set_title", "suptitle", "title") else []
        titles += [keyword.value for keyword in call.keywords if keyword.arg == "title"]
        for title in titles:
            typed = [str(node.value) for node in ast.walk(title) if isinstance(node, ast.Constant)]
            assert not [text for text in typed if VERDICTS.search(text)], ast.unparse(title)


def test_no_code_cell_is_longer_than_25_lines(path, notebook):
    assert not [cell.source for cell in code(notebook) if cell.source.strip().count("\n") >= 25]


def test_no_cell_both_measures_and_draws(path, notebook):
    for cell in code(notebook):
        single = nbformat.v4.new_notebook(cells=[cell])
        names = {getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls(single)}
        draws = DRAWING & names or [name for name in names if name.startswith("draw_")]
        assert not (draws and MEASURING & names), cell.source


def test_no_cell_asserts_an_effect(path, notebook):
    """What is asserted are identities. An effect is said by its verdict: a reader's run may turn out otherwise."""
    for node in nodes(notebook):
        if isinstance(node, ast.Assert):
            names = {part.attr for part in ast.walk(node.test) if isinstance(part, ast.Attribute)}
            assert not names & {"low", "high", "verdict"}, ast.unparse(node)


def test_solutions_are_folded(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert text.count("<details>") == text.count("</details>") >= 2


def test_it_can_be_read_in_one_sitting(notebook):
    assert 25 <= len(notebook.cells) <= 45


def test_nothing_in_it_belongs_to_one_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|work|Users|tmp|root)/", text)


def functions(path):
    """The functions of a notebook: (name, arguments and body as a syntax tree), those inside others too."""
    for cell in code(nbformat.read(path, as_version=4)):
        source = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines())
        if "setup" not in cell.metadata.get("tags", ()):
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                    yield node.name, ast.dump(node.args) + "".join(map(ast.dump, body))


def test_no_notebook_holds_a_function_that_another_holds_too():
    """Neither by name nor by what it does: what two of them need is in the package."""
    homes: dict[str, set[str]] = {}
    for path in PATHS:
        for name, tree in functions(path):
            homes.setdefault(name, set()).add(path.stem)
            homes.setdefault(tree, set()).add(path.stem)
    assert len(homes) > 20
    assert not {what[:80]: where for what, where in homes.items() if len(where) > 1}


def test_the_notebooks_leave_the_reward_at_a_kl_to_the_package():
    for path in PATHS:
        for name, tree in functions(path):
            assert not {"argmax", "running_maximum"} & set(re.findall(r"\w+", tree)), (path.stem, name)
