"""What an effect costs: effect against damage in every arm, and guardrails beside their margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.report.canvas import annotate, hover, is_narrow, lines, new_figure, short
from steer.report.numbers import is_interval, measured, number, percentage
from steer.report.palette import ARMS, LIGHT
from steer.report.rows import readable

KEPT = "kept"


def draw_trade_off(metrics: Mapping[str, Any], width: float) -> Any:
    """A point for each arm; those that no other arm dominates are full and joined."""
    points = trade_offs(metrics)
    order = [str(arm["name"]) for arm in metrics.get("arms") or []]
    figure = new_figure(min(width, 7.6), 3.1 if is_narrow(width) else 3.9)
    ax = figure.subplots()
    ax.axhline(0, color=LIGHT["rule"], linewidth=0.8)
    ax.axvline(0, color=LIGHT["rule"], linewidth=0.8)
    front = sorted((point["damage"], point["effect"]) for point in points if point["undominated"])
    if len(front) > 1:
        ax.step(*zip(*front, strict=True), where="post", color=LIGHT["other"], linewidth=1.0, dashes=(4, 2), zorder=1)
    ax.plot(0, 0, marker="x", color=LIGHT["muted"], markersize=6)
    for point in points:
        colour = LIGHT[ARMS[order.index(point["arm"]) % len(ARMS)]] if point["arm"] in order else LIGHT["ink"]
        face = colour if point["undominated"] else LIGHT["paper"]
        (dot,) = ax.plot(point["damage"], point["effect"], "o", color=colour, markersize=8, markerfacecolor=face, markeredgewidth=1.5)
        hover(dot, trade_off_words(point))
    ax.margins(0.14)
    ax.tick_params(length=3)
    _mark_margin(ax, metrics, points[0]["guardrail"])
    _name_points(ax, metrics, points, order)
    _label_trade_off(ax, metrics, points[0])
    return figure


def trade_offs(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Arms whose effect and damage are known."""
    return [point for point in metrics.get("trade_off") or [] if measured(point.get("effect")) and measured(point.get("damage"))]


def trade_off_words(point: Mapping[str, Any]) -> str:
    """Effect, damage and membership of one arm, as text."""
    share = f"; undominated in {percentage(point['membership'])} of bootstrap samples" if measured(point.get("membership")) else ""
    return f"{point['arm']}: effect {number(point['effect'], signed=True)}, damage {number(point['damage'], signed=True)}{share}"


def equal_damage_words(metrics: Mapping[str, Any]) -> list[str]:
    """The primary arm against each other one where both do the same damage, as text."""
    words = []
    for each in metrics.get("equal_damage") or []:
        a, b, guardrail = each["a"], each["b"], readable(str(each["guardrail"]))
        if measured(each.get("difference")):
            bounds = f"[{number(each['low'], signed=True)}, {number(each['high'], signed=True)}]"
            where = f"where both cost {number(each['damage'])} of {guardrail}"
            words.append(f"{a} minus {b}, {where}: {number(each['difference'], signed=True)} {bounds}{_beyond(each)}")
        else:
            harmless = [str(name) for name, most in zip((a, b), each.get("most_damage") or (), strict=False) if not most > 0]
            words.append(f"{a} and {b} have no damage in common: {' and '.join(harmless)} did none to {guardrail}")
    return words


def _beyond(each: Mapping[str, Any]) -> str:
    share = each.get("beyond")
    return f"; in {percentage(share)} of bootstrap samples one of them never cost as much" if measured(share) and share >= 0.05 else ""


def _mark_margin(ax: Any, metrics: Mapping[str, Any], guardrail: str) -> None:
    margin = ((metrics.get("outcomes") or {}).get(guardrail) or {}).get("margin")
    low, high = ax.get_xlim()
    if measured(margin) and low < margin < high:
        ax.axvspan(margin, high, color=LIGHT["band"], linewidth=0, zorder=0)
        ax.set_xlim(low, high)
        style = {"xycoords": ax.get_xaxis_transform(), "color": LIGHT["muted"], "size": 8, "va": "bottom"}
        annotate(ax, "beyond the margin", (high, 1), (0, 3), ha="right", **style)


def _name_points(ax: Any, metrics: Mapping[str, Any], points: Sequence[Mapping[str, Any]], order: Sequence[str]) -> None:
    """A name beside each point where there is room for one; the rest are named under the pointer and in the table."""
    untreated = next((str(arm["name"]) for arm in metrics.get("arms") or [] if arm.get("when") == "never"), "untreated")
    named = [(point["damage"], point["effect"], str(point["arm"])) for point in points] + [(0.0, 0.0, untreated)]
    width, height = (size - rest for size, rest in zip(ax.figure.get_size_inches(), (0.9, 0.8), strict=True))  # of the axes, about
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    places = [((x - left) / (right - left) * width, (y - bottom) / (top - bottom) * height) for x, y, _ in named]
    joined = {str(point["arm"]) for point in points if point["undominated"]}
    taken: list[tuple[float, ...]] = [(x - 0.07, y - 0.07, x + 0.07, y + 0.07) for x, y in places]
    for (x, y), (damage, effect, name) in zip(places, named, strict=True):
        for ha, va, offset, box in _beside(x, y, 0.072 * len(name), is_joined=name in joined):
            if _is_free(box, taken, width, height):
                taken.append(box)
                colour = LIGHT[ARMS[order.index(name) % len(ARMS)]] if name in order and name != untreated else LIGHT["muted"]
                annotate(ax, name, (damage, effect), offset, ha=ha, va=va, size=8.5, color=colour)
                break


def _beside(x: float, y: float, wide: float, *, is_joined: bool) -> list[tuple[str, str, tuple[float, float], tuple[float, ...]]]:
    """Places for a name beside a point, the best first: alignment, offset in points, box in inches. The front runs to the right."""
    right = ("left", "center", (9.0, 0.0), (x + 0.1, y - 0.08, x + 0.1 + wide, y + 0.08))
    left = ("right", "center", (-9.0, 0.0), (x - 0.1 - wide, y - 0.08, x - 0.1, y + 0.08))
    above = ("center", "bottom", (0.0, 7.0), (x - wide / 2, y + 0.09, x + wide / 2, y + 0.25))
    below = ("center", "top", (0.0, -7.0), (x - wide / 2, y - 0.25, x + wide / 2, y - 0.09))
    above_right = ("left", "bottom", (-4.0, 7.0), (x - 0.05, y + 0.09, x + wide, y + 0.25))
    below_right = ("left", "top", (-4.0, -7.0), (x - 0.05, y - 0.25, x + wide, y - 0.09))
    corners = [above_right, below_right]
    return [left, above, *corners, right, below] if is_joined else [right, left, above, below, *corners]


def _is_free(box: tuple[float, ...], taken: Sequence[tuple[float, ...]], width: float, height: float) -> bool:
    """A box (left, bottom, right, top) lies in the axes and meets no other."""
    inside = box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height
    return inside and all(box[0] >= other[2] or box[2] <= other[0] or box[1] >= other[3] or box[3] <= other[1] for other in taken)


def _label_trade_off(ax: Any, metrics: Mapping[str, Any], point: Mapping[str, Any]) -> None:
    outcomes = metrics.get("outcomes") or {}
    units = {kind: (outcomes.get(point[kind]) or {}).get("unit") or "" for kind in ("outcome", "guardrail")}
    worse = ", ".join(filter(None, (f"{readable(point['guardrail'])}: worse by", units["guardrail"])))
    better = ", ".join(filter(None, (f"{readable(point['outcome'])}: better by", units["outcome"])))
    ax.set_xlabel(f"damage \N{RIGHTWARDS ARROW}\n{worse}")
    ax.set_ylabel(f"effect \N{RIGHTWARDS ARROW}\n{better}")


def draw_guardrails(guardrails: Sequence[Mapping[str, Any]], arms: Mapping[str, int], width: float) -> Any:
    """A panel for each outcome that must not get worse: the harm in every arm with its one-sided bounds, and the margin.

    Args:
        arms: name -> number, which chooses the colour.
    """
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for each in guardrails:
        panels.setdefault(str(each["metric"]), []).append(each)
    narrow = is_narrow(width)
    heights = [0.6 * len(rows) + 0.2 if narrow else 0.36 * len(rows) + 0.3 for rows in panels.values()]
    figure = new_figure(min(width, 9.6), sum(heights) + (0.75 if narrow else 0.6) * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (metric, rows) in zip(axes, panels.items(), strict=True):
        _draw_panel(ax, metric, rows, arms, narrow)
    return figure


def _draw_panel(ax: Any, metric: str, rows: Sequence[Mapping[str, Any]], arms: Mapping[str, int], narrow: bool) -> None:
    margin = float(rows[0]["margin"])
    for y, row in enumerate(rows):
        name = str(row["arm"])
        colour = LIGHT[ARMS[arms.get(name, 0) % len(ARMS)]]
        if is_interval(row.get("bounds")):
            (line,) = ax.plot(row["bounds"], [y, y], color=colour, linewidth=2.2)
            hover(line, str(row.get("verdict") or ""))
        face = colour if row["outcome"] == KEPT else LIGHT["paper"]
        (dot,) = ax.plot(row["harm"], y, "D", color=colour, markersize=6.2, markerfacecolor=face, markeredgewidth=1.4, zorder=4)
        hover(dot, str(row.get("verdict") or ""))
        place = ax.get_yaxis_transform()
        if narrow:
            plain = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
            ax.text(0, y - 0.42, f"{short(name, 20)}: {row['outcome']}", transform=place, va="center", size=8, bbox=plain)
        else:
            ax.text(-0.015, y, short(name, 30), transform=place, va="center", ha="right")
            weight = "normal" if row["outcome"] == KEPT else "bold"
            ax.text(1.01, y, row["outcome"], transform=place, va="center", ha="left", weight=weight)
    ax.margins(x=0.08)
    low, high = ax.get_xlim()
    high = max(high, margin + 0.12 * (max(high, margin) - min(low, 0)))
    ax.axvspan(margin, high, color=LIGHT["band"], linewidth=0, zorder=0)
    ax.axvline(margin, color=LIGHT["ink"], linewidth=1.0, dashes=(4, 2), zorder=1)
    ax.axvline(0, color=LIGHT["rule"], linewidth=0.8, zorder=1)
    ax.set(xlim=(min(low, 0), high), ylim=(len(rows) - 0.5, -0.7 if narrow else -0.5))
    ax.set_yticks([])
    ax.locator_params(axis="x", nbins=4 if narrow else 8)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="x", length=3)
    unit = f", {rows[0]['unit']}" if rows[0].get("unit") else ""
    label = f"{readable(metric)}: worse than {rows[0]['reference']} by{unit} \N{RIGHTWARDS ARROW} (margin {number(margin)})"
    ax.set_xlabel(lines(label, 46) if narrow else label, size=8.5)
