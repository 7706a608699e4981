"""Plotly figures of a circuit. Each is returned, never shown; no global template is touched.

The report draws the same figures as plain SVG (`mechsafety.viz.chart_svg`).
"""

import math
from typing import TYPE_CHECKING, Any

from mechsafety.circuits.circuit import ROLES, NodeScore, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.viz import words
from mechsafety.viz.look import PLAIN, ROLE_COLOURS
from mechsafety.viz.marks import INK, MUTED, magnitude
from mechsafety.viz.words import interval, node_title, number, p_value, percent, units

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mechsafety.robustness import RobustnessReport

FONT = {"family": "Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif", "size": 13, "color": INK}
GRID = "#E8EBEF"
# A mark's tooltip is its own text in every chart, so that a chart drawn without plotly says the same.
HOVER = "%{text}<extra></extra>"
# Purple to blue through white: the two can be told apart with the common colour-vision deficiencies.
DIVERGING = [[0.0, "#9C2F6B"], [0.25, "#DDA8C6"], [0.5, "#FFFFFF"], [0.75, "#8CBFDD"], [1.0, "#00588C"]]


def node_heatmap(circuit: RefusalCircuit) -> "Figure":
    """Every head and MLP by layer: the exact effect where it was measured, the gradient estimate elsewhere.

    Estimated cells carry a small circle; nodes of the circuit are framed. Without ``circuit.details`` only the
    circuit's own nodes are shown. Neurons are left out. Colours saturate at the 99th percentile of the absolute effect.

    Returns:
        A figure, not shown.

    Example:
        >>> figure = ms.viz.node_heatmap(circuit)
        >>> figure.layout.yaxis.title.text
        'layer'
    """
    import plotly.graph_objects as go

    scores = [score for score in _scores(circuit) if score.node.kind in ("head", "mlp")]
    n_layers = max([circuit.details.n_layers if circuit.details else 1, *(_layer(score) + 1 for score in scores)])
    heads = [score.node.index + 1 for score in scores if score.node.index is not None]
    n_heads = max([circuit.details.n_heads if circuit.details else 0, *heads])
    columns = [f"H{index}" for index in range(n_heads)] + ["MLP"]
    values: list[list[float | None]] = [[None] * len(columns) for _ in range(n_layers)]
    texts = [["not scored"] * len(columns) for _ in range(n_layers)]
    for score in scores:
        column = n_heads if score.node.index is None else score.node.index
        values[_layer(score)][column] = score.estimate if score.effect is None else score.effect
        texts[_layer(score)][column] = _hover(score)
    # One outlier must not bleach the rest: the scale ends at the 99th percentile.
    sizes = sorted(magnitude(value) for row in values for value in row if value is not None)
    limit = (sizes[min(len(sizes) - 1, math.ceil(0.99 * len(sizes)))] if sizes else 0.0) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=columns,
            y=[*range(n_layers)],
            text=texts,
            hovertemplate=HOVER,
            colorscale=DIVERGING,
            zmin=-limit,
            zmax=limit,
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "effect<br>(share of gap)"}, "thickness": 14, "outlinewidth": 0},
        )
    )
    height = max(260, min(900, 110 + 19 * n_layers))
    mark = max(6, min(15, round((height - 110) / n_layers * 0.72)))
    guesses = [score for score in scores if score.effect is None]
    groups = (
        ("node of the circuit", [s for s in scores if s.in_circuit], {"symbol": "square-open", "size": mark}, INK),
        ("gradient estimate only", guesses, {"symbol": "circle-open", "size": 4}, MUTED),
    )
    for name, group, symbol, colour in groups:
        figure.add_scatter(
            x=[columns[n_heads if score.node.index is None else score.node.index] for score in group],
            y=[_layer(score) for score in group],
            mode="markers",
            marker={**symbol, "color": colour, "line": {"width": 1.3, "color": colour}},
            name=name,
            hoverinfo="skip",
            showlegend=bool(group),
        )
    _style(figure, height)
    figure.update_xaxes(title_text="head, or the layer's MLP", showgrid=False, side="bottom", type="category")
    figure.update_xaxes(range=[-0.5, n_heads + 0.5])
    ticks = 1 if n_layers <= 12 else 5
    figure.update_yaxes(title_text="layer", showgrid=False, dtick=ticks, range=[-0.5, n_layers - 0.5])
    figure.update_layout(plot_bgcolor="#F1F3F5")
    return figure


def faithfulness_curve(circuit: RefusalCircuit) -> "Figure":
    """Faithfulness over the number of best nodes (or edges) kept, on discovery and held-out pairs.

    Returns:
        A figure, not shown. It marks the target, the circuit's size, and the random controls at that size.

    Raises:
        MechsafetyError: The circuit has no candidates to take a share of.

    Example:
        >>> figure = ms.viz.faithfulness_curve(circuit)
        >>> figure.layout.yaxis.title.text
        'faithfulness (1 = the whole model)'
    """
    import plotly.graph_objects as go

    check, total = circuit.verification, circuit.n_candidates
    if total < 1:
        raise MechsafetyError(f"n_candidates={total}", expected="at least 1")
    points = sorted((point for point in check.curve if point.n_nodes >= 1), key=lambda point: point.n_nodes)
    figure = go.Figure()
    for name, values, colour, dash in (
        ("held-out pairs", [point.held_out for point in points], ROLE_COLOURS["detection"], "solid"),
        ("discovery pairs", [point.faithfulness for point in points], ROLE_COLOURS["evaluation"], "dot"),
    ):
        figure.add_scatter(
            x=[point.n_nodes for point in points],
            y=values,
            mode="lines+markers",
            name=name,
            line={"color": colour, "width": 2.4, "dash": dash},
            marker={"size": 7, "symbol": "circle" if dash == "solid" else "square"},
            text=[
                f"{name}: {point.n_nodes} {units(circuit)} ({percent(point.k)}), {number(value)}"
                for point, value in zip(points, values, strict=True)
            ],
            hovertemplate=HOVER,
        )
    held, controls = max(words.size(circuit), 1), check.random_controls
    low, high = check.held_out_ci
    figure.add_scatter(
        x=[held],
        y=[check.held_out_faithfulness],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, high - check.held_out_faithfulness)],
            "arrayminus": [max(0.0, check.held_out_faithfulness - low)],
        },
        mode="markers",
        name="circuit shown, 95 % interval",
        marker={"size": 12, "symbol": "star", "color": INK},
        text=[f"circuit shown: {number(check.held_out_faithfulness)} {interval(check.held_out_ci, 2)}"],
        hovertemplate=HOVER,
    )
    figure.add_scatter(
        x=[held],
        y=[controls.mean],
        error_y={"type": "data", "symmetric": False, "array": [max(0.0, controls.highest - controls.mean)]},
        mode="markers",
        name=f"{controls.n} random circuits: mean, highest",
        marker={"size": 10, "symbol": "x-thin", "color": MUTED, "line": {"width": 2.4, "color": MUTED}},
        text=[f"random circuits: mean {number(controls.mean)}, highest {number(controls.highest)}"],
        hovertemplate=HOVER,
    )
    ends = [point.n_nodes for point in points] + [held]
    wide = [math.log10(min(ends) * 0.85), math.log10(max(ends) * 1.2)]
    figure.add_hline(y=check.target, line={"color": MUTED, "width": 1.2, "dash": "dash"})
    figure.add_vline(x=held, line={"color": MUTED, "width": 1, "dash": "dot"})
    figure.add_annotation(
        x=0.0, xref="paper", y=check.target, text=f"target {percent(check.target)}", showarrow=False, xanchor="left",
        yanchor="bottom", xshift=6, font={"size": 12, "color": MUTED},
    )  # fmt: skip
    ticks = _ticks(sorted(set(ends)))
    _style(figure, 460)
    figure.update_xaxes(
        title_text=f"best {units(circuit)} kept (share of all candidates), log scale",
        type="log",
        range=wide,
        tickvals=ticks,
        ticktext=[f"{tick}<br>{percent(tick / total)}" for tick in ticks],
    )
    figure.update_yaxes(title_text="faithfulness (1 = the whole model)", zeroline=True, zerolinecolor="#C8CDD4")
    return figure


def effect_distribution(circuit: RefusalCircuit) -> "Figure":
    """Effects of the circuit's nodes, one row per role and one dot per node, with intervals.

    Returns:
        A figure, not shown.

    Example:
        >>> figure = ms.viz.effect_distribution(circuit)
        >>> figure.layout.xaxis.title.text
        'effect (share of the gap), 95 % interval'
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    roles = [role for role in ROLES if circuit.by_role(role)]
    for role in reversed(roles):
        members = sorted(circuit.by_role(role), key=lambda member: member.node.order)
        # dots of one row are set apart vertically in the order of computation
        spread = [0.6 * (place / max(len(members) - 1, 1) - 0.5) for place in range(len(members))]
        base = roles[::-1].index(role)
        up = [max(0.0, member.ci[1] - member.effect) if member.ci else 0.0 for member in members]
        down = [max(0.0, member.effect - member.ci[0]) if member.ci else 0.0 for member in members]
        figure.add_scatter(
            x=[member.effect for member in members],
            y=[base + shift for shift in spread],
            error_x={"type": "data", "symmetric": False, "array": up, "arrayminus": down, "width": 0, "thickness": 0.8},
            mode="markers",
            name=f"{role} ({len(members)})",
            marker={
                "size": 8,
                "color": ROLE_COLOURS[role],
                "symbol": ["circle-open" if member.status == "estimated" else "circle" for member in members],
            },
            text=[node_title(member) for member in members],
            hovertemplate=HOVER,
        )
    _style(figure, 130 + 74 * len(roles))
    figure.update_xaxes(title_text="effect (share of the gap), 95 % interval", zeroline=True, zerolinecolor="#C8CDD4")
    names = [PLAIN.role(role) for role in reversed(roles)]
    figure.update_yaxes(tickvals=[*range(len(roles))], ticktext=names, showgrid=False, range=[-0.6, len(roles) - 0.4])
    figure.update_layout(showlegend=False)
    return figure


def _scores(circuit: RefusalCircuit) -> list[NodeScore]:
    if circuit.details is not None:
        return list(circuit.details.scores)
    rows = []
    for member in circuit.nodes:
        exact = None if member.status == "estimated" else member.effect
        rows.append(NodeScore(member.node, member.effect, exact, member.ci, member.p_value, in_circuit=True))
    return rows


def _layer(score: NodeScore) -> int:
    return score.node.layer or 0


def _hover(score: NodeScore) -> str:
    if score.effect is None:
        return f"<b>{score.node}</b><br>gradient estimate {number(score.estimate)}<br>not measured exactly"
    lines = [f"<b>{score.node}</b>", f"exact effect {number(score.effect)} {interval(score.ci) if score.ci else ''}"]
    lines += [p_value(score.p_value)] if score.p_value is not None else []
    return "<br>".join([*lines, f"gradient estimate {number(score.estimate)}"])


def _ticks(sizes: list[int]) -> list[int]:
    """The sizes that are far enough apart on a log axis for their labels to fit."""
    chosen: list[int] = []
    for size in reversed(sizes):
        if not chosen or chosen[-1] / size > 1.35:
            chosen.append(size)
    return chosen[::-1]


def loss_curve(report: "RobustnessReport") -> "Figure":
    """Share of the gap lost as the first parts are ablated, against random parts, at the largest strength.

    Returns:
        A figure, not shown. Whiskers are 95 % intervals over pairs; the random line is the mean of all random rankings.
    """
    import plotly.graph_objects as go

    frame = report.curve.to_dataframe()
    rows = frame[frame.strength == report.curve.strengths[-1]]
    figure = go.Figure()
    error = {"type": "data", "symmetric": False}
    error |= {"array": (rows.ci_high - rows.lost).tolist(), "arrayminus": (rows.lost - rows.ci_low).tolist()}
    lines = [
        ("these parts, 95 % interval", rows.lost, ROLE_COLOURS["decision"], "solid", error),
        ("random parts, mean", rows.random_mean, MUTED, "dot", None),
        ("random parts, highest", rows.random_high, MUTED, "dash", None),
    ]
    for name, values, colour, dash, whiskers in lines:
        figure.add_scatter(
            x=rows.parts.tolist(),
            y=values.tolist(),
            error_y=whiskers,
            mode="lines+markers",
            name=name,
            line={"color": colour, "width": 2.4, "dash": dash},
            marker={"size": 7, "symbol": "circle" if dash == "solid" else "square"},
            text=[f"{name}: {n} ablated, {percent(value)}" for n, value in zip(rows.parts, values, strict=True)],
            hovertemplate=HOVER,
        )
    figure.add_hline(y=0.5, line={"color": MUTED, "width": 1.2, "dash": "dash"})
    _style(figure, 420)
    sizes = rows.parts.tolist()
    figure.update_xaxes(title_text="parts ablated", tickvals=sizes, ticktext=[str(size) for size in sizes])
    return figure.update_yaxes(title_text="share of the gap lost")


def _style(figure: "Figure", height: int) -> None:
    legend: dict[str, Any] = {"orientation": "h", "yanchor": "bottom", "y": 1.01, "xanchor": "left", "x": 0}
    figure.update_layout(
        template="none",
        font=FONT,
        height=height,
        margin={"l": 64, "r": 24, "t": 48, "b": 64},
        paper_bgcolor="#FFFFFF",
        plot_bgcolor="#FFFFFF",
        legend=legend,
        hoverlabel={"bgcolor": "#FFFFFF", "font": {"color": INK}, "align": "left"},
    )
    figure.update_xaxes(gridcolor=GRID, linecolor="#C8CDD4", ticks="", zeroline=False)
    figure.update_yaxes(gridcolor=GRID, linecolor="#C8CDD4", ticks="", zeroline=False)
