"""Texts: prompts with responses to keep, to forget and to test on, from the embedded set, local files or the hub.

    data = load_text_data(config.data)  # authors, tofu, waterdrum_tofu, shared/data/tofu, mine.jsonl, ...

Which rows these are is said in `hamu/data/text_sources.py`; here they are read. The strings stay in memory.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hamu.data.authors import author_rows, perturbed_rows
from hamu.data.tables import OpenTable, open_table
from hamu.data.text_sources import (
    AUTHORS,
    TextSource,
    duplicate_suffix,
    forget_group,
    perturbed_sources,
    resolve_sources,
    text_task_name,
)
from hamu.errors import DataError

if TYPE_CHECKING:
    from hamu.training.config import DataConfig

__all__ = [
    "PerturbedRows",
    "TextData",
    "TextRows",
    "TextSource",
    "check_text_inputs",
    "duplicate_suffix",
    "forget_group",
    "load_text_data",
    "perturbed_sources",
    "resolve_sources",
    "sha256_texts",
    "text_task_name",
]

PROMPT_COLUMNS = ("question", "prompt", "instruction", "input")
RESPONSE_COLUMNS = ("answer", "response", "output", "completion", "text")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextRows:
    """n rows of text; `len` is n."""

    prompts: tuple[str, ...]
    """(n,); "" is a plain completion: the whole text is the response."""
    responses: tuple[str, ...]
    """(n,); none is empty."""

    def __len__(self) -> int:
        return len(self.responses)

    def __add__(self, other: TextRows) -> TextRows:
        return TextRows(prompts=self.prompts + other.prompts, responses=self.responses + other.responses)


@dataclass(frozen=True, kw_only=True, eq=False)
class PerturbedRows:
    """n questions with right and wrong answers, for TOFU's scores; `len` is n."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    paraphrased: tuple[str, ...]
    """The right answers in other words; `answers` where there are none."""
    perturbed: tuple[tuple[str, ...], ...]
    """Wrong answers of each question, at least one."""

    def __len__(self) -> int:
        return len(self.questions)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextData:
    """Rows to keep, to forget and to test on: plain Python only, so that it can be shared between processes."""

    name: str
    retain: TextRows
    """With the duplicates at its end, where they were asked for."""
    forget: TextRows
    test: TextRows
    """May have no rows."""
    perturbed: Mapping[str, PerturbedRows] = field(default_factory=dict)
    """By "forget", "retain", "real_authors", "world_facts"; empty unless asked for."""
    sha256: str
    """64 hex digits over retain and forget rows; which rows a model is tested on changes nothing of it."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Source and columns of each part; n_retain, n_forget, n_test, n_duplicates, n_empty (skipped), n_forget_in_retain."""

    @property
    def n_bytes(self) -> int:
        """Bytes of its texts in UTF-8."""
        parts = (self.retain, self.forget, self.test)
        texts = [text for rows in parts for column in (rows.prompts, rows.responses) for text in column]
        for rows in self.perturbed.values():
            texts += [*rows.questions, *rows.answers, *rows.paraphrased, *(text for wrong in rows.perturbed for text in wrong)]
        return sum(len(text.encode()) for text in texts)


def load_text_data(data: DataConfig, *, with_perturbed: bool = False) -> TextData:
    """Load the rows that the settings name.

    Rows without an answer (empty, blank or missing) are skipped and counted; duplicates, where asked for, are added to the
    retain rows.

    Args:
        data: dataset_*, forget_dataset_*, duplicate_dataset_*, test_dataset_* (see `resolve_sources`), forget_pct,
            add_duplicate_to_retain, strict, dataset_revision, dataset_cache_dir. Columns that are not named are the first of
            `PROMPT_COLUMNS` and `RESPONSE_COLUMNS` that exist; without a prompt column the whole text is the response.
        with_perturbed: load the questions with wrong answers too, of TOFU and `authors`.

    Raises:
        ConfigError: as `resolve_sources`.
        DataError: there is no such dataset, subset, split or column, a cell is no text, no row is left, or, with `strict`,
            a row has no answer.
    """
    sources = resolve_sources(data)
    parts: dict[str, TextRows] = {}
    provenance: dict[str, Any] = {}
    n_empty: dict[str, int] = {}
    for part, source in sources.items():
        parts[part], n_empty[part], provenance[part] = _read(source, data)
        if len(parts[part]) == 0 and part != "test":
            raise DataError(f"the {part} rows ({source.describe()}) are none; give a source that has rows with answers")
    if any(n_empty.values()):
        counts = ", ".join(f"{n} of {part}" for part, n in n_empty.items() if n)
        _log.warning("rows without an answer are skipped: %s", counts)
    retain, forget = parts["retain"], parts["forget"]
    known = set(zip(retain.prompts, retain.responses, strict=True))
    n_shared = sum(row in known for row in zip(forget.prompts, forget.responses, strict=True))
    if n_shared and not data.add_duplicate_to_retain:
        _log.warning("%d of %d forget rows are retain rows too, word for word", n_shared, len(forget))
    duplicates = parts.get("duplicate", TextRows(prompts=(), responses=()))
    retain, test = retain + duplicates, parts.get("test", TextRows(prompts=(), responses=()))
    return TextData(
        name=data.dataset_name,
        retain=retain,
        forget=forget,
        test=test,
        perturbed=_load_perturbed(data) if with_perturbed else {},
        sha256=sha256_texts(retain, forget),
        provenance={
            **provenance,
            "n_retain": len(retain),
            "n_forget": len(forget),
            "n_test": len(test),
            "n_duplicates": len(duplicates),
            "n_empty": sum(n_empty.values()),
            "n_forget_in_retain": n_shared,
        },
    )


def check_text_inputs(data: DataConfig, *, with_perturbed: bool = False) -> None:
    """Refuse settings that contradict each other, and local files without the subset, split or columns that they name.

    The hub is not asked, and no row is read of files that say what their columns are.

    Raises:
        ConfigError: as `resolve_sources`.
        DataError: a local source cannot be opened, or lacks a column.
    """
    for source in resolve_sources(data).values():
        if source.name != AUTHORS and not source.is_hub:
            _columns(_open(source, data), source)
    if with_perturbed:
        for source in perturbed_sources(data).values():
            if source.name != AUTHORS and not source.is_hub:
                _perturbed_columns(_open_perturbed(source, data))


def sha256_texts(*parts: TextRows) -> str:
    """Return the SHA-256 (64 hex digits) of the rows' prompts and responses, in order; the same on any machine."""
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(len(rows).to_bytes(8, "little"))
        for row in zip(rows.prompts, rows.responses, strict=True):
            for text in row:
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(8, "little"))  # so that no two lists of texts read the same
                digest.update(encoded)
    return digest.hexdigest()


def _open(source: TextSource, data: DataConfig) -> OpenTable:
    return open_table(source.name, source.split, subset=source.subset, cache_dir=data.dataset_cache_dir, revision=source.revision)


def _read(source: TextSource, data: DataConfig) -> tuple[TextRows, int, dict[str, Any]]:
    """Rows of a part, how many were skipped, and where they come from."""
    if source.name == AUTHORS:
        prompts, responses = author_rows(source.subset or "", source.split)
        origin = {"kind": "embedded", "name": AUTHORS, "subset": source.subset, "split": source.split}
        return TextRows(prompts=prompts, responses=responses), 0, origin
    table = _open(source, data)
    prompt, response = _columns(table, source)
    columns = [column for column in (prompt, response) if column is not None]
    rows = table.read(columns)
    answers = _texts(rows[response], table, response, f"{source.flag}_response_field")
    questions = [""] * len(answers) if prompt is None else _texts(rows[prompt], table, prompt, f"{source.flag}_prompt_field")
    kept = [number for number, answer in enumerate(answers) if answer is not None and answer.strip()]
    n_empty = len(answers) - len(kept)
    if n_empty and data.strict:
        first = next(number for number, answer in enumerate(answers) if answer is None or not answer.strip())
        raise DataError(
            f"{table.name} has {n_empty} rows with an empty {response!r}, the first is row {first}; drop them, or leave "
            "--strict out to skip them"
        )
    for number in kept:
        if questions[number] is None:
            raise DataError(f"{table.name} has no {prompt!r} in row {number}; give it one, or drop the row")
    picked = TextRows(
        prompts=tuple(questions[number] or "" for number in kept), responses=tuple(answers[number] or "" for number in kept)
    )
    return picked, n_empty, {**table.source, "columns": columns}


def _columns(table: OpenTable, source: TextSource) -> tuple[str | None, str]:
    """Columns of prompts (None: there is none) and of responses; both hold text."""
    response = table.column(source.response_field, RESPONSE_COLUMNS, f"{source.flag}_response_field")
    if source.prompt_field:
        prompt: str | None = table.column(source.prompt_field, (), f"{source.flag}_prompt_field")
        if prompt == response:
            raise DataError(
                f"{table.name} has {prompt!r} as prompts and as responses; give two, or leave {source.flag}_prompt_field out"
            )
    elif source.prompt_field == "":
        prompt = None
    else:
        prompt = next((name for name in PROMPT_COLUMNS if name in table.schema.names and name != response), None)
    for column, kind in ((prompt, "prompt"), (response, "response")):
        if column is not None:
            _check_text(table.schema.field(column).type, table, column, f"{source.flag}_{kind}_field")
    return prompt, response


def _check_text(kind: pa.DataType, table: OpenTable, column: str, flag: str) -> None:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_null(value)):
        raise DataError(f"{table.name} holds {kind} in column {column!r}, not text; name another with --{flag}")


def _texts(column: pa.ChunkedArray, table: OpenTable, name: str, flag: str) -> list[str | None]:
    _check_text(column.type, table, name, flag)  # of the rows read: a hub dataset's schema is its word alone
    return column.to_pylist()


def _load_perturbed(data: DataConfig) -> dict[str, PerturbedRows]:
    sources = perturbed_sources(data)
    forget = sources["forget"]
    if forget.name == AUTHORS:
        rows = perturbed_rows(forget.subset or "")
        return {part: PerturbedRows(**rows[part]._asdict()) for part in sources}
    return {part: _read_perturbed(_open_perturbed(source, data)) for part, source in sources.items()}


def _open_perturbed(source: TextSource, data: DataConfig) -> OpenTable:
    try:
        return _open(source, data)
    except DataError as error:
        raise DataError(f"eval_tofu needs the perturbed answers of {source.describe()}: {error}") from error


def _perturbed_columns(table: OpenTable) -> list[str]:
    """Columns of questions, answers and wrong answers, and of paraphrased answers where there are any."""
    flag = "dataset_response_field"
    columns = [table.column(None, PROMPT_COLUMNS, "dataset_prompt_field"), table.column(None, RESPONSE_COLUMNS, flag)]
    columns.append(table.column(None, ("perturbed_answer",), flag))
    return [*columns, *(name for name in ("paraphrased_answer",) if name in table.schema.names)]


def _read_perturbed(table: OpenTable) -> PerturbedRows:
    columns = _perturbed_columns(table)
    rows = table.read(columns).to_pylist()
    wrong = [[row[columns[2]]] if isinstance(row[columns[2]], str) else list(row[columns[2]] or ()) for row in rows]
    for number, (row, answers) in enumerate(zip(rows, wrong, strict=True)):
        texts = [*(row[name] for name in columns if name != columns[2]), *answers]
        if not answers or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{table.name} lacks a question, an answer or a wrong answer in row {number}; each must be text")
    if not rows:
        raise DataError(f"{table.name} has no rows; it needs at least one")
    return PerturbedRows(
        questions=tuple(row[columns[0]] for row in rows),
        answers=tuple(row[columns[1]] for row in rows),
        paraphrased=tuple(row[columns[-1] if len(columns) > 3 else columns[1]] for row in rows),
        perturbed=tuple(tuple(answers) for answers in wrong),
    )
