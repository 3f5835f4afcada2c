"""Examples that know their position, so that outputs find back to them however batches were sorted."""

import dataclasses

from research.data.dataset import Dataset, Example, Source


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A source whose examples have `example`, their position; at most the first `count`."""

    source: Source
    count: int | None = None

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.source) if self.count is None else min(self.count, len(self.source))

    def __getitem__(self, index: int) -> Example:
        """Return an example and its position."""
        return self.source[index] | {"example": index}


def numbered(data: Dataset, *features: str, count: int | None = None) -> Dataset:
    """Return the dataset, or its first `count` examples, with `example` and `features` in its batches."""
    return dataclasses.replace(
        data, source=Numbered(data.source, count), features=(*data.features, "example", *features)
    )
