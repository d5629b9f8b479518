"""How candidates are ordered by what was read of them (spec: RetLLM section 2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slq.errors import ConfigError

LEAST_LABEL_MASS = 0.5


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model is about to say of a pair.

    Attributes:
        margin: In nats; higher is a better match. What a context-free pair says of it is subtracted already.
        label_mass: Probability that it says any label at all; below 0.5 the margin means little. None, as what
            follows, where the labels alone were read.
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
    def is_doubtful(self) -> bool | None:
        """Whether the model is about to say something else than a label; None where the labels alone were read."""
        return None if self.label_mass is None else self.label_mass < LEAST_LABEL_MASS


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
        Profile("default", "true_false", lambda reading: reading.margin, _by_margin, False),
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


def ordered(
    readings: Mapping[int, Reading], coarse: Sequence[float], profile: Profile
) -> list[int]:
    """Numbers of all candidates, the best first: total and deterministic.

    Those with a reading share out their coarse places among themselves; all others keep theirs.

    Args:
        readings: By number of the candidate.
        coarse: Score of each candidate; of equals the first comes first.
        profile: Says what readings are sorted by.
    """
    by_coarse = coarse_order(coarse)
    fine = iter(
        sorted(
            readings, key=lambda number: (*profile.rank(readings[number]), -coarse[number], number)
        )
    )
    return [next(fine) if number in readings else number for number in by_coarse]


def coarse_order(coarse: Sequence[float]) -> list[int]:
    """Numbers of candidates by coarse score, the best first; of equals the first."""
    return sorted(range(len(coarse)), key=lambda number: (-coarse[number], number))
