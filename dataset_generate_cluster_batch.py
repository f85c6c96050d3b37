r"""
Stage 2: negatives by interest cluster and exposure, chosen among titles that the model itself proposes.

For each record titles are sampled from the model, ten at a time, until one lies inside the user's interest cluster (the
three commonest genres of the history), and stored in candidates.json. Selectors choose negatives among them:

    pool:order[:count]
    pool     in, out (of the interest cluster), all
    order    first (as generated), random, low_exposure, high_exposure (in the training records),
             likely (the model's log-probability), nearest_target, farthest_target, nearest_history, farthest_history
             (cosine of sentence embeddings; with a history the mean over its titles)
    count    how many titles, 1 if left out

A selector that finds nothing takes a random candidate, or without any a random title of the catalogue; with --fallback
skip it takes nothing, and a record without any negative is left out. Where fewer titles fit than its count asks for, it
takes those. Selectors choose apart from each other; a title that several choose stands once in a record's list.

# The default, configs/cluster_exposure.yaml, on the SFT adapter: the presets dpo_hard (in:first), dpo_long_tail
# (out:low_exposure) and dpo_two_negatives (both, for S-DPO)
```bash
python dataset_generate_cluster_batch.py
```

# Another data set and adapter; without --adapter the base model proposes
```bash
python dataset_generate_cluster_batch.py --data_dir sampled_data/goodreads \
    --adapter output/goodreads/sft/final_model --output_dir output/goodreads/cluster_exposure
```

# Candidates by beam search in place of sampling: num_candidates titles in a single round; here titles that exist
```bash
python dataset_generate_cluster_batch.py --candidate_source diverse_beam --constrained \
    --output_dir output/diverse_beam
```

# The same, calibrated: what the model would say without a history counts against a title
```bash
python dataset_generate_cluster_batch.py --candidate_source beam --constrained --calibration 0.4 \
    --output_dir output/calibrated_beam
```

# Of a model that was trained with sft_smol.py --renormalize, and does not write whole titles by itself
```bash
python dataset_generate_cluster_batch.py --constrained --renormalize --output_dir output/of_the_catalogue
```

# Choose again among candidates that are there, by selectors of one's own (data/negatives_{train,valid}.json) and by
# name (data/<name>_{train,valid}.json): no model is loaded
```bash
python dataset_generate_cluster_batch.py --candidates output/cluster_exposure/data/candidates.json \
    --negatives in:nearest_target out:low_exposure:2 --presets clusterin_low clusterout_high sdpo_3 \
    --unknown_titles drop --fallback skip --output_dir output/chosen_again
```

# In parts, as jobs of an array or on several machines; when all are done, the same command without --shard puts them
# together
```bash
python dataset_generate_cluster_batch.py --shard 1/4
```

# On several GPUs, or processes
```bash
torchrun --nproc_per_node 4 dataset_generate_cluster_batch.py
```

Interrupted and started again with the same flags, it goes on after the last finished batch, to the same bytes.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cebs.calibration import calibration_bias, common_instruction
from cebs.candidates import candidates_as_json, read_candidates
from cebs.catalogue import load_catalogue
from cebs.generation import CandidateArguments, Decoder, DecodingArguments, Journal, load_decoder, run_in_batches
from cebs.grounding import EMBEDDINGS_CACHE, encoder_fingerprint
from cebs.negatives import Candidate, NegativeSampler, Selection, selection_counts
from cebs.preferences import SPLITS, PreferenceArguments, preference_record
from cebs.prompts import Record
from cebs.selectors import PRESETS, SIMILARITY_ORDERS, Selector, find_preset, parse_negatives
from cebs.similarity import unit_vectors
from cebs.sources import find_encoder, find_model
from utils import (
    InputError,
    ScriptParser,
    base_fingerprint,
    check_adapter,
    record_seed,
    run_folder,
    run_script,
    sha256,
    write_json,
)

(HARD,), (LONG_TAIL,) = PRESETS["dpo_hard"], PRESETS["dpo_long_tail"]  # what balanced_*.json holds
LOG_PROB_DECIMALS = 2  # the rest is rounding, which changes with the records that are decoded side by side


@dataclass(kw_only=True)
class ScriptArguments(PreferenceArguments, CandidateArguments):
    """
    Arguments of this stage, beside `PreferenceArguments`, `CandidateArguments` and those of decoding.

    Args:
        candidates (`str`, *optional*): stored `candidates.json` to choose from; then no model is loaded.
        negatives (`list[str]`, *optional*): selectors, or presets that stand for theirs, of one data set.
        presets (`list[str]`): data sets to write by name.
        fallback (`str`): what a selector does that finds nothing: `random` draws a title, `skip` takes none.
        unknown_titles (`str`): what becomes of candidates that are not in the catalogue: `keep` admits them as
            negatives (the published behaviour), `drop` does not.
        same_series (`str`): what becomes of candidates of a series that the history holds: `keep` admits them as
            negatives, `drop` does not.
        encoder (`str`): sentence encoder of the orders `nearest_*` and `farthest_*`; loaded for these alone.
        cache_dir (`str`, *optional*): folder where the catalogue's embeddings, and its log-probabilities without a
            history, are kept.
    """

    candidates: str | None = field(
        default=None, metadata={"help": "Stored candidates.json to choose from; then no model is loaded."}
    )
    negatives: list[str] | None = field(
        default=None,
        metadata={"help": "Selectors pool:order[:count], or presets: one data set, data/negatives_{train,valid}.json."},
    )
    presets: list[str] = field(
        metadata={
            "help": "Data sets to write by name, data/<name>_{train,valid}.json: "
            + "; ".join(f"{name} ({' '.join(map(str, selectors))})" for name, selectors in PRESETS.items())
            + "."
        }
    )
    fallback: str = field(
        metadata={
            "help": "Where a selector finds nothing: random draws a title, skip leaves the negative out.",
            "choices": ["random", "skip"],
        }
    )
    unknown_titles: str = field(
        metadata={
            "help": "Titles that are not in the catalogue: keep admits them as negatives, drop does not.",
            "choices": ["keep", "drop"],
        },
    )
    same_series: str = field(
        metadata={
            "help": "Titles of a series that the history holds: keep admits them as negatives, drop does not.",
            "choices": ["keep", "drop"],
        },
    )
    encoder: str = field(
        metadata={"help": "Sentence encoder of the orders nearest_* and farthest_*: a folder or a name."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where the catalogue's embeddings, and log-probabilities without a history, are kept; left out, "
            "models/.embeddings and models/.priors."
        },
    )

    def __post_init__(self):
        PreferenceArguments.__post_init__(self)
        CandidateArguments.__post_init__(self)

    def data_sets(self) -> dict[str, tuple[Selector, ...]]:
        """Returns the selectors of each data set to write, by name.

        Raises:
            `InputError`: naming the selector or preset that does not exist.
        """
        own = {"negatives": parse_negatives(self.negatives)} if self.negatives else {}
        return own | {name: find_preset(name) for name in self.presets}


def main(script_args: ScriptArguments, model_args: DecodingArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    data_sets = script_args.data_sets()
    selectors = list(dict.fromkeys([HARD, LONG_TAIL, *(each for chosen in data_sets.values() for each in chosen)]))
    records, all_train = script_args.read_splits()
    catalogue = load_catalogue(script_args.data_dir)
    sampler = NegativeSampler(
        catalogue,
        all_train,
        unknown_titles=script_args.unknown_titles,
        same_series=script_args.same_series,
        fallback=script_args.fallback,
        seed=script_args.seed,
    )
    data_sums = {split: sha256(file) for split, file in script_args.record_files.items()}
    inputs = script_args.data_files
    if script_args.candidates:
        if model_args.shard:
            raise InputError("--shard: --candidates decodes nothing; leave one of them out")
        model_dir, adapter = None, ""
        proposals = read_candidates(Path(script_args.candidates), records, data_sums, selectors)
        inputs.append(Path(script_args.candidates))
    else:
        model_dir, adapter = find_model(model_args.model_name_or_path), model_args.adapter
        if adapter:
            check_adapter(adapter, model_dir)
        of_all = [*records["train"], *records["valid"]]
        instruction = common_instruction(Path(script_args.data_dir), of_all) if script_args.calibration else None
    by_similarity = any(selector.order in SIMILARITY_ORDERS for selector in selectors)
    encoder_dir = find_encoder(script_args.encoder) if by_similarity else None

    with run_folder(
        script_args.output_dir,
        script=__file__,
        arguments=asdict(script_args)
        | asdict(model_args)
        | {
            "data_sets": {name: list(map(str, chosen)) for name, chosen in data_sets.items()},
            "encoder_sha256": encoder_dir and encoder_fingerprint(encoder_dir),
        },
        inputs=inputs,
        base_model=model_dir and base_fingerprint(model_dir),
        adapter=adapter,
        shard=model_args.shard,
        outputs=[
            "data/candidates.json",
            *(f"data/{name}_{split}.json" for name in ("balanced", "negatives", *PRESETS) for split in SPLITS),
        ],
        scratch=["data/*.partial.jsonl"],
        overwrite=script_args.overwrite,
    ) as run:
        if run.done:
            return
        data = run.path / "data"

        # -- Candidates -----------------------------------------------------------------------------------------------
        journals = {split: Journal(run, f"data/candidates_{split}") for split in SPLITS}
        if not script_args.candidates:
            decoder = load_decoder(model_dir, model_args, run)
            edge_bias = calibration_bias(
                decoder,
                catalogue.titles,
                instruction,
                script_args.calibration,
                script_args.cache_dir,
                script_args.renormalize,
            )
            proposals = {
                split: propose_titles(
                    decoder,
                    sampler,
                    records[split],
                    split,
                    journals[split],
                    script_args,
                    model_args.batch_size,
                    edge_bias,
                )
                for split in SPLITS
            }
            run.counts.update(decoder.report())
        if not run.writes_outputs:
            return

        candidates = {
            split: [
                sampler.describe(proposed, record)
                for record, proposed in zip(records[split], proposals[split], strict=True)
            ]
            for split in SPLITS
        }
        write_json(data / "candidates.json", candidates_as_json(records, candidates, sampler, data_sums))

        # -- Negatives ------------------------------------------------------------------------------------------------
        embeddings = None
        if encoder_dir:
            titles = titles_to_compare(records, candidates, sampler)
            cache_dir = Path(script_args.cache_dir) if script_args.cache_dir else EMBEDDINGS_CACHE
            embeddings = unit_vectors(titles, catalogue.titles, encoder_dir, cache_dir)
        started = time.perf_counter()
        chosen = {
            split: [
                sampler.select(selectors, proposed, record, split, index, embeddings)
                for index, (record, proposed) in enumerate(zip(records[split], candidates[split], strict=True))
            ]
            for split in SPLITS
        }
        seconds = time.perf_counter() - started

        # -- Output ---------------------------------------------------------------------------------------------------
        for split in SPLITS:
            balanced = [
                record.to_dict()
                | {"hard_negatives": titles_of(taken, [HARD]), "long_tail_negatives": titles_of(taken, [LONG_TAIL])}
                for record, taken in zip(records[split], chosen[split], strict=True)
            ]
            write_json(data / f"balanced_{split}.json", balanced)
            run.counts[split] = {
                **candidate_counts(records[split], candidates[split], sampler),
                "selectors": {
                    str(selector): selection_counts([taken[selector] for taken in chosen[split]], selector.count)
                    for selector in selectors
                },
                "data_sets": {},
            }
            if not script_args.candidates:
                run.counts[split]["rounds"] = rounds_needed(candidates[split], script_args.num_candidates)
            for name, own in data_sets.items():
                negatives = [titles_of(taken, own) for taken in chosen[split]]
                rows = [
                    preference_record(record, titles)
                    for record, titles in zip(records[split], negatives, strict=True)
                    if titles
                ]
                write_json(data / f"{name}_{split}.json", rows)
                titles = sum(map(len, negatives))
                run.counts[split]["data_sets"][name] = {
                    "records": len(rows),
                    "left_out": len(negatives) - len(rows),
                    "titles": titles,
                    "chosen_twice": sum(len(taken[each]) for taken in chosen[split] for each in own) - titles,
                }
        for journal in journals.values():
            journal.remove()
    print_summary(run.counts)
    print(f"{len(data_sets)} data sets of {sum(map(len, records.values()))} records chosen in {seconds:.2f} s")


def propose_titles(
    decoder: Decoder,
    sampler: NegativeSampler,
    records: list[Record],
    split: str,
    journal: Journal,
    args: CandidateArguments,
    batch_size: int,
    edge_bias: Tensor | None,
) -> list[list[tuple[str, float]]]:
    """Proposes titles for each record; sampling goes on until one can be its hard negative (rule 2).

    The random numbers of a record come from its split and place alone, not from the batch that it is decoded in.

    Returns:
        For each record its titles in the order generated, each with its log-probability.
    """

    def propose(prompts: Sequence[list[int]], start: int) -> list[list[tuple[str, float]]]:
        def accept(index: int, titles: list[str]) -> bool:
            record = records[start + index]
            return sampler.has_match(sampler.describe(((title, None) for title in titles), record), record)

        proposed = decoder.propose(
            prompts,
            args,
            titles=sampler.catalogue.titles if args.constrained else None,
            seeds=[record_seed(args.seed, split, start + index) for index in range(len(prompts))],
            accept=accept,
            edge_bias=edge_bias,
        )
        return [[(title, round(log_prob, LOG_PROB_DECIMALS)) for title, log_prob in found] for found in proposed]

    prompts = decoder.encode([record.prompt for record in records])
    return run_in_batches(prompts, batch_size, propose, journal, f"candidates, {split}")


def titles_to_compare(
    records: dict[str, list[Record]], candidates: dict[str, list[list[Candidate]]], sampler: NegativeSampler
) -> list[str]:
    """Returns the titles whose embeddings selectors may ask for: targets, histories, and what may be a negative."""
    titles: list[str] = []
    for split in SPLITS:
        for record, proposed in zip(records[split], candidates[split], strict=True):
            titles += [record.target, *record.history]
            titles += [candidate.title for candidate in sampler.eligible(proposed, record)]
    return list(dict.fromkeys(titles))


def titles_of(taken: dict[Selector, list[Selection]], selectors: Iterable[Selector]) -> list[str]:
    """Returns the titles that some selectors took for a record, in their order; one that several took stands once."""
    return list(dict.fromkeys(selection.title for selector in selectors for selection in taken[selector]))


def candidate_counts(
    records: list[Record], candidates: list[list[Candidate]], sampler: NegativeSampler
) -> dict[str, Any]:
    """Returns how many records have a candidate inside the cluster, and how many candidates exist."""
    total = sum(map(len, candidates))
    return {
        "records": len(records),
        "with_match": sum(
            sampler.has_match(proposed, record) for record, proposed in zip(records, candidates, strict=True)
        ),
        "candidates": total,
        "candidates_in_catalogue": sum(candidate.in_catalogue for proposed in candidates for candidate in proposed),
    }


def rounds_needed(candidates: list[list[Candidate]], num_candidates: int) -> dict[str, int]:
    """Returns the number of records by the rounds of candidates that they needed."""
    rounds = Counter(-(-len(proposed) // num_candidates) for proposed in candidates)
    return {str(number): rounds[number] for number in sorted(rounds)}


def print_summary(counts: dict[str, Any]) -> None:
    for split in SPLITS:
        figures = counts[split]
        share = figures["candidates_in_catalogue"] / max(figures["candidates"], 1)
        print(f"{split}: {figures['with_match']} of {figures['records']} records have a candidate inside the cluster")
        if "rounds" in figures:
            rounds = ", ".join(f"{number}: {records}" for number, records in figures["rounds"].items())
            print(f"  rounds of candidates needed (rounds: records)  {rounds}")
        print(f"  candidates in the catalogue                    {share:.1%} of {figures['candidates']}")
        for selector, taken in figures["selectors"].items():
            drawn = taken["random_candidate"] + taken["random_catalogue_title"]
            unknown = taken["not_in_catalogue"]
            print(
                f"  {selector:<45}  {taken['titles']} titles, {drawn} drawn at random, {unknown} not in the catalogue"
            )
        for name, written in figures["data_sets"].items():
            records, titles, left_out = written["records"], written["titles"], written["left_out"]
            skipped = f", {left_out} records left out" if left_out else ""
            print(f"  {f'{name}_{split}.json':<45}  {records} records, {titles} negatives{skipped}")


def make_parser() -> ScriptParser:
    return ScriptParser(
        (ScriptArguments, DecodingArguments),
        __doc__,
        defaults="configs/cluster_exposure.yaml",
        chain=("data_dir", "model_name_or_path"),
    )


if __name__ == "__main__":
    run_script(main, make_parser(), distributed=True)
