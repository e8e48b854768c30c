"""GGUF files: tensors, config and tokenizer against transformers, llama.cpp and SentencePiece (tests/data/gguf/expected.json)."""
from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from modelq.checkpoint import open_checkpoint
from modelq.checkpoint.gguf_config import _llama3_factors
from modelq.checkpoint.gguf_reader import parse
from modelq.checkpoint.gguf_tokenizer import build_tokenizer
from modelq.checkpoint.tokenizer import Tokenizer

EXPECTED = json.loads((Path(__file__).parent / "data" / "gguf" / "expected.json").read_text())
HEADS, KV_HEADS, HEAD, HIDDEN, INNER, VOCAB, LAYERS = 4, 2, 8, 32, 64, 12, 2


@pytest.fixture(scope="module")
def model(smollm2):
    with open_checkpoint(smollm2) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def metadata(smollm2):
    return parse(smollm2)[1]


def test_metadata_is_what_the_library_reads(smollm2, metadata, tmp_path):
    assert metadata == {name: field.contents() for name, field in gguf.GGUFReader(smollm2).fields.items()}
    keys = {"/x.bools": [True, False], "/x.floats": [1.5, 2.5], "/x.ints": [-1, 2], "/x.text": "é", "/x.texts": ["", "é", "a" * 300]}
    write_gguf(tmp_path / "a.gguf", keys=keys)
    want = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}
    assert parse(tmp_path / "a.gguf")[1] == want and want["x.texts"] == keys["/x.texts"]


# ---- SmolLM2 ----------------------------------------------------------------------------------------------------------------------


def test_tensors_are_transformers_bit_for_bit(model):
    digests = {}
    for name, info in model.tensors.items():
        array = model.read(name)
        assert (array.dtype, array.shape, info.nbytes) == (np.float32, info.shape, array.nbytes) and info.dtype == "float32"
        digests[name] = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
        model.release([name])
    assert {name: digests[name] for name in EXPECTED["tensors"]} == EXPECTED["tensors"]
    assert hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest() == EXPECTED["all_tensors"]


def test_config(model):
    want = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05, "rope_theta": 100000.0, "rope_scaling": None, "vocab_size": 49152, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    assert model.config == want and model.side_files == ()


def test_token_ids_are_llama_cpps(model, tmp_path):
    """transformers' own GGUF converter is not followed: it loses the split of digits and swaps the special tokens."""
    tokenizer = model.tokenizer()
    written = model.save_tokenizer(tmp_path)
    saved = Tokenizer.from_folder(tmp_path)
    assert {file.name for file in written} == {file.name for file in tmp_path.iterdir()} and "generation_config.json" in str(written)
    for text, ids in EXPECTED["texts"]:
        assert tokenizer.encode(text) == ids and saved.encode(text) == ids, text
    for text in ("hello  world 123", "日本語👍", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for either in (tokenizer, saved):
        assert (either.bos_token_id, either.eos_token_id, either.pad_token_id, either.unk_token_id) == (1, 2, 2, 0)
        assert either.vocab_size == 49152 and either.model_max_length == 8192 and either.chat_template.startswith("{% for message")
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_saved_tokenizer_in_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [tokenizer(text)["input_ids"] for text, _ in EXPECTED["texts"]] == [ids for _, ids in EXPECTED["texts"]]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2) and tokenizer.chat_template


@pytest.mark.parametrize("kind", EXPECTED["splits"])
def test_ways_to_split_words(kind, metadata):
    """SmolLM2's vocabulary with merges that only some splits allow, as llama.cpp tokenizes with it (first token included)."""
    extra = EXPECTED["extra_merges"]
    changed = {
        "tokenizer.ggml.pre": kind, "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.tokens": metadata["tokenizer.ggml.tokens"] + [merge.replace(" ", "") for merge in extra],
        "tokenizer.ggml.merges": metadata["tokenizer.ggml.merges"] + extra,
    }  # fmt: skip
    tokenizer = build_tokenizer(Path("x.gguf"), {**metadata, **changed})
    for text, ids in zip(EXPECTED["split_texts"], EXPECTED["splits"][kind]):
        assert tokenizer.encode(text) == ids, text


def sentence_piece_metadata() -> dict:
    model = EXPECTED["sentencepiece"]
    lists = {f"tokenizer.ggml.{key}": model[key] for key in ("tokens", "scores", "token_type")}
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}
    return {"tokenizer.ggml.model": "llama", **lists, **ids}


def test_sentence_piece():
    tokenizer = build_tokenizer(Path("x.gguf"), sentence_piece_metadata())
    for text, ids in EXPECTED["sentencepiece"]["texts"]:
        if "<s>" in text or "</s>" in text or "<user>" in text:  # SentencePiece reads these as text, a tokenizer as tokens
            continue
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text) == [1, *ids]
        if "\u2581" not in text:
            assert tokenizer.decode(ids) == text
    assert tokenizer.encode("</s> <user>", add_special_tokens=False)[0] == 2 and 3 in tokenizer.encode("<user>")
    closed = build_tokenizer(
        Path("x.gguf"), {**sentence_piece_metadata(), "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    )
    assert closed.encode("x")[-1] == 2 and closed.encode("x")[0] != 1
    bare = build_tokenizer(Path("x.gguf"), {**sentence_piece_metadata(), "tokenizer.ggml.add_space_prefix": False})
    assert bare.decode(bare.encode(" x", False)) == " x" and bare.encode("the", False) != tokenizer.encode("the", False)


TOKENIZER_LIES = {
    "no model": ({"model": None}, "tokenizer.ggml.model is missing"),
    "unknown model": ({"model": "bert"}, "of the kind 'bert'"),
    "unknown split": ({"pre": "viking"}, "splits text the way 'viking'"),
    "no split": ({"pre": None}, "tokenizer.ggml.pre is missing"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    "token twice": ({"tokens": ["a", "a"]}, "a token twice"),
    "merge of three": ({"merges": ["a b c"]}, "not of two tokens"),
    "merge of unknown tokens": ({"merges": ["§§ §§"]}, "do not fit together"),
    "end id outside": ({"eos_token_id": 10**6}, "outside the vocabulary"),
    "bos id a string": ({"bos_token_id": "1"}, "bos_token_id is missing or no int"),
    "scores of another length": ({"model": "llama", "scores": [0.0]}, "differ in length"),
}


@pytest.mark.parametrize("case", TOKENIZER_LIES)
def test_tokenizer_lies(case, metadata):
    changes, message = TOKENIZER_LIES[case]
    with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
        build_tokenizer(Path("x.gguf"), {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}})


# ---- small files made here --------------------------------------------------------------------------------------------------------


def shapes(arch: str) -> dict[str, tuple[int, ...]]:
    block = {
        "attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,), "attn_q.weight": (HEADS * HEAD, HIDDEN),
        "attn_k.weight": (KV_HEADS * HEAD, HIDDEN), "attn_v.weight": (KV_HEADS * HEAD, HIDDEN), "attn_output.weight": (HIDDEN, HEADS * HEAD),
        "ffn_gate.weight": (INNER, HIDDEN), "ffn_up.weight": (INNER, HIDDEN), "ffn_down.weight": (HIDDEN, INNER),
    }  # fmt: skip
    if arch != "qwen3":
        block |= {"attn_q.bias": (HEADS * HEAD,), "attn_k.bias": (KV_HEADS * HEAD,), "attn_v.bias": (KV_HEADS * HEAD,)}
    else:
        block |= {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
    result = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}
    return result | {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}


def write_gguf(path: Path, arch: str = "llama", tensors: dict | None = None, keys: dict | None = None) -> dict[str, np.ndarray]:
    """A model of random values; keys override metadata (None drops a key)."""
    rng = np.random.default_rng(5)
    values = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes(arch).items()} if tensors is None else tensors
    metadata = {
        "context_length": 128, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": INNER, "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 500000.0, **(keys or {}),
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        key = key[1:] if key.startswith("/") else f"{arch}.{key}"
        if isinstance(value, (list, np.ndarray)):
            writer.add_array(key, list(value))
        elif value is not None:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}[type(value)](key, value)
    for name, value in values.items():
        kind = gguf.GGMLQuantizationType.BF16 if value.dtype == ml_dtypes.bfloat16 else None
        writer.add_tensor(name, value.view(np.uint8) if kind else value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to query and key projections (its LlamaModel.permute)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_names_and_order_of_each_family(arch, tmp_path):
    path = tmp_path / "a.gguf"
    values = write_gguf(path, arch, keys={"attention.key_length": HEAD, "attention.value_length": HEAD, "rope.dimension_count": HEAD})
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.tensors) == len(values)
        assert np.array_equal(checkpoint.read("model.embed_tokens.weight"), values["token_embd.weight"])
        assert np.array_equal(checkpoint.read("lm_head.weight"), values["output.weight"])
        assert np.array_equal(checkpoint.read("model.norm.weight"), values["output_norm.weight"])
        for i in range(LAYERS):
            for theirs, heads, ours in [("attn_q", HEADS, "q_proj"), ("attn_k", KV_HEADS, "k_proj"), ("attn_v", 0, "v_proj")]:
                for suffix in ("weight", "bias"):
                    if f"blk.{i}.{theirs}.{suffix}" in values:
                        got = checkpoint.read(f"model.layers.{i}.self_attn.{ours}.{suffix}")
                        got = llama_cpp_order(got, heads) if heads and arch == "llama" else got
                        assert np.array_equal(got, values[f"blk.{i}.{theirs}.{suffix}"])
            for theirs, ours in [("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"),
                                 ("attn_output", "self_attn.o_proj"), ("attn_norm", "input_layernorm"),
                                 ("ffn_norm", "post_attention_layernorm")]:  # fmt: skip
                assert np.array_equal(checkpoint.read(f"model.layers.{i}.{ours}.weight"), values[f"blk.{i}.{theirs}.weight"])
            if arch == "qwen3":
                assert np.array_equal(checkpoint.read(f"model.layers.{i}.self_attn.q_norm.weight"), values[f"blk.{i}.attn_q_norm.weight"])
        config = checkpoint.config
        assert config["model_type"] == arch and config["tie_word_embeddings"] is False and config["head_dim"] == HEAD
        assert config["vocab_size"] == VOCAB and config["rms_norm_eps"] == 1e-6 and config.get("attention_bias", True) is True
        checkpoint.release()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("lm_head.weight")
    checkpoint.close()


def test_types_of_tensors(tmp_path):
    values = {name: np.random.default_rng(1).standard_normal(shape, np.float32) for name, shape in shapes("llama").items()}
    values["blk.0.ffn_up.weight"] = values["blk.0.ffn_up.weight"].astype(np.float16)
    values["blk.0.attn_q.weight"] = values["blk.0.attn_q.weight"].astype(ml_dtypes.bfloat16)
    write_gguf(tmp_path / "a.gguf", tensors=values)
    checkpoint = open_checkpoint(tmp_path)  # a folder with one .gguf file
    up, query = checkpoint.read("model.layers.0.mlp.up_proj.weight"), checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    assert up.dtype == np.float16 and np.array_equal(up, values["blk.0.ffn_up.weight"])
    assert query.dtype == ml_dtypes.bfloat16 and np.array_equal(llama_cpp_order(query, HEADS), values["blk.0.attn_q.weight"])
    assert checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].dtype == "bfloat16"
    assert checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].nbytes == up.nbytes
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="2 .gguf files; give the path"):
        open_checkpoint(tmp_path)


def test_llama3_rope(tmp_path):
    """The factors that llama.cpp's converter stores, computed here its way (LlamaModel.generate_extra_tensors)."""
    base, factor, low, high, old = 500000.0, 8.0, 1.0, 4.0, 8192
    factors = []
    for frequency in 1.0 / base ** (np.arange(0, 64, 2) / 64):
        wave = 2 * np.pi / frequency
        if wave < old / high:
            factors.append(1.0)
        elif wave > old / low:
            factors.append(factor)
        else:
            smooth = (old / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    values = {name: np.zeros(shape, np.float32) for name, shape in shapes("llama").items()}
    keys = {"attention.key_length": 64, "attention.value_length": 64}
    write_gguf(tmp_path / "a.gguf", tensors={**values, "rope_freqs.weight": np.array(factors, np.float32)}, keys=keys)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    want = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert checkpoint.config["rope_scaling"] == want and "rope_freqs.weight" not in checkpoint.tensors
    assert np.allclose(_llama3_factors(base, 64, want), factors, rtol=1e-12)
    for wrong in (np.array(factors) * 1.01, np.array(factors[:-1]), np.full(32, np.nan), np.zeros(32)):
        write_gguf(tmp_path / "b.gguf", tensors={**values, "rope_freqs.weight": wrong.astype(np.float32)}, keys=keys)
        with pytest.raises(ValueError, match="rope_freqs.weight does not hold"):
            open_checkpoint(tmp_path / "b.gguf")


CONFIG_LIES = {
    "other architecture": ({}, "gptneox", "architecture 'gptneox' is not supported; supported are llama, qwen2, qwen3"),
    "no layers": ({"block_count": None}, "llama", "llama.block_count is missing"),
    "heads by layer": ({"attention.head_count": [4, 4]}, "llama", r"head_count is \[4, 4\], expected one positive int"),
    "heads zero": ({"attention.head_count": 0}, "llama", "expected one positive int"),
    "epsilon not finite": ({"attention.layer_norm_rms_epsilon": float("nan")}, "llama", "is nan, expected one positive float"),
    "partial rotary": ({"rope.dimension_count": HEAD // 2}, "llama", "rope.dimension_count is 4, only the head size 8"),
    "value heads of another size": ({"attention.value_length": 16}, "qwen2", "value_length is 16"),
    "experts": ({"expert_count": 8}, "llama", "mixture of experts"),
    "heads that do not fit": ({"attention.head_count": 5, "attention.key_length": 8}, "llama", "no whole pairs of 5 heads"),
}


@pytest.mark.parametrize("case", CONFIG_LIES)
def test_config_lies(case, tmp_path):
    keys, arch, message = CONFIG_LIES[case]
    write_gguf(tmp_path / "a.gguf", arch, keys=keys)
    with pytest.raises(ValueError, match=f"a.gguf: .*{message}"):
        open_checkpoint(tmp_path / "a.gguf")


def test_rope_scaling_is_passed_on_by_name(tmp_path):
    write_gguf(tmp_path / "a.gguf", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0})
    assert open_checkpoint(tmp_path / "a.gguf").config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_tensors_that_do_not_belong(tmp_path):
    for name, message in [("blk.0.ffn_gate_exps.weight", "no supported model family"), ("mm.0.weight", "no supported model family")]:
        values = {key: np.zeros(shape, np.float32) for key, shape in shapes("llama").items()}
        write_gguf(tmp_path / "a.gguf", tensors={**values, name: np.zeros((2, 2), np.float32)})
        with pytest.raises(ValueError, match=f"'{name}'.*{message}"):
            open_checkpoint(tmp_path / "a.gguf")


def read_all(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        for name, info in checkpoint.tensors.items():
            array = checkpoint.read(name)
            assert (array.shape, array.nbytes) == (info.shape, info.nbytes)


def test_truncated_or_mutated_files_are_refused_or_read(tmp_path):
    """Only a ValueError or OSError that names the file may come, quickly; a count of 2**60 elements must not be counted to."""
    path = tmp_path / "a.gguf"
    write_gguf(path, keys={"/tokenizer.ggml.tokens": ["a", "b", "c"], "/tokenizer.ggml.token_type": [1, 2, 3]})
    original = path.read_bytes()
    header_end = original.index(b"output_norm.weight") + 3000
    rng = random.Random(8)
    cases = [original[:length] for length in [*range(0, 64), *range(64, len(original), 997)]]
    for _ in range(600):
        content = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(header_end)
            size = rng.choice([1, 1, 4, 8])
            content[at : at + size] = rng.choice([bytes(size), b"\xff" * size, bytes(rng.randrange(256) for _ in range(size))])
        cases.append(bytes(content))
    refused = 0
    for content in cases:
        path.write_bytes(content)
        try:
            read_all(path)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(path) in str(error)
    assert 300 < refused < len(cases)


def test_counts_that_would_take_hours(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, keys={"/general.tags": ["x"], "/tokenizer.ggml.token_type": [1, 2, 3]})
    content = path.read_bytes()
    for key in (b"general.tags", b"tokenizer.ggml.token_type"):
        at = content.index(key) + len(key) + 8
        path.write_bytes(content[:at] + (2**62).to_bytes(8, "little") + content[at + 8 :])
        with pytest.raises(ValueError, match="not a readable GGUF file"):
            open_checkpoint(path)


def test_not_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="a.gguf: not a readable GGUF file"):
        open_checkpoint(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ValueError, match="a.gguf: not a readable GGUF file.*magic"):
        open_checkpoint(tmp_path / "a.gguf")
