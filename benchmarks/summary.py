"""What the tables say in few numbers: ratios to the best peers and to the floors; losses."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable

from compare import Timed
from jobs import COPY, FILL, JOBS, PLAIN
from peers import OURS, PEERS


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where perjac stands in one job on one model.

    Attributes
    ----------
    job, model, examples : str, str, int
        Which.
    ours : Timed or None
        perjac's quickest way, if it has any.
    others : list of Timed
        Each peer's quickest way, the quickest peer first.
    floors : dict of str to Timed
        What the machine takes, by name.
    answer_bytes : int or None
        How large the answer is.
    """

    job: str
    model: str
    examples: int
    ours: Timed | None
    others: list[Timed]
    floors: dict[str, Timed]
    answer_bytes: int | None

    @classmethod
    def of(cls, result: dict) -> Standing:
        """Read one result of a run."""
        timed = [way for way in result["ways"] if way.repeats_ms and not way.left_out]
        best: dict[str, Timed] = {}
        for way in timed:
            if way.floor:
                continue
            known = best.get(way.peer)
            if known is None or way.median_ms < known.median_ms:
                best[way.peer] = way
        return cls(
            result["job"],
            result["model"],
            result["examples"],
            best.pop(OURS, None),
            sorted(best.values(), key=lambda way: way.median_ms),
            {way.way: way for way in timed if way.floor},
            result.get("bytes"),
        )

    @property
    def name(self) -> str:
        """Job and model, for a table's first cells."""
        return f"{JOBS[self.job].title} | {self.model}, {self.examples}"

    def ratio(self, timed: Timed) -> float:
        """Return a time in times of perjac's: above 1, perjac is quicker."""
        return timed.median_ms / self.ours.median_ms

    def quickest(self, special: bool) -> Timed | None:
        """Return the quickest specialist, or the quickest general-purpose way."""
        return next((way for way in self.others if PEERS[way.peer].special == special), None)

    def losses(self) -> list[Timed]:
        """Return the peers that are quicker than perjac."""
        return [way for way in self.others if self.ours and self.ratio(way) < 1]

    def floor_ratios(self) -> tuple[float | None, float | None]:
        """Return perjac's time over filling the answer's memory, and over that and a gradient.

        A per-example gradient needs the arithmetic of one ordinary gradient and its answer written;
        where the answer is small, the second is over the gradient alone.
        """
        if not self.ours:
            return None, None
        fill, plain = self.floors.get(FILL), self.floors.get(PLAIN)
        written = fill and self.ours.median_ms / fill.median_ms
        if not plain:
            return written, None
        return written, self.ours.median_ms / (plain.median_ms + (fill.median_ms if fill else 0))

    def bandwidth(self) -> tuple[float, float] | None:
        """Return the GB/s at which perjac writes its answer, and those of a copy, where known."""
        copied = self.floors.get(COPY)
        if not (copied and self.ours and self.answer_bytes):
            return None
        return (
            self.answer_bytes / self.ours.median_ms / 1e6,
            copied.moved / copied.median_ms / 1e6,
        )


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """Return the geometric mean, or None of nothing."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.fmean(logs)) if logs else None


def means(standings: list[Standing]) -> dict[str, tuple[float | None, int]]:
    """Return the mean ratio to the quickest specialist, general way and peer, and of how many."""
    known = [standing for standing in standings if standing.ours and standing.others]
    found = {}
    for name, pick in {
        "the quickest specialist": lambda s: s.quickest(special=True),
        "the quickest general-purpose way": lambda s: s.quickest(special=False),
        "the quickest of all": lambda s: s.others[0],
    }.items():
        ratios = [s.ratio(pick(s)) for s in known if pick(s)]
        found[name] = geometric_mean(ratios), len(ratios)
    return found


def text(standings: list[Standing]) -> str:
    """Return the summary in Markdown: a line for each job and model, and the means."""
    lines = [
        "| job | model, examples | perjac, ms | quickest specialist, × perjac | "
        "quickest general-purpose way, × perjac | others, × perjac | perjac / fill | "
        "perjac / (fill + gradient) |",
        "|---|---|---:|---:|---:|---|---:|---:|",
    ]
    for standing in standings:
        lines.append(f"| {standing.name} | {_line(standing)} |")
    said = [
        f"{mean:.2f} × perjac for {name} ({count} {'row' if count == 1 else 'rows'})"
        for name, (mean, count) in means(standings).items()
        if mean
    ]
    if said:
        lines.append("")
        lines.append(f"Geometric means: {'; '.join(said)}. Above 1, perjac is quicker.")
    return "\n".join(lines)


def _line(standing: Standing) -> str:
    if not standing.ours:
        return "not measured | | | | |"
    picked = [standing.quickest(special) for special in (True, False)]
    rest = [way for way in standing.others if way not in picked]

    def told(way):
        return f"{way.peer} {standing.ratio(way):.2f}"

    cells = [
        digits(standing.ours.median_ms),
        *(told(way) if way else "–" for way in picked),
        ", ".join(map(told, rest)) or "–",
        *(f"{ratio:.1f}" if ratio else "–" for ratio in standing.floor_ratios()),
    ]
    return " | ".join(cells)


def losses(standings: list[Standing]) -> str:
    """Return where some peer is quicker, in Markdown."""
    lines = []
    for standing in standings:
        for way in standing.losses():
            low, high = min(standing.ours.clocked_ms), max(way.clocked_ms)
            within = "; the two ranges overlap" if high >= low else ""
            lines.append(
                f"- {JOBS[standing.job].title}, {standing.model}, {standing.examples} examples: "
                f"{way.name} takes {standing.ratio(way):.2f} of perjac's time "
                f"({digits(way.median_ms)} against {digits(standing.ours.median_ms)} ms{within})."
            )
    return "\n".join(lines) or "Nowhere in this run."


def bandwidths(standings: list[Standing]) -> str:
    """Return how fast answers are written beside a copy's speed, in Markdown, where measured."""
    rows = [(standing, standing.bandwidth()) for standing in standings]
    rows = [(standing, speeds) for standing, speeds in rows if speeds]
    if not rows:
        return ""
    lines = [
        "| job | model, examples | answer, MB | written, GB/s | copied here, GB/s (read and "
        "written) | share |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for standing, (written, copied) in rows:
        lines.append(
            f"| {standing.name} | {standing.answer_bytes / 1e6:.1f} | {written:.1f} "
            f"| {copied:.1f} | {written / copied:.0%} |"
        )
    return "\n".join(lines)


def digits(ms: float) -> str:
    """Return milliseconds with as many digits as they are worth."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 1 else f"{ms:.3f}"
