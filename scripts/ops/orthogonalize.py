"""Matrices made orthogonal, as Muon needs them."""

import torch


def zeropower_via_newtonschulz5(G, dtype=torch.bfloat16, steps=5, eps=1e-7):
    """Matrices (..., m, n) made nearly orthogonal: singular values of 0.7 to 1.2.

    The quintic has the steepest slope at zero: kellerjordan.github.io/posts/muon. In bfloat16 it is
    torch.optim.Muon's to the last bit.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.size(-2) > G.size(-1)
    X = G.to(dtype).reshape(-1, *G.shape[-2:])
    X = X.mT if tall else X
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # spectral norm at most 1
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).reshape(G.shape)
