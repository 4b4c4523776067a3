"""Figures of a study: data first, drawn twice, by plotly for the page and by matplotlib for PNG."""

import html
import pathlib
import statistics as mean_of
from typing import NamedTuple

from attnx.ablate.generators import swapped_in
from attnx.ablate.results import Result, results
from attnx.ablate.statistics import pareto
from attnx.ablate.study import Cell, Study, slug
from attnx.train import metrics

COSTS = {'tokens_per_second': 'tokens/s, measured', 'flops': 'training FLOPs a token', 'state': 'bytes of decode state'}


class Figure(NamedTuple):
    name: str
    title: str
    kind: str  # lines, bars, heat, points
    x: str
    y: str
    series: list[dict]  # name, x, y, and low, high (bands, bars) or z (heat) or labels (points)


def figures(study: Study, found: list[Result], cells: list[Cell]) -> list[Figure]:
    made = [
        *_curves(study, cells),
        *_effects(study, found),
        *_layers(study, found),
        *_heat(study, found),
        *_fronts(study, found),
    ]
    return [f for f in made if any(s['x'] for s in f.series)]


def _curves(study, cells):
    name = study.metric.rpartition('/')[2]
    rates = {(r.arm, r.task): r.rate for r in results(study, cells)}
    for task in dict.fromkeys(c.task for c in cells):
        series = []
        for arm in dict.fromkeys(c.arm for c in cells):
            at: dict[int, list[float]] = {}
            for cell in cells:
                if (cell.arm, cell.task) == (arm, task) and cell.rate == rates.get((arm, task)):
                    for entry in metrics.read(cell.config.run_dir):
                        if entry['split'] == 'eval' and isinstance(entry.get(name), float):
                            at.setdefault(entry['step'], []).append(entry[name])
            steps = sorted(at)
            y = [mean_of.fmean(at[s]) for s in steps]
            series.append(
                {'name': arm, 'x': steps, 'y': y, 'low': [min(at[s]) for s in steps], 'high': [max(at[s]) for s in steps]}
            )
        yield Figure(f'curves{_tag(task)}', f'{name} while training{on(task)}; bands: all seeds', 'lines', 'step', name, series)


def _effects(study, found):
    for task in dict.fromkeys(r.task for r in found):
        here = [r for r in found if r.task == task and r.against is not None]
        series = {'name': 'difference', 'x': [r.arm for r in here], 'y': [r.against.mean for r in here]}
        series |= {'low': [r.against.low for r in here], 'high': [r.against.high for r in here]}
        title = (
            f'{study.metric} minus that of {study.reference}{on(task)}; bars: 95 % bootstrap intervals of paired differences'
        )
        yield Figure(f'effects{_tag(task)}', title, 'bars', 'arm', 'difference', [series])


def _layers(study, found):
    """The effect of swapping single layers, where arms were generated so."""
    swaps = [swapped_in(entry['swap'])[0] for entry in study.generate if 'swap' in entry]
    for task in dict.fromkeys(r.task for r in found):
        rows, layers = [], range(study.base['model']['num_layers'])
        for mixer in swaps:
            effect = {r.arm: r.against.mean for r in found if r.task == task and r.against is not None}
            rows.append([effect.get(f'layer {i}: {mixer}') for i in layers])
        if rows:
            series = [{'name': 'effect', 'x': [str(i) for i in layers], 'y': list(swaps), 'z': rows}]
            yield Figure(
                f'layers{_tag(task)}',
                f'effect on {study.metric} of swapping one layer{on(task)}',
                'heat',
                'layer',
                'swapped in',
                series,
            )


def _heat(study, found):
    if len(study.tasks) > 1:
        arms = list(dict.fromkeys(r.arm for r in found))
        value = {(r.arm, r.task): mean_of.fmean(r.values.values()) for r in found if r.values}
        z = [[value.get((arm, task)) for task in study.tasks] for arm in arms]
        yield Figure(
            'tasks',
            f'{study.metric} by arm and task',
            'heat',
            'task',
            'arm',
            [{'name': 'value', 'x': list(study.tasks), 'y': arms, 'z': z}],
        )


def _fronts(study, found):
    more = study.more
    arms = {arm.name: arm for arm in study.resolved()}
    for task in dict.fromkeys(r.task for r in found):
        here = [r for r in found if r.task == task and r.values]
        for cost, label in COSTS.items():
            at = [r.speed if cost == 'tokens_per_second' else getattr(study.costs(arms[r.arm], task), cost) for r in here]
            points = [(r, x) for r, x in zip(here, at) if x]
            if len({x for _, x in points}) < 2:
                continue  # equal cost for all: nothing to trade
            y = [mean_of.fmean(r.values.values()) for r, _ in points]
            sign = -1 if cost == 'tokens_per_second' else 1
            front = pareto([(sign * x, -v if more else v) for (_, x), v in zip(points, y)])
            series = {'name': 'arms', 'x': [x for _, x in points], 'y': y, 'labels': [r.arm for r, _ in points], 'front': front}
            yield Figure(
                f'pareto_{cost}{_tag(task)}',
                f'{study.metric} against {label}{on(task)}; filled: no other arm is better in both',
                'points',
                label,
                study.metric,
                [series],
            )


def _tag(task):
    return f'_{slug(task)}' if task else ''


def on(task):
    return f' on {task}' if task else ''


def to_plotly(figure: Figure):
    import plotly.graph_objects as go
    from plotly.colors import qualitative

    drawn, colors = go.Figure(), qualitative.D3
    for number, s in enumerate(figure.series):
        color = colors[number % len(colors)]
        if figure.kind == 'lines':
            band = {'x': s['x'] + s['x'][::-1], 'y': s['high'] + s['low'][::-1], 'fill': 'toself', 'fillcolor': color}
            quiet = {'opacity': 0.15, 'line': {'width': 0}, 'hoverinfo': 'skip', 'showlegend': False}
            drawn.add_scatter(**band, **quiet, legendgroup=s['name'])
            drawn.add_scatter(
                x=s['x'], y=s['y'], mode='lines+markers', name=s['name'], line={'color': color}, legendgroup=s['name']
            )
        elif figure.kind == 'bars':
            error = {'type': 'data', 'symmetric': False, 'array': [h - y for h, y in zip(s['high'], s['y'])]}
            error['arrayminus'] = [y - low for low, y in zip(s['low'], s['y'])]
            drawn.add_scatter(x=s['y'], y=s['x'], error_x=error, mode='markers', name=s['name'])
            drawn.add_vline(x=0, line={'dash': 'dot'})
            drawn.update_yaxes(autorange='reversed')  # arms as in the table, from the top
        elif figure.kind == 'heat':
            scale = {'colorscale': 'RdBu', 'zmid': 0} if figure.name.startswith('layers') else {'colorscale': 'Viridis'}
            text = [[None if v is None else f'{v:.3g}' for v in row] for row in s['z']]
            drawn.add_heatmap(x=s['x'], y=s['y'], z=s['z'], text=text, texttemplate='%{text}', **scale)
        else:
            symbols = ['circle' if i in s['front'] else 'circle-open' for i in range(len(s['x']))]
            drawn.add_scatter(
                x=s['x'],
                y=s['y'],
                text=s['labels'],
                mode='markers+text',
                textposition='top center',
                marker={'symbol': symbols, 'size': 10},
            )
    names = (figure.y, figure.x) if figure.kind == 'bars' else (figure.x, figure.y)
    drawn.update_layout(
        title=html.escape(figure.title),
        xaxis_title=html.escape(names[0]),
        yaxis_title=html.escape(names[1]),
        template='plotly_white',
        height=480,
    )
    return drawn


def draw(figure: Figure, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    drawn, axis = pyplot.subplots(figsize=(8, 4.8), dpi=120)
    for s in figure.series:
        if figure.kind == 'lines':
            axis.plot(s['x'], s['y'], marker='o', markersize=3, label=s['name'])
            axis.fill_between(s['x'], s['low'], s['high'], alpha=0.15)
        elif figure.kind == 'bars':
            errors = [[y - low for low, y in zip(s['low'], s['y'])], [high - y for high, y in zip(s['high'], s['y'])]]
            axis.errorbar(s['y'], s['x'], xerr=errors, fmt='o', capsize=3)
            axis.axvline(0, color='grey', linestyle=':')
            axis.set_ylim(len(s['x']) - 0.5, -0.5)
        elif figure.kind == 'heat':
            z = [[float('nan') if v is None else v for v in row] for row in s['z']]
            most = max((abs(v) for row in s['z'] for v in row if v is not None), default=1.0) or 1.0
            scale = {'cmap': 'RdBu', 'vmin': -most, 'vmax': most} if figure.name.startswith('layers') else {}
            drawn.colorbar(axis.imshow(z, aspect='auto', **scale), ax=axis)
            axis.set_xticks(range(len(s['x'])), s['x'], rotation=30, ha='right')
            axis.set_yticks(range(len(s['y'])), s['y'])
            for row, column in ((i, j) for i, values in enumerate(z) for j, v in enumerate(values) if v == v):
                box = {'facecolor': 'white', 'alpha': 0.7, 'edgecolor': 'none', 'pad': 1}
                axis.text(column, row, f'{z[row][column]:.3g}', ha='center', va='center', fontsize=8, bbox=box)
        else:
            fills = ['C0' if i in s['front'] else 'none' for i in range(len(s['x']))]
            axis.scatter(s['x'], s['y'], facecolors=fills, edgecolors='C0')
            axis.margins(x=0.15, y=0.1)  # room for names
            for x, y, label in zip(s['x'], s['y'], s['labels']):
                axis.annotate(label, (x, y), textcoords='offset points', xytext=(4, 4), fontsize=8)
    names = (figure.y, figure.x) if figure.kind == 'bars' else (figure.x, figure.y)
    axis.set(xlabel=names[0], ylabel=names[1])
    axis.set_title(figure.title, fontsize=9, wrap=True)
    if figure.kind == 'lines':
        axis.legend(fontsize=8, frameon=False)
    if figure.kind != 'heat':
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
    drawn.tight_layout()
    drawn.savefig(path)
    pyplot.close(drawn)
