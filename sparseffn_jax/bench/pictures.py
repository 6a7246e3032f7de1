"""The pictures that the demo and the benches draw, and the look of their wide tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich import box

# Okabe & Ito 2008, told apart by colour-blind readers too, and a grey and a wine red.
_DENSE, _SPARSE, _ACCENT = "#0072B2", "#D55E00", "#009E73"
_COLOURS = (
    _SPARSE,
    "#E69F00",
    "#CC79A7",
    _ACCENT,
    "#56B4E9",
    _DENSE,
    "#000000",
    "#999999",
    "#882255",
)
_MARKERS = "osD^v*PXh"
# Settings of a rich table with many columns: it fits the 80 that a pipe or a small terminal has.
NARROW_TABLE: Mapping[str, Any] = MappingProxyType(
    {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
)
# What the names of methods end with that are helped by refit and repair.
_HELPED = "+repair"
# Nats above dense that the enlarged panel shows.
_NEAR = 0.8
_TICKS = (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)


def plot_training(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    validation: Mapping[str, tuple[float, float]],
) -> None:
    """Draws training loss and its running mean, and validation losses at both ends as marks.

    All losses are cross-entropies in nats a token, whatever else the models were trained on.

    Args:
      path: PNG file to write.
      curves: for each model's name its steps and their losses.
      validation: for each model's name the validation losses before the first step and after the
        last.
    """
    figure, axes = _figure()
    for (name, points), colour in zip(curves.items(), (_DENSE, _SPARSE), strict=False):
        steps, losses = np.array(points).T
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.6)
        # Batches differ by more than training changes: the means of neighbours are what is read.
        near = max(1, len(steps) // 25)
        means = [np.convolve(x, np.full(near, 1.0 / near), "valid") for x in (steps, losses)]
        axes.plot(*means, color=colour, label=name, linewidth=1.5)
        axes.plot([0, steps[-1]], validation[name], "o", color=colour, markersize=5)
    axes.set(
        xlabel="step",
        ylabel="cross-entropy (nats a token)",
        title="Fine-tuning on the same batches",
    )
    axes.legend(
        title="lines: training, single batches and their running mean; dots: validation",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=len(curves),
        frameon=False,
    )
    _save(figure, path)


def plot_layers(path: Path, layers: Sequence[Mapping[str, float]], title: str) -> None:
    """Draws how much each layer keeps and, where it is known, what that is predicted to cost.

    Args:
      path: PNG file to write.
      layers: for each layer its ``width`` in hidden units, the ``rank`` of its bypass and, from a
        plan, its ``damage`` in nats a token.
      title: what is said above the panels.
    """
    panels = {
        "width": ("units kept", _SPARSE),
        "rank": ("bypass rank", _ACCENT),
        "damage": ("predicted loss (nats)", _DENSE),
    }
    known = [name for name in panels if name in layers[0]]
    figure = Figure(figsize=(7, 0.5 + 1.7 * len(known)), layout="constrained")
    for axes, name in zip(figure.subplots(len(known), sharex=True), known, strict=True):
        label, colour = panels[name]
        _decorate(axes)
        axes.bar(np.arange(len(layers)), [x[name] for x in layers], color=colour, width=0.7)
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[-1].set_xlabel("layer")
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_quality(
    path: Path,
    points: Sequence[Mapping[str, float]],
    dense_loss: float,
    tuned: Mapping[str, float],
) -> None:
    """Draws validation loss over measured FFN time, relative to dense.

    Args:
      path: PNG file to write.
      points: converted models, each with ``flops_ratio``, ``time_ratio`` and ``val_loss``.
      dense_loss: validation loss of the dense model, fine-tuned on the same batches.
      tuned: the fine-tuned sparse model's point, with the same keys.
    """
    figure, axes = _figure()
    ordered = sorted(points, key=lambda point: point["time_ratio"])
    axes.plot(
        [point["time_ratio"] for point in ordered],
        [point["val_loss"] for point in ordered],
        "o--",
        color=_SPARSE,
        label="sparse, converted",
        linewidth=1,
    )
    for point in ordered:
        axes.annotate(
            f"{point['flops_ratio']:.2f}",
            (point["time_ratio"], point["val_loss"]),
            textcoords="offset points",
            xytext=(6, 5),
            fontsize=8,
        )
    axes.plot(
        [tuned["time_ratio"]],
        [tuned["val_loss"]],
        "*",
        color=_ACCENT,
        markersize=14,
        label="sparse, fine-tuned",
    )
    axes.plot([1.0], [dense_loss], "s", color=_DENSE, label="dense, fine-tuned")
    axes.axhline(dense_loss, color=_DENSE, linewidth=0.8, alpha=0.5)
    axes.set(
        xlabel="measured FFN time, dense = 1 (numbers: FFN FLOPs, dense = 1)",
        ylabel="validation loss (nats a token)",
        title="Quality against time",
    )
    axes.legend(frameon=False)
    _save(figure, path)


def plot_methods(path: Path, points: Sequence[Mapping[str, Any]], dense_loss: float) -> None:
    """Draws loss over measured speed-up of the FFNs, a line for each method and one for dense.

    The second panel enlarges what comes near to dense.

    Args:
      path: PNG file to write.
      points: measured points, each with ``method``, ``speedup`` over the dense FFN, and ``loss``.
      dense_loss: validation loss of the dense model, fine-tuned on the same batches.
    """
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    whole, near = figure.subplots(1, 2)
    methods = dict.fromkeys(point["method"] for point in points)
    bases = list(dict.fromkeys(method.removesuffix(_HELPED) for method in methods))
    fastest = max((point["speedup"] for point in points), default=1.0)
    for axes in (whole, near):
        for method in methods:
            # With help a method looks as without it, but for the line and hollow marks.
            i = bases.index(method.removesuffix(_HELPED))
            ours, helped = method.startswith("SparseFFN"), method.endswith(_HELPED)
            of_method = [point for point in points if point["method"] == method]
            of_method.sort(key=lambda point: point["speedup"])
            axes.plot(
                [point["speedup"] for point in of_method],
                [point["loss"] for point in of_method],
                marker=_MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)],
                color=_COLOURS[i % len(_COLOURS)],
                linestyle="-" if ours else "--" if helped else ":",
                fillstyle="none" if helped else "full",
                linewidth=1.5,
                markersize=5,
                label=method,
            )
        axes.axhline(dense_loss, color="black", linewidth=1, label="dense, fine-tuned")
        _speedup_axis(axes, 1.0, fastest)
        axes.set(xlabel="measured speed-up of the FFNs over dense")
        _decorate(axes)
    whole.set(ylabel="validation loss (nats a token)", title="Quality at equal time")
    losses = [point["loss"] for point in points]
    near.set(title="enlarged", ylim=(min([dense_loss, *losses]) - 0.03, dense_loss + _NEAR))
    lines, labels = whole.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", frameon=False, fontsize=8)
    _save(figure, path)


def plot_speedups(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws for each configuration the promised speed-up, and what the clock shows in each mode.

    Args:
      path: PNG file to write.
      rows: measured rows, each with ``configuration``, ``mode``, ``promised`` and ``speedup``.
    """
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    figure, axes = _rows_figure(names)
    promised = {row["configuration"]: row["promised"] for row in rows}
    axes.plot(
        [promised[name] for name in names],
        range(len(names)),
        "|",
        color="black",
        markersize=12,
        markeredgewidth=2,
        label="promised by the FLOPs",
    )
    modes = dict.fromkeys(row["mode"] for row in rows)
    for mode, colour, marker in zip(modes, _COLOURS, _MARKERS, strict=False):
        of_mode = {row["configuration"]: row["speedup"] for row in rows if row["mode"] == mode}
        axes.plot(
            list(of_mode.values()),
            [names.index(name) for name in of_mode],
            marker,
            color=colour,
            label=mode,
            alpha=0.85,
        )
    axes.axvline(1.0, color=_DENSE, linewidth=1)
    values = [*promised.values(), *(row["speedup"] for row in rows)]
    _speedup_axis(axes, min(1.0, *values), max(values))
    axes.set(
        xlabel="measured speed-up of the FFN over dense",
        title="What the clock shows of what the FLOPs promise",
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path)


def plot_roofline(path: Path, layers: Mapping[str, Mapping[str, float]], peak: Any) -> None:
    """Draws how fast each layer ran, and how fast the machine's measured peaks would let it run.

    Args:
      path: PNG file to write.
      layers: for each layer's name its ``intensity`` in FLOPs a byte, its ``flops``, the
        ``seconds`` that they take at the roof, whether it ``is_memory_bound`` there, and the
        ``measured_seconds`` of its forward pass.
      peak: the machine's :class:`~sparseffn_jax.measure.roofline.Peak`.
    """
    labels = [f"{name} ({layer['intensity']:.0f})" for name, layer in layers.items()]
    figure, axes = _rows_figure(labels)
    bounds = {False: ("bound by arithmetic", _DENSE), True: ("bound by memory", _SPARSE)}
    shown = set()
    for y, layer in enumerate(layers.values()):
        bound, colour = bounds[bool(layer["is_memory_bound"])]
        reached, roof = (layer["flops"] / layer[x] / 1e9 for x in ("measured_seconds", "seconds"))
        axes.plot([reached, roof], [y, y], color=colour, linewidth=1, alpha=0.5)
        axes.plot([reached], [y], "o", color=colour, label=None if bound in shown else bound)
        axes.plot([roof], [y], "|", color=colour, markersize=12, markeredgewidth=2)
        shown.add(bound)
    axes.axvline(
        peak.flops_per_second / 1e9, color="black", linewidth=1, label="peak of a matrix product"
    )
    axes.set(
        xscale="log",
        xlabel="GFLOP/s of the forward pass: dot measured, bar the roof, which caches can exceed",
        title=f"What layers (FLOPs a byte) reach of {peak.device} in {peak.dtype}",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _save(figure, path)


def plot_parts(path: Path, seconds: Mapping[str, Mapping[str, float]]) -> None:
    """Draws each configuration's device time by part, as stacked bars.

    Args:
      path: PNG file to write.
      seconds: for each configuration the seconds of one run by part.
    """
    figure, axes = _rows_figure(list(seconds))
    parts = list(dict.fromkeys(part for times in seconds.values() for part in times))
    left = np.zeros(len(seconds))
    for part, colour in zip(parts, _COLOURS, strict=False):
        width = np.array([1e3 * times.get(part, 0.0) for times in seconds.values()])
        axes.barh(range(len(seconds)), width, left=left, color=colour, label=part.replace("_", " "))
        left += width
    axes.set(xlabel="device time (ms, added up over threads)", title="Forward time by part")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path)


def _rows_figure(names: Sequence[str]) -> tuple[Figure, Axes]:
    """Returns a figure with a row for each name, as high as they need, the first one on top."""
    figure = Figure(figsize=(7.5, 1.9 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots()
    _decorate(axes)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return figure, axes


def _speedup_axis(axes: Axes, least: float, most: float) -> None:
    """Gives speed-ups a logarithmic axis whose ticks can be read at a glance."""
    axes.set_xscale("log")
    ticks = [tick for tick in _TICKS if 0.8 * least <= tick <= 1.25 * most]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    _decorate(axes)
    return figure, axes


def _decorate(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context({"savefig.dpi": 130}):
        figure.savefig(path, metadata={"Software": None})
