"""The benchmarks, as small as they go: each runs from its command line and writes the rows that it prints."""

import pytest

from utils import read_json

SMALL = ("--repetitions", 1)
RECORDS = ("--num_records", 2, *SMALL)


@pytest.mark.parametrize(
    ("name", "flags", "cases"),
    [
        ("sampling", (*RECORDS, "--max_new_tokens", 4), 3),
        ("sampling", (*RECORDS, "--max_new_tokens", 4, "--baseline", "false", "--scaling", "true"), 2 + 6 + 4),
        ("beam", (*RECORDS, "--num_beams", 3), 2),
        ("softmax_dpo", (*RECORDS, "--batch_size", 2), 2 * 5),
        ("trie", (*RECORDS, "--num_beams", 3, "--num_titles", 200), 2),
    ],
)
def test_writes_its_rows(run_script, tiny_model, data_dir, tmp_path, name, flags, cases):
    file = tmp_path / "rows.json"
    where = ("--model_name_or_path", tiny_model, "--data_dir", data_dir, "--json", file)
    result = run_script(f"benchmarks/bench_{name}.py", *where, *flags)
    assert result.code == 0, result.stderr

    rows = read_json(file)
    assert len(rows) == cases and len({row["case"] for row in rows}) == cases
    for row in rows:
        unit = "mb" if "ours_mb" in row else "s"
        ours, baseline = row[f"ours_{unit}"], row[f"baseline_{unit}"]
        assert row["case"] in result.stdout
        if unit == "s":
            assert ours > 0
        if baseline is None:
            assert "false" in flags and row["ratio"] is None
        elif ours:  # so little memory that none is seen
            assert row["ratio"] == pytest.approx(baseline / ours)


def test_evaluation_writes_its_rows(run_script, tmp_path):
    small = ("--titles", 60, "--users", 20, "--resamples", 10, *SMALL)
    result = run_script("benchmarks/bench_evaluate.py", *small, "--json", tmp_path / "rows.json")
    assert result.code == 0, result.stderr
    assert all(row["case"] in result.stdout for row in read_json(tmp_path / "rows.json"))


def test_loss_by_token(run_script, tiny_model, data_dir):
    """Fewer choices, less loss; the catalogue's titles all begin with a quote."""
    flags = ("--model_name_or_path", tiny_model, "--data_dir", data_dir, "--dtype", "float32")
    result = run_script("benchmarks/loss_by_token.py", *flags)
    assert result.code == 0, result.stderr
    lines = [line.rsplit(maxsplit=7) for line in result.stdout.splitlines()[-3:]]
    all_tokens, catalogue, popularity = ([float(number) for number in numbers] for _, *numbers in lines)
    assert all(fewer <= more for fewer, more in zip(catalogue, all_tokens, strict=True))
    assert catalogue[1] == popularity[1] == 0 < all_tokens[1] and popularity[0] > 0
