"""Parts of a report, for the tests of the page."""

from __future__ import annotations


def score(against="1,000 random", mean=24.613, sd: float | None = 0.312, floor: float | None = 19.4, n=1000):
    below = None if floor is None else {"mean": floor, "sd": 0.25, "values": [19.2, 19.6], "count": n, "against": 1000}
    excess = None if floor is None else mean - floor
    values = [mean - 0.3, mean + 0.3] if sd else [mean]
    count = 10_000 if against == "all of the data" else 1000
    facts = {"against": against, "count": count, "n": n, "values": values, "floor": below, "excess": excess}
    return facts | {"mean": mean, "sd": sd}


def check(verdict="ok", name="variety", pictures=None, fault=""):
    figures = {"floor_coverage": 0.9412, "pairs": 1234}
    words = {"name": name, "verdict": verdict, "headline": "All is well.", "details": "No."}
    words |= {"fault": fault, "judgement": f"{verdict}: {fault}" if fault else verdict, "caption": f"Of {name}"}
    return words | {"figures": figures, "pictures": pictures}
