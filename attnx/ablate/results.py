"""What a study found: outcomes gathered by arm and task, and paired differences to the baseline."""

import statistics as mean_of
from typing import NamedTuple

from attnx.ablate import runner
from attnx.ablate.statistics import Difference, difference, holm
from attnx.ablate.study import Cell, Study


class Result(NamedTuple):
    """One arm on one task, at its best learning rate."""

    arm: str
    task: str
    rate: float
    values: dict[int, float]  # seed -> the study's metric
    status: str  # finished, or what became of it
    speed: float | None  # tokens a second, median over seeds
    against: Difference | None  # the baseline


def results(study: Study, cells: list[Cell] | None = None) -> list[Result]:
    """Every arm on every task: values by seed at the best learning rate, and the paired difference to the baseline."""
    metric = study.metric
    grouped: dict[tuple[str, str], dict[float, list[dict]]] = {}
    for entry in runner.finished(study, cells):
        grouped.setdefault((entry['arm'], entry['task']), {}).setdefault(entry['rate'], []).append(entry)
    found = []
    for (arm, task), rates in grouped.items():
        by_seed = {
            rate: {e['seed']: e['values'][metric] for e in es if metric in e.get('values', {})} for rate, es in rates.items()
        }
        score = {rate: mean_of.fmean(values.values()) for rate, values in by_seed.items() if values}
        best = (max if study.more else min)(score, key=score.get) if score else next(iter(rates))
        entries, values = rates[best], by_seed[best]
        speeds = [e['tokens_per_second'] for e in entries if 'tokens_per_second' in e]
        status = ', '.join(dict.fromkeys(e['status'] for e in entries))
        found.append(Result(arm, task, best, values, status, mean_of.median(speeds) if speeds else None, None))
    for task in dict.fromkeys(r.task for r in found):
        here = [i for i, r in enumerate(found) if r.task == task]
        base = next((found[i].values for i in here if found[i].arm == study.reference), {})
        others = [i for i in here if found[i].arm != study.reference]
        for i, paired in zip(others, holm([difference(found[i].values, base) for i in others])):
            found[i] = found[i]._replace(against=paired)
    return found
