"""How candidates are ordered by what was read of them (spec: RetLLM section 2).

`ordered` is the one rule of places: of `Reranker.rank`, of the service and of evaluation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slq.errors import ConfigError

DOUBTFUL_BELOW = 0.5
"""Label mass below which the model did not answer the question, so that its margin means little."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model is about to say of a pair.

    Attributes:
        margin: In nats; higher is a better match. What a context-free pair says of it is subtracted already.
        label_mass: Probability that it says any label at all. None, as what follows, where the labels alone were read.
        entropy: Of the next token over the full vocabulary, in nats.
        hundredths: Probability of the positive label over the full vocabulary, cut to whole hundredths.
        context_free: What was subtracted, in nats; None without that. Added to `margin` it is that of the pair alone.
    """

    margin: float
    label_mass: float | None = None
    entropy: float | None = None
    hundredths: int | None = None
    context_free: float | None = None

    @property
    def probability(self) -> float:
        """Of a match, given that the model says a label: the sigmoid of the margin."""
        small = math.exp(-abs(self.margin))  # never overflows
        return (1.0 if self.margin >= 0 else small) / (1.0 + small)

    @property
    def is_doubtful(self) -> bool | None:
        """Whether a label is too unlikely for the margin to mean much; None where the labels alone were read."""
        return None if self.label_mass is None else self.label_mass < DOUBTFUL_BELOW


def averaged(readings: Sequence[Reading]) -> Reading:
    """The mean of what was read of one candidate with several wordings of a query; hundredths are cut to whole ones.

    Args:
        readings: At least one; all with the same fields.
    """
    first = readings[0]
    if len(readings) == 1:
        return first

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(readings) else None

    hundredths = mean([one.hundredths for one in readings])
    return Reading(
        margin=sum(one.margin for one in readings) / len(readings),
        label_mass=mean([one.label_mass for one in readings]),
        entropy=mean([one.entropy for one in readings]),
        hundredths=None if hundredths is None else math.floor(hundredths),
        context_free=mean([one.context_free for one in readings]),
    )


@dataclass(frozen=True, slots=True)
class Profile:
    """A way to score and order.

    Attributes:
        name: Key in `PROFILES`.
        framing: The one to use if none is asked for.
        score: Of a reading; higher is better.
        rank: What readings are sorted by, the best first, before coarse scores and places.
        needs_vocabulary: Whether that takes more than the labels.
    """

    name: str
    framing: str
    score: Callable[[Reading], float]
    rank: Callable[[Reading], tuple[float, ...]]
    needs_vocabulary: bool


def _by_margin(reading: Reading) -> tuple[float, ...]:
    return (-reading.margin,)


def _by_hundredths(reading: Reading) -> tuple[float, ...]:
    """As RetLLM's release: the truncated probability, then the surer answer."""
    return (-_hundredths(reading), float(reading.entropy or 0.0))


def _hundredths(reading: Reading) -> int:
    if reading.hundredths is None:
        raise ValueError("the profile compat reads the whole vocabulary")
    return reading.hundredths


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("default", "mcq", lambda reading: reading.margin, _by_margin, False),
        Profile("compat", "true_false", lambda r: _hundredths(r) / 100, _by_hundredths, True),
    )
}


def profile_by_name(name: str) -> Profile:
    """The profile called `name`.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in PROFILES:
        raise ConfigError(f"profile {name!r} is unknown; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def fusible(profile: Profile, coarse_weight: float) -> float:
    """The weight of coarse scores, where the profile ranks by what they can be added to.

    Raises:
        ConfigError: It does not, or the weight is negative.
    """
    if coarse_weight < 0:
        raise ConfigError(f"coarse_weight is {coarse_weight}; it must be 0 or more")
    if coarse_weight and profile.rank is not _by_margin:
        raise ConfigError(
            f"profile {profile.name!r} does not rank by margins, so coarse scores cannot be fused with it; "
            "use the profile default"
        )
    return coarse_weight


def fine_score(
    reading: Reading, coarse: float, profile: Profile, coarse_weight: float = 0.0
) -> float:
    """What the fine stage ranks a candidate by, as one number: of the profile, or the fused sum.

    Args:
        reading: Of the candidate.
        coarse: Its coarse score.
        profile: Gives the score where nothing is fused.
        coarse_weight: As of `ordered`.
    """
    return reading.margin + coarse_weight * coarse if coarse_weight else profile.score(reading)


def ordered(
    readings: Mapping[int, Reading],
    coarse: Sequence[float],
    profile: Profile,
    *,
    coarse_weight: float = 0.0,
) -> list[int]:
    """Numbers of all candidates, the best first: total and deterministic.

    Those with a reading share out their coarse places among themselves; all others keep theirs.

    Args:
        readings: By number of the candidate.
        coarse: Score of each candidate; of equals the first comes first.
        profile: Says what readings are sorted by.
        coarse_weight: Nats of margin that one unit of coarse score is worth; where it is not 0, their sum decides
            instead of the profile.
    """

    def key(number: int) -> tuple[float, ...]:
        reading = readings[number]
        if coarse_weight:
            fused = fine_score(reading, coarse[number], profile, coarse_weight)
            return (-fused, -coarse[number], number)
        return (*profile.rank(reading), -coarse[number], number)

    by_coarse = coarse_order(coarse)
    fine = iter(sorted(readings, key=key))
    return [next(fine) if number in readings else number for number in by_coarse]


def coarse_order(coarse: Sequence[float]) -> list[int]:
    """Numbers of candidates by coarse score, the best first; of equals the first."""
    return sorted(range(len(coarse)), key=lambda number: (-coarse[number], number))
