"""What survives: a layout-free, pickle-free, checksummed checkpoint that is committed by one rename.

`layout` says where each rank's bytes lie in the global tensors, `plan` who writes them, `store` writes and commits,
`restore` verifies and loads into any other layout, `folder` finds and prunes, `manager` is what the trainer holds.
"""

from ecdit_train.checkpoint.failures import CheckpointDamagedError, CheckpointExistsError, CheckpointMismatchError
from ecdit_train.checkpoint.folder import Committed, clean, find, newest, prune, set_aside
from ecdit_train.checkpoint.layout import Placed, TensorSlice, Value
from ecdit_train.checkpoint.manager import CheckpointManager, Rejected, Resumed
from ecdit_train.checkpoint.restore import Loaded, load, load_full, read_objects, verify
from ecdit_train.checkpoint.store import SaveReport, save

__all__ = [
    "CheckpointDamagedError",
    "CheckpointExistsError",
    "CheckpointManager",
    "CheckpointMismatchError",
    "Committed",
    "Loaded",
    "Placed",
    "Rejected",
    "Resumed",
    "SaveReport",
    "TensorSlice",
    "Value",
    "clean",
    "find",
    "load",
    "load_full",
    "newest",
    "prune",
    "read_objects",
    "save",
    "set_aside",
    "verify",
]
