"""Recipes and benchmarks that a sweep refuses, as its figures would not be those of an evaluation."""

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.benchmark import Benchmark
from pipelines.recipe import Recipe
from slq.errors import ConfigError

_POOL, _GROUP = "pool", "query_group"


def require_plain_margins(recipe: Recipe) -> None:
    """Refuse what would order a cell's candidates by more than what the model says of each pair.

    Raises:
        ConfigError: The recipe's fine stage does.
    """
    section = recipe.rerank
    others = {
        "rerank.profile": section.profile != "default",
        "rerank.fuse": section.fuse,
        "rerank.adaptive": section.adaptive is not None,
    }
    for key, is_set in others.items():
        if is_set:
            raise ConfigError(
                f"{key} has no place in a sweep, which orders the first `sweep.depths` candidates of every cell by "
                "their margins; leave it out"
            )


def require_whole_rankings(benchmark: Benchmark) -> None:
    """Refuse a benchmark whose queries do not rank the whole gallery, or have several wordings.

    Raises:
        ConfigError: It is one.
    """
    if benchmark.allowed is not None:
        raise _refused("candidates or a column `pool` say which items a query of this recipe ranks")
    if benchmark.wordings is not None:
        raise _refused(
            f"column `{_GROUP}` of this recipe's queries tells of several wordings of a query"
        )


def require_whole_tables(recipe: Recipe) -> None:
    """Refuse what `require_whole_rankings` would, by the tables alone, as far as they are there and Parquet.

    Raises:
        ConfigError: A table says so.
    """
    candidates, queries = recipe.data.path("candidates"), recipe.data.path("queries")
    try:
        has_candidates = candidates.is_file() and pq.read_metadata(candidates).num_rows > 0
        names = {_POOL, _GROUP} & set(pq.read_schema(queries).names) if queries.is_file() else set()
        table = pq.read_table(queries, columns=sorted(names)) if names else pa.table({})
    except (OSError, pa.ArrowException):
        return  # reading all of it will tell
    if has_candidates:
        raise _refused(f"{candidates} says which items a query of this recipe ranks")
    if _POOL in names and table[_POOL].null_count < table.num_rows:
        raise _refused(
            f"column `{_POOL}` of {queries} says which items a query of this recipe ranks"
        )
    groups = (
        [str(one) for one in table[_GROUP].to_pylist() if one is not None]
        if _GROUP in names
        else []
    )
    if len(set(groups)) < len(groups):
        raise _refused(f"column `{_GROUP}` of {queries} tells of several wordings of a query")


def _refused(why: str) -> ConfigError:
    return ConfigError(
        f"a sweep ranks the whole gallery for every query, in one wording; {why}. Measure it with `slq eval`, or sweep "
        "data without"
    )
