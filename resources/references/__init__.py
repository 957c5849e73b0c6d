"""What assets hand to each other, and what is kept of checks: small typed facts, never the data.

Begin with `types`; `io_manager` stores them and finds them again, `evidence` keeps what checks judged. Imports no
other room.
"""
