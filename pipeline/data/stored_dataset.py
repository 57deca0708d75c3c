"""Small sets from Hugging Face parquet: decoded once to uint8, and mapped by every worker."""

from pipeline.data.base import OnDisk
from pipeline.data.splits import Splits, check_settings, locate, make_splits


def check_small(dataset: OnDisk) -> None:
    """Check the settings.

    Raises:
        ValueError: A setting is outside its range.
    """
    check_settings(
        validation=dataset.validation,
        train_images=dataset.train_images,
        test_images=dataset.test_images,
        pad=dataset.pad,
    )


def load_small(dataset: OnDisk, seed: int) -> Splits:
    """Decode or map the train and the test split, and take the wanted subsets."""
    from pipeline.data.parquet import Layout, load_parquet  # only here: needs pyarrow and Pillow

    layout = Layout(dataset.label_column, dataset.num_classes, dataset.image_size)
    stored = load_parquet(locate(dataset.path, dataset.folder), dataset.split_names, layout)
    train, test = stored.images
    return make_splits(
        train,
        test,
        seed,
        train_images=dataset.train_images,
        test_images=dataset.test_images,
        validation=dataset.validation,
        sha256=stored.sha256,
        class_names=stored.class_names,
    )
