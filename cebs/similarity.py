"""How near titles are to each other: unit vectors of a sentence encoder, whose products are cosines."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cebs.grounding import EMBEDDINGS_CACHE, embed


def unit_vectors(
    texts: Iterable[str], titles: Sequence[str], encoder_dir: Path, cache_dir: Path = EMBEDDINGS_CACHE
) -> dict[str, np.ndarray]:
    """Returns the embedding of each text, scaled to length 1.

    Args:
        texts: what is to be embedded; each is encoded once.
        titles: the titles of the catalogue, whose embeddings are kept from run to run.
        encoder_dir: folder of a sentence-transformers encoder.
        cache_dir: where they are kept.

    Returns:
        `dict[str, np.ndarray]`: by text, float64 of shape `[D]`; an embedding of zeros stays zeros.

    Raises:
        `InputError`: if the folder holds no encoder that works.
    """
    texts = list(dict.fromkeys(texts))
    embeddings, _ = embed(texts, titles, encoder_dir, cache_dir)
    embeddings = embeddings.astype(np.float64)  # [N, D]
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)  # [N, 1]
    return dict(zip(texts, embeddings / np.where(lengths > 0, lengths, 1), strict=True))
