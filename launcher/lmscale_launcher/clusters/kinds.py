"""From a cluster kind's name to its implementation, by the table in lmscale/config/cluster_schema.py."""

from functools import cache
from importlib import import_module

from lmscale.config.cluster_schema import CLUSTER_KINDS
from lmscale_launcher.clusters.base import Cluster


@cache
def cluster_of(kind: str) -> Cluster:
    """The cluster of this kind. Its module is imported here, so that other kinds cost nothing."""
    row = CLUSTER_KINDS[kind]
    implementation: type[Cluster] = getattr(import_module(row.module), row.class_name)
    return implementation()
