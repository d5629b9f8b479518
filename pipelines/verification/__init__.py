"""The checks of `slq verify`: commit records and counts, single shards, ids, and a sample embedded anew."""
