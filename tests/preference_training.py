"""What the tests of the alignment stage share: records, ratios, tiny trainers of ours and of TRL's, a step of them."""

import pytest
import torch
from datasets import Dataset
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from cebs.choices import CatalogueChoices
from cebs.models import load_model
from cebs.prompts import encode_completion
from cebs.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer
from utils import load_tokenizer

PROMPTS = ['### Input:\n"Emma (1815)"\n### Response:\n', '### Input:\n"A", "B", "Dracula (1897)"\n### Response:\n', "x"]
PAIRS = [
    {"prompt": PROMPTS[0], "chosen": '"Persuasion (1817)"', "rejected": ['"Dracula (1897)"']},
    {"prompt": PROMPTS[1], "chosen": '"Carmilla (1872)"', "rejected": ['"Emma (1815)"']},
    {"prompt": PROMPTS[2], "chosen": '"O"', "rejected": ['"The Time Machine (1895)"']},
    {"prompt": PROMPTS[0], "chosen": '"Evelina (1778)"', "rejected": ['"O"']},
]
LISTS = [
    {"prompt": PROMPTS[0], "chosen": '"Persuasion (1817)"', "rejected": ['"Dracula (1897)"', '"O"', '"Emma (1815)"']},
    {"prompt": PROMPTS[1], "chosen": '"Carmilla (1872)"', "rejected": ['"Emma (1815)"']},
    {"prompt": PROMPTS[2], "chosen": '"O"', "rejected": ['"The Time Machine (1895)"', '"Evelina (1778)"']},
]

CATALOGUE = ["Persuasion (1817)", "Dracula (1897)", "O", "Emma (1815)", "Carmilla (1872)", "The Time Machine (1895)"]
CATALOGUE += ["Evelina (1778)", "Emma (1816)", "Emmeline"]

# of one record: the chosen title's log-ratio, the rejected titles' with whether each is there, and beta
RATIOS = (
    st.floats(-50, 50),
    st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=1, max_size=6).filter(
        lambda rejected: any(present for _, present in rejected)
    ),
    st.floats(0.01, 2),
)


def loss_of_one(loss, chosen, rejected, beta):
    """A loss over lists, of one record drawn from `RATIOS`."""
    return loss(
        torch.tensor([chosen], dtype=torch.float64),
        torch.tensor([[value for value, _ in rejected]], dtype=torch.float64),
        torch.tensor([[present for _, present in rejected]]),
        beta,
    ).item()


def make_adapted(tiny_model, std=0.2):
    """A tiny model with an adapter; where its weights are not zero, policy, reference and base model all differ."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(tiny_model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def make_trainer(model, tiny_model, folder, records, *, base=SoftmaxDPOTrainer, catalogue=None, **settings):
    config = SoftmaxDPOConfig if issubclass(base, SoftmaxDPOTrainer) else DPOConfig
    settings = {"per_device_train_batch_size": len(records), "beta": 0.3, **settings}
    args = config(output_dir=str(folder), report_to=[], bf16=False, activation_checkpointing=False, **settings)
    tokenizer = load_tokenizer(tiny_model)
    return base(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(records),
        eval_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
        **({} if catalogue is None else {"choices": CatalogueChoices(tokenizer, catalogue)}),
    )


class ApartDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that were tokenised as ours are: prompt and completion apart."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return Dataset.from_list(
            [
                {
                    "prompt_ids": processing_class(record["prompt"]).input_ids,
                    "chosen_ids": encode_completion(processing_class, record["chosen"]),
                    "rejected_ids": encode_completion(processing_class, record["rejected"][0]),
                }
                for record in dataset
            ]
        )


def step(trainer):
    """Loss, gradients and logged figures of one forward and backward pass, the policy moved off its reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name and "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {
        name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.grad is not None
    }
    return loss.detach(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same_step(ours, other, tolerance=1e-4):
    torch.testing.assert_close(ours[0], other[0], atol=tolerance, rtol=tolerance)
    assert ours[1].keys() == other[1].keys() and ours[1]
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=tolerance, rtol=1e-3, msg=name)
    for name, value in ours[2].items():
        assert value == pytest.approx(other[2][name], abs=1e-3), name
