"""The tokenizer in a GGUF file's metadata, rebuilt for the `tokenizers` library and saved so that transformers loads it.

Two kinds: byte-level BPE ("gpt2", with a named way to split text into words first) and SentencePiece BPE ("llama"). The splits
are those of the models' own tokenizer.json files, by the names that llama.cpp gives them (src/llama-vocab.cpp). An unknown
name is refused: a wrong split would change the tokens in silence.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from modelq.checkpoint.tokenizer import Tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Split(NamedTuple):
    """pattern: the regular expression of a word (None: GPT-2's); digits: every digit stands alone, split off first; nfc: text is
    normalized; ignore_merges: a word that is a token is that token; add_bos: unless the file says otherwise."""

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2, _GPT2_DIGITS = _Split(), _Split(digits=True)
_LLAMA3 = _Split(_CONTRACTIONS + _WORDS % "{1,3}", ignore_merges=True, add_bos=True)
_QWEN2 = _Split(_CONTRACTIONS + _WORDS % "", nfc=True)
_SPLITS = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "mellum", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _GPT2_DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _Split(_TEKKEN, ignore_merges=True, add_bos=True),
}
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # tokenizer.ggml.token_type
_NORMAL = 1


def build_tokenizer(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    """ValueError if the metadata holds no tokenizer, or one of an unknown kind."""
    get = _Getter(path, metadata)
    tokens = get("tokens", list)
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{path}: the tokenizer has a token twice; download the file again")
    kind = get("model", str)
    if kind == "gpt2":
        backend, add_bos = _byte_level_bpe(path, get, tokens)
    elif kind == "llama":
        backend, add_bos = _sentence_piece_bpe(path, get, tokens), True
    else:
        raise ValueError(f"{path}: tokenizers of the kind {kind!r} are not supported (gpt2 and llama are); {_OWN}")
    types = get("token_type", list, [])
    _add_tokens(backend, [token for token, kind in zip(tokens, types) if kind == _CONTROL], special=True)
    _add_tokens(backend, [token for token, kind in zip(tokens, types) if kind == _USER_DEFINED], special=False)
    special = {name: _token(path, tokens, get(key, int, None)) for name, key in _SPECIAL_KEYS.items()}
    first = special["bos_token"] if get("add_bos_token", bool, add_bos) else None
    last = special["eos_token"] if get("add_eos_token", bool, False) else None
    backend.post_processor = _post_processor(backend, first, last, byte_level=kind == "gpt2")
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, special, template if isinstance(template, str) else None, _context_length(metadata))


def save_tokenizer(tokenizer: Tokenizer, directory: Path, config: dict[str, Any]) -> list[Path]:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json and the chat template."""
    special = {name: getattr(tokenizer, name) for name in _SPECIAL_KEYS if getattr(tokenizer, name) is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    if tokenizer.model_max_length:
        settings["model_max_length"] = tokenizer.model_max_length
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    texts = {
        "tokenizer.json": tokenizer.backend.to_str(pretty=True),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(special),
        "generation_config.json": _json({"_from_model_config": True, **ids}),
    }
    if tokenizer.chat_template is not None:
        texts["chat_template.jinja"] = tokenizer.chat_template
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


_OWN = "pass a tokenizer of your own (a folder with tokenizer.json)"
_SPECIAL_KEYS = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"
}  # fmt: skip
_REQUIRED = object()


class _Getter:
    """Typed access to tokenizer.ggml.*: ValueError if a key is missing (without a default) or of another type."""

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self.path, self.metadata = path, metadata

    def __call__(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None and default is not _REQUIRED:
            return default
        if not isinstance(value, kind):
            raise ValueError(f"{self.path}: the metadata key tokenizer.ggml.{key} is missing or no {kind.__name__}; {_OWN}")
        return value


def _byte_level_bpe(path: Path, get: _Getter, tokens: list[str]) -> tuple[Any, bool]:
    """(backend, whether a beginning-of-text token goes in front by default)."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    name = get("pre", str)
    if name not in _SPLITS:
        raise ValueError(f"{path}: the tokenizer splits text the way {name!r}, which is not known ({', '.join(_SPLITS)} are); {_OWN}")
    split = _SPLITS[name]
    merges = [tuple(merge.split(" ")) for merge in get("merges", list)]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{path}: the tokenizer has a merge that is not of two tokens; download the file again")
    model = _bpe(path, models, dict(zip(tokens, range(len(tokens)))), merges, ignore_merges=split.ignore_merges)
    backend = Backend(model)
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=get("add_space_prefix", bool, False), use_regex=split.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, split.add_bos


def _sentence_piece_bpe(path: Path, get: _Getter, tokens: list[str]) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    scores, types = get("scores", list), get("token_type", list)
    if not len(scores) == len(types) == len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens, scores and token_type differ in length; download the file again")
    vocab = dict(zip(tokens, range(len(tokens))))
    merges = _merges_of_scores({token: score for token, score, kind in zip(tokens, scores, types) if kind == _NORMAL}, vocab)
    unknown = _token(path, tokens, get("unknown_token_id", int, None))
    backend = Backend(_bpe(path, models, vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in types))
    prefix = get("add_space_prefix", bool, True)
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges_of_scores(scores: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece out of two others, best piece first: what SentencePiece's scores mean to a BPE with merges."""
    merges = []
    for piece, score in scores.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
        halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges.extend((score, left, right) for left, right in halves)
    merges.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in merges]


def _bpe(path: Path, models: Any, vocab: dict[str, int], merges: list, **options: Any) -> Any:
    try:
        return models.BPE(vocab, merges, **options)
    except Exception as error:  # tokenizers raises bare Exception, for example for a merge whose result is no token
        raise ValueError(f"{path}: the tokenizer's vocabulary and merges do not fit together ({error}); download it again") from None


def _add_tokens(backend: Any, tokens: list[str], special: bool) -> None:
    from tokenizers import AddedToken

    added = [AddedToken(token, normalized=False, special=special) for token in tokens]
    (backend.add_special_tokens if special else backend.add_tokens)(added)


def _post_processor(backend: Any, first: str | None, last: str | None, byte_level: bool) -> Any:
    from tokenizers import processors

    steps = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    if first or last:
        parts = [token for token in (first, "$A", last) if token]
        pair = [*parts, *(f"{part.replace('$A', '$B')}:1" for part in parts)]
        ids = [(token, backend.token_to_id(token)) for token in {first, last} - {None}]
        steps.append(processors.TemplateProcessing(single=parts, pair=pair, special_tokens=ids))
    return processors.Sequence(steps)


def _token(path: Path, tokens: list[str], index: int | None) -> str | None:
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise ValueError(f"{path}: the special token id {index} is outside the vocabulary of {len(tokens)}; download the file again")
    return tokens[index]


def _context_length(metadata: dict[str, Any]) -> int | None:
    value = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return value if isinstance(value, int) and 0 < value < 2**31 else None


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
