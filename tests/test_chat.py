"""Chat templates as transformers renders them, and the commands that talk: modelq chat and modelq compare."""
import io
import json
import shutil

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from modelq import cli
from modelq.chat_commands import side_by_side
from modelq.checkpoint.chat_template import render
from modelq.conversation import Answer, Conversation, distance, first_difference, whole_answer
from modelq.export import export_hf_checkpoint

MESSAGES = [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "Grüße?\n"},
            {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "And now?"}]
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = {
    "chatml": CHATML,
    "blocks": "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'system' %}\n    [{{ m.content | trim }}]\n    {% endif %}\n"
              "    {% if loop.index > 2 %}\n        {% break %}\n    {% endif %}\n{% endfor %}\n{{ eos_token }}{{ unknown }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}"
                  "{% else %}{{ m.role.upper() }}: {{ m.content.split('\\n')[0] }}{% endif %}|{% endfor %}",
    "tools": "{% set ns = namespace(n=0) %}{% for t in tools %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ t | tojson(indent=2) }}{% endfor %}"
             "{{ messages | tojson }}{{ strftime_now('%Y') | length }}{{ messages[1:] | length }}",
}
TOOLS = [{"type": "function", "function": {"name": "<look>", "parameters": {"ü": None}}}]


# ---- templates ----

@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name, add_generation_prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {"bos_token": "<s>", "eos_token": "</s>", "tools": TOOLS}
    texts, _ = render_jinja_template([MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=add_generation_prompt, **variables)
    assert render(TEMPLATES[name], MESSAGES, add_generation_prompt=add_generation_prompt, **variables) == texts[0] != ""


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{% if %}", "end of print|got '%}'|Expected"),
    ("{{ 'a' + 1 }}", "can only concatenate"), ("{{ messages.__class__.__mro__ }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe"),
    ("{{ ().__class__.__base__.__subclasses__() }}", "unsafe"),
])
def test_what_a_template_refuses_or_may_not_do(template, words):
    with pytest.raises(ValueError, match=f"the chat template: .*({words})"):
        render(template, MESSAGES)
    assert len(MESSAGES) == 4


@pytest.mark.parametrize("messages", ["hello", ["hello"], [{"content": "no role"}], [{"role": 1}]])
def test_messages_are_dictionaries(messages):
    with pytest.raises(ValueError, match=r"conversation\[0\]: expected a dictionary with a role"):
        render(CHATML, messages)


def folder_with(tiny_checkpoint, folder, template=None, **settings):
    shutil.copytree(tiny_checkpoint, folder, copy_function=shutil.copyfile)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def chatty(tiny_checkpoint, tmp_path_factory):
    return folder_with(tiny_checkpoint, tmp_path_factory.mktemp("chat") / "model", CHATML)


def test_where_templates_are_found(tiny_checkpoint, tmp_path, chatty):
    conversation = MESSAGES[1:2]
    wanted = modelq.load(chatty).tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert wanted == "<|user|>Grüße?\n\n<|assistant|>"
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "no"}]
    for name, template in (("text", CHATML), ("named", named)):
        tokenizer = modelq.load(folder_with(tiny_checkpoint, tmp_path / name, chat_template=template)).tokenizer
        assert tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False) == wanted
    encoded = tokenizer.apply_chat_template(conversation)
    assert encoded.input_ids.tolist() == [tokenizer.encode("<|user|>Grüße?\n\n")] and encoded.attention_mask.all()
    special = folder_with(tiny_checkpoint, tmp_path / "special", "{{ eos_token }}{{ bos_token }}{{ style }}", eos_token={"content": "!"})
    tokenizer = modelq.load(special).tokenizer
    assert tokenizer.apply_chat_template([], tokenize=False, style="x") == "!x"


def test_the_template_of_a_gguf_file(smollm2):
    tokenizer = modelq.load(smollm2).tokenizer
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    encoded = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert encoded["input_ids"][0, 0] == tokenizer.token_to_id("<|im_start|>") and tokenizer.decode(encoded["input_ids"][0]) == text


def test_no_template(tiny_checkpoint, capsys):
    with pytest.raises(ValueError, match="no chat template.*chat_template.jinja"):
        modelq.load(tiny_checkpoint).tokenizer.apply_chat_template(MESSAGES)
    code, out, err = call(capsys, "chat", tiny_checkpoint, "--prompt", "Hi")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "no chat template" in err and "--plain" in err


# ---- conversations ----

def test_a_conversation_goes_on(chatty):
    model = modelq.load(chatty, compute="float32")
    chat = Conversation(model, "Be brief.", max_new_tokens=12)
    texts = []
    for question in ("One?", "Two?"):
        *pieces, last = chat.ask(question)
        assert isinstance(last, Answer) and "".join(pieces) == last.text and 0 < last.prompt_seconds <= last.seconds
        texts.append(last.text)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in chat.messages] == ["Be brief.", "One?", texts[0], "Two?", texts[1]]
    prompt = model.tokenizer.apply_chat_template(chat.messages[:4], add_generation_prompt=True)["input_ids"]
    assert last.prompt_tokens == prompt.shape[1]
    alone = modelq.load(chatty, compute="float32").generate(prompt, max_new_tokens=12)[0, prompt.shape[1]:]
    assert last.tokens == alone.tolist()
    with pytest.raises(ValueError, match="leaves no room"):
        list(chat.ask("x" * 3000))
    assert len(chat.messages) == 5


def test_what_ends_an_answer_is_no_part_of_its_text(tiny_checkpoint, tmp_path, chatty):
    free = whole_answer(modelq.load(chatty, compute="float32"), [72, 73], max_new_tokens=10)
    end = free.tokens[5]
    folder = folder_with(tiny_checkpoint, tmp_path / "ends")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    model = modelq.load(folder, compute="float32")
    found = whole_answer(model, [72, 73], max_new_tokens=10)
    assert found.tokens == free.tokens[:free.tokens.index(end) + 1] and found.text == model.tokenizer.decode(found.tokens[:-1])


# ---- two models ----

def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None and first_difference([1, 2], [1, 2, 3]) == 2 and first_difference([1, 9], [1, 2]) == 1


def test_distance(golden):
    ids = golden["llama"].calib
    first, second = (modelq.load(golden["llama"].source, compute="float32") for _ in range(2))
    prompt, tokens = ids[0, :10].tolist(), ids[1].tolist() * 2      # more than are computed at a time
    same = distance(first, second, prompt, tokens)
    assert same.divergence == same.largest_divergence == 0 and same.agreement == 1
    with pytest.raises(ValueError, match="a second time"):
        distance(first, first, prompt, tokens)
    mtq.quantize(second, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, lambda model: model(ids))
    logits = [np.asarray(model([prompt + tokens]).logits)[0, 9:-1].astype(np.float64) for model in (first, second)]
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    each = (p * np.log(p / q)).sum(-1)
    found = distance(first, second, prompt, tokens)
    assert found.positions == len(tokens) == 128
    assert found.divergence == pytest.approx(each.mean(), rel=1e-3) and found.largest_divergence == pytest.approx(each.max(), rel=1e-3)
    assert found.agreement == (p.argmax(-1) == q.argmax(-1)).mean() < 1
    assert found.divergence > 1e-4


def test_distance_of_other_vocabularies(golden):
    from pathlib import Path

    other = modelq.load(Path(__file__).parent / "data" / "families" / "qwen2")
    with pytest.raises(ValueError, match="vocabularies of 256 and 64"):
        distance(modelq.load(golden["llama"].source), other, [1], [2])


# ---- the commands ----

def call(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


def test_chat_answers_one_prompt(capsys, chatty):
    model = modelq.load(chatty, compute="float32")
    wanted = next(part for part in Conversation(model, max_new_tokens=9).ask("Hi") if isinstance(part, Answer)).text
    arguments = ["chat", chatty, "--prompt", "Hi", "--compute", "float32", "--max-new-tokens", 9]
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (0, wanted + "\n") and "9 tokens, " in err and "tokens/s" in err
    data = json.loads(call(capsys, *arguments, "--json")[1])
    assert data["answers"][0]["text"] == wanted and data["answers"][0]["tokens"] == 9 and data["answers"][0]["tokens_per_second"] > 0
    drawn = [call(capsys, *arguments, "--temperature", 2, "--top-p", 0.9, "--top-k", 50, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    system = call(capsys, *arguments, "--system", "Something that makes a difference")[1]
    assert system != out != call(capsys, *arguments, "--plain")[1]


def test_chat_answers_the_lines_of_stdin(capsys, monkeypatch, chatty):
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\n\n  \nTwo?"))
    code, out, _ = call(capsys, "chat", chatty, "--compute", "float32", "--max-new-tokens", 7, "--json")
    chat = Conversation(modelq.load(chatty, compute="float32"), max_new_tokens=7)
    wanted = [(question, [part for part in chat.ask(question)][-1].text) for question in ("One?", "Two?")]
    assert code == 0 and [(answer["prompt"], answer["text"]) for answer in json.loads(out)["answers"]] == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert call(capsys, "chat", chatty) == (0, "", "")
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 3000))
    code, out, err = call(capsys, "chat", chatty)
    assert (code, out) == (2, "") and "context of 2048" in err


def test_chat_on_a_terminal_goes_on_after_a_question_that_failed(capsys, monkeypatch, chatty):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    ask = Conversation.ask

    def interrupted(self, text):
        if text == "Stop!":
            raise KeyboardInterrupt
        return ask(self, text)
    monkeypatch.setattr(Conversation, "ask", interrupted)
    monkeypatch.setattr("sys.stdin", Terminal("x" * 3000 + "\nStop!\nHi\n"))
    code, out, err = call(capsys, "chat", chatty, "--max-new-tokens", 3)
    assert code == 0 and out.startswith("> > > ") and "context of 2048" in err and "interrupted" in err and "3 tokens" in err
    assert call(capsys, "chat", chatty, "--prompt", "Stop!")[0] == 130


@pytest.fixture(scope="module")
def quantized(chatty, golden, tmp_path_factory):
    model, folder = modelq.load(chatty), tmp_path_factory.mktemp("export") / "nvfp4"
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: model(golden["llama"].calib))
    return export_hf_checkpoint(model, folder) or folder


def test_compare(capsys, chatty, quantized):
    arguments = ["compare", chatty, quantized, "--prompt", "Hello there", "--max-new-tokens", 40]
    code, out, _ = call(capsys, *arguments)
    assert code == 0 and "  |  " in out and "tokens/s" in out and "KL divergence" in out and "of 40 places" in out
    data = json.loads(call(capsys, *arguments, "--json")[1])
    assert [row["source"] for row in data["models"]] == [str(chatty), str(quantized)] and data["positions"] == 40
    assert data["kl_divergence"] > 1e-4 and 0 < data["top1_agreement"] < 1 and data["models"][0]["tokens_per_second"] > 0
    texts = [call(capsys, "chat", folder, *arguments[3:], "--json")[1] for folder in (chatty, quantized)]
    assert [row["text"] for row in data["models"]] == [json.loads(text)["answers"][0]["text"] for text in texts]
    assert f"first difference at token {data['first_difference'] + 1}: " in out
    same = json.loads(call(capsys, "compare", chatty, chatty, *arguments[3:], "--json")[1])
    assert (same["first_difference"], same["kl_divergence"], same["top1_agreement"]) == (None, 0, 1)
    assert "the same tokens" in call(capsys, "compare", chatty, chatty, *arguments[3:])[1]


def test_compare_needs_one_tokenizer(capsys, tiny_checkpoint, tmp_path, chatty):
    other = folder_with(tiny_checkpoint, tmp_path / "other", "{{ messages[0].content }}")
    code, out, err = call(capsys, "compare", chatty, other, "--prompt", "Hi")
    assert (code, out) == (2, "") and "different tokens" in err and "--plain" in err
    assert call(capsys, "compare", chatty, other, "--prompt", "Hi", "--plain", "--max-new-tokens", 2)[0] == 0


def test_side_by_side():
    lines = side_by_side(["a", "/some/longer/folder/name"], ["one two three four five six", "x\n\ny"], 45).split("\n")
    assert lines == ["a                     |  e/longer/folder/name", "-" * 20 + "  |  " + "-" * 20,
                     "one two three four    |  x", "five six              |", "                      |  y"]
