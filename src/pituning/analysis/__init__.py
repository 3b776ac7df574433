"""What lies between experts: straight paths, planes, what each member of a blend is worth, and how its weights moved."""

from pituning.analysis.connectivity import Connectivity, connectivity
from pituning.analysis.leave_one_out import LeaveOneOut, LeftOut, leave_one_out, lineage_weights
from pituning.analysis.plane import Plane, plane
from pituning.analysis.trajectory import Trajectory

__all__ = [
    "Connectivity",
    "LeaveOneOut",
    "LeftOut",
    "Plane",
    "Trajectory",
    "connectivity",
    "leave_one_out",
    "lineage_weights",
    "plane",
]
