"""Leave this folder out if torch is too old to have a backend in Python."""

from __future__ import annotations

from torch.utils import backend_registration

_CAN_HAVE_ONE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
collect_ignore_glob = [] if _CAN_HAVE_ONE else ["test_*.py"]
