"""Text as streams of characters: reading, vocabulary, batches for truncated backpropagation."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class UserError(Exception):
    """Something the user can put right; the program prints the message alone."""


def read_text(path: str | None = None) -> str:
    """The text of a UTF-8 file, or the documentation topics of Python's standard library.

    The topics repeat themselves (a fifth of their paragraphs are copies); each paragraph is kept
    once, so that no paragraph of the held-out text is seen in training. Tables are left out.

    Raises UserError if the file is missing or is not text.
    """
    if path is None:
        from pydoc_data.topics import topics  # 0.4 MB of English, in every Python

        paragraphs = "\n\n".join(topics.values()).split("\n\n")
        prose = [p for p in paragraphs if not p.lstrip().startswith(("|", "+-"))]
        return "\n\n".join(dict.fromkeys(prose))
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror}") from None


class Vocabulary:
    """The different characters of a text; a character's token is its place among them.

    >>> vocabulary = Vocabulary("hello")
    >>> vocabulary.characters, vocabulary.encode("hole")
    ('ehlo', tensor([1, 3, 2, 0]))
    >>> vocabulary.decode(vocabulary.encode("hole"))
    'hole'
    """

    def __init__(self, text: str) -> None:
        self.characters = "".join(sorted(set(text)))
        self._codes = _codes(self.characters)

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Tokens [len(text)], int64. Raises UserError for a character the vocabulary lacks."""
        codes = _codes(text)
        tokens = np.searchsorted(self._codes, codes)
        unknown = np.flatnonzero(~np.isin(codes, self._codes))
        if unknown.size:
            raise UserError(f"the character {text[unknown[0]]!r} is not in the text that the model learns from")
        return torch.from_numpy(tokens)

    def decode(self, tokens: Tensor) -> str:
        """The characters of tokens [T]."""
        return "".join(self.characters[token] for token in tokens.tolist())


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens to train on, and the last tenth, held out. Raises UserError if that is less than two."""
    held_out = len(tokens) // 10
    if held_out < 2:
        raise UserError(f"the text is too short: {len(tokens)} characters; at least 20 are needed")
    return tokens[:-held_out], tokens[-held_out:]


class Streams:
    """B places of a text read in parallel, T characters a step: batch k goes on where k - 1 ended.

    An epoch reads (nearly) the whole text and starts from a random offset of its own, fixed by the
    seed, so batch k is the same whenever it is asked for. The text is a ring: its end leads to its
    beginning.

    `streams[k]` gives tokens [B, T], targets [B, T] (the tokens one character later) and whether an
    epoch starts here, so that the state should be dropped.

    >>> streams = Streams(torch.arange(100), batch=2, length=10)
    >>> tokens, targets, fresh = streams[3]
    >>> tokens.shape, fresh, bool((targets == (tokens + 1) % 100).all())
    (torch.Size([2, 10]), False, True)
    >>> bool((streams[4][0][:, 0] == targets[:, -1]).all())
    True
    """

    def __init__(self, tokens: Tensor, batch: int, length: int, seed: int = 0) -> None:
        self.tokens, self.batch, self.length, self.seed = tokens, batch, length, seed
        self.stream = len(tokens) // batch
        self.steps = self.stream // length  # in an epoch
        if self.steps == 0:
            raise UserError(
                f"the text is too short: {len(tokens):,} characters to train on, but {batch} streams of "
                f"{length} need {batch * length:,}; give more text or a smaller --batch or --length"
            )

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, bool]:
        epoch, k = divmod(step, self.steps)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        offset = int(torch.randint(len(self.tokens), (), generator=generator))
        first = offset + k * self.length + self.stream * torch.arange(self.batch)  # B
        chunk = self.tokens[(first[:, None] + torch.arange(self.length + 1)) % len(self.tokens)]  # B T+1
        return chunk[:, :-1], chunk[:, 1:], k == 0
