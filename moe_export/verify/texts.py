"""Text that verification reads when the user gives none: prose and code, written for this project."""

from __future__ import annotations

PROSE = """\
The ferry left the harbour a little after seven, when the fog had thinned enough for the pilot to see the \
second buoy. Forty passengers stood along the rail. Some were on their way to work on the other shore; \
others, to judge by their baskets, were going to the Saturday market, where the first pears of the year \
were said to be cheap.

A mixture of experts is a simple idea. Instead of one large network that handles every word, there are \
many small ones, and a router that decides, word by word, which two or four of them should work. Most of \
the model rests at any moment. That saves arithmetic, but it makes mistakes harder to see: if one expert \
out of sixty-four is wrong, nearly everything still looks right.

On 14 March 1879 nothing unusual was reported in the town of Ulm. The thermometer stood at 6.5 degrees, \
bread cost 32 pfennigs, and the council debated, for the third time, whether the bridge should be widened. \
"Not this year," said the mayor; "perhaps in 1881, if the taxes allow it." He was re-elected.

Why do we compare numbers at all? Because two programs that print the same sentence may still disagree in \
the next one. Agreement has to be measured where it is decided, in every layer and for every token, and it \
has to be stated with its limits: how far, how often, and on which inputs.
"""

CODE = '''\
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    station: str
    celsius: float
    hour: int = 0


def warmest(readings: list[Reading], top: int = 3) -> list[tuple[str, float]]:
    """The ``top`` stations by mean temperature, warmest first."""
    totals: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for r in readings:
        if not -90.0 <= r.celsius <= 60.0:
            raise ValueError(f"{r.station}: {r.celsius} degrees is not plausible")
        totals[r.station] = totals.get(r.station, 0.0) + r.celsius
        counts[r.station] += 1
    means = {name: total / counts[name] for name, total in totals.items()}
    return sorted(means.items(), key=lambda item: (-item[1], item[0]))[:top]


if __name__ == "__main__":
    data = [Reading("north", 3.5, h) for h in range(4)] + [Reading("south", 9.0 + h, h) for h in range(6)]
    for name, mean in warmest(data, top=2):
        print(f"{name:>8} {mean:6.2f}")
'''
