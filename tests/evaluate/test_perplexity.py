import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers import GPT2Config

import sparseffn_jax as sf
from sparseffn_jax.evaluate.perplexity import make_scorer, strided_loss

VOCAB, WINDOW = 97, 32


@pytest.fixture(scope="module")
def tokens():
    # Small ids are frequent, and the text changes half-way: windows differ in their losses.
    rng = np.random.default_rng(0)
    halves = [rng.integers(0, high, (2, 400)).min(axis=0) for high in (VOCAB, VOCAB // 3)]
    return np.concatenate(halves).astype(np.int32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch = pytest.importorskip("torch")
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=WINDOW, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    loaded = sf.load_pretrained(folder)
    return reference, loaded.model(), loaded.params


def hugging_face_perplexity(model, tokens, max_length, stride):
    """The loop of https://huggingface.co/docs/transformers/perplexity."""
    import torch

    encodings = torch.tensor(tokens[None], dtype=torch.long)
    nll_sum, n_tokens, prev_end_loc, seq_len = 0.0, 0, 0, encodings.size(1)
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = encodings[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(input_ids, labels=target_ids).loss
        num_loss_tokens = (target_ids != -100).sum().item() - target_ids.size(0)
        nll_sum += neg_log_likelihood * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return float(torch.exp(nll_sum / n_tokens))


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 24), (20, 10)])
def test_perplexity_equals_hugging_faces_method(pair, tokens, window, stride):
    reference, model, params = pair
    expected = hugging_face_perplexity(reference, tokens, window, stride)
    loss = strided_loss(model, params, tokens, window, stride, batch_size=8)
    assert np.exp(loss) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(800, 32, 1), (75, 32, 7), (32, 32, 8), (20, 32, 8), (2, 9, 3)]
)
def test_every_token_is_predicted_once_from_its_first_window(pair, tokens, length, window, stride):
    _, model, params = pair
    tokens = tokens[: min(length, 120)]
    forward = jax.jit(lambda ids: model.apply({"params": params}, ids))
    losses = []
    for target in range(1, len(tokens)):
        # The first window that ends behind the target.
        index = max(0, -(-(target + 1 - window) // stride))
        context = tokens[index * stride : target]
        assert len(context) >= min(target, window - stride)
        ids = np.zeros((1, WINDOW), np.int32)
        ids[0, : len(context)] = context
        logits = np.asarray(forward(ids)[0, len(context) - 1], np.float64)
        losses.append(
            np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[target]]
        )
    actual = strided_loss(model, params, tokens, window, stride, batch_size=5)
    assert actual == pytest.approx(np.mean(losses), abs=1e-5)


def test_rows_of_any_length_are_scored_alone(pair, tokens):
    _, model, params = pair
    rows = [tokens[:5], tokens[10:43].tolist(), tokens[50:52], tokens[60:77]]
    counts = [1, 32, 1, 6]
    log_probs, is_greedy = make_scorer(model, WINDOW, batch_size=3)(params, rows, counts)
    forward = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)))
    for row, count, log_prob in zip(rows, counts, log_probs, strict=True):
        ids = np.zeros((1, WINDOW), np.int32)
        ids[0, : len(row) - 1] = row[:-1]
        of_targets = forward(ids)[0, np.arange(len(row) - 1), np.array(row[1:])]
        assert log_prob == pytest.approx(float(of_targets[-count:].sum()), abs=1e-4)
    assert not is_greedy.any()
    best = int(jnp.argmax(forward(tokens[None, :WINDOW])[0, 7]))
    rows = [[*tokens[:8], best], [*tokens[:8], (best + 1) % VOCAB]]
    assert make_scorer(model, WINDOW, 3)(params, rows, [1, 1])[1].tolist() == [True, False]


@pytest.mark.parametrize("stride", [0, 32])
def test_strides_out_of_range(pair, tokens, stride):
    _, model, params = pair
    with pytest.raises(ValueError, match=f"stride={stride} must lie between 1 and window - 1 = 31"):
        strided_loss(model, params, tokens, WINDOW, stride, 4)
