"""Where prompts come from: what may hold them in memory, and the files that `warp-lite run` and worlds read.

Nothing here knows of tokens, and nothing is imported for it: a file that cannot be read is refused at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TAKEN = ("a list of texts or of conversations, or a data set, data frame, dict of columns or list of rows with a "
         "'prompt'")
CLASH = ("prompts", "completions", "self")  # what a reward is called with anyway
LINES = (".txt", "")  # suffixes of files with a prompt in each line
ROWS = (".jsonl", ".ndjson", ".json")  # and with a JSON object in each
FORMATS = ('.txt, a prompt in each line, or .jsonl (.ndjson, .json) with a "prompt" in each line, a text or a list '
           'of messages')


def read_prompts(path: str | Path) -> list:
    """Prompts of a file: of a .txt the lines, of a .jsonl (.ndjson, .json) the objects in its lines, of a .json also
    those of its one array.

    Objects that have a "prompt" and nothing else become texts or conversations; else they stay rows, whose further
    fields are columns (see `prompt_columns`). The encoding is UTF-8, with or without a byte order mark; a line
    ends at a line feed or carriage return only, not at separators that a prompt may have in it.
    Raises ValueError for a file that cannot be read, is empty or of another kind.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in LINES + ROWS:
        raise ValueError(f"cannot read the prompts in {path}: take {FORMATS}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts in {path}: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no prompts; it wants one in each line")
    if kind in LINES:
        return [line for _, line in lines]
    if kind == ".json" and text.lstrip().startswith("["):
        place, rows = "entry", list(enumerate(parsed(text, f"{path} begins as a JSON array and is none"), 1))
    else:
        place = "line"
        rows = [(number, parsed(line, f'line {number} of {path} is no JSON object with a "prompt"'))
                for number, line in lines]
    if not rows:
        raise ValueError(f"{path} has no prompts; its array is empty")
    for number, row in rows:
        if not isinstance(row, dict) or "prompt" not in row:
            raise ValueError(f'{place} {number} of {path} is no JSON object with a "prompt"')
        prompt = row["prompt"]
        is_conversation = isinstance(prompt, list) and prompt and all(isinstance(part, dict) for part in prompt)
        if not isinstance(prompt, str) and not is_conversation:
            raise ValueError(f'the "prompt" in {place} {number} of {path} is neither a text nor a list of messages: '
                             f"{str(prompt)[:60]!r}; write an object for each prompt")
    rows = [row for _, row in rows]
    return rows if any(len(row) > 1 for row in rows) else [row["prompt"] for row in rows]


def parsed(text: str, otherwise: str) -> Any:
    """What a JSON text says. Raises ValueError with the message `otherwise` where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(otherwise) from None


def prompt_columns(prompts: object) -> tuple[list, dict[str, list]]:
    """Prompts as a list, and the further columns that stand beside them, by name; None where a row has no value.

    Taken: a list, tuple, array, series or generator of prompts; rows, dicts with a "prompt" each; a dict of columns;
    a `datasets.Dataset` or pandas DataFrame. Raises TypeError for what is none of these, or has no order or end, and
    ValueError where there is no column "prompt" or one has the name of another argument of a reward.
    """
    kind = type(prompts).__name__
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of str, not one str: {prompts[:60]!r}")
    if isinstance(prompts, (set, frozenset)):
        raise TypeError(f"prompts is a {kind}, whose order differs from process to process; pass a list")
    names = getattr(prompts, "column_names", None)
    if isinstance(names, Mapping):
        raise TypeError(f"prompts is a {kind} of splits ({', '.join(names) or 'none'}); choose one: prompts['train']")
    if hasattr(prompts, "column_names") and not hasattr(prompts, "__len__"):
        raise TypeError(f"prompts is an {kind}, a stream that may not end; pass a Dataset: "
                        "Dataset.from_list(list(prompts.take(1000)))")
    if names is not None:
        columns = {name: prompts[name] for name in names}
    elif hasattr(prompts, "columns") and hasattr(prompts, "notna"):  # pandas
        columns = {name: prompts[name].astype(object).where(prompts[name].notna(), None) for name in prompts.columns}
    elif isinstance(prompts, Mapping):
        columns = dict(prompts)
    else:
        rows = as_list(prompts, f"prompts is {kind}; pass {TAKEN}")
        if not rows or not isinstance(rows[0], Mapping):
            return rows, {}
        columns = columns_of_rows(rows)
    if "prompt" not in columns:
        raise ValueError(f"the {kind} of prompts has no column 'prompt'; "
                         f"it has {', '.join(map(str, columns)) or 'no columns'}")
    columns = {name: as_list(values, f"the column {name!r} of prompts is {type(values).__name__}; pass a list")
               for name, values in columns.items()}
    prompts = columns.pop("prompt")
    for name, values in columns.items():
        if name in CLASH or not isinstance(name, str):
            raise ValueError(f"the prompts have a column {name!r}, which is no name that a reward can be given it by; "
                             "rename it")
        if len(values) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(values)} values in the column {name!r}; "
                             "give one for each")
    return prompts, columns


def columns_of_rows(rows: Sequence[Mapping]) -> dict[str, list]:
    """Rows as columns by name, None where a row has no value. Raises ValueError for a row without a "prompt"."""
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or "prompt" not in row:
            if isinstance(row, Mapping) and {"role", "content"} <= row.keys():
                raise ValueError(f"prompt {i} is a message, not a conversation; put its messages in a list")
            raise ValueError(f"prompt {i} is no dict with a 'prompt': {str(row)[:60]!r}")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def as_list(values: object, otherwise: str) -> list:
    """A list of what can be gone through, arrays in it as lists too; TypeError says `otherwise`."""
    try:
        values = values.tolist() if hasattr(values, "tolist") else list(values) if not isinstance(values, str) else None
    except TypeError:
        values = None
    if not isinstance(values, list):
        raise TypeError(otherwise)
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]
