"""The pictures that the demo and the benches draw, and the look of their wide tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.ops.masks import BlockMask

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


def plot_training(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    start_losses: Mapping[str, float],
) -> None:
    """Draws training loss over steps, and each model's validation loss at its start as a mark.

    Args:
      path: PNG file to write.
      curves: for each model's name its steps and their losses, in nats a token.
      start_losses: for each model's name the validation loss before the first step.
    """
    figure, axes = _figure()
    for (name, points), colour in zip(curves.items(), (_DENSE, _SPARSE), strict=False):
        steps, losses = np.array(points).T
        axes.plot(steps, losses, color=colour, label=name, linewidth=1.5)
        axes.plot([0], [start_losses[name]], "o", color=colour, markersize=5)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Fine-tuning on the same batches")
    axes.legend(
        title="training loss; dot: validation at the start",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=len(curves),
        frameon=False,
    )
    _save(figure, path)


def plot_masks(path: Path, configs: Sequence[SparseFFNConfig | None]) -> None:
    """Draws what each layer keeps: its components, polynomial degrees and blocks, as images.

    Args:
      path: PNG file to write.
      configs: one configuration for each layer, ``None`` for a dense one.
    """
    rows = [(i, config) for i, config in enumerate(configs) if config is not None]
    titles = ("spectral components", "polynomial degrees", "core blocks (W1)", "core blocks (W2)")
    figure = Figure(figsize=(11, 1.3 + 1.25 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for row, (layer, config) in zip(grid, rows, strict=True):
        for axes, title, image in zip(row, titles, _mask_images(config), strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            if layer == rows[0][0]:
                axes.set_title(title, fontsize=10)
            if image is None:
                axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
                continue
            axes.imshow(image, cmap="Blues", vmin=0, vmax=1.4, aspect="auto", interpolation="none")
            axes.set_xlabel(f"{image.mean():.0%} kept", fontsize=8)
        row[0].set_ylabel(f"layer {layer}", fontsize=9)
    figure.suptitle("Static masks: dark is kept, white is not in the program", fontsize=11)
    _save(figure, path)


def plot_plan(path: Path, layers: Sequence[Mapping[str, float]]) -> None:
    """Draws what a plan keeps of each layer, and the loss that it predicts.

    Args:
      path: PNG file to write.
      layers: for each layer its ``width``, ``rank``, ``flops`` (dense = 1) and ``damage`` (nats).
    """
    columns = {
        "width": ("units kept", _SPARSE),
        "rank": ("bypass rank", _ACCENT),
        "damage": ("predicted loss (nats)", _DENSE),
    }
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    panels = figure.subplots(len(columns), sharex=True)
    for axes, (name, (label, colour)) in zip(panels, columns.items(), strict=True):
        _decorate(axes)
        values = [layer[name] for layer in layers]
        axes.bar(np.arange(len(layers)), values, color=colour, width=0.7)
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[-1].set_xlabel("layer")
    figure.suptitle("What the plan keeps of each layer, and what that costs", fontsize=11)
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
    """Draws loss over measured FFN time, a line for each method and one for the dense model.

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
    for axes in (whole, near):
        for method in methods:
            # Alike but for the line, a method with and without help.
            i = bases.index(method.removesuffix(_HELPED))
            ours = method.startswith("SparseFFN")
            of_method = [point for point in points if point["method"] == method]
            of_method.sort(key=lambda point: -point["speedup"])
            axes.plot(
                [1.0 / point["speedup"] for point in of_method],
                [point["loss"] for point in of_method],
                marker=_MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)],
                color=_COLOURS[i % len(_COLOURS)],
                linestyle="-" if ours else "--" if method.endswith(_HELPED) else ":",
                linewidth=1.5,
                markersize=5,
                label=method,
            )
        axes.axhline(dense_loss, color="black", linewidth=1, label="dense, fine-tuned")
        axes.set_xscale("log")
        ticks = (8, 4, 2, 1.5, 1)
        axes.set_xticks([1 / tick for tick in ticks], [f"{tick:g}x" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="measured FFN time, by speed-up over dense")
        _decorate(axes)
    whole.set(ylabel="validation loss (nats a token)", title="Quality at equal time")
    losses = [point["loss"] for point in points]
    near.set(title="enlarged", ylim=(min([dense_loss, *losses]) - 0.03, dense_loss + _NEAR))
    lines, labels = whole.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", frameon=False, fontsize=8)
    _save(figure, path)


def plot_speedups(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws measured over promised speed-up, a mark for each configuration and mode.

    Args:
      path: PNG file to write.
      rows: measured rows, each with ``configuration``, ``mode``, ``promised`` and ``speedup``.
    """
    figure, axes = _figure()
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for mode, colour, marker in zip(modes, _COLOURS, _MARKERS, strict=False):
        points = [(row["promised"], row["speedup"]) for row in rows if row["mode"] == mode]
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=mode, alpha=0.8)
    for row in rows:
        if row["mode"] == modes[0]:
            axes.annotate(
                row["configuration"],
                (row["promised"], row["speedup"]),
                textcoords="offset points",
                xytext=(5, -9),
                fontsize=7,
            )
    limit = max(max(row["promised"], row["speedup"]) for row in rows)
    axes.plot([1, limit], [1, limit], color="black", linewidth=0.8, label="realised in full")
    axes.axhline(1.0, color=_DENSE, linewidth=0.8, label="dense")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="speed-up promised by the FLOPs",
        ylabel="speed-up measured",
        title="What the clock shows of what the FLOPs promise",
    )
    ticks = [1, 2, 4, 8]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_roofline(path: Path, layers: Mapping[str, Mapping[str, float]], peak: Any) -> None:
    """Draws the machine's measured roof and where each layer's arithmetic intensity meets it.

    Args:
      path: PNG file to write.
      layers: for each layer's name its ``intensity`` in FLOPs a byte, its ``flops``, and the
        ``seconds`` that they take at the roof.
      peak: the machine's :class:`~sparseffn_jax.measure.roofline.Peak`.
    """
    figure, axes = _figure()
    ridge = peak.flops_per_second / peak.bytes_per_second
    intensity = np.geomspace(ridge / 64, ridge * 64, 129)
    roof = np.minimum(peak.flops_per_second, intensity * peak.bytes_per_second)
    axes.plot(intensity, roof / 1e9, color="black", linewidth=1.2)
    for i, (name, layer) in enumerate(layers.items()):
        axes.plot(
            [layer["intensity"]],
            [layer["flops"] / layer["seconds"] / 1e9],
            _MARKERS[i % len(_MARKERS)],
            color=_COLOURS[i % len(_COLOURS)],
            label=name,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="arithmetic intensity (FLOPs a byte)",
        ylabel="attainable GFLOP/s",
        title=f"Roofline of {peak.device}, {peak.dtype}",
    )
    axes.legend(frameon=False, fontsize=7, ncols=2)
    _save(figure, path)


def plot_parts(path: Path, seconds: Mapping[str, Mapping[str, float]]) -> None:
    """Draws each configuration's device time by part, as stacked bars.

    Args:
      path: PNG file to write.
      seconds: for each configuration the seconds of one run by part.
    """
    figure, axes = _figure()
    parts = list(dict.fromkeys(part for times in seconds.values() for part in times))
    left = np.zeros(len(seconds))
    for part, colour in zip(parts, _COLOURS, strict=False):
        width = np.array([1e3 * times.get(part, 0.0) for times in seconds.values()])
        axes.barh(list(seconds), width, left=left, color=colour, label=part.replace("_", " "))
        left += width
    axes.invert_yaxis()
    axes.set(xlabel="device time (ms, added up over threads)", title="Forward time by part")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _mask_images(config: SparseFFNConfig) -> list[np.ndarray | None]:
    images: list[np.ndarray | None] = [None, None, None, None]
    if (branch := config.spectral) is not None:
        if branch.transform == "low_rank":
            ranks = (branch.rank, branch.down_rank or branch.rank)
            limit = min(config.d_model, branch.width or config.d_model)
            images[0] = np.stack([np.arange(limit) < rank for rank in ranks])
        else:
            kept = np.isin(np.arange(branch.block_size // 2 + 1), branch.frequencies)
            images[0] = kept[None]
    if (polynomial := config.polynomial) is not None:
        images[1] = np.isin(np.arange(polynomial.degree + 1), polynomial.degrees)[None]
    if config.micro is not None and (core := config.micro.core) is not None:
        units = np.arange(config.d_ff) < core.width
        images[2] = _block_image(core.up_mask, units[None])
        images[3] = _block_image(core.down_mask, units[:, None])
    return images


def _block_image(mask: BlockMask | None, whole: np.ndarray) -> np.ndarray:
    return whole if mask is None else np.array(mask.blocks)


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
