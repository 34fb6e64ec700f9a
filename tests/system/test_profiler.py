"""A profile can be opened, and a wrong one is refused in one line."""

import jax
import jax.numpy as jnp
import pytest

from densenet_jax.choices import PROFILE
from densenet_jax.errors import UserError
from densenet_jax.system.profiler import Profile


@pytest.mark.parametrize("setting", ["5", "0:5", "5:0", "-1:3", "5:1:1", "a:b", "5:", " 5:1"])
def test_malformed_profiles_are_refused(setting):
    assert not PROFILE.fullmatch(setting)


def test_profile_after_the_end_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"config.profile is '9:3', which ends at step 11; the run has 10 steps"):
        Profile("9:3", str(tmp_path), 10)
    Profile("9:2", str(tmp_path), 10)


def test_without_a_setting_nothing_is_written(tmp_path):
    profile = Profile("", str(tmp_path), 3)
    with profile.step(1):
        pass
    profile.ends(1, None)
    profile.close()
    assert list(tmp_path.iterdir()) == []


def test_profile_holds_the_asked_steps(tmp_path):
    double = jax.jit(lambda x: x * 2)
    value = double(jnp.ones(3))
    profile = Profile("2:2", str(tmp_path), 5)
    for number in range(1, 6):
        with profile.step(number):
            value = double(value)
        profile.ends(number, value)
    profile.close()
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    steps = [
        dict(event.stats)["step_num"]
        for plane in planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert steps == [2, 3]
