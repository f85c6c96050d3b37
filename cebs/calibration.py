"""Calibrated beams: what a model would say of a title without any history is taken off what it says with one.

The score of a title after a history is

    log p(title | history) - WEIGHT * log p(title | no history),

token by token, so that a beam search keeps what it needs: a title that the model likes to write anyway (because it is
popular, short, or of common words) has to gain by the history. With WEIGHT 1 it is the pointwise mutual information of
title and history (Li et al., 2016, arXiv:1510.03055), with 0 the plain log-probability. The second term depends on the
model and the catalogue only: one number for each edge of the trie, computed once and kept.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from cebs.branches import shared_rows, token_log_probs
from cebs.errors import InputError
from cebs.files import sha256
from cebs.generation import Decoder
from cebs.kept import kept_file, read_kept, write_kept
from cebs.models import base_fingerprint
from cebs.prompts import Record, build_prompt
from cebs.runs import ADAPTER_WEIGHTS
from cebs.sources import MODELS
from cebs.trie import TokenTrie, title_paths

PRIORS_CACHE = MODELS / ".priors"
TITLES_AT_ONCE = 32  # in one row: some 450 tokens, enough to keep the matrix units busy


def common_instruction(path: Path, records: Iterable[Record]) -> str:
    """Returns the instruction of all records, which is the prompt without a history.

    Raises:
        `InputError`: if there are several; `path` is where they come from.
    """
    instructions = {record.instruction for record in records}
    if len(instructions) > 1:
        raise InputError(f"{path}: has {len(instructions)} different instructions; --calibration needs one")
    return instructions.pop()


def calibration_bias(
    decoder: Decoder,
    titles: Sequence[str],
    instruction: str | None,
    weight: float,
    cache_dir: str | None,
    renormalize: bool = False,
) -> Tensor | None:
    """Returns what calibrated beams add to a score with each edge of the catalogue's trie, `[num_nodes]`.

    Of several processes the first computes and keeps the log-probabilities, and the others read them.

    Args:
        decoder: from `load_decoder`.
        titles: the catalogue.
        instruction: from [`common_instruction`]; not used with weight 0.
        weight: of the log-probability without a history.
        cache_dir: where log-probabilities are kept; left out, in `models/.priors`.
        renormalize: take them among the edges out of a node, as `beam_search` then does.

    Returns:
        None with weight 0, and from a decoder without a model.

    Raises:
        `InputError`: if the model gives NaN or infinity.
    """
    if not weight or decoder.model is None:
        return None
    trie, _ = decoder.catalogue_trie(titles)
    (prompt,) = decoder.encode([build_prompt(instruction, input="")])
    with PartialState().main_process_first():
        priors = kept_edge_priors(
            decoder.model,
            prompt,
            trie,
            model_dir=decoder.model_dir,
            adapter=decoder.adapter,
            cache_dir=Path(cache_dir) if cache_dir else PRIORS_CACHE,
        )
    return -weight * (among_edges(trie, priors) if renormalize else priors)


def among_edges(trie: TokenTrie, log_probs: Tensor) -> Tensor:
    """Returns log-probabilities `[num_nodes]` of the trie's edges, renormalised among the edges out of each node."""
    num_children = trie.offsets.diff().numpy()
    first = trie.offsets[:-1].numpy()[num_children > 0]
    totals = np.logaddexp.reduceat(log_probs.numpy(), first)
    # Children stand in the order of their parents, from the root's on.
    share = log_probs[1:] - torch.from_numpy(np.repeat(totals, num_children[num_children > 0]))
    return torch.cat([torch.zeros(1), share])


def kept_edge_priors(
    model: PreTrainedModel, prompt: list[int], trie: TokenTrie, *, model_dir: Path, adapter: str, cache_dir: Path
) -> Tensor:
    """Returns [`edge_priors`] from the file that keeps them, or computes and keeps them.

    Args:
        model, prompt, trie: as for [`edge_priors`].
        model_dir: folder of the base model.
        adapter: folder of the adapter that is merged into `model`, or an empty string.
        cache_dir: where priors are kept, one file for each model, prompt and catalogue.

    Raises:
        `InputError`: if the model gives NaN or infinity.
    """
    adapter_sums = (
        [sha256(Path(adapter) / name) for name in (ADAPTER_WEIGHTS, "adapter_config.json")] if adapter else []
    )
    catalogue = [trie.offsets.tolist(), trie.tokens.tolist()]
    path = kept_file(cache_dir, [base_fingerprint(model_dir), adapter_sums, str(model.dtype), prompt, catalogue])
    priors = read_kept(path)
    if priors is None:
        priors = edge_priors(model, prompt, trie).numpy()
        if not np.isfinite(priors).all():
            raise InputError(
                f"{adapter or model_dir}: gives log-probabilities that are not finite numbers; use --dtype float32, or "
                "another --adapter"
            )
        write_kept(path, priors, "the catalogue's log-probabilities without a history")
    return torch.from_numpy(np.array(priors))


@torch.no_grad()
def edge_priors(model: PreTrainedModel, prompt: list[int], trie: TokenTrie) -> Tensor:
    """
    Log-probability of each edge of the trie, given the tokens before it, after one prompt.

    Args:
        model: a causal language model in eval mode.
        prompt (`list[int]`): the prompt without a history.
        trie (`TokenTrie`): of the completions, on the CPU.

    Returns:
        `Tensor`, `[num_nodes]`: float32, on the CPU, in nats, of the edge that leads to each node; 0 for the root.
    """
    paths = title_paths(trie)
    priors = torch.zeros(len(trie.tokens))
    with tqdm(total=len(paths), desc="catalogue without history", unit=" titles", mininterval=1) as progress:
        for start in range(0, len(paths), TITLES_AT_ONCE):
            chosen = paths[start : start + TITLES_AT_ONCE]
            rows = shared_rows([prompt], [[trie.tokens[path].tolist() for path in chosen]], 0, model.dtype)
            log_probs = token_log_probs(model, {name: rows[name].to(model.device) for name in rows})
            priors[torch.cat(chosen)] = log_probs[0].cpu()
            progress.update(len(chosen))
    return priors
