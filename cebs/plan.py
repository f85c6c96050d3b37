"""The comparison as a graph of stages: which command lines the rows of a table need, and in which order.

The rows are described in `configs/comparison.yaml` and nowhere else; `cebs.comparison` runs the graph on this machine.
A stage is one command line of one script. What several rows need is one stage: one SFT, one generation of candidates.
"""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cebs.errors import InputError
from cebs.files import read_yaml
from cebs.selectors import parse_negatives

SIZE_NAMES = ("train", "preferences", "valid", "test")
SECTIONS = {"sizes": dict, "rows": dict, "main_job": list, "candidates": dict, "flags": dict, "seconds": dict}
KINDS = {dict: "mapping", list: "list"}
# negatives that are no selectors: a model's predictions, of the row's own model or of another, and random titles
MODELS_OWN = ("random", "self_play", "self_play of sft", "self_play of origin")
SCRIPTS = (
    *("prepare_data.py", "sft_smol.py", "dataset_generate.py", "dataset_generate_cluster_batch.py"),
    *("DPO_from_dpoData.py", "generate_predict_batch.py", "predict_baselines.py", "fuse_predictions.py"),
    "evaluate.py",
)
ROW_KEYS = ("baseline", "start", "negatives", "candidates", "choose", "rounds_of", "model_of", "predict", "fuse")
SOURCES = {"baseline", "model_of", "fuse"}  # where the predictions of a row come from that has no `start`


def read_description(path: str | Path) -> dict[str, Any]:
    """Reads a description of the comparison; `configs/comparison.yaml` explains its form.

    Raises:
        `InputError`: naming the file, and the section or row that is wrong.
    """
    description = read_yaml(path)
    for section, kind in SECTIONS.items():
        if section not in description:
            raise InputError(f"{path}: section {section!r} is missing; configs/comparison.yaml shows the form")
        if not isinstance(description[section], kind):
            raise InputError(f"{path}: section {section!r} must be a {KINDS[kind]}; configs/comparison.yaml shows it")
    folders: dict[str, str] = {}
    for row, spec in description["rows"].items():
        place = f"{path}: row {row!r}"
        if not isinstance(row, str) or not slug(row):
            raise InputError(f"{place}: its name needs a letter from a to z or a digit, for its folder")
        if (other := folders.setdefault(slug(row), row)) != row:
            raise InputError(f"{place}: would share the folder {slug(row)} with row {other!r}; rename one")
        _check_row(place, spec, description["candidates"])
    for row, spec in description["rows"].items():
        for part in spec.get("fuse", ()):
            if "fuse" in description["rows"].get(part, {"fuse"}):
                raise InputError(f"{path}: row {row!r}: fuse names {part!r}, which is no row with a ranking of its own")
        if "model_of" in spec and "start" not in description["rows"].get(spec["model_of"], {}):
            raise InputError(f"{path}: row {row!r}: model_of names {spec['model_of']!r}, which is no row with a start")
    for source, flags in description["candidates"].items():
        if slug(str(source)) != source:
            raise InputError(f"{path}: candidates {source!r}: the name may have a to z, 0 to 9 and _ only")
        _check_flags(f"{path}: candidates {source!r}", flags)
    for script, flags in description["flags"].items():
        _check_flags(f"{path}: flags of {script}", flags)
    for row, spec in description["rows"].items():
        for part in spec.get("fuse", ()):
            source = description["rows"][part]
            flags = source.get("predict", description["flags"].get("generate_predict_batch.py", ""))
            if "baseline" not in source and "constrained_beam" not in flags:
                raise InputError(
                    f"{path}: row {row!r}: fuse names {part!r}, which predicts one title and no ranking; its predict "
                    "needs --decoding constrained_beam"
                )
    for size in ("quick", "full", *description["sizes"]):
        numbers = description["sizes"].get(size)
        if not isinstance(numbers, dict) or set(numbers) != set(SIZE_NAMES):
            raise InputError(f"{path}: size {size!r}: needs {', '.join(SIZE_NAMES)}")
        if wrong := [name for name, number in numbers.items() if type(number) is not int or number < 1]:
            raise InputError(f"{path}: size {size!r}: {wrong[0]} must be a whole number of 1 or more")
    for script in SCRIPTS:
        cost = description["seconds"].get(script)
        if not isinstance(cost, dict) or not all(type(cost.get(name)) in (int, float) for name in ("start", "record")):
            raise InputError(f"{path}: seconds of {script}: needs the numbers start and record")
    if unknown := [row for row in description["main_job"] if row not in list(description["rows"])]:
        raise InputError(f"{path}: main_job: there is no row {unknown[0]!r}")
    return description


def _check_row(place: str, spec: Any, candidates: dict[str, Any]) -> None:
    if not isinstance(spec, dict):
        raise InputError(f"{place}: must be a mapping of {', '.join(ROW_KEYS)}")
    if unknown := [key for key in spec if key not in ROW_KEYS]:
        raise InputError(f"{place}: unknown key {unknown[0]!r}; there are: {', '.join(ROW_KEYS)}")
    for key, value in spec.items():
        listed = key in ("negatives", "fuse")
        words = value if listed and isinstance(value, list) else [value]
        if not words or not all(isinstance(word, str) for word in words):
            raise InputError(f"{place}: {key} must be text{', or a list of it' if listed else ''}")
        for word in words if key in ("negatives", "rounds_of") else ():
            if word not in MODELS_OWN:
                try:
                    parse_negatives(word.split())
                except InputError as error:
                    raise InputError(f"{place}: {error}") from error
    if not SOURCES & spec.keys() and spec.get("start") not in ("origin", "sft"):
        raise InputError(f"{place}: start must be origin or sft; without it: baseline, fuse or model_of")
    for key in ("choose", "predict"):
        _check_flags(f"{place}: {key}", spec.get(key, ""))
    if (source := spec.get("candidates", "sampled")) not in candidates:
        raise InputError(f"{place}: no candidates {source!r} are described")


def _check_flags(place: str, flags: Any) -> None:
    try:
        shlex.split(flags if isinstance(flags, str) else "'")
    except ValueError as error:
        raise InputError(f"{place}: must be flags as they are typed, not {flags!r}") from error


@dataclass(frozen=True)
class Stage:
    """One command line, and what must be finished before it.

    Args:
        name (`str`): unique in the graph; `<row>/<step>` for what belongs to one row.
        command (`list[str]`): script and flags, run from the project's folder.
        after (`list[str]`): stages whose results it reads.
        result (`Path`): what it leaves when it is finished.
        seconds (`float`): how long it takes on two CPU cores, roughly.
    """

    name: str
    command: list[str]
    after: list[str]
    result: Path
    seconds: float


@dataclass(frozen=True)
class Settings:
    """What a plan is made for.

    Args:
        data_dir (`str`): data folder; empty is MovieLens-100K, which the first stage makes.
        model_name_or_path, encoder (`str`): as the scripts take them.
        output (`Path`): folder of the comparison; one seed's runs.
        results_csv (`Path`): the table of these rows.
        sizes (`dict[str, int]`): records used: train, preferences, valid, test.
        seed (`int`): of every stage but `prepare_data.py`, so that all seeds share their data.
        iterations (`int`): rounds of the iterated rows.
    """

    data_dir: str
    model_name_or_path: str
    encoder: str
    output: Path
    results_csv: Path
    sizes: dict[str, int]
    seed: int
    iterations: int

    @property
    def data(self) -> str:
        return self.data_dir or "sampled_data/ml-100k"


@dataclass
class Plan:
    """The stages that some rows need, each once, in an order in which they can be run.

    Args:
        description (`dict`): `configs/comparison.yaml`.
        settings (`Settings`): what the plan is made for.
        stages (`dict[str, Stage]`): by name; filled by `add_row`.
    """

    description: dict[str, Any]
    settings: Settings
    stages: dict[str, Stage] = field(default_factory=dict)

    def add_row(self, row: str) -> None:
        """Adds what a row of the table needs: training, predictions, evaluation."""
        settings, folder, predicted = self.settings, self.folder(row), self.predicted(row)
        self.add(
            f"{slug(row)}/evaluate",
            "evaluate.py",
            {
                "predictions": predicted.result,
                "data_dir": settings.data,
                "dataset": Path(settings.data).name,
                "method": row,
                "encoder": settings.encoder,
                "metrics_json": folder / "metrics.json",
                "results_csv": settings.results_csv,
            }
            | self.seeded(),
            after=[predicted],
            result=folder / "metrics.json",
        )

    def folder(self, row: str) -> Path:
        return self.settings.output / slug(row)

    def predicted(self, row: str) -> Stage:
        """The row's predictions; their result is a folder, for the file in it is named after the records there are."""
        spec, folder, name = self.description["rows"][row], self.folder(row), f"{slug(row)}/predict"
        result = folder / "predictions"
        if "baseline" in spec:
            return self.add(
                name,
                f"predict_baselines.py --method {spec['baseline']}",
                self.seeded()
                | {"output_dir": folder, "data_dir": self.settings.data}
                | self.samples(train="train", eval="valid", predict="test"),
                after=self.data(),
                result=result,
            )
        if "fuse" in spec:
            parts = [self.predicted(part) for part in spec["fuse"]]
            files = shlex.join(str(part.result) for part in parts)
            flags = self.seeded() | {"output_dir": folder}
            return self.add(name, f"fuse_predictions.py --predictions {files}", flags, after=parts, result=result)
        model = spec.get("model_of", row)
        trained = self.trained(model, self.description["rows"][model], self.folder(model))
        return self.add(
            name,
            "generate_predict_batch.py",
            self.common() | {"adapter": adapter(trained), "output_dir": folder} | self.samples(predict="test"),
            after=trained or self.data(),
            result=result,
            records=self.settings.sizes["test"],
            own_flags=spec.get("predict"),
        )

    # -- What rows share ----------------------------------------------------------------------------------------------

    def data(self) -> list[Stage]:
        """The inputs that come from elsewhere: model, encoder and, unless a folder was given, MovieLens-100K."""
        settings = self.settings
        downloads = self.add(
            "downloads",
            "prepare_data.py --download_only",
            {"model_name_or_path": settings.model_name_or_path, "encoder": settings.encoder},
            after=[],
            result=settings.output,
        )
        if settings.data_dir:
            return [downloads]
        made = self.add(
            "data",
            "prepare_data.py --dataset movielens",
            {"output_dir": settings.data},
            after=[downloads],
            result=Path(settings.data) / "test_sample.json",
        )
        return [made]

    def sft(self) -> list[Stage]:
        folder = self.settings.output / "sft"
        return [
            self.add(
                "sft",
                "sft_smol.py",
                self.common() | {"output_dir": folder} | self.samples(train="train", eval="valid"),
                after=self.data(),
                result=folder / "final_model",
                records=self.settings.sizes["train"],
            )
        ]

    def candidates(self, source: str) -> Stage:
        """Titles that the SFT model proposes, generated once for all selectors."""
        flags, folder = self.description["candidates"][source], self.settings.output / "candidates" / source
        sft = self.sft()
        return self.add(
            f"candidates/{source}",
            f"dataset_generate_cluster_batch.py {flags}",
            self.common() | {"adapter": adapter(sft), "output_dir": folder} | self.preference_samples(),
            after=sft,
            result=folder / "data/candidates.json",
            records=self.settings.sizes["preferences"] + self.settings.sizes["valid"],
        )

    def preferences(
        self, negatives: str, source: str, trained: list[Stage], folder: Path | None = None, choose: str = ""
    ) -> Stage:
        """Preference data by one way of choosing negatives; `result` is its training file.

        Args:
            negatives: as a row has it.
            source: of the candidates, for selectors.
            trained: the model that plays against itself, for `self_play` alone.
            folder: where to; left out, the folder that all rows share.
            choose: further flags, for selectors.
        """
        kind, _, of = negatives.partition(" of ")
        if kind in ("random", "self_play"):
            if kind == "random":  # needs no model, and no GPU
                model, flags = [], {"data_dir": self.settings.data} | self.seeded()
            else:
                model = {"sft": self.sft, "origin": list}[of]() if of else trained
                flags = self.common() | {"adapter": adapter(model)}
            name = slug(negatives) if folder is None else str(folder.relative_to(self.settings.output))
            folder = folder or self.settings.output / "negatives" / name
            return self.add(
                f"negatives/{name}",
                f"dataset_generate.py --method {kind}",
                flags | {"output_dir": folder} | self.preference_samples(),
                after=model or self.data(),
                result=folder / "data/dpo_train.json",
                records=0 if kind == "random" else self.settings.sizes["preferences"] + self.settings.sizes["valid"],
            )
        candidates = self.candidates(source)
        name = slug(f"{source} {negatives} {choose}")
        folder = self.settings.output / "negatives" / name
        return self.add(
            f"negatives/{name}",
            f"dataset_generate_cluster_batch.py --negatives {negatives} {choose}",
            {"candidates": candidates.result, "data_dir": self.settings.data, "output_dir": folder}
            | self.seeded()
            | self.preference_samples(),
            after=[candidates],
            result=folder / "data/negatives_train.json",
        )

    # -- Training -----------------------------------------------------------------------------------------------------

    def trained(self, row: str, spec: dict[str, Any], folder: Path) -> list[Stage]:
        """The stage whose adapter is the row's model; none for the base model alone."""
        model = self.sft() if spec["start"] == "sft" else []
        if "rounds_of" in spec:
            return self.iterated(row, spec["rounds_of"], model, folder)
        trainings = spec.get("negatives", [])
        trainings = [trainings] if isinstance(trainings, str) else trainings
        for number, negatives in enumerate(trainings, 1):
            round_number = number if number < len(trainings) else None
            data = self.preferences(negatives, spec.get("candidates", "sampled"), model, choose=spec.get("choose", ""))
            model = [self.aligned(slug(row), round_number, model, data, folder)]
        return model

    def iterated(self, row: str, negatives: str, model: list[Stage], folder: Path) -> list[Stage]:
        """Rounds of self-play, SFT and DPO, each on the model of the round before (SPRec, arXiv:2412.09243)."""
        for number in range(1, self.settings.iterations + 1):
            place = folder / f"round_{number}"
            data = self.preferences(negatives, "", model, place / "negatives")
            sft = self.add(
                f"{slug(row)}/sft_{number}",
                "sft_smol.py --num_train_epochs 1",
                self.common() | {"adapter": adapter(model), "output_dir": place / "sft"} | self.preference_samples(),
                after=model,
                result=place / "sft/final_model",
                records=self.settings.sizes["preferences"] // 2,  # one epoch of two
            )
            round_number = number if number < self.settings.iterations else None
            model = [self.aligned(slug(row), round_number, [sft], data, folder)]
        return model

    def aligned(self, row: str, round_number: int | None, model: list[Stage], data: Stage, folder: Path) -> Stage:
        """DPO or S-DPO on a model; all but a row's last training have a number, and a folder of their round."""
        name = f"{row}/train" if round_number is None else f"{row}/train_{round_number}"
        folder = folder if round_number is None else folder / f"round_{round_number}/dpo"
        train_file = data.result
        return self.add(
            name,
            "DPO_from_dpoData.py",
            self.common()
            | {
                "train_data": train_file,
                "valid_data": train_file.with_name(train_file.name.replace("_train", "_valid")),
                "adapter": adapter(model),
                "output_dir": folder,
            },
            after=[*model, data],
            result=folder / "final_model",
            records=self.settings.sizes["preferences"],
        )

    # -- Flags --------------------------------------------------------------------------------------------------------

    def seeded(self) -> dict[str, Any]:
        return {"seed": self.settings.seed}

    def common(self) -> dict[str, Any]:
        settings = self.settings
        return {"data_dir": settings.data, "model_name_or_path": settings.model_name_or_path} | self.seeded()

    def samples(self, **sizes: str) -> dict[str, int]:
        return {f"max_{split}_samples": self.settings.sizes[size] for split, size in sizes.items()}

    def preference_samples(self) -> dict[str, int]:
        return self.samples(train="preferences", eval="valid")

    def add(
        self,
        name: str,
        command: str,
        flags: dict[str, Any],
        after: list[Stage],
        result: Path,
        records: int = 0,
        own_flags: str | None = None,
    ) -> Stage:
        """Adds a stage, unless it is there, and returns it; its own flags take the place of its script's."""
        if name not in self.stages:
            words = shlex.split(command)
            for flag, value in flags.items():
                words += [f"--{flag}", str(value)]
            words += shlex.split(self.description["flags"].get(words[0], "") if own_flags is None else own_flags)
            cost = self.description["seconds"][words[0]]
            seconds = cost["start"] + cost["record"] * records
            self.stages[name] = Stage(name, words, [stage.name for stage in after], result, seconds)
        return self.stages[name]


def adapter(trained: list[Stage]) -> str:
    """The adapter that a training stage leaves; an empty word is the base model alone."""
    return str(trained[-1].result) if trained else ""


def slug(name: str) -> str:
    """A row's name as the name of a folder.

    ```python
    >>> slug("SPRec w/o SFT"), slug("S-DPO K=10")
    ('sprec_wo_sft', 's_dpo_k10')
    ```
    """
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"[/=]", "", name.lower())).strip("_")
