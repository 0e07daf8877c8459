"""Share one audit among several processes; all of them end when one does.

The ranks exchange plain data, a few kilobytes per sub-layer, through the key-value store of
torch.distributed's rendezvous (`torchrun` keeps one). There is no process group and no collective,
for three reasons. A collective waits for ranks that have died. A model that calls
`torch.distributed.is_initialized()` must behave as it does in one process. Its factory may make a
process group itself. So an audit runs the same way on CPUs and GPUs, and ranks may share a GPU.
"""

from jacdiag.distributed.audit_team import Alone, Team
from jacdiag.distributed.failure import Failure, explained
from jacdiag.distributed.fingerprint import Fingerprint, fingerprint
from jacdiag.distributed.join import Ranks, enlisted, join
from jacdiag.distributed.partial_results import Share, Use, merged
from jacdiag.distributed.store import in_environment

__all__ = [
    "Alone",
    "Failure",
    "Fingerprint",
    "Ranks",
    "Share",
    "Team",
    "Use",
    "enlisted",
    "explained",
    "fingerprint",
    "in_environment",
    "join",
    "merged",
]
