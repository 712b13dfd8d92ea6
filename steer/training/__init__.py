"""Training runs, whatever the framework: what a plan and a tracker do at each event of one.

`SteeringRun` and `DriftRun` have a method for each event, in the order in which a run calls them: `attach`, `load_state_dict`, `start`,
`batch_start`, `batch_end`, ..., `detach`. The callbacks of Lightning and of Hugging Face only pass on the events of their trainers.
"""
