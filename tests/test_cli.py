"""The command line as a user meets it: what works, and what is refused before any work."""

import contextlib
import hashlib
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

import sparseffn_jax as sf
from sparseffn_jax.bench.clock import FFNClock, ModelClock
from sparseffn_jax.bench.estimated import Estimate
from sparseffn_jax.cli import main
from sparseffn_jax.commands import convert, finetune, inspect
from sparseffn_jax.commands.evaluate import Evaluate
from sparseffn_jax.measure import memory
from sparseffn_jax.measure.gpus import GPU
from sparseffn_jax.train.run_lock import hold_run_folder

D, LAYERS, WINDOW, VOCAB = 32, 2, 32, 300
CORPUS = "\n\n".join(
    f"def f{i}(x):\n    return x + {i}\n\nclass C{i}:\n    value = {i * i}\n" for i in range(1200)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny dense GPT-2, ``dense/``, and text, ``corpus.txt``."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "corpus.txt").write_text(CORPUS)
    (folder / "short.txt").write_text(CORPUS[:3000])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [CORPUS],
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=WINDOW, n_embd=D, n_layer=LAYERS, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = sf.GPT2LMHeadModel(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    sf.save_pretrained(folder / "dense", model, params, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def sparse(folder):
    """The tiny model converted, ``sparse/``, to cores beside bypasses."""
    layer = folder / "layer.json"
    layer.write_text(json.dumps(sf.size_ffn(D, 4 * D, 0.4, bypass=True).to_dict()))
    run("convert", "--model", folder / "dense", "--out", folder / "sparse", "--text",
        folder / "corpus.txt", "--config", layer, "--distill-steps", 2, "--calibration-tokens",
        1024)  # fmt: skip
    return folder / "sparse"


def run(*argv):
    main([str(argument) for argument in argv])


def refused(capfd, *argv):
    """Runs a command that must fail; returns its error line."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in out + err
    return err


def fingerprint(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_convert_writes_a_sparse_model(sparse):
    loaded = sf.load_pretrained(sparse)
    assert all(isinstance(ffn, sf.SparseFFNConfig) for ffn in loaded.ffns)
    assert all(sf.flops_ratio(ffn) <= 0.4 for ffn in loaded.ffns)


def test_evaluate_is_the_mean_over_the_whole_file(folder, tmp_path):
    out = tmp_path / "loss.json"
    run("evaluate", "--model", folder / "dense", "--text", folder / "short.txt", "--json", out)
    result = json.loads(out.read_text())

    loaded = sf.load_pretrained(folder / "dense")
    tokenizer = sf.load_tokenizer(folder / "dense")
    ids = np.array(tokenizer.encode((folder / "short.txt").read_text()))
    losses = []
    for start in range(0, len(ids) - 1, WINDOW):
        inputs = ids[None, start : start + WINDOW]
        targets = ids[start + 1 : start + WINDOW + 1]
        logits = loaded.model().apply({"params": loaded.params}, inputs[:, : len(targets)])
        logits = np.asarray(logits[0], np.float64)
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        losses.extend(log_z - logits[np.arange(len(targets)), targets])
    assert len(losses) == len(ids) - 1 == result["tokens"]
    assert result["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_strides_give_every_token_more_context(folder, tmp_path):
    out = tmp_path / "loss.json"
    stride = WINDOW // 2
    run("evaluate", "--model", folder / "dense", "--text", folder / "short.txt",
        "--stride", stride, "--json", out)  # fmt: skip
    loaded = sf.load_pretrained(folder / "dense")
    ids = np.array(sf.load_tokenizer(folder / "dense").encode((folder / "short.txt").read_text()))
    losses, scored = [], 1
    for start in range(0, len(ids), stride):
        window = ids[start : start + WINDOW]
        logits = loaded.model().apply({"params": loaded.params}, window[None])[0]
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        # What the windows before have scored counts once.
        for i in range(max(scored, start + 1), start + len(window)):
            losses.append(-log_p[i - start - 1, ids[i]])
        scored = max(scored, start + len(window))
    result = json.loads(out.read_text())
    assert result["tokens"] == len(losses) == len(ids) - 1
    assert result["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_finetune_trains_resumes_and_leaves_a_model(folder, sparse, tmp_path, capfd):
    out = tmp_path / "run"
    argv = f"finetune --model {sparse} --text {folder / 'corpus.txt'} --out {out} --steps 4".split()
    argv += ["--recipe", "ffn_only", "--batch-size", "2", "--resume", "auto"]
    run(*argv)
    trained = fingerprint(out / "model")
    before, after = (sf.load_pretrained(path).params for path in (sparse, out / "model"))
    layer = after["transformer"]["h"]["0"]
    np.testing.assert_array_equal(
        layer["attn"]["c_attn"]["kernel"],
        before["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"],
    )
    assert np.any(layer["mlp"]["bias"] != before["transformer"]["h"]["0"]["mlp"]["bias"])
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 4
    run(*argv)
    assert fingerprint(out / "model") == trained
    run("evaluate", "--model", out / "model", "--text", folder / "short.txt")
    assert "nats a token" in capfd.readouterr().out


def test_finetune_ends_although_its_last_gradient_overflows(folder, sparse, tmp_path, capfd):
    run("finetune", "--model", sparse, "--text", folder / "corpus.txt", "--out", tmp_path / "run",
        "--steps", 1, "--batch-size", 2, "--dtype", "float16", "--loss-scale", 1e30)  # fmt: skip
    assert "the gradient overflowed float16" in capfd.readouterr().err
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "0.0005, cosine, adamw" in card
    assert "nats a token over" in card
    assert "cross-entropy" not in card


def test_finetune_leaves_adapters_in_peft_format(folder, sparse, tmp_path, capfd):
    common = ["--text", folder / "corpus.txt", "--steps", 4, "--batch-size", 2]
    out = tmp_path / "run"
    run("finetune", "--model", sparse, "--out", out, *common, "--recipe", "lora", "--lora-rank", 4,
        "--lora-alpha", 6, "--lora-targets", "c_attn", "--learning-rate", 0.01)  # fmt: skip
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, ["c_attn"])
    assert config["modules_to_save"] == ["mlp"]
    assert config["base_model_name_or_path"] == str(sparse)
    merged = sf.load_pretrained(out / "model").params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        sf.load_pretrained(sparse, adapter=out / "adapter").params,
        merged,
    )
    cards = [(out / name / "README.md").read_text() for name in ("adapter", "model")]
    validation = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]
    for card in cards:
        assert f"{validation:.4f} nats a token" in card
        assert "| adapters | rank 4 on c_attn |" in card
        assert "tokens of corpus.txt" in card  # How its base was converted.
        assert str(folder) not in card
    # Elsewhere the adapters go into another run.
    run("finetune", "--model", sparse, "--adapter", out / "adapter", "--out", tmp_path / "next",
        *common, "--recipe", "ffn_only")  # fmt: skip
    after = sf.load_pretrained(tmp_path / "next" / "model").params
    kernels = [
        tree["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"] for tree in (after, merged)
    ]
    np.testing.assert_allclose(*kernels, atol=1e-6)


def test_adapters_alone_are_pushed(folder, tmp_path, capfd, monkeypatch):
    pushed, checked = [], []
    monkeypatch.setattr(finetune, "check_push", checked.append)
    monkeypatch.setattr(
        finetune, "push_to_hub", lambda *args, private: pushed.append((*args, private)) or "url"
    )
    run("finetune", "--model", folder / "dense", "--text", folder / "corpus.txt", "--steps", 1,
        "--out", tmp_path, "--batch-size", 2, "--recipe", "lora", "--no-lora-ffns", "--no-merge",
        "--push", "me/lora", "--private")  # fmt: skip
    assert checked == ["me/lora"]
    assert pushed == [(tmp_path / "adapter", "me/lora", True)]
    assert not (tmp_path / "model").exists()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["target_modules"]) == (
        None,
        ["attn.c_proj", "c_attn"],
    )
    assert "me/lora: url" in capfd.readouterr().out


def test_who_may_not_push_is_told_before_any_work(folder, tmp_path, capfd, monkeypatch):
    def refuse(repo_id):
        raise sf.CheckpointError(f"cannot push to {repo_id}")

    for command in (convert, finetune):
        monkeypatch.setattr(command, "check_push", refuse)
        monkeypatch.setattr(command, "load_pretrained", None)
        name = command.__name__.rpartition(".")[2]
        error = refused(capfd, name, "--model", folder / "dense", "--out", tmp_path / "out",
                        "--text", folder / "corpus.txt", "--push", "me/x")  # fmt: skip
        assert error == "error: cannot push to me/x\n"


def test_a_loss_on_completions_counts_them_and_says_so(folder, tmp_path, capfd):
    rows = [{"prompt": f"def f{i}(x):\n", "completion": f"    return x + {i}\n"} for i in range(80)]
    text, out = tmp_path / "text", tmp_path / "run"
    text.mkdir()
    (text / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (text / "notes.doc").write_text("")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, rows[:20])))
    run("finetune", "--model", folder / "dense", "--text", text, "--validation-text", held_out,
        "--out", out, "--loss-on", "completion", "--steps", 1, "--batch-size", 2)  # fmt: skip
    counts = json.loads((out / "text.json").read_text())
    encode = sf.load_tokenizer(folder / "dense").encode
    tokens = sum(len(encode(row["prompt"] + row["completion"])) + 1 for row in rows)
    assert counts["train"]["tokens"] == tokens
    assert [counts[split]["documents"] for split in ("train", "validation")] == [80, 20]
    assert 0 < counts["train"]["counted"] < counts["train"]["targets"]
    assert counts["unread"] == {".doc": 1}
    printed = capfd.readouterr().out
    assert f"training text: {tokens:,} tokens in 80 documents" in printed
    assert f"loss on {counts['train']['counted']:,}" in printed
    assert "1 .doc" in printed

    (step,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    file = tmp_path / "loss.json"
    run("evaluate", "--model", out / "model", "--text", held_out, "--loss-on", "completion",
        "--json", file)  # fmt: skip
    loss = json.loads(file.read_text())
    expected = 0
    for row in rows[:20]:
        whole, prompt = encode(row["prompt"] + row["completion"]), encode(row["prompt"])
        # Words may reach over the end of the prompt; and there is the end-of-text token.
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(whole, prompt, strict=False)
        )
        expected += len(whole) - len(list(same)) + 1
    assert loss["tokens"] == expected
    # The order of the documents and the end of the last window differ.
    assert loss["loss"] == pytest.approx(step["validation_loss"], abs=0.1)


def test_generate_continues_the_prompt(sparse, capfd):
    run("generate", "--model", sparse, "--prompt", "def f1(x):", "--max-new-tokens", 5)
    assert capfd.readouterr().out.startswith("def f1(x):")
    # On a terminal a stage clears its line: nothing that stays may stand there before.
    both = io.StringIO()
    with contextlib.redirect_stdout(both), contextlib.redirect_stderr(both):
        run("generate", "--model", sparse, "--prompt", "def f1(x):", "--max-new-tokens", 5)
    assert "compiling\ndef f1(x):" in both.getvalue()


def test_sampling_options_reach_the_sampler(sparse, capfd):
    def text(*options):
        run("generate", "--model", sparse, "--prompt", "def f1(x):", "--max-new-tokens", 8,
            *options)  # fmt: skip
        return capfd.readouterr().out

    # So small a nucleus holds the likeliest token alone.
    likeliest = text("--temperature", 0)
    assert text("--temperature", 1, "--top-p", 1e-6) == likeliest
    written = likeliest.removeprefix("def f1(x):").rstrip("\n")
    stopped = text("--temperature", 0, "--stop", written[2:4])
    assert stopped.rstrip("\n") == "def f1(x):" + written[: written.index(written[2:4])]


PROMPTS = ["def f1(x):", "class", "    return x + 1\n\nclass C1:"]


def test_prompts_of_a_file_go_on_as_each_alone(sparse, tmp_path, capfd, monkeypatch):
    greedy = "generate", "--model", sparse, "--max-new-tokens", 6, "--temperature", 0
    alone = []
    for prompt in PROMPTS:
        monkeypatch.setattr("sys.stdin", io.StringIO(prompt + "\n"))
        run(*greedy, "--prompt", "-", "--json")
        alone.append(json.loads(capfd.readouterr().out))
    assert [record["prompt"] for record in alone] == PROMPTS
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    for batch_size in (1, 2, 8):
        run(*greedy, "--prompt-file", path, "--json", "--batch-size", batch_size)
        assert list(map(json.loads, capfd.readouterr().out.splitlines())) == alone
    # A line each, in a file that is no JSON.
    (tmp_path / "prompts.txt").write_text("def f1(x):\n\nclass\n")
    run(*greedy, "--prompt-file", tmp_path / "prompts.txt")
    texts = [record["prompt"] + record["text"] for record in alone[:2]]
    assert capfd.readouterr().out == "\n".join([*texts, ""])

    path.write_text('{"text": "no prompt"}\n')
    assert "line 1: expected a JSON object" in refused(capfd, *greedy, "--prompt-file", path)
    path.write_text("\n")
    assert "no prompts found" in refused(capfd, *greedy, "--prompt-file", path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "the prompt is empty" in refused(capfd, *greedy, "--prompt", "-")


def test_a_chat_goes_through_the_template(sparse, tmp_path, capfd, monkeypatch):
    chat = "generate", "--model", sparse, "--chat", "--max-new-tokens", 5, "--temperature", 0
    assert "has no chat template" in refused(capfd, *chat, "--prompt", "f1")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "chat needs a message: give --prompt" in refused(capfd, *chat)

    model = tmp_path / "chat"
    shutil.copytree(sparse, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
    )
    chat = "generate", "--model", model, *chat[3:]
    # What the template makes of the messages, continued as a prompt.
    plain = "generate", "--model", model, *chat[4:], "--json", "--prompt"

    def answer(prompt):
        run(*plain, prompt)
        return json.loads(capfd.readouterr().out)["text"]

    run(*chat, "--prompt", "f1")
    first = capfd.readouterr().out
    assert first == answer("u:f1\na:") + "\n"
    said = iter(["f1", "", "f2"])

    def say(_):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", say)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    run(*chat)
    turns = capfd.readouterr().out.split("conversation.\n")[1]
    second = answer(f"u:f1\na:{first[:-1]}\nu:f2\na:")
    assert turns == f"{first}{second}\n"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_finetune_computes_in_half_precision(folder, sparse, tmp_path, dtype):
    run("finetune", "--model", sparse, "--text", folder / "corpus.txt", "--out", tmp_path,
        "--steps", 2, "--batch-size", 2, "--dtype", dtype)  # fmt: skip
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(step["loss"]) for step in steps)
    assert ("loss_scale" in steps[-1]) == (dtype == "float16")
    weights = jax.tree.leaves(sf.load_pretrained(tmp_path / "model").params)
    assert {leaf.dtype.name for leaf in weights} == {"float32"}


def test_inspect_gives_configs_that_convert_takes(folder, sparse, tmp_path, capfd):
    run("inspect", "--model", sparse, "--json")
    configs = json.loads(capfd.readouterr().out)
    assert tuple(map(sf.SparseFFNConfig.from_dict, configs)) == sf.load_pretrained(sparse).ffns
    path = tmp_path / "layers.json"
    path.write_text(json.dumps([None, configs[1]]))
    run("convert", "--model", folder / "dense", "--out", tmp_path / "half", "--config", path,
        "--text", folder / "corpus.txt", "--distill-steps", 0)  # fmt: skip
    assert sf.load_pretrained(tmp_path / "half").ffns[0] is None


def test_inspect_has_one_line_for_layers_that_are_alike(folder, sparse, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    run("inspect", "--model", sparse)
    out = capfd.readouterr().out
    assert "core and bypass: two_gemms" in out
    rows = [line.split("│") for line in out.splitlines() if line[:1] == "│"]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
    first, total = cells[0], cells[-1]
    assert [row[0] for row in cells if row[0]] == ["0-1", "all"]
    numbers = [int(cell.replace(",", "")) for cell in (*first[2:4], *total[2:4])]
    assert numbers[2:] == [2 * numbers[0], 2 * numbers[1]]
    assert total[4] == first[4]
    stored = sum(x.size for x in jax.tree.leaves(sf.load_pretrained(sparse).params))
    assert total[1] == f"{numbers[2] / stored:.0%} of the model's parameters"


def test_inspect_estimates_a_gpu_or_names_the_extra(sparse, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    argv = "inspect", "--model", sparse
    assert "device='h1' is not known" in refused(capfd, *argv, "--device", "h1").replace(
        "--device ", "device="
    )

    def estimate(config, mode, tokens, dtype, gpu):
        assert (mode, tokens, gpu.description) == ("decoding", 1, "NVIDIA H100 80GB HBM3")
        return Estimate(1e-6 * sf.flops_ratio(config), 1, 0, 0, 0)

    monkeypatch.setattr(GPU, "devices", lambda _: None)
    monkeypatch.setattr(inspect, "estimate_layer", estimate)
    run(*argv, "--device", "h100", "--tokens", 1)
    out = " ".join(capfd.readouterr().out.split())
    ratio = sf.flops_ratio(sf.load_pretrained(sparse).ffns[0])
    assert f"dense FFNs take {1 / ratio:.2f} times that" in out
    monkeypatch.undo()
    monkeypatch.setattr("sparseffn_jax.measure.gpus._PLUGINS", ("no_such_plugin",))
    err = refused(capfd, *argv, "--device", "h100")
    assert "pip install 'sparseffn_jax[programs]'" in err


def test_demo_reports_every_figure(folder, tmp_path):
    out = tmp_path / "demo"
    run("demo", "--model", folder / "dense", "--text", folder / "corpus.txt", "--out", out,
        "--steps", 3, "--batch-size", 2, "--calibration-windows", 32, "--distill-steps", 2,
        "--evaluation-windows", 8, "--sweep", 0.4, 1.0, "--flops", 0.4)  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    for name in ("dense", "sparse"):
        assert np.isfinite(report[name]["val_loss"])
    for name in ("ffn_flops_ratio", "ffn_speedup", "model_speedup"):
        assert report[name] > 0
    assert set(report["warm_start"]) == {"selection", "closed_form", "layer_distillation"}
    # At FLOPs 1.0 the sparse model is the dense one.
    assert report["sweep"][1]["val_loss"] == pytest.approx(
        report["dense"]["pretrained_val_loss"], abs=1e-5
    )
    for picture in ("training", "layers", "quality"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert sf.load_pretrained(out / "model").ffns


def test_a_second_demo_in_the_folder_is_refused(folder, tmp_path, capfd):
    # What the first one has written must stay.
    trained = tmp_path / "training" / "sparse"
    trained.mkdir(parents=True)
    with hold_run_folder(tmp_path):
        err = refused(capfd, "demo", "--model", folder / "dense", "--text", folder / "corpus.txt",
                      "--out", tmp_path)  # fmt: skip
    assert "is in use" in err
    assert trained.exists()


def _without(tensor):
    def damage(model):
        from safetensors.numpy import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        del tensors[tensor]
        save_file(tensors, model / "model.safetensors")

    return damage


def _truncate(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _only_pickle(model):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _edit_config(**changes):
    def damage(model):
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("transformer.h.1.mlp.c_fc.weight"), "c_fc"),
        (_truncate, "model.safetensors"),
        (_only_pickle, "safe_serialization"),
        (_edit_config(model_type="bert"), "bert"),
        (_edit_config(vocab_size=VOCAB - 10), "vocab_size|wte|shape"),
        (_edit_config(n_layer=3), "h.2"),
        (lambda model: (model / "config.json").write_text("{"), "config.json"),
        (lambda model: (model / "config.json").unlink(), "config.json"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer"),
        (lambda model: shutil.rmtree(model), "model"),
    ],
)
def test_damaged_models_are_refused(folder, tmp_path, capfd, damage, message):
    model = tmp_path / "model"
    shutil.copytree(folder / "dense", model)
    damage(model)
    before = fingerprint(tmp_path)
    err = refused(capfd, "evaluate", "--model", model, "--text", folder / "short.txt")
    assert re.search(message, err), err
    assert fingerprint(tmp_path) == before


def test_a_wrong_tokenizer_is_refused(folder, tmp_path, capfd):
    model = tmp_path / "model"
    shutil.copytree(folder / "dense", model)
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"extra{i}": VOCAB + i for i in range(50)}
    path.write_text(json.dumps(tokenizer))
    err = refused(capfd, "evaluate", "--model", model, "--text", folder / "short.txt")
    assert "wrong tokenizer" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 48}, "d_model=48"),
        ({"activation": "gelo"}, "gelo"),
        (
            {"spectral": {"transform": "block_circulant", "width": 64, "block_size": 5}},
            "block_size=5",
        ),
        (
            {
                "spectral": {
                    "transform": "block_circulant",
                    "width": 64,
                    "block_size": 4,
                    "frequency_mask": [True, True],
                }
            },
            "frequency_mask has 2 entries",
        ),
        ({"spectral": {"transform": "wavelet", "width": 64}}, "wavelet"),
        ({"polynomial": {"degree": "4"}}, "degree"),
        ({"sparsity": 0.5}, "sparsity"),
        ({"micro": {"core": {"width": 0}}}, "width"),
    ],
)
def test_bad_ffn_configs_are_refused(folder, tmp_path, capfd, change, message):
    config = sf.size_ffn(D, 4 * D, 0.4).to_dict() | change
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    err = refused(
        capfd, "convert", "--model", folder / "dense", "--out", tmp_path / "out", "--config", path,
        "--text", folder / "corpus.txt",
    )  # fmt: skip
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("evaluate --model {dense} --text {dir}/nothing.txt", "nothing.txt"),
        ("evaluate --model {dense} --text {empty}", "no text found in"),
        ("evaluate --model {dense} --text {binary}", "not UTF-8"),
        ("evaluate --model {dense} --text nothing.txt", "no file or folder 'nothing.txt'"),
        ("evaluate --model {dense} --text my_corpus/", "no file or folder 'my_corpus/'"),
        ("evaluate --model {dense} --text {parquet}", "table.parquet cannot be read as parquet"),
        ("evaluate --model {dense} --text {rows} --loss-on completion", "has no completions"),
        ("evaluate --model {dense} --text {rows} --loss-on prompt", "'prompt'"),
        (
            "evaluate --model {dense} --text {rows} --loss-on completion --stride 8",
            "leave out --loss-on, or --stride",
        ),
        ("finetune --model {dense} --text {rows} --out {run}", "rows.jsonl' has 1 document, which"),
        ("finetune --model {dense} --text {chats} --out {run}", "line 1: messages need a chat"),
        ("finetune --model {dense} --text {chats} --out {run} --text-tokens 0", "--text-tokens 0"),
        ("evaluate --model {dense} --text {jsonl}", 'line 2: expected "text", a string; or'),
        ("evaluate --model {dense} --text {short} --window 33", "n_positions=32"),
        ("evaluate --model {dense} --text {short} --json {short}/out.json", "cannot write"),
        ("evaluate --model {dense} --txt {short}", "--txt"),
        ("generate --model {dense} --prompt abc --max-new-tokens 40", "n_positions=32"),
        ("generate --model {dense} --max-new-tokens 0", "--max-new-tokens 0 must"),
        ("generate --model {dense} --temperature -1", "--temperature -1.0 must"),
        ("inspect --model {dense} --tokens 0", "--tokens 0 must"),
        ("convert --model {sparse} --out {dir}/out --text {corpus}", "already sparse"),
        ("convert --model {dense} --out {sparse} --text {corpus}", "--overwrite"),
        ("convert --model {dense} --out {dense} --text {corpus} --overwrite",
         "holds the model that is read"),
        ("demo --model {run}/model --text {corpus} --out {run}", "holds the model that is read"),
        ("finetune --model {run}/model/a --out {run} --text {corpus}", "holds the model that is"),
        ("finetune --model {dense} --teacher {embedded} --distill-weight 1 --out {dir}/run "
         "--text {corpus}", "the teacher has a vocabulary of 1024 tokens"),
        ("finetune --model {dense} --out {dir}/run --text {corpus} --recipe lora --lora-targets "
         "q_proj", "no linear map is called 'q_proj': adapters can be on attn.c_attn, "),
        ("finetune --model {dense} --out {dir}/run --text {corpus} --recipe lora --adapter x",
         "Merge these first"),
        ("finetune --model {dense} --out {dir}/run --text {corpus} --no-merge", "is for --recipe"),
        ("finetune --model {dense} --out {dir}/run --text {corpus} --adapter {dense}",
         "has no adapter_config.json"),
        ("convert --model {dense} --out {dir}/out --flops 0 --text {corpus}", "--flops 0.0 must"),
        ("convert --model {dense} --out {dir}/out --text {empty}", "empty"),
        ("plan --model {dense} --out {dir}/plan --text {corpus}", "give one of --flops"),
        ("plan --model {dense} --out {dir}/plan --flops 0.4 --speedup 1.5", "2 are given"),
        ("plan --model {dense} --out {dir}/plan --ffn-speedup 0.5", "1 or more"),
        ("plan --model {dense} --out {dir}/plan --flops 0.4 --timed-pass training",
         "nothing is timed"),
        ("plan --model {dense} --out {dir}/plan --flops 1.5", "must not exceed 1"),
        ("plan --model {dense} --out {dir}/plan --speedup inf", "finite"),
        ("convert --model {dense} --out {dir}/out --timed-tokens 64", "0 are given"),
        ("plan --model {dense} --out {dir}/plan --parameters 0.001 --text {corpus}",
         "the smallest layers have"),
        ("convert --model {dense} --out {dir}/out --speedup 2 --max-loss 1", "2 are given"),
        ("convert --model {dense} --out {dir}/out --planned", "0 are given"),
        ("convert --model {dense} --out {dir}/out --flops 0.4 --config {dir}/plan.json",
         "takes no budget"),
        ("convert --model {dense} --out {dir}/out --flops 0.4 --servable", "add --planned"),
        ("export --model {dense} --out {dir}/model.bin", "a name that ends in .gguf"),
        ("export --model {dense} --out {dir}/out --to huggingface --type q8_0", "expected f32, f"),
        ("export --model {dense} --out {dense} --to huggingface --overwrite", "holds the model"),
        ("plan --model {sparse} --out {dir}/plan --flops 0.4", "already"),
        ("plan --model {dense} --out {dir}/plan --flops 0.001 --text {corpus}", "out of reach"),
        ("finetune --model {dense} --out {short}/run --text {corpus}", "cannot write"),
        ("finetune --model {dense} --out {dir}/run --text {corpus} --recipe magic", "magic"),
        ("finetune --model {dense} --out {dir}/run --text {corpus} --steps 0", "--steps 0 must"),
        ("finetune --model {dense} --out {dir}/run --report-to mlflow", "'mlflow'"),
        ("finetune --model {dense} --out {dir}/run --strategy mesh", "needs the sizes of a mesh"),
        ("finetune --model {dense} --out {dir}/run --strategy mesh --mesh data=77", "77 devices"),
        ("finetune --model {dense} --out {dir}/run --processes 2", "belong together"),
        ("finetune --model {dense} --out {dir}/run --text {corpus} --resume must", "resume"),
        ("finetune --model {dense} --out {dir}/run --text {short} --batch-size 500", "batch"),
        ("finetune --model {dense} --out {dir}/run --text {corpus} --distill-weight 1", "teacher"),
        ("demo --model {dense} --text {corpus} --out {dir}/demo --flops 1.5", "1.5"),
        ("demo --model {sparse} --text {corpus} --out {dir}/demo", "sparse already"),
        ("demo --model {dense} --text {corpus} --out {dir}/demo --prompt " + 40 * "?", "40 tokens"),
    ],
)  # fmt: skip
def test_wrong_use_is_refused(folder, sparse, tmp_path, capfd, argv, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}')
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    places = {
        "dense": folder / "dense",
        "sparse": sparse,
        "corpus": folder / "corpus.txt",
        "short": folder / "short.txt",
        "empty": tmp_path / "empty.txt",
        "binary": tmp_path / "binary.txt",
        "parquet": tmp_path / "table.parquet",
        "rows": tmp_path / "rows.jsonl",
        "chats": tmp_path / "chats.jsonl",
        "jsonl": tmp_path / "lines.jsonl",
        "run": tmp_path / "run",
        "embedded": sf.EMBEDDED_MODEL,
        "dir": tmp_path,
    }
    before = fingerprint(folder)
    err = refused(capfd, *argv.format(**places).split())
    assert message in err
    assert fingerprint(folder) == before


def test_ctrl_c_ends_an_import():
    argv = [sys.executable, "-X", "importtime", "-m", "sparseffn_jax", "inspect"]
    # Whoever runs the tests may ignore the signal, and their processes would too.
    heeds = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    argv = [sys.executable, "-c", heeds, *argv]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if b"transformers" in line)
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    assert process.returncode == -signal.SIGINT


def test_the_version(capsys):
    run("--version")
    assert capsys.readouterr().out == f"sparseffn_jax {sf.__version__}\n"


def test_a_device_without_memory_is_no_traceback(folder, monkeypatch, capfd):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of 80 GB")

    monkeypatch.setattr(Evaluate, "run", full)
    argv = "evaluate", "--model", folder / "dense", "--text", folder / "short.txt"
    err = refused(capfd, *argv)
    assert "smaller --batch-size" in err
    assert "out of 80 GB" in err

    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(Evaluate, "run", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        run(*argv)


PLAN = ("--calibration-tokens", 2048, "--trials", 1)


def test_a_plan_keeps_to_its_budget_and_is_what_convert_reads(folder, tmp_path):
    text = "--text", folder / "corpus.txt"
    run("plan", "--model", folder / "dense", "--out", tmp_path, "--flops", 0.5, *text, *PLAN)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [layer["layer"] for layer in report["layers"]] == list(range(LAYERS))
    assert sum(layer["flops"] for layer in report["layers"]) <= 0.5 * LAYERS
    assert report["totals"]["flops"] <= 0.5
    assert report["totals"]["predicted_damage"] > 0.0
    assert (tmp_path / "plan.png").stat().st_size > 1000

    # Another budget starts from the same estimates, whole or not, and ends with the same plan.
    estimates = tmp_path / "estimates.json"
    whole = json.loads(estimates.read_text())
    estimates.write_text(json.dumps(whole | {"damages": whole["damages"][:1]}))
    plan = (tmp_path / "plan.json").read_bytes()
    run("plan", "--model", folder / "dense", "--out", tmp_path, "--flops", 0.5, *text, *PLAN)
    assert (tmp_path / "plan.json").read_bytes() == plan
    assert json.loads(estimates.read_text()) == whole
    run("convert", "--model", folder / "dense", "--out", tmp_path / "sparse", *text, "--config",
        tmp_path / "plan.json", "--distill-steps", 0, "--calibration-tokens", 2048)  # fmt: skip
    ffns = sf.load_pretrained(tmp_path / "sparse").ffns
    assert [(ffn.micro.core.width, ffn.spectral.rank if ffn.spectral else 0) for ffn in ffns] == [
        (layer["width"], layer["rank"]) for layer in report["layers"]
    ]


def test_a_servable_plan_is_exported(folder, tmp_path, capfd):
    text = "--text", folder / "corpus.txt"
    run("convert", "--model", folder / "dense", "--out", tmp_path / "sparse", *text, "--flops", 0.5,
        "--planned", "--servable", "--distill-steps", 0, "--calibration-tokens", 2048)  # fmt: skip
    sparse = sf.load_pretrained(tmp_path / "sparse")
    # GPT-2 has one width for all layers.
    assert len(set(sparse.ffns)) == 1
    ids = np.arange(60).reshape(2, 30)
    expected = sparse.model().apply({"params": sparse.params}, ids)
    for to, out in (("gguf", tmp_path / "model.gguf"), ("huggingface", tmp_path / "dense")):
        export = ("export", "--model", tmp_path / "sparse", "--to", to, "--out", out)
        run(*export, "--type", "f32")
        exported = sf.load_pretrained(out)
        assert (exported.ffns, exported.spec.d_ff <= 2 * D) == ((), True)
        actual = exported.model().apply({"params": exported.params}, ids)
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)
        assert sf.load_tokenizer(out).encode(CORPUS) == sf.load_tokenizer(folder / "dense").encode(
            CORPUS
        )
        assert "--overwrite" in refused(capfd, *export)


@pytest.fixture
def flops_clock(monkeypatch):
    """A clock on which FFNs together are a tenth slower than one by one, and all of the model."""

    def prices(_, configs, on_size=lambda *_: None):
        on_size(1, 1)
        return {config: 1.0 if config is None else sf.flops_ratio(config) for config in configs}

    def speedup(_, configs):
        return 0.9 * LAYERS / sum(prices(_, configs)[c] for c in configs)

    monkeypatch.setattr(FFNClock, "prices", prices)
    monkeypatch.setattr(FFNClock, "speedup", speedup)
    monkeypatch.setattr(ModelClock, "ffn_budget", lambda _, target: LAYERS / target)
    monkeypatch.setattr(ModelClock, "speedup", speedup)


@pytest.mark.parametrize("option", ["--ffn-speedup", "--speedup"])
def test_a_plan_is_made_again_until_the_clock_shows_the_speedup(
    folder, tmp_path, monkeypatch, capfd, flops_clock, option
):
    argv = "plan", "--model", folder / "dense", "--text", folder / "corpus.txt", *PLAN
    run(*argv, "--out", tmp_path / "plan", option, 2)
    totals = json.loads((tmp_path / "plan" / "report.json").read_text())["totals"]
    assert 1.96 <= totals[option[2:].replace("-", "_")] < 2.3
    assert totals["flops"] < 0.47

    # Where FFNs together are faster than one by one, less is cut than the first plan does.
    monkeypatch.setattr(FFNClock, "speedup", fast := lambda _, configs: 1.5 * LAYERS / sum(
        1.0 if config is None else sf.flops_ratio(config) for config in configs))  # fmt: skip
    monkeypatch.setattr(ModelClock, "speedup", fast)
    run(*argv, "--out", tmp_path / "plan", option, 2)
    totals = json.loads((tmp_path / "plan" / "report.json").read_text())["totals"]
    assert 1.96 <= totals[option[2:].replace("-", "_")] < 2.3
    assert totals["flops"] > 0.65

    # By their prices the smallest layers are fast enough, so that they are not timed as a whole;
    # but no plan is.
    monkeypatch.setattr(FFNClock, "speedup", slow := lambda *_: 1.0)
    monkeypatch.setattr(ModelClock, "speedup", slow)
    err = refused(capfd, *argv, "--out", tmp_path / "never", option, 1.1)
    assert "was not reached by any plan" in err
    assert not (tmp_path / "never" / "plan.json").exists()


@pytest.mark.parametrize("option", ["ffn-speedup", "speedup"])
def test_a_speedup_out_of_reach_is_refused(folder, tmp_path, capfd, flops_clock, option):
    argv = "plan", "--model", folder / "dense", "--text", folder / "corpus.txt", *PLAN
    err = refused(capfd, *argv, "--out", tmp_path, f"--{option}", 1000)
    assert re.search(rf"--{option} 1000 is out of reach: with the smallest layers it is \d", err)
    assert not (tmp_path / "estimates.json").exists()


def test_convert_plans_for_a_budget_once(folder, tmp_path, monkeypatch, flops_clock):
    argv = ("convert", "--model", folder / "dense", "--out", tmp_path / "sparse", "--text",
            folder / "corpus.txt", "--ffn-speedup", 1.5, "--calibration-tokens", 2048,
            "--distill-steps", 0)  # fmt: skip

    def stop(*_, **__):
        raise KeyboardInterrupt

    # Stopped at its end, it goes on by the plan that it has, whatever the clock says now.
    monkeypatch.setattr(convert, "save_pretrained", stop)
    with pytest.raises(SystemExit, match="130"):
        run(*argv)
    planned = (tmp_path / "sparse.plan" / "plan.json").read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(FFNClock, "prices", stop)
    run(*argv)
    assert (tmp_path / "sparse.plan" / "plan.json").read_bytes() == planned
    ffns = sf.load_pretrained(tmp_path / "sparse").ffns
    assert list(ffns) == list(sf.SparseFFNConfig.layers_from_json(planned.decode()))
    ratios = [1.0 if ffn is None else sf.flops_ratio(ffn) for ffn in ffns]
    assert 0.5 * LAYERS < sum(ratios) < 0.62 * LAYERS

    # Another budget needs another plan, whatever has been converted by the old one.
    (tmp_path / "sparse.partial").mkdir()
    with pytest.raises(SystemExit, match="130"):
        run(*argv, "--overwrite", "--ffn-speedup", 1.2)


def test_a_stopped_convert_goes_on_where_it_was(folder, sparse, monkeypatch, capfd):
    @contextlib.contextmanager
    def interrupted(*_):
        def count(done, total):
            raise KeyboardInterrupt

        yield count

    command = (
        *("convert", "--model", folder / "dense", "--out", folder / "stopped"),
        *("--text", folder / "corpus.txt", "--config", folder / "layer.json"),
        *("--distill-steps", 2, "--calibration-tokens", 1024),
    )
    with monkeypatch.context() as patch:
        patch.setattr("sparseffn_jax.commands.convert.counter", interrupted)
        with pytest.raises(SystemExit) as stop:
            run(*command)
    assert stop.value.code == 130
    partial = folder / "stopped.partial"
    assert f"{partial} keeps the converted layers" in capfd.readouterr().err.replace("\n", "")
    assert len(list(partial.glob("layer-*.safetensors"))) == 1
    assert not (folder / "stopped").exists()
    run(*command)
    assert not partial.exists()
    weights = [(path / "model.safetensors").read_bytes() for path in (folder / "stopped", sparse)]
    assert weights[0] == weights[1]


def test_a_convert_with_other_settings_leaves_what_a_stopped_one_has(folder, capfd):
    partial = folder / "other.partial"
    partial.mkdir()
    (partial / "settings.json").write_text("{}")
    command = (
        *("convert", "--model", folder / "dense", "--out", folder / "other"),
        *("--text", folder / "corpus.txt", "--calibration-tokens", 1024),
    )
    error = refused(capfd, *command)
    assert "holds a stopped conversion with other settings" in error
    (partial / "settings.json").write_text("{")
    error = refused(capfd, *command)
    assert f"delete {partial} to begin the conversion anew" in error
    assert [path.name for path in partial.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("command", ["convert", "finetune", "evaluate"])
def test_too_little_memory_is_said_before_the_work(folder, tmp_path, capfd, monkeypatch, command):
    argv = [command, "--model", str(folder / "dense"), "--text", str(folder / "corpus.txt")]
    if command != "evaluate":
        argv += ["--out", str(tmp_path / "out")]
    if command == "finetune":
        argv += ["--steps", "1", "--batch-size", "2", "--no-remat"]
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1000)
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    remedies = {
        "convert": ["--batch-size 2 would", "--window 16 would"],
        "finetune": ["--remat would", "--accumulate-steps 2", "--batch-size 1 would", "--window"],
        "evaluate": ["--batch-size 1 would", "--window 16 would"],
    }[command]
    says = error.partition("GiB beside what is loaded, but 0.00 GiB are free: ")[2]
    assert all(remedy in says for remedy in remedies), error
    assert not (tmp_path / "out" / "model").exists()
