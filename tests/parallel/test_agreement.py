"""Processes must agree: a message names those that differ, and what differs."""

import dataclasses

import pytest

from mixtral_jax.config import ConfigError
from mixtral_jax.parallel.agreement import (
    LocalDevices,
    Member,
    find_disagreements,
    find_unequal_devices,
    find_versions,
    flatten,
    introduce,
    require_same,
)
from mixtral_jax.parallel.processes import Processes
from tests.cases import small_config

CONFIG = small_config()


def member(index: int, **changes) -> Member:
    return dataclasses.replace(
        Member(index, f"host{index}", 10 + index, "/runs/a", "hash", find_versions()), **changes
    )


class Scripted(Processes):
    """Processes of which the other ones send values that the test chooses."""

    def __init__(self, others):
        super().__init__(0, 1 + len(others))
        self._others = others

    def share(self, name, value, seconds=None):
        return [value, *self._others]


def test_equal_members_agree():
    assert find_disagreements(Processes(), CONFIG, [member(0), member(1), member(2)]) == []


def test_differing_config_keys_are_named_with_values_and_processes():
    other = flatten(CONFIG) | {"train.seed": 7, "mesh.fsdp": 2}
    found = find_disagreements(
        Scripted([flatten(CONFIG), other]),
        CONFIG,
        [member(0), member(1), member(2, config="other")],
    )
    assert found == [
        "the processes have different configs: mesh.fsdp=1 on processes 0, 1, 2 on process 2, "
        "train.seed=0 on processes 0, 1, 7 on process 2"
    ]


def test_differing_versions_are_named():
    old = {**find_versions(), "jax": "0.9.9"}
    (found,) = find_disagreements(Processes(), CONFIG, [member(0), member(1, versions=old)])
    assert found.startswith("the processes run different software: jax=")
    assert "'0.9.9' on process 1" in found


def test_a_package_that_one_process_lacks_is_named():
    more = {**find_versions(), "tokamax": "0.0.12"}
    (found,) = find_disagreements(Processes(), CONFIG, [member(0, versions=more), member(1)])
    assert "tokamax='0.0.12' on process 0, None on process 1" in found


def test_unequal_devices_are_named():
    eight, four = LocalDevices("gpu", "NVIDIA H200", 8), LocalDevices("gpu", "NVIDIA H200", 4)
    assert find_unequal_devices([eight, eight]) == []
    (found,) = find_unequal_devices([eight, four, eight])
    assert "8 x NVIDIA H200 on processes 0, 2; 4 x NVIDIA H200 on process 1" in found
    (found,) = find_unequal_devices([eight, LocalDevices("cpu", "cpu", 8)])
    assert "8 x cpu on process 1" in found


def test_a_process_alone_introduces_itself_to_itself(tmp_path):
    (alone,) = introduce(Processes(), CONFIG, tmp_path)
    assert (alone.index, alone.workdir) == (0, str(tmp_path))
    assert set(alone.versions) >= {"python", "jax", "jaxlib", "flax", "mixtral_jax"}


def test_processes_that_read_other_data_are_named():
    require_same(Scripted(["data a", "data a"]), "data", "data a", "give all the same")
    with pytest.raises(
        ConfigError, match=r"^process 1, 3 has data b, but process 0 has data a: give all the same$"
    ):
        require_same(
            Scripted(["data b", "data a", "data c"]), "data", "data a", "give all the same"
        )
