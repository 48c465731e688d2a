"""python -m bench.soundness.report RESULTS.json writes tables and plots of a run next to its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from bench.common.report_text import figures, model_header, read_results, table
from bench.soundness.figures import replaceable
from bench.soundness.geometry import SHARE
from bench.soundness.study import FREE, NOISE, PARTIAL, PRECISION

_COLOURS = {FREE: "tab:red", PARTIAL: "tab:orange", PRECISION: "tab:purple", NOISE: "tab:green"}
_KINDS = {
    FREE: "free: no forward of the nonce",
    PARTIAL: "a part of its forward",
    PRECISION: "lower precision",
    NOISE: "noise of honest nodes",
}


def _with_ends(value: float, ends: dict[str, float], digits: int = 2) -> str:
    if "low" not in ends:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({ends['low']:.{digits}f} to {ends['high']:.{digits}f})"


def _cost(guess: dict[str, Any]) -> str:
    return "" if guess["cost"] is None else f"{guess['cost']:.2f}"


def _share(below: dict[str, float]) -> str:
    return _with_ends(below["share"], below, 3)


def _sample(guess: dict[str, Any]) -> str:
    chosen = f"{guess['chosen']} of " if "chosen" in guess else ""
    return f"{chosen}{guess['nonces']} x {guess['reads']}"


def _cosine(guess: dict[str, Any]) -> str:
    return _with_ends(guess["cosine"]["mean"], guess["cosine"]) if "cosine" in guess else ""


# ---- tables ------------------------------------------------------------------------------------------------------

_ADVICE_COLUMNS = (
    "form",
    "noise, 99 %",
    "lower precision, smallest median",
    "gate that follows",
    "p_mismatch",
    "mismatches that convict",
)


def _advice_row(form: str, advice: dict[str, Any]) -> list[str]:
    separates = "" if advice["separates"] else ", **does not separate** lower precision from noise"
    return [
        form,
        f"{advice['noise_q99']:.3f}",
        f"{advice['precision_median']:.3f}",
        f"{advice['gate']:.2f}{separates}",
        f"{advice['p_mismatch']:.2f}",
        f"{advice['convict']} of {advice['sample']}",
    ]


_ADVICE_NOTE = """\
Noise and precision are L2 distances from the true artifact. The gate is 1.1 times the noise's 99 % quantile, rounded up
to 0.01; p_mismatch is the upper end of the 95 % interval of honest reads above it. Both come from the noise of **this
machine**: a network measures them between its own nodes."""


def _geometry_rows(geometry: dict[str, Any]) -> list[list[str]]:
    blocks, share, spread = geometry["blocks"], geometry["share"], geometry["spread"]
    none = blocks * (1 - SHARE) ** geometry["nonces"]
    return [
        ["share of valid nonces, mean of blocks", _with_ends(share["mean"], share, 3), f"{SHARE:.3f}"],
        [
            "its standard deviation over blocks",
            _with_ends(spread["value"], spread, 3),
            f"{geometry['spread_in_theory']:.3f}",
        ],
        ["blocks in which no nonce is valid", f"{geometry['none_valid']} of {blocks}", f"{none:.2f}"],
        ["blocks in which more than half are", f"{geometry['most_valid']} of {blocks}", "0"],
        ["Kolmogorov-Smirnov, all distances: p", f"{geometry['agreement']:.2g}", "above 0.01"],
        ["blocks with p below 0.01", f"{geometry['blocks_that_disagree']:.0%}", "1%"],
        ["standard deviation of distances in a block / theory", f"{geometry['width']:.2f}", "1"],
    ]


_DISTANCE_COLUMNS = (
    "guess",
    "compute",
    "nonces x reads",
    "cosine",
    "correlation of distances",
    "valid among the best tenth",
)


def _distance_row(guess: dict[str, Any]) -> list[str]:
    correlation = guess["correlation"]
    return [
        guess["name"],
        _cost(guess),
        _sample(guess),
        _cosine(guess),
        _with_ends(correlation["value"], correlation),
        f"{guess['found']:.2f}",
    ]


def _artifact_row(guess: dict[str, Any], advice: dict[str, Any]) -> list[str]:
    quantiles = guess["quantiles"]
    median = guess["median"]
    honest = guess["kind"] == NOISE
    part = replaceable(guess["below"][f"{advice['gate']:.2f}"]["share"], advice["convict"])
    return [
        guess["name"],
        _cost(guess),
        _sample(guess),
        _cosine(guess),
        _with_ends(median["value"], median, 3),
        f"{quantiles[0]:.3f}, {quantiles[1]:.3f}, {quantiles[90]:.3f}, {quantiles[99]:.3f}, {quantiles[100]:.3f}",
        *(_share(below) for below in guess["below"].values()),
        "" if honest else f"{part:.0%}",
    ]


_FORM_NOTE = """\
L2: of two unit vectors, so that unrelated ones are near 1.41. Up to a gate: share of reads that would agree. Unnoticed:
the share of a batch of 200 that may be such guesses, all else honest and without noise, at the gate and the p_mismatch
that follow. "Best 5 % of reads": of many nonces, those of which the guess is least in doubt, for who may choose."""

_NOTE = """\
Brackets are 95 % intervals that redraw nonces (blocks, for the geometry); where all reads agree, the bound for that
many nonces. The states of each nonce are read under several keys, the first its own, and the reads of one nonce are not
independent. Compute is counted in layers and positions; no guess was timed. Means and mean changes of layers come from
{others} other nonces of the block. A guess takes the place of the hidden states; all that precedes and follows is the
form's own code."""


_BLOCKS_NOTE = """\
Reflections are the same for all nonces of a block, so what these have in common is the block's. Each block has {nonces}
nonces that are guessed, by the mean of {nonces} others; {reads} reads of each, or of {choices} the easiest. Shares of
reads up to a gate: the mean of the blocks with its 95 % interval, which redraws blocks, and the least, the median and
the most of a block."""


def _blocks_section(form: str, found: dict[str, Any]) -> list[str]:
    alike = found["likeness"]
    rows = []
    for name, of_guess in found["guesses"].items():
        of_gates = []
        for below in of_guess.values():
            least, middle, most = np.quantile(below["shares"], (0, 0.5, 1))
            of_gates += [_share(below), f"{least:.3f}, {middle:.3f}, {most:.3f}"]
        rows.append([name, *of_gates])
    gates = next(iter(found["guesses"].values()))
    columns = ["guess", *(title for gate in gates for title in (f"up to {gate}", "least, median, most"))]
    count = (
        f"{found['blocks']} blocks. Mean cosine of two nonces' last hidden states: {min(alike):.2f} to {max(alike):.2f}"
    )
    return [f"## {form.capitalize()} over blocks", f"{count}.", table(columns, rows), _BLOCKS_NOTE.format(**found)]


def _by_kind(found: dict[str, Any]) -> list[dict[str, Any]]:
    order = [*_KINDS]
    return sorted(found["guesses"], key=lambda guess: order.index(guess["kind"]))


def _form_section(form: str, found: dict[str, Any]) -> list[str]:
    guesses = _by_kind(found)
    likeness = f"Mean cosine of two nonces' last hidden states: {found['likeness']:.3f}."
    if form == "distances":
        rows = [_distance_row(guess) for guess in guesses]
        return [f"## {form}", likeness, table(_DISTANCE_COLUMNS, rows)]
    gates = [f"up to {gate}" for gate in guesses[0]["below"]]
    columns = (
        "guess",
        "compute",
        "nonces x reads",
        "cosine",
        "L2, median",
        "least, 1 %, 90 %, 99 %, most",
        *gates,
        "unnoticed",
    )
    rows = [_artifact_row(guess, found["advice"]) for guess in guesses]
    return [f"## {form}", likeness, table(columns, rows), _FORM_NOTE]


def _conditions(results: dict[str, Any]) -> str:
    model, plan = results["model"], results["plan"]
    return (
        f"- {model['name']}: {model['layers']} layers, hidden size {model['hidden_size']}, vocabulary "
        f"{model['vocab_size']}, {model['dtype']}\n"
        f"- forwards of {plan['batch_size']} x {plan['seq_len']} positions; {plan['nonces']} nonces are guessed, "
        f"{plan['others']} others known; {figures(results['seconds'] / 60)} minutes"
    )


def markdown(results: dict[str, Any], plot: str) -> str:
    """Return the report of a result; ``plot`` is the file name of its plot."""
    forms = results["forms"]
    advice = [_advice_row(form, found["advice"]) for form, found in forms.items() if "advice" in found]
    geometry = forms.get("distances", {}).get("geometry")
    parts = [
        "# How well proofs can be guessed",
        f"{model_header(results)}\n{_conditions(results)}",
        _NOTE.format(others=results["plan"]["others"]),
        f"![Distances of guesses, of lower precision and of noise from the truth]({plot})",
        *(["## The gate that follows", table(_ADVICE_COLUMNS, advice), _ADVICE_NOTE] if advice else []),
    ]
    if geometry:
        count = f"{geometry['blocks']} blocks of {geometry['nonces']} nonces, r_target for a share of {SHARE}."
        rows = _geometry_rows(geometry)
        parts += ["## Geometry of distances", count, table(("", "seen", "random directions"), rows)]
    for form, found in forms.items():
        parts += _form_section(form, found)
        if "over_blocks" in found:
            parts += _blocks_section(form, found["over_blocks"])
    return "\n\n".join(parts) + "\n"


# ---- plot --------------------------------------------------------------------------------------------------------


def _plot_artifacts(axes: Any, form: str, found: dict[str, Any]) -> None:
    """Draw, for each guess, which share of reads is up to a distance."""
    for guess in found["guesses"]:
        axes.plot(guess["quantiles"], np.linspace(0, 100, 101), color=_COLOURS[guess["kind"]], alpha=0.7, linewidth=1.2)
    axes.axvline(found["advice"]["gate"], color="black", linestyle="--", linewidth=1)
    axes.annotate("gate", (found["advice"]["gate"], 101), fontsize=8, annotation_clip=False, ha="center")
    axes.set_xlim(0, 2)
    axes.set_xlabel("L2 distance from the true artifact")
    axes.set_ylabel("reads up to it, %")
    axes.set_title(form)
    axes.grid(alpha=0.3)


def _plot_correlations(axes: Any, found: dict[str, Any]) -> None:
    """Draw the correlation of each guess's distances with the true ones."""
    guesses = _by_kind(found)
    for at, guess in enumerate(reversed(guesses)):
        value = guess["correlation"]
        axes.plot([value["low"], value["high"]], [at, at], color=_COLOURS[guess["kind"]])
        axes.plot(value["value"], at, "o", color=_COLOURS[guess["kind"]], markersize=4)
    axes.set_yticks(range(len(guesses)), [guess["name"][:40] for guess in reversed(guesses)], fontsize=6)
    axes.set_xlabel("correlation of guessed and true distances")
    axes.set_title("distances")
    axes.grid(alpha=0.3)


def _plot_blocks(axes: Any, geometry: dict[str, Any]) -> None:
    """Draw the share of valid nonces of each block, in their order, and two standard deviations of theory."""
    shares = sorted(geometry["shares"])
    spread = 2 * geometry["spread_in_theory"]
    axes.axhspan(100 * (SHARE - spread), 100 * (SHARE + spread), color="lightgray", label="theory, 2 sd")
    axes.bar(range(len(shares)), [100 * share for share in shares], color="tab:blue")
    axes.set_xlabel("blocks, in order of their share")
    axes.set_ylabel("valid nonces, %")
    axes.set_title("distances: valid nonces of each block")
    axes.legend(fontsize=8)


def plot(results: dict[str, Any], path: Path) -> None:
    """Write the distances of artifacts, correlations and blocks to ``path``."""
    forms = results["forms"]
    panels: list[Any] = [
        lambda axes, form=form, found=found: _plot_artifacts(axes, form, found)
        for form, found in forms.items()
        if "advice" in found
    ]
    if "distances" in forms:
        panels.append(lambda axes: _plot_correlations(axes, forms["distances"]))
        if "geometry" in forms["distances"]:
            panels.append(lambda axes: _plot_blocks(axes, forms["distances"]["geometry"]))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 4.2 * lines), layout="constrained", squeeze=False
    )
    for axes, draw in zip(grid.flat, panels, strict=False):
        draw(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    handles = [plt.Line2D([], [], color=_COLOURS[kind], label=text) for kind, text in _KINDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncol=4, fontsize=8)
    figure.suptitle(f"{results['model']['name']}, {results['model']['dtype']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(path: Path, results: dict[str, Any]) -> None:
    """Write NAME.md and NAME.png next to NAME.json."""
    picture = path.with_suffix(".png")
    plot(results, picture)
    path.with_suffix(".md").write_text(markdown(results, picture.name))


def main() -> None:
    """Write the report of RESULTS.json."""
    path, results = read_results(__doc__, "measured forms", lambda results: results.get("forms"))
    write(path, results)


if __name__ == "__main__":
    main()
