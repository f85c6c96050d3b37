"""
Stage 1: several adapters made into one, by averaging the weights that they give the model: of the epochs of a training,
or of the same training from several seeds. What it was worth here is in docs/recipe.md.

# The epochs of one training
```bash
python average_adapters.py --adapters output/sft/checkpoint-*
```

# Three seeds, into a folder of its own; then negatives by that adapter
```bash
python average_adapters.py --adapters output/seed_{0,1,2}/sft/final_model --output_dir output/averaged_seeds
python dataset_generate_cluster_batch.py --adapter output/averaged_seeds/final_model --data_dir sampled_data/ml-100k
```

An adapter adds B A to a matrix of the model. The mean of n such products is a product again, of n times the rank, so
that nothing is lost, whatever the ranks (peft's combination `cat`); the means of the A and of the B would be another
model. Of epochs it is stochastic weight averaging (Izmailov et al., 2018, UAI), of seeds a model soup (Wortsman et al.,
2022, ICML).
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from peft import PeftModel

from cebs.models import load_model, save_trained
from cebs.runs import ADAPTER_WEIGHTS
from cebs.sources import find_model
from utils import (
    InputError,
    RunArguments,
    ScriptParser,
    base_fingerprint,
    check_adapter,
    load_tokenizer,
    run_folder,
    run_script,
)


@dataclass(kw_only=True)
class ScriptArguments(RunArguments):
    """
    Arguments of this stage, beside those of every run.

    Args:
        adapters (`list[str]`): folders of the adapters: `final_model` or a checkpoint of a finished training.
        model_name_or_path (`str`): folder or hub name of the base model that they were made for.
    """

    adapters: list[str] = field(
        metadata={"help": "Two or more adapters: final_model folders or checkpoints of finished trainings."}
    )
    model_name_or_path: str = field(metadata={"help": "Folder or hub name of the base model that they were made for."})


def main(script_args: ScriptArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    adapters = script_args.adapters
    if len(adapters) < 2:
        raise InputError(f"--adapters {adapters[0]}: one adapter is its own mean; give two or more")
    model_dir = find_model(script_args.model_name_or_path)
    for adapter in adapters:
        check_adapter(adapter, model_dir)

    with run_folder(
        script_args.output_dir,
        script=__file__,
        arguments=asdict(script_args),
        inputs=[Path(adapter) / ADAPTER_WEIGHTS for adapter in adapters],
        base_model=base_fingerprint(model_dir),
        outputs=["final_model"],
        overwrite=script_args.overwrite,
    ) as run:
        if run.done:
            return

        # -- Averaging ------------------------------------------------------------------------------------------------
        names = [f"adapter {number}" for number in range(len(adapters))]
        model = PeftModel.from_pretrained(
            load_model(model_dir), adapters[0], adapter_name=names[0], use_safetensors=True
        )
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(adapter, name, use_safetensors=True)
        weights = [1 / len(names)] * len(names)
        model.add_weighted_adapter(names, weights, "default", combination_type="cat")

        # -- Output ---------------------------------------------------------------------------------------------------
        if run.writes_outputs:
            save_trained(model, load_tokenizer(model_dir), run.path / "final_model", model_dir)
        run.counts.update(adapters=len(adapters), rank=model.peft_config["default"].r)


def make_parser() -> ScriptParser:
    return ScriptParser((ScriptArguments,), __doc__, defaults="configs/average.yaml")


if __name__ == "__main__":
    run_script(main, make_parser())
