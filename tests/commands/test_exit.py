"""How a command ends: one message and an exit status."""

from __future__ import annotations

import errno
import os

import pytest

from chattrain.commands.exit import report_error


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.EROFS, 2),
        (errno.EACCES, 2),
        (errno.EPERM, 2),
        (errno.ENAMETOOLONG, 2),
        (errno.ENOSPC, 1),
        (errno.EDQUOT, 1),
    ],
)
def test_a_folder_that_takes_no_file_is_one_message_with_the_way_out(capsys, number, status):
    assert report_error(OSError(number, os.strerror(number), "/mnt/runs/sft")) == status
    said = capsys.readouterr().err
    assert said.startswith(f"chattrain: /mnt/runs/sft: {os.strerror(number)}. ") and said.count("\n") == 1


def test_a_file_in_the_place_of_a_folder_is_named(capsys, tmp_path):
    (tmp_path / "runs").touch()
    for folder in ("runs", "runs/sft/one"):
        with pytest.raises(OSError) as raised:
            (tmp_path / folder).mkdir(parents=True)
        assert report_error(raised.value) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"chattrain: {tmp_path / 'runs'} is a file") and said.count("\n") == 1


def test_another_error_of_a_file_is_a_bug_and_keeps_its_traceback(capsys):
    try:
        os.stat("/nowhere/at/all")
    except OSError as error:
        assert report_error(error) == 1
    assert "Traceback" in capsys.readouterr().err
