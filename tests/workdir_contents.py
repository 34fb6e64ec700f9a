"""What a run has left in its work directory."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

_OF_THE_CLOCK = ("images_per_sec", "data_wait_fraction", "host_memory_bytes", "compile_secs")


def list_checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def read_all_reports(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_reports(workdir: pathlib.Path, split: str) -> list[dict]:
    """Reports without what the clock decides."""
    lines = read_all_reports(workdir)
    return [{key: line[key] for key in line if key not in _OF_THE_CLOCK} for line in lines if line["split"] == split]


def load_arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Everything in the state saved at `step`, the optimizer's included, by name."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        path = workdir / "checkpoints" / str(step) / "state"
        tree = reader.metadata(path).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


def assert_same_end(workdir: pathlib.Path, other: pathlib.Path, step: int) -> None:
    """The newest state, which is that of `step`, and all reports are alike, bit for bit."""
    assert list_checkpoint_steps(workdir)[-1] == list_checkpoint_steps(other)[-1] == step
    ours, theirs = load_arrays(workdir, step), load_arrays(other, step)
    assert ours.keys() == theirs.keys()
    assert any("opt_state" in name for name in ours)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for split in ("train", "validation"):
        assert read_reports(workdir, split) == read_reports(other, split)
