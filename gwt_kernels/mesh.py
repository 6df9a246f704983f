"""The planner's interface: meshes of processes."""

from gwt_kernels.planner.mesh import Mesh, mesh_of

__all__ = ["Mesh", "mesh_of"]
