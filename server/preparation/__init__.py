"""What is made before a server's first start: its configuration and the embedded model.

`initial` writes a configuration for this machine, which `machine` describes, and `embedded_model`
makes the embedded model.
"""
