"""Features in two dimensions: principal components, and t-SNE."""

import numpy as np
from numpy.typing import NDArray

from alexnet.explain import principal_plane

PERPLEXITY = 30
BEFORE = 50  # principal components that t-SNE starts from
FEWEST = 10  # images, for t-SNE


def planes(features: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Coordinates (N, 2) of features (N, U) by the name of the plane; the same for the same features."""
    components, share = principal_plane(features, BEFORE)
    flat = np.zeros((len(features), 2))
    flat[:, : components.shape[1]] = components[:, :2]
    found = {f"principal components, {100 * share[:2].sum():.0f} % of the variance": flat}
    if len(features) >= FEWEST and components.any():
        found["t-SNE"] = _tsne(components)
    return found


def _tsne(components: NDArray[np.float64]) -> NDArray[np.float64]:
    """In one thread: the sums of several depend on which is faster."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(PERPLEXITY, (len(components) - 1) / 3)
    with threadpool_limits(1):
        tsne = TSNE(init="pca", learning_rate="auto", perplexity=perplexity, random_state=0, n_jobs=1)
        found: NDArray[np.float64] = tsne.fit_transform(components).astype(np.float64)
    return found
