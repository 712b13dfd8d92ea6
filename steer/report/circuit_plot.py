"""Drawing of a circuit: nodes in rows of sites and columns of token roles, edges as wide as their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer.circuits.graph import COMPONENT, TARGET, Graph, Node
from steer.model.site import Site
from steer.report.canvas import hover, is_narrow, new_figure, short
from steer.report.numbers import number
from steer.report.palette import LIGHT

HELPS, HINDERS = "arm-0", "arm-1"  # colours of what raises the target and of what lowers it
ROW = 1.15  # inches from one site to the next
WIDEST = 5.0  # points of the strongest edge
LARGEST, SMALLEST = 190.0, 24.0  # square points of a node
LABELLED = 80  # nodes that still get their numbers beside them


@dataclass(frozen=True)
class Layout:
    """Where nodes go.

    Attributes:
        rows: names of rows from below, the target's last. roles: of the columns.
        at: (x, y) of each node, x within 0 and the number of columns.
    """

    rows: tuple[str, ...]
    roles: tuple[str, ...]
    at: tuple[tuple[float, float], ...]


def row_of(node: Node) -> str:
    """What a row is called: dictionary and site, or the site alone."""
    if node.kind == TARGET:
        return TARGET
    if node.kind == COMPONENT:
        layer = Site.parse(node.site).layer
        return "embedding" if layer is None else f"block {layer}"
    return f"{node.part} ({node.site})" if node.part else node.site


def layout_of(graph: Graph, roles: Sequence[str]) -> Layout:
    """Nodes of one row and role share a cell, side by side; a receiver without a role goes to the middle."""
    rows = tuple(dict.fromkeys(row_of(node) for node in graph.nodes))
    columns = tuple(roles)
    cells: dict[tuple[str, str], list[int]] = {}
    for number_, node in enumerate(graph.nodes):
        cells.setdefault((row_of(node), node.role), []).append(number_)
    at = [(0.0, 0.0)] * len(graph.nodes)
    for (row, role), members in cells.items():
        start, width = (columns.index(role), 1.0) if role in columns and row != TARGET else (0, float(len(columns)))
        for place, member in enumerate(members):
            # every second one a little higher, so that numbers do not run into one another
            lift = 0.16 * (place % 2) if len(members) > 3 else 0.0
            at[member] = (start + width * (place + 0.5) / len(members), rows.index(row) + lift)
    return Layout(rows, columns, tuple(at))


def draw_circuit(graph: Graph, titles: Mapping[str, str], said: Sequence[str], width: float) -> Any:
    """The figure of a circuit.

    Args:
        titles: what the column of each role is headed with, in order.
        said: what each node says under the pointer.
        width: in inches.
    """
    layout = layout_of(graph, list(titles))
    figure = new_figure(width, ROW * len(layout.rows) + 0.9)
    ax = figure.subplots()
    ax.set_xlim(0, len(layout.roles))
    ax.set_ylim(-0.45, len(layout.rows) - 0.55)
    names = layout.rows if not is_narrow(width) else [short(row, 16) for row in layout.rows]
    ax.set_yticks(range(len(layout.rows)), names)
    heads = list(titles.values())
    ax.set_xticks([column + 0.5 for column in range(len(heads))], [short(head, 12) for head in heads], rotation=0 if len(heads) < 9 else 60)
    ax.tick_params(length=0)
    for column in range(1, len(heads)):
        ax.axvline(column, color=LIGHT["rule"], linewidth=0.6, zorder=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    _draw_edges(ax, graph, layout)
    _draw_nodes(ax, graph, layout, said)
    return figure


def _draw_edges(ax: Any, graph: Graph, layout: Layout) -> None:
    most = float(graph.weights.abs().max()) if len(graph.weights) else 1.0
    for place in graph.weights.abs().argsort().tolist():  # the strongest on top
        source, receiver = graph.edges[place].tolist()
        weight = float(graph.weights[place])
        (x0, y0), (x1, y1) = layout.at[source], layout.at[receiver]
        (line,) = ax.plot(
            [x0, x1],
            [y0, y1],
            color=LIGHT[HELPS if weight > 0 else HINDERS],
            linewidth=max(0.4, WIDEST * math.sqrt(abs(weight) / most)),
            alpha=0.15 + 0.45 * abs(weight) / most,
            zorder=1,
        )
        hover(line, f"{graph.nodes[source].name} to {graph.nodes[receiver].name}: {number(weight, signed=True)}")


def _draw_nodes(ax: Any, graph: Graph, layout: Layout, said: Sequence[str]) -> None:
    most = float(graph.scores.abs().max()) or 1.0
    for place, node in enumerate(graph.nodes):
        score = float(graph.scores[place])
        is_whole = node.kind == TARGET
        colour = LIGHT["ink"] if is_whole else LIGHT[HELPS if score > 0 else HINDERS]
        is_feature = node.kind == "feature"
        drawn = ax.scatter(
            *layout.at[place],
            s=LARGEST if is_whole else SMALLEST + (LARGEST - SMALLEST) * abs(score) / most,
            marker="o" if is_feature else "s",
            facecolor=colour if is_feature or is_whole else LIGHT["paper"],
            edgecolor=colour,
            linewidth=1.2,
            zorder=2,
            clip_on=False,
        )
        hover(drawn, said[place])
        if len(graph.nodes) <= LABELLED:
            text = str(node.index) if is_feature else {"error": "error", COMPONENT: node.part}.get(node.kind, "")
            ax.annotate(text, layout.at[place], xytext=(0, -11), textcoords="offset points", ha="center", va="top", fontsize=6.5,
                        color=LIGHT["muted"], zorder=3)  # fmt: skip
