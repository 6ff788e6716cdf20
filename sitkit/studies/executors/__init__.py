"""Where the tasks of a study are done: in this process, in processes of this machine, or on a Ray cluster.

The process that does a task holds the lock beside its log, as in sitkit.runtime.locks, so any number of processes and
machines on one folder divide a study among themselves; the system frees the lock of a dead process, and another process
does its task.  The folder must be on a file system with locks across its machines (NFS 4, Lustre and CephFS; NFS 3 only with
lockd).
"""

from sitkit.studies.executors.executor import POLL_SECONDS, Executor, InProcess, OnEvent, TaskEnd, perform
from sitkit.studies.executors.local import Local
from sitkit.studies.executors.ray import Ray

__all__ = ["POLL_SECONDS", "Executor", "InProcess", "Local", "OnEvent", "Ray", "TaskEnd", "perform"]
