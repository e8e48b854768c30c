"""Checkpoint folders: opening, the index and its lies, side files, the tokenizer."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from modelq.checkpoint import open_checkpoint
from modelq.checkpoint.tokenizer import Tokenizer

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, an index, a config and side files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), ml_dtypes.bfloat16)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": np.arange(4, dtype=np.int8)}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, {"a": 1, "b": 1, "c": 2})
    (folder / "generation_config.json").write_text("{}")
    (folder / "modeling_custom.py").write_text("x = 1\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    (folder / "README.md").write_text("no")
    return folder


def write_index(folder: Path, weight_map: dict) -> None:
    names = {k: f"model-{v:05}-of-00002.safetensors" if isinstance(v, int) else v for k, v in weight_map.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": names}))


def test_sharded_folder(folder):
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == CONFIG and checkpoint.path == folder
        assert list(checkpoint.tensors) == ["a", "b", "c"] and "3 tensors" in repr(checkpoint)
        assert checkpoint.tensors["b"].dtype == "bfloat16" and checkpoint.tensors["c"].file.name.startswith("model-00002")
        assert np.array_equal(checkpoint.read("c"), np.arange(4)) and checkpoint.read("b").dtype == ml_dtypes.bfloat16
        checkpoint.release(["a", "c"])
        checkpoint.release()
        with pytest.raises(KeyError, match="no tensor 'd'"):
            checkpoint.read("d")
        with pytest.raises(TypeError):
            checkpoint.tensors["a"] = None  # type: ignore[index]
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("a")


def test_side_files_are_what_an_export_copies(folder, tmp_path):
    checkpoint = open_checkpoint(str(folder))
    names = [str(file.relative_to(folder)) for file in checkpoint.side_files]
    assert names == ["additional_chat_templates/rag.jinja", "chat_template.jinja", "generation_config.json", "modeling_custom.py"]
    target = tmp_path / "target"
    target.mkdir()
    written = checkpoint.save_tokenizer(target)
    assert sorted(str(file.relative_to(target)) for file in written) == names
    assert (target / "modeling_custom.py").read_text() == "x = 1\n"


def test_single_file_with_or_without_the_usual_name(folder, tmp_path):
    for file in folder.glob("model*"):
        if file.suffix != ".py":
            file.unlink()
    save_file({"w": np.zeros(3, np.float32)}, folder / "weights.safetensors")
    assert list(open_checkpoint(folder).tensors) == ["w"]
    save_file({"v": np.zeros(3, np.float32)}, folder / "model.safetensors")
    assert list(open_checkpoint(folder).tensors) == ["v"]
    assert list(open_checkpoint(folder / "weights.safetensors").tensors) == ["w"]


def test_the_hubs_cache_of_links_opens(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate(path for path in folder.iterdir() if path.is_file()):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    assert list(open_checkpoint(snapshot).tensors) == ["a", "b", "c"]


INDEX_LIES = {
    "outside": ({"a": "../model.safetensors"}, "outside the folder"),
    "outside by a detour": ({"a": "x/../../model.safetensors"}, "outside"),
    "absolute": ({"a": "/etc/model.safetensors"}, "outside"),
    "backslash": ({"a": "..\\model.safetensors"}, "no .safetensors file name"),
    "NUL": ({"a": "model\0.safetensors"}, "no .safetensors file name"),
    "not safetensors": ({"a": "config.json"}, "no .safetensors file name"),
    "a number": ({"a": None}, "no .safetensors file name"),
    "empty": ({}, "no weight_map"),
    "missing shard": ({"a": 1, "b": 1, "c": "model-3.safetensors"}, "shard is missing"),
    "tensor not there": ({"a": 1, "b": 1, "c": 2, "d": 2}, "00002-of-00002.safetensors: no tensor 'd'"),
    "tensor in the other shard": ({"a": 2, "b": 1, "c": 2}, "'a' is in model-00002.* but it is in model-00001"),
}


@pytest.mark.parametrize("case", INDEX_LIES)
def test_index_lies(case, folder):
    weight_map, message = INDEX_LIES[case]
    (folder.parent / "model.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    write_index(folder, weight_map)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"weight_map": 3}', b"[" * 100_000, b'{"weight_map":{"a":"x","a":"y"}}'])
def test_broken_index(content, folder):
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match="index.json: "):
        open_checkpoint(folder)


def test_same_tensor_in_two_shards(folder):
    save_file({"c": np.zeros(2, np.float32), "a": np.zeros(2, np.float32)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="'a' is in model-00001-of-00002.safetensors too"):
        open_checkpoint(folder)


def test_truncated_shard_names_the_shard(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors: the file is cut short.*download"):
        open_checkpoint(folder)


def test_what_is_no_checkpoint(folder, tmp_path):
    for bad, message in [
        (tmp_path / "none", "no such checkpoint"), ("/no/such/model", "no such checkpoint"), (str(tmp_path / "a b"), "no such checkpoint"),
    ]:  # fmt: skip
        with pytest.raises(FileNotFoundError, match=message):
            open_checkpoint(bad)
    with pytest.raises(ValueError, match="give the checkpoint's folder"):
        open_checkpoint(folder / "config.json")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json: the model's config must be a JSON object"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        open_checkpoint(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is this a checkpoint folder"):
        open_checkpoint(empty)
    (empty / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="only pickled weights"):
        open_checkpoint(empty)
    for name in "ab":
        save_file({"a": np.zeros(1)}, empty / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="2 .safetensors files but no index"):
        open_checkpoint(empty)


def test_hub_ids(folder, monkeypatch, tmp_path):
    import huggingface_hub

    calls = []

    def fake_download(repo_id, **kwargs):
        calls.append((repo_id, kwargs["revision"]))
        if repo_id == "org/gone":
            raise huggingface_hub.errors.OfflineModeIsEnabled("offline")
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    assert list(open_checkpoint("org/name-1.5_x", revision="v2").tensors) == ["a", "b", "c"]
    assert calls == [("org/name-1.5_x", "v2")]
    with pytest.raises(FileNotFoundError, match="org/gone at revision v3: no such local path.*offline"):
        open_checkpoint("org/gone", revision="v3")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install modelq\[hub\]"):
        open_checkpoint("org/name")


def test_importing_is_light():
    code = (
        "import sys, modelq.checkpoint, modelq.checkpoint.folder, modelq.checkpoint.tokenizer\n"
        "heavy = {'tokenizers', 'gguf', 'ml_dtypes', 'huggingface_hub', 'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# ---- the tokenizer ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """A word-level tokenizer that puts <s> in front and </s> at the end."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    backend.enable_truncation(2)  # settings in the file must not matter
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**special, "model_max_length": 1e30, "chat_template": "T"}))
    return Tokenizer.from_folder(tmp_path)


def test_tokenizer_call(tokenizer):
    assert tokenizer.encode("a b x") == [1, 4, 5, 3, 2] and tokenizer.encode("a b", add_special_tokens=False) == [4, 5]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, None, 3)
    assert tokenizer.vocab_size == len(tokenizer) == 8 and tokenizer.chat_template == "T" and tokenizer.model_max_length is None
    one = tokenizer("a b")
    assert one["input_ids"].dtype == np.int64 and one.input_ids.tolist() == [[1, 4, 5, 2]] and one.attention_mask.tolist() == [[1] * 4]
    with pytest.raises(ValueError, match="pad_token = tokenizer.eos_token"):
        tokenizer(["a", "a b"], padding=True)
    tokenizer.pad_token = "<pad>"
    two = tokenizer(["a", "a b c"], padding=True)
    assert two.input_ids.tolist() == [[1, 4, 2, 0, 0], [1, 4, 5, 6, 2]] and two.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    tokenizer.padding_side = "left"
    assert tokenizer(["a", "a b c"], padding="longest").input_ids.tolist() == [[0, 0, 1, 4, 2], [1, 4, 5, 6, 2]]
    cut = tokenizer(["a", "a b c d"], padding="max_length", truncation=True, max_length=4)
    assert cut.input_ids.tolist() == [[0, 1, 4, 2], [1, 4, 5, 2]]
    assert tokenizer("a b c d", truncation=True, max_length=3, add_special_tokens=False).input_ids.tolist() == [[4, 5, 6]]
    assert tokenizer("a b c d", truncation=True, max_length=1).input_ids.tolist() == [[1, 2]]
    assert tokenizer(["a", "a b"], return_tensors=None) == {"input_ids": [[1, 4, 2], [1, 4, 5, 2]], "attention_mask": [[1] * 3, [1] * 4]}
    assert tokenizer("a", return_tensors=None)["input_ids"] == [1, 4, 2]
    assert tokenizer([]).input_ids.shape == (0, 0) and tokenizer("", add_special_tokens=False).input_ids.shape == (1, 0)
    assert tokenizer.decode(np.array([1, 4, 5])) == "<s> a b" and tokenizer.decode([1, 4], skip_special_tokens=True) == "a"
    assert tokenizer.batch_decode([[4], [5, 6]]) == ["a", "b c"]
    for arguments in ({"return_tensors": "pt"}, {"padding": "all"}, {"padding": "max_length"}):
        with pytest.raises(ValueError, match="|".join(arguments)):
            tokenizer("a", **arguments)
    with pytest.raises(ValueError, match="different numbers of tokens"):
        tokenizer(["a", "a b"])
    with pytest.raises(AttributeError):
        one.labels


def test_tokenizer_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json; pass a tokenizer of your own"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
