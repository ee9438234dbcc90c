"""sLSTM: Beck et al., xLSTM: Extended long short-term memory, 2024, equations 8 to 17."""

from flashrnn_core.cells import Gate, cell
from flashrnn_core.cells.vocabulary import exp, log_sigmoid, maximum, sigmoid, tanh, where


@cell(
    gates=(Gate("i"), Gate("f"), Gate("z"), Gate("o")),
    states=("h", "c", "n", "m"),
    float32_states=("m",),  # it stands in an exponent
)
def slstm(i, f, z, o, h, c, n, m):
    """l = logσ(f) + m; m' = i where n = 0, else max(i, l); i' = exp(i − m'); f' = exp(l − m');
    c' = f' c + i' tanh(z); n' = max(f' n + i', 1); h' = σ(o) c' / n'."""
    l = log_sigmoid(f) + m  # noqa: E741
    m_new = where(n == 0, i, maximum(i, l))
    i_new, f_new = exp(i - m_new), exp(l - m_new)
    c_new = f_new * c + i_new * tanh(z)
    n_new = maximum(f_new * n + i_new, 1)
    return sigmoid(o) * c_new / n_new, c_new, n_new, m_new
