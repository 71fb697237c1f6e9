"""The entrance of the models that requests reach first: closed while a later stage is full, or a server stops."""

from pathlib import Path

import pytest

from audioldm2_triton.errors import UnavailableError
from audioldm2_triton.server.entrance import FOLDER_VARIABLE, Entrance, FullSign, entrance_of, show_full_decoders


def is_open(entrance: Entrance) -> bool:
    try:
        entrance.check_open()
    except UnavailableError:
        return False
    return True


def test_it_is_closed_while_all_engines_are_full(tmp_path: Path) -> None:
    entrance, of_others = Entrance(tmp_path), Entrance(tmp_path, "other-")
    sign = FullSign(entrance)
    first, second = sign.add_engine(), sign.add_engine()
    for show, is_full, expected in [
        (first, True, True),
        (first, True, True),
        (second, True, False),
        (second, True, False),
        (first, False, True),
        (second, False, True),
    ]:
        show(is_full)
        assert is_open(entrance) == expected
        assert is_open(of_others)


def test_an_engine_that_broke_does_not_hold_it_open(tmp_path: Path) -> None:
    entrance = Entrance(tmp_path)
    sign = FullSign(entrance)
    first, second = sign.add_engine(), sign.add_engine()
    second(True)
    assert is_open(entrance)
    first(None)
    first(False)  # what it still held has been answered
    assert not is_open(entrance)
    second(False)
    assert is_open(entrance)
    second(None)
    assert is_open(entrance)  # the denoiser says that none works


def test_a_sign_of_a_predecessor_is_removed(tmp_path: Path) -> None:
    entrance = Entrance(tmp_path)
    FullSign(entrance).add_engine()(True)
    with pytest.raises(UnavailableError, match="denoiser is full"):
        entrance.check_open()
    FullSign(entrance)
    assert is_open(entrance)


def test_it_is_closed_while_the_decoder_of_its_set_is_full(tmp_path: Path) -> None:
    entrance, music = Entrance(tmp_path), Entrance(tmp_path, "music-")
    for full in (["decoder"], ["decoder", "music-decoder"], ["music-decoder"], []):
        show_full_decoders(tmp_path, full)
        assert is_open(entrance) == ("decoder" not in full)
        assert is_open(music) == ("music-decoder" not in full)
    show_full_decoders(tmp_path, ["decoder"])
    with pytest.raises(UnavailableError, match="decoder is full"):
        entrance.check_open()


def test_a_server_that_is_to_stop_closes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    entrances = [entrance_of(f"{models}text_conditioning", "text_conditioning") for models in ("", "music-")]
    assert all(is_open(entrance) for entrance in entrances)
    Entrance(tmp_path).close()
    for entrance in entrances:
        with pytest.raises(UnavailableError, match="shutting down"):
            entrance.check_open()


def test_without_a_folder_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    entrance = entrance_of("text_conditioning", "text_conditioning")
    FullSign(entrance).add_engine()(True)
    entrance.close()
    assert is_open(entrance)
