"""Ropes that depend on how long a sequence is ("dynamic", "longrope") against transformers: whole, token by token, and after what was there."""
import numpy as np
import pytest
import torch
import transformers as tf

import modelq
from micro_models import build, inputs, save
from modelq import _testing

LOGITS = 2e-4       # absolute, in float32
SWITCH = 16         # tokens, up to which these micro models' sequences are short
DYNAMIC = 5         # rope_type "dynamic" of csrc/model/config.h


@pytest.fixture(scope="module", params=["llama dynamic", "phi3 longrope"])
def case(request, tmp_path_factory):
    """(name, folder)."""
    return request.param, save(build(request.param), tmp_path_factory.mktemp("model") / "source")


def native(folder):
    return modelq.load(folder, compute="float32")


def whole(model, ids):
    """transformers' logits, of a model that has seen nothing before."""
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def test_lengths_in_one_run(case):
    """On either side of the switch and far beyond: each batch as transformers computes it by itself."""
    name, folder = case
    ids, lengths = inputs(length=5 * SWITCH)[0], (SWITCH - 1, SWITCH, SWITCH + 1, 2 * SWITCH, 5 * SWITCH, SWITCH + 1, 3)
    model = native(folder)
    outputs = [model(ids[:, :length]) for length in lengths]
    for output, length in zip(outputs, lengths):
        np.testing.assert_allclose(output.logits, whole(build(name), ids[:, :length]), rtol=0, atol=LOGITS)
    beginning = outputs[4].logits[:, :SWITCH]
    assert np.abs(beginning - outputs[1].logits).max() > 100 * LOGITS      # the length counts


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 7.3])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("head_dim", [4, 64, 128])
def test_dynamic_frequencies(factor, theta, head_dim):
    """float32 rotations themselves, over lengths, by transformers' own rotary embedding."""
    config = tf.LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=24,
                            rope_parameters={"rope_type": "dynamic", "rope_theta": theta, "factor": factor})
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
    for length in (23, 24, 25, 100, 3000):
        x = np.random.default_rng(length).standard_normal((length, 2, head_dim)).astype(np.float32)
        theirs = torch.from_numpy(x.transpose(1, 0, 2)[None].copy())
        turned, _ = apply_rotary_pos_emb(theirs, theirs, *LlamaRotaryEmbedding(config)(theirs, torch.arange(length)[None]))
        _testing.apply_rope((x,), theta, DYNAMIC, (factor, 1.0, 4.0, 24))
        # an angle is known to half an ulp of it, whatever computes it
        np.testing.assert_allclose(x, turned[0].numpy().transpose(1, 0, 2), rtol=0, atol=5e-6 + 6 * length * 2.0 ** -24)


@pytest.mark.parametrize("prompt", [3, SWITCH, SWITCH + 2])
def test_dynamic_token_by_token(tmp_path, prompt):
    """With transformers' cache, too, keys stay as they were turned when they came: so logits are not those of the whole sequence."""
    theirs = build("llama dynamic")
    ids, _, _ = inputs(rows=1, length=2 * SWITCH)
    edges = [0, prompt, prompt + 4, *range(prompt + 5, 2 * SWITCH + 1)]
    pieces = [ids[:, first:end] for first, end in zip(edges, edges[1:])]
    cache, decoding = tf.DynamicCache(config=theirs.config), native(save(theirs, tmp_path / "source")).decoding()
    decoding.begin([[5], [6]])
    for index, piece in enumerate(pieces):
        with torch.no_grad():
            wanted = theirs(torch.from_numpy(piece), past_key_values=cache, use_cache=True).logits[0, -1].numpy()
        row = piece[0].tolist()
        found = decoding.begin([row]) if index == 0 else decoding.forward([0], [row])
        np.testing.assert_allclose(found[0], wanted, rtol=0, atol=LOGITS)
    assert np.abs(whole(build("llama dynamic"), ids)[0, -1] - wanted).max() > 10 * LOGITS


def test_longrope_over_the_switch(tmp_path):
    """One token, several with logits after each, or two sequences of which one becomes long: always the whole sequence's logits (as
    transformers means to have them: it drops the cache there)."""
    theirs = build("phi3 longrope")
    ids, _, _ = inputs(rows=2, length=2 * SWITCH)
    decoding, (first, second) = native(save(theirs, tmp_path / "source")).decoding(), ids.tolist()
    decoding.begin([first[:SWITCH - 2], second[:3]])
    found = decoding.forward([1, 0], [second[3:5], first[SWITCH - 2:SWITCH + 3]], every=True)
    wanted = np.concatenate([whole(theirs, ids[1:, :5])[0, 3:], whole(theirs, ids[:1, :SWITCH + 3])[0, SWITCH - 2:]])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=LOGITS)
    found = decoding.forward([0], [first[SWITCH + 3:SWITCH + 4]])
    np.testing.assert_allclose(found[0], whole(theirs, ids[:1, :SWITCH + 4])[0, -1], rtol=0, atol=LOGITS)
    assert decoding.tokens == [first[:SWITCH + 4], second[:5]]


@pytest.mark.parametrize("before, after", [(SWITCH - 2, SWITCH - 1), (SWITCH - 2, SWITCH + 4), (2 * SWITCH, SWITCH - 1),
                                           (2 * SWITCH, SWITCH + 8)])
def test_what_is_reused_is_what_would_be_made(case, before, after):
    """`reuse` after a shorter or longer sequence with the same beginning."""
    name, folder = case
    ids, _, _ = inputs(rows=1, length=2 * SWITCH)
    decoding = native(folder).decoding()
    decoding.begin([ids[0, :before].tolist()])
    found = decoding.begin([ids[0, :after].tolist()], reuse=True)
    np.testing.assert_allclose(found[0], whole(build(name), ids[:, :after])[0, -1], rtol=0, atol=LOGITS)


def test_generation_goes_beyond_and_sequences_know_nothing_of_each_other(case):
    """A context of factor times max_position_embeddings; in a batch each is as alone (in transformers the longest of a batch counts).

    For longrope, transformers without a cache: 5.17 drops it at the switch, and then gives the model one token instead of all.
    """
    name, folder = case
    theirs, model = build(name), native(folder)
    ids, _, _ = inputs(rows=2, length=12)
    alone = [model.generate(row[None], max_new_tokens=30, eos_token_id=[]) for row in (ids[0], ids[1, :5])]
    wanted = theirs.generate(torch.from_numpy(ids[:1]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0,
                             use_cache="longrope" not in name).numpy()
    np.testing.assert_array_equal(alone[0], wanted)
    padded, mask = ids.copy(), np.ones_like(ids)
    padded[1] = np.r_[np.zeros(7, np.int64), ids[1, :5]]
    mask[1, :7] = 0
    together = model.generate(padded, attention_mask=mask, max_new_tokens=30, eos_token_id=[])
    np.testing.assert_array_equal(together[:, 12:], [alone[0][0, 12:], alone[1][0, 5:]])
