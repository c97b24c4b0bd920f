"""The MLflow runs of a search: a parent, and a child for each trial."""

MLFLOW_PAUSE_S = 60.0  # after a call that failed: the trials' loop waits for each
MLFLOW_STATUS = {"FINISHED": "FINISHED", "STOPPED": "KILLED", "FAILED": "FAILED"}  # of a trial, in MLflow's words
