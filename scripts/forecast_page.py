"""The page of a forecast: gold against KL, what follows from it, and what fools the reward model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dschat.reports.page import Block, Plot, Plots, Samples, Section, Table, Text, Verdict, page
from dschat.reports.plots import LINE, SERIES, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHOD = (
    "Of N answers to each held-out prompt the reward model takes the best of n. That is a policy at a KL of "
    "ln n - (n - 1)/n nats from the SFT model (an upper bound), so the curve needs no training. A point is "
    "the mean over all sets of n of the N answers; intervals are of 95 %, over prompts drawn again. In Gao "
    "et al. (arXiv 2210.10760) reinforcement learning takes more KL than best-of-n for the same score; "
    "benchmarks/results/forecast.md has both for the demo task: there gold was highest at other KLs by PPO "
    "than by best-of-n, at 0.4 to 1.7 times those."
)


def forecast_page(found: Mapping[str, Any]) -> str:
    """The HTML of a forecast.json."""
    level = "good" if found["is_worth_it"] else "bad"
    blocks: list[Block] = [Verdict(found["verdict"], _settings(found), "warning" if _ends(found) else level)]
    blocks.append(Plots([_curve(found, "gold"), _curve(found, "score")]))
    rows = [
        (
            str(point["n"]),
            f"{point['kl']:.2f}",
            f"{point['score']['value']:.2f}",
            *(_cell(point[name]) for name in ("gold", "gain")),
        )
        for point in found["points"]
    ]
    columns = ("n", "KL", "score", "gold", "gain of gold")
    blocks.append(Section("Best of n", [Table(rows, columns=columns)]))
    if found["fooled"]:
        title = "Where the reward model is fooled most"
        samples: list[Block] = [
            Samples(
                f"Answer {number}",
                one["prompt"],
                [("taken", one["answer"], f"score {one['score']:.3f}, gold {one['gold']:.3f}; mean gold of "
                  f"the prompt's answers {one['mean_gold']:.3f}")],
            )
            for number, one in enumerate(found["fooled"], 1)
        ]  # fmt: skip
        blocks.append(Section(title, samples))
    blocks.append(Section("How the forecast is made", [Text(f"{METHOD} {found['said']}")], collapsed=True))
    lead = (
        f"Reward model {found['reward_model']}, answers of {found['actor']}, gold by {found['gold']}; "
        f"{found['num_answers']} answers to each of {found['num_prompts']} held-out prompts in "
        f"{sum(found['seconds'].values()):.0f} s."
    )
    return page("Is this reward model worth PPO?", blocks, lead=lead)


def _ends(found: Mapping[str, Any]) -> bool:
    return found["is_worth_it"] and found["turns"]


def _settings(found: Mapping[str, Any]) -> str:
    if found["advice"] is None:
        return "PPO would raise the score, and not what is believed."
    return f"For PPO: {found['advice']}."


def advice(kl_target: float | None, max_kl: float | None) -> str | None:
    """The flags that follow for PPO in words, which forecast.json has too; None where nothing is gained."""
    if kl_target is None:
        return None
    return (
        f"--kl_target {kl_target:.2g} --max_kl {max_kl:.2g}, and --eval_interval so small that several "
        "evaluations come before that KL, as the best of them is exported. At which KL PPO itself turns the "
        "forecast cannot tell"
    )


def _cell(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _curve(found: Mapping[str, Any], name: str) -> Plot:
    points = found["points"]

    def draw(axes: Axes) -> None:
        kls = [point["kl"] for point in points]
        color = SERIES[0 if name == "gold" else 1]
        low, high = ([point[name][end] for point in points] for end in ("low", "high"))
        axes.fill_between(kls, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(kls, [point[name]["value"] for point in points], color=color, marker="o", markersize=3)
        if name == "gold" and found["kl_target"] is not None:
            axes.axvspan(found["turning_kl"]["low"], found["turning_kl"]["high"], color=LINE, alpha=0.6)
            axes.axvline(found["kl_target"], color=SERIES[5], linestyle="--", linewidth=1)

    captions = {"gold": "What is believed (gold)", "score": "What the reward model says"}
    note = (
        "The band is where gold is highest by best-of-n (95 %), which is not where PPO's turns. The dashed "
        "line is the recommended --kl_target."
        if name == "gold" and found["kl_target"]
        else ""
    )
    return plot(captions[name], draw, x="KL of best-of-n, nats per answer", y=name, note=note)
