"""A full disk is reported as such and no other error is, whoever raises it."""

import errno

import pytest

from densenet_jax.errors import UserError
from densenet_jax.system.disk import report_full_disk


def wrapped(error: Exception) -> Exception:
    try:
        raise ValueError("saving failed") from error
    except ValueError as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "whatever"),
        OSError(errno.EDQUOT, "whatever"),
        ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device"),
        wrapped(OSError(errno.EFBIG, "whatever")),
    ],
)
def test_full_disk_is_the_users_to_mend(error, tmp_path):
    with (
        pytest.raises(UserError, match=r"can't be written to: .* \([\d,.]+ MiB are free there\)"),
        report_full_disk(str(tmp_path)),
    ):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), ValueError("no"), UserError("No space left on device")])
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, report_full_disk(str(tmp_path)):
        raise error
    assert caught.value is error


def test_writes_that_were_never_begun_say_nothing_below_the_message(recwarn, tmp_path):
    async def write() -> None:
        pass

    with pytest.raises(UserError), report_full_disk(str(tmp_path)):
        raise OSError(errno.ENOSPC, "whatever")
    left = write()
    del left
    assert not recwarn.list
