"""Where sample texts come from: the text embedded in Python, local files, the Hugging Face hub. Everything here returns lists of str.

A running text (.txt, python_docs) is cut, in order, into documents of about `document_chars` characters at paragraph ends, so that each
fills one sample of tokens; a .jsonl line, a .parquet row and a hub record is one document as it is.
"""
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from modelq.utils.hub_datasets import COMBOS, HUB_DATASETS, HubDataset

EMBEDDED = ("python_docs", "python_docs_heldout")
SUFFIXES = (".txt", ".jsonl", ".parquet")
CALIBRATION_SHARE = 0.8   # of the embedded text; the rest is held out, for perplexity


def python_docs_text(held_out: bool = False) -> str:
    """The language reference that ships with Python (pydoc_data.topics), the first four fifths or the rest: English, about 450 kB."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ImportError("python_docs: this Python lacks pydoc_data (some distributions package it as python3-doc or libpython3); "
                          "use a path to a .txt, .jsonl or .parquet file") from None
    text = "\n\n".join(topics.values())
    border = text.index("\n\n", int(len(text) * CALIBRATION_SHARE))
    return text[border:] if held_out else text[:border]


def running_text(name: str | Path) -> str:
    """The whole of an embedded text, or of a .txt file (UTF-8)."""
    if name in EMBEDDED:
        return python_docs_text(name != "python_docs")
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no such text: {name} (a file, or one of {', '.join(EMBEDDED)})")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def split_documents(text: str, size: int) -> Iterator[str]:
    """Pieces of text of at least size characters (but for the last), cut at a paragraph's end, else a space, soon after size."""
    start = 0
    while start < len(text):
        at = start + size
        for separator, reach in (("\n\n", size // 2), ("\n", size // 8), (" ", size // 8)):
            found = text.find(separator, at, at + reach + 1)
            if found >= 0:
                at = found + len(separator)
                break
        piece = text[start:at].strip()
        if piece:
            yield piece
        start = at


def samples(name: str, count: int, document_chars: int, chat: Callable[[list, Any], str] | None, use_chat: bool,
            splits: list[str] | None) -> list[str]:
    """The first count documents of a source: an embedded or registered name, a path, or a hub id.

    chat(turns, tools) renders chat turns as text, None if the tokenizer cannot; use_chat asks for it where both a plain and a
    chat rendering exist. Fewer than count come back when the source has no more.
    """
    if count < 0:
        raise ValueError(f"num_samples must be 0 or more, got {count}")
    path = Path(name)
    if name in EMBEDDED:
        return list(islice(split_documents(running_text(name), document_chars), count))
    if path.suffix in SUFFIXES and not path.is_dir():
        return _from_file(path, count, document_chars, chat, splits)
    known = HUB_DATASETS.get(path.name if path.is_dir() else name)
    if known is None and not path.is_dir() and name.count("/") != 1:
        raise ValueError(f"dataset_name {name!r} is neither a file nor a known name; known: "
                         f"{', '.join([*EMBEDDED, *HUB_DATASETS, *COMBOS])}; or a path ending in {', '.join(SUFFIXES)}, "
                         "or a hub id 'owner/name'")
    return _from_hub(name, known, count, chat, use_chat, splits)


def _from_file(path: Path, count: int, document_chars: int, chat, splits: list[str] | None) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"calibration data: no such file: {path}")
    if splits is not None and splits != ["train"]:
        raise ValueError(f"{path}: a file has only the split 'train', got {splits}")
    if path.suffix == ".txt":
        return list(islice(split_documents(running_text(path), document_chars), count))
    records = _jsonl(path) if path.suffix == ".jsonl" else _parquet(path)
    return list(islice((text for where, record in records if (text := record_text(record, where, chat))), count))


def _jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:   # UnicodeDecodeError is one too
                raise ValueError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield where, record


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(f"{path}: reading .parquet needs pyarrow: pip install 'modelq[hub]'") from None
    row = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}, row {row}", record
    except OSError as error:
        raise OSError(f"{path}: cannot be read as parquet: {error}") from None
    except ValueError as error:   # pyarrow.ArrowInvalid
        raise ValueError(f"{path}: not a valid parquet file: {error}") from None


def _from_hub(name: str, known: HubDataset | None, count: int, chat, use_chat: bool, splits: list[str] | None) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"dataset_name {name!r} is read with the datasets library: pip install 'modelq[hub]'; "
                          "'python_docs' and paths to .txt and .jsonl files need nothing") from None
    local = Path(name).is_dir()
    source = known or HubDataset(name, ())
    out: list[str] = []
    splits = splits or list(source.splits)
    for index, split in enumerate(splits):
        quota = count // len(splits) + (count % len(splits) if index == len(splits) - 1 else 0)
        if quota == 0:
            continue
        options = {"name": source.name} if source.name else {}
        if source.data_files and not local:
            options, split_name = {"data_files": source.data_files.format(split=split)}, "train"
        else:
            split_name = split
        records = load_dataset(name if local else source.path, split=split_name, streaming=True, **options)
        texts = (_hub_text(record, f"{name}, {split}, record {i}", known, chat, use_chat) for i, record in enumerate(records))
        out.extend(text for text in islice(texts, quota) if text)
    return out


def _hub_text(record: dict, where: str, known: HubDataset | None, chat, use_chat: bool) -> str:
    if known is None:
        return record_text(record, where, chat)
    if use_chat and known.chat_key:
        return _render(record, known.chat_key, where, chat)
    return "\n".join(_plain(record[column]) for column in known.columns)


def _plain(value: str | Iterable[dict]) -> str:
    """A column's text: itself, or the contents of its chat turns."""
    return value if isinstance(value, str) else "\n".join(turn.get("content") or turn.get("value") or "" for turn in value)


def _render(record: dict, key: str, where: str, chat) -> str:
    if chat is None:
        raise ValueError(f"{where}: column {key!r} holds chat turns, and this tokenizer has no chat template")
    return chat(record[key], record.get("tools"))


def record_text(record: dict, where: str, chat) -> str:
    """The text of a record of unknown layout: chat turns, else prompt and its answer, else text, else input and output."""
    present = {key for key, value in record.items() if value is not None}
    for key in ("messages", "conversations"):
        if key in present:
            return _render(record, key, where, chat)
    for first, others in (("prompt", ("completion", "response", "output")), ("text", ()), ("input", ("output",))):
        if first in present:
            parts = [record[first], *(record[key] for key in others if key in present)]
            if not all(isinstance(part, str) for part in parts):
                raise ValueError(f"{where}: {first!r} is {type(record[first]).__name__}, expected text")
            return "\n".join(parts)
    raise ValueError(f"{where}: no column 'messages', 'conversations', 'prompt', 'text' or 'input'; there is {sorted(record)}")
