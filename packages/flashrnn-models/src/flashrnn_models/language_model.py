"""A language model: embedding, sLSTM blocks, head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flashrnn import Cell
from flashrnn_models.block import BlockState, SLSTMBlock
from flashrnn_models.initialization import small_init_


class LanguageModel(nn.Module):
    """logits[t] = W_head norm(blocks(embedding(tokens[..t]))), the scores of token t + 1.

    Args:
        vocab_size: V, number of different tokens.
        features: F, width of the residual stream.
        num_blocks, num_heads, conv_size, dropout, function, backend: see `SLSTMBlock`.

    Shapes:
        tokens: integer [B, T], each in [0, V).
        state: what an earlier call returned, or None to start.
        returns: logits [B, T, V] and the state after the last token, one `BlockState` a block.

    >>> import torch
    >>> from flashrnn_models import LanguageModel
    >>> model = LanguageModel(vocab_size=50, features=16, num_blocks=2, num_heads=2)
    >>> tokens = torch.randint(50, (3, 7))
    >>> logits, state = model(tokens)
    >>> logits.shape, len(state)
    (torch.Size([3, 7, 50]), 2)
    >>> logits, state = model(tokens, state)  # goes on where the first call ended
    >>> model.generate(tokens, length=4).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        num_blocks: int,
        num_heads: int = 4,
        conv_size: int = 4,
        dropout: float = 0.0,
        function: str | Cell = "slstm",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, features)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            SLSTMBlock(features, num_heads, block, num_blocks, conv_size, dropout, function, backend)
            for block in range(num_blocks)
        )
        self.norm = nn.LayerNorm(features, bias=False)
        self.head = nn.Linear(features, vocab_size, bias=False)
        small_init_(self.embedding.weight, features)
        small_init_(self.head.weight, features)

    def forward(
        self, tokens: Tensor, state: Sequence[BlockState] | None = None
    ) -> tuple[Tensor, tuple[BlockState, ...]]:
        x = self.dropout(self.embedding(tokens))  # B T F
        old: Sequence[BlockState | None] = [None] * len(self.blocks) if state is None else state
        new = []
        for block, block_state in zip(self.blocks, old, strict=True):
            x, block_state = block(x, block_state)
            new.append(block_state)
        return self.head(self.norm(x)), tuple(new)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        length: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """tokens[t + 1] ~ softmax(logits[t] / temperature), one step after another.

        Shapes: the prompt `tokens` [B, T], T >= 1 -> [B, length], what follows the prompt.
        Temperature 0 takes the likeliest token. Call `eval()` first if the model has dropout.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens: expected a prompt [B, T] with T >= 1, got {list(tokens.shape)}")
        if temperature < 0:
            raise ValueError(f"temperature: expected >= 0, got {temperature}")
        state, new = None, [tokens[:, :0]]
        for _ in range(length):
            logits, state = self(tokens, state)
            if temperature == 0:
                tokens = logits[:, -1:].argmax(-1)
            else:
                p = torch.softmax(logits[:, -1].float() / temperature, dim=-1)
                tokens = torch.multinomial(p, 1, generator=generator)
            new.append(tokens)
        return torch.cat(new, dim=1)
