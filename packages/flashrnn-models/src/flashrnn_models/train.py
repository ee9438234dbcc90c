"""Train a character-level language model: `python -m flashrnn_models.train --help`."""

import argparse
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from flashrnn.backends import canonical
from flashrnn_core.cells import CELLS
from flashrnn_models.data import UserError, Vocabulary, read_text
from flashrnn_models.trainer import Settings, Trainer, build_model, load, sample

CPU = Settings(features=128, blocks=1, heads=4, batch=32, length=64, lr=0.01, steps=400, minutes=1.1)
GPU = Settings(features=512, blocks=3, heads=4, batch=64, length=256, lr=2e-3, steps=1500, minutes=5.0, dropout=0.2)
BITS = 1 / math.log(2)  # in a nat


def main(arguments: list[str] | None = None) -> int:
    """Run the program on the arguments of a command line.

    Returns the exit code: 0, 2 after a mistake of the user's, 130 after Ctrl-C.
    """
    options = parse(arguments)
    try:
        check(options)
        if options.sample is not None:
            return print_sample(options)
        with catch_interrupt() as interrupted:
            return run(options, interrupted)
    except (UserError, NotImplementedError) as error:  # of a backend that cannot run here
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        return 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. A setting that is not given is None."""
    parser = argparse.ArgumentParser(
        prog="flashrnn-train", description="Train a character-level recurrent language model."
    )
    add = parser.add_argument
    add("--text", metavar="FILE", help="UTF-8 text to learn from (Python's documentation topics)")
    add("--out", metavar="DIR", type=Path, default=Path("runs/char"), help="of checkpoint and curve (%(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in DIR")
    add("--sample", metavar="N", type=int, nargs="?", const=500, help="do not train, write N characters (500)")
    add("--prompt", metavar="TEXT", help='what a sample continues ("The ")')
    add("--temperature", type=float, default=0.8, help="of a sample; 0 takes the likeliest (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(here: %(default)s)")
    add("--backend", default="auto", help="of flashrnn (%(default)s)")
    settings = parser.add_argument_group(
        "settings",
        "With their defaults on a CPU / on a GPU. Of --steps and --minutes what comes first ends the "
        "training; both count from the start of the run, and giving one lifts the default of the other.",
    )
    for name, text in {
        "cell": " or ".join(CELLS),
        "features": "width of the model",
        "blocks": "number of blocks",
        "heads": "heads of each block",
        "batch": "streams of text read in parallel",
        "length": "characters a stream advances in a step",
        "lr": "highest learning rate",
        "dropout": "of what each branch adds",
        "seed": "of weights, batches and dropout",
        "steps": "steps of training",
        "minutes": "minutes of training",
    }.items():
        kind = {"cell": str, "lr": float, "dropout": float, "minutes": float}.get(name, int)
        both = f"({getattr(CPU, name)} / {getattr(GPU, name)})"
        settings.add_argument(f"--{name}", type=kind, metavar="X", help=f"{text} {both}")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raise UserError for a value that makes no sense."""
    for name in ("features", "blocks", "heads", "batch", "length", "lr"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: expected more than 0")
    for name in ("sample", "temperature", "dropout", "seed", "steps", "minutes"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise UserError(f"--{name} {value}: expected 0 or more")
    if options.dropout is not None and options.dropout >= 1:
        raise UserError(f"--dropout {options.dropout}: expected less than 1")
    if options.cell not in (None, *CELLS):
        raise UserError(f"--cell {options.cell}: expected {' or '.join(CELLS)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: PyTorch finds no GPU here")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {options.device}: PyTorch finds no such device here") from None
    try:
        canonical(options.backend)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def settings_for(options: argparse.Namespace, saved: dict[str, Any] | None) -> Settings:
    """The settings of a run: those given, then those of the checkpoint, then those of the device.

    Raises UserError for one that contradicts the checkpoint.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if saved:
        for name, value in given.items():
            if name not in ("steps", "minutes") and value != saved[name]:
                raise UserError(f"--{name} {value}: the checkpoint was trained with {saved[name]}")
    defaults = saved or dataclasses.asdict(GPU if options.device.startswith("cuda") else CPU)
    if "steps" in given or "minutes" in given:
        defaults = defaults | {"steps": None, "minutes": None}
    return Settings(**(defaults | given))


def run(options: argparse.Namespace, interrupted: Callable[[], bool]) -> int:
    """Train, evaluate, write a checkpoint and the curve, show a sample."""
    path = checkpoint_path(options)
    checkpoint = load(path) if options.resume else None
    if options.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a step is many small operations: a second thread gains little, or waits for a core
    settings = settings_for(options, checkpoint and checkpoint["settings"])
    text_path = options.text and str(Path(options.text).resolve())
    if checkpoint and not text_path:
        text_path = checkpoint["text_path"]
    text = read_text(text_path)
    trainer = Trainer(text, settings, options.device, options.backend, text_path)
    if checkpoint:
        trainer.restore(checkpoint)
    prompt = prompt_for(options, trainer.vocabulary)
    describe(trainer, text)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {options.out}: {error.strerror}") from None
    if path.exists() and not checkpoint and is_trained(path):
        previous = path.with_name("previous.pt")
        os.replace(path, previous)
        print(f"kept the checkpoint of an earlier run as {previous}")
    trainer.save(path)
    if trainer.progress >= 1:
        print("nothing left to train: give a larger --steps or --minutes, counted from the start of the run")
    train(trainer, path, interrupted)
    curve = options.out / "loss.png"
    if interrupted():
        trainer.save(path)
        plot(trainer, curve)
        print(f"interrupted after {trainer.step:,} steps; wrote {path}: --resume goes on, --sample writes from it")
        return 130
    bits = trainer.evaluate() * BITS
    trainer.save(path)
    plot(trainer, curve)
    print(
        f"held-out text: {bits:.3f} bits per character "
        f"({trainer.step:,} steps, {trainer.seconds:.0f} s of training)\n"
        f"wrote {path} and {curve}\nsample:\n"
    )
    print(prompt + trainer.sample(400, prompt, options.temperature))
    return 0


def is_trained(path: Path) -> bool:
    """Whether the checkpoint is of more than a start, or cannot be read."""
    try:
        return load(path)["step"] > 0
    except UserError:
        return True


def train(trainer: Trainer, path: Path, interrupted: Callable[[], bool]) -> None:
    """Train with a progress bar; evaluate at each fifth of the way, save then and once a minute."""
    first_step, first_second = trainer.step, trainer.seconds
    saved, fifth = time.monotonic(), int(5 * trainer.progress)
    terminal = sys.stderr.isatty()
    with tqdm(
        total=1.0,
        initial=min(trainer.progress, 1.0),
        bar_format="{percentage:3.0f}%|{bar:12}|{elapsed}<{remaining}{postfix}",
        mininterval=0.3 if terminal else 10,  # a log gets a line now and then
    ) as bar:
        for _ in trainer.train():
            if interrupted():
                break
            recent = trainer.losses[-20:]
            loss = sum(recent) / len(recent)
            tokens = (trainer.step - first_step) * trainer.settings.batch * trainer.settings.length
            speed = tokens / (trainer.seconds - first_second)
            bar.set_postfix_str(
                f"step {trainer.step}, loss {loss:.3f}, {loss * BITS:.3f} bits/char, {speed:,.0f} tokens/s",
                refresh=False,
            )
            bar.update(min(trainer.progress, 1.0) - bar.n)
            if int(5 * trainer.progress) > fifth and trainer.progress < 1:
                fifth = int(5 * trainer.progress)
                trainer.evaluate()
                saved = -math.inf
            if time.monotonic() - saved > 60:
                trainer.save(path)
                saved = time.monotonic()


def print_sample(options: argparse.Namespace) -> int:
    """Print what the model in the checkpoint writes after the prompt."""
    checkpoint = load(checkpoint_path(options))
    vocabulary = Vocabulary(checkpoint["vocabulary"])
    settings = Settings(**checkpoint["settings"])
    model = build_model(vocabulary, settings, options.backend).to(options.device)
    model.load_state_dict(checkpoint["model"])
    seed = settings.seed if options.seed is None else options.seed
    prompt = prompt_for(options, vocabulary)
    print(prompt + sample(model, vocabulary, options.sample, prompt, options.temperature, seed))
    return 0


def checkpoint_path(options: argparse.Namespace) -> Path:
    """Where the checkpoint is."""
    return options.out / "checkpoint.pt"


def prompt_for(options: argparse.Namespace, vocabulary: Vocabulary) -> str:
    """The prompt given, or "The " (a character of the text, should it lack one of these)."""
    if options.prompt:
        vocabulary.encode(options.prompt)  # raises before the training, not after it
        return options.prompt
    return "The " if set("The ") <= set(vocabulary.characters) else vocabulary.characters[0]


def describe(trainer: Trainer, text: str) -> None:
    """Say what is trained on what."""
    settings = trainer.settings
    source = trainer.text_path or "Python's documentation topics"
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(
        f"text: {source}, {len(text):,} characters ({len(trainer.held_out_tokens):,} held out), "
        f"{len(trainer.vocabulary)} different\n"
        f"model: {settings.cell}, {settings.blocks} x {settings.features} features in "
        f"{settings.heads} heads, {parameters:,} parameters, on {trainer.device}",
        flush=True,
    )


def plot(trainer: Trainer, path: Path) -> None:
    """Draw the loss against the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(trainer.losses) + 1), [x * BITS for x in trainer.losses], lw=1, label="training")
    if trainer.held_out:
        steps, losses = zip(*trainer.held_out, strict=True)
        axes.plot(steps, [x * BITS for x in losses], "o-", ms=4, label="held out")
        axes.set_title(f"{losses[-1] * BITS:.3f} bits per held-out character", loc="left")
    axes.set(xlabel="steps", ylabel="bits per character")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


@contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C (or a request to terminate) is only noted; another one, later, acts at once.

    Yields the function that tells whether there was one. Launchers such as `uv run` may pass on the signal that
    the program got from the terminal as well: what comes within a second is the same request.
    """
    noted: list[float] = []

    def note(number: int, frame: object) -> None:
        noted.append(time.monotonic())
        if noted[-1] > noted[0] + 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
