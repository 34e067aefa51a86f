"""`ecdit doctor`: whether a machine, a cluster and a run are fit for each other, and how to make them so.

One module for each kind of question; a question is a `findings.Check`. No torch in this process.
"""
