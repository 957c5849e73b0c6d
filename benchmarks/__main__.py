"""`python -m benchmarks`: all benchmarks, one after the other."""

from __future__ import annotations

from benchmarks import code_location, whole_graph

code_location.main([])
whole_graph.main(["--rows", "10000", "--again"])
whole_graph.main(["--rows", "1000000", "--again"])
