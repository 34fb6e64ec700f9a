"""The work directory is held by one run, and its removal during a run is noticed."""

import os
import shutil

import pytest

from densenet_jax.errors import UserError
from densenet_jax.workdir import only_run_in, write_labels


def test_a_second_run_is_refused_and_the_lock_ends_with_the_first(tmp_path):
    with (
        only_run_in(str(tmp_path)),
        pytest.raises(UserError, match="in use by another run"),
        only_run_in(str(tmp_path)),
    ):
        pass
    with only_run_in(str(tmp_path)):
        pass


def test_the_lock_follows_no_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("content")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock: a link, which is not followed"), only_run_in(str(tmp_path / "run")):
        pass
    assert (tmp_path / "precious").read_text() == "content"


def test_a_removed_lock_is_taken_again(tmp_path, caplog):
    (tmp_path / "config.json").write_text("{}")
    with only_run_in(str(tmp_path)) as check:
        check()
        assert not caplog.records
        os.remove(tmp_path / ".lock")
        check()
        assert "was removed during the run" in caplog.text
        with pytest.raises(UserError, match="in use by another run"), only_run_in(str(tmp_path)):
            pass
        os.remove(tmp_path / ".lock")
        with only_run_in(str(tmp_path)), pytest.raises(UserError, match="in use by another run"):
            check()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_refused_command_leaves_nothing_behind(is_new, tmp_path):
    workdir = tmp_path / "run" if is_new else tmp_path
    with pytest.raises(UserError), only_run_in(str(workdir)):
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("remove", [shutil.rmtree, lambda path: os.remove(path / "config.json")])
def test_a_work_directory_that_is_removed_or_emptied_during_the_run_is_a_users_error(remove, tmp_path):
    workdir = tmp_path / "run"
    with only_run_in(str(workdir)) as check:
        (workdir / "config.json").write_text("{}")
        check()
        remove(workdir)
        with pytest.raises(UserError, match="was removed or emptied during the run"):
            check()


def test_an_empty_file_of_labels_is_written_again(tmp_path):
    (tmp_path / "labels.txt").touch()
    write_labels(str(tmp_path), ["cat", "dog"])
    assert (tmp_path / "labels.txt").read_text() == "cat\ndog\n"
