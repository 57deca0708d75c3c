"""Wrong names end with the nearest valid ones, three at most."""

from __future__ import annotations

import pytest

from moe.backbones import BACKBONES
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.nearest_names import unknown


def test_at_most_three_names_are_shown_the_nearest_first() -> None:
    text = str(unknown("backbone", "resnet", BACKBONES))
    assert text.startswith("no backbone 'resnet'; nearest: resnet18, ")
    assert text.count(",") == 2


def test_a_short_list_is_shown_whole() -> None:
    assert str(unknown("key", "c", ["a", "b"])) == "no key 'c', only a, b"
    assert str(unknown("key", "c", [])) == "no key 'c', only none"


def test_last_word_of_a_dotted_key_finds_it_at_any_depth() -> None:
    with pytest.raises(ValueError, match=r"no key 'beta'; nearest: algorithm\.beta, "):
        override(Config(), {"beta": "3"})
    with pytest.raises(ValueError, match=r"'algorithm\.attack\.step'; nearest: algorithm\.attack"):
        override(Config(), {"algorithm.attack.step": "3"})
