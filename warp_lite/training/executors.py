"""The ways in which the runs of an iteration can train, by name."""

from __future__ import annotations

import sys

from .batched import train_batched
from .run_folder import RunFolder
from .serial import train_serial

EXECUTORS = {"batched": train_batched, "serial": train_serial, "ray": train_serial}  # a Ray worker trains one run


def remote_workers(executor) -> tuple[str, object]:
    """The executor's name, and what takes runs to other processes (scale/ray.py); None if they train in this one."""
    if executor == "ray":
        from ..scale.ray import RayExecutor
        executor = RayExecutor()
    return (executor, None) if not hasattr(executor, "train") else ("ray", executor)


def same_executor(executor: str, folder: RunFolder | None) -> str:
    """The executor, or "serial" where a folder's runs began one after the other: together they would have no
    step in common to go on from, and would round otherwise."""
    if folder is not None and executor == "batched" and folder.executor in ("serial", "ray"):
        print(f"warp-lite: the runs in {folder.path} began one after the other and go on so", file=sys.stderr)
        return "serial"
    return executor
