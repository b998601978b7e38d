"""Serving: many clients on one engine. The scheduler and its caches know no server; `triton/` is the server's side."""
