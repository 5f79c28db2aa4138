"""Presets and `--set`, as a stranger may write them."""

import pytest

from gan.errors import UserError
from launch.settings import as_flags, chosen_preset, read_config


def read(*assignments: str, preset: str = "default"):
    return read_config({"assignments": assignments, "preset": preset})


def test_a_setting_that_is_given_twice_is_refused():
    assert read("seed=1", "batch=8").seed == 1
    for first, second in (("seed=1", "seed=2"), ("seed=1", "seed=1"), ("seed = 1", "seed=2")):
        with pytest.raises(UserError, match="--set seed was given twice"):
            read(first, second)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 20_000 + "]" * 20_000,
        "a = " + "{x=" * 20_000,
        ".".join("a" * 2000) + " = 1",
        "[" + ".".join("a" * 2000) + "]\nb = 1",
        "run.cache = []",
        "seed = 1979-05-27",
        "network = 3",
        "seed = 1\nseed = 2",
        "\x00",
    ],
)
def test_a_preset_of_any_content_is_one_line(tmp_path, text):
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        read(preset=str(path))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_a_cache_whose_name_is_a_number_is_a_folder():
    assert read("run.cache=1").run.cache.endswith("/1")


def test_messages_hold_nothing_that_moves_a_terminal():
    assert as_flags("class \x1b[2Jx \u202e of batch=3") == r"class \x1b[2Jx \u202e of --batch=3"


def test_a_model_starts_from_a_preset_of_its_own():
    assert chosen_preset({"preset": None, "model": "vae"}) == "vae"
    assert chosen_preset({"preset": None, "model": "gan"}) == "default"
    assert chosen_preset({"preset": None, "model": None}) == "default"
    assert chosen_preset({"preset": "vae-dense", "model": "vae"}) == "vae-dense"
