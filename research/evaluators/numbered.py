"""Datasets whose examples carry their index, so that outputs can be matched after sorting by length."""

import dataclasses

from research.data.dataset import Dataset, Example, Source


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A source that adds `example`, the index, to at most the first `count` examples."""

    source: Source
    count: int | None = None

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.source) if self.count is None else min(self.count, len(self.source))

    def __getitem__(self, index: int) -> Example:
        """Return an example with its index."""
        return self.source[index] | {"example": index}


def numbered(data: Dataset, *features: str, count: int | None = None) -> Dataset:
    """Return the dataset, or its first `count` examples, with `example` and `features` in its batches."""
    return dataclasses.replace(
        data, source=Numbered(data.source, count), features=(*data.features, "example", *features)
    )
