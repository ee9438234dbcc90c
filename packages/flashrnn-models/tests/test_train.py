"""The training program: its data, its trainer, and the command line as a user meets it."""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from flashrnn_models.data import Streams, UserError, Vocabulary, read_text, split
from flashrnn_models.train import main
from flashrnn_models.trainer import Settings, Trainer, load

TINY = Settings(features=16, blocks=1, heads=2, batch=4, length=8, lr=0.01, steps=6, minutes=None)
TINY_OPTIONS = ["--device=cpu", "--features=16", "--blocks=1", "--heads=2", "--batch=4", "--length=8"]
PROSE = "".join(f"{n} times {n + 1} is {n * (n + 1)}; whoever says otherwise is wrong.\n" for n in range(100))


@pytest.fixture
def command(tmp_path):
    """The command line for a tiny model on a short text, as a function of further arguments."""
    text = tmp_path / "prose.txt"
    text.write_text(PROSE)
    return lambda *more: ["--out", str(tmp_path / "run"), "--text", str(text), *TINY_OPTIONS, *more]


# data


def test_default_text_is_long_and_holds_out_paragraphs_not_trained_on():
    text = read_text()
    assert len(text) > 200_000
    vocabulary = Vocabulary(text)
    train, held_out = (vocabulary.decode(tokens) for tokens in split(vocabulary.encode(text)))
    assert train + held_out == text
    assert 0.09 < len(held_out) / len(text) <= 0.1
    shared = set(train.split("\n\n")[:-1]) & set(held_out.split("\n\n")[1:])
    assert not shared


def test_vocabulary_round_trip():
    text = "plain, ümläut, 漢字, 🙂\n"
    vocabulary = Vocabulary(text)
    assert vocabulary.encode(text).tolist() == [sorted(set(text)).index(c) for c in text]
    assert vocabulary.decode(vocabulary.encode(text)) == text
    with pytest.raises(UserError, match="'x'"):
        vocabulary.encode("max")


def test_streams_read_every_place_once_an_epoch():
    tokens = torch.arange(1000)
    streams = Streams(tokens, batch=5, length=20, seed=3)
    assert streams.steps == 10
    epochs = [[streams[k] for k in range(e * 10, e * 10 + 10)] for e in range(2)]
    for epoch in epochs:
        assert [fresh for _, _, fresh in epoch] == [True] + [False] * 9
        read = torch.cat([x for x, _, _ in epoch], 1)
        assert sorted(read.flatten().tolist()) == list(range(1000))
        assert ((read[:, 1:] - read[:, :-1]) % 1000 == 1).all()  # each stream goes on where it was
        assert all(((y - x) % 1000 == 1).all() for x, y, _ in epoch)
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    assert torch.equal(streams[4][0], Streams(tokens, 5, 20, seed=3)[4][0])


# trainer


def test_learns_a_tiny_text_by_heart():
    text = "the quick brown fox jumps over the lazy dog. " * 40
    trainer = Trainer(text, dataclasses.replace(TINY, features=32, lr=0.02, steps=150))
    for _ in trainer.train():
        pass
    assert len(trainer.losses) == trainer.step == 150
    assert trainer.losses[0] > 2.5
    assert trainer.evaluate() < 0.15  # nats a character, the starts of the streams included
    expected = "brown fox jumps over the lazy dog. the quick brown fox jumps"
    assert trainer.sample(len(expected), "the quick ", temperature=0.0) == expected


def test_resumed_training_equals_uninterrupted(tmp_path):
    settings = dataclasses.replace(TINY, dropout=0.3, steps=12)  # with dropout: its random numbers resume too
    whole = Trainer(PROSE, settings)
    for _ in whole.train():
        pass
    part = Trainer(PROSE, settings)
    for _ in range(5):
        part.train_step()
    part.save(tmp_path / "checkpoint.pt")
    torch.manual_seed(12345)
    resumed = Trainer(PROSE, settings)
    resumed.restore(load(tmp_path / "checkpoint.pt"))
    assert resumed.step == 5
    for _ in resumed.train():
        pass
    assert resumed.losses == whole.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_evaluation_equals_numpy():
    trainer = Trainer(PROSE, TINY)
    torch.nn.init.normal_(trainer.model.head.weight)
    tokens = trainer.held_out_tokens
    B = len(tokens) // (4 * TINY.length)
    T = (len(tokens) - 1) // B
    assert B > 1
    assert T % TINY.length  # the last chunk is a shorter one
    total = 0.0
    for k in range(B):
        part = tokens[k * T : (k + 1) * T + 1]
        logits = trainer.model(part[None, :-1])[0][0].detach().double().numpy()
        total += (np.log(np.exp(logits).sum(1)) - logits[np.arange(T), part[1:].numpy()]).sum()
    assert math.isclose(trainer.evaluate(), total / (B * T), rel_tol=1e-5)
    trainer.model.head.weight.data.zero_()
    assert math.isclose(trainer.evaluate(), math.log(len(trainer.vocabulary)), rel_tol=1e-6)


def test_training_reads_the_chunks_in_turn_with_carried_state():
    """The loss of the second step is that of a model which has seen the first chunk."""
    trainer = Trainer(PROSE, dataclasses.replace(TINY, lr=1e-12, steps=2))
    for _ in trainer.train():
        pass
    (x, _, _), (y, targets, _) = trainer.streams[0], trainer.streams[1]
    logits = trainer.model(torch.cat([x, y], 1))[0][:, x.shape[1] :]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert math.isclose(trainer.losses[1], expected.item(), rel_tol=1e-5)


def test_budget():
    by_both = dataclasses.replace(TINY, steps=100, minutes=1.0)
    assert by_both.progress(50, 6.0) == 0.5
    assert by_both.progress(50, 54.0) == 0.9
    assert dataclasses.replace(TINY, steps=None, minutes=2.0).progress(10**6, 60) == 0.5
    assert dataclasses.replace(TINY, steps=0).progress(0, 0) == 0
    rates = [by_both.learning_rate(step, step / 100) for step in range(101)]
    assert max(rates) <= by_both.lr
    assert rates[0] == by_both.lr / 20
    assert math.isclose(rates[100], by_both.lr / 20)


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    trainer = Trainer(PROSE, TINY)
    trainer.save(path)
    before = path.read_bytes()

    def half(checkpoint, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        trainer.save(path)
    assert path.read_bytes() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_in_bfloat16_learns_what_the_cpu_learns():
    losses = {}
    for device in ("cpu", "cuda"):
        trainer = Trainer(PROSE, dataclasses.replace(TINY, features=32, steps=50), device)
        for _ in trainer.train():
            pass
        losses[device] = trainer.evaluate()
        assert len(trainer.sample(10, "1", 1.0)) == 10
    assert losses["cpu"] < 2.5
    assert math.isclose(losses["cuda"], losses["cpu"], rel_tol=0.05)


def test_loss_that_is_not_finite_is_reported():
    trainer = Trainer(PROSE, TINY)
    trainer.model.head.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="lower --lr"):
        list(trainer.train())


def test_a_last_step_that_breaks_the_model_is_reported():
    """Its loss is that before the step; the evaluation behind it sees what it did."""
    trainer = Trainer(PROSE, dataclasses.replace(TINY, lr=1e30, steps=1))
    list(trainer.train())
    with pytest.raises(UserError, match="lower --lr"):
        trainer.evaluate()
    assert trainer.held_out == []


def test_all_losses_are_read_at_the_end_of_the_time():
    trainer = Trainer(PROSE, dataclasses.replace(TINY, steps=None, minutes=0.005))
    list(trainer.train())
    assert len(trainer.losses) == trainer.step > 0


# command line


def test_false_starts_leave_what_was_trained(command, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command("--steps", "3")) == 0
    for _ in range(2):
        assert main(command("--backend", "cuda_fused")) == 2
        assert "error: backend 'cuda_fused' cannot run this call: it runs on CUDA tensors" in capsys.readouterr().err
    assert load(run / "checkpoint.pt")["step"] == 0
    assert load(run / "previous.pt")["step"] == 3


def test_train_resume_and_sample(command, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command("--steps", "4")) == 0
    out = capsys.readouterr().out
    bits = float(re.search(r"held-out text: ([\d.]+) bits per character \(4 steps", out)[1])
    checkpoint = load(run / "checkpoint.pt")
    assert math.isclose(bits, checkpoint["held_out"][-1][1] / math.log(2), abs_tol=1e-3)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("*.part"))

    # the text and the settings come from the checkpoint
    assert main(["--out", str(run), "--device", "cpu", "--resume", "--steps", "7"]) == 0
    assert load(run / "checkpoint.pt")["losses"][:4] == checkpoint["losses"]
    assert "(7 steps" in capsys.readouterr().out
    assert main(["--out", str(run), "--device", "cpu", "--resume"]) == 0
    assert "nothing left to train" in capsys.readouterr().out

    samples = []
    for more in ([], [], ["--seed", "5"], ["--prompt", "12 times "]):
        assert main(["--out", str(run), "--device", "cpu", "--sample", "40", *more]) == 0
        samples.append(capsys.readouterr().out)
    assert samples[0] == samples[1] != samples[2]
    assert samples[3].startswith("12 times ")
    assert len(samples[3]) == len("12 times ") + 40 + len("\n")

    assert main(command("--steps", "1")) == 0  # a new run puts the old one aside
    assert load(run / "previous.pt")["step"] == 7


def test_interrupt_leaves_a_usable_checkpoint(command, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    arguments = [sys.executable, "-m", "flashrnn_models.train", *command("--minutes", "5")]
    paths = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}  # what pytest found is found there too
    env = os.environ | paths
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        for _ in range(2):  # the second one as if passed on by a launcher
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    steps = int(re.search(r"interrupted after ([\d,]+) steps", out)[1].replace(",", ""))
    assert "Traceback" not in err
    saved = load(checkpoint)
    assert saved["step"] == steps == len(saved["losses"]) > 0
    run = ["--out", str(checkpoint.parent), "--device", "cpu"]
    assert main([*run, "--sample", "10"]) == 0
    assert main([*run, "--resume", "--steps", str(steps + 2)]) == 0
    assert f"({steps + 2:,} steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", "no such file"], "--text .*no such file: No such file"),
        (["--text", "."], "--text .*: Is a directory"),
        (["--batch", "1000"], "the text is too short: .* need 8,000"),
        (["--heads", "3"], "hidden_size 16 does not split into 3 heads"),
        (["--cell", "mgu"], "--cell mgu: expected elman or gru or lstm or slstm"),
        (["--backend", "mine"], "--backend: expected auto, cuda_fused, cuda, triton, vanilla, got 'mine'"),
        (["--device", "tpu"], "--device tpu: PyTorch finds no such device here"),
        (["--lr", "-1"], r"--lr -1.0: expected more than 0"),
        (["--steps", "-1"], "--steps -1: expected 0 or more"),
        (["--dropout", "1"], "--dropout 1.0: expected less than 1"),
        (["--prompt", "日"], "the character '日' is not in the text"),
        (["--resume"], "no checkpoint at .*checkpoint.pt: train first"),
        (["--sample"], "no checkpoint at .*checkpoint.pt: train first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_one_plain_line(command, more, message, capsys):
    assert main(command(*more)) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: {message}.*\n", error), error


def test_text_that_is_not_text(tmp_path, command, capsys):
    (tmp_path / "bad").write_bytes(b"abc\xff\xfe")
    assert main(command("--text", str(tmp_path / "bad"))) == 2
    assert "not UTF-8 text (invalid start byte at byte 3)" in capsys.readouterr().err
    (tmp_path / "bad").write_text("short")
    assert main(command("--text", str(tmp_path / "bad"))) == 2
    assert "the text is too short: 5 characters" in capsys.readouterr().err


def test_checkpoint_that_does_not_fit(tmp_path, command, capsys):
    assert main(command("--steps", "0")) == 0
    assert main(command("--resume", "--features", "32")) == 2
    assert "--features 32: the checkpoint was trained with 16" in capsys.readouterr().err
    (tmp_path / "prose.txt").write_text(PROSE.upper())
    assert main(command("--resume")) == 2
    assert "the checkpoint was trained on another text" in capsys.readouterr().err
    path = tmp_path / "run" / "checkpoint.pt"
    saved = load(path)
    torch.save(saved | {"format": 99}, path)
    assert main(command("--resume")) == 2
    assert "has checkpoint format 99; this program reads 1" in capsys.readouterr().err
    for content in (b"", b"not a checkpoint", path.read_bytes()[:1000]):
        path.write_bytes(content)
        assert main(command("--sample")) == 2
        assert "is not a checkpoint of this program" in capsys.readouterr().err
