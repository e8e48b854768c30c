"""What modelq itself says of an export: its logits, its greedy tokens, and prompts on which the choice of a token is no toss-up."""
import numpy as np


def without_input_quantizers(model):
    """The model with its weights as exported and its activations (and k and v) as they are: what an engine computes that dequantizes."""
    for name, quantizer in model.quantizers.items():
        if not name.endswith("weight_quantizer"):
            quantizer.enabled = False
    model.connect()
    return model


def logits(model, prompts: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of int [B, T]."""
    return np.asarray(model(prompts).logits, dtype=np.float32)


def generate(model, prompts: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy continuation by whole forwards over the growing rows: int [B, tokens], and for each the distance of the best logit to the
    second, as a share of the logits' standard deviation."""
    rows, margins = np.asarray(prompts, dtype=np.int64), []
    for _ in range(tokens):
        last = logits(model, rows)[:, -1]
        best = np.sort(last, axis=1)
        margins.append((best[:, -1] - best[:, -2]) / last.std(axis=1))
        rows = np.concatenate([rows, last.argmax(axis=1)[:, None]], axis=1)
    return rows[:, -tokens:], np.stack(margins, axis=1)


def clear_prompts(model, vocabulary: int, count: int = 8, length: int = 12, tokens: int = 8, tries: int = 256):
    """Of `tries` random prompts, the `count` whose continuation has the widest smallest margin: (prompts [count, length],
    continuations [count, tokens], the smallest margin of all of them). Rounding differs between any two engines; on these it must not matter."""
    prompts = np.random.default_rng(11).integers(2, vocabulary, size=(tries, length))
    continued, margins = generate(model, prompts, tokens)
    chosen = np.argsort(-margins.min(axis=1))[:count]
    return prompts[chosen], continued[chosen], float(margins[chosen].min())


def choices(model, rows: np.ndarray, margin: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """For each position of int [B, T]: the token put first after it, and whether it leads by `margin` of the logits' deviation."""
    found = logits(model, rows)
    best = np.sort(found, axis=-1)
    return found.argmax(axis=-1), (best[..., -1] - best[..., -2]) / found.std(axis=-1) > margin
