"""The few shapes that the text stage is compiled for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextBuckets:
    """Numbers of texts and of tokens, both ascending; inputs are padded to the next of each."""

    rows: tuple[int, ...] = (2, 8)
    lengths: tuple[int, ...] = (32, 64)

    def __post_init__(self) -> None:
        for name, sizes in (("rows", self.rows), ("lengths", self.lengths)):
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name}: got {sizes} but expected ascending numbers from 1")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(rows, length) for rows in self.rows for length in self.lengths]

    def bucket(self, rows: int, length: int) -> tuple[int, int] | None:
        """Returns the smallest shape that holds `rows` texts of `length` tokens; none if they exceed the largest."""
        fitting = [shape for shape in self.shapes if shape[0] >= rows and shape[1] >= length]
        return fitting[0] if fitting else None
