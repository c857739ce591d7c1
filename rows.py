"""The rows of a data set, and where each of them stands."""

import json
import os
from pathlib import Path

import datasets

PLACE = None  # a key that no JSON object has: the row's file and line


def read_splits(path: str) -> dict:
    """Rows by the name of their split: a local file or folder, or a hub name, as `datasets` finds
    them. Local .jsonl files are read here: Arrow takes numbers for text, names no bad line, and
    crashes the process on a deeply nested one."""
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(path).suffix)
    source = {"path": kind, "data_files": path} if kind else {"path": path}
    files = datasets.load_dataset_builder(**source).config.data_files or {}
    if files and all(x.endswith(".jsonl") and Path(x).exists() for x in sum(files.values(), [])):
        return {str(split): sum(map(read_lines, files[split]), []) for split in files}
    return datasets.load_dataset(**source)


def read_lines(path: str) -> list[dict]:
    """The rows of a .jsonl file, each with its PLACE. Blank lines are no rows; any other line that
    is no object is a ValueError."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {getattr(error, 'msg', error)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object, with columns")
        rows.append(row | {PLACE: f"--dataset {where}"})
    return rows


def _object(pairs: list[tuple]) -> dict:
    """A JSON object whose names are unique; Python would keep the last of two."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("two columns have one name")
    return row


def split_row(row: dict) -> tuple:
    """(prompt, reference, chosen, rejected) of a row with columns prompt (+ completion), or prompt,
    chosen, rejected, or chosen, rejected with the prompt in both; texts or lists of messages."""
    names = ("prompt", "completion", "chosen", "rejected")
    prompt, completion, chosen, rejected = (row.get(name) for name in names)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        # Two transcripts: the prompt is what they share, up to the assistant's last turn.
        shared, turn = os.path.commonprefix([chosen, rejected]), "\n\nAssistant:"
        cut = shared.rfind(turn) + len(turn) if turn in shared else shared.rfind(" ") + 1
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    answers = [x for x in (completion, chosen, rejected) if x is not None]
    if answers and isinstance(answers[0], list) and not isinstance(prompt, list):
        prompt = answers[0][:-1]
    turns = [x for x in (prompt, *answers) if isinstance(x, list)]
    good = all(x and all(isinstance(m, dict) and isinstance(m.get("role"), str)
                         and isinstance(m.get("content"), str) for m in x) for x in turns)
    if not good or not all(isinstance(x, str | list) for x in (prompt, *answers)):
        raise ValueError(f"needs text, or lists of messages with role and content, as {names}")
    completion, chosen, rejected = (answer[-1]["content"] if isinstance(answer, list) else answer
                                    for answer in (completion, chosen, rejected))
    return prompt, chosen if completion is None else completion, chosen, rejected
