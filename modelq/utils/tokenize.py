"""Token ids from any of three kinds of tokenizer: a Hugging Face one (called with texts), tokenizers.Tokenizer, modelq's own wrapper.

They are told apart by what they can do, so nothing is imported here.
"""
import copy
from typing import Any

PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>")
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>")


def _backend(tokenizer: Any) -> Any:
    """The tokenizers.Tokenizer that is, or is inside, a tokenizer that is not of the Hugging Face kind; None if it is of that kind."""
    for candidate in (tokenizer, getattr(tokenizer, "backend", None)):
        if hasattr(candidate, "encode_batch") and hasattr(candidate, "no_truncation"):
            return candidate
    if hasattr(tokenizer, "padding_side") and callable(tokenizer):
        return None
    raise TypeError(f"tokenizer: expected a Hugging Face tokenizer, tokenizers.Tokenizer or modelq's own, got {type(tokenizer).__name__}")


def is_hugging_face(tokenizer: Any) -> bool:
    return _backend(tokenizer) is None


def encode(tokenizer: Any, texts: list[str], max_length: int | None = None, special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text, cut to max_length. The tokenizer's own truncation and padding settings stay as they are."""
    if not texts:
        return []
    backend = _backend(tokenizer)
    if backend is None:
        limits = {"truncation": True, "max_length": max_length} if max_length else {}
        # Encoding with limits changes a fast tokenizer in place.
        return copy.deepcopy(tokenizer)(texts, add_special_tokens=special_tokens, padding=False, **limits)["input_ids"]
    backend = type(backend).from_str(backend.to_str())
    backend.no_padding()
    if max_length:
        backend.enable_truncation(max_length)
    else:
        backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=special_tokens)]


def padding(tokenizer: Any) -> tuple[int, str]:
    """The id to pad with and the side it goes to: the tokenizer's own. ValueError if it has none."""
    token, side = getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "padding_side", "right")
    backend = _backend(tokenizer)
    if backend is not None and backend.padding:
        token, side = backend.padding["pad_id"], backend.padding["direction"]
    elif backend is not None and token is None:
        token = _first(backend, PAD_NAMES)
    if token is None:
        raise ValueError("the samples differ in length and the tokenizer has no pad token: set one (tokenizer.pad_token = "
                         "tokenizer.eos_token, or enable_padding(pad_id=...)), or pass pack=True")
    return int(token), side


def eos_token(tokenizer: Any) -> int | None:
    """The id that separates packed documents, None if the tokenizer has none."""
    token = getattr(tokenizer, "eos_token_id", None)
    backend = _backend(tokenizer)
    return _first(backend, EOS_NAMES) if token is None and backend is not None else token


def _first(backend: Any, names: tuple[str, ...]) -> int | None:
    return next((token for name in names if (token := backend.token_to_id(name)) is not None), None)


def chat_renderer(tokenizer: Any):
    """render(turns, tools) -> str with the tokenizer's chat template, None if it has none."""
    if not hasattr(tokenizer, "apply_chat_template") or getattr(tokenizer, "chat_template", True) is None:
        return None

    def render(turns: list[dict], tools: Any = None) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, **({"tools": tools} if tools is not None else {}))
    return render
