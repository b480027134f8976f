"""Distances between two sets of recordings, over one embedding vector per recording."""

import numpy as np

KAD_SCALE = 100.0


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions that fit two sets.

    |μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½). It is biased upwards for small sets; compare
    only sets of equal sizes.

    Args:
      a, b: embeddings, float `[N, d]` and `[M, d]`, at least 2 rows each.

    Source: Kilgour et al. 2019 (Fréchet audio distance); VampNet, section 4.
    """
    a, b = _checked(a, b)
    difference = a.mean(0) - b.mean(0)
    # Of centred rows A and B, Σa = AᵀA and Σb = BᵀB, the root's trace is the nuclear norm of ABᵀ.
    # Triangles have the same, and min(N, d) rows.
    left, right = _triangle(a), _triangle(b)
    cross = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    spread = np.square(left).sum() + np.square(right).sum()
    return float(max(0.0, difference @ difference + spread - 2 * cross))


def _triangle(embeddings: np.ndarray) -> np.ndarray:
    """R, so that RᵀR is the covariance of the rows."""
    centred = (embeddings - embeddings.mean(0)) / np.sqrt(len(embeddings) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def kernel_distance(a: np.ndarray, b: np.ndarray, bandwidth: float | None = None) -> float:
    """Kernel audio distance: unbiased MMD² with a Gaussian kernel, times 100.

    Unbiased at any size, so it may fall below 0 for sets that are alike.

    Args:
      a: embeddings of the reference, float `[N, d]`, at least 2 rows.
      b: of the other set, float `[M, d]`.
      bandwidth: σ of exp(−‖x − y‖²/2σ²); None is the median distance within the reference.

    Source: Chung et al. 2025 (KAD: no more FAD), section 3.
    """
    a, b = _checked(a, b)
    if bandwidth is None:
        bandwidth = median_distance(a)
    within_a, within_b, between = _squares(a, a), _squares(b, b), _squares(a, b)
    if not bandwidth > 0:
        raise ValueError("the reference's embeddings are all the same; give a bandwidth")

    def kernel(squares: np.ndarray) -> np.ndarray:
        return np.exp(-squares / (2 * bandwidth**2))

    def off_diagonal(squares: np.ndarray) -> float:
        n = len(squares)
        return float((kernel(squares).sum() - n) / (n * (n - 1)))

    mmd = off_diagonal(within_a) + off_diagonal(within_b) - 2 * float(kernel(between).mean())
    return KAD_SCALE * mmd


def median_distance(embeddings: np.ndarray) -> float:
    """Median Euclidean distance between the rows of float `[N, d]`, N ≥ 2."""
    x, _ = _checked(embeddings, embeddings)
    return float(np.sqrt(np.median(_squares(x, x)[np.triu_indices(len(x), 1)])))


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """‖x − y‖² of all pairs, `[N, M]`, 0 for a row and itself."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * (a @ b.T)
    if a is b:
        np.fill_diagonal(squares, 0)
    return np.maximum(squares, 0)


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"embeddings are {a.shape} and {b.shape}; [N >= 2, d] are needed")
    left = np.asarray(a, np.float64)
    return left, left if a is b else np.asarray(b, np.float64)
