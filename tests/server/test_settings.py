"""Settings: what is accepted, and the line that says what is not."""

import pytest

from audioldm2_triton.server.settings import (
    Settings,
    SettingsError,
    misspelt_variables,
    read_setting,
    read_settings,
)


def read(**given: str) -> Settings:
    return read_settings({"checkpoint": "c", **given}, {})


def test_misspelt_variables_are_found() -> None:
    names = ("AUDIOLDM2_MAX_WAITNG", "AUDIOLDM2_DTYPE", "AUDIOLDM2_API_KEY", "AUDIOLDM2_ZZZ", "PATH")
    environment = dict.fromkeys(names, "1")
    found = misspelt_variables(environment, {"AUDIOLDM2_API_KEY"})
    assert found == {"AUDIOLDM2_MAX_WAITNG": ["AUDIOLDM2_MAX_WAITING"], "AUDIOLDM2_ZZZ": []}


def test_lengths_to_compile() -> None:
    assert read().lengths_to_compile(10.24) == (10.24,)
    assert read(compile_lengths_in_s="10.24, 2.56,2.56").lengths_to_compile(1.0) == (2.56, 10.24)


def test_guided_steps() -> None:
    assert read().guided_steps == (0.0, 1.0)
    assert read(guidance_interval="0.1, 0.75").guided_steps == (0.1, 0.75)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("compile", "yes"),
        ("default_timeout_in_s", "-1"),
        ("default_timeout_in_s", "nan"),
        ("compile_lengths_in_s", "a"),
        ("compile_lengths_in_s", "1,,2"),
        ("compile_lengths_in_s", "301"),
        ("compile_max_rows", "-1"),
        ("embedding_cache_size", "many"),
        ("full_negative_prompt", "auto"),
        ("log_format", "xml"),
        ("guidance_interval", "0.5"),
        ("guidance_interval", "0.7,0.2"),
        ("guidance_interval", "0,1.1"),
        ("guidance_interval", "nan,1"),
        ("timestep_spacing", "Karras"),
    ],
)
def test_what_a_server_cannot_start_with(name: str, given: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}: got '{given}' but expected"):
        read(**{name: given})


def test_the_environment_overrides() -> None:
    assert read_settings({"checkpoint": "c", "compile": "on"}, {"AUDIOLDM2_COMPILE": "off"}).compile == "off"


def test_one_setting_alone() -> None:
    name = "default_timeout_in_s"
    assert read_setting(name, {}, {}) == Settings("c").default_timeout_in_s == 3600
    assert read_setting(name, {name: "5"}, {}) == 5
    assert read_setting(name, {name: "5"}, {"AUDIOLDM2_DEFAULT_TIMEOUT_IN_S": "0"}) == 0
    with pytest.raises(SettingsError, match="default_timeout_in_s: got 'never' but expected"):
        read_setting(name, {name: "never"}, {})
