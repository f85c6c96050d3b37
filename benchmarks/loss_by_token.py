"""Where the loss of the validation titles lies: token by token, among all tokens and among the catalogue's.

Beside it what popularity alone would lose: each title's exposure in the training records, and a little for all.

    python benchmarks/loss_by_token.py --adapter output/recipe/sft/final_model --data_dir ../shared/goodreads
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm
from trl import TrlParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ModelOnData
from cebs.branches import edge_logits, shared_rows, token_of
from cebs.catalogue import exposure_counts, load_catalogue
from cebs.choices import CatalogueChoices
from cebs.models import load_for_inference
from cebs.prompts import encode_prompt, read_records
from cebs.sources import find_model
from utils import load_tokenizer, run_script

FIRST = 6  # tokens that are shown: the quote, and five of the title
UNSEEN = 0.3  # exposure of a title that no training record has, on top of every title's own


@torch.no_grad()
def main(args: ModelOnData) -> None:
    data_dir, model_dir = Path(args.data_dir), find_model(args.model_name_or_path)
    tokenizer, model = load_tokenizer(model_dir), load_for_inference(model_dir, args)
    choices = CatalogueChoices(tokenizer, load_catalogue(data_dir).titles)
    trie, paths = choices.trie, choices.paths

    exposure = exposure_counts(read_records(data_dir / "train_sample.json"))
    mass = torch.zeros(len(trie.tokens), dtype=torch.float64)  # of all titles below a node
    for title, path in paths.items():
        mass[path] += exposure[title] + UNSEEN
        mass[0] += exposure[title] + UNSEEN

    losses: dict[str, list[torch.Tensor]] = {"model, all tokens": [], "model, catalogue": [], "popularity": []}
    records = [record for record in read_records(data_dir / "valid_sample.json") if record.target in paths]
    for record in tqdm(records, desc="loss", unit=" records", mininterval=1):
        path = paths[record.target]
        parents = choices.parents[path]
        prompt, _ = encode_prompt(tokenizer, record.prompt, 1024)
        rows = shared_rows([prompt], [[trie.tokens[path].tolist()]], 0, model.dtype)
        inputs = {name: rows[name].to(model.device) for name in ("input_ids", "attention_mask", "position_ids")}
        logits = model(**inputs, logits_to_keep=len(path)).logits[0].float().cpu()  # [T, V]
        allowed, _ = edge_logits(trie, logits, parents)  # [T, M]
        chosen = logits.gather(1, token_of(trie, path)[:, None])[:, 0]
        losses["model, all tokens"].append(logits.logsumexp(1) - chosen)
        losses["model, catalogue"].append(allowed.logsumexp(1) - chosen)
        losses["popularity"].append(mass[parents].log() - mass[path].log())

    print(f"\nnats, mean of {len(records)} titles; the first token is the quote")
    print(f"{'':20}{'title':>8}" + "".join(f"{f'token {i}':>9}" for i in range(1, FIRST + 1)))
    for name, of_titles in losses.items():
        first = torch.nn.utils.rnn.pad_sequence(of_titles, batch_first=True)[:, :FIRST].mean(0)
        whole = torch.stack([loss.sum() for loss in of_titles]).mean()
        print(f"{name:20}{whole:8.2f}" + "".join(f"{loss:9.2f}" for loss in first))


if __name__ == "__main__":
    run_script(main, TrlParser((ModelOnData,), description=__doc__))
