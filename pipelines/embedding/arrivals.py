"""The driver's memory: which pieces of the shards in flight are there. It grows with those shards only."""

from pipelines.embedding.write import Written


class Arrivals:
    """Collects pieces until a shard is complete."""

    def __init__(self) -> None:
        self._pieces: dict[int, dict[int, Written]] = {}
        self._complete: set[int] = set()

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, piece: Written) -> list[Written] | None:
        """Note a piece; a second copy of one changes nothing.

        Returns:
            All pieces of its shard in order, once they are there.
        """
        if piece.shard_id in self._complete:
            return None
        mine = self._pieces.setdefault(piece.shard_id, {})
        mine.setdefault(piece.number, piece)
        last = next((one.number for one in mine.values() if one.last), None)
        if last is None or len(mine) <= last:
            return None
        del self._pieces[piece.shard_id]
        self._complete.add(piece.shard_id)
        return [mine[number] for number in range(last + 1)]
