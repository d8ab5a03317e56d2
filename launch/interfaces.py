"""By which network interface the processes of a trial reach each other, where they are on several nodes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

import ray

_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def use_interface_of_node() -> None:
    """Have gloo use the interface that has the address by which Ray knows this node, unless the user has named one.

    By itself gloo takes the address of the host's name, which on many machines is one of the loopback (Debian: 127.0.1.1), where
    no other node reaches it. NCCL never takes the loopback.
    """
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IPv4 address; None where that cannot be found out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                asked = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, asked)[20:24]) == address:
                    return name
    return None
