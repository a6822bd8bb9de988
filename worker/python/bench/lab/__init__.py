"""Networks with links of a rate, and what trains over them: parts of links.py."""
