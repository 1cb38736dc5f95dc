"""Helpers that tests share: tiny models, random problems, oracles, tables of cases, and runners."""
