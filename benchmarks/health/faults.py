"""Every fault of the suite several times over: what was said and done, and how many seconds that took.

    python -m benchmarks.health.faults [--rounds 3] [--interval 2] [--image zops-inference] [--json FILE]

Needs root, a Docker engine with the inference image, and a machine that does nothing else. Exit status 1 when a verdict
came later than two intervals (and what the server itself needs to notice), or good health later than a start and 5 s.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import describe_host
from tests.support.engine_faults import Victim, fill_cache
from tests.support.fault_cases import CASES, MARGIN_S, SLACK_S, Case, Outcome, play
from tests.support.private_engine import private_engine
from tests.support.watching import EAGER, watching

MANY_RESTARTS = 3


def measure(image: str, rounds: int, interval_s: float, root: Path) -> tuple[float, dict[str, list[Outcome]]]:
    """Play every fault; return the median time of a start and the outcomes by fault."""
    starts: list[float] = []
    outcomes: dict[str, list[Outcome]] = {case.name: [] for case in CASES}
    with private_engine(image) as engine:
        victim = Victim.of(engine, fill_cache(root / "cache"), "victim")
        for number in range(rounds):
            for deep in (False, True):
                victim.remove()
                began = time.monotonic()
                victim.up()
                victim.wait_ready()
                starts.append(time.monotonic() - began)
                settings = EAGER | {"interval_s": interval_s, "canary_every_s": 0.1 if deep else 0}
                with watching(root / f"watch-{number}-{deep}", engine=engine.url, watch=settings) as watch:
                    watch.expect(0, "verdict", instance=victim.name, verdict="ok")
                    for case in CASES:
                        if case.deep == deep:
                            outcomes[case.name].append(play(case, victim, watch))
                            print(outcomes[case.name][-1], file=sys.stderr)
                            _renew(victim)
    return statistics.median(starts), outcomes


def _renew(victim: Victim) -> None:
    if victim.instance.restarts >= MANY_RESTARTS:
        victim.remove()
        victim.up()
        victim.wait_ready()


def judge(case: Case, outcomes: Sequence[Outcome], start_s: float, interval_s: float) -> list[str]:
    """Return what was not as promised."""
    wrong = []
    for one in outcomes:
        if one.verdict_s is None and not case.fleeting:
            wrong.append(f"{case.name}: no verdict")
        elif not case.fleeting and (one.verdict_s or 0) > 2 * interval_s + case.notice_s + SLACK_S:
            wrong.append(f"{case.name}: the verdict took {one.verdict_s:.1f} s")
        if not case.restraint and one.served_s > start_s + MARGIN_S:
            wrong.append(f"{case.name}: good health took {one.served_s:.1f} s, a start takes {start_s:.1f} s")
        if one.actions != ((case.action,) if case.action else ()):
            wrong.append(f"{case.name}: {one.actions} instead of {case.action or 'nothing'}")
    return wrong


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Return the medians as Markdown, with the longest in brackets."""
    lines = [
        "| fault | verdict | fault to verdict, s | done about it | verdict to ready, s | verdict to ok, s |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        found = outcomes[case.name]
        codes = ", ".join(sorted({one.code or "over before" for one in found}))
        action = case.action or {"": "nothing: it heals by itself"}.get(case.restraint, f"nothing: {case.restraint}")
        verdicts = [one.verdict_s for one in found if one.verdict_s is not None]
        cells = (_middle(verdicts), action, _middle([o.served_s for o in found]), _middle([o.healthy_s for o in found]))
        lines.append(f"| {case.name} | {codes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else ""


def main() -> int:
    """Measure, print, and return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--interval", type=float, default=2.0, metavar="S")
    parser.add_argument("--image", default="zops-inference")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zops-faults-") as scratch:
        start_s, outcomes = measure(given.image, given.rounds, given.interval, Path(scratch))
    print(table(outcomes))
    print(f"\n{describe_host()}; {given.rounds} rounds, a start takes {start_s:.1f} s, interval {given.interval:g} s")
    print(
        "Medians, the longest in brackets; where nothing is done, the times count from when the fault was taken back."
    )
    wrong = [text for case in CASES for text in judge(case, outcomes[case.name], start_s, given.interval)]
    for text in wrong:
        print(f"BROKEN {text}")
    if given.json:
        tree = {name: [asdict(one) for one in found] for name, found in outcomes.items()}
        given.json.write_text(json.dumps({"start_s": start_s, "outcomes": tree, "broken": wrong}) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
