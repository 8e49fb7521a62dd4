"""Administration of the tiers, of a running server or of the disk tier's file.

`operations` defines what can be done. `local` does it in this process, and `client` through the
admin API of a server: `handler` implements that API, `sockets` serves it. `commands` is the command
`tierserve cache`.
"""
