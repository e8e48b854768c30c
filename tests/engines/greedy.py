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


def clear_prompts(model, vocabulary: int, count: int = 12, length: int = 12, tokens: int = 8, tries: int = 1536):
    """Prompts whose greedy continuation is no toss-up: (prompts [count, length], continuations [count, tokens], margin).

    Rounding differs between any two engines, and on these it must not matter. Of `tries` random prompts the `count` are taken whose
    smallest margin is widest; a margin is the distance of the best logit to the second, as a share of the logits' standard deviation.
    Continuations are made by whole forwards over growing rows, the least clear being given up at each step.
    """
    rows = np.random.default_rng(11).integers(2, vocabulary, size=(tries, length))
    margins = np.full(tries, np.inf)
    for _ in range(tokens):
        last = logits(model, rows)[:, -1]
        best = np.sort(last, axis=1)
        margins = np.minimum(margins, (best[:, -1] - best[:, -2]) / last.std(axis=1))
        kept = np.argsort(-margins)[:max(count, len(rows) * 11 // 20)]
        rows, margins = np.concatenate([rows, last.argmax(axis=1)[:, None]], axis=1)[kept], margins[kept]
    return rows[:count, :length], rows[:count, length:], float(margins[:count].min())


def choices(model, rows: np.ndarray, margin: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """For each position of int [B, T]: the token put first after it, and whether it leads by `margin` of the logits' deviation."""
    found = logits(model, rows)
    best = np.sort(found, axis=-1)
    return found.argmax(axis=-1), (best[..., -1] - best[..., -2]) / found.std(axis=-1) > margin
