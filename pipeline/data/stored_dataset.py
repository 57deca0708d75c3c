"""Settings that all data sets share, and small ones from Hugging Face parquet.

The small ones are decoded once to uint8, and mapped by every worker.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from moe.valid_fields import Count, Whole, Within, check_fields
from pipeline.data.splits import Splits, locate, make_splits


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """What every data set lets one choose.

    Attributes:
        path: Folder or URI with the parquet files; empty: ``$ROBUST_MOE_DATA/<folder>``.
        train_images, test_images: Size of a class-balanced subset; None: all.
        validation: Fraction of the train images that is kept apart, in (0, 0.5].
        pad, flip: Augmentation: border of the random crop in pixels, at most half of an image's
            side, and mirroring or not.

    Raises:
        ValueError: A setting is outside its range.
    """

    path: str = ""
    train_images: Count | None = None
    test_images: Count | None = None
    validation: Annotated[float, Within(0, 0.5, above=True)] = 0.1
    pad: Whole = 0
    flip: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        side: int = self.image_size  # type: ignore[attr-defined]
        if self.pad > side // 2:
            raise ValueError(
                f"pad must be at most {side // 2}, half of an image's side, got {self.pad}"
            )


@dataclass(frozen=True, kw_only=True)
class StoredDataset(SplitSettings):
    """A set whose images are all of one size, in Hugging Face parquet.

    Its attributes beside the settings are those of ``OnDisk`` and belong to the class.
    """

    num_classes: ClassVar[int]
    image_size: ClassVar[int]
    folder: ClassVar[str]
    any_size: ClassVar[bool] = False
    label_column: ClassVar[str] = "label"
    split_names: ClassVar[tuple[str, str]] = ("train", "test")

    def load(self, seed: int) -> Splits:
        """Decode or map the splits; ``seed`` draws the subsets and the validation split."""
        from pipeline.data.parquet import Layout, load_parquet  # needs pyarrow and Pillow

        layout = Layout(self.label_column, self.num_classes, self.image_size)
        stored = load_parquet(locate(self.path, self.folder), self.split_names, layout)
        train, test = stored.images
        return make_splits(
            train,
            test,
            seed,
            train_images=self.train_images,
            test_images=self.test_images,
            validation=self.validation,
            sha256=stored.sha256,
            class_names=stored.class_names,
        )
