"""Which files of a data set nobody will read any more."""

import pytest

from pipelines.commits import Commit, attempt_name, errors_name, shard_name, stale_files

DATA0, DATA1, DATA2 = (shard_name(7, generation) for generation in range(3))
ERRORS0, ERRORS1 = errors_name(7), errors_name(7, 1)
OTHER = "shards/notes.txt"


def committed(generation: int, *, errors: bool) -> dict[int, Commit]:
    sha256 = "abc" if errors else None
    return {7: Commit(7, 8, int(errors), "abc", 10, "winner", sha256, generation)}


def waiting(*finals: str, attempt: str = "winner") -> set[str]:
    return {attempt_name(final, attempt) for final in finals}


CASES = {
    "a loser goes at once": (
        committed(0, errors=True),
        waiting(DATA0, ERRORS0) | waiting(DATA0, ERRORS0, attempt="loser"),
        waiting(DATA0, ERRORS0, attempt="loser"),
    ),
    "the winner stays until its files are all there": (
        committed(0, errors=True),
        {ERRORS0, *waiting(DATA0)},
        set(),
    ),
    "the winner's second copy goes": (
        committed(0, errors=True),
        {ERRORS0, DATA0, *waiting(DATA0)},
        waiting(DATA0),
    ),
    "an older generation stays until the latest is whole": (
        committed(1, errors=True),
        {ERRORS0, DATA0, ERRORS1, *waiting(DATA1), *waiting(DATA0, attempt="old")},
        set(),
    ),
    "an older generation goes once the latest is whole": (
        committed(1, errors=True),
        {ERRORS0, DATA0, ERRORS1, DATA1, *waiting(DATA0, attempt="old")},
        {ERRORS0, DATA0, *waiting(DATA0, attempt="old")},
    ),
    "an errors file that no commit names goes": (
        committed(1, errors=False),
        {DATA1, ERRORS1},
        {ERRORS1},
    ),
    "a shard that came after the commits were read stays": ({}, {DATA0, ERRORS0}, set()),
    "what is not ours stays": (committed(0, errors=False), {DATA0, OTHER}, set()),
}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_stale_files(case: str, alone: bool) -> None:
    commits, names, stale = CASES[case]
    assert stale_files(names, commits, alone=alone) == sorted(stale)


@pytest.mark.parametrize("alone", [False, True])
def test_a_generation_whose_record_was_removed_goes_with_the_next_run_that_is_alone(
    alone: bool,
) -> None:
    later = {ERRORS1, DATA1}
    for commits in ({}, committed(0, errors=False)):
        found = stale_files({DATA0, *later}, commits, alone=alone)
        assert found == (sorted(later) if alone else [])
    assert stale_files({DATA1, DATA2}, committed(1, errors=False), alone=alone) == (
        [DATA2] if alone else []
    )


@pytest.mark.parametrize("alone", [False, True])
def test_an_attempt_that_may_still_win_stays_while_anyone_else_is_at_work(alone: bool) -> None:
    pending = waiting(DATA0)
    assert stale_files(pending, {}, alone=alone) == (sorted(pending) if alone else [])
    retry = waiting(DATA1)
    names = {DATA0, *retry}
    found = stale_files(names, committed(0, errors=False), alone=alone)
    assert found == (sorted(retry) if alone else [])
