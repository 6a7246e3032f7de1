"""The pages of help: short, whole sentences, an example that is taken, and no slow import."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sparseffn_jax as sf
from sparseffn_jax.cli import COMMANDS, main
from sparseffn_jax.commands.arguments.finetune import FinetuneArguments, TrainArguments
from sparseffn_jax.commands.parser import options, parse
from sparseffn_jax.train.choices import STAGES
from sparseffn_jax.train.recipes import RECIPES


def page(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_fits_a_screen(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    short = page(capsys, *name.split(), "--help")
    whole = page(capsys, *name.split(), "--help-all")
    for text in (short, whole):
        assert max(map(len, text.splitlines())) <= 100
        assert "``" not in text
        assert str(Path(sf.__file__).parent) not in text
    assert len(short.splitlines()) < 50
    # Every option is on the long page.
    for option in options(COMMANDS[name].arguments()):
        assert option.flag in whole or f"--[no-]{option.flag[2:]}" in whole
    example = shlex.split(short.partition("example: ")[2])
    words = example[1 + len(name.split()) :]
    assert example[: len(example) - len(words)] == ["sparseffn", *name.split()]
    assert parse(COMMANDS[name].arguments(), "sparseffn", words)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_sentence(name):
    cls = COMMANDS[name].arguments()
    found = list(options(cls))
    assert {n for group in cls.groups.values() for n in group} <= {o.name for o in found}
    for option in found:
        assert re.match(r"[A-Z].*[.\])]$", option.help), option
        assert len(option.help.split()) >= 3
        assert not re.search(r'^Of |\bsee "|:[a-z]+:|`', option.help), option.help


def test_the_overview_has_each_command_and_loads_nothing(capsys):
    out = page(capsys, "--help")
    for name, command in COMMANDS.items():
        assert f"  {name} " in out
        assert command.summary in out
    code = (
        "import sys; from sparseffn_jax.cli import COMMANDS; "
        "[command.arguments() for command in COMMANDS.values()]; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert not {"jax", "flax", "numpy", "transformers", "huggingface_hub"}.intersection(loaded)


def finetune(*words):
    return parse(FinetuneArguments, "sparseffn finetune", ["--model", "m", "--out", "o", *words])


def test_hugging_faces_words_are_taken():
    theirs = (
        "--lr 1e-4 --max_steps 20 --block_size 128 --gradient-accumulation-steps 4 --bf16 "
        "--max-grad-norm=0.5 --logging_steps 5 --save-steps 7 --gradient-checkpointing"
    )
    ours = (
        "--learning-rate 1e-4 --steps 20 --window 128 --accumulate-steps 4 --dtype bfloat16 "
        "--clip-norm 0.5 --log-every 5 --save-every 7 --remat"
    )
    assert finetune(*theirs.split()) == finetune(*ours.split())
    assert finetune("--fp16").dtype == "float16"
    assert finetune("--no-remat").remat is False


def test_a_batch_is_counted_as_hugging_face_does():
    train = finetune("--per_device_train_batch_size", "3", "--accumulate-steps", "4").train
    assert [train.config(shards).batch_size for shards in (1, 2)] == [12, 24]
    assert type(train.config(2)) is sf.TrainConfig
    assert train.config(1) == sf.TrainConfig(batch_size=12, accumulate_steps=4)
    assert TrainArguments(batch_size=16).config(2) == sf.TrainConfig(batch_size=16)


def test_the_stages_are_those_of_the_recipes():
    assert {name: len(stages) for name, stages in RECIPES.items()} == STAGES
