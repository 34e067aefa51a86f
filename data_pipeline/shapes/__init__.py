"""The procedural shapes set: what is said (`prompts`), drawn (`draw`), written to shards (`make`) and found again (`grader`).

One data set among others: the core of the data pipeline does not import it.
"""
