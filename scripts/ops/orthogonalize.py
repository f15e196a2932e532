"""Matrices made orthogonal, as Muon needs them."""

import torch

GRAM_STEPS = 3  # iterations on one Gram matrix; five lose digits where singular values differ much


def on_gram_matrix(X, coefficients):
    """X (n, rows, cols) after X <- (a + b A + c A^2) X, A = X X^T, for each (a, b, c) in turn.

    The factors are polynomials of one A and commute: products of (rows, rows) give the next A and
    what X is multiplied by, once in GRAM_STEPS. The rows must be few for that to be less work.
    Source: Dao-AILab/gram-newton-schulz.
    """
    for start in range(0, len(coefficients), GRAM_STEPS):
        A = X @ X.mT
        factor = product = None
        for a, b, c in coefficients[start : start + GRAM_STEPS]:
            if factor is not None:
                A = factor @ A @ factor
            factor = torch.baddbmm(A, A, A, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
        X = product @ X
    return X


def zeropower_via_newtonschulz5(G, dtype=torch.bfloat16, steps=5, eps=1e-7):
    """Matrices (..., m, n) made nearly orthogonal: singular values of 0.7 to 1.2.

    The quintic has the steepest slope at zero: kellerjordan.github.io/posts/muon. In bfloat16 it is
    torch.optim.Muon's to the last bit; otherwise flat matrices go through on_gram_matrix.
    """
    return iterate(G, [(3.4445, -4.7750, 2.0315)] * steps, dtype, 1.0, eps)


# The quintic of each iteration that comes closest to 1 for what the one before has left of the
# singular values, from 1e-3 on; the last one would repeat.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G, dtype=torch.bfloat16):
    """As zeropower_via_newtonschulz5, to singular values of 0.86 to 1.14 (arXiv 2505.16932)."""
    return iterate(G, POLAR_EXPRESS, dtype, 1.02, 1e-6)  # what rounding adds stays below 1


def iterate(G, coefficients, dtype, margin, eps):
    """a X + b X X^T X + c (X X^T)^2 X for each (a, b, c), from G over margin times its norm."""
    tall = G.size(-2) > G.size(-1)
    X = G.to(dtype).reshape(-1, *G.shape[-2:])
    X = X.mT if tall else X
    norm = X.norm(dim=(-2, -1), keepdim=True)
    X = X / (norm * margin).clamp(min=eps)  # spectral norm at most 1
    is_flat = X.size(-1) >= 2 * X.size(-2)
    if is_flat and dtype != torch.bfloat16:
        X, coefficients = on_gram_matrix(X, coefficients), ()
    for a, b, c in coefficients:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).reshape(G.shape)


ROW_BETA = 0.95  # of the running means in norm_rows


def keep_rows(update, squares, frozen):
    """Leaves an update as it is."""
    return update


def norm_rows(update, squares, frozen):
    """An update (n, rows, cols) with rows of one size, as they were of late (arXiv 2510.05491).

    Each row is over the root of its running mean square in `squares` (n, rows, 1), which changes
    in place where frozen (n, 1, 1) is false; the norm of each matrix stays.
    """
    now = update.square().mean(-1, keepdim=True, dtype=torch.float32)
    squares.lerp_(torch.where(frozen, squares, now), 1 - ROW_BETA)
    factor = squares.clamp(min=1e-20).rsqrt()
    before, after = now.sum(-2, keepdim=True), (now * factor.square()).sum(-2, keepdim=True)
    factor = factor * (before / after.clamp(min=1e-20)).sqrt()
    return update * factor.type_as(update)
