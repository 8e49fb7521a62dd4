"""What is done to the tiers by hand, through a running server or on the disk tier's file.

`operations` says what that is, and `cli` is the command for it. `local` does it in this process;
`client` has it done by a server, through the `api` that it offers at the socket of `listener`.
"""
