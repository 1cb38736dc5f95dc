"""What tests share: tiny models, drawn problems, oracles, tables of cases, and who runs them."""
