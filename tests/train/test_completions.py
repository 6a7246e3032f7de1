"""A loss on completions, from files to updates, against PyTorch's with labels of -100."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from test_loop import CONFIG, read_log, run
from tiny_models import from_torch, random_torch_model
from train_models import WINDOW, make_counted_windows, make_model, make_windows
from transformers import GPT2Config

import sparseffn_jax as sf
from sparseffn_jax.evaluate.losses import evaluate_loss, evaluate_tokens, make_evaluator
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import load_windows
from sparseffn_jax.train.step import Batch, init_state, make_stage, make_step

CONTEXT, VOCAB = 48, 2048


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Windows of chats and of completions, with the embedded model's tokenizer."""
    pytest.importorskip("jinja2")
    folder = tmp_path_factory.mktemp("text")
    tokenizer = sf.load_tokenizer(sf.EMBEDDED_MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    chats = [
        [
            {"role": "user", "content": f"def f{i}(x):" + " pass" * (i % 5)},
            {"role": "assistant", "content": f"return x + {i * i}" * (1 + i % 3)},
        ]
        for i in range(60)
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    rows = [{"prompt": f"class C{i}:\n" * 9, "completion": f"    x = {i}\n"} for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_windows(str(folder), tokenizer, CONTEXT, 0.2, loss_on="completion")


@pytest.fixture(scope="module")
def torch_model():
    pytest.importorskip("torch")
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return random_torch_model(config)


@pytest.fixture(scope="module")
def model_and_params(torch_model):
    return GPT2LMHeadModel(torch_model.config), from_torch(torch_model)


def torch_loss(torch_model, tokens, counted):
    """PyTorch's loss, whose labels are -100 where nothing is learned."""
    import torch

    labels = np.where(np.pad(counted, ((0, 0), (1, 0))), tokens, -100).astype(np.int64)
    # The last token of a window is a target alone: its logits are predicted and not used.
    inputs = torch.tensor(tokens[:, :-1], dtype=torch.long)
    logits = torch_model(inputs).logits
    loss = torch.nn.functional.cross_entropy
    return loss(logits.reshape(-1, VOCAB), torch.tensor(labels[:, 1:]).reshape(-1))


def test_windows_have_unequal_numbers_of_targets(windows):
    counts = windows.train_counted.sum(1)
    assert counts.min() < counts.max() / 2
    assert windows.counts.train.counted == counts.sum()
    assert 0.1 < windows.train_counted.mean() < 0.9


def test_evaluation_is_pytorchs(windows, model_and_params, torch_model):
    import torch

    with torch.no_grad():
        expected = torch_loss(torch_model, windows.validation, windows.validation_counted).item()
    for batch_size in (1, 5):
        loss = evaluate_loss(
            *model_and_params, windows.validation, batch_size, windows.validation_counted
        )
        assert loss == pytest.approx(expected, abs=1e-5)


def test_a_rows_evaluation_is_pytorchs(windows, model_and_params, torch_model):
    import torch

    row, counted = windows.train[:, :-1].ravel()[:101], windows.train_counted.ravel()[:101]
    padded = np.zeros(3 * CONTEXT + 1, np.int32)
    padded[:101], mask = row, np.zeros(3 * CONTEXT + 1, bool)
    mask[:101] = counted
    cut = np.stack([padded[i : i + CONTEXT + 1] for i in range(0, 3 * CONTEXT, CONTEXT)])
    cut_mask = np.stack([mask[i : i + CONTEXT + 1] for i in range(0, 3 * CONTEXT, CONTEXT)])
    with torch.no_grad():
        expected = torch_loss(torch_model, cut, cut_mask[:, 1:]).item()
    loss = evaluate_tokens(*model_and_params, row, CONTEXT, 2, counted=counted)
    assert loss == pytest.approx(expected, abs=1e-5)


def update(model_and_params, batch, **settings):
    model, params = model_and_params
    config = TrainConfig(recipe="full", batch_size=len(batch.tokens), **settings)
    stage = make_stage(config, params, 0)
    teacher = (model, params) if config.distill_weight else (None, None)
    step = make_step(model, stage, config, teacher[0])
    return step(*init_state(stage, params), teacher[1], batch, 0, 0, 1.0)


@pytest.mark.parametrize("accumulate_steps", [1, 3])
def test_a_step_is_pytorchs(windows, model_and_params, torch_model, accumulate_steps):
    order = np.argsort(windows.train_counted.sum(1))
    # The fewest targets beside the most, in microbatches of two.
    rows = np.concatenate([order[:4], order[-2:]])
    batch = Batch(windows.train[rows], windows.train_counted[rows])
    torch_model.zero_grad()
    loss = torch_loss(torch_model, *batch)
    loss.backward()
    squares = [float((p.grad.double() ** 2).sum()) for p in torch_model.parameters()]
    _, metrics = update(model_and_params, batch, accumulate_steps=accumulate_steps)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), abs=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(sum(squares) ** 0.5, rel=1e-4)


def test_a_batch_without_a_target_teaches_nothing(windows, model_and_params):
    batch = Batch(windows.train[:4], np.zeros((4, CONTEXT), bool))
    for distill_weight in (0.0, 0.5):
        settings = {"distill_weight": distill_weight, "accumulate_steps": 2, "weight_decay": 0.0}
        state, metrics = update(model_and_params, batch, **settings)
        assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0.0
        chex.assert_trees_all_equal(state.trainable, model_and_params[1])


def test_the_teacher_is_heard_on_the_same_targets(windows):
    model, params = make_model()
    teacher = jax.tree.map(lambda x: x + 0.1 * np.sin(np.arange(x.size)).reshape(x.shape), params)
    counted = make_counted_windows()
    batch = Batch(counted.train[:8], counted.train_counted[:8])
    config = TrainConfig(recipe="full", distill_weight=1.0, temperature=1.0)
    stage = make_stage(config, params, 0)
    step = make_step(model, stage, config, model)
    _, metrics = step(*init_state(stage, params), teacher, batch, 0, 0, 1.0)

    def log_p(params):
        logits = np.asarray(model.apply({"params": params}, batch.tokens[:, :-1]), np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    ours, theirs = log_p(params), log_p(teacher)
    divergence = (np.exp(theirs) * (theirs - ours)).sum(-1)
    assert float(metrics["loss"]) == pytest.approx(divergence[batch.counted].mean(), rel=1e-4)


def test_resume_is_exact_with_targets_that_do_not_count(tmp_path):
    model, params = make_model()
    windows = make_counted_windows()
    config = dataclasses.replace(CONFIG, recipe="full", accumulate_steps=3)
    expected, expected_losses = run(model, params, windows, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5"):
        run(model, params, windows, config, tmp_path / "stopped", stop=5)
    result, losses = run(model, params, windows, config, tmp_path / "stopped", resume="must")
    assert losses == {step: expected_losses[step] for step in range(6, 13)}
    chex.assert_trees_all_equal(result.params, expected.params)
    assert result.data_hash == expected.data_hash
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"other settings .* the training text is another"):
        run(model, params, make_windows(), config, tmp_path / "whole")


def test_nothing_to_evaluate(model_and_params, windows):
    model, params = model_and_params
    nothing = np.zeros((2, CONTEXT), bool)
    with pytest.raises(ValueError, match="no target counts"):
        make_evaluator(model)(params, windows.validation[:2], 2, nothing)
    assert make_counted_windows().train_counted.shape[1] == WINDOW
