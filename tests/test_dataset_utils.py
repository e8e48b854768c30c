"""Calibration data: sources, tokenizers of each kind, padding, packing, and what bad input says."""
import json
import sys
import types

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from modelq.utils import dataset_utils, texts
from modelq.utils.dataset_utils import create_forward_loop, get_dataset_dataloader, get_dataset_samples, get_supported_datasets

WORDS = ["<unk>", "<pad>", "</s>", "alpha", "beta", "gamma", "delta"]


def word_tokenizer(**padding):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if padding:
        tokenizer.enable_padding(**padding)
    return tokenizer


class HuggingFaceLike:
    """The part of a transformers tokenizer that is used: called with texts, padding_side, pad_token_id, a chat template."""

    def __init__(self, side="left", pad=1):
        self.padding_side, self.pad_token_id, self.eos_token_id, self.chat_template = side, pad, 2, "yes"

    def __call__(self, texts, add_special_tokens=True, padding=False, truncation=False, max_length=None):
        rows = [[WORDS.index(word) if word in WORDS else 0 for word in text.split()] for text in texts]
        return {"input_ids": [row[:max_length] if truncation else row for row in rows]}

    def apply_chat_template(self, turns, tokenize, tools=None):
        assert tokenize is False
        return " ".join(f"{turn['role']}: {turn['content']}" for turn in turns) + (f" tools {tools}" if tools else "")


@pytest.fixture
def lines(tmp_path):
    """A .jsonl file of three documents of 4, 2 and 6 words."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in
                            ("alpha beta gamma delta", "beta beta", "delta delta delta gamma gamma gamma")))
    return str(path)


def test_python_docs_is_there_ordered_and_held_out():
    docs = get_dataset_samples("python_docs", 1000)
    held_out = get_dataset_samples("python_docs_heldout", 1000)
    assert len(docs) >= 128 and docs == get_dataset_samples("python_docs", 1000)
    assert docs[:5] == get_dataset_samples("python_docs", 5)
    assert all(2000 < len(doc) < 4200 for doc in docs[:-1])
    assert not set(docs) & set(held_out)
    whole = texts.python_docs_text() + texts.python_docs_text(held_out=True)
    assert "".join("".join(docs + held_out).split()) == "".join(whole.split())   # nothing lost, nothing twice


def test_documents_grow_with_the_sample_length():
    assert len(get_dataset_samples("python_docs", 1, max_sample_length=2048)[0]) > 10000


def test_long_words_are_cut_too():
    assert list(texts.split_documents("a" * 25, 10)) == ["a" * 10, "a" * 10, "a" * 5]
    assert list(texts.split_documents("  \n\n ", 10)) == []


@pytest.mark.parametrize("tokenizer", [HuggingFaceLike("right"), word_tokenizer(pad_id=1), word_tokenizer()],
                         ids=["hugging-face", "tokenizers-padding", "tokenizers-vocabulary"])
def test_padding_right(lines, tokenizer):
    loader = get_dataset_dataloader(lines, tokenizer, batch_size=2, num_samples=3, max_sample_length=5)
    first, second = list(loader)
    assert len(loader) == 2 and list(loader)[0]["input_ids"].tolist() == first["input_ids"].tolist()   # iterable again
    assert first["input_ids"].dtype == np.int64 and set(first) == {"input_ids", "attention_mask"}
    assert first["input_ids"].tolist() == [[3, 4, 5, 6, 1], [4, 4, 1, 1, 1]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert second["input_ids"].tolist() == [[6, 6, 6, 5, 5]]   # six words cut to five; the last batch is short


@pytest.mark.parametrize("tokenizer", [HuggingFaceLike("left"), word_tokenizer(pad_id=1, direction="left")])
def test_padding_left_and_labels(lines, tokenizer):
    batch, = get_dataset_dataloader(lines, tokenizer, batch_size=4, num_samples=3, max_sample_length=5, include_labels=True)
    assert batch["input_ids"].tolist() == [[1, 3, 4, 5, 6], [1, 1, 1, 4, 4], [6, 6, 6, 5, 5]]
    assert batch["labels"].tolist() == [[-100, 3, 4, 5, 6], [-100, -100, -100, 4, 4], [6, 6, 6, 5, 5]]


def test_modelqs_own_tokenizer(lines):
    from modelq.checkpoint.tokenizer import Tokenizer as Own

    own = Own(word_tokenizer(), {"pad_token": "<pad>", "eos_token": "</s>"})
    own.padding_side = "left"
    batch, = get_dataset_dataloader(lines, own, batch_size=3, num_samples=3, max_sample_length=5, device="cpu")
    assert batch["input_ids"].tolist() == [[1, 3, 4, 5, 6], [1, 1, 1, 4, 4], [6, 6, 6, 5, 5]]
    assert batch["input_ids"].tolist() == own(get_dataset_samples(lines, 3), padding=True, truncation=True, max_length=5).input_ids.tolist()
    packed = get_dataset_dataloader(lines, own, num_samples=2, max_sample_length=5, pack=True)
    assert packed.columns["input_ids"].tolist() == [[3, 4, 5, 6, 2], [4, 4, 2, 6, 6]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_real_hugging_face_tokenizer(lines, side):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), pad_token="<pad>", eos_token="</s>",
                                                     padding_side=side)
    expected = tokenizer(get_dataset_samples(lines, 3), padding=True, truncation=True, max_length=5)
    loader = get_dataset_dataloader(lines, tokenizer, num_samples=3, max_sample_length=5)
    assert loader.columns["input_ids"].tolist() == expected["input_ids"]
    assert loader.columns["attention_mask"].tolist() == expected["attention_mask"]
    assert tokenizer.backend_tokenizer.padding is not None   # as the call above left it: ours worked on a copy
    packed = get_dataset_dataloader(lines, tokenizer, num_samples=2, max_sample_length=5, pack=True)
    assert packed.columns["input_ids"].tolist() == [[3, 4, 5, 6, 2], [4, 4, 2, 6, 6]]


def test_the_tokenizer_keeps_its_settings(lines):
    tokenizer = word_tokenizer(pad_id=1, length=9)
    tokenizer.enable_truncation(3)
    before = tokenizer.to_str()
    get_dataset_dataloader(lines, tokenizer, num_samples=3, max_sample_length=5)
    assert tokenizer.to_str() == before


def test_pack_joins_by_eos_and_pads_the_last_row(lines):
    with pytest.warns(UserWarning, match="2 were asked for|3 were asked for"):
        batch, = get_dataset_dataloader(lines, HuggingFaceLike(), batch_size=8, num_samples=3, max_sample_length=8, pack=True)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 2, 4, 4, 2], [6, 6, 6, 5, 5, 5, 2, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 7 + [0]]


def test_pack_stops_when_it_has_enough():
    loader = get_dataset_dataloader("python_docs", word_tokenizer(), num_samples=3, max_sample_length=64, pack=True)
    assert loader.columns["input_ids"].shape == (3, 64) and loader.columns["attention_mask"].all()


def test_several_sources_follow_each_other(lines, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("gamma")
    loader = get_dataset_dataloader([lines, str(plain)], word_tokenizer(), num_samples=[1, 1], batch_size=2)
    assert next(iter(loader))["input_ids"].tolist() == [[3, 4, 5, 6], [5, 1, 1, 1]]
    with pytest.raises(ValueError, match="same length"):
        get_dataset_dataloader([lines, str(plain)], word_tokenizer(), num_samples=[1])


def test_distributed_shares_are_disjoint_and_whole(lines):
    shares = [get_dataset_dataloader(lines, word_tokenizer(), num_samples=3, distributed=True,
                                     sampler_kwargs={"num_replicas": 2, "rank": rank}).columns["input_ids"] for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 1]
    with pytest.raises(ValueError, match="num_replicas"):
        get_dataset_dataloader(lines, word_tokenizer(), num_samples=3, distributed=True)


def test_combos_share_their_count():
    sources = dataset_utils._sources(["nemotron-post-training-v3", "python_docs"], [10, 4])
    assert [count for _, count in sources] == [2, 2, 2, 1, 1, 1, 1, 4]
    with pytest.raises(ValueError, match="also asked for by itself"):
        dataset_utils._sources(["cnn_dailymail", "cnn_nemotron_v2_mix"], [1, 1])
    with pytest.raises(ValueError, match="stands for several"):
        get_dataset_samples("cnn_nemotron_v2_mix", 4)


@pytest.mark.parametrize("record, expected", [
    ({"prompt": "p", "completion": "c", "text": "t"}, "p\nc"),
    ({"prompt": "p", "response": "r", "output": "o"}, "p\nr\no"),
    ({"text": "t", "input": "i"}, "t"),
    ({"input": "i", "output": "o"}, "i\no"),
    ({"messages": None, "text": "t"}, "t"),
    ({"messages": [{"role": "user", "content": "hi"}], "text": "t", "tools": "T"}, "user: hi tools T"),
])
def test_columns_of_unknown_data(tmp_path, record, expected):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record))
    assert get_dataset_samples(str(path), 5, tokenizer=HuggingFaceLike()) == [expected]


@pytest.mark.parametrize("content, message", [
    (b'{"text": "a"}\n\n{"text": ', "line 3: not valid JSON"),
    (b'{"text": "a"}\n[1]\n', "line 2: expected a JSON object, got list"),
    (b'{"body": "a"}\n', r"line 1: no column .*there is \['body'\]"),
    (b'{"text": 7}\n', "line 1: 'text' is int"),
    (b'{"text": "\xff"}\n', "line 1: not valid JSON"),
    (b'{"messages": [{"role": "user", "content": "x"}]}\n', "line 1: .*no chat template"),
    (b'\n', "no calibration data"),
])
def test_bad_jsonl_names_the_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        get_dataset_dataloader(str(path), word_tokenizer(), num_samples=5)


def test_bad_sources_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="python_docs, .*cnn_dailymail"):
        get_dataset_samples("cnn_dailymial", 1)
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        get_dataset_samples(str(tmp_path / "nowhere.txt"), 1)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        get_dataset_samples("python_docs", -1)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="latin.txt: not UTF-8 text .byte 3"):
        get_dataset_samples(str(tmp_path / "latin.txt"), 1)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no calibration data: .*empty.txt"):
        get_dataset_dataloader(str(tmp_path / "empty.txt"), word_tokenizer(), num_samples=1)


def test_tokenizer_errors(lines):
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        get_dataset_dataloader(lines)
    with pytest.raises(TypeError, match="got str"):
        get_dataset_dataloader(lines, "bert", num_samples=1)
    with pytest.raises(ValueError, match="no pad token"):
        get_dataset_dataloader(lines, HuggingFaceLike(pad=None), num_samples=3)
    bare = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="no token of any text"):
        bare.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
        get_dataset_dataloader(lines, type("Empty", (HuggingFaceLike,), {"__call__": lambda self, texts, **k: {
            "input_ids": [[] for _ in texts]}})(), num_samples=1)


def test_fewer_samples_than_asked_warns(lines):
    with pytest.warns(UserWarning, match="has only 3 samples, 9 were asked for"):
        assert get_dataset_dataloader(lines, word_tokenizer(), num_samples=9).num_samples == 3


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library that records what it is asked for."""
    asked = []

    def load_dataset(path, split, streaming, **options):
        asked.append((path, split, options))
        assert streaming
        columns = {"nvidia/Llama-Nemotron-Post-Training-Dataset": {"input": [{"content": "q"}], "output": "a"},
                   "nvidia/Nemotron-SFT-Agentic-v2": {"messages": [{"role": "user", "content": "do"}]},
                   "abisee/cnn_dailymail": {"article": "news"}}.get(path, {"text": "other"})
        return iter([columns] * 50)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_hub_names_splits_and_columns(hub):
    assert get_dataset_samples("cnn_dailymail", 3) == ["news"] * 3
    assert hub == [("abisee/cnn_dailymail", "train", {"name": "3.0.0"})]
    hub.clear()
    assert get_dataset_samples("llama-nemotron-post-training-dataset", 12) == ["q\na"] * 12
    assert [split for _, split, _ in hub] == ["code", "math", "science", "chat", "safety"]
    hub.clear()
    assert get_dataset_samples("nemotron-sft-agentic-v2", 2, apply_chat_template=True, tokenizer=HuggingFaceLike()) == ["user: do"] * 2
    assert hub == [("nvidia/Nemotron-SFT-Agentic-v2", "train", {"data_files": "data/search*.jsonl"})]
    assert get_dataset_samples("someone/something", 2, split="test") == ["other"] * 2


def test_a_local_folder_with_a_registered_name(hub, tmp_path):
    folder = tmp_path / "cnn_dailymail"
    folder.mkdir()
    with pytest.raises(KeyError):   # the registered layout is expected, and this stand-in has another
        get_dataset_samples(str(folder), 1)
    assert hub[0][0] == str(folder)


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'modelq\[hub\]'.*python_docs"):
        get_dataset_samples("cnn_dailymail", 1)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"x.parquet.*pip install 'modelq\[hub\]'"):
        get_dataset_samples(str(tmp_path / "x.parquet"), 1)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "three"], "prompt": [None, "two", None]}), path)
    assert get_dataset_samples(str(path), 5) == ["one", "two", "three"]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="x.parquet: not a valid parquet file"):
        get_dataset_samples(str(path), 5)


def test_forward_loop_calls_the_model_with_each_batch(lines):
    calls = []

    class Model:
        tokenizer = word_tokenizer()

        def __call__(self, input_ids, attention_mask=None):
            calls.append((np.asarray(input_ids).shape, None if attention_mask is None else int(attention_mask.sum())))

    create_forward_loop(Model(), lines, num_samples=3, batch_size=2)(Model())   # the tokenizer is the model's
    assert calls == [((2, 6), 6), ((1, 6), 6)]
    calls.clear()
    create_forward_loop(dataloader=[{"input_ids": np.zeros((1, 3), int)}, np.zeros((2, 5), int)])(Model())
    assert calls == [((1, 3), None), ((2, 5), None)]


def test_supported_datasets_lists_all_kinds():
    assert {"python_docs", "cnn_dailymail", "nemotron-post-training-v3"} <= set(get_supported_datasets())


def test_the_largest_batch(monkeypatch, tiny_checkpoint):
    import modelq
    from modelq.utils import batch_size

    model = modelq.load(tiny_checkpoint)
    assert 1 <= batch_size.get_max_batch_size(model) <= 512
    found = []
    for free in (1 << 20, 1 << 24, 1 << 28, 1 << 40):
        monkeypatch.setattr(batch_size, "_free_bytes", lambda model: free)
        found.append(batch_size.get_max_batch_size(model, max_sample_length=64))
    assert found == sorted(found) and found[0] < found[1] and found[-1] == 512 and all(size & (size - 1) == 0 for size in found)
    monkeypatch.setattr(batch_size, "_free_bytes", lambda model: 1 << 24)
    assert batch_size.get_max_batch_size(model, max_sample_length=64, sample_memory_usage_ratio=4.0) == found[1] // 4
    with pytest.raises(ValueError, match="without config.hidden_size"):
        batch_size.get_max_batch_size(object())
