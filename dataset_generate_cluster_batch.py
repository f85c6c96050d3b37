"""
Stage 2: negatives by interest cluster and exposure, chosen among titles that the model itself proposes.

For each record titles are sampled from the model, ten at a time, until one lies inside the user's interest cluster (the
three commonest genres of the history). The first of those is the hard negative; of the titles outside the cluster, the
one with the least exposure in the training data is the long-tail negative.

# The default, configs/cluster_exposure.yaml, on the SFT adapter
```bash
python dataset_generate_cluster_batch.py
```

# Another data set and adapter; without --adapter the base model proposes
```bash
python dataset_generate_cluster_batch.py --data_dir sampled_data/goodreads \\
    --adapter output/goodreads/sft/final_model --output_dir output/goodreads/cluster_exposure
```

# Choose again among candidates that are there: no model is loaded
```bash
python dataset_generate_cluster_batch.py --candidates output/cluster_exposure/data/candidates.json \\
    --unknown_titles drop --output_dir output/cluster_exposure_drop
```

Interrupted and started again with the same flags, it goes on after the last finished batch, to the same bytes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cebs.branches import sample_until
from cebs.catalogue import CATALOGUE_FILES, interest_cluster, load_catalogue
from cebs.generation import Decoder, DecodingArguments, Journal, load_decoder, run_in_batches
from cebs.negatives import Candidate, NegativeSelector, fallback_counts
from cebs.preferences import preference_record
from cebs.prompts import Record, predicted_title
from cebs.sources import find_model
from utils import (
    InputError,
    RunArguments,
    ScriptParser,
    base_fingerprint,
    check_adapter,
    read_json,
    read_records,
    record_seed,
    run_folder,
    run_script,
    sha256,
    write_json,
)

SPLITS = ("train", "valid")
DATA_SETS = ("balanced", "dpo_hard", "dpo_long_tail", "dpo_two_negatives")


@dataclass(kw_only=True)
class ScriptArguments(RunArguments):
    """
    Arguments of this stage, beside those of decoding.

    Args:
        data_dir (`str`): data folder with `train_sample.json`, `valid_sample.json` and the catalogue.
        candidates (`str`, *optional*): stored `candidates.json` to choose from; then no model is loaded.
        unknown_titles (`str`): what becomes of candidates that are not in the catalogue: `keep` admits them as
            negatives (the published behaviour), `drop` does not.
        num_candidates (`int`): titles sampled for a record at a time.
        max_candidates (`int`): most titles sampled for a record.
        top_k (`int`): sample from the k likeliest tokens.
        temperature (`float`): of the sampling.
        max_train_samples, max_eval_samples (`int`, *optional*): use only the first records of a file.
    """

    data_dir: str = field(metadata={"help": "Data folder: records and catalogue."})
    candidates: str | None = field(
        default=None, metadata={"help": "Stored candidates.json to choose from; then no model is loaded."}
    )
    unknown_titles: str = field(
        metadata={
            "help": "Titles that are not in the catalogue: keep admits them as negatives, drop does not.",
            "choices": ["keep", "drop"],
        },
    )
    num_candidates: int = field(metadata={"help": "Titles sampled for a record at a time."})
    max_candidates: int = field(metadata={"help": "Most titles sampled for a record."})
    top_k: int = field(metadata={"help": "Sample from the k likeliest tokens."})
    temperature: float = field(metadata={"help": "Temperature of the sampling."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first training records."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first validation records."})

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"--temperature: {self.temperature} must be above 0")


def main(script_args: ScriptArguments, model_args: DecodingArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    data_dir = Path(script_args.data_dir)
    files = {split: data_dir / f"{split}_sample.json" for split in SPLITS}
    limits = {"train": script_args.max_train_samples, "valid": script_args.max_eval_samples}
    whole = {split: read_records(files[split]) for split in SPLITS}
    records = {split: whole[split][: limits[split]] for split in SPLITS}
    selector = NegativeSelector(load_catalogue(data_dir), whole["train"], script_args.unknown_titles, script_args.seed)
    data_sums = {split: sha256(file) for split, file in files.items()}
    inputs = [*files.values(), *(data_dir / name for name in CATALOGUE_FILES)]
    if script_args.candidates:
        model_dir, adapter = None, ""
        stored = read_candidates(Path(script_args.candidates), records, data_sums)
        inputs.append(script_args.candidates)
    else:
        model_dir, adapter = find_model(model_args.model_name_or_path), model_args.adapter
        if adapter:
            check_adapter(adapter, model_dir)

    with run_folder(
        script_args.output_dir,
        script=__file__,
        arguments=asdict(script_args) | asdict(model_args),
        inputs=inputs,
        base_model=model_dir and base_fingerprint(model_dir),
        adapter=adapter,
        outputs=[
            "data/candidates.json",
            *(f"data/{name}_{split}.json" for name in DATA_SETS for split in SPLITS),
        ],
        scratch=["data/*.partial.jsonl"],
        overwrite=script_args.overwrite,
    ) as run:
        if run.done:
            return
        data = run.path / "data"

        # -- Candidates -----------------------------------------------------------------------------------------------
        journals = {split: Journal(data / f"candidates_{split}.partial.jsonl", run.resumed) for split in SPLITS}
        if script_args.candidates:
            titles = stored
        else:
            decoder = load_decoder(model_dir, model_args)
            titles = {
                split: propose_titles(
                    decoder, selector, records[split], split, journals[split], script_args, model_args
                )
                for split in SPLITS
            }
            run.counts["shortened_prompts"] = decoder.shortened_prompts

        candidates = {
            split: [
                selector.describe(proposed, record)
                for record, proposed in zip(records[split], titles[split], strict=True)
            ]
            for split in SPLITS
        }
        write_json(data / "candidates.json", candidates_as_json(records, candidates, selector, data_sums))

        # -- Negatives ------------------------------------------------------------------------------------------------
        for split in SPLITS:
            hard, long_tail = (
                [
                    choose(proposed, record, split, index)
                    for index, (record, proposed) in enumerate(zip(records[split], candidates[split], strict=True))
                ]
                for choose in (selector.hard, selector.long_tail)
            )
            data_sets: dict[str, list[dict[str, Any]]] = {name: [] for name in DATA_SETS}
            for record, inside, outside in zip(records[split], hard, long_tail, strict=True):
                both = list(dict.fromkeys((inside.title, outside.title)))  # one title, where both fell back on it
                negatives = {"hard_negatives": [inside.title], "long_tail_negatives": [outside.title]}
                data_sets["balanced"].append(asdict(record) | negatives)
                data_sets["dpo_hard"].append(preference_record(record, [inside.title]))
                data_sets["dpo_long_tail"].append(preference_record(record, [outside.title]))
                data_sets["dpo_two_negatives"].append(preference_record(record, both))
            for name, rows in data_sets.items():
                write_json(data / f"{name}_{split}.json", rows)
            run.counts[split] = {
                **sampling_counts(records[split], candidates[split], selector, script_args.num_candidates),
                "hard_negatives": fallback_counts(hard),
                "long_tail_negatives": fallback_counts(long_tail),
                "same_title_twice": sum(a.title == b.title for a, b in zip(hard, long_tail, strict=True)),
            }
        for journal in journals.values():
            journal.remove()
        print_summary(run.counts)


def propose_titles(
    decoder: Decoder,
    selector: NegativeSelector,
    records: list[Record],
    split: str,
    journal: Journal,
    script_args: ScriptArguments,
    model_args: DecodingArguments,
) -> list[list[str]]:
    """Samples titles for each record until one can be its hard negative, at most `max_candidates` (rule 2).

    The random numbers of a record come from its split and place alone, not from the batch that it is decoded in.
    """

    def titles_of(branches: list[list[int]]) -> list[str]:
        return [predicted_title(decoder.decode(ids)) for ids in branches]

    def sample(prompts: Sequence[list[int]], start: int) -> list[list[str]]:
        def accept(index: int, branches: list[list[int]]) -> bool:
            record = records[start + index]
            return selector.has_match(selector.describe(titles_of(branches), record), record)

        found = sample_until(
            decoder.model,
            list(prompts),
            accept=accept,
            seeds=[record_seed(script_args.seed, split, start + index) for index in range(len(prompts))],
            num_branches=script_args.num_candidates,
            max_branches=script_args.max_candidates,
            top_k=min(script_args.top_k, decoder.model.config.vocab_size),
            temperature=script_args.temperature,
            max_new_tokens=decoder.max_new_tokens,
            stop_token_ids=decoder.stop_token_ids,
            rows=decoder.rows,
        )
        return [titles_of(branches) for _, branches in sorted(found)]

    prompts = decoder.encode([record.prompt for record in records])
    return run_in_batches(prompts, model_args.batch_size, sample, journal, f"candidates, {split}")


def candidates_as_json(
    records: dict[str, list[Record]],
    candidates: dict[str, list[list[Candidate]]],
    selector: NegativeSelector,
    data_sums: dict[str, str],
) -> dict[str, Any]:
    """Returns what `candidates.json` holds: every candidate in the order sampled, and the cluster of its record."""
    stored: dict[str, Any] = {"data_sha256": data_sums}
    for split in SPLITS:
        stored[split] = [
            {
                "record": index,
                "cluster": interest_cluster(record.history, selector.catalogue),
                "candidates": [{"order": order, **asdict(candidate)} for order, candidate in enumerate(proposed)],
            }
            for index, (record, proposed) in enumerate(zip(records[split], candidates[split], strict=True))
        ]
    return stored


def read_candidates(
    path: Path, records: dict[str, list[Record]], data_sums: dict[str, str]
) -> dict[str, list[list[str]]]:
    """Reads the titles of a stored `candidates.json`.

    Raises:
        `InputError`: if the file is of another form, or belongs to other records.
    """
    stored = read_json(path)
    titles = {}
    for split in SPLITS:
        try:
            titles[split] = [[candidate["title"] for candidate in entry["candidates"]] for entry in stored[split]]
            same_data = stored["data_sha256"][split] == data_sums[split]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: is not a candidates.json of this script ({split}: {error!r})") from error
        if not all(isinstance(title, str) for proposed in titles[split] for title in proposed):
            raise InputError(f"{path}: a title of {split} is not text; give a candidates.json of this script")
        if not same_data or len(titles[split]) < len(records[split]):
            raise InputError(f"{path}: was made from another {split}_sample.json; give the data folder it belongs to")
        titles[split] = titles[split][: len(records[split])]
    return titles


def sampling_counts(
    records: list[Record], candidates: list[list[Candidate]], selector: NegativeSelector, num_candidates: int
) -> dict[str, Any]:
    """Returns how the sampling went: matches, rounds, and how many candidates exist."""
    rounds = [-(-len(proposed) // num_candidates) for proposed in candidates]
    total = sum(map(len, candidates))
    return {
        "records": len(records),
        "with_match": sum(
            selector.has_match(proposed, record) for record, proposed in zip(records, candidates, strict=True)
        ),
        "rounds": {str(number): rounds.count(number) for number in sorted(set(rounds))},
        "candidates": total,
        "candidates_in_catalogue": sum(candidate.in_catalogue for proposed in candidates for candidate in proposed),
    }


def print_summary(counts: dict[str, Any]) -> None:
    for split in SPLITS:
        figures = counts[split]
        rounds = ", ".join(f"{number}: {records}" for number, records in figures["rounds"].items())
        share = figures["candidates_in_catalogue"] / max(figures["candidates"], 1)
        print(f"{split}: {figures['with_match']} of {figures['records']} records have a candidate inside the cluster")
        print(f"  rounds of sampling needed (rounds: records)  {rounds}")
        print(f"  candidates in the catalogue                  {share:.1%} of {figures['candidates']}")
        for kind in ("hard_negatives", "long_tail_negatives"):
            drawn = figures[kind]["random_candidate"] + figures[kind]["random_catalogue_title"]
            unknown = figures[kind]["not_in_catalogue"]
            print(f"  {kind:<43}  {drawn} drawn at random, {unknown} not in the catalogue")


def make_parser() -> ScriptParser:
    return ScriptParser(
        (ScriptArguments, DecodingArguments),
        __doc__,
        defaults="configs/cluster_exposure.yaml",
        chain=("data_dir", "model_name_or_path"),
    )


if __name__ == "__main__":
    run_script(main, make_parser())
