"""Wrong uses that need no model to be seen: one clear line, exit 2, and nothing is loaded."""

import os
import time

import pytest

from sparseffn_jax import cli
from sparseffn_jax.defaults import EMBEDDED_MODEL

USES = [
    ("", "usage: sparseffn COMMAND"),
    ("generat", "there is no command 'generat': did you mean generate?"),
    ("bench modle", "there is no command 'bench modle': did you mean bench model?"),
    ("convert --dtype bfloat16", "convert has no option --dtype: did you mean --timed-dtype?"),
    ("convert {model} --out {dir}/o --fflops 0.4", "no option --fflops: did you mean --flops?"),
    ("finetune {model} --out {dir}/o --gradient-acumulation-steps 2",
     "did you mean --gradient-accumulation-steps?"),
    ("finetune {model} --out {dir}/o --bf61", "no option --bf61: did you mean --bf16?"),
    ("finetune {model}", "finetune: it needs --out"),
    ("evaluate {model} --text", "--text: expected one argument"),
    ("evaluate {model} --text a b", "does not know what 'b' belongs to"),
    ("finetune {model} --out {dir}/o --steps 0", "--steps 0 must be at least 1"),
    ("finetune {model} --out {dir}/o --steps ten", "--steps: invalid int value: 'ten'"),
    ("finetune {model} --out {dir}/o --lr -1", "--learning-rate -1.0 must be positive"),
    ("finetune {model} --out {dir}/o --recipe magic",
     "unknown recipe 'magic': expected one of full, ffn_only, lora, stepwise"),
    ("finetune {model} --out {dir}/o --strategy magic", "invalid choice: 'magic' (choose from"),
    ("finetune {model} --out {dir}/o --strategy mesh", "needs the sizes of a mesh"),
    ("finetune {model} --out {dir}/o --dtype bf16", "--dtype: invalid choice: 'bf16'"),
    ("finetune {model} --out {dir}/o --batch-size 6 --accumulate-steps 4",
     "--accumulate-steps 4 does not divide --batch-size 6"),
    ("finetune {model} --out {dir}/o --batch-size 4 --per-device-batch-size 2",
     "--batch-size 4 and --per-device-batch-size 2 say the same: give one"),
    ("finetune {model} --out {dir}/o --distill-weight 0.5", "need --teacher"),
    ("finetune {model} --out {dir}/o --teacher gpt2", "--teacher is not used"),
    ("finetune {model} --out {dir}/file.txt/o", "file.txt is a file; give another"),
    ("finetune --model {dir}/nothing --out {dir}/o", "there is no folder {dir}/nothing"),
    ("finetune --model {dir}/file.txt --out {dir}/o", "file.txt is a file: give the folder"),
    ("evaluate --model {dir}/nothing.gguf --text {dir}/file.txt", "nothing.gguf"),
    ("evaluate {model} --text {dir}/nothing.txt", "there is no file or folder"),
    ("evaluate {model} --text /proc/self/maps", "/proc/self/maps is no ordinary file"),
    ("evaluate {model} --text /dev/zero", "/dev/zero is no ordinary file"),
    ("evaluate --model /dev/null --text {dir}/file.txt", "/dev/null is a file"),
    ("evaluate {model} --text {dir}/file.txt --window -5", "--window -5 must be at least 1"),
    ("evaluate {model} --text {dir}/file.txt --plans {dir}/no.json", "there is no file"),
    ("convert {model} --out {dir}", "name another folder, or pass --overwrite to replace it"),
    ("convert {model} --out {dir}/file.txt", "file.txt is a file: name a folder"),
    ("convert {model} --out {embedded} --overwrite", "holds the model that is read"),
    ("convert {model} --out {dir}/o --calibration-tokens -1", "--calibration-tokens -1 must be"),
    ("convert {model} --out {dir}/o --repair 2", "--repair 2.0 must lie between 0 and 1"),
    ("convert {model} --out {dir}/o --speedup 2 --max-loss 1", "2 are given"),
    ("plan {model} --out {dir}/o --flops 1.5", "--flops 1.5 is a share of the dense FFNs"),
    ("plan {model} --out {dir}/o --trials -1 --flops 0.5", "--trials -1 must be at least 0"),
    ("generate --temperature -1", "--temperature -1.0 must be at least 0"),
    ("generate --prompt a --prompt-file {dir}/file.txt", "exclude each other"),
    ("generate --prompt-file {dir}/nothing.txt", "there is no file {dir}/nothing.txt"),
    ("inspect --tokens 0", "--tokens 0 must be at least 1"),
    ("inspect --autotune", "--autotune needs --plans"),
    ("inspect --json --device h100", "--json prints configurations alone"),
    ("demo --flops 1.5 --out {dir}/o", "FLOPs ratio of 1.5"),
    ("bench ffn --d-model 100", "--d-model 100 and --d-ff 3072 must be multiples"),
    ("bench model --layers 99", "--layers 99 must lie between 1 and 12"),
    ("bench quality --targets 0.5 --out {dir}/o", "a target speed-up of 0.5 must be above 1"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), USES)
def test_wrong_use_is_one_line_at_once(argv, message, tmp_path, monkeypatch, capfd):
    def work(_):
        pytest.fail("it is seen before anything is loaded")

    monkeypatch.setattr(cli._Command, "work", work)
    (tmp_path / "file.txt").write_text("text\n")
    places = {"dir": tmp_path, "embedded": EMBEDDED_MODEL, "model": f"--model {EMBEDDED_MODEL}"}
    before = sorted(tmp_path.rglob("*"))
    started = time.process_time()
    with pytest.raises(SystemExit) as stop:
        cli.main(argv.format(**places).split())
    assert time.process_time() - started < 3.0
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    assert message.format(**places) in out + err
    assert len(err.splitlines()) <= 1
    assert "=" not in err.replace("data=2", "").replace("fsdp=2", "").replace("tensor=2", "")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path, capfd):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", "--model", str(EMBEDDED_MODEL), "--out", str(tmp_path / "out")])
    assert "Permission denied" in capfd.readouterr().err


def test_a_full_disk_is_said(tmp_path, monkeypatch, capfd):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(cli, "_run", full)
    monkeypatch.setattr(cli._Command, "work", lambda _: None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", "--model", str(EMBEDDED_MODEL), "--out", str(tmp_path / "out")])
    assert "error: the disk that has model.safetensors is full" in capfd.readouterr().err
