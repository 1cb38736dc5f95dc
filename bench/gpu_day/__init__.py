"""What `bench/gpu.py` runs: its stages (`stages`), the processes that are theirs alone, its verdicts.

`stages` lists the stages and their commands, `runs` runs one command in a process of its own, and
`verdicts` judges the results; these need nothing but the standard library and the files beside
them, so that a broken environment is a result too. `about`, `layouts`, `profile` and `tiles` are
commands of stages: they measure what `prefkern bench` and the tests do not.
"""
