"""The shared tier: backends on Redis and Memcached, and the leases and purges that they carry.

`redis` and `memcached` each need an extra package, so each is imported only where it is used.
"""

NAME = "shared"
NAMESPACE = "tierserve"
"""The prefix of our keys, before a colon."""
