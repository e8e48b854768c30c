"""Calibration data: texts to batches of tokens, and the loop that shows them to a model.

The names and arguments are those of modelopt.torch.utils.dataset_utils, with three differences: batches are NumPy arrays unless torch
tensors are wanted (a Hugging Face tokenizer beside an imported torch, or a device); "python_docs" and paths to .txt and .parquet files work
too, with no download; there is no warning about padding on the right, as padding counts in no statistic of a native model.
"""
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from modelq.utils import texts, tokenize
from modelq.utils.batch_size import get_max_batch_size
from modelq.utils.hub_datasets import COMBOS, HUB_DATASETS

__all__ = ["TokenBatches", "create_forward_loop", "get_dataset_dataloader", "get_dataset_samples", "get_max_batch_size",
           "get_supported_datasets"]

CHARS_PER_TOKEN = 5    # more than English has in any usual vocabulary, so that a document of a running text fills its sample
PACK_OVERSAMPLING = 16
AUTO_BATCH_SIZE = 8
IGNORED_LABEL = -100


def get_supported_datasets() -> list[str]:
    """The names that dataset_name may have, beside paths and hub ids."""
    return [*texts.EMBEDDED, *HUB_DATASETS, *COMBOS]


def get_dataset_samples(dataset_name: str, num_samples: int, *, apply_chat_template: bool = False, tokenizer: Any = None,
                        split: str | list[str] | None = None, max_sample_length: int = 512) -> list[str]:
    """The first num_samples texts of one source.

    Args:
        dataset_name: "python_docs" (always there), "python_docs_heldout" (its part for evaluation), a registered name
            (get_supported_datasets), a hub id "owner/name", or a path to a .txt, .jsonl or .parquet file or a data set's folder.
        num_samples: how many, 0 or more. A source that has fewer gives fewer.
        apply_chat_template: render chat turns with the tokenizer's template where the data set has them.
        split: the split or splits of a hub data set, instead of its registered ones.
        max_sample_length: in tokens; sizes the documents that a running text is cut into.

    Raises:
        ValueError: unknown name (the text lists the known ones), or a record that cannot be read (it names file and line).
        FileNotFoundError: a path that is not there. ImportError: the source needs the extra `hub`.
    """
    if dataset_name in COMBOS:
        raise ValueError(f"{dataset_name!r} stands for several data sets: pass one of {', '.join(COMBOS[dataset_name])}, "
                         "or use get_dataset_dataloader")
    chat = tokenize.chat_renderer(tokenizer) if tokenizer is not None else None
    splits = [split] if isinstance(split, str) else split
    if splits is not None and not splits:
        raise ValueError("split must name at least one split")
    return texts.samples(str(dataset_name), num_samples, CHARS_PER_TOKEN * max_sample_length, chat, apply_chat_template, splits)


class TokenBatches:
    """Batches of a fixed set of samples, in order: iterable any number of times, with a length. Each is a dict of [B, T] arrays."""

    def __init__(self, columns: dict[str, np.ndarray], batch_size: int, device: Any = None):
        self.columns, self.batch_size, self.device = columns, batch_size, device

    @property
    def num_samples(self) -> int:
        """Of all batches together."""
        return len(self.columns["input_ids"])

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for begin in range(0, self.num_samples, self.batch_size):
            yield {name: self._send(column[begin:begin + self.batch_size]) for name, column in self.columns.items()}

    def _send(self, array: np.ndarray) -> Any:
        if self.device is None:
            return array
        import torch
        return torch.from_numpy(array.copy()).to(self.device)

    def __repr__(self) -> str:
        return f"TokenBatches({self.num_samples} samples of {self.columns['input_ids'].shape[1]} tokens, batch_size={self.batch_size})"


def get_dataset_dataloader(dataset_name: str | list[str] = "cnn_dailymail", tokenizer: Any = None, batch_size: int = 1,
                           num_samples: int | list[int] = 512, max_sample_length: int = 512, device: Any = None,
                           include_labels: bool = False, apply_chat_template: bool = False, pack: bool = False,
                           distributed: bool = False, sampler_kwargs: dict | None = None) -> TokenBatches:
    """Batches of token ids for calibration.

    Args:
        dataset_name: a source (see get_dataset_samples) or a list of sources; their samples follow each other, unshuffled.
        tokenizer: a Hugging Face tokenizer, a tokenizers.Tokenizer, or the `tokenizer` of a modelq model.
        batch_size: samples in a batch; 0 lets modelq choose.
        num_samples: how many samples, one number per source.
        max_sample_length: tokens per sample at most. All samples are padded to the longest of the whole set.
        device: with a Hugging Face tokenizer and torch (imported, or asked for by a device), batches are torch tensors there; else NumPy
            int64 arrays.
        include_labels: add `labels`: input_ids, with -100 where attention_mask is 0 (models shift them themselves).
        apply_chat_template: render chat data with the tokenizer's template.
        pack: join all texts by the end-of-text token into one stream and cut it into full rows (include_labels is then ignored).
        distributed, sampler_kwargs: keep every num_replicas-th sample from rank on ({"num_replicas": n, "rank": r}).

    Returns:
        An iterable with a length, of {"input_ids": [B, T], "attention_mask": [B, T]} (and "labels").

    Raises:
        ValueError: no data, no pad token where one is needed, wrong counts; and what get_dataset_samples raises.
    """
    if tokenizer is None:
        raise ValueError("get_dataset_dataloader: a tokenizer is needed (model.tokenizer, or AutoTokenizer.from_pretrained)")
    if batch_size < 0 or max_sample_length < 1:
        raise ValueError(f"batch_size must be 0 or more and max_sample_length 1 or more, got {batch_size} and {max_sample_length}")
    sources = _sources(dataset_name, num_samples)
    found = []
    for name, count in sources:
        wanted = count * (PACK_OVERSAMPLING if pack else 1)
        part = get_dataset_samples(name, wanted, apply_chat_template=apply_chat_template, tokenizer=tokenizer,
                                   max_sample_length=max_sample_length)
        if 0 < len(part) < count and not pack:
            warnings.warn(f"{name} has only {len(part)} samples, {count} were asked for", stacklevel=2)
        found += part
    if not found:
        raise ValueError(f"no calibration data: {', '.join(name for name, _ in sources)} gave no text")
    if pack:
        if len(sources) > 1:   # else the first source's oversampled texts would fill every row
            random.Random(0).shuffle(found)
        columns = _packed(tokenizer, found, max_sample_length, sum(count for _, count in sources))
    else:
        columns = _padded(tokenizer, found, max_sample_length)
        if include_labels:
            columns["labels"] = np.where(columns["attention_mask"] > 0, columns["input_ids"], IGNORED_LABEL)
    if distributed:
        share = sampler_kwargs or {}
        if not {"num_replicas", "rank"} <= set(share):
            raise ValueError("distributed=True needs sampler_kwargs={'num_replicas': n, 'rank': r}")
        columns = {name: column[share["rank"]::share["num_replicas"]] for name, column in columns.items()}
    wants_torch = tokenize.is_hugging_face(tokenizer) and ("torch" in sys.modules or device is not None and _has_torch())
    return TokenBatches(columns, batch_size or AUTO_BATCH_SIZE, (device or "cpu") if wants_torch else None)


def _has_torch() -> bool:
    from importlib.util import find_spec
    return find_spec("torch") is not None


def _sources(names: str | list[str], counts: int | list[int]) -> list[tuple[str, int]]:
    """(name, count) of each source, combinations expanded: a count is shared out evenly, the remainder one each to the first."""
    names = [names] if not isinstance(names, (list, tuple)) else list(names)
    counts = [counts] if not isinstance(counts, (list, tuple)) else list(counts)
    if len(names) != len(counts):
        raise ValueError(f"dataset_name and num_samples must have the same length, got {len(names)} and {len(counts)}")
    out = []
    for name, count in zip(map(str, names), counts):
        twice = set(COMBOS.get(name, ())) & set(names)
        if twice:
            raise ValueError(f"{name!r} includes {', '.join(sorted(twice))}, which is also asked for by itself")
        members = COMBOS.get(name, (name,))
        share, rest = divmod(count, len(members))
        out += [(member, share + (index < rest)) for index, member in enumerate(members)]
    return out


def _padded(tokenizer: Any, samples: list[str], max_length: int) -> dict[str, np.ndarray]:
    rows = tokenize.encode(tokenizer, samples, max_length)
    lengths = np.array([len(row) for row in rows])
    longest = int(lengths.max())
    if longest == 0:
        raise ValueError("no calibration data: the tokenizer made no token of any text")
    token, side = (0, "right") if (lengths == longest).all() else tokenize.padding(tokenizer)
    ids = np.full((len(rows), longest), token, dtype=np.int64)
    mask = np.arange(longest) < lengths[:, None]
    if side == "left":
        mask = mask[:, ::-1]
    ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}


def _packed(tokenizer: Any, samples: list[str], length: int, rows: int) -> dict[str, np.ndarray]:
    separator = tokenize.eos_token(tokenizer)
    end = [] if separator is None else [separator]
    stream: list[int] = []
    for begin in range(0, len(samples), 64):   # stop tokenizing once there is enough
        for ids in tokenize.encode(tokenizer, samples[begin:begin + 64], special_tokens=False):
            stream += ids + end
        if len(stream) >= rows * length:
            break
    stream = stream[:rows * length]
    found, last = divmod(len(stream), length)
    if found + (last > 0) < rows:
        warnings.warn(f"pack=True made {found + (last > 0)} rows of {length} tokens, {rows} were asked for: the text is used up",
                      stacklevel=3)
    ids = np.zeros((found + (last > 0), length), dtype=np.int64)
    if last:
        ids[:] = tokenize.padding(tokenizer)[0]
    ids.reshape(-1)[:len(stream)] = stream
    mask = (np.arange(ids.size) < len(stream)).reshape(ids.shape)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}


def create_forward_loop(model: Any = None, dataset_name: str | list[str] = "cnn_dailymail", tokenizer: Any = None, batch_size: int = 1,
                        num_samples: int | list[int] = 512, max_sample_length: int = 512, device: Any = None,
                        include_labels: bool = False, dataloader: Any = None) -> Callable[[Any], None]:
    """forward_loop(model) for quantize: calls the model with each batch of dataloader, or of the data set that the other arguments name
    (dataset_name, batch_size, num_samples, max_sample_length, include_labels: see get_dataset_dataloader; tokenizer and device default to
    the model's).

    A batch may be a dict of keyword arguments, or one array of token ids.
    """
    if dataloader is None:
        dataloader = get_dataset_dataloader(dataset_name, tokenizer if tokenizer is not None else getattr(model, "tokenizer", None),
                                            batch_size, num_samples, max_sample_length, device, include_labels)

    def forward_loop(model: Any) -> None:
        from modelq.torch_models import is_torch_model

        if is_torch_model(model):
            from modelq.torch_models.batches import run_batches

            return run_batches(model, dataloader)
        for batch in dataloader:
            if isinstance(batch, dict):
                model(**batch)
            else:
                model(batch)
    return forward_loop
