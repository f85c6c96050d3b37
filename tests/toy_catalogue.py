"""A catalogue of nine titles with none to two genres each, titles outside it, and records and samplers of them."""

from hypothesis import strategies as st

from cebs.catalogue import Catalogue
from cebs.negatives import NegativeSampler
from cebs.prompts import Record, quote

TITLES = [f"T{number}" for number in range(9)]
UNKNOWN = ["U0", "U1", "U2"]
CATALOGUE = Catalogue(
    TITLES,
    {title: ["aceg"[number % 4], "bdf"[number % 3]][: number % 3] for number, title in enumerate(TITLES)},
    list("abcdefg"),
)
known = st.sampled_from(TITLES)


def make_record(history, target):
    return Record("Do.", f"Read: {', '.join(map(quote, history))}.", f"{quote(target)}\n")


def make_sampler(train=(), unknown_titles="keep", fallback="random", seed=0, catalogue=CATALOGUE, same_series="keep"):
    settings = {"unknown_titles": unknown_titles, "same_series": same_series, "fallback": fallback, "seed": seed}
    return NegativeSampler(catalogue, [make_record(*row) for row in train], **settings)
