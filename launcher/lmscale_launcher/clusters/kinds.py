"""Cluster kinds by name: which module implements `cluster.kind`."""

from lmscale_launcher.clusters.base import Cluster


def cluster_of(kind: str) -> Cluster:
    """The cluster of this kind."""
    match kind:
        case "slurm":
            from lmscale_launcher.slurm.slurm_cluster import SlurmCluster

            return SlurmCluster()
        case "mpi":
            from lmscale_launcher.clusters.mpi import MpiCluster

            return MpiCluster()
        case _:
            from lmscale_launcher.clusters.local import LocalCluster

            return LocalCluster()
