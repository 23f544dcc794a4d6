"""Files written whole: what was there stays until the new one is complete."""

import pytest

from fastdraft.files import write_file


def test_a_write_that_fails_or_is_killed_leaves_what_was_there(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_file(file, b"first")

    def torn():
        yield b"sec"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        write_file(file, torn())
    assert file.read_bytes() == b"first" and [p.name for p in file.parent.iterdir()] == ["a.json"]
    (file.parent / ".writing-a.json").write_bytes(b"of a killed process")
    write_file(file, (part for part in (b"sec", b"ond")))
    assert file.read_bytes() == b"second" and [p.name for p in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [OSError("the source said no"), OSError(2, "No such file or directory", "source")])
def test_an_error_of_what_is_written_keeps_its_words(tmp_path, error):
    said = str(error)

    def source():
        yield b"first"
        raise error

    with pytest.raises(OSError) as raised:
        write_file(tmp_path / "a.json", source())
    assert str(raised.value) == said and not list(tmp_path.iterdir())
