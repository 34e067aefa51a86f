"""Login-node tools: render a job script, prepare a run folder, submit. Imports no torch."""
