"""The harness runs a task of its own format, without a network, on dense and sparse models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import GPT2Config

import sparseffn_jax as sf

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install 'sparseffn_jax[eval]'")
harness = pytest.importorskip("sparseffn_jax.lm_eval")

QUESTIONS = [
    {"context": "import", "choices": [" os\n", " zzgh"], "answer": 0, "text": "import os\n" * 90},
    {"context": "    return", "choices": ["]][", " self"], "answer": 1, "text": "def f(x):\n"},
    {"context": "def __init__(", "choices": ["self", "88"], "answer": 0, "text": "x = 1"},
]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
target_delimiter: ""
"""
TASKS = {
    "offline_choice": """
task: offline_choice
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "offline_rolling": """
task: offline_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "offline_generation": """
task: offline_generation
output_type: generate_until
doc_to_text: context
doc_to_target: context
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(COMMON % data + task)
    config = GPT2Config(
        vocab_size=1024, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    for name, ffns in (
        ("dense", ()),
        ("sparse", (sf.size_ffn(32, 128, 0.4),)),
    ):
        model = sf.GPT2LMHeadModel(config, ffns)
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
        params = jax.tree.map(lambda leaf: 3.0 * leaf, params)
        sf.save_pretrained(folder / name, model, params, tokenizer=sf.EMBEDDED_MODEL)
    return folder


def run_harness(folder, monkeypatch, model, batch_size):
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return lm_eval.simple_evaluate(
        model="sparseffn",
        model_args={"pretrained": str(folder / model)},
        batch_size=batch_size,
        # As its command line gives it, wherever JAX runs.
        device="cuda",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )


class Reference:
    """The three figures of the harness from full forward passes, one token after the other."""

    def __init__(self, folder):
        loaded = sf.load_pretrained(folder)
        self.model, self.params = loaded.model(), loaded.params
        self.tokenizer = sf.load_tokenizer(folder)
        self.forward = jax.jit(lambda ids: self.model.apply({"params": self.params}, ids))

    def next_token(self, context):
        ids = np.zeros((1, 64), np.int32)
        ids[0, : len(context)] = context
        logits = np.asarray(self.forward(ids)[0, len(context) - 1], np.float64)
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    def choose(self, question):
        scores = []
        for choice in question["choices"]:
            context = self.tokenizer.encode(question["context"])
            ids = self.tokenizer.encode(question["context"] + choice)
            places = range(len(context), len(ids))
            scores.append(sum(self.next_token(ids[:i])[ids[i]] for i in places))
        return scores

    def rolling(self, text):
        ids = [self.tokenizer.eos_token_id, *self.tokenizer.encode(text)]
        total = 0.0
        for i in range(1, len(ids)):
            # Whole windows one after the other, but the last one is moved back to be full too.
            begin = 64 * ((i - 1) // 64)
            if begin + 65 > len(ids):
                begin = max(0, len(ids) - 65)
            total += self.next_token(ids[begin:i])[ids[i]]
        return total

    def write(self, context):
        ids = self.tokenizer.encode(context)
        prompt = len(ids)
        while len(ids) < prompt + 12 and "\n" not in self.tokenizer.decode(ids[prompt:]):
            ids.append(int(np.argmax(self.next_token(ids))))
        return self.tokenizer.decode(ids[prompt:]).split("\n")[0]


@pytest.mark.parametrize(("model", "batch_size"), [("dense", 2), ("sparse", 3)])
def test_the_harness_runs_its_tasks(folder, monkeypatch, model, batch_size):
    out = run_harness(folder, monkeypatch, model, batch_size)
    reference = Reference(folder / model)
    samples = {
        name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in out["samples"].items()
    }
    for i, question in enumerate(QUESTIONS):
        choice, rolling, generation = (samples[name][i]["filtered_resps"] for name in TASKS)
        np.testing.assert_allclose(
            [score for score, _ in choice], reference.choose(question), atol=1e-3
        )
        assert rolling[0] == pytest.approx(reference.rolling(question["text"]), rel=1e-4)
        assert generation[0] == reference.write(question["context"])
    right = [np.argmax(reference.choose(question)) == question["answer"] for question in QUESTIONS]
    assert out["results"]["offline_choice"]["acc,none"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": "auto"}, "batch_size=auto must be a number"),
        ({"max_length": 65}, "window=65 must lie between 1 and"),
    ],
)
def test_wrong_settings_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        harness.SparseFFNLM(str(folder / "dense"), **settings)


def test_too_long_a_continuation_is_refused(folder):
    model = harness.SparseFFNLM(str(folder / "dense"))
    with pytest.raises(ValueError, match="70 tokens does not fit max_length=64"):
        model._loglikelihood_tokens([(("", ""), [1], [2] * 70)])
    with pytest.raises(ValueError, match="max_gen_toks=64 leaves no room"):
        model._generate([[1]], max_gen_toks=64)
