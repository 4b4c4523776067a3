"""The report of a study: one self-contained page, PNG figures, CSV, JSONL and a Markdown summary.

Everything is computed from the outcomes and logs on disk, so it can be written at any time, from what is finished.
"""

import csv
import datetime
import html
import json
import pathlib
import statistics as mean_of
import sys
from typing import Any

from attnx.ablate import runner
from attnx.ablate.figures import draw, figures, on, to_plotly
from attnx.ablate.results import Result, results
from attnx.ablate.study import Cell, Study

RATES = {'shared': 'shared by all arms', 'transfer': 'base width / width times the base’s'}


def arms_table(study: Study) -> list[list[str]]:
    """Header and one row an arm: what differs from the base, and what it costs."""
    arms = study.resolved()
    costs = {arm.name: study.costs(arm) for arm in arms}
    goal = costs[study.match.to or study.reference]
    matched = study.match.what
    rows = [
        [
            'arm',
            'differs in',
            'parameters',
            'FLOPs/token',
            'state bytes',
            *([f'match of {matched}'] if matched != 'none' else []),
        ]
    ]
    for arm in arms:
        cost = costs[arm.name]
        change = ', '.join(f'{k} = {v!r}' for k, v in arm.change.items()) or 'nothing: the base'
        row = [arm.name, change, f'{cost.parameters:,}', f'{cost.flops:,.0f}', f'{cost.state:,}']
        if matched != 'none':
            row.append(f'{getattr(cost, matched) / getattr(goal, matched) - 1:+.2%}' if getattr(goal, matched) else 'no cost')
        rows.append(row)
    return rows


def verdict(result: Result, more: bool) -> str:
    """In words: better, worse, or not told apart."""
    d = result.against
    if d is None:
        return 'no seed in common with the baseline'
    if d.p is None:
        return 'one seed: no statement'
    better = (d.mean > 0) == more
    if d.adjusted < 0.05:
        return f'{"better" if better else "worse"} (p = {d.adjusted:.3g} after correction)'
    return f'not told apart from the baseline (p = {d.adjusted:.3g} after correction)'


def results_table(study: Study, found: list[Result]) -> list[list[str]]:
    more = study.more
    header = [
        'arm',
        'task',
        study.metric,
        'seeds',
        f'minus {study.reference}',
        '95 % interval',
        'verdict',
        'tokens/s',
        'status',
    ]
    header += ['learning rate'] if study.learning_rates else []
    rows = [header]
    for r in found:
        value = f'{mean_of.fmean(r.values.values()):.4f}' if r.values else '—'
        d = r.against
        paired = ['—', '—', 'the baseline'] if r.arm == study.reference else ['—', '—', verdict(r, more)]
        if d is not None:
            paired[:2] = [f'{d.mean:+.4f}', f'[{d.low:+.4f}, {d.high:+.4f}]']
        row = [
            r.arm,
            r.task or 'the base’s',
            value,
            str(len(r.values)),
            *paired,
            f'{r.speed:,.0f}' if r.speed else '—',
            r.status,
        ]
        rows.append(row + ([f'{r.rate:g}'] if study.learning_rates else []))
    return rows


# The page


def circumstances(study: Study, cells: list[Cell]) -> dict[str, Any]:
    """How to get these numbers again: command, seeds, and where and with what the runs ran."""
    rates = ', '.join(f'{r:g}' for r in study.learning_rates)
    entries = runner.finished(study, cells)
    of_runs = lambda name: '; '.join(dict.fromkeys(e[name] for e in entries if name in e)) or 'no run is finished'
    return {
        'command': ' '.join(['python', '-m', 'attnx.ablate', *[a for a in sys.argv[1:] if a.startswith('--config')]]),
        'seeds': ', '.join(map(str, study.seeds)) + (', of an arm batched in one program' if study.batch_seeds else ''),
        'learning rate': f'swept over {rates}, each arm at its best' if rates else RATES[study.rate],
        'initial values': 'equal for equal parts of different arms (a key a layer and part)',
        'data': 'the same rows in the same order for the same seed',
        'device': of_runs('device'),
        'time of all runs': f'{sum(e["seconds"] for e in entries) / 60:.1f} minutes, one after another',
        'versions': of_runs('versions'),
        'commit': of_runs('commit'),
        'written': datetime.datetime.now(datetime.UTC).isoformat(timespec='minutes'),
    }


def summary(study: Study, found: list[Result], cells: list[Cell]) -> list[str]:
    """What the numbers say, sentence by sentence."""
    more = study.more
    done = len(runner.finished(study, cells))
    lines = [f'{done} of {len(cells)} runs are finished.'] if done < len(cells) else []
    for task in dict.fromkeys(r.task for r in found):
        here = [r for r in found if r.task == task]
        scored = [r for r in here if r.values]
        if scored:
            best = (max if more else min)(scored, key=lambda r: mean_of.fmean(r.values.values()))
            lines.append(
                f'Best {study.metric}{on(task)}: {best.arm}, {mean_of.fmean(best.values.values()):.4f} '
                f'(mean of {len(best.values)} seeds).'
            )
        for word, wanted in (('better', True), ('worse', False)):
            names = [
                r.arm
                for r in here
                if (d := r.against) and d.p is not None and d.adjusted < 0.05 and ((d.mean > 0) == more) == wanted
            ]
            if names:
                lines.append(f'Significantly {word} than {study.reference}{on(task)}: {"; ".join(names)}.')
        unclear = [r.arm for r in here if (d := r.against) and d.p is not None and d.adjusted >= 0.05]
        if unclear:
            lines.append(
                f'Not told apart from {study.reference}{on(task)} with {len(study.seeds)} seeds: {"; ".join(unclear)}.'
            )
        bad = [f'{r.arm} ({r.status})' for r in here if r.status != 'finished']
        if bad:
            lines.append(f'Not run to the end{on(task)}: {"; ".join(bad)}.')
    return lines


STYLE = (
    'body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}'
    'table{border-collapse:collapse;font-size:13px;margin:1rem 0;display:block;overflow-x:auto}'
    'th,td{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:left;vertical-align:top}th{background:#f6f6f6}'
    'code{background:#f4f4f4;padding:.1rem .3rem}h2{margin-top:2rem}'
)


def _html_table(rows: list[list[str]]) -> str:
    cell = lambda tag, row: ''.join(f'<{tag}>{html.escape(str(c))}</{tag}>' for c in row)
    return f'<table><tr>{cell("th", rows[0])}</tr>{"".join(f"<tr>{cell('td', row)}</tr>" for row in rows[1:])}</table>'


def _markdown_table(rows: list[list[str]]) -> str:
    line = lambda row: '| ' + ' | '.join(str(c).replace('|', '\\|').replace('\n', ' ') for c in row) + ' |'
    return '\n'.join([line(rows[0]), '|' + '---|' * len(rows[0]), *map(line, rows[1:])])


def write(study: Study) -> pathlib.Path:
    """Writes report.html, report.md, results.csv, results.jsonl and figures/*.png into the study's folder."""
    import plotly.io
    from plotly.offline import get_plotlyjs

    out, cells = runner.folder(study), study.cells()
    (out / 'figures').mkdir(parents=True, exist_ok=True)
    entries, found = runner.finished(study, cells), results(study, cells)
    tables = {'Arms': arms_table(study), 'Results': results_table(study, found)}
    said, how = summary(study, found, cells), circumstances(study, cells)
    drawn = figures(study, found, cells)

    rows = runner.table(entries)
    with (out / 'results.csv').open('w', newline='') as stream:
        writer = csv.writer(stream)
        writer.writerow(rows)
        writer.writerows(zip(*rows.values()))
    (out / 'results.jsonl').write_text(''.join(json.dumps(e) + '\n' for e in entries))
    for figure in drawn:
        draw(figure, out / 'figures' / f'{figure.name}.png')

    text = [f'# {study.question}', '', *(f'- {line}' for line in said), '']
    for name, table in tables.items():
        text += [f'## {name}', '', _markdown_table(table), '']
    text += ['## Figures', '', *(f'![{f.title}](figures/{f.name}.png)' for f in drawn), '']
    text += ['## How to get these numbers again', '', *(f'- {k}: {v}' for k, v in how.items()), '']
    (out / 'report.md').write_text('\n'.join(text))

    parts = [f'<h1>{html.escape(study.question)}</h1><ul>', *(f'<li>{html.escape(line)}</li>' for line in said), '</ul>']
    parts += [f'<h2>{name}</h2>{_html_table(table)}' for name, table in tables.items()]
    parts += ['<h2>Figures</h2>', *(plotly.io.to_html(to_plotly(f), full_html=False, include_plotlyjs=False) for f in drawn)]
    parts += ['<h2>How to get these numbers again</h2>', _html_table([['what', ''], *map(list, how.items())])]
    head = f'<meta charset="utf-8"><title>{html.escape(study.question)}</title><style>{STYLE}</style>'
    head += f'<script>{get_plotlyjs()}</script>'
    page = out / 'report.html'
    page.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n')
    return page
