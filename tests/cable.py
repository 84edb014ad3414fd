"""A host that can vanish: a network namespace at the end of a cable, for tests that run as root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.postgres import Cluster, provisioned_cluster

needs_cable = pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("iptables")),
    reason="network namespaces need root, iproute2 and iptables",
)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Cable:
    """A network namespace that reaches this machine by one cable alone."""

    namespace: str
    near: str
    address: str

    def cut(self) -> None:
        """Drop every packet, both ways, without a word to either end."""
        self._loss("-I")

    def mend(self) -> None:
        """Let packets pass again."""
        self._loss("-D")

    def _loss(self, change: str) -> None:
        for place, end in (([], self.near), (["ip", "netns", "exec", self.namespace], "far")):
            rule = ["iptables", "-w", change, "INPUT", "-i", end, "-j", "DROP"]
            subprocess.run([*place, *rule], check=True)


def laid_cable() -> Iterator[Cable]:
    """A cable, until it is taken away."""
    number = os.getpid() % 250
    made = Cable(f"skeldir{os.getpid()}", f"skel{os.getpid()}", f"10.213.{number}")
    ip("netns", "add", made.namespace)
    try:
        ip("link", "add", made.near, "type", "veth", "peer", "name", "far", "netns", made.namespace)
        ip("addr", "add", f"{made.address}.1/24", "dev", made.near)
        ip("link", "set", made.near, "up")
        inside = ("-n", made.namespace)
        ip(*inside, "addr", "add", f"{made.address}.2/24", "dev", "far")
        ip(*inside, "link", "set", "far", "up")
        ip(*inside, "link", "set", "lo", "up")
        yield made
    finally:
        ip("netns", "del", made.namespace)


def cluster_at(cable: Cable) -> Iterator[Cluster]:
    """A server that listens on the near end of a cable."""
    cluster = Cluster(host=f"{cable.address}.1")
    with (cluster.data / "pg_hba.conf").open("a") as hba:
        hba.write("host all all 10.213.0.0/16 scram-sha-256\n")
    yield from provisioned_cluster(cluster)
