"""A small tokenizer with the call of a transformers tokenizer, over the `tokenizers` library. Results are NumPy arrays."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelq.checkpoint.base import read_json_object

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Encoding(dict):
    """input_ids and attention_mask, reachable as items or as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Tokenizer:
    """Text to token ids and back.

    backend: a `tokenizers.Tokenizer`; special: any of bos_token, eos_token, pad_token, unk_token as strings; chat_template: a Jinja
    template or None. The special tokens and padding_side ("right" or "left") are attributes that may be set, as in transformers.
    """

    def __init__(
        self,
        backend: Any,
        special: dict[str, str | None] | None = None,
        chat_template: str | None = None,
        model_max_length: int | None = None,
    ):
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.chat_template = chat_template
        self.model_max_length = model_max_length
        self.padding_side = "right"
        for name in _SPECIAL:
            setattr(self, name, (special or {}).get(name))

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja. FileNotFoundError without tokenizer.json."""
        import tokenizers

        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no tokenizer.json; pass a tokenizer of your own, or save one there with transformers "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{file}: not a tokenizer that this version of tokenizers reads ({error})") from None
        settings = folder / "tokenizer_config.json"
        config = read_json_object(settings, "the tokenizer's config") if settings.is_file() else {}
        limit = config.get("model_max_length")
        tokenizer = cls(
            backend,
            {name: _token_text(config.get(name)) for name in _SPECIAL},
            _chat_template(folder, config),
            int(limit) if isinstance(limit, (int, float)) and 0 < limit < 2**31 else None,
        )
        if config.get("padding_side") in ("left", "right"):
            tokenizer.padding_side = config["padding_side"]
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    def token_to_id(self, token: str | None) -> int | None:
        """The id of a token, None if it is unknown."""
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_token_id(self) -> int | None:
        return self.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self.token_to_id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self.token_to_id(self.pad_token)

    @property
    def unk_token_id(self) -> int | None:
        return self.token_to_id(self.unk_token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int] | int, skip_special_tokens: bool = False) -> str:
        """The text of ids (a list, or a 1-D array)."""
        return self.backend.decode(np.atleast_1d(np.asarray(ids, dtype=np.int64)).tolist(), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, batch: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """`decode` of each row."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def apply_chat_template(self, conversation: Sequence[dict[str, Any]], add_generation_prompt: bool = False, tokenize: bool = True,
                            **variables: Any) -> Any:
        """A conversation as the model was trained to see it: an `Encoding` of arrays [1, T], or the text if not tokenize.

        conversation: [{"role": "user", "content": "..."}, ...]. add_generation_prompt: up to where the assistant's answer begins.
        variables: what else the template asks for, such as tools or enable_thinking. ValueError: there is no template, or it refuses.
        """
        from modelq.checkpoint.chat_template import render

        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template (no chat_template.jinja, and no chat_template in tokenizer_config.json "
                             "or the GGUF file): encode plain text instead (modelq chat --plain), or set tokenizer.chat_template")
        special = {name: getattr(self, name) for name in _SPECIAL if getattr(self, name) is not None}
        text = render(self.chat_template, conversation, add_generation_prompt=add_generation_prompt, **{**special, **variables})
        return self(text, add_special_tokens=False) if tokenize else text

    def __call__(
        self,
        text: str | Sequence[str],
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "np",
        add_special_tokens: bool = True,
    ) -> Encoding:
        """Encode one text or a list of texts: {"input_ids", "attention_mask"}, int64 arrays [B, T] (lists if return_tensors is None).

        padding: True or "longest" pads to the longest row, "max_length" to max_length, False not at all (ValueError if arrays are
        asked for and the rows differ). truncation cuts to max_length tokens, special ones included.
        """
        if return_tensors not in ("np", None):
            raise ValueError(f"return_tensors={return_tensors!r}: modelq's tokenizer returns NumPy arrays ('np') or lists (None)")
        texts = [text] if isinstance(text, str) else list(text)
        limit = (max_length or self.model_max_length) if truncation else None
        rows = [self._ids(encoding, limit, add_special_tokens) for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]
        width = _width(rows, padding, max_length or self.model_max_length)
        if width is not None:
            ids, mask = self._pad(rows, width)
        elif return_tensors is None:
            ids, mask = rows, [[1] * len(row) for row in rows]
        elif len({len(row) for row in rows}) > 1:
            raise ValueError("the texts have different numbers of tokens; pass padding=True (or return_tensors=None for lists)")
        else:
            ids = np.array(rows, dtype=np.int64).reshape(len(rows), len(rows[0]) if rows else 0)
            mask = np.ones_like(ids)
        if return_tensors is None:
            ids, mask = (value if isinstance(value, list) else value.tolist() for value in (ids, mask))
            if isinstance(text, str):
                ids, mask = ids[0], mask[0]
        return Encoding(input_ids=ids, attention_mask=mask)

    def _ids(self, encoding: Any, limit: int | None, add_special_tokens: bool) -> list[int]:
        if limit is not None:
            room = limit - (self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0)
            if len(encoding.ids) > max(room, 0):
                encoding.truncate(max(room, 0))
        return self.backend.post_process(encoding, add_special_tokens=add_special_tokens).ids

    def _pad(self, rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
        pad = self.pad_token_id
        if pad is None:
            if any(len(row) < width for row in rows):
                raise ValueError("the tokenizer has no padding token; set one first: tokenizer.pad_token = tokenizer.eos_token")
            pad = 0
        ids = np.full((len(rows), width), pad, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            part = slice(width - len(row), width) if self.padding_side == "left" else slice(0, len(row))
            ids[i, part] = row
            mask[i, part] = 1
        return ids, mask


def _width(rows: list[list[int]], padding: bool | str, max_length: int | None) -> int | None:
    """The common length to pad to, None for no padding."""
    longest = max((len(row) for row in rows), default=0)
    if padding in (True, "longest"):
        return longest
    if padding == "max_length":
        if max_length is None:
            raise ValueError("padding='max_length' needs max_length")
        return max(longest, max_length)
    if padding in (False, None, "do_not_pad"):
        return None
    raise ValueError(f"padding={padding!r}: known are True, False, 'longest', 'max_length' and 'do_not_pad'")


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json spells a token as a string, or as an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: dict) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
