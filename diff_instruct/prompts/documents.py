"""JSON files: which rows there are in a document, whatever its shape."""

import json
import re

from diff_instruct.mistake import Mistake
from diff_instruct.prompts.rows import BLANK_LINES, some
from diff_instruct.prompts.tables import is_known
from diff_instruct.prompts.text_files import compression_of, open_text


SPACE = re.compile(r"\s*")
WRAPPERS = set("data dataset rows items examples records results".split())  # the only key of some documents
SPLITS = set("train training test testing val valid validation dev".split())


def read_json(file, source, columns=None):
    """JSON Lines, one document (see `rows_of`), or several one after the other; numbers are those of lines or rows.

    Raises:
        Mistake: for a document of which it cannot be told what are rows.
    """
    with open_text(file) as f:
        lines = (line for line in f if line.strip())
        first, more = next(lines, ""), next(lines, None) is not None
    if more and is_json(first):
        yield from read_lines(file)
        return
    with open_text(file) as f:
        try:
            documents = list(values(f.read()))
        except (ValueError, RecursionError):
            documents = None
    if documents is None:
        yield from read_lines(file)
        return
    rows = documents if len(documents) != 1 else rows_of(documents[0], file, source)
    yield from ((number, as_row(row)) for number, row in enumerate(rows, 1))


def read_lines(file):
    """A JSON value a line."""
    with open_text(file) as f:
        for number, line in enumerate(f, 1):
            try:
                yield number, as_row(json.loads(line)) if line.strip() else BLANK_LINES
            except (ValueError, RecursionError):
                yield number, "not JSON"


def is_json(text):
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def values(text):
    """The JSON values of a text, one after the other."""
    decoder, place = json.JSONDecoder(), SPACE.match(text).end()
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        yield value
        place = SPACE.match(text, place).end()


def as_row(item):
    """An object as it is, a string or several as the only column of a row, or the name of what cannot be a row."""
    if isinstance(item, dict):
        return item
    if isinstance(item, str) or are(str, item):
        return {"text": item}
    return f"not text but {type(item).__name__}"


def are(kind, items):
    """Whether it is a list of such things, at least one."""
    return isinstance(items, list) and len(items) > 0 and all(isinstance(item, kind) for item in items)


def mostly_words(texts):
    """Whether at least half of them are several words."""
    return 2 * sum(len(text.split()) > 1 for text in texts) >= len(texts)


def rows_of(document, file, source):
    """The rows of a document: objects, or strings.

    It may be a list of rows; an object that holds such lists, also beside other things (COCO's annotations); one that
    holds columns (as pandas writes them); one keyed by something (`key`), with rows or texts (`value`) as its values;
    one keyed by the prompts; or one row.

    Raises:
        Mistake: if it is none of these, or holds the splits of a data set.
    """
    if not isinstance(document, dict):
        return document if isinstance(document, list) else [document]
    asked = source.caption_column
    if len(document) == 1 and WRAPPERS.issuperset(map(str.lower, document)):
        (inner,) = document.values()
        if isinstance(inner, dict) and any(isinstance(value, (dict, list)) for value in inner.values()):
            return rows_of(inner, file, source)

    def has_text(row):
        return isinstance(row, dict) and any(key == asked or is_known(key) for key in row)

    def keyed(pairs, name):
        """Rows of keys and values: all if a column is asked for, otherwise the text, and the category if it is."""
        rows = [{"key": key, **(value if isinstance(value, dict) else {"value": value})} for key, value in pairs]
        if asked is not None and not source.if_several or name is None:
            return rows
        kept = [name, *([source.category_column] if source.category_column is not None else [])]
        return [{k: row[k] for k in kept if k in row} for row in rows]

    if not document or compression_of(file)[1] != ".json" and has_text(document):  # the only line of JSON Lines
        return [document]
    if isinstance(document.get("columns"), list) and isinstance(document.get("data"), list):  # pandas, orient="split"
        return [dict(zip(document["columns"], row)) for row in document["data"]]
    rows = [v[0] if are(dict, v) else v for v in document.values()]
    if asked in ("key", "value") and not any(isinstance(row, dict) and asked in row for row in rows):
        return keyed(document.items(), asked)
    for name in [key for key in document if key == asked or is_known(key)]:
        column = document[name]
        if isinstance(column, dict) and column:
            if any(map(has_text, column.values())):
                return list(column.values())
            table = {k: v for k, v in document.items() if isinstance(v, dict) and v.keys() == column.keys()}
            return [{k: v[i] for k, v in table.items()} for i in column]
        if are(dict, column):
            return column
        if isinstance(column, list):
            table = {k: v for k, v in document.items() if isinstance(v, list) and len(v) == len(column)}
            return [dict(zip(table, row)) for row in zip(*table.values())]
    if has_text(document):
        return [document]
    lists = {key: v for key, v in document.items() if are(dict, v) or are(str, v)}
    named = {key: v for key, v in lists.items() if has_text(v[0])}
    if len(named) == 1 or len(lists) == 1:
        return next(iter((named or lists).values()))
    chosen = named or (lists if len(lists) == len(document) else {})
    if chosen and SPLITS.isdisjoint(map(str.lower, chosen)):
        if not named and len(chosen) > max(map(len, chosen.values())):  # captions of many things
            return keyed(chosen.items(), "value")
        pairs = [(key, row) for key, rows in chosen.items() for row in rows]
        return keyed(pairs, None if named else "value")
    inner = list(document.values())
    if are(dict, inner):
        if any(map(has_text, inner)):
            return inner
        return keyed(document.items(), "key" if mostly_words(document) else None)
    if are(str, inner):
        by_value, by_key = mostly_words(inner), mostly_words(document)
        return keyed(document.items(), None if by_value == by_key else "value" if by_value else "key")
    if not any(isinstance(value, (dict, list)) for value in inner):
        return keyed(document.items(), "key") if mostly_words(document) else [document]
    raise Mistake(
        f"{file} is one JSON object, of which it cannot be told what are prompts; its keys: {some(document)}. Give "
        "one list of rows in a file"
    )
