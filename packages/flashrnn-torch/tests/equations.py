"""The contract's equations once more, by hand in plain PyTorch, differentiated by autograd alone.

Shares no code with the library, so that the library's tracing, derivation and scans have something to be compared to.
"""

import torch
from torch.nn.functional import logsigmoid


def elman(wx, r, b, h):
    return (torch.tanh(wx[0] + r[0] + b[0]),)


def lstm(wx, r, b, h, c):
    i, f, z, o = (w + x + y for w, x, y in zip(wx, r, b, strict=True))
    c_new = f.sigmoid() * c + i.sigmoid() * z.tanh()
    return o.sigmoid() * c_new.tanh(), c_new


def gru(wx, r, b, h):
    n_r, reset, z, n_w = r[0] + b[0], wx[0] + r[1] + b[1], wx[1] + r[2] + b[2], wx[2] + b[3]
    n = torch.tanh(n_w + reset.sigmoid() * n_r)
    return (z.sigmoid() * h + (1 - z.sigmoid()) * n,)


def slstm(wx, r, b, h, c, n, m):
    i, f, z, o = (w + x + y for w, x, y in zip(wx, r, b, strict=True))
    l = logsigmoid(f) + m  # noqa: E741
    m_new = torch.where(n == 0, i, torch.maximum(i, l))
    c_new = torch.exp(l - m_new) * c + torch.exp(i - m_new) * z.tanh()
    n_new = torch.maximum(torch.exp(l - m_new) * n + torch.exp(i - m_new), torch.ones_like(n))
    return o.sigmoid() * c_new / n_new, c_new, n_new, m_new


def mgu(wx, r, b, h):
    forget = (wx[0] + r[1] + b[1]).sigmoid()
    return ((1 - forget) * h + forget * torch.tanh(wx[1] + b[2] + forget * (r[0] + b[0])),)


def scan(step, Wx, R, b, states, resets=None, lengths=None, reverse=False, cut=False, clip=None):
    """(states [S B T N D], last_states [S B 1 N D]) of `step(wx, r, b, *states) -> new states`, one head's D at a time.

    wx, r, b: lists of [B N D], one a gate that has the part.
    """
    S, B, T = len(states), Wx.shape[0], Wx.shape[1]
    rows = []
    for row in range(B):  # each sequence by itself: no masks
        end = T if lengths is None else min(int(lengths[row]), T)
        state = [states[s, row, 0] for s in range(S)]  # N D
        steps = [torch.zeros_like(states[:, row, 0])] * T
        for t in range(end)[:: -1 if reverse else 1]:
            if resets is not None and bool(resets[row, t]):
                state = [torch.zeros_like(s) for s in state]
            h = state[0]
            if clip is not None:
                h = h.clone() if h.requires_grad else h.detach().requires_grad_(torch.is_grad_enabled())
                if h.requires_grad:
                    h.register_hook(lambda g: g.clamp(-clip, clip))
            met = h.detach() if cut else h
            r = [torch.einsum("ndp,np->nd", R[k], met) for k in range(R.shape[0])]
            state = list(step(Wx[row, t].unbind(), r, b.unbind(), h, *state[1:]))
            steps[t] = torch.stack(state)
        rows.append((torch.stack(steps, 1), torch.stack(state)))
    return torch.stack([out for out, _ in rows], 1), torch.stack([last for _, last in rows], 1)[:, :, None]
