"""The training loop: truncated backpropagation with carried states, evaluation, checkpoints."""

import dataclasses
import hashlib
import math
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashrnn_models.block import BlockState
from flashrnn_models.data import Streams, UserError, Vocabulary, split
from flashrnn_models.language_model import LanguageModel

FORMAT = 1  # of the checkpoint


@dataclasses.dataclass
class Settings:
    """What fixes a training run, besides the text."""

    features: int  # width of the model
    blocks: int  # number of blocks
    heads: int  # heads of each block
    batch: int  # streams of text read in parallel
    length: int  # characters a stream advances in a step, all backpropagated through
    lr: float  # highest learning rate
    steps: int | None  # end of training, counted from the start of the run (None: no limit)
    minutes: float | None  # end of training, counted from the start of the run (None: no limit)
    dropout: float = 0.0  # of what each branch adds
    cell: str = "slstm"  # a name of flashrnn_core.cells.CELLS
    seed: int = 0  # of weights, batches and dropout

    def progress(self, step: int, seconds: float) -> float:
        """The part of the budget that is used up; training ends at 1."""
        by_steps = 0.0 if self.steps is None else step / max(self.steps, 1e-9)
        by_time = 0.0 if self.minutes is None else seconds / max(60 * self.minutes, 1e-9)
        return max(by_steps, by_time)

    def learning_rate(self, step: int, progress: float) -> float:
        """Linear over the first 20 steps, then a cosine down to a twentieth at progress 1."""
        warmup = min(1.0, (step + 1) / 20)
        return self.lr * warmup * (0.525 + 0.475 * math.cos(math.pi * min(progress, 1.0)))


class Trainer:
    """A model, its optimizer and its place in a text.

    `losses[k]` is the loss of step k and `held_out` holds pairs (steps done, held-out loss), all in
    nats a character. The same text, settings and device give the same numbers, interrupted or not,
    as long as `settings.minutes` is None (a clock does not repeat itself).
    """

    def __init__(
        self,
        text: str,
        settings: Settings,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        text_path: str | None = None,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device, self.text_path = settings, torch.device(device), text_path
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.vocabulary = Vocabulary(text)
        train, self.held_out_tokens = split(self.vocabulary.encode(text))
        self.streams = Streams(train, settings.batch, settings.length, settings.seed)
        self.model = build_model(self.vocabulary, settings, backend).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr, betas=(0.9, 0.98))
        self.state: tuple[BlockState, ...] | None = None
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float]] = []
        self._unread: list[Tensor] = []  # losses still on the device

    @property
    def progress(self) -> float:
        """The part of the budget that is used up; training ends at 1."""
        return self.settings.progress(self.step, self.seconds)

    def train(self) -> Iterator[None]:
        """Steps until the budget is used up; yields each time losses have been read, about 3 a second.

        Raises UserError if the loss is no longer finite.
        """
        read = time.perf_counter()
        while self.progress < 1:
            begin = time.perf_counter()
            self.train_step()
            if begin - read > 0.3 or self.progress >= 1:  # reading waits for the device: not at each step
                self._read_losses()
                read = begin
            self.seconds += time.perf_counter() - begin
            if not self._unread:
                yield
        if self._unread:  # where the budget is of time
            self._read_losses()
            yield

    def train_step(self) -> None:
        """One step of the optimizer, on the next chunk of every stream."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(self.step, self.progress)
        tokens, targets, fresh = self.streams[self.step]
        self.model.train()
        loss, state = self._loss(tokens, targets, None if fresh else self.state)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.state = tuple(block.detach() for block in state)
        self._unread.append(loss.detach())
        self.step += 1

    def _loss(
        self, tokens: Tensor, targets: Tensor, state: tuple[BlockState, ...] | None
    ) -> tuple[Tensor, tuple[BlockState, ...]]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits, new_state = self.model(tokens.to(self.device), state)
        logits = logits.flatten(0, 1).float()  # B*T V
        return nn.functional.cross_entropy(logits, targets.flatten().to(self.device)), new_state

    def _read_losses(self) -> None:
        if not self._unread:
            return
        self.losses += torch.stack(self._unread).tolist()
        self._unread = []
        self._check(self.losses[-1])

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} by step {self.step}: "
                "start again with a lower --lr (the checkpoint is from before)"
            )

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss on the held-out text, nats a character, read as up to 64 streams from no state.

        Raises UserError if it is not finite.
        """
        self.model.eval()
        length = self.settings.length
        B = max(1, min(64, len(self.held_out_tokens) // (4 * length)))
        T = (len(self.held_out_tokens) - 1) // B
        tokens = self.held_out_tokens[: B * T].view(B, T)
        targets = self.held_out_tokens[1 : B * T + 1].view(B, T)
        total, state = 0.0, None
        for t in range(0, T, length):
            loss, state = self._loss(tokens[:, t : t + length], targets[:, t : t + length], state)
            total += loss.item() * min(length, T - t)
        self._check(total)
        self.held_out.append((self.step, total / T))
        return total / T

    def sample(self, length: int, prompt: str, temperature: float = 0.8) -> str:
        """`length` characters that the model writes after `prompt`; the same each time."""
        return sample(self.model, self.vocabulary, length, prompt, temperature, self.settings.seed)

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all: to a file beside `path`, then renamed."""
        self._read_losses()
        checkpoint = {
            "format": FORMAT,
            "settings": dataclasses.asdict(self.settings),
            "text_path": self.text_path,
            "fingerprint": self.fingerprint,
            "vocabulary": self.vocabulary.characters,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": None if self.state is None else [tuple(block) for block in self.state],
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "held_out": self.held_out,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint that `load` returned. Raises UserError if its text was another."""
        if checkpoint["fingerprint"] != self.fingerprint:
            raise UserError("the checkpoint was trained on another text: resume with that --text")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["state"] is not None:
            self.state = tuple(BlockState(*(x.to(self.device) for x in s)) for s in checkpoint["state"])
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        self.losses, self.held_out = list(checkpoint["losses"]), list(checkpoint["held_out"])
        torch.set_rng_state(checkpoint["rng"])
        if self.device.type == "cuda" and checkpoint["rng_cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["rng_cuda"], self.device)


def build_model(vocabulary: Vocabulary, settings: Settings, backend: str = "auto") -> LanguageModel:
    """The model that the settings describe, with fresh weights. Raises UserError if there is none."""
    try:
        return LanguageModel(
            len(vocabulary),
            settings.features,
            settings.blocks,
            settings.heads,
            dropout=settings.dropout,
            function=settings.cell,
            backend=backend,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def load(path: Path) -> dict[str, Any]:
    """The checkpoint in a file, on the CPU. Raises UserError if there is none or it is not one of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["format"]
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: train first, or name its folder with --out") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a checkpoint of this program") from None
    if found != FORMAT:
        raise UserError(f"{path} has checkpoint format {found}; this program reads {FORMAT}")
    return checkpoint


def sample(
    model: LanguageModel, vocabulary: Vocabulary, length: int, prompt: str, temperature: float, seed: int
) -> str:
    """`length` characters that the model writes after `prompt`."""
    model.eval()
    device = next(model.parameters()).device
    tokens = vocabulary.encode(prompt)[None].to(device)  # B=1 T
    generator = torch.Generator(device).manual_seed(seed)
    return vocabulary.decode(model.generate(tokens, length, temperature, generator)[0])
