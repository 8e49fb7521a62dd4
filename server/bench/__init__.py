"""The command `tierserve bench`: loads an endpoint and says which tier answered.

A leaf of the server: it knows an endpoint by HTTP alone, tierserve or another one.
"""
