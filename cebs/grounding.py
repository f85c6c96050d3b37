"""Grounding: from what a model wrote to the nearest titles of the catalogue, by sentence embeddings (BIGRec).

The encoder's work on the catalogue is kept in a cache; the search is exact, and never holds more than a block of the
matrix of distances between predictions and titles.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cebs.errors import InputError
from cebs.files import sha256
from cebs.kept import kept_file, read_kept, write_kept
from cebs.sources import MODELS

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EMBEDDINGS_CACHE = MODELS / ".embeddings"
ENCODER_FILES = {".json", ".safetensors", ".txt", ".model"}  # what decides how an encoder encodes
ENCODED_AT_ONCE = 1024
SEARCHED_QUERIES, SEARCHED_TITLES = 1024, 16384  # one block of distances: 128 MiB
SPARE = 16  # candidates beyond k that are measured again, exactly
BLOCK_NUMBERS = 2**24


def ground(
    predictions: Sequence[str], titles: Sequence[str], encoder_dir: Path, k: int, cache_dir: Path = EMBEDDINGS_CACHE
) -> np.ndarray:
    """Returns the k titles of the catalogue that are nearest to each prediction, nearest first.

    Each text is encoded once; a prediction that is a title of the catalogue takes that title's embedding.

    Args:
        predictions: N predicted titles.
        titles: the M titles of the catalogue, in the order of their ids.
        encoder_dir: folder of a sentence-transformers encoder.
        k: how many; with fewer titles in the catalogue, all of them.
        cache_dir: where the catalogue's embeddings are kept.

    Returns:
        `np.ndarray` of shape `[N, min(k, M)]`: title ids.

    Raises:
        `InputError`: if the folder holds no encoder that works.
    """
    texts = list(dict.fromkeys(predictions))
    queries, catalogue = embed(texts, titles, encoder_dir, cache_dir)
    place = {text: index for index, text in enumerate(texts)}
    return nearest_titles(queries, catalogue, k)[[place[text] for text in predictions]]


def embed(
    texts: Sequence[str], titles: Sequence[str], encoder_dir: Path, cache_dir: Path = EMBEDDINGS_CACHE
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the embeddings of N distinct texts and of the M titles of the catalogue, which are kept in the cache.

    A text that is a title of the catalogue takes that title's embedding; the encoder is loaded for others alone.

    Returns:
        `tuple[np.ndarray, np.ndarray]`, `[N, D]` and `[M, D]`, float32.

    Raises:
        `InputError`: if the folder holds no encoder that works.
    """
    cache_file = kept_file(cache_dir, [encoder_fingerprint(encoder_dir), list(titles)])
    catalogue = read_kept(cache_file)
    ids = {title: index for index, title in enumerate(titles)}
    unknown = [text for text in texts if text not in ids]
    was_kept = catalogue is not None
    if unknown or not was_kept:
        encoder = load_encoder(encoder_dir)
    if not was_kept:
        catalogue = encode_texts(encoder, titles, "encoding the catalogue")
    encoded = dict(zip(unknown, encode_texts(encoder, unknown, "encoding titles"), strict=True)) if unknown else {}
    embeddings = np.stack([catalogue[ids[text]] if text in ids else encoded[text] for text in texts])
    if not (np.isfinite(catalogue).all() and np.isfinite(embeddings).all()):
        raise InputError(f"{encoder_dir}: gives embeddings that are not finite numbers; use another encoder")
    if not was_kept:
        write_kept(cache_file, catalogue, "the catalogue's embeddings")
    return embeddings, catalogue


# ---------------------------------------------------------------------------------------------------------------------
# The encoder
# ---------------------------------------------------------------------------------------------------------------------


def encoder_fingerprint(encoder_dir: Path) -> str:
    """Returns a sum over the encoder's weights, tokenizer and settings.

    Raises:
        `InputError`: if the folder holds no weights.
    """
    files = sorted(path for path in encoder_dir.rglob("*") if path.suffix in ENCODER_FILES and path.is_file())
    if not any(path.suffix == ".safetensors" for path in files):
        raise InputError(f"{encoder_dir}: no *.safetensors file; give the folder of a sentence-transformers encoder")
    sums = [(path.relative_to(encoder_dir).as_posix(), sha256(path)) for path in files]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def load_encoder(encoder_dir: Path) -> "SentenceTransformer":
    """Loads a sentence encoder, on the GPU where there is one.

    Raises:
        `InputError`: if the folder holds no encoder that can be loaded.
    """
    with _quiet_loading():
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(
                str(encoder_dir), local_files_only=True, model_kwargs={"use_safetensors": True, "dtype": "float32"}
            )
        # a folder of another kind can fail at any of many places in three libraries
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{encoder_dir}: cannot be loaded as a sentence encoder: {reason}") from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keeps transformers' progress bar, and reports of weights that are not needed, off the screen.

    A report of weights that are *missing* passes: with those, the embeddings would be random.
    """
    from transformers.utils import logging as transformers_logging

    def is_worth_reading(entry: logging.LogRecord) -> bool:
        return "UNEXPECTED" not in entry.getMessage() or "MISSING" in entry.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logger.addFilter(is_worth_reading)
    try:
        yield
    finally:
        logger.removeFilter(is_worth_reading)
        if had_bar:
            transformers_logging.enable_progress_bar()


def encode_texts(encoder: "SentenceTransformer", texts: Sequence[str], description: str) -> np.ndarray:
    """Encodes texts, those of like length together; a progress bar appears when it takes more than a few seconds.

    Returns:
        `np.ndarray` of shape `[len(texts), D]`, float32.
    """
    from tqdm import tqdm

    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    embeddings = None
    with tqdm(total=len(texts), desc=description, unit=" titles", delay=3, disable=None) as progress:
        for start in range(0, len(order), ENCODED_AT_ONCE):
            chosen = order[start : start + ENCODED_AT_ONCE]
            encoded = encoder.encode([texts[index] for index in chosen], show_progress_bar=False)
            if embeddings is None:
                embeddings = np.empty((len(texts), encoded.shape[1]), np.float32)
            embeddings[chosen] = encoded
            progress.update(len(chosen))
    return embeddings


# ---------------------------------------------------------------------------------------------------------------------
# The cache of the catalogue's embeddings
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------------------


def nearest_titles(queries: np.ndarray, catalogue: np.ndarray, k: int) -> np.ndarray:
    """Returns the ids of the k titles nearest to each query by Euclidean distance; of equally near ones, lowest first.

    Matrix products find k + `SPARE` candidates, and sums of squared differences rank them: products round in a way
    that depends on a title's place in its block, so that they alone could not tell a tie. Where their rounding could
    have kept a title out (more than `SPARE` titles as near as the k-th), that query is compared with every title.

    Args:
        queries (`np.ndarray` of shape `[Q, D]`): embeddings of the predictions.
        catalogue (`np.ndarray` of shape `[M, D]`): embeddings of the titles.
        k (`int`): how many.

    Returns:
        `np.ndarray` of shape `[Q, min(k, M)]`.
    """
    k = min(k, len(catalogue))
    kept = min(k + SPARE, len(catalogue))
    nearest = np.empty((len(queries), k), np.int64)
    rows = min(SEARCHED_QUERIES, max(1, BLOCK_NUMBERS // (kept * queries.shape[1])))
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows].astype(np.float64)
        candidates, doubtful = _candidates(block, catalogue, k, kept)  # [rows, kept], [rows]
        differences = catalogue[candidates] - block[:, None, :]  # [rows, kept, D]
        nearest[start : start + rows] = _by_distance_and_id(differences, candidates)[:, :k]
        for row in np.flatnonzero(doubtful):
            nearest[start + row] = _compare_with_all(block[row], catalogue, k)
    return nearest


def _candidates(queries: np.ndarray, catalogue: np.ndarray, k: int, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `kept` nearest titles of each query in any order, and where these may lack one of the first k."""
    import torch

    queries = torch.from_numpy(queries)  # [Q, D]
    scores = torch.empty(len(queries), 0, dtype=torch.float64)  # squared distances less |query|², [Q, kept so far]
    ids = torch.empty(len(queries), 0, dtype=torch.int64)
    largest_norm = 0.0
    for start in range(0, len(catalogue), SEARCHED_TITLES):
        titles = torch.from_numpy(catalogue[start : start + SEARCHED_TITLES]).double()  # [T, D]
        norms = titles.square().sum(dim=1)
        largest_norm = max(largest_norm, float(norms.max()))
        block_scores = torch.addmm(norms, queries, titles.T, alpha=-2)  # [Q, T]
        block_scores, block_ids = block_scores.topk(min(kept, len(titles)), largest=False)
        scores, ids = torch.cat([scores, block_scores], dim=1), torch.cat([ids, block_ids + start], dim=1)
        scores, best = scores.topk(min(kept, scores.shape[1]), largest=False)
        ids = ids.gather(1, best)
    if kept == len(catalogue):
        return ids.numpy(), np.zeros(len(queries), bool)
    # a bound of what rounding can do to a sum of D products, doubled twice: for each side, and to be safe
    query_norms = queries.square().sum(dim=1)
    rounding = 4 * np.finfo(np.float64).eps * queries.shape[1] * (largest_norm + query_norms)  # [Q]
    return ids.numpy(), (scores[:, -1] - scores[:, k - 1] <= 2 * rounding).numpy()


def _by_distance_and_id(differences: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns the ids `[..., n]` sorted by the lengths of the differences `[..., n, D]`, ties by id."""
    return np.take_along_axis(ids, np.lexsort((ids, np.square(differences).sum(axis=-1)), axis=-1), axis=-1)


def _compare_with_all(query: np.ndarray, catalogue: np.ndarray, k: int) -> np.ndarray:
    """Returns the k nearest titles of one query `[D]`, each distance being computed from the differences."""
    best = np.empty(0, np.int64)
    for start in range(0, len(catalogue), SEARCHED_TITLES):
        ids = np.concatenate([best, np.arange(start, min(start + SEARCHED_TITLES, len(catalogue)))])
        best = _by_distance_and_id(catalogue[ids] - query, ids)[:k]
    return best
