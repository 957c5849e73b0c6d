"""Services that a run can do without: messages to people, records of experiments.

`optional` runs something that may fail without failing the run. Imports no other room.
"""
