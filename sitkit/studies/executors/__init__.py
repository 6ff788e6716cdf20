"""Where the tasks of a study are done: in this process, in processes of this machine, or on a Ray cluster.

Whoever is at a task holds the lock beside its log, as in sitkit.runtime.locks, so any number of processes and machines on one
folder divide a study among themselves; the system frees a dead one's lock, and its task is another's to do.  The folder
must be on a file system whose locks hold across its machines (NFS 4, Lustre and CephFS; NFS 3 only with lockd).
"""

from sitkit.studies.executors.executor import POLL_SECONDS, Ended, Executor, InProcess, Tell, perform
from sitkit.studies.executors.local import Local
from sitkit.studies.executors.ray import Ray

__all__ = ["POLL_SECONDS", "Ended", "Executor", "InProcess", "Local", "Ray", "Tell", "perform"]
