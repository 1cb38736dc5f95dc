"""The papers' claims, tried on one small model: what `bench/study.py` runs, draws and writes.

`reviews` has the texts, `oracle` the true reward, `policy` the model of which the last layers
train, `tasks` the pairs of each part, `parts` the runs, `training` one run, `measures` what is
measured of it. `study` keeps the runs and makes the JSON. `readings` reads that, `claims` says what
the papers claim and how it is judged, `figures` and `page` show it.
"""
