"""The language model: what carrying its state and generating must equal."""

import pytest
import torch

from flashrnn_models import LanguageModel

V = 11


@pytest.fixture(params=["slstm", "lstm", "gru", "elman"])
def model(request):
    torch.manual_seed(0)
    model = LanguageModel(V, features=16, num_blocks=2, num_heads=2, function=request.param).double()
    for block in model.blocks:
        torch.nn.init.normal_(block.slstm.R, std=0.3)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_step_by_step_equals_parallel(model):
    tokens = torch.randint(V, (3, 10))
    logits, end = model(tokens)
    assert logits.shape == (3, 10, V)
    state = None
    for t in range(10):
        step, state = model(tokens[:, t : t + 1], state)
        torch.testing.assert_close(step[:, 0], logits[:, t], rtol=0, atol=1e-10)
    for block, expected in zip(state, end, strict=True):
        torch.testing.assert_close(tuple(block), tuple(expected), rtol=0, atol=1e-10)


def test_past_logits_do_not_see_later_tokens(model):
    tokens = torch.randint(V, (2, 10))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % V
    logits, other = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(other[:, :6], logits[:, :6], rtol=0, atol=0)
    assert (other[:, 6:] != logits[:, 6:]).any(-1).all()


def test_generate_takes_the_likeliest_of_the_parallel_logits(model):
    prompt = torch.randint(V, (2, 4))
    new = model.generate(prompt, length=8, temperature=0)
    tokens = prompt
    for _ in range(8):  # no state: everything anew for each token
        tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(new, tokens[:, 4:])


def test_generate_samples_the_softmax(model):
    prompt = torch.randint(V, (1, 4))
    p = torch.softmax(model(prompt)[0][0, -1] / 1.5, -1)
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    new = model.generate(prompt.expand(count, -1), 1, temperature=1.5, generator=generator)
    frequency = torch.bincount(new[:, 0], minlength=V) / count
    assert (frequency - p).abs().max() < 5 * (0.25 / count) ** 0.5  # five standard deviations at most


def test_generate_refuses(model):
    with pytest.raises(ValueError, match=r"tokens: expected a prompt \[B, T\] with T >= 1, got \[2, 0\]"):
        model.generate(torch.zeros(2, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="temperature: expected >= 0, got -1"):
        model.generate(torch.zeros(2, 1, dtype=torch.int64), 3, temperature=-1)


def test_gradient_stops_at_a_detached_state():
    torch.manual_seed(0)
    model = LanguageModel(V, features=16, num_blocks=1, num_heads=2)
    _, (state,) = model(torch.randint(V, (2, 5)))
    detached = state.detach()
    assert state.cell.requires_grad
    assert not detached.cell.requires_grad
    assert not detached.conv.requires_grad
    torch.testing.assert_close(tuple(detached), tuple(state))


def test_bfloat16_autocast_follows_float32(model):
    tokens = torch.randint(V, (3, 10))
    model = model.float()
    expected = model(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens[:, :5])
        second, _ = model(tokens[:, 5:], state)
    logits = torch.cat([logits, second], 1).float()
    error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.02  # bfloat16 has eight bits
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
