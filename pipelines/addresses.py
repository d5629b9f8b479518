"""Which network addresses are of the public internet: what a service may ask when a stranger names the place."""

import ipaddress
from ipaddress import IPv4Address, IPv6Address, ip_network

_UNICAST_V6 = ip_network("2000::/3")  # all that is given out for the public
_TRANSLATED = ip_network(
    "64:ff9b::/96"
)  # NAT64: the last 32 bits are the IPv4 address that is reached
# Not of the public, whatever `ipaddress` of this Python knows (3.11.7 takes the second for public): the provider's own
# service on Azure, protocol assignments, the former 6to4 relay, Teredo and its neighbours, 6to4, documentation.
_SPECIAL = tuple(
    ip_network(one)
    for one in (
        *("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24"),
        *("2001::/23", "2002::/16", "2001:db8::/32", "3fff::/20"),
    )
)


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also behind what it may be wrapped in.

    Addresses of IPv6 that hold one of IPv4 by another mechanism than mapping and NAT64 are refused altogether.

    Args:
        address: As a name lookup gives it; what is no address is not public.
    """
    try:
        return _is_public(ipaddress.ip_address(address))
    except ValueError:
        return False


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if any(address in network for network in _SPECIAL if network.version == address.version):
        return False
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if address in _TRANSLATED:
            return _is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _UNICAST_V6 or _is_isatap(address):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _is_isatap(address: IPv6Address) -> bool:
    """Whether its interface part holds an address of IPv4 (RFC 5214)."""
    return (int(address) >> 32) & 0xFDFFFFFF == 0x00005EFE
